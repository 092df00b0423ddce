use super::*;
use crate::GuestError;
use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, channel};

const PAGE: u64 = 4096;
const PAGES: u64 = 300;

/// Memory that is told what is touched, and remembers what was filled in.
struct Scripted {
    unit: u64,
    touched: Mutex<Receiver<Option<u64>>>,
    touch: Sender<Option<u64>>,
    memory: Mutex<Vec<u8>>,
    filled: Mutex<BTreeSet<u64>>,
    released: Mutex<bool>,
}

/// What the engine has of it, and the test keeps.
struct Handle(Arc<Scripted>);

impl Scripted {
    fn new(unit: u64) -> Arc<Self> {
        let (touch, touched) = channel();
        let memory = Mutex::new(vec![0xee; (PAGES * PAGE) as usize]);
        let (touched, filled, released) = (Mutex::new(touched), Mutex::default(), Mutex::default());
        Arc::new(Scripted { unit, touched, touch, memory, filled, released })
    }
}

impl MissingPages for Handle {
    fn unit(&self, _: usize) -> Result<u64, GuestError> {
        Ok(self.0.unit)
    }

    fn discard(&self, block: usize, bytes: Range<u64>) -> Result<(), GuestError> {
        assert_eq!((block, bytes), (3, 0..PAGES * PAGE));
        Ok(())
    }

    fn add(&self, _: usize) -> Result<(), GuestError> {
        Ok(())
    }

    fn wait(&self) -> Result<Option<Touch>, GuestError> {
        let touch = |offset| Touch { block: 3, offset, vcpu: None };
        Ok(self.0.touched.lock().recv()?.map(touch))
    }

    fn fill(&self, block: usize, offset: u64, bytes: &[u8]) -> Result<(), GuestError> {
        assert!(block == 3 && offset.is_multiple_of(self.0.unit) && (bytes.len() as u64).is_multiple_of(self.0.unit));
        self.0.memory.lock()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        let mut filled = self.0.filled.lock();
        (offset..offset + bytes.len() as u64)
            .step_by(4096)
            .for_each(|page| assert!(filled.insert(page), "{page:#x} twice"));
        Ok(())
    }

    fn fill_zeros(&self, block: usize, offset: u64, len: u64) -> Result<(), GuestError> {
        self.fill(block, offset, &vec![0; len as usize])
    }

    fn stop(&self) {
        let _ = self.0.touch.send(None);
    }

    fn release(&self) -> Result<(), GuestError> {
        *self.0.released.lock() = true;
        let filled = self.0.filled.lock();
        let mut memory = self.0.memory.lock();
        let missing = (0..PAGES * PAGE).step_by(4096).filter(|page| !filled.contains(page));
        missing.for_each(|page| memory[page as usize..][..PAGE as usize].fill(0));
        Ok(())
    }
}

/// Two of three pages, each full of its number.
fn is_there(page: u64) -> bool {
    page % 3 != 1 && !(100..180).contains(&page)
}

fn expected() -> Vec<u8> {
    (0..PAGES).flat_map(|page| vec![if is_there(page) { page as u8 | 1 } else { 0 }; PAGE as usize]).collect()
}

/// A restore from a file of `PAGES` pages; what is not in the bitmap is garbage there.
fn restore(scripted: &Arc<Scripted>) -> (LazyRestore, std::fs::File) {
    let layout = MappedBlock::place(0, PAGES * PAGE, PageGeometry::X86).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![0xbb; layout.end() as usize]).unwrap();
    let mut present = PageBitmap::new(PAGES);
    for page in (0..PAGES).filter(|page| is_there(*page)) {
        present.set(page);
        file.write_all_at(&vec![page as u8 | 1; PAGE as usize], layout.page_offset(page).unwrap()).unwrap();
    }
    let mut setup = Setup::new(Box::new(Handle(scripted.clone())), PageFile::new(file.try_clone().unwrap(), None));
    let name = CountedString::new("ram").unwrap();
    setup.leave(3, name, layout, present).unwrap();
    (setup.start().unwrap(), file)
}

#[test]
fn every_page_is_filled_in_once_however_many_threads_want_it() {
    for unit in [PAGE, 4 * PAGE] {
        let scripted = Scripted::new(unit);
        let (restore, _file) = restore(&scripted);
        // Among them pages that are zero, and the same several times.
        (0..400).for_each(|n| scripted.touch.send(Some(n * 7919 * 64 % (PAGES * PAGE))).unwrap());
        restore.start_guest().unwrap();
        let watch = restore.watch();
        restore.load().unwrap();
        assert_eq!(watch().remaining, 0);
        assert!(*scripted.released.lock());
        assert!(*scripted.memory.lock() == expected());
    }
}

#[test]
fn a_touched_page_comes_with_those_around_it_within_64_kib() {
    let scripted = Scripted::new(PAGE);
    let (restore, _file) = restore(&scripted);
    let block = &restore.shared.blocks[&3];
    let touch = |page| {
        assert!(block.claimed.claim(page));
        block.claim_around(page)
    };
    // Pages 13, 16, 46 and 49 are zero, and 48 begins another 64 KiB.
    assert_eq!([touch(15), touch(47), touch(48)], [14..16, 47..48, 48..49]);
    assert_eq!(touch(13), 13..14);
    // What another thread has claimed is its own.
    assert!(block.claimed.claim(20));
    assert_eq!(touch(21), 21..22);
}

#[test]
fn what_comes_after_touched_pages_is_loaded_first() {
    let scripted = Scripted::new(PAGE);
    let (restore, _file) = restore(&scripted);
    restore.start_guest().unwrap();
    let shared = restore.shared.clone();
    let next = |place| shared.claim_next(place).map(|(block, _, run)| (block, run));
    let touch = |page| {
        let before = shared.requests.load(Ordering::Relaxed);
        scripted.touch.send(Some(page * PAGE)).unwrap();
        while shared.requests.load(Ordering::Relaxed) == before || shared.touched.lock().is_none() {
            std::thread::yield_now();
        }
    };
    // Every third page is zero, and not in the file.
    assert_eq!(next((0, 0)), Some((3, 0..1)));
    touch(200);
    // It has come with the one after it.
    assert_eq!(next((3, 1)), Some((3, 203..205)));
    // It goes on from there, and begins again at the end.
    assert_eq!(next((3, 205)), Some((3, 206..208)));
    touch(299);
    assert_eq!(next((3, 208)), Some((3, 209..211)));
    assert_eq!(next((3, 300)), Some((3, 2..4)));
    // Where all that comes after it is there already it stays where it is.
    touch(95);
    (96..160).filter(|page| is_there(*page)).for_each(|page| assert!(shared.blocks[&3].claimed.claim(page)));
    assert_eq!(next((3, 4)), Some((3, 5..7)));
    drop(restore);
}

#[test]
fn what_is_not_touched_stays_in_the_file() {
    let scripted = Scripted::new(PAGE);
    let (restore, _file) = restore(&scripted);
    restore.start_guest().unwrap();
    let watch = restore.watch();
    let serving = std::thread::spawn(move || restore.serve());
    let there = (0..PAGES).filter(|page| is_there(*page)).count() as u64;
    for page in [1, 2, 2, 150] {
        scripted.touch.send(Some(page * PAGE + 17)).unwrap();
    }
    while watch().requests < 3 {
        std::thread::yield_now();
    }
    // The page that came last may be on its way; the one before is there with the one after it, and those that are zero
    // do not count.
    assert_eq!(watch().remaining, (there - 2) * PAGE);
    assert!(!serving.is_finished() && scripted.filled.lock().len() <= 4);
    (0..PAGES).for_each(|page| scripted.touch.send(Some(page * PAGE)).unwrap());
    serving.join().unwrap().unwrap();
    assert!(*scripted.memory.lock() == expected());
}

#[test]
fn a_page_that_cannot_be_read_is_never_filled_in() {
    for ahead in [false, true] {
        let scripted = Scripted::new(PAGE);
        let (restore, file) = restore(&scripted);
        restore.start_guest().unwrap();
        // The last page is cut in half.
        file.set_len(file.metadata().unwrap().len() - PAGE / 2).unwrap();
        scripted.touch.send(Some((PAGES - 1) * PAGE)).unwrap();
        let failed = if ahead { restore.load() } else { restore.serve() };
        let Err(MigrationError::Load(error)) = failed else { panic!("{failed:?}") };
        assert!(matches!(error.kind, LoadError::File { .. }), "{error}");
        assert!(error.to_string().contains("RAM block 'ram'"), "{error}");
        assert!(!scripted.filled.lock().contains(&((PAGES - 1) * PAGE)));
        assert!(!*scripted.released.lock(), "a thread that waits would find zeros");
    }
}

#[test]
fn before_the_guest_has_started_no_thread_waits_for_ever() {
    let scripted = Scripted::new(PAGE);
    let (restore, file) = restore(&scripted);
    file.set_len(0).unwrap();
    scripted.touch.send(Some(0)).unwrap();
    while !*scripted.released.lock() {
        std::thread::yield_now();
    }
    assert!(restore.start_guest().is_err(), "what was read may be wrong");
}
