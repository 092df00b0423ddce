//! The serial bus and the source of random numbers.

use super::*;
use crate::devices::{Chardev, ChardevOptions, Rng};
use qevm_microvm::state::VirtioPortState;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(300);
const MULTIPORT: u32 = 1 << 1;

/// A queue of the driver's, laid out as queue 0 is, at an address of its own.
#[derive(Clone, Copy)]
pub(super) struct Ring(pub(super) u32);

impl Ring {
    pub(super) fn desc(self) -> u64 {
        0x4_0000 + 0x4000 * u64::from(self.0)
    }

    pub(super) fn buffer(self, index: u16) -> u64 {
        self.desc() + 0x2000 + 0x100 * u64::from(index)
    }

    fn set_up(self, harness: &mut Harness) {
        harness.queue(self.0, self.desc());
    }

    /// Offers a buffer, as descriptor and entry `index`.
    pub(super) fn offer(self, harness: &mut Harness, index: u16, len: u32, flags: u16) {
        self.lay(harness, index, len, flags);
        harness.write(0x50, self.0);
    }

    pub(super) fn lay(self, harness: &Harness, index: u16, len: u32, flags: u16) {
        let avail = self.desc() + 16 * u64::from(NUM);
        harness.descriptor_at(self.desc() + 16 * u64::from(index), self.buffer(index), len, flags, 0);
        harness.memory.write(avail + 4 + 2 * u64::from(index), &index.to_le_bytes()).unwrap();
        harness.memory.write(avail + 2, &(index + 1).to_le_bytes()).unwrap();
    }

    pub(super) fn send(self, harness: &mut Harness, index: u16, bytes: &[u8]) {
        harness.memory.write(self.buffer(index), bytes).unwrap();
        self.offer(harness, index, bytes.len() as u32, 0);
    }

    pub(super) fn used(self, harness: &Harness) -> u16 {
        harness.u16_at(self.desc() + 0x1002)
    }

    /// What the device wrote into its `index`th buffer.
    pub(super) fn received(self, harness: &Harness, index: u16) -> Vec<u8> {
        let mut len = [0; 4];
        harness.memory.read(self.desc() + 0x1004 + 8 * u64::from(index) + 4, &mut len).unwrap();
        let mut bytes = vec![0; u32::from_le_bytes(len) as usize];
        harness.memory.read(self.buffer(index), &mut bytes).unwrap();
        bytes
    }
}

fn control(id: u32, event: u16, value: u16) -> Vec<u8> {
    [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
}

pub(super) fn start(harness: &mut Harness, features: u32, rings: &[Ring]) {
    harness.write(0x70, 3);
    harness.write(0x20, features);
    harness.write(0x28, 4096);
    rings.iter().for_each(|ring| ring.set_up(harness));
    harness.write(0x70, 7);
}

/// A console on a socket and a named port on nothing, and the other end of the socket.
fn ports() -> (Box<VirtioSerial>, UnixStream) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut serial = VirtioSerial::default();
    assert!(serial.add(false, "org.qevm", Chardev::open(&ChardevOptions::Null).unwrap()));
    assert!(serial.add(true, "", Chardev::open(&ChardevOptions::Socket { path, server: false }).unwrap()));
    (Box::new(serial), listener.accept().unwrap().0)
}

fn bus() -> (Harness, UnixStream) {
    let (serial, host) = ports();
    (Harness::new(serial), host)
}

#[test]
fn random_numbers_fill_what_the_guest_offers() {
    let mut harness = Harness::new(Box::new(Rng::open().unwrap()));
    assert_eq!((harness.read(8), harness.read(0x10), harness.read(0x34)), (4, 0x3900_0000, 8));
    let ring = Ring(0);
    harness.write(0x28, 4096);
    harness.write(0x38, 8);
    ring.set_up(&mut harness);
    assert_eq!(harness.transport.save().queues[0].num, 8, "16 is more than the queue has");
    let ring_of_8 = |harness: &mut Harness, index: u16| {
        let avail = ring.desc() + 16 * 8;
        harness.descriptor_at(ring.desc() + 16 * u64::from(index), ring.buffer(index), 32, WRITE, 0);
        harness.memory.write(avail + 4 + 2 * u64::from(index), &index.to_le_bytes()).unwrap();
        harness.memory.write(avail + 2, &(index + 1).to_le_bytes()).unwrap();
        harness.write(0x50, 0);
        ring.received(harness, index)
    };
    let (a, b) = (ring_of_8(&mut harness, 0), ring_of_8(&mut harness, 1));
    assert!(a.len() == 32 && b.len() == 32 && a != b && a != [0; 32]);
}

#[test]
fn ports_are_introduced_to_a_driver_that_knows_them() {
    let (mut harness, _host) = bus();
    assert_eq!((harness.read(8), harness.read(0x10), harness.read(0x104)), (3, 0x3900_0006, 31));
    let (to_guest, to_host) = (Ring(2), Ring(3));
    start(&mut harness, MULTIPORT, &[to_guest, to_host]);
    (0..8).for_each(|i| to_guest.offer(&mut harness, i, 0x80, WRITE));
    to_host.send(&mut harness, 0, &control(0xffff_ffff, 0, 1));
    assert_eq!(to_guest.received(&harness, 0), control(1, 1, 1));
    assert_eq!(to_guest.received(&harness, 1), control(0, 1, 1));
    to_host.send(&mut harness, 1, &control(0, 3, 1));
    assert_eq!(to_guest.received(&harness, 2), control(0, 4, 1));
    assert_eq!(to_guest.received(&harness, 3), control(0, 6, 1));
    to_host.send(&mut harness, 2, &control(1, 3, 1));
    assert_eq!(to_guest.received(&harness, 4), [control(1, 7, 1), b"org.qevm".to_vec()].concat());
    assert_eq!(to_guest.received(&harness, 5), control(1, 6, 1));
    to_host.send(&mut harness, 3, &control(1, 6, 1));
    // Ports that are not there, messages that are none.
    to_host.send(&mut harness, 4, &control(30, 3, 1));
    to_host.send(&mut harness, 5, &[1, 2, 3]);
    assert_eq!((to_host.used(&harness), to_guest.used(&harness), harness.broken()), (6, 6, false));
    let VirtioDeviceState::Serial(ports) = harness.transport.save().device else { panic!("it is a serial bus") };
    let open: Vec<_> = ports.iter().map(|port| (port.id, port.guest_connected, port.host_connected)).collect();
    assert_eq!(open, [(1, true, true), (0, false, true)]);
}

#[test]
fn a_console_speaks_and_listens() {
    let (harness, mut host) = bus();
    let Harness { transport, memory, line } = harness;
    let transport = Arc::new(Mutex::new(transport));
    let thread = start_pump(&transport, || true).unwrap();
    // The harness of the driver, for as long as `work` runs.
    let placeholder = || Harness::new(Box::new(Rng::open().unwrap())).transport;
    let with = |work: &mut dyn FnMut(&mut Harness)| {
        let mut guard = transport.lock();
        let inner = std::mem::replace(&mut *guard, placeholder());
        let mut harness = Harness { transport: inner, memory: Arc::clone(&memory), line: Arc::clone(&line) };
        work(&mut harness);
        *guard = harness.transport;
    };
    let (receive, transmit) = (Ring(0), Ring(1));
    with(&mut |harness| {
        harness.transport.resume().unwrap();
        start(harness, 0, &[receive, transmit]);
        transmit.send(harness, 0, b"hello");
        receive.offer(harness, 0, 0x40, WRITE);
    });
    let mut bytes = [0; 5];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
    host.write_all(b"and you").unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut heard = Vec::new();
    while heard.is_empty() {
        with(&mut |harness| {
            if receive.used(harness) == 1 {
                heard = receive.received(harness, 0);
            }
        });
        assert!(Instant::now() < deadline, "nothing arrives");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(heard, b"and you");
    transport.lock().end();
    thread.join().unwrap();
}

#[test]
fn what_the_host_does_not_take_goes_along() {
    let (mut harness, mut host) = bus();
    harness.transport.resume().unwrap();
    let transmit = Ring(1);
    start(&mut harness, 0, &[transmit]);
    // One buffer of half a MiB is more than a socket takes.
    const LEN: u32 = 1 << 19;
    let text: Vec<u8> = (0..LEN / 4).flat_map(u32::to_le_bytes).collect();
    harness.memory.write(0x10_0000, &text).unwrap();
    transmit.lay(&harness, 0, LEN, 0);
    harness.descriptor_at(transmit.desc(), 0x10_0000, LEN, 0, 0);
    harness.write(0x50, 1);
    assert_eq!(transmit.used(&harness), 0);
    harness.transport.pause();
    let state = harness.transport.save();
    let VirtioDeviceState::Serial(saved) = &state.device else { panic!("it is a serial bus") };
    let (request, done) = saved[1].pending.clone().unwrap();
    assert_eq!(request.readable, [(0x10_0000, LEN)]);
    assert!(done > 0 && done < LEN.into());
    let mut first = vec![0; done as usize];
    host.read_exact(&mut first).unwrap();
    // The next machine writes the rest, to another listener.
    let (serial, mut next_host) = ports();
    harness.transport = Transport::new(serial, Arc::clone(&harness.memory), Box::new(|_| ()));
    harness.transport.load(&state).unwrap();
    assert_eq!(harness.transport.save().device, state.device);
    let transport = Arc::new(Mutex::new(harness.transport));
    let thread = start_pump(&transport, || true).unwrap();
    transport.lock().resume().unwrap();
    let mut rest = vec![0; LEN as usize - done as usize];
    next_host.read_exact(&mut rest).unwrap();
    assert_eq!([first, rest].concat(), text);
    transport.lock().end();
    thread.join().unwrap();
}

#[test]
fn other_ports_are_refused() {
    let (mut harness, _host) = bus();
    let state = harness.transport.save();
    assert!(harness.transport.load(&state).is_ok());
    for ids in [vec![], vec![0], vec![0, 2], vec![0, 1, 1]] {
        let ports = ids.into_iter().map(|id| VirtioPortState { id, ..VirtioPortState::default() });
        let other =
            qevm_microvm::state::VirtioState { device: VirtioDeviceState::Serial(ports.collect()), ..state.clone() };
        assert!(harness.transport.load(&other).is_err(), "{other:?}");
    }
    let other = qevm_microvm::state::VirtioState { device: VirtioDeviceState::Rng, ..state };
    let error = harness.transport.load(&other).unwrap_err().to_string();
    assert!(error.contains("it is no serial bus"), "{error}");
}

/// Lays a ring of `num` one-buffer chains out, and gives what makes all of them available again, whatever the device
/// has taken.
fn endless(harness: &mut Harness, queue: u32, num: u16, flags: u16, message: &[u8]) -> impl Fn(&GuestMemory) + use<> {
    let ring = Ring(queue);
    harness.write(0x30, queue);
    harness.write(0x38, num.into());
    harness.write(0x3c, 4096);
    harness.write(0x40, (ring.desc() >> 12) as u32);
    let avail = ring.desc() + 16 * u64::from(num);
    for index in 0..num {
        harness.memory.write(ring.buffer(index), message).unwrap();
        let at = ring.desc() + 16 * u64::from(index);
        harness.descriptor_at(at, ring.buffer(index), message.len() as u32, flags, 0);
        harness.memory.write(avail + 4 + 2 * u64::from(index), &index.to_le_bytes()).unwrap();
    }
    move |memory| {
        let mut used = [0; 2];
        memory.read(ring.desc() + 0x1002, &mut used).unwrap();
        memory.write(avail + 2, &u16::from_le_bytes(used).wrapping_add(num).to_le_bytes()).unwrap();
    }
}

/// A second vCPU gives each buffer to the device again as soon as it comes back.
#[test]
fn a_guest_that_never_stops_adding_gets_one_turn_for_each_notification() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let folder = tempfile::tempdir().unwrap();
    let nobody = || {
        let mut serial = VirtioSerial::default();
        let options = ChardevOptions::Socket { path: folder.path().join("nobody"), server: true };
        assert!(serial.add(true, "", Chardev::open(&options).unwrap()));
        Box::new(serial)
    };
    type Case = (&'static str, Box<dyn Model>, u32, u16, u16, Vec<u8>);
    let cases: [Case; 3] = [
        ("random numbers", Box::new(Rng::open().unwrap()), 0, 8, WRITE, vec![0; 32]),
        ("control messages", nobody(), 3, 16, 0, control(0, 6, 1)),
        ("output that is not taken", nobody(), 1, 16, 0, b"hello".to_vec()),
    ];
    for (what, model, queue, num, flags, message) in cases {
        let mut harness = Harness::new(model);
        harness.transport.resume().unwrap();
        start(&mut harness, 0, &[]);
        let offer = endless(&mut harness, queue, num, flags, &message);
        let (memory, stop) = (Arc::clone(&harness.memory), AtomicBool::new(false));
        offer(&memory);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    offer(&memory);
                }
            });
            for _ in 0..50 {
                // The other vCPU has its chance to add some.
                while !harness.transport.has_left() {
                    harness.write(0x50, queue);
                }
                let before = Ring(queue).used(&harness);
                harness.transport.process_left();
                let done = Ring(queue).used(&harness).wrapping_sub(before);
                assert!((1..=num).contains(&done), "{what}: {done} in a turn");
            }
            stop.store(true, Ordering::Relaxed);
            assert!(!harness.broken(), "{what}");
        });
    }
}

#[test]
fn a_pipe_that_is_not_read_holds_its_port_up_and_no_vcpu() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let mut reader = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut serial = VirtioSerial::default();
    assert!(serial.add(true, "", Chardev::open(&ChardevOptions::File { path, append: true }).unwrap()));
    let mut harness = Harness::new(Box::new(serial));
    harness.transport.resume().unwrap();
    let transmit = Ring(1);
    start(&mut harness, 0, &[transmit]);
    const LEN: u32 = 1 << 19;
    harness.memory.write(0x10_0000, &vec![b'a'; LEN as usize]).unwrap();
    transmit.lay(&harness, 0, LEN, 0);
    harness.descriptor_at(transmit.desc(), 0x10_0000, LEN, 0, 0);
    harness.write(0x50, 1);
    harness.transport.pause();
    assert_eq!(transmit.used(&harness), 0);
    // As soon as it is read, all of it comes.
    let transport = Arc::new(Mutex::new(harness.transport));
    let thread = start_pump(&transport, || true).unwrap();
    transport.lock().resume().unwrap();
    reader.read_exact(&mut vec![0; LEN as usize]).unwrap();
    transport.lock().end();
    thread.join().unwrap();
}
