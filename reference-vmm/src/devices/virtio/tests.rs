use super::*;
use crate::memory::GuestMemory;
use proptest::prelude::{ProptestConfig, any, prop, proptest};
use qevm_microvm::state::{VirtioDeviceState, VirtioRequest};
use std::fs;
use std::io::Write;
use std::sync::OnceLock;
use tempfile::NamedTempFile;

mod net;
mod serial;

/// Where the tests' driver has its queue: the descriptors, the rings after them as `align` says, and buffers.
const DESC: u64 = 0x1_0000;
const NUM: u16 = 16;
const AVAIL: u64 = DESC + 16 * NUM as u64;
const USED: u64 = DESC + 0x1000;
const BUFFERS: u64 = 0x2_0000;
const RAM: u64 = 2 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const EVENT_IDX: u32 = 1 << 29;

/// A transport with its guest.
struct Harness {
    memory: Arc<GuestMemory>,
    transport: Transport,
    line: Arc<Mutex<Vec<bool>>>,
}

impl Harness {
    fn new(model: Box<dyn Model>) -> Harness {
        let memory = Arc::new(GuestMemory::microvm(RAM, &[0; 64 << 10]).unwrap());
        let line: Arc<Mutex<Vec<bool>>> = Arc::default();
        let seen = Arc::clone(&line);
        let mut transport = Transport::new(model, Arc::clone(&memory), Box::new(move |level| seen.lock().push(level)));
        transport.resume().unwrap();
        Harness { memory, transport, line }
    }

    /// What the device's thread does.
    fn do_tasks(&mut self) {
        while let Some(task) = self.transport.next_task() {
            let result = task.run();
            self.transport.finish_task(result);
        }
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
        self.do_tasks();
    }

    /// What a legacy driver does first.
    fn start(&mut self, features: u32) {
        self.write(0x70, 0);
        self.write(0x70, 3);
        self.write(0x20, features);
        self.write(0x28, 4096);
        self.queue(0, DESC);
        self.write(0x70, 7);
        self.memory.write(DESC, &[0; 0x2000]).unwrap();
    }

    fn queue(&mut self, index: u32, desc: u64) {
        self.write(0x30, index);
        self.write(0x38, NUM.into());
        self.write(0x3c, 4096);
        self.write(0x40, (desc >> 12) as u32);
    }

    fn descriptor(&self, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(DESC + 16 * u64::from(index), gpa, len, flags, next);
    }

    fn descriptor_at(&self, at: u64, gpa: u64, len: u32, flags: u16, next: u16) {
        let word = u128::from(gpa) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.memory.write(at, &word.to_le_bytes()).unwrap();
    }

    fn u16_at(&self, gpa: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read(gpa, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// Makes a chain available and tells the device.
    fn offer(&mut self, head: u16) {
        let index = self.u16_at(AVAIL + 2);
        self.memory.write(AVAIL + 4 + 2 * u64::from(index % NUM), &head.to_le_bytes()).unwrap();
        self.memory.write(AVAIL + 2, &index.wrapping_add(1).to_le_bytes()).unwrap();
        self.write(0x50, 0);
    }

    fn used(&self) -> u16 {
        self.u16_at(USED + 2)
    }

    /// A disk request of one data buffer; its status.
    fn request(&mut self, kind: u32, sector: u64, data: Option<(u64, u32)>) -> u8 {
        let header = [kind.to_le_bytes().to_vec(), vec![0; 4], sector.to_le_bytes().to_vec()].concat();
        self.memory.write(BUFFERS, &header).unwrap();
        self.memory.write(BUFFERS + 0x20, &[0xff]).unwrap();
        self.descriptor(0, BUFFERS, 16, NEXT, 1);
        if let Some((gpa, len)) = data {
            let written = if matches!(kind, 0 | 8) { WRITE } else { 0 };
            self.descriptor(1, gpa, len, NEXT | written, 2);
        } else {
            self.descriptor(0, BUFFERS, 16, NEXT, 2);
        }
        self.descriptor(2, BUFFERS + 0x20, 1, WRITE, 0);
        self.offer(0);
        let mut status = [0];
        self.memory.read(BUFFERS + 0x20, &mut status).unwrap();
        status[0]
    }

    fn broken(&self) -> bool {
        self.transport.save().broken
    }
}

fn disk(readonly: bool) -> (Harness, NamedTempFile) {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&(0..1u32 << 18).flat_map(u32::to_le_bytes).collect::<Vec<_>>()).unwrap();
    let block = Block::open(BlockOptions { file: file.path().into(), readonly, serial: "qevm".into() }).unwrap();
    (Harness::new(Box::new(block)), file)
}

#[test]
fn registers_are_those_of_qemu() {
    let (mut harness, _file) = disk(false);
    assert_eq!(
        (harness.read(0), harness.read(4), harness.read(8), harness.read(0xc)),
        (0x7472_6976, 1, 2, 0x554d_4551)
    );
    assert_eq!(harness.read(0x10), 0x3100_6ed4);
    harness.write(0x14, 1);
    assert_eq!(harness.read(0x10), 0);
    assert_eq!((harness.read(0x34), harness.read(0x40)), (256, 0));
    harness.write(0x30, 1);
    assert_eq!(harness.read(0x34), 0);
    // Read from QEMU 7.2.22, 10.0.13 and 11.1.3 with a disk of 1 MiB.
    let golden = "000800000000000000000000fe0000000200103f00020000000000000000000001000100ffff3f000100000001000000ffff3f0001000000\
                  01ffffff";
    let mut config = [0; 60];
    (0..15).for_each(|i| harness.transport.read(0x100 + 4 * i, &mut config[4 * i as usize..][..4]));
    assert_eq!(config.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), golden);
    let mut empty = [0xaa; 4];
    assert!(Transports::default().read(0xfeb0_0000, &mut empty));
    assert_eq!(u32::from_le_bytes(empty), 0x7472_6976);
    assert!(!Transports::default().read(0xfeb0_3000, &mut empty));
}

#[test]
fn a_disk_is_read_and_written() {
    for features in [0, EVENT_IDX] {
        let (mut harness, file) = disk(false);
        harness.start(features);
        assert_eq!(harness.request(0, 3, Some((BUFFERS + 0x1000, 1024))), 0);
        let mut data = [0; 4];
        harness.memory.read(BUFFERS + 0x1000 + 516, &mut data).unwrap();
        assert_eq!(u32::from_le_bytes(data), 4 * 128 + 1);
        assert!(*harness.line.lock().last().unwrap());
        harness.write(0x64, 1);
        assert_eq!((harness.read(0x60), *harness.line.lock().last().unwrap()), (0, false));

        harness.memory.write(BUFFERS + 0x1000, &[7; 512]).unwrap();
        assert_eq!(harness.request(1, 2047, Some((BUFFERS + 0x1000, 512))), 0);
        assert_eq!(harness.request(4, 0, None), 0);
        assert_eq!(&fs::read(file.path()).unwrap()[2047 * 512..], &[7; 512]);
        assert_eq!(harness.request(8, 0, Some((BUFFERS + 0x1000, 20))), 0);
        let mut serial = [0; 20];
        harness.memory.read(BUFFERS + 0x1000, &mut serial).unwrap();
        assert_eq!(&serial, b"qevm\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(harness.used(), 4);
        assert!(!harness.broken());
    }
}

#[test]
fn sectors_are_zeroed_and_discarded() {
    let (mut harness, file) = disk(false);
    harness.start(0);
    let mut segment = |sector: u64, sectors: u32, flags: u32, kind: u32| {
        let bytes =
            [sector.to_le_bytes().to_vec(), sectors.to_le_bytes().to_vec(), flags.to_le_bytes().to_vec()].concat();
        harness.memory.write(BUFFERS + 0x1000, &bytes).unwrap();
        harness.request(kind, 0, Some((BUFFERS + 0x1000, 16)))
    };
    assert_eq!(segment(1, 2, 0, 13), 0);
    assert_eq!(segment(2047, 2, 0, 13), 1);
    assert_eq!(segment(u64::MAX, 2, 0, 11), 1);
    assert_eq!(segment(5, 1, 0, 11), 0);
    assert_eq!(segment(1, 1, 2, 13), 2);
    assert_eq!(segment(1, 1, 1, 11), 2);
    let bytes = fs::read(file.path()).unwrap();
    assert!(bytes[512..1536].iter().all(|byte| *byte == 0) && bytes[1536..2048].iter().any(|byte| *byte != 0));
}

#[test]
fn what_a_disk_cannot_do_is_an_error_of_the_request() {
    let (mut harness, _file) = disk(true);
    harness.start(0);
    assert_eq!(harness.read(0x10) & 1 << 5, 1 << 5);
    let data = Some((BUFFERS + 0x1000, 512));
    assert_eq!(harness.request(1, 0, data), 1);
    assert_eq!(harness.request(0, 2048, data), 1);
    assert_eq!(harness.request(0, u64::MAX, data), 1);
    assert_eq!(harness.request(0, 0, Some((BUFFERS + 0x1000, 100))), 1);
    assert_eq!(harness.request(2, 0, data), 2);
    assert_eq!(harness.request(0, 0, data), 0);
    assert_eq!((harness.used(), harness.broken()), (6, false));
}

/// Each ring of a driver that breaks the protocol, as a step that lays it out; head 0 is offered then.
type Hostile = (&'static str, fn(&Harness));
const HOSTILE: [Hostile; 11] = [
    ("a loop", |b| b.descriptor(0, BUFFERS, 16, NEXT, 0)),
    ("a next beyond the table", |b| b.descriptor(0, BUFFERS, 16, NEXT, NUM)),
    ("an address outside RAM", |b| b.descriptor(0, 3 << 20, 16, 0, 0)),
    ("the end of the address space", |b| b.descriptor(0, u64::MAX, 16, 0, 0)),
    ("a length beyond RAM", |b| b.descriptor(0, BUFFERS, u32::MAX, 0, 0)),
    ("no bytes", |b| b.descriptor(0, BUFFERS, 0, 0, 0)),
    ("a wrong order", |b| {
        b.descriptor(0, BUFFERS, 16, NEXT | WRITE, 1);
        b.descriptor(1, BUFFERS, 16, 0, 0);
    }),
    ("an indirect table of half a descriptor", |b| b.descriptor(0, BUFFERS, 24, INDIRECT, 0)),
    ("an indirect table in an indirect table", |b| {
        b.descriptor(0, BUFFERS, 16, INDIRECT, 0);
        b.descriptor_at(BUFFERS, BUFFERS, 16, INDIRECT, 0);
    }),
    ("no room for a status", |b| b.descriptor(0, BUFFERS, 16, 0, 0)),
    ("half a header", |b| {
        b.descriptor(0, BUFFERS, 15, NEXT, 1);
        b.descriptor(1, BUFFERS, 1, WRITE, 0);
    }),
];

#[test]
fn a_driver_that_breaks_the_protocol_loses_its_device_until_a_reset() {
    for (what, lay_out) in HOSTILE {
        let (mut harness, _file) = disk(false);
        harness.start(0);
        lay_out(&harness);
        harness.offer(0);
        assert!(harness.broken(), "{what}");
        assert_eq!(harness.request(4, 0, None), 0xff, "{what}");
        harness.start(0);
        assert_eq!(harness.request(4, 0, None), 0, "{what}");
    }
}

#[test]
fn indices_that_cannot_be_are_found_out() {
    let (mut harness, _file) = disk(false);
    harness.start(0);
    harness.memory.write(AVAIL + 2, &(NUM + 1).to_le_bytes()).unwrap();
    harness.write(0x50, 0);
    assert!(harness.broken());
    harness.start(0);
    harness.memory.write(AVAIL + 4, &NUM.to_le_bytes()).unwrap();
    harness.memory.write(AVAIL + 2, &1u16.to_le_bytes()).unwrap();
    harness.write(0x50, 0);
    assert!(harness.broken());
    // Queues outside RAM, and none at all.
    harness.start(0);
    harness.queue(0, 0xfff_ffff_f000);
    harness.write(0x50, 0);
    assert!(harness.broken());
    harness.start(0);
    harness.write(0x50, 5);
    harness.write(0x50, u32::MAX);
    assert!(!harness.broken());
    // What a source has sent has to fit what RAM says.
    let mut state = harness.transport.save();
    assert!(harness.transport.check().is_ok());
    state.queues[0].last_avail_idx = NUM + 1;
    harness.transport.load(&state).unwrap();
    let error = harness.transport.check().unwrap_err().to_string();
    assert!(error.contains("queue 0 of virtio device 2: "), "{error}");
    assert_eq!(harness.transport.resume().unwrap_err().to_string(), error);
}

#[test]
fn a_long_chain_is_taken_and_a_longer_one_is_not() {
    for (len, broken) in [(1024, false), (1025, true)] {
        let (mut harness, _file) = disk(false);
        harness.start(0);
        let table = 0x8_0000;
        harness.descriptor(0, table, len * 16, INDIRECT, 0);
        for i in 0..len {
            let flags = if i + 1 < len { NEXT } else { WRITE };
            harness.descriptor_at(table + 16 * u64::from(i), BUFFERS, 16, flags, i as u16 + 1);
        }
        harness.offer(0);
        assert_eq!((harness.broken(), harness.used()), (broken, u16::from(!broken)), "{len}");
    }
}

#[test]
fn a_saved_disk_goes_on_and_does_what_was_under_way() {
    let (mut harness, file) = disk(false);
    harness.start(EVENT_IDX);
    assert_eq!(harness.request(0, 3, Some((BUFFERS + 0x1000, 1024))), 0);
    let mut state = harness.transport.save();
    assert_eq!(state.device, VirtioDeviceState::Block(Vec::new()));
    // A request that the source took and did not answer: it is done when the machine goes on, and given back once.
    let header = [1u32.to_le_bytes().to_vec(), vec![0; 4], 9u64.to_le_bytes().to_vec()].concat();
    harness.memory.write(BUFFERS, &header).unwrap();
    harness.memory.write(BUFFERS + 0x1000, &[9; 512]).unwrap();
    state.queues[0].last_avail_idx += 1;
    harness.memory.write(AVAIL + 2, &2u16.to_le_bytes()).unwrap();
    let (readable, writable) = (vec![(BUFFERS, 16), (BUFFERS + 0x1000, 512)], vec![(BUFFERS + 0x20, 1)]);
    state.device = VirtioDeviceState::Block(vec![VirtioRequest { head: 5, readable, writable }]);
    let block = Block::open(BlockOptions { file: file.path().into(), ..BlockOptions::default() }).unwrap();
    let memory = Arc::clone(&harness.memory);
    harness.transport = Transport::new(Box::new(block), memory, Box::new(|_| ()));
    harness.transport.load(&state).unwrap();
    assert_eq!(harness.transport.save().device, state.device);
    harness.transport.check().unwrap();
    harness.transport.resume().unwrap();
    harness.do_tasks();
    assert_eq!((harness.used(), harness.u16_at(USED + 4 + 8)), (2, 5));
    assert_eq!(&fs::read(file.path()).unwrap()[9 * 512..10 * 512], &[9; 512]);
    assert_eq!(harness.request(4, 0, None), 0);
    assert_eq!(harness.used(), 3);
    // Buffers that a hostile source names.
    for gpa in [u64::MAX, 3 << 20] {
        let request = VirtioRequest { head: 1, readable: vec![(gpa, 16)], writable: vec![(gpa, 0), (gpa, 1)] };
        state.device = VirtioDeviceState::Block(vec![request]);
        state.queues[0].last_avail_idx = 3;
        harness.transport.load(&state).unwrap();
        harness.transport.resume().unwrap();
        harness.do_tasks();
        assert!(harness.broken());
    }
}

/// Offers a read of sector 3 and takes the task, which is under way then.
fn under_way(harness: &mut Harness) -> std::io::Result<Vec<u8>> {
    let header = [vec![0; 8], 3u64.to_le_bytes().to_vec()].concat();
    harness.memory.write(BUFFERS, &header).unwrap();
    harness.memory.write(BUFFERS + 0x20, &[0xff]).unwrap();
    harness.memory.write(BUFFERS + 0x1000, &[0; 512]).unwrap();
    harness.descriptor(0, BUFFERS, 16, NEXT, 1);
    harness.descriptor(1, BUFFERS + 0x1000, 512, NEXT | WRITE, 2);
    harness.descriptor(2, BUFFERS + 0x20, 1, WRITE, 0);
    let index = harness.u16_at(AVAIL + 2);
    harness.memory.write(AVAIL + 2, &(index + 1).to_le_bytes()).unwrap();
    harness.transport.write(0x50, &0u32.to_le_bytes());
    harness.transport.next_task().expect("the request takes its time").run()
}

/// What the guest sees of that request: entries of the used ring, its data, its status.
fn seen(harness: &Harness) -> (u16, u32, u8) {
    let (mut data, mut status) = ([0; 4], [0]);
    harness.memory.read(BUFFERS + 0x1000, &mut data).unwrap();
    harness.memory.read(BUFFERS + 0x20, &mut status).unwrap();
    (harness.used(), u32::from_le_bytes(data), status[0])
}

#[test]
fn a_machine_that_stops_does_not_wait_for_a_disk_that_hangs() {
    let (mut harness, _file) = disk(false);
    harness.transport.set_wake(super::wake::Wake::new().unwrap());
    harness.start(0);
    let result = under_way(&mut harness);
    let Harness { transport, memory, line } = harness;
    let shared = Arc::new(Mutex::new(transport));
    let (go_on, hanging) = std::sync::mpsc::channel::<()>();
    let theirs = Arc::clone(&shared);
    let thread = std::thread::spawn(move || {
        hanging.recv().unwrap_or_default();
        theirs.lock().finish_task(result);
    });
    let soon = || std::time::Instant::now() + std::time::Duration::from_millis(10);
    super::transport::drain(&shared, soon());
    assert!(!super::transport::settle(&shared, soon()), "it may not be another machine's yet");
    drop(go_on);
    thread.join().unwrap();
    assert!(super::transport::settle(&shared, soon()));
    let transport = Arc::into_inner(shared).unwrap().into_inner();
    let mut harness = Harness { transport, memory, line };
    assert_eq!(seen(&harness), (0, 0, 0xff), "a stopped guest sees nothing of it");
    let VirtioDeviceState::Block(requests) = harness.transport.save().device else { panic!("it is a disk") };
    assert_eq!(requests.len(), 1, "it goes along");
    harness.transport.resume().unwrap();
    harness.do_tasks();
    assert_eq!(seen(&harness), (1, 3 * 128, 0));
}

#[test]
fn a_reset_forgets_what_is_under_way() {
    let (mut harness, _file) = disk(false);
    harness.start(0);
    let result = under_way(&mut harness);
    harness.transport.write(0x70, &0u32.to_le_bytes());
    harness.transport.finish_task(result);
    assert_eq!(seen(&harness), (0, 0, 0xff));
    harness.start(0);
    assert_eq!(harness.request(0, 3, Some((BUFFERS + 0x1000, 512))), 0);
    assert_eq!((seen(&harness), harness.broken()), ((1, 3 * 128, 0), false));
}

#[test]
fn more_requests_than_a_queue_has_entries_break_the_disk() {
    let (mut harness, _file) = disk(false);
    harness.start(0);
    harness.descriptor(0, BUFFERS, 16, 0, 0);
    for offered in 1..=NUM + 1 {
        assert!(!harness.broken(), "{offered}");
        harness.memory.write(AVAIL + 2, &offered.to_le_bytes()).unwrap();
        harness.transport.write(0x50, &0u32.to_le_bytes());
    }
    assert!(harness.broken());
}

#[test]
fn a_state_of_another_device_is_refused() {
    let (mut harness, _file) = disk(false);
    let state = harness.transport.save();
    let mut other = state.clone();
    let mut refuses = |other: &qevm_microvm::state::VirtioState, why: &str| {
        let error = harness.transport.load(other).unwrap_err().to_string();
        assert!(error.contains("virtio device 2: ") && error.contains(why), "{error}");
    };
    other.guest_features = 1;
    refuses(&other, "the guest uses features 0x1, and only 0x31006ed4 are offered here");
    let mut other = state.clone();
    other.queues.push(other.queues[0]);
    refuses(&other, "2 queues came, and it has 1");
    for (num, align) in [(2048, 4096), (256, 3), (256, 0)] {
        let mut other = state.clone();
        (other.queues[0].num, other.queues[0].align) = (num, align);
        refuses(&other, &format!("a queue of {num} entries, aligned to {align}"));
    }
    assert!(harness.transport.load(&state).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whatever a driver writes to the registers and lays out in its rings: nothing panics, nothing hangs.
    #[test]
    fn nothing_a_driver_does_is_a_panic(
        writes in prop::collection::vec((0u64..0x140, any::<u32>()), 0..20),
        words in prop::collection::vec((0u64..0x200, any::<u16>()), 0..40),
        indices in prop::collection::vec(0u16..20, 3),
    ) {
        static FILE: OnceLock<NamedTempFile> = OnceLock::new();
        let file = FILE.get_or_init(|| disk(false).1);
        let block = Block::open(BlockOptions { file: file.path().into(), ..BlockOptions::default() }).unwrap();
        let mut harness = Harness::new(Box::new(block));
        harness.start(EVENT_IDX);
        for (i, index) in indices.iter().enumerate() {
            harness.descriptor(i as u16, BUFFERS + 16 * u64::from(*index), u32::from(*index), index % 5, index % 3);
        }
        for (at, word) in words {
            harness.memory.write(DESC + 2 * at % 0x1a0, &word.to_le_bytes()).unwrap();
        }
        harness.offer(0);
        for (offset, value) in writes {
            harness.write(offset & !3, value);
            harness.read(offset & !3);
        }
        harness.write(0x50, 0);
        let state = harness.transport.save();
        let _ = harness.transport.load(&state);
        let _ = harness.transport.resume();
    }
}
