mod peer;
mod preempt;

use crate::atomic_page_set::AtomicPageSet;
use crate::ram_receiver::Listed;
use crate::{
    Address, Arrival, Capabilities, Channel, DeviceSection, Devices, DirtyLog, Guest, GuestError, Hooks, Job, Listener,
    LoadError, MigrationError, MissingPages, RamView, Rest, SavedDevices, Status, Touch, receive,
};
use parking_lot::{Condvar, Mutex};
use peer::{Peer, name};
use qevm_returnpath::Message;
use qevm_savevm::command::Command;
use qevm_savevm::ram::{BlockId, PageAt};
use qevm_wire::{CountedString, Profile, QemuVersion};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;
use vm_memory::{MmapRegion, VolatileMemory};

const PAGE: u64 = 4096;
const PAGES: u64 = 64;
const RAM: u32 = 1;
/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// Memory that is told what is touched.
struct Memory {
    unit: u64,
    touched: Mutex<Receiver<Option<u64>>>,
    touch: Sender<Option<u64>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Pages that have something in them, and the first byte of it.
    present: BTreeMap<u64, u8>,
    discarded: Vec<Range<u64>>,
    missing: bool,
    released: bool,
}

/// What the engine has of it, and the test keeps.
struct Handle(Arc<Memory>);

impl Memory {
    fn new(unit: u64) -> Arc<Self> {
        let (touch, touched) = channel();
        let (state, changed) = (Mutex::default(), Condvar::new());
        Arc::new(Memory { unit, touched: Mutex::new(touched), touch, state, changed })
    }

    fn touch(&self, page: u64) {
        self.touch.send(Some(page * PAGE + 17)).unwrap();
    }

    /// Waits until a page is there, and gives its first byte; `None` if it is zero because no wait is left.
    fn wait_for(&self, page: u64) -> Option<u8> {
        let waiting = |state: &mut State| !state.present.contains_key(&page) && !state.released;
        let mut state = self.state.lock();
        let waited = self.changed.wait_while_for(&mut state, waiting, LONG);
        assert!(!waited.timed_out(), "page {page} has not come");
        state.present.get(&page).copied()
    }

    fn has(&self, page: u64) -> bool {
        self.state.lock().present.contains_key(&page)
    }
}

impl MissingPages for Handle {
    fn unit(&self, block: usize) -> Result<u64, GuestError> {
        assert_eq!(block, 0);
        Ok(self.0.unit)
    }

    fn discard(&self, block: usize, bytes: Range<u64>) -> Result<(), GuestError> {
        let mut state = self.0.state.lock();
        assert!(block == 0 && !state.missing && (bytes.start | bytes.end).is_multiple_of(self.0.unit));
        let pages = bytes.start / PAGE..bytes.end / PAGE;
        state.present.retain(|page, _| !pages.contains(page));
        state.discarded.push(pages);
        Ok(())
    }

    fn add(&self, _: usize) -> Result<(), GuestError> {
        self.0.state.lock().missing = true;
        Ok(())
    }

    fn wait(&self) -> Result<Option<Touch>, GuestError> {
        // The first half is touched by a vCPU.
        let touch = |offset| Touch { block: 0, offset, vcpu: (offset < PAGES / 2 * PAGE).then_some(0) };
        Ok(self.0.touched.lock().recv()?.map(touch))
    }

    fn vcpus(&self) -> usize {
        1
    }

    fn fill(&self, _: usize, offset: u64, bytes: &[u8]) -> Result<(), GuestError> {
        let mut state = self.0.state.lock();
        assert!(state.missing && (offset | bytes.len() as u64).is_multiple_of(self.0.unit));
        for (page, content) in (offset / PAGE..).zip(bytes.chunks(PAGE as usize)) {
            if state.present.contains_key(&page) {
                return Err(io::Error::from(io::ErrorKind::AlreadyExists).into());
            }
            assert!(content.iter().all(|byte| *byte == content[0]));
            state.present.insert(page, content[0]);
        }
        self.0.changed.notify_all();
        Ok(())
    }

    fn fill_zeros(&self, block: usize, offset: u64, len: u64) -> Result<(), GuestError> {
        self.fill(block, offset, &vec![0; len as usize])
    }

    fn stop(&self) {
        let _ = self.0.touch.send(None);
    }

    fn release(&self) -> Result<(), GuestError> {
        self.0.state.lock().released = true;
        self.0.changed.notify_all();
        Ok(())
    }
}

/// A guest whose only device, when it is loaded, looks at pages of memory.
struct Late {
    memory: Arc<Memory>,
    ram: MmapRegion,
    looks_at: Vec<u64>,
    refuses: bool,
    /// What the device has found.
    found: Mutex<Vec<Option<u8>>>,
}

impl Late {
    fn new(unit: u64) -> Self {
        let ram = MmapRegion::new((PAGES * PAGE) as usize).unwrap();
        Late { memory: Memory::new(unit), ram, looks_at: Vec::new(), refuses: false, found: Mutex::default() }
    }
}

impl Guest for Late {
    fn machine_type(&self) -> &str {
        "microvm"
    }

    fn ram(&self) -> Vec<RamView<'_>> {
        vec![RamView { name: "ram", memory: self.ram.as_volatile_slice(), pristine: true }]
    }

    fn start_dirty_log(&self) -> Result<Box<dyn DirtyLog + '_>, GuestError> {
        Err("it stays here".into())
    }

    fn pause(&self) -> Result<bool, GuestError> {
        Ok(false)
    }

    fn resume(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn devices(&self) -> &dyn Devices {
        self
    }

    fn hooks(&self) -> &dyn Hooks {
        self
    }
}

impl Hooks for Late {
    fn missing_pages(&self) -> Result<Box<dyn MissingPages>, GuestError> {
        Ok(Box::new(Handle(self.memory.clone())))
    }
}

impl Devices for Late {
    fn save(&self, _: &Profile, _: bool) -> Result<SavedDevices, GuestError> {
        Err("it stays here".into())
    }

    fn has(&self, idstr: &CountedString, _: u32) -> bool {
        *idstr == *"device"
    }

    fn load(&self, devices: &[DeviceSection]) -> Result<bool, GuestError> {
        assert_eq!(devices.len(), 1);
        for page in &self.looks_at {
            self.memory.touch(*page);
            let found = self.memory.wait_for(*page);
            self.found.lock().push(found);
        }
        if self.refuses { Err("the device does not like its state".into()) } else { Ok(true) }
    }
}

fn arrive(guest: &Late, there: Arc<dyn Channel>, job: &Job) -> Result<Arrival, MigrationError> {
    job.set_capabilities(Capabilities {
        postcopy_ram: true,
        postcopy_blocktime: true,
        return_path: true,
        ..Capabilities::default()
    })
    .unwrap();
    job.begin().unwrap();
    receive(guest, there.into(), job, &Profile::new(QemuVersion::NEWEST, "microvm"))
}

fn at_source(arrival: Arrival) -> super::Postcopy {
    match arrival.rest {
        Some(Rest::AtSource(rest)) => rest,
        other => panic!("{other:?}"),
    }
}

#[test]
fn devices_get_the_pages_that_they_look_at_and_the_source_learns_that_they_are_loaded() {
    let guest = Late { looks_at: vec![7, 5, 40, 6], ..Late::new(PAGE) };
    let (mut peer, there) = Peer::new();
    let job = Job::default();
    thread::scope(|scope| {
        let arriving = scope.spawn(|| at_source(arrive(&guest, there, &job).unwrap()));
        // Page 5 came as zeros, and page 7 is old.
        peer.begin(&[(5, 0), (6, 6), (7, 7)], &[7]);
        peer.package();
        // That the devices are loaded is said when they are.
        peer.hear_both(4, 7);
        peer.pages(&[(7, 70)]);
        assert_eq!(peer.hear_request(), 40);
        assert_eq!(job.status(), Status::PostcopyDevice);
        // Page 6 was read into the guest's memory, which the double does not see.
        guest.memory.state.lock().present.insert(6, 6);
        peer.pages(&[(40, 0)]);
        assert_eq!(peer.hear(), Some(Message::Pong { value: 3 }));
        assert_eq!(peer.hear(), Some(Message::Pong { value: 0x42 }));
        let rest = arriving.join().unwrap();
        assert_eq!(*guest.found.lock(), [Some(70), Some(0), Some(0), Some(6)]);
        assert_eq!(job.status(), Status::PostcopyActive);

        // Now the guest: each page is asked for once, and filled in once.
        (0..100).for_each(|_| guest.memory.touch(9));
        guest.memory.touch(11);
        assert_eq!((peer.hear_request(), peer.hear_request()), (9, 11));
        peer.pages(&[(9, 9), (9, 99), (7, 99)]);
        assert_eq!(guest.memory.wait_for(9), Some(9));
        guest.memory.touch(9);
        let others: Vec<_> = (0..PAGES).filter(|page| ![5, 6, 7, 9, 40].contains(page)).map(|page| (page, 1)).collect();
        peer.pages(&others);
        let (watch, block_times) = (rest.watch(), rest.watch_block_times());
        peer.end();
        rest.load(&job).unwrap();
        assert_eq!(peer.hear(), Some(Message::Shut { status: 0 }));
        assert_eq!((watch().remaining, watch().requests), (0, 4));
        // A wait for each request, one of them of a thread that is no vCPU.
        let times = block_times().unwrap();
        assert_eq!(times.distribution.iter().sum::<u64>(), 4);
        assert!(times.other_latency > Duration::ZERO && times.vcpu_latency[0] > Duration::ZERO, "{times:?}");
        assert!(times.vcpus == [times.all_vcpus] && times.all_vcpus > times.vcpu_latency[0], "{times:?}");
        assert_eq!((guest.memory.wait_for(9), guest.memory.wait_for(7)), (Some(9), Some(70)));
        assert!(guest.memory.state.lock().released);
    });
}

#[test]
fn a_guest_whose_devices_cannot_be_loaded_stays_at_the_source() {
    let guest = Late { looks_at: vec![3], refuses: true, ..Late::new(PAGE) };
    let (mut peer, there) = Peer::new();
    let job = Job::default();
    thread::scope(|scope| {
        let arriving = scope.spawn(|| arrive(&guest, there, &job));
        peer.begin(&[], &[3]);
        peer.package();
        peer.hear_both(4, 3);
        peer.pages(&[(3, 3)]);
        assert_eq!(peer.hear(), Some(Message::Shut { status: 1 }));
        assert_eq!(peer.hear(), None);
        drop(peer);
        let failed = arriving.join().unwrap();
        let Err(MigrationError::Load(error)) = &failed else { panic!("{failed:?}") };
        assert!(matches!(error.kind, LoadError::Devices(_)), "{error}");
        assert_eq!(*guest.found.lock(), [Some(3)]);
    });
}

#[test]
fn a_source_that_is_lost_before_the_devices_are_loaded_has_the_guest() {
    for cut in [false, true] {
        let guest = Late { looks_at: vec![3], ..Late::new(PAGE) };
        let (mut peer, there) = Peer::new();
        let job = Job::default();
        thread::scope(|scope| {
            let arriving = scope.spawn(|| arrive(&guest, there, &job));
            peer.begin(&[], &[3]);
            peer.package();
            peer.hear_both(4, 3);
            match cut {
                true => peer.socket.shutdown(Shutdown::Both).unwrap(),
                // Nonsense.
                false => peer.stream.command(Command::PostcopyListen).unwrap(),
            }
            peer.flush();
            let failed = arriving.join().unwrap();
            // No wait is endless, and the zeros are nowhere: the guest is not started.
            assert!(matches!(failed, Err(MigrationError::Load(_) | MigrationError::Receive { .. })), "{failed:?}");
            assert_eq!(*guest.found.lock(), [None]);
        });
    }
}

#[test]
fn memory_that_does_not_come_is_never_filled_in() {
    let guest = Late::new(PAGE);
    let (mut peer, there) = Peer::new();
    let job = Job::default();
    thread::scope(|scope| {
        let arriving = scope.spawn(|| at_source(arrive(&guest, there, &job).unwrap()));
        peer.begin(&[(1, 1)], &[2]);
        peer.package();
        let rest = arriving.join().unwrap();
        guest.memory.touch(30);
        while !matches!(peer.hear(), Some(Message::ReqPages { start: 0x1e000, .. })) {}
        peer.end();
        let failed = rest.load(&job).unwrap_err();
        assert!(matches!(failed, MigrationError::PostcopyBroken { .. }), "{failed}");
        assert!(!guest.memory.has(30));
        assert!(!guest.memory.state.lock().released, "a thread that waits would find zeros");
    });
}

#[test]
fn a_connection_that_is_lost_is_replaced_as_often_as_it_takes() {
    let guest = Late::new(PAGE);
    let (mut peer, there) = Peer::new();
    let job = Job::default();
    let folder = tempfile::tempdir().unwrap();
    thread::scope(|scope| {
        let arriving = scope.spawn(|| at_source(arrive(&guest, there, &job).unwrap()));
        peer.begin(&[(1, 1)], &[2]);
        peer.package();
        let rest = arriving.join().unwrap();
        let recovery = rest.recovery();
        assert!(matches!(
            recovery.accept(listener(&folder.path().join("early")), None),
            Err(MigrationError::Refused(_))
        ));
        let loading = scope.spawn(|| rest.load(&job));
        guest.memory.touch(50);
        while !matches!(peer.hear(), Some(Message::ReqPages { start: 0x32000, .. })) {}
        let mut here = 1_u64 << 1;
        for cut in 0..3 {
            let next = 10 + 2 * cut;
            peer.pages(&[(next, 3), (next + 1, 0)]);
            here |= 3 << next;
            guest.memory.wait_for(next + 1);
            match cut {
                0 => peer.socket.shutdown(Shutdown::Both).unwrap(),
                1 => recovery.pause().unwrap(),
                // Nonsense.
                _ => peer.socket.write_all(&[0x77; 99]).unwrap(),
            }
            while !recovery.is_paused() || job.status() != Status::PostcopyPaused {
                thread::yield_now();
            }
            recovery.pause().unwrap_err();
            guest.memory.touch(51);
            // The last that is said counts.
            let path = |name: &str| folder.path().join(format!("{name}{cut}"));
            for name in ["first", "second"] {
                recovery.accept(listener(&path(name)), None).unwrap();
            }
            UnixStream::connect(path("second")).unwrap().write_all(b"GET /").unwrap();
            let (back, bitmap) = peer.come_back(UnixStream::connect(path("second")).unwrap());
            assert_eq!(bitmap, here.to_le_bytes());
            peer = back;
            peer.stream.command(Command::PostcopyResume).unwrap();
            peer.flush();
            assert_eq!(peer.hear(), Some(Message::ResumeAck));
            assert_eq!((peer.hear_request(), peer.hear_request()), (50, 51));
        }
        let rest: Vec<_> = (0..PAGES).filter(|page| here >> page & 1 == 0).map(|page| (page, 5)).collect();
        peer.pages(&rest);
        peer.end();
        loading.join().unwrap().unwrap();
        assert_eq!(peer.hear(), Some(Message::Shut { status: 0 }));
        assert_eq!((guest.memory.wait_for(10), guest.memory.wait_for(11)), (Some(3), Some(0)));
    });
}

fn listener(path: &Path) -> Listener {
    Listener::bind(&Address::Unix(path.to_owned())).unwrap()
}

#[test]
fn a_huge_page_is_filled_in_when_all_of_it_is_here() {
    let memory = Memory::new(4 * PAGE);
    let guest = Late { memory: memory.clone(), ..Late::new(PAGE) };
    let received = AtomicPageSet::new(PAGES, false);
    // The second page of four is whole, the third is not.
    received.mark(4..11);
    let touched = Arc::new(AtomicPageSet::new(PAGES, false));
    let received = Some(Arc::new(received));
    let listed = |page_size| Listed {
        name: name("ram"),
        used_length: PAGES * PAGE,
        page_size,
        written: touched.clone(),
        received: received.clone(),
        presence: crate::ram_receiver::Presence::default(),
    };
    let (mut peer, there) = Peer::new();
    let start = |page_size| super::Listening::start(&guest, &[listed(page_size)], there.clone(), false, Arc::default());
    let other = start(PAGE).map(drop).unwrap_err();
    assert!(other.to_string().contains("'ram' has pages of 4096 bytes at the source, 16384 expected"), "{other}");
    let listening = start(4 * PAGE).unwrap();
    assert_eq!(memory.state.lock().discarded, [0..4, 8..PAGES]);
    memory.touch(9);
    let request = Message::ReqPages { block: Some(name("ram")), start: 8 * PAGE, len: 4 * PAGE as u32 };
    assert_eq!(peer.hear(), Some(request));
    let mut assembly = super::assembly::Assembly::default();
    let mut place = |page: u64, content: Option<&[u8]>| {
        let page = PageAt { block: BlockId(0), offset: page * PAGE, named: false };
        listening.shared.place(&page, content, &mut assembly, 99)
    };
    for page in 8..11 {
        place(page, Some(&[1; PAGE as usize])).unwrap();
        assert!(!memory.has(page));
    }
    place(11, Some(&[1; PAGE as usize])).unwrap();
    assert!((8..12).all(|page| memory.has(page)));
    assert_eq!(listening.shared.progress().remaining, (PAGES - 8) * PAGE);
    place(12, None).unwrap();
    let mixed = place(16, None).unwrap_err();
    assert!(mixed.to_string().contains("page 0x10000 of RAM block 0 came before the huge page at 0xc000"), "{mixed}");
}
