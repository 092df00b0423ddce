//! The same with page channels.

use super::*;
use crate::arrivals::{Seen, gather};
use crate::multifd::Settings;
use crate::patience::Patience;
use crate::unidentified::{Dropped, Reason};
use crate::{Address, Listener, LoadError, NoDescriptors};
use qevm_multifd::{Compression, ErrorKind, HandshakeError, Init, PacketError, Uuid};
use qevm_wire::profile::ZeroPageDetection;
use qevm_wire::{Blame, Fault};
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How a source connects, and what goes wrong on its channels.
#[derive(Default)]
pub(super) struct Plan {
    /// Page channels that are connected before the main channel; the others follow in falling order.
    pub(super) before_main: usize,
    /// Faults of one page channel.
    pub(super) faults: Option<(usize, Faults)>,
    /// How long the destination waits for another channel; longer than any source takes if not given.
    pub(super) patience: Option<Duration>,
}

/// Far more than a source takes on any machine.
const LONG: Duration = Duration::from_secs(60);
/// For channels that do not come. Those that come have to do so in this time.
const SHORT: Duration = Duration::from_secs(2);
/// Bytes of the first packet, which is sent over every page channel whatever else is.
const INIT: u64 = 64;

impl Pair {
    /// Page channels between these machines, with one of QEMU's methods.
    pub(super) fn multifd(self, channels: u8, method: Compression) -> Self {
        let capabilities = self.job.capabilities().with([("multifd", true)]).unwrap();
        self.job.set_capabilities(capabilities).unwrap();
        let mut parameters = self.job.parameters();
        parameters.multifd_channels = channels;
        parameters.multifd_compression = method;
        self.job.set_parameters(parameters);
        self
    }

    /// Settings of the destination that differ from the source's.
    fn but(mut self, change: impl FnOnce(&mut Parameters)) -> Self {
        let mut parameters = self.job.parameters();
        change(&mut parameters);
        self.incoming_parameters = Some(parameters);
        self
    }

    pub(super) fn go(&self, plan: &Plan) -> Outcome {
        self.watch(plan).0
    }

    /// The same, with what was seen while the destination waited. It waits until a source is complete: when this one
    /// has failed before, another comes, says the first word and leaves.
    fn watch(&self, plan: &Plan) -> (Outcome, Vec<Seen>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("in");
        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        let guest = self.source.clone();
        let connect = |faults: Faults| {
            let writer = guest.clone();
            Arc::new(Faulty::new(Socket::Unix(UnixStream::connect(&path).unwrap()), faults, move || writer.work()))
        };
        let count = usize::from(self.job.parameters().multifd_channels);
        let mut pages = vec![None; count];
        let mut main = None;
        for (place, number) in (0..count).rev().enumerate() {
            if place == plan.before_main {
                main = Some(connect(Faults::default()));
            }
            let faults = plan.faults.clone().filter(|(channel, _)| *channel == number);
            pages[number] = Some(connect(faults.map(|(_, faults)| faults).unwrap_or_default()));
        }
        let main = main.unwrap_or_else(|| connect(Faults::default()));
        let written = main.clone();
        let pages = pages.into_iter().flatten().map(|channel| channel as Arc<dyn Channel>).collect();
        let sending = Outgoing { pages, ..(main as Arc<dyn Channel>).into() };
        let profile = self.profile.clone();
        let log = Mutex::new(Vec::new());
        let (source, destination) = self.play(sending, |job| {
            let settings = Settings::of(job.capabilities(), &job.parameters(), &profile);
            let patience =
                Patience { silence: Some(LONG), channels: Some(plan.patience.unwrap_or(LONG)), watch: Arc::default() };
            let gathered = Arc::new(AtomicBool::new(false));
            let channels = settings.as_ref().map_or(0, |settings| settings.channels);
            another_source_later(path, channels, self.job.clone(), gathered.clone());
            let incoming =
                gather(&listener, settings.as_ref(), false, None, patience, &mut |seen| log.lock().push(seen));
            gathered.store(true, Ordering::SeqCst);
            incoming
        });
        let outcome = Outcome { source, destination, statistics: self.job.statistics(), written: written.written() };
        (outcome, log.into_inner())
    }
}

/// When `source` has ended and who waits has still no source, another comes, says its first words and leaves when they
/// were heard.
fn another_source_later(path: PathBuf, channels: u8, source: Arc<Job>, gathered: Arc<AtomicBool>) {
    thread::spawn(move || {
        source.wait();
        while !gathered.load(Ordering::SeqCst) {
            // The destination may have gone.
            let connect = |first: &[u8]| {
                UnixStream::connect(&path).and_then(|mut stream| stream.write_all(first).map(|()| stream)).ok()
            };
            let page = |number| {
                let mut writer = qevm_wire::Writer::new();
                Init::new(Uuid::default(), number).encode(&mut writer);
                connect(writer.as_bytes())
            };
            let _streams: Vec<_> = (0..channels).map(page).chain([connect(b"QEVM\0\0\0\x03\x07")]).collect();
            thread::sleep(Duration::from_millis(20));
        }
    });
}

#[test]
fn a_working_guest_moves_over_any_number_of_channels_with_any_method() {
    for channels in [1, 2, 4, 8] {
        for method in [Compression::None, Compression::Zlib, Compression::Zstd] {
            let pair = Pair::new(2000).multifd(channels, method);
            let outcome = pair.go(&Plan::default());
            pair.assert_moved(&outcome);
            let ram = outcome.statistics.ram;
            assert!(ram.dirty_sync_count >= 2, "the guest was working: {ram:?}");
            assert!(ram.duplicate > 600 && ram.normal > 1300, "{ram:?}");
            // Pages went over the page channels: the main channel had little to carry.
            assert!(outcome.written < 20_000, "{channels} {method}: {}", outcome.written);
            assert!(method != Compression::None || ram.transferred > 1300 * 4096, "{ram:?}");
        }
    }
}

/// Both flush modes, both layouts, and the extra synchronisation of 8.1 to 9.2, with every way zero pages travel.
#[test]
fn the_packets_follow_the_release_and_the_zero_page_detection() {
    for release in ["5.2", "7.2", "8.2", "9.0", "10.0", "11.1"] {
        for mode in [ZeroPageDetection::None, ZeroPageDetection::Legacy, ZeroPageDetection::Multifd] {
            let mut pair = Pair::new(3000).multifd(3, Compression::None);
            pair.profile = Profile::new(release.parse().unwrap(), "microvm");
            let mut parameters = pair.job.parameters();
            parameters.zero_page_detection = mode;
            pair.job.set_parameters(parameters);
            let outcome = pair.go(&Plan::default());
            pair.assert_moved(&outcome);
            let zero = outcome.statistics.ram.duplicate;
            // Few at least: the guest clears pages by itself, so only the mode without detection has none.
            assert_eq!(zero > 900, mode != ZeroPageDetection::None, "{release} {mode:?}: {zero}");
            // 1,000 records of 8 bytes are on the main channel where the main thread looks for zero pages.
            let settings = Settings::of(pair.job.capabilities(), &pair.job.parameters(), &pair.profile).unwrap();
            let legacy = settings.zero_pages == ZeroPageDetection::Legacy;
            assert_eq!(outcome.written > 8000, legacy, "{release} {mode:?}: {}", outcome.written);
        }
    }
}

/// What QEMU's releases do by default, and what those without zero pages in packets can do.
#[test]
fn zero_pages_travel_as_the_release_can_read_them() {
    use ZeroPageDetection::{Legacy, Multifd, None as Off};
    let rows = [
        ("7.2", [Off, Legacy, Legacy]),
        ("8.2", [Off, Legacy, Legacy]),
        ("9.0", [Off, Legacy, Multifd]),
        ("11.1", [Off, Legacy, Multifd]),
    ];
    for (release, expected) in rows {
        let profile = Profile::new(release.parse().unwrap(), "microvm");
        let capabilities = Capabilities { multifd: true, ..Capabilities::default() };
        let found = [Off, Legacy, Multifd].map(|mode| {
            let parameters = Parameters { zero_page_detection: mode, ..Parameters::default() };
            Settings::of(capabilities, &parameters, &profile).unwrap().zero_pages
        });
        assert_eq!(found, expected, "{release}");
    }
}

#[test]
fn channels_arrive_in_any_order() {
    for before_main in 0..=5 {
        let pair = Pair::new(300).multifd(5, Compression::Zstd);
        let outcome = pair.go(&Plan { before_main, ..Plan::default() });
        pair.assert_moved(&outcome);
    }
}

#[test]
fn the_largest_number_of_channels_works() {
    let pair = Pair::new(600).multifd(255, Compression::None);
    // Each packet gives the guest a step, and each round has 255 of them at least.
    pair.source.pages_per_step.store(0, Ordering::Relaxed);
    let outcome = pair.go(&Plan { before_main: 100, ..Plan::default() });
    pair.assert_moved(&outcome);
}

#[test]
fn channels_that_do_not_come_are_named_and_the_source_goes_on() {
    let pair = Pair::new(60).multifd(2, Compression::None).but(|parameters| parameters.multifd_channels = 4);
    let (outcome, seen) = pair.watch(&Plan { patience: Some(SHORT), ..Plan::default() });
    pair.assert_stayed(&outcome);
    let incomplete = seen.iter().find_map(|seen| match seen {
        Seen::Incomplete(MigrationError::MissingChannels { missing, main, .. }) => Some((missing.as_slice(), *main)),
        _ => None,
    });
    // The main channel's first bytes wait for the page channels of the source, which are there.
    assert_eq!(incomplete, Some((&[2, 3][..], false)), "{seen:?}");
    let dropped = |seen: &&Seen| matches!(seen, Seen::Dropped(Dropped { why: Reason::Incomplete, .. }));
    assert_eq!(seen.iter().filter(dropped).count(), 3, "{seen:?}");
}

#[test]
fn too_many_channels_are_refused() {
    // Which channels call first is up to the scheduler. If it is the main channel and two that fit, the destination
    // does not know of the others, and the source ends when they are not taken.
    for _ in 0..100 {
        let pair = Pair::new(60).multifd(4, Compression::None).but(|parameters| parameters.multifd_channels = 2);
        let (outcome, seen) = pair.watch(&Plan::default());
        pair.assert_stayed(&outcome);
        let Err(MigrationError::Load(error)) = &outcome.destination else { panic!("{outcome:?}") };
        let refused = |seen: &&Seen| matches!(seen, Seen::Dropped(Dropped { why: Reason::Page(_), .. }));
        let refused = seen.iter().filter(refused).count();
        let number =
            |kind: &ErrorKind| matches!(kind, ErrorKind::Handshake(HandshakeError::ChannelNumber { channels: 2, .. }));
        match &error.kind {
            LoadError::Multifd(kind) if number(kind) => assert!((1..=2).contains(&refused), "{seen:?}"),
            kind => assert!(refused == 0 && kind.fault() == Fault::Truncated, "{error}; {seen:?}"),
        }
        if refused == 2 {
            return;
        }
    }
    panic!("no run in which two channels too many came in time");
}

#[test]
fn another_method_is_named_on_both_sides() {
    for (ours, theirs) in [
        (Compression::Zlib, Compression::Zstd),
        (Compression::None, Compression::Zlib),
        (Compression::Zstd, Compression::None),
    ] {
        let pair = Pair::new(60).multifd(2, ours).but(|parameters| parameters.multifd_compression = theirs);
        let outcome = pair.go(&Plan::default());
        pair.assert_stayed(&outcome);
        let Err(MigrationError::Load(error)) = &outcome.destination else { panic!("{outcome:?}") };
        let method = |kind: &ErrorKind| matches!(kind, ErrorKind::Packet(PacketError::Method { expected, .. }) if *expected == theirs);
        assert!(matches!(&error.kind, LoadError::Multifd(kind) if method(kind)), "{error}");
        assert!(matches!(outcome.source, Err(MigrationError::PeerFailed { .. })), "{:?}", outcome.source);
    }
}

#[test]
fn the_capability_on_one_side_only_is_named() {
    // Off at the destination: the main channel arrives first, or a page channel does.
    for before_main in [0, 1] {
        let mut pair = Pair::new(60).multifd(2, Compression::None);
        pair.incoming = Some(Capabilities { multifd: false, ..pair.job.capabilities() });
        let outcome = pair.go(&Plan { before_main, ..Plan::default() });
        pair.assert_stayed(&outcome);
        let Err(MigrationError::Load(error)) = &outcome.destination else { panic!("{outcome:?}") };
        assert!(matches!(error.kind, LoadError::MultifdOff), "{error}");
    }
    // Off at the source.
    let mut pair = Pair::new(60);
    pair.incoming = Some(Capabilities { multifd: true, ..pair.job.capabilities() });
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("in");
    let address = Address::Unix(path.clone());
    let listener = Listener::bind(&address).unwrap();
    let sending = Outgoing::open(&address, &pair.job, &mut NoDescriptors).unwrap();
    let profile = pair.profile.clone();
    let named = Mutex::new(Vec::new());
    let (source, destination) = pair.play(sending, |job| {
        let settings = Settings::of(job.capabilities(), &job.parameters(), &profile).unwrap();
        let patience = Patience { channels: Some(SHORT), silence: Some(LONG), watch: Arc::default() };
        let gathered = Arc::new(AtomicBool::new(false));
        another_source_later(path, settings.channels, pair.job.clone(), gathered.clone());
        let incoming = gather(&listener, Some(&settings), false, None, patience, &mut |seen| {
            if let Seen::Incomplete(MigrationError::MissingChannels { missing, main: false, .. }) = seen {
                named.lock().extend(missing);
            }
        });
        gathered.store(true, Ordering::SeqCst);
        incoming
    });
    assert!(source.is_err() && pair.source.is_running() && destination.is_err());
    assert_eq!(named.into_inner(), [0, 1]);
}

#[test]
fn a_page_channel_that_breaks_leaves_the_guest_running_at_the_source() {
    let mut cut = 0;
    // A few places, with threads and sockets; `testing` has all of them.
    let places = [0, 9, INIT, 3001, 100_003, 300_007].into_iter();
    // How much goes over one of three channels is up to the scheduler; all goes over the only one.
    let rows = places.map(|place| (3, 1, place)).chain([64, 30_011, 300_007].map(|place| (1, 0, place)));
    for (return_path, (channels, channel, place)) in
        [true, false].into_iter().flat_map(|on| rows.clone().map(move |row| (on, row)))
    {
        let mut pair = Pair::new(200).return_path(return_path).multifd(channels, Compression::None);
        let faults = Faults { cut_at: Some(place), ..Faults::default() };
        let outcome = pair.go(&Plan { faults: Some((channel, faults)), ..Plan::default() });
        if outcome.source.is_ok() {
            assert!(channels > 1 && place >= INIT, "{channels} channels, cut at {place}: {outcome:?}");
            pair.assert_moved(&outcome);
            continue;
        }
        pair.assert_stayed(&outcome);
        cut += 1;
        if cut % 4 == 0 {
            pair.renew_destination();
            let again = pair.go(&Plan::default());
            pair.assert_moved(&again);
        }
    }
}

#[test]
fn cancelling_ends_all_channels() {
    for (channels, place) in [0, 9001, 150_003, 290_011].into_iter().flat_map(|place| [(1, place), (2, place)]) {
        let pair = Pair::new(200).multifd(channels, Compression::None);
        let (job, called) = (pair.job.clone(), Arc::new(AtomicBool::new(false)));
        let calling = called.clone();
        let call: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            calling.store(true, Ordering::SeqCst);
            job.cancel().unwrap();
        });
        let faults = Faults { call_at: Some((place, call)), ..Faults::default() };
        let outcome = pair.go(&Plan { faults: Some((0, faults)), ..Plan::default() });
        let called = called.load(Ordering::SeqCst);
        // How much goes over one of two channels is up to the scheduler; all goes over the only one.
        assert!(called || (channels > 1 && place > 0), "{channels} channels, {place}: {outcome:?}");
        if called {
            pair.assert_stayed(&outcome);
            assert_eq!(outcome.statistics.status, Status::Cancelled, "{place}: {outcome:?}");
        } else {
            pair.assert_moved(&outcome);
        }
    }
}

/// Channels that deliver at different speeds: a page that travels slowly in one round must not undo what came in the
/// next.
#[test]
fn a_slow_channel_never_brings_an_older_copy() {
    for method in [Compression::None, Compression::Zlib] {
        let pair = Pair::new(300).multifd(4, method);
        pair.source.pages_per_step.store(20, Ordering::Relaxed);
        let faults = Faults { bytes_per_ms: Some(4 << 10), ..Faults::default() };
        let outcome = pair.go(&Plan { faults: Some((2, faults)), ..Plan::default() });
        pair.assert_moved(&outcome);
    }
}

/// A UNIX socket has no such thing. Nothing is sent then.
#[test]
fn pages_that_cannot_be_sent_in_place_leave_the_guest() {
    let pair = Pair::new(60).multifd(2, Compression::None);
    pair.job.set_capabilities(pair.job.capabilities().with([("zero-copy-send", true)]).unwrap()).unwrap();
    let outcome = pair.go(&Plan::default());
    pair.assert_stayed(&outcome);
    assert_eq!(outcome.source.unwrap_err().to_string(), "Zero copy send feature not detected in host kernel");
}
