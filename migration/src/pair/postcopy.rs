//! Guests that go before their memory, to a destination that is only its end of the protocol.

use super::*;
use parking_lot::Mutex;
use qevm_returnpath::Message;
use qevm_savevm::command::Command;
use qevm_savevm::ram::{BlockId, PageAt, PreemptDecoder, RamBlocks, RamRecord};
use qevm_savevm::{Decoder, DecoderOptions, Event};
use qevm_wire::{CountedString, Driver, PageGeometry};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

const PAGES: u64 = 2000;
const PAGE: usize = 4096;

/// What a destination does when it has the devices.
type Arrived<'a> = &'a (dyn Fn(&UnixStream) + Sync);

/// Runs a guest of [`PAGES`] away, and gives how that ended and how often each page came after the package. `arrived`
/// is told when the destination has the package; it goes on with the stream then, unless it has closed.
fn depart(pair: &Pair, arrived: Arrived<'_>) -> (Result<(), MigrationError>, HashMap<(BlockId, u64), u64>) {
    depart_with(pair, [("postcopy-ram", true), ("release-ram", false)], arrived)
}

fn depart_with(
    pair: &Pair,
    capabilities: [(&str, bool); 2],
    arrived: Arrived<'_>,
) -> (Result<(), MigrationError>, HashMap<(BlockId, u64), u64>) {
    let (a, b) = UnixStream::pair().unwrap();
    let capabilities = Capabilities::default().with(capabilities).unwrap();
    pair.job.set_capabilities(capabilities).unwrap();
    pair.job.begin().unwrap();
    pair.job.start_postcopy().unwrap();
    thread::scope(|scope| {
        let profile = pair.profile.clone();
        let destination = scope.spawn(move || {
            let mut later = HashMap::new();
            let mut stream = Driver::new(&b, Decoder::new(DecoderOptions::live(&profile)));
            let mut gone = false;
            // The source closes when it has failed.
            let pong = |value| drop((&b).write_all(&Message::Pong { value }.to_bytes()));
            while let Ok(Some(event)) = stream.next() {
                match event {
                    Event::Command(Command::Ping(value)) => pong(value),
                    Event::Command(Command::Packaged { len }) => {
                        stream.payload().read_exact(&mut vec![0; len as usize]).unwrap();
                        [3, 0x42].into_iter().for_each(pong);
                        gone = true;
                        arrived(&b);
                    }
                    Event::Ram(record) => {
                        let zero = matches!(record, RamRecord::Zero(_));
                        if let RamRecord::Page(PageAt { block, offset, .. })
                        | RamRecord::Zero(PageAt { block, offset, .. }) = record
                        {
                            if !zero {
                                stream.payload().read_exact(&mut [0; PAGE]).unwrap();
                            }
                            if gone {
                                *later.entry((block, offset)).or_default() += 1;
                            }
                        }
                    }
                    _ => {}
                }
            }
            let _ = (&b).write_all(&Message::Shut { status: 0 }.to_bytes());
            later
        });
        let main: Arc<dyn Channel> = Arc::new(Socket::Unix(a));
        let result = migrate(&*pair.source, &main.into(), &pair.job, &pair.profile);
        (result, destination.join().unwrap())
    })
}

#[test]
fn the_rate_limit_of_postcopy_holds_for_what_was_not_requested() {
    const LIMIT: u64 = 8_000_000;
    let pair = Pair::new(PAGES as usize);
    pair.job.set_parameters(Parameters {
        max_bandwidth: 1 << 20,
        max_postcopy_bandwidth: LIMIT,
        ..Parameters::default()
    });
    let gone = Mutex::new(None);
    let (result, later) = depart(&pair, &|_| *gone.lock() = Some(Instant::now()));
    let took = gone.into_inner().unwrap().elapsed();
    result.unwrap();
    assert!(later.len() > 1000, "{} pages came later", later.len());
    let bytes = pair.job.statistics().ram.postcopy_bytes;
    // A window's worth may go at once.
    let least = Duration::from_secs_f64(bytes as f64 / LIMIT as f64).saturating_sub(Duration::from_millis(150));
    assert!(took > least, "{bytes} bytes in {took:?}");
}

#[test]
fn a_source_gives_back_all_that_the_destination_has_and_each_page_once() {
    for releases in [true, false] {
        let pair = Pair::new(PAGES as usize);
        // Some of it goes before the guest does.
        pair.job.set_parameters(Parameters { max_bandwidth: 20 << 20, ..Parameters::default() });
        let (result, later) = depart_with(&pair, [("postcopy-ram", true), ("release-ram", releases)], &|_| ());
        result.unwrap();
        assert!(later.len() > 100 && later.values().all(|times| *times == 1), "{} pages came later", later.len());
        let mut released = std::mem::take(&mut *pair.source.released.lock());
        released.sort_by_key(|(block, bytes)| (*block, bytes.start));
        let mut joined: Vec<(usize, std::ops::Range<u64>)> = Vec::new();
        for (block, bytes) in released {
            match joined.last_mut() {
                Some((last, whole)) if *last == block && whole.end == bytes.start => whole.end = bytes.end,
                _ => joined.push((block, bytes)),
            }
        }
        let all = pair.source.ram().iter().map(|view| 0..view.memory.len() as u64).enumerate().collect();
        assert_eq!(joined, if releases { all } else { Vec::new() });
    }
}

#[test]
fn a_flood_of_repeated_requests_costs_no_page() {
    const TIMES: u64 = 20;
    let pair = Pair::new(PAGES as usize);
    // Most comes later, and in the background next to nothing: one page in each 100 ms.
    pair.job.set_parameters(Parameters {
        max_bandwidth: 1 << 20,
        max_postcopy_bandwidth: 4096,
        ..Parameters::default()
    });
    let (result, later) = depart(&pair, &|socket| {
        let socket = socket.try_clone().unwrap();
        thread::spawn(move || {
            let request = |block, start| Message::ReqPages { block, start, len: PAGE as u32 }.to_bytes();
            let mut flood = request(CountedString::new("pc.bios"), 0);
            flood.extend(request(CountedString::new("microvm.ram"), 0));
            for page in (0..PAGES).rev() {
                (0..TIMES).for_each(|_| flood.extend(request(None, page * PAGE as u64)));
            }
            (1..4).for_each(|page| flood.extend(request(CountedString::new("pc.bios"), page * PAGE as u64)));
            // The source may be done before it has read all of them.
            let _ = (&socket).write_all(&flood);
        });
    });
    result.unwrap();
    let statistics = pair.job.statistics();
    assert_eq!((statistics.status, pair.source.is_running()), (Status::Completed, false));
    let ram = statistics.ram;
    assert!(later.values().all(|times| *times == 1), "a page came twice");
    let came = later.len() as u64;
    assert!(came > 100 && ram.remaining == 0, "{came} pages came later: {ram:?}");
    assert!(ram.postcopy_requests > 1000, "{ram:?}");
    // A record and a section around each page, and nothing for a request that is repeated.
    assert!(ram.postcopy_bytes <= came * (PAGE as u64 + 64) + 64, "{came} pages came later: {ram:?}");
}

/// Where connections come in another order they cannot be told apart: a 7.2 gets both at the start, and what is newer
/// the second when the guest goes.
#[test]
fn pages_that_are_waited_for_go_over_the_preempt_channel_which_comes_when_the_release_expects_it() {
    for (release, at_the_start) in [(QemuVersion::new(7, 2), true), (QemuVersion::NEWEST, false)] {
        let mut pair = Pair::new(PAGES as usize);
        pair.profile = Profile::new(release, "microvm");
        let slow = Parameters { max_bandwidth: 1 << 20, max_postcopy_bandwidth: 4096, ..Parameters::default() };
        pair.job.set_parameters(slow);
        let on = Capabilities::default().with([("postcopy-ram", true), ("postcopy-preempt", true)]).unwrap();
        pair.job.set_capabilities(on).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        pair.job.begin().unwrap();
        let (urgent, ended) = thread::scope(|scope| {
            let (profile, job) = (pair.profile.clone(), pair.job.clone());
            let destination = scope.spawn(move || {
                let (main, _) = listener.accept().unwrap();
                let early = at_the_start.then(|| listener.accept().unwrap().0);
                let mut preempt = None;
                let pong = |value| drop((&main).write_all(&Message::Pong { value }.to_bytes()));
                let mut stream = Driver::new(&main, Decoder::new(DecoderOptions::live(&profile)));
                while let Some(event) = stream.next().unwrap() {
                    match event {
                        Event::Command(Command::Ping(value)) => {
                            pong(value);
                            let _ = job.start_postcopy();
                        }
                        Event::Command(Command::Packaged { len }) => {
                            stream.payload().read_exact(&mut vec![0; len as usize]).unwrap();
                            let blocks = stream.decoder().ram_blocks().clone();
                            let channel =
                                early.as_ref().map_or_else(|| listener.accept().unwrap().0, |c| c.try_clone().unwrap());
                            preempt = Some(thread::spawn(move || read_urgent(channel, blocks)));
                            [3, 0x42]
                                .into_iter()
                                .filter(|value| *value == 3 || profile.postcopy_package_ping)
                                .for_each(pong);
                            let name = |name| CountedString::new(name);
                            for (block, pages) in [(name("pc.bios"), 4), (name("microvm.ram"), PAGES)] {
                                for page in (0..pages).rev() {
                                    let (block, start) = (block.clone(), page * PAGE as u64);
                                    let request = Message::ReqPages { block, start, len: PAGE as u32 };
                                    (&main).write_all(&request.to_bytes()).unwrap();
                                }
                            }
                        }
                        _ => {}
                    }
                }
                (&main).write_all(&Message::Shut { status: 0 }.to_bytes()).unwrap();
                preempt.unwrap()
            });
            let to = crate::Address::Unix(path);
            let connections = Outgoing::open(&to, &pair.job, &mut crate::NoDescriptors).unwrap();
            migrate(&*pair.source, &connections, &pair.job, &pair.profile).unwrap();
            drop(connections);
            destination.join().unwrap().join().unwrap()
        });
        assert!(urgent > 100, "{urgent} pages came on the preempt channel of {release}");
        assert_eq!(ended, at_the_start, "{release}: a 7.2 is told that nothing more comes");
    }
}

/// Pages that come on a preempt channel, and whether EOS ends them.
fn read_urgent(channel: UnixStream, blocks: Arc<RamBlocks>) -> (u64, bool) {
    let mut stream = Driver::new(&channel, PreemptDecoder::new(blocks, PageGeometry::X86));
    let (mut pages, mut ended) = (0, false);
    while let Some(record) = stream.next().unwrap() {
        match record {
            RamRecord::Page(_) => {
                stream.payload().read_exact(&mut [0; PAGE]).unwrap();
                pages += 1;
            }
            RamRecord::Zero(_) => pages += 1,
            _ => ended = true,
        }
    }
    (pages, ended)
}

#[test]
fn a_guest_whose_package_does_not_get_out_goes_on() {
    let pair = Pair::new(PAGES as usize);
    let (a, b) = UnixStream::pair().unwrap();
    let capabilities = Capabilities::default().with([("postcopy-ram", true)]).unwrap();
    pair.job.set_capabilities(capabilities).unwrap();
    pair.job.begin().unwrap();
    pair.job.start_postcopy().unwrap();
    // Nothing more gets through from the moment when it is too late to cancel.
    let broken = a.try_clone().unwrap();
    pair.job.watch(move |notice| {
        if notice == crate::Notice::Status(Status::PostcopyDevice) {
            broken.shutdown(std::net::Shutdown::Both).unwrap();
        }
    });
    let result = thread::scope(|scope| {
        let profile = pair.profile.clone();
        scope.spawn(move || {
            let mut stream = Driver::new(&b, Decoder::new(DecoderOptions::live(&profile)));
            while let Ok(Some(event)) = stream.next() {
                if let Event::Command(Command::Ping(value)) = event {
                    (&b).write_all(&Message::Pong { value }.to_bytes()).unwrap();
                }
            }
        });
        let main: Arc<dyn Channel> = Arc::new(Socket::Unix(a));
        migrate(&*pair.source, &main.into(), &pair.job, &pair.profile)
    });
    assert!(result.is_err() && !matches!(result, Err(MigrationError::PostcopyBroken { .. })), "{result:?}");
    assert_eq!((pair.job.status(), pair.source.is_running()), (Status::Failed, true));
}

/// From 10.2 on a destination says when it has loaded the devices. One that fails before has never run the guest, all
/// of whose memory is still here, though some of it was sent and `release-ram` is on.
#[test]
fn a_guest_whose_devices_are_refused_goes_on() {
    let refuses = |release, loads| {
        let mut pair = Pair::new(PAGES as usize);
        pair.profile = Profile::new(release, "microvm");
        let (a, b) = UnixStream::pair().unwrap();
        let on = Capabilities::default().with([("postcopy-ram", true), ("release-ram", true)]).unwrap();
        pair.job.set_capabilities(on).unwrap();
        // Most of it comes later.
        pair.job.set_parameters(Parameters { max_bandwidth: 1 << 20, ..Parameters::default() });
        pair.job.begin().unwrap();
        pair.job.start_postcopy().unwrap();
        let result = thread::scope(|scope| {
            let (profile, job) = (pair.profile.clone(), pair.job.clone());
            scope.spawn(move || {
                let mut stream = Driver::new(&b, Decoder::new(DecoderOptions::live(&profile)));
                let send = |message: Message| (&b).write_all(&message.to_bytes()).unwrap();
                while let Ok(Some(event)) = stream.next() {
                    match event {
                        Event::Command(Command::Ping(value)) => send(Message::Pong { value }),
                        Event::Command(Command::Packaged { len }) => {
                            stream.payload().read_exact(&mut vec![0; len as usize]).unwrap();
                            if loads {
                                send(Message::Pong { value: 3 });
                                send(Message::Pong { value: 0x42 });
                            }
                            let mut pages = 0;
                            while pages < 100 {
                                match stream.next().unwrap().unwrap() {
                                    Event::Ram(RamRecord::Page(_)) => {
                                        stream.payload().read_exact(&mut [0; PAGE]).unwrap();
                                        pages += 1;
                                    }
                                    Event::Ram(RamRecord::Zero(_)) => pages += 1,
                                    _ => {}
                                }
                            }
                            send(Message::Shut { status: 1 });
                            // What is paused is not to wait for another connection.
                            job.give_up_recovery();
                            return;
                        }
                        _ => {}
                    }
                }
            });
            let main: Arc<dyn Channel> = Arc::new(Socket::Unix(a));
            migrate(&*pair.source, &main.into(), &pair.job, &pair.profile)
        });
        let keeps = pair.source.released.lock().is_empty();
        (result, pair.source.is_running(), keeps)
    };
    let (result, runs, keeps) = refuses(QemuVersion::NEWEST, false);
    assert!(matches!(result, Err(MigrationError::PeerFailed { status: 1 })), "{result:?}");
    assert!(runs && keeps, "the guest runs nowhere, or without its memory");
    for (release, loads) in [(QemuVersion::NEWEST, true), (QemuVersion::new(10, 0), false)] {
        let (result, runs, keeps) = refuses(release, loads);
        assert!(matches!(result, Err(MigrationError::PostcopyBroken { .. })), "{release}: {result:?}");
        assert!(!runs, "the guest may run at the destination of {release}");
        // One that says nothing may have run it from the start.
        assert!(loads || !keeps, "{release}");
    }
}
