//! Connections that are lost when the guest has gone before its memory, to a destination that is only its end of the
//! protocol.

use super::*;
use crate::testing::Random;
use crate::{Address, NoDescriptors, PAGE_SIZE, Refused};
use qevm_returnpath::bitmap::bitmap_len;
use qevm_returnpath::{Encoder, Message};
use qevm_savevm::command::Command;
use qevm_savevm::ram::{PageAt, RamRecord};
use qevm_savevm::{Decoder, DecoderOptions, Event};
use qevm_wire::{CountedString, Driver, PageGeometry, Writer};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::time::Duration;
use vm_memory::Bytes;

const PAGES: u64 = 400;
const PAGE: usize = PAGE_SIZE as usize;
/// In the order of the stream.
const BLOCKS: [(&str, u64); 2] = [("microvm.ram", PAGES), ("pc.bios", 4)];

/// A connection that breaks after a number of bytes.
struct Fragile {
    socket: UnixStream,
    left: Rc<Cell<Option<u64>>>,
}

impl Read for Fragile {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let most = self.left.get().map_or(bytes.len(), |left| bytes.len().min(left as usize));
        if most == 0 {
            self.socket.shutdown(Shutdown::Both)?;
            return Ok(0);
        }
        let count = self.socket.read(&mut bytes[..most])?;
        self.left.set(self.left.get().map(|left| left - count as u64));
        Ok(count)
    }
}

/// What the destination has of the guest.
#[derive(Default)]
struct Destination {
    memory: BTreeMap<(usize, u64), Vec<u8>>,
    /// The guest runs here.
    has_guest: bool,
    /// Pages that are asked for as soon as that is possible.
    wanted: Vec<(usize, u64)>,
    /// Pages in the order in which they came since the source has gone on the last time.
    came: Vec<(usize, u64)>,
    /// All may come fast when what was asked for has.
    hurry: Option<Arc<Job>>,
    /// What is said instead of a bitmap.
    lie: Option<fn(&mut Vec<u8>)>,
}

impl Destination {
    /// Takes what comes on a connection until that breaks, `cut` bytes after the guest was here. Gives the decoder of
    /// what comes on the next, or nothing when all has come.
    fn take(&mut self, socket: UnixStream, decoder: Decoder, cut: Option<u64>) -> Option<Decoder> {
        let back = socket.try_clone().unwrap();
        let say = |bytes: Vec<u8>| drop((&back).write_all(&bytes));
        let left = Rc::new(Cell::new(cut.filter(|_| self.has_guest)));
        let mut stream = Driver::new(Fragile { socket, left: left.clone() }, decoder);
        loop {
            match stream.next() {
                Ok(Some(Event::Command(Command::Ping(value)))) => say(Message::Pong { value }.to_bytes()),
                Ok(Some(Event::Command(Command::Packaged { len }))) => {
                    let mut package = Vec::new();
                    stream.payload().read_to_end(&mut package).unwrap();
                    assert_eq!(package.len(), len as usize);
                    [3, 0x42].into_iter().for_each(|value| say(Message::Pong { value }.to_bytes()));
                    self.has_guest = true;
                    left.set(cut);
                    self.ask(&say);
                }
                Ok(Some(Event::Command(Command::RamDiscard(discard)))) => {
                    let block = BLOCKS.iter().position(|(name, _)| discard.block == *name).unwrap();
                    for page in discard.ranges.iter().flat_map(|range| range.start..range.start + range.len) {
                        self.memory.remove(&(block, page));
                    }
                }
                Ok(Some(Event::Command(Command::RecvBitmap(name)))) => say(self.bitmap(name)),
                Ok(Some(Event::Command(Command::PostcopyResume))) => {
                    say(Message::ResumeAck.to_bytes());
                    self.came.clear();
                    self.ask(&say);
                }
                Ok(Some(Event::Ram(RamRecord::Zero(page)))) => self.place(page, vec![0; PAGE]),
                Ok(Some(Event::Ram(RamRecord::Page(page)))) => {
                    let mut content = Vec::new();
                    let _ = stream.payload().read_to_end(&mut content);
                    if content.len() == PAGE {
                        self.place(page, content);
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) => {
                    say(Message::Shut { status: 0 }.to_bytes());
                    return None;
                }
                Err(_) => return Some(stream.decoder().recovery()),
            }
        }
    }

    fn place(&mut self, page: PageAt, content: Vec<u8>) {
        let place = (page.block.index(), page.offset);
        self.came.push(place);
        let old = self.memory.insert(place, content);
        assert!(old.is_none() || !self.has_guest, "{place:?} has come already, and the guest may have written to it");
        if self.wanted.iter().all(|wanted| self.memory.contains_key(wanted))
            && let Some(job) = self.hurry.take()
        {
            job.set_parameters(Parameters { max_postcopy_bandwidth: 0, ..job.parameters() });
        }
    }

    fn ask(&self, say: &impl Fn(Vec<u8>)) {
        for (block, start) in &self.wanted {
            let block = Some(CountedString::new(BLOCKS[*block].0).unwrap());
            say(Message::ReqPages { block, start: *start, len: PAGE as u32 }.to_bytes());
        }
    }

    fn bitmap(&self, name: CountedString) -> Vec<u8> {
        let block = BLOCKS.iter().position(|(known, _)| name == *known).unwrap();
        let len = bitmap_len(BLOCKS[block].1 * PAGE_SIZE, PageGeometry::X86);
        let mut bitmap = vec![0; len as usize];
        for (_, offset) in self.memory.keys().filter(|(of, _)| *of == block) {
            let page = (offset / PAGE_SIZE) as usize;
            bitmap[page / 8] |= 1 << (page % 8);
        }
        if let Some(lie) = self.lie {
            lie(&mut bitmap);
        }
        let (mut encoder, mut writer) = (Encoder::default(), Writer::new());
        encoder.message(&Message::RecvBitmap { block: name, len: bitmap.len() as u64 }, &mut writer).unwrap();
        writer.bytes(&bitmap);
        encoder.bitmap_end(&mut writer).unwrap();
        writer.into_bytes()
    }

    fn assert_whole(&self, pair: &Pair) {
        for (block, view) in pair.source.ram().iter().enumerate() {
            for offset in (0..view.memory.len()).step_by(PAGE) {
                let mut page = vec![0; PAGE];
                view.memory.read_slice(&mut page, offset).unwrap();
                assert_eq!(self.memory.get(&(block, offset as u64)), Some(&page), "{block} {offset:#x}");
            }
        }
    }
}

/// A guest that is to leave before its memory, which comes slowly in the background.
fn pair() -> Pair {
    let pair = Pair::new(PAGES as usize);
    let slow = Parameters { max_bandwidth: 1 << 20, max_postcopy_bandwidth: 2 << 20, ..Parameters::default() };
    pair.job.set_parameters(slow);
    pair.job.set_capabilities(Capabilities::default().with([("postcopy-ram", true)]).unwrap()).unwrap();
    pair.job.begin().unwrap();
    pair.job.start_postcopy().unwrap();
    pair
}

/// Waits for a status, as long as the migration is under way.
fn wait_for(job: &Job, wanted: Status) -> bool {
    loop {
        match job.status() {
            status if status == wanted => return true,
            status if !status.is_running() => return false,
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Migrates over connections that break after a number of bytes each, of which an operator opens the next each time.
/// The last does not break by itself; if it is lost, the operator gives up. `after` is what happens to the destination
/// when one is lost.
fn depart(
    pair: &Pair,
    cuts: &[u64],
    after: impl Fn(&mut Destination) + Sync,
) -> (Result<(), MigrationError>, Destination) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let open = || Outgoing::open(&Address::Unix(path.clone()), &pair.job, &mut NoDescriptors);
    thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let mut destination = Destination::default();
            let mut decoder = Decoder::new(DecoderOptions::live(&pair.profile));
            for cut in cuts.iter().copied().map(Some).chain([None]) {
                let (socket, _) = listener.accept().unwrap();
                match destination.take(socket, decoder, cut) {
                    Some(next) => decoder = next,
                    None => break,
                }
                after(&mut destination);
            }
            destination
        });
        scope.spawn(|| {
            for _ in cuts {
                if !wait_for(&pair.job, Status::PostcopyPaused) {
                    return;
                }
                pair.job.begin_recovery().unwrap();
                pair.job.recover(open());
            }
            if wait_for(&pair.job, Status::PostcopyPaused) {
                pair.job.give_up_recovery();
            }
        });
        let result = migrate(&*pair.source, &open().unwrap(), &pair.job, &pair.profile);
        (result, destination.join().unwrap())
    })
}

#[test]
fn every_page_arrives_once_wherever_connections_break() {
    let mut random = Random::new(1);
    let whole = (PAGES + 4) * (PAGE_SIZE + 64);
    for round in 0..12 {
        let pair = pair();
        // Within what both sides say to each other at first, and after it.
        let cuts: Vec<_> = (0..6).map(|cut| random.below(if cut % 3 == 1 { 60 } else { whole / 6 })).collect();
        let (result, destination) = depart(&pair, &cuts, |_| ());
        result.unwrap_or_else(|error| panic!("round {round}, {cuts:?}: {error}"));
        assert_eq!((pair.job.status(), pair.source.is_running()), (Status::Completed, false));
        destination.assert_whole(&pair);
        let statistics = pair.job.statistics();
        assert_eq!((statistics.error, statistics.ram.remaining), (None, 0));
    }
}

#[test]
fn what_the_guest_waits_for_comes_first_after_a_recovery() {
    let pair = pair();
    // In the background next to nothing.
    pair.job.set_parameters(Parameters { max_postcopy_bandwidth: 4096, ..pair.job.parameters() });
    let statuses = Arc::new(Mutex::new(Vec::new()));
    let told = statuses.clone();
    pair.job.watch(move |notice| {
        if let crate::Notice::Status(status) = notice {
            told.lock().push(status);
        }
    });
    let (result, destination) = depart(&pair, &[0], |destination| {
        let missing = (0..PAGES).rev().map(|page| (0, page * PAGE_SIZE));
        destination.wanted = missing.filter(|place| !destination.memory.contains_key(place)).take(20).collect();
        destination.hurry = Some(pair.job.clone());
    });
    result.unwrap();
    destination.assert_whole(&pair);
    assert_eq!(destination.wanted.len(), 20);
    let came = |wanted| destination.came.iter().position(|came| came == wanted).unwrap();
    let last = destination.wanted.iter().map(came).max().unwrap();
    assert!(last < 60, "{last} pages came before the last that was waited for");
    let statuses = statuses.lock();
    let at = statuses.iter().position(|status| *status == Status::PostcopyPaused).unwrap();
    let expected =
        [Status::PostcopyRecoverSetup, Status::PostcopyRecover, Status::PostcopyActive, Status::Completed].as_slice();
    assert_eq!(&statuses[at + 1..], expected, "{statuses:?}");
}

#[test]
fn a_guest_that_is_interrupted_is_not_started_here_and_says_why() {
    let pair = pair();
    let (result, refused) = thread::scope(|scope| {
        let operator = scope.spawn(|| {
            assert!(wait_for(&pair.job, Status::PostcopyPaused));
            let first = pair.job.statistics();
            assert!(!pair.source.is_running() && !pair.source.is_logging());
            let why = first.error.unwrap();
            assert!(why.contains("the guest is at the destination, or lost if that has ended"), "{why}");
            assert_eq!(pair.job.cancel(), Err(Refused::PostcopyInProgress));
            assert_eq!(pair.job.pause(), Err(Refused::NotInPostcopy));
            assert_eq!(pair.job.begin(), Err(Refused::InProgress));
            // No destination is there.
            pair.job.begin_recovery().unwrap();
            let nowhere = Address::Unix("/nonexistent/nobody".into());
            pair.job.recover(Outgoing::open(&nowhere, &pair.job, &mut NoDescriptors));
            let second = pair.job.statistics();
            assert_eq!(second.status, Status::PostcopyPaused);
            assert!(second.error.unwrap().contains("cannot connect to unix:/nonexistent/nobody"));
            pair.job.give_up_recovery();
            pair.job.begin_recovery()
        });
        let (a, b) = UnixStream::pair().unwrap();
        scope.spawn(|| {
            let decoder = Decoder::new(DecoderOptions::live(&pair.profile));
            Destination::default().take(b, decoder, Some(10_000))
        });
        let main: Arc<dyn Channel> = Arc::new(Socket::Unix(a));
        let result = migrate(&*pair.source, &main.into(), &pair.job, &pair.profile);
        (result, operator.join().unwrap())
    });
    assert!(matches!(result, Err(MigrationError::PostcopyBroken { .. })), "{result:?}");
    assert!(refused.is_ok() || refused == Err(Refused::NoPausedMigration));
    assert_eq!((pair.job.status(), pair.source.is_running()), (Status::Failed, false));
    assert_eq!(pair.job.begin_recovery(), Err(Refused::NoPausedMigration));
}

#[test]
fn an_operator_interrupts_and_goes_on() {
    // By `migrate-pause`, or by breaking the connection off.
    for yank in [false, true] {
        let pair = pair();
        let job = &pair.job;
        job.set_parameters(Parameters { max_postcopy_bandwidth: 4096, ..job.parameters() });
        thread::scope(|scope| {
            let operator = scope.spawn(|| {
                assert!(wait_for(job, Status::PostcopyActive));
                assert!(job.statistics().downtime.is_some());
                // Too late, and it is said.
                assert_eq!(job.cancel(), Err(Refused::PostcopyInProgress));
                if yank {
                    job.disconnect()
                } else {
                    job.pause().unwrap()
                }
                job.set_parameters(Parameters { max_postcopy_bandwidth: 0, ..job.parameters() });
            });
            let (result, destination) = depart(&pair, &[u64::MAX], |_| ());
            result.unwrap();
            destination.assert_whole(&pair);
            operator.join().unwrap();
        });
    }
}

#[test]
fn a_bitmap_that_is_none_interrupts_again() {
    let pair = pair();
    let (result, _) = depart(&pair, &[10_000], |destination| destination.lie = Some(|bitmap| bitmap.push(0)));
    let error = result.unwrap_err();
    assert!(matches!(error, MigrationError::PostcopyBroken { .. }), "{error:?}");
    assert!(
        error.to_string().contains("the received bitmap of RAM block 'microvm.ram' is 57 bytes long, expected 56"),
        "{error}"
    );
}
