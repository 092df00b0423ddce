//! The connections of one source, in whatever order they come, and those of others.
//!
//! A source opens the main channel and the page channels at the same time, and either may arrive first, and either
//! may be the first to send something. Each connection is known by its first bytes; until then it is one of the
//! [`UnidentifiedConns`].

use super::listener::Caller;
use super::multifd::{PageStream, Settings};
use super::patience::Patience;
use super::postcopy::PreemptListener;
use super::unidentified::{Dropped, IdentifiedConn, Reason, Role, UnidentifiedConns};
use super::{Channel, Incoming, Listener, LoadError, MigrationError, Socket, Tls};
use qevm_wire::Located;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a destination that waits for a connection to identify itself looks whether its time is over.
const LOOK: Duration = Duration::from_millis(250);

/// How old a page channel that did not fit may be to belong to the source that is here now.
const MISFIT_AGE: Duration = Duration::from_secs(10);

/// What was seen while a source was waited for, and is told to waiters.
#[derive(Debug)]
pub(crate) enum Seen {
    /// A connection was dropped.
    Dropped(Dropped),
    /// A source did not come with all of its channels, which were dropped: [`MigrationError::MissingChannels`].
    Incomplete(MigrationError),
}

/// Waits for the main channel, and for all page channels if there are `settings` for them, as long as it takes. What is
/// dropped meanwhile is told to `seen`: unidentified ones, and sources that are not complete. A `preempt` channel is
/// not waited for: one that is here may say nothing for a long time, and others come late.
///
/// # Errors
/// [`MigrationError::Listen`] when the listener is of no more use.
pub(crate) fn gather(
    listener: &Listener,
    settings: Option<&Settings>,
    preempt: bool,
    tls: Option<Tls>,
    patience: Patience,
    seen: &mut dyn FnMut(Seen),
) -> Result<Incoming, MigrationError> {
    listener.set_nonblocking().map_err(|error| listener.failed(error))?;
    let page_channels = settings.map(|settings| settings.channels);
    let mut unidentified =
        UnidentifiedConns::new(page_channels, tls.clone(), patience.clone(), listener.address().clone());
    let mut source = Source { settings, main: None, pages: BTreeMap::new(), last: None, misfit: None };
    loop {
        let accepting = unidentified.accepts(Instant::now());
        let complete = source.last.map(|last| last + patience.channels());
        let deadline = [unidentified.deadline(), complete].into_iter().flatten().min();
        let deadline = deadline.map(|deadline| deadline.min(Instant::now() + LOOK));
        let ready = wait(accepting.then_some(listener), &unidentified, &source, deadline);
        let Ready { accept_ready, readable, main_left, pages_left } =
            ready.map_err(|error| listener.failed(error.into()))?;
        source.drop_left(main_left, &pages_left, seen);
        let dropped = &mut |dropped| seen(Seen::Dropped(dropped));
        let mut known = unidentified.read_prefixes(&readable, dropped);
        if accept_ready {
            unidentified.accept(listener, dropped)?;
        }
        known.drain(..).for_each(|known| source.take(known, seen));
        if source.is_complete() && settings.is_none() {
            // Its page channels, if it has some in spite of that, are here or in the queue.
            let dropped = &mut |dropped| seen(Seen::Dropped(dropped));
            unidentified.accept(listener, dropped)?;
            unidentified
                .read_prefixes(&unidentified.may_read(), dropped)
                .into_iter()
                .for_each(|known| source.take(known, seen));
        }
        if let Some((incoming, caller)) = source.take_complete() {
            let page_channels_called = unidentified.unwanted() > 0;
            let crowd = settings.is_none() && !preempt && unidentified.len() > 0;
            let misfit = incoming.misfit.or_else(|| crowd.then(|| Located::new(LoadError::MultifdOff, 0).into()));
            let waiting = unidentified.into_silent();
            let preempt = preempt.then(|| PreemptListener::new(listener.clone(), caller, waiting, tls, patience.watch));
            return Ok(Incoming { page_channels_called, misfit, preempt, ..incoming });
        }
        source.expire(patience.channels(), seen);
    }
}

/// The channels of a source that have come.
struct Source<'s> {
    settings: Option<&'s Settings>,
    main: Option<Main>,
    pages: BTreeMap<u8, (Arc<Socket>, Caller, PageStream)>,
    /// When the last of them came.
    last: Option<Instant>,
    /// The last page channel that did not fit, and when it came.
    misfit: Option<(MigrationError, Instant)>,
}

/// The main channel of a source.
struct Main {
    socket: Arc<Socket>,
    channel: Arc<dyn Channel>,
    caller: Caller,
    /// What was read from it.
    said: Vec<u8>,
}

impl<'s> Source<'s> {
    /// Takes in a channel, unless it is too many or does not fit.
    fn take(&mut self, IdentifiedConn { socket, channel, caller, role }: IdentifiedConn, seen: &mut dyn FnMut(Seen)) {
        let refused = match (role, self.settings) {
            (Role::Main(_), _) if self.main.is_some() => Some(Reason::Second("the main channel of a source")),
            (Role::Main(said), _) => {
                self.main = Some(Main { socket, channel, caller, said });
                None
            }
            (Role::Page(_), None) => Some(Reason::MultifdOff),
            (Role::Page(first), Some(settings)) => match PageStream::new(channel, &first, settings.decoder()) {
                Err(error) => {
                    let why = Reason::Page(error.to_string());
                    self.misfit = Some((error, Instant::now()));
                    Some(why)
                }
                Ok(stream) if self.pages.contains_key(&stream.number()) => {
                    Some(Reason::Second("a page channel of this number"))
                }
                Ok(stream) => {
                    self.pages.insert(stream.number(), (socket, caller, stream));
                    None
                }
            },
        };
        match refused {
            Some(why) => seen(Seen::Dropped(Dropped { caller, why })),
            None => self.last = Some(Instant::now()),
        }
    }

    /// Drops channels that were closed before the source was complete, so that they are not in the way of another
    /// source's.
    fn drop_left(&mut self, main: bool, pages: &[u8], seen: &mut dyn FnMut(Seen)) {
        let main = main.then(|| self.main.take()).flatten().map(|main| main.caller);
        let pages = pages.iter().filter_map(|number| self.pages.remove(number)).map(|(_, caller, _)| caller);
        for caller in main.into_iter().chain(pages) {
            seen(Seen::Dropped(Dropped { caller, why: Reason::Left }));
        }
        if self.main.is_none() && self.pages.is_empty() {
            self.last = None;
        }
    }

    /// Drops all channels if the others have had their time.
    fn expire(&mut self, patience: Duration, seen: &mut dyn FnMut(Seen)) {
        if self.last.is_none_or(|last| last.elapsed() < patience) {
            return;
        }
        let (main, missing) = (self.main.is_none(), self.missing().collect());
        seen(Seen::Incomplete(MigrationError::MissingChannels { main, missing, patience }));
        self.last = None;
        let main = self.main.take().map(|main| main.caller);
        let pages = std::mem::take(&mut self.pages).into_values().map(|(_, caller, _)| caller);
        for caller in main.into_iter().chain(pages) {
            seen(Seen::Dropped(Dropped { caller, why: Reason::Incomplete }));
        }
    }

    fn missing(&self) -> impl Iterator<Item = u8> + '_ {
        let channels = self.settings.map_or(0, |settings| settings.channels);
        (0..channels).filter(|number| !self.pages.contains_key(number))
    }

    fn is_complete(&self) -> bool {
        self.main.is_some() && self.missing().next().is_none()
    }

    /// The connections of the source, if all have come, and where the main channel comes from.
    fn take_complete(&mut self) -> Option<(Incoming, Caller)> {
        if !self.is_complete() {
            return None;
        }
        let Main { channel: main, caller, said: first, .. } = self.main.take()?;
        // By their numbers, as the map has them.
        let pages = std::mem::take(&mut self.pages).into_values().map(|(_, _, stream)| stream).collect();
        // One that came long before was another's.
        let misfit = self.misfit.take().filter(|(_, at)| at.elapsed() < MISFIT_AGE).map(|(error, _)| error);
        Some((
            Incoming { first, pages, settings: self.settings.cloned(), misfit, watched: true, ..main.into() },
            caller,
        ))
    }
}

/// Who has done something.
struct Ready {
    /// A connection is in the listener's queue.
    accept_ready: bool,
    /// For each unidentified connection, whether it has.
    readable: Vec<bool>,
    /// The main channel was closed by its source…
    main_left: bool,
    /// …and page channels of these numbers.
    pages_left: Vec<u8>,
}

fn wait(
    listener: Option<&Listener>,
    unidentified: &UnidentifiedConns,
    source: &Source<'_>,
    deadline: Option<Instant>,
) -> Result<Ready, Errno> {
    let mut entries: Vec<_> = unidentified.polled().collect();
    let count = entries.len();
    let sockets = source.main.iter().map(|main| &main.socket).chain(source.pages.values().map(|(socket, ..)| socket));
    entries.extend(sockets.map(|socket| PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::RDHUP)));
    entries.extend(listener.map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)));
    // A millisecond more, so that the deadline is over then.
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
    let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
    match poll(&mut entries, left.as_ref()) {
        // A signal: no connection has done anything.
        Err(Errno::INTR) => entries.iter_mut().for_each(PollFd::clear_revents),
        polled => drop(polled?),
    }
    let mut ready = entries.iter().map(|entry| !entry.revents().is_empty());
    let readable = ready.by_ref().take(count).collect();
    let main_left = source.main.is_some() && ready.next() == Some(true);
    let pages_left = source.pages.keys().zip(ready.by_ref()).filter(|(_, left)| *left).map(|(number, _)| *number);
    let pages_left = pages_left.collect();
    Ok(Ready { accept_ready: ready.next() == Some(true), readable, main_left, pages_left })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::Watch;
    use crate::{Address, Capabilities, Parameters, Timeouts};
    use qevm_multifd::{Init, Uuid};
    use qevm_savevm::container::{Compression, FileKind};
    use qevm_savevm::first_bytes::FirstBytes;
    use qevm_wire::{Profile, QemuVersion, Writer};
    use std::io::Write;
    use std::net::{Shutdown, TcpStream};
    use std::sync::mpsc;
    use std::thread;

    const HEADER: &[u8] = b"QEVM\0\0\0\x03";
    /// What a source says first: the header and the type of the configuration.
    const MAIN: &[u8] = b"QEVM\0\0\0\x03\x07";
    /// Far more than anything here takes.
    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(200);

    fn settings(channels: u8) -> Settings {
        let capabilities = Capabilities { multifd: true, ..Capabilities::default() };
        let parameters = Parameters { multifd_channels: channels, ..Parameters::default() };
        Settings::of(capabilities, &parameters, &Profile::new(QemuVersion::NEWEST, "microvm")).unwrap()
    }

    fn init(number: u8) -> Vec<u8> {
        let mut writer = Writer::new();
        Init::new(Uuid::default(), number).encode(&mut writer);
        writer.as_bytes().to_vec()
    }

    /// A destination waits for a source, with this many page channels, while `callers` connect, and has to get one:
    /// these connections stay open. Gives what was seen and not looked at.
    fn wait_for(
        channels: Option<u8>,
        patience: Patience,
        callers: impl FnOnce(&dyn Fn(&[u8]) -> TcpStream, &mpsc::Receiver<Seen>) -> Vec<TcpStream>,
    ) -> (Incoming, Vec<Seen>) {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let Address::Tcp { port, .. } = *listener.address() else { panic!() };
        let call = |first: &[u8]| {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.write_all(first).unwrap();
            stream
        };
        let (sender, seen) = mpsc::channel();
        // Not scoped: a caller that fails must not wait for it.
        let waiting = thread::spawn(move || {
            let settings = channels.map(settings);
            gather(&listener, settings.as_ref(), false, None, patience, &mut |seen| drop(sender.send(seen))).unwrap()
        });
        let _open = callers(&call, &seen);
        (waiting.join().unwrap(), seen.iter().collect())
    }

    fn reason(seen: &mpsc::Receiver<Seen>) -> Reason {
        match seen.recv_timeout(LONG).unwrap() {
            Seen::Dropped(Dropped { why, .. }) => why,
            Seen::Incomplete(error) => panic!("{error}"),
        }
    }

    fn patience(silence: Duration, channels: Duration) -> Patience {
        Patience { silence: Some(silence), channels: Some(channels), watch: Arc::default() }
    }

    #[test]
    fn strangers_are_named_and_neither_block_nor_end_the_wait() {
        for channels in [None, Some(2)] {
            let (incoming, rest) = wait_for(channels, patience(LONG, LONG), |call, seen| {
                let silent = call(b"");
                let half = call(&HEADER[..7]);
                drop(call(b""));
                assert!(matches!(reason(seen), Reason::Closed(FirstBytes::Nothing)));
                drop(call(b"QE"));
                assert!(matches!(reason(seen), Reason::Closed(FirstBytes::Unknown { len: 2, .. })));
                let wrong: [(&[u8], FirstBytes); 4] = [
                    (&[0x16, 3, 1, 2, 0, 1, 0], FirstBytes::Tls),
                    (b"GET / HTTP/1.1\r\n\r\n", FirstBytes::Http),
                    (&[0x1f, 0x8b, 8, 0, 0], FirstBytes::File(FileKind::Compressed(Compression::Gzip))),
                    (b"LibvirtQemudSave\x02\0\0\0", FirstBytes::File(FileKind::Libvirt)),
                ];
                for (bytes, expected) in wrong {
                    let _open = call(bytes);
                    let why = reason(seen);
                    assert!(matches!(&why, Reason::Wrong(found) if *found == expected), "{why:?}");
                }
                let _older = call(b"QEVM\0\0\0\x02");
                assert!(matches!(reason(seen), Reason::Version(2)));
                let mut damaged = init(0);
                damaged[7] = 9;
                let _damaged = call(&damaged);
                assert!(matches!(reason(seen), Reason::Page(_)));
                let pages = (0..channels.unwrap_or(0)).map(|number| call(&init(number)));
                pages.chain([call(MAIN), silent, half]).collect()
            });
            assert_eq!((incoming.first.as_slice(), incoming.pages.len()), (MAIN, usize::from(channels.unwrap_or(0))));
            assert!(rest.is_empty(), "{rest:?}");
        }
    }

    #[test]
    fn a_connection_that_sends_nothing_or_too_little_is_dropped_after_a_while() {
        let (_, rest) = wait_for(None, patience(SHORT, LONG), |call, seen| {
            let (_silent, mut slow) = (call(b""), call(b"Q"));
            assert!(matches!(reason(seen), Reason::Silent(FirstBytes::Nothing, SHORT)));
            // A byte now and then does not help.
            let slowly = loop {
                let _ = slow.write_all(b"E").and_then(|()| slow.write_all(b""));
                match seen.recv_timeout(Duration::from_millis(150)) {
                    Ok(Seen::Dropped(Dropped { why, .. })) => break why,
                    other => assert!(other.is_err(), "{other:?}"),
                }
            };
            assert!(matches!(slowly, Reason::Silent(..) | Reason::Wrong(_)), "{slowly:?}");
            vec![call(MAIN)]
        });
        assert!(rest.is_empty(), "{rest:?}");
    }

    /// What an operator sets counts for who is here already.
    #[test]
    fn a_change_of_the_handshake_timeout_reaches_a_wait_under_way() {
        let watch = Arc::<Watch>::default();
        let set = |handshake_ms| watch.set_timeouts(Timeouts { handshake_ms, ..Timeouts::default() });
        set(0);
        let patience = Patience { watch: watch.clone(), ..Patience::default() };
        let (incoming, rest) = wait_for(Some(1), patience, |call, seen| {
            let _silent = call(b"");
            let _alone = call(MAIN);
            assert!(seen.recv_timeout(SHORT).is_err(), "no connection was to be dropped");
            set(1);
            let mut dropped = Vec::new();
            while dropped.len() < 3 {
                dropped.push(seen.recv_timeout(LONG).unwrap());
            }
            let silent = |seen: &Seen| matches!(seen, Seen::Dropped(Dropped { why: Reason::Silent(..), .. }));
            assert!(dropped.iter().any(silent), "{dropped:?}");
            assert!(dropped.iter().any(|seen| matches!(seen, Seen::Incomplete(_))), "{dropped:?}");
            set(0);
            vec![call(&init(0)), call(MAIN)]
        });
        assert_eq!(incoming.pages.len(), 1);
        assert!(rest.is_empty(), "{rest:?}");
    }

    /// A connection that sends the header alone is no source, with page channels or without, and keeps none out.
    #[test]
    fn a_connection_that_sends_the_header_alone_is_dropped_after_a_while() {
        for channels in [None, Some(1)] {
            let (incoming, rest) = wait_for(channels, patience(SHORT, LONG), |call, seen| {
                let _header = call(HEADER);
                assert!(matches!(reason(seen), Reason::Silent(FirstBytes::File(FileKind::Stream), SHORT)));
                drop(call(HEADER));
                assert!(matches!(reason(seen), Reason::Closed(FirstBytes::File(FileKind::Stream))));
                let mut slow = call(HEADER);
                slow.write_all(&MAIN[HEADER.len()..]).unwrap();
                (0..channels.unwrap_or(0)).map(|number| call(&init(number))).chain([slow]).collect()
            });
            assert_eq!(incoming.first, MAIN);
            assert!(rest.is_empty(), "{rest:?}");
        }
    }

    #[test]
    fn idle_connections_do_not_renew_the_patience() {
        let (incoming, _) = wait_for(Some(2), patience(LONG, SHORT), |call, seen| {
            let _half = (call(MAIN), call(&init(1)));
            let mut idle = Vec::new();
            let incomplete = loop {
                idle.push(call(b""));
                match seen.recv_timeout(SHORT / 4) {
                    Ok(Seen::Incomplete(error)) => break error,
                    other => assert!(other.is_err() && idle.len() < 200, "{other:?}"),
                }
            };
            let MigrationError::MissingChannels { main, missing, .. } = incomplete else { panic!("{incomplete}") };
            assert_eq!((main, missing), (false, vec![0]));
            // The wait has begun anew.
            vec![call(&init(0)), call(&init(1)), call(MAIN)]
        });
        assert_eq!(incoming.pages.len(), 2);
    }

    #[test]
    fn a_crowd_costs_no_more_than_its_room() {
        let (incoming, rest) = wait_for(None, patience(LONG, LONG), |call, seen| {
            let mut crowd = Vec::new();
            // Two rounds of as many as there is room for.
            for _ in 0..2 * (ROOM_AND_MAIN) {
                crowd.push(call(b""));
            }
            for _ in 0..ROOM_AND_MAIN {
                assert!(matches!(reason(seen), Reason::Crowded(FirstBytes::Nothing)));
            }
            crowd.push(call(MAIN));
            crowd
        });
        assert_eq!(incoming.first, MAIN);
        assert!(rest.len() <= 1, "{rest:?}");
    }

    const ROOM_AND_MAIN: usize = 257;

    #[test]
    fn a_second_source_is_none_of_the_first() {
        let (incoming, _) = wait_for(Some(2), patience(LONG, LONG), |call, seen| {
            let mut main = call(MAIN);
            let page = call(&init(0));
            main.write_all(b"first").unwrap();
            let _again = call(&init(0));
            assert!(matches!(reason(seen), Reason::Second(_)));
            let _second = call(MAIN);
            assert!(matches!(reason(seen), Reason::Second(_)));
            vec![main, page, call(&init(1))]
        });
        assert_eq!(incoming.pages.iter().map(PageStream::number).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn a_source_that_leaves_makes_room_for_another() {
        let (incoming, _) = wait_for(Some(2), patience(LONG, LONG), |call, seen| {
            let (main, page) = (call(MAIN), call(&init(1)));
            main.shutdown(Shutdown::Both).unwrap();
            assert!(matches!(reason(seen), Reason::Left));
            drop(page);
            assert!(matches!(reason(seen), Reason::Left));
            vec![call(&init(1)), call(&init(0)), call(MAIN)]
        });
        assert!(incoming.misfit.is_none() && incoming.pages.len() == 2);
    }

    #[test]
    fn page_channels_where_there_are_none_are_kept_in_mind() {
        let (incoming, _) =
            wait_for(None, patience(LONG, LONG), |call, _| vec![call(&init(0)), call(&init(1)), call(MAIN)]);
        assert!(incoming.page_channels_called);
        let Some(MigrationError::Load(error)) = incoming.misfit else { panic!("{:?}", incoming.misfit) };
        assert!(matches!(error.kind, LoadError::MultifdOff));
        // Alone they are dropped, as any other connection.
        let (incoming, _) = wait_for(None, patience(SHORT, LONG), |call, seen| {
            let _page = call(&init(0));
            assert!(matches!(reason(seen), Reason::MultifdOff));
            vec![call(MAIN)]
        });
        assert!(!incoming.page_channels_called && incoming.misfit.is_none());
    }
}
