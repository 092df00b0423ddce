//! Deadlines of what is waited for on a connection.
//!
//! A connection whose peer is stopped, or whose link is cut, brings nothing, takes nothing, and says nothing about it.
//! So every read and write comes back from the kernel after a moment, and the thread that waits counts these moments:
//! [`Watched`]. A process that was stopped itself, or whose host was, has not counted meanwhile.
//!
//! What is written has a limit of its own on each connection. What is read has one for all connections of a migration
//! together: a page channel may have nothing to bring for a long time while others have. A source reads answers alone,
//! whose deadlines are the core's.

use crate::channel::{ReadSlice, WriteSlice};
use crate::parameters::Timeouts;
use crate::{Address, Channel, Status};
use parking_lot::{Mutex, MutexGuard};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How often a thread that waits looks whether it is still to wait.
const TICK: Duration = Duration::from_millis(250);

/// Which connection of a migration it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ChannelName {
    /// The main channel.
    Main,
    /// The page channel of this number.
    Page(u8),
    /// The preempt channel.
    Preempt,
}

impl fmt::Display for ChannelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ChannelName::Main => f.write_str("the main channel"),
            ChannelName::Page(number) => write!(f, "page channel {number}"),
            ChannelName::Preempt => f.write_str("the preempt channel"),
        }
    }
}

/// What did not happen in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Awaited {
    /// Bytes from the peer.
    Bytes,
    /// Room for bytes to the peer.
    Room,
    /// That the peer takes what was written, and closes.
    End,
    /// An acknowledgement of the peer's host.
    Acknowledgement,
}

/// A wait on a connection that took too long. It is the inner error of an [`io::Error`] of kind
/// [`io::ErrorKind::TimedOut`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.text())]
#[non_exhaustive]
pub struct Silence {
    /// On which connection.
    pub channel: ChannelName,
    /// What was waited for.
    pub awaited: Awaited,
    /// How long; `None` where the system has the time.
    pub waited: Option<Duration>,
    /// What the migration was at.
    pub status: Status,
    /// The parameter that has the limit; none where it is no parameter's.
    pub parameter: Option<&'static str>,
}

impl Silence {
    /// That which is behind an error of the system's, if it is one of these.
    pub fn of(error: &io::Error) -> Option<&Silence> {
        error.get_ref().and_then(|inner| inner.downcast_ref())
    }

    /// What is on its way there has not moved for as long as `x-idle-timeout` says.
    pub(crate) fn on_the_way(channel: ChannelName, waited: Option<Duration>, status: Status) -> io::Error {
        let (awaited, parameter) = (Awaited::Acknowledgement, Some("x-idle-timeout"));
        io::Error::new(io::ErrorKind::TimedOut, Silence { channel, awaited, waited, status, parameter })
    }

    fn text(&self) -> String {
        let Silence { channel, awaited, waited, status, parameter } = self;
        let time = waited.map_or_else(String::new, |waited| format!(" for {} s", waited.as_secs_f64()));
        let what = match awaited {
            Awaited::Bytes => format!("nothing has come on {channel}{time}"),
            Awaited::Room => format!("{channel} has taken nothing{time}"),
            Awaited::End => format!("the peer has not taken and closed {channel}{time}"),
            Awaited::Acknowledgement => format!("the peer's host has acknowledged nothing on {channel}{time}"),
        };
        let parameter = parameter.map_or_else(String::new, |name| format!(" ({name})"));
        format!("{what} in status '{}'{parameter}", status.as_str())
    }
}

/// What the connections of a migration have in common.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    state: Mutex<State>,
    /// Reads and writes that have moved something.
    moves: AtomicU64,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    status: Status,
    timeouts: Timeouts,
}

impl Watch {
    pub(crate) fn set_status(&self, status: Status) {
        self.lock().status = status;
    }

    pub(crate) fn set_timeouts(&self, timeouts: Timeouts) {
        self.lock().timeouts = timeouts;
    }

    pub(crate) fn timeouts(&self) -> Timeouts {
        self.lock().timeouts
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// Whose bytes a connection brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Brings {
    /// Those of a destination: answers.
    Answers,
    /// Those of a source: the guest.
    Guest,
}

/// A connection that does not wait for ever.
pub(crate) struct Watched {
    inner: Arc<dyn Channel>,
    name: ChannelName,
    watch: Arc<Watch>,
    brings: Brings,
    /// For a time a read has this limit alone.
    silence: Mutex<Option<Duration>>,
}

impl Watched {
    /// Watches over a connection of its own to or from `address`, if that is known.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn new(
        inner: Arc<dyn Channel>,
        name: ChannelName,
        watch: &Arc<Watch>,
        brings: Brings,
        address: Option<&Address>,
    ) -> io::Result<Self> {
        let keep_alive = matches!(address, Some(Address::Tcp { options, .. }) if options.keep_alive.on == Some(true));
        inner.limit_waits(TICK, watch.timeouts().tcp_user(keep_alive))?;
        Ok(Watched { inner, name, watch: watch.clone(), brings, silence: Mutex::default() })
    }

    fn moved<T>(&self, moved: io::Result<T>) -> io::Result<T> {
        match moved {
            Ok(moved) => {
                self.watch.moves.fetch_add(1, Ordering::Relaxed);
                Ok(moved)
            }
            // Of the system: by TCP_USER_TIMEOUT, or for want of an answer to its probes.
            Err(error) if error.raw_os_error() == Some(libc::ETIMEDOUT) => {
                Err(self.silence(Awaited::Acknowledgement, None, None))
            }
            Err(error) => Err(error),
        }
    }

    fn silence(&self, awaited: Awaited, waited: Option<Duration>, parameter: Option<&'static str>) -> io::Error {
        let (channel, status) = (self.name, self.watch.lock().status);
        io::Error::new(io::ErrorKind::TimedOut, Silence { channel, awaited, waited, status, parameter })
    }

    /// Does something that may wait, again and again, as long as less than `limit` has passed since it got any further,
    /// which `progress` has changed then.
    fn within<T>(
        &self,
        awaited: Awaited,
        mut act: impl FnMut() -> io::Result<T>,
        progress: impl Fn() -> u64,
        limit: impl Fn() -> Option<(Duration, Option<&'static str>)>,
    ) -> io::Result<T> {
        let (mut waited, mut before) = (Duration::ZERO, None);
        loop {
            match act() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return self.moved(done),
            }
            let now = progress();
            // What was there at the first look may be old.
            waited = if before.replace(now).is_some_and(|before| before != now) { TICK } else { waited + TICK };
            if let Some((limit, parameter)) = limit()
                && waited >= limit
            {
                return Err(self.silence(awaited, Some(limit), parameter));
            }
        }
    }

    /// What the peer has taken of what was written, as far as it shows.
    fn taken(&self) -> u64 {
        self.inner.backlog().unwrap_or(0)
    }

    fn own_silence(&self) -> MutexGuard<'_, Option<Duration>> {
        self.silence.lock()
    }
}

/// The limit of a parameter, with its name.
fn of(limit: Option<Duration>, name: &'static str) -> Option<(Duration, Option<&'static str>)> {
    limit.map(|limit| (limit, Some(name)))
}

impl Channel for Watched {
    fn write(&self, parts: &[WriteSlice<'_>]) -> io::Result<usize> {
        let limit = || of(self.watch.timeouts().idle(), "x-idle-timeout");
        self.within(Awaited::Room, || self.inner.write(parts), || self.taken(), limit)
    }

    fn send_in_place(&self) -> io::Result<()> {
        self.inner.send_in_place()
    }

    fn write_in_place(&self, parts: &[WriteSlice<'_>]) -> io::Result<usize> {
        let limit = || of(self.watch.timeouts().idle(), "x-idle-timeout");
        self.within(Awaited::Room, || self.inner.write_in_place(parts), || self.taken(), limit)
    }

    fn sent_in_place(&self) -> io::Result<(u32, bool)> {
        let limit = || of(self.watch.timeouts().idle(), "x-idle-timeout");
        self.within(Awaited::Acknowledgement, || self.inner.sent_in_place(), || self.taken(), limit)
    }

    fn read(&self, parts: &mut [ReadSlice<'_>]) -> io::Result<usize> {
        let own = *self.own_silence();
        let limit = || match (own, self.brings) {
            (Some(own), _) => Some((own, None)),
            (None, Brings::Answers) => None,
            (None, Brings::Guest) => of(self.watch.timeouts().idle(), "x-idle-timeout"),
        };
        let progress = || if own.is_some() { 0 } else { self.watch.moves.load(Ordering::Relaxed) };
        self.within(Awaited::Bytes, || self.inner.read(parts), progress, limit)
    }

    fn backlog(&self) -> io::Result<u64> {
        self.inner.backlog()
    }

    fn is_open(&self) -> io::Result<bool> {
        self.inner.is_open()
    }

    fn limit_silence(&self, limit: Option<Duration>) -> io::Result<()> {
        *self.own_silence() = limit;
        Ok(())
    }

    fn answers(&self) -> bool {
        self.inner.answers()
    }

    fn settle(&self) -> io::Result<()> {
        let limit = || of(self.watch.timeouts().switchover(), "x-switchover-timeout");
        self.within(Awaited::End, || self.inner.settle(), || self.taken(), limit)
    }

    fn say_end(&self) {
        self.inner.say_end();
    }

    fn finish_writing(&self) {
        self.inner.finish_writing();
    }

    fn stop_reading(&self) {
        self.inner.stop_reading();
    }

    fn close(&self) {
        self.inner.close();
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("name", &self.name).field("inner", &self.inner).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
