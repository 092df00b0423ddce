//! Guests that go before their memory, to a destination that is only its end of the protocol.

use super::*;
use crate::Refused;
use qevm_returnpath::Message;
use qevm_savevm::{
    Decoder, DecoderOptions, Event,
    command::Command,
    ram::{BlockId, PageAt, RamRecord},
};
use qevm_wire::{CountedString, Driver};
use std::{
    collections::HashMap,
    io::{Read, Write},
    time::Duration,
};

const PAGES: u64 = 2000;
const PAGE: usize = 4096;

/// What a destination does when it has the devices.
type Arrived<'a> = &'a (dyn Fn(&UnixStream) + Sync);

/// Runs a guest of [`PAGES`] away, and gives how that ended and how often each page came after the package. `arrived` is told when the
/// destination has the package; it goes on with the stream then, unless it has closed.
fn depart(pair: &Pair, arrived: Arrived<'_>) -> (Result<(), MigrationError>, HashMap<(BlockId, u64), u64>) {
    let (a, b) = UnixStream::pair().unwrap();
    let capabilities = Capabilities::default().with([("postcopy-ram", true)]).unwrap();
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

#[test]
fn a_link_that_breaks_after_the_package_leaves_the_guest_stopped_for_good() {
    let pair = Pair::new(PAGES as usize);
    pair.job.set_parameters(Parameters {
        max_bandwidth: 1 << 20,
        max_postcopy_bandwidth: 4096,
        ..Parameters::default()
    });
    let job = pair.job.clone();
    let (result, _) = depart(&pair, &|socket| {
        while job.status() != Status::PostcopyActive {
            thread::sleep(Duration::from_millis(1));
        }
        // Too late, and it is said.
        assert_eq!(job.cancel(), Err(Refused::PostcopyInProgress));
        assert_eq!(job.status(), Status::PostcopyActive);
        assert!(job.statistics().downtime.is_some());
        socket.shutdown(std::net::Shutdown::Both).unwrap();
    });
    assert!(matches!(result, Err(MigrationError::PostcopyBroken { .. })), "{result:?}");
    let statistics = pair.job.statistics();
    assert_eq!((statistics.status, pair.source.is_running()), (Status::Failed, false));
    assert!(statistics.error.unwrap().contains("the guest is at the destination, or lost if that has ended"));
    assert!(!pair.source.is_logging());
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
