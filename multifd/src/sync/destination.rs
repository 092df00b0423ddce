//! Who may go on at a destination.

use super::{FlushMode, SyncError};
use core::fmt;

/// Lets the reader of the main channel and those of the page channels go on together.
///
/// Each reader tells the barrier what it met and does not read on while it [must wait](SyncBarrier::main_waits).
/// Threads share it behind a mutex and a condition variable that is notified after every call; an event loop asks it
/// directly. How long to wait is the caller's to decide; with [`timed_out`](SyncBarrier::timed_out) the error names who
/// is missing. Once there was an error, every call gives it, so that no reader waits for one that has given up: a
/// reader that fails for reasons of its own (its connection broke, a packet was damaged) says so with
/// [`abort`](SyncBarrier::abort).
///
/// The main channel lists the RAM blocks *before* its first flush record. Hand the list to the page channels before
/// [`main_flush`](SyncBarrier::main_flush) is called, and not only at the end of the section: the call may let them go
/// on, to pages of these blocks. The event `RamRecord::EndOfBlocks` of the main channel says when the list is whole.
///
/// ```text
///  main channel            page channel
///  main_flush/main_eos     channel_sync        each says what it met
///        │ Wait                  │ Wait          and does not read on
///        └──────────┬────────────┘
///          the last one is there
///        ┌──────────┴────────────┐
///   Released: all read on; `completed` counts one more
///
///  channel_end, main_end, timed_out, abort ──> failed: every call gives the error
///  join: a channel that came late catches up with what is complete, and then waits as the others
/// ```
///
/// ```
/// use qevm_multifd::{FlushMode, Progress, SyncBarrier};
///
/// let mut barrier = SyncBarrier::new(2, Some(FlushMode::PerRound));
/// assert_eq!(barrier.channel_sync(1)?, Progress::Wait); // channel 1 must not read on
/// assert_eq!(barrier.main_flush()?, Progress::Wait); // neither must the main channel
/// assert_eq!(barrier.waiting().to_string(), "the main channel waits for a SYNC packet on channel 0");
/// assert_eq!(barrier.channel_sync(0)?, Progress::Released); // now all go on
/// assert!(!barrier.main_waits() && !barrier.channel_waits(1));
/// # Ok::<(), qevm_multifd::SyncError>(())
/// ```
#[derive(Debug, Clone)]
pub struct SyncBarrier {
    mode: Option<FlushMode>,
    channels: Vec<Channel>,
    main: Main,
    /// How many synchronisations are complete.
    completed: u64,
    /// An EOS was met.
    after_setup: bool,
    failed: Option<SyncError>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channel {
    /// Has not come, and is not expected.
    Absent,
    /// Came late: the number of synchronisations that were complete without it, whose SYNC packets are still to come on
    /// it.
    Late(u64),
    Reading,
    /// Met its SYNC packet.
    Waiting,
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Main {
    Reading,
    Waiting,
    Ended,
}

/// Whether a reader goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[must_use]
pub enum Progress {
    /// Go on: this was no synchronisation, or one that is complete already.
    Continue,
    /// Wait for the others.
    Wait,
    /// The synchronisation is complete: all channels go on.
    Released,
}

/// What a reader waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Waiting {
    /// No reader waits.
    Nobody,
    /// The main channel, and perhaps page channels, wait for SYNC packets on these. At the end of memory: SYNC packets
    /// of synchronisations that were complete when these channels [joined](SyncBarrier::join) have not come yet.
    Channels(Vec<u8>),
    /// These page channels wait for a synchronisation on the main channel.
    Main(Vec<u8>),
}

impl SyncBarrier {
    /// A barrier for the main channel and `channels` page channels (1 to 255). Without a mode, the setup section
    /// tells: it holds a flush record if, and only if, the source flushes once a round.
    pub fn new(channels: u8, mode: Option<FlushMode>) -> Self {
        SyncBarrier {
            mode,
            channels: vec![Channel::Reading; channels.into()],
            main: Main::Reading,
            completed: 0,
            after_setup: false,
            failed: None,
        }
    }

    /// A page channel has come that [`new`](Self::new) did not count: for a destination that cannot know how many there
    /// are.
    ///
    /// From now on it is waited for. Synchronisations that were complete before were complete without it, so it passes
    /// over as many SYNC packets; what it brings up to the last of them may be older than what others have brought
    /// since. A destination that loads pages as they come must therefore count its channels from the start; one that
    /// keeps the channels apart, and orders them later, need not.
    ///
    /// ```
    /// use qevm_multifd::{Progress, SyncBarrier};
    ///
    /// let mut barrier = SyncBarrier::new(0, None);
    /// assert_eq!(barrier.main_flush()?, Progress::Released); // no other reader to wait for
    /// barrier.join(1)?;
    /// assert_eq!(barrier.channel_sync(1)?, Progress::Continue); // it is over
    /// assert_eq!(barrier.main_flush()?, Progress::Wait); // the next one is with channel 1
    /// assert_eq!(barrier.channel_sync(1)?, Progress::Released);
    /// # Ok::<(), qevm_multifd::SyncError>(())
    /// ```
    ///
    /// # Errors
    /// [`SyncError::Order`] if the channel is counted already; [`SyncError::UnknownChannel`] for number 255, which no
    /// channel has.
    pub fn join(&mut self, channel: u8) -> Result<(), SyncError> {
        self.healthy()?;
        let index = usize::from(channel);
        if channel == u8::MAX {
            return Err(SyncError::UnknownChannel { found: channel, channels: u8::MAX });
        }
        if self.channels.len() <= index {
            self.channels.resize(index + 1, Channel::Absent);
        }
        if self.channels[index] != Channel::Absent {
            return self.fail(SyncError::Order { what: "a page channel", place: "joins for the second time" });
        }
        self.channels[index] = if self.completed > 0 { Channel::Late(self.completed) } else { Channel::Reading };
        Ok(())
    }

    /// The main channel met a flush record.
    ///
    /// # Errors
    /// [`SyncError::Mode`]; [`SyncError::MissingSync`] if a page channel has ended; [`SyncError::AfterEnd`];
    /// [`SyncError::Order`] if the main channel had to wait.
    pub fn main_flush(&mut self) -> Result<Progress, SyncError> {
        self.healthy()?;
        match self.mode {
            Some(expected @ FlushMode::PerSection) => {
                self.fail(SyncError::Mode { found: FlushMode::PerRound, expected })
            }
            _ => {
                self.mode = Some(FlushMode::PerRound);
                self.main_mark("flush record")
            }
        }
    }

    /// The main channel met an EOS of the `ram` section.
    ///
    /// # Errors
    /// As [`main_flush`](Self::main_flush). After [`main_end`](Self::main_end), an EOS means nothing.
    pub fn main_eos(&mut self) -> Result<Progress, SyncError> {
        self.healthy()?;
        let setup = !core::mem::replace(&mut self.after_setup, true);
        match self.mode {
            // The sections of postcopy go on, without page channels.
            _ if self.main == Main::Ended => Ok(Progress::Continue),
            // The setup section of a source that flushes once a round holds a flush record.
            Some(expected @ FlushMode::PerRound) if setup && self.completed == 0 && self.main != Main::Waiting => {
                self.fail(SyncError::Mode { found: FlushMode::PerSection, expected })
            }
            Some(FlushMode::PerRound) if self.main == Main::Reading => Ok(Progress::Continue),
            _ => {
                self.mode.get_or_insert(FlushMode::PerSection);
                self.main_mark("EOS")
            }
        }
    }

    /// The guest's memory is complete: the END section is over, or postcopy starts. The main channel announces nothing
    /// more.
    ///
    /// # Errors
    /// [`SyncError::ExtraSync`] if a page channel waits; [`SyncError::Order`] if the main channel had to wait.
    pub fn main_end(&mut self) -> Result<(), SyncError> {
        self.healthy()?;
        if self.main == Main::Waiting {
            return self.fail(SyncError::Order { what: "the end of memory", place: "comes in a synchronisation" });
        }
        self.main = Main::Ended;
        match self.first(Channel::Waiting) {
            Some(channel) => self.fail(SyncError::ExtraSync { channel, number: self.completed }),
            None => Ok(()),
        }
    }

    /// A page channel met a SYNC packet, and has loaded the pages in front of it and those of the packet itself.
    ///
    /// # Errors
    /// [`SyncError::ExtraSync`] after the end of the main channel; [`SyncError::UnknownChannel`];
    /// [`SyncError::Order`] if the channel had to wait or has ended.
    pub fn channel_sync(&mut self, channel: u8) -> Result<Progress, SyncError> {
        self.healthy()?;
        let number = self.completed;
        let order = |place| SyncError::Order { what: "SYNC packet", place };
        match (*self.channel(channel)?, self.main) {
            (Channel::Late(left), _) => {
                *self.channel(channel)? = if left > 1 { Channel::Late(left - 1) } else { Channel::Reading };
                return Ok(Progress::Continue);
            }
            (Channel::Absent, _) => return Err(self.unknown(channel)),
            (Channel::Waiting, _) => return self.fail(order("was read while its channel had to wait")),
            (Channel::Ended, _) => return self.fail(order("was read after the end of its channel")),
            (Channel::Reading, Main::Ended) => return self.fail(SyncError::ExtraSync { channel, number }),
            (Channel::Reading, _) => {}
        }
        *self.channel(channel)? = Channel::Waiting;
        self.complete()
    }

    /// A page channel was closed in an orderly way.
    ///
    /// # Errors
    /// [`SyncError::MissingSync`] if the main channel waits for it; [`SyncError::UnknownChannel`].
    pub fn channel_end(&mut self, channel: u8) -> Result<(), SyncError> {
        self.healthy()?;
        let state = *self.channel(channel)?;
        let number = match state {
            Channel::Absent => return Err(self.unknown(channel)),
            Channel::Late(left) => Some(self.completed - left),
            Channel::Reading if self.main == Main::Waiting => Some(self.completed),
            _ => None,
        };
        *self.channel(channel)? = Channel::Ended;
        number.map_or(Ok(()), |number| self.fail(SyncError::MissingSync { channel, number }))
    }

    /// The error of a caller that has waited long enough.
    pub fn timed_out(&mut self) -> SyncError {
        let error = SyncError::TimedOut { waiting: self.waiting() };
        self.failed.get_or_insert(error).clone()
    }

    /// A reader has failed and reads no more. A reader that waits, or comes to wait, gets the error, unless there was
    /// one before: the first one is given back.
    ///
    /// ```
    /// use qevm_multifd::{Progress, SyncBarrier, SyncError};
    ///
    /// let mut barrier = SyncBarrier::new(1, None);
    /// assert_eq!(barrier.main_flush()?, Progress::Wait);
    /// barrier.abort("channel 0: connection reset by peer");
    /// assert!(matches!(barrier.healthy(), Err(SyncError::Aborted { .. }))); // the main channel waits no longer
    /// # Ok::<(), SyncError>(())
    /// ```
    pub fn abort(&mut self, reason: impl Into<String>) -> SyncError {
        self.failed.get_or_insert_with(|| SyncError::Aborted { reason: reason.into() }).clone()
    }

    /// True while the main channel must not be read.
    pub fn main_waits(&self) -> bool {
        self.main == Main::Waiting
    }

    /// True while this page channel must not be read.
    pub fn channel_waits(&self, channel: u8) -> bool {
        self.channels.get(usize::from(channel)) == Some(&Channel::Waiting)
    }

    /// How many synchronisations are complete. A waiting reader may go on when this is no longer what it was.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// The mode, as configured or as the source showed it.
    pub fn mode(&self) -> Option<FlushMode> {
        self.mode
    }

    /// Who waits, and for what.
    pub fn waiting(&self) -> Waiting {
        let waiting: Vec<u8> = self.numbers(|channel| channel == Channel::Waiting).collect();
        let late = |channel| matches!(channel, Channel::Late(_));
        match self.main {
            Main::Waiting => {
                Waiting::Channels(self.numbers(|channel| channel == Channel::Reading || late(channel)).collect())
            }
            Main::Ended if self.numbers(late).next().is_some() => Waiting::Channels(self.numbers(late).collect()),
            _ if waiting.is_empty() => Waiting::Nobody,
            _ => Waiting::Main(waiting),
        }
    }

    /// Checks that no reader has failed.
    ///
    /// # Errors
    /// The first error of any call.
    pub fn healthy(&self) -> Result<(), SyncError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn main_mark(&mut self, what: &'static str) -> Result<Progress, SyncError> {
        match self.main {
            Main::Waiting => {
                return self.fail(SyncError::Order { what, place: "was read while the main channel had to wait" });
            }
            Main::Ended => return self.fail(SyncError::AfterEnd { what }),
            Main::Reading => {}
        }
        if let Some(channel) = self.first(Channel::Ended) {
            return self.fail(SyncError::MissingSync { channel, number: self.completed });
        }
        self.main = Main::Waiting;
        self.complete()
    }

    fn complete(&mut self) -> Result<Progress, SyncError> {
        let all = self.channels.iter().all(|channel| matches!(channel, Channel::Waiting | Channel::Absent));
        if self.main != Main::Waiting || !all {
            return Ok(Progress::Wait);
        }
        self.main = Main::Reading;
        self.channels.iter_mut().filter(|channel| **channel == Channel::Waiting).for_each(|c| *c = Channel::Reading);
        self.completed += 1;
        Ok(Progress::Released)
    }

    fn channel(&mut self, found: u8) -> Result<&mut Channel, SyncError> {
        let error = self.unknown(found);
        self.channels.get_mut(usize::from(found)).ok_or(error)
    }

    fn unknown(&self, found: u8) -> SyncError {
        SyncError::UnknownChannel { found, channels: self.channels.len() as u8 }
    }

    fn first(&self, state: Channel) -> Option<u8> {
        self.numbers(move |channel| channel == state).next()
    }

    fn numbers(&self, is: impl Fn(Channel) -> bool) -> impl Iterator<Item = u8> {
        (0..=u8::MAX).zip(&self.channels).filter(move |(_, channel)| is(**channel)).map(|(number, _)| number)
    }

    fn fail<T>(&mut self, error: SyncError) -> Result<T, SyncError> {
        Err(self.failed.insert(error).clone())
    }
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, numbers, after) = match self {
            Waiting::Nobody => return f.write_str("no channel waits"),
            Waiting::Channels(numbers) => ("the main channel waits for a SYNC packet on channel", numbers, ""),
            Waiting::Main(numbers) => ("channel", numbers, " waits for a synchronisation on the main channel"),
        };
        f.write_str(before)?;
        for (i, number) in numbers.iter().enumerate() {
            write!(f, "{} {number}", if i > 0 { "," } else { "" })?;
        }
        f.write_str(after)
    }
}

#[cfg(test)]
mod tests;
