//! Migrations with VFIO devices that QEMUs sent to each other, recorded in the lab (savevm/tests/data/vfio): machines
//! with doubles in the devices' place load them, and send the like.

use crate::Test;
use crate::guest::Guest;
use crate::testdev::Testdev;
use crate::vfio::{SHAPE, Switches, capabilities, slot};
use qevm_microvm::sections;
use qevm_microvm::state::MachineState;
use qevm_migration::{
    Address, DeviceSection, Devices, DirtyLog, GuestError, Incoming, IterativeDevice, Job, Listener, RamView,
    SavedDevices, receive,
};
use qevm_savevm::event::Event;
use qevm_savevm::framing::SectionKind;
use qevm_savevm::{Decoder, DecoderOptions};
use qevm_wire::{CountedString, Driver, Profile, QemuVersion};
use reference_vmm::machine::Machine;
use reference_vmm::payload::PciDevice;
use reference_vmm::vfio::{Double, Shape, VfioBacking, VfioSlot};
use reference_vmm::vmm::Vmm;
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

pub(crate) const TESTS: &[Test] = &[
    ("vfio_streams_of_qemu_load", streams_of_qemu_load),
    ("vfio_streams_of_qemu_load_from_page_channels", streams_of_qemu_load_from_page_channels),
    ("vfio_streams_of_a_device_in_use_load", streams_of_a_device_in_use_load),
    ("vfio_streams_have_the_sections_of_qemus", sections_are_qemus),
];

const PAYLOAD: &str = "dirty=512K rate=8M hold=1M zero=1M report=20";
const OLD: QemuVersion = QemuVersion::new(10, 0);
const NEW: QemuVersion = QemuVersion::NEWEST;
/// Before and after a configuration on the wire.
const CONFIG: u64 = 0xffff_ffff_ef10_0002;
const END_OF_STATE: u64 = 0xffff_ffff_ef10_0001;

fn recorded(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../savevm/tests/data/vfio").join(name)).unwrap()
}

fn stream_of(name: &str) -> Vec<u8> {
    zstd::decode_all(&recorded(&format!("{name}.zst"))[..]).unwrap()
}

/// A machine that takes all of a guest but its vCPUs: those that were recorded ran at another frequency than this
/// host's.
struct Elsewhere<'m>(&'m Machine);

impl qevm_migration::Guest for Elsewhere<'_> {
    fn machine_type(&self) -> &str {
        qevm_migration::Guest::machine_type(self.0)
    }

    fn ram(&self) -> Vec<RamView<'_>> {
        self.0.ram()
    }

    fn start_dirty_log(&self) -> Result<Box<dyn DirtyLog + '_>, GuestError> {
        self.0.start_dirty_log()
    }

    fn pause(&self) -> Result<bool, GuestError> {
        qevm_migration::Guest::pause(self.0)
    }

    fn resume(&self) -> Result<(), GuestError> {
        Err("it has no vCPUs".into())
    }

    fn resize_ram(&self, block: usize, used_length: u64) -> Result<(), GuestError> {
        self.0.resize_ram(block, used_length)
    }

    fn devices(&self) -> &dyn Devices {
        self
    }
}

impl Devices for Elsewhere<'_> {
    fn save(&self, profile: &Profile, running: bool) -> Result<SavedDevices, GuestError> {
        self.0.save(profile, running)
    }

    fn has(&self, idstr: &CountedString, instance_id: u32) -> bool {
        self.0.has(idstr, instance_id)
    }

    fn load(&self, devices: &[DeviceSection]) -> Result<bool, GuestError> {
        let here = self.0.save_state()?;
        let mut state = here.clone();
        let running = sections::load(devices, &sections::newest(), &mut state)?;
        self.0.load_state(&MachineState { vcpus: here.vcpus, ..state })?;
        self.0.vfio().loaded()?;
        Ok(running)
    }

    fn iterative(&self) -> Vec<&dyn IterativeDevice> {
        self.0.vfio().iterative()
    }
}

/// Takes what a QEMU sent to another, the main channel first, and gives what came back on the return path.
fn load(guest: &Guest, streams: Vec<Vec<u8>>, release: QemuVersion, switches: Switches<'_>) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stream");
    let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
    thread::scope(|scope| {
        let sources: Vec<_> = streams
            .into_iter()
            .map(|stream| {
                // One after the other: the first is the main channel.
                let mut socket = UnixStream::connect(&path).unwrap();
                scope.spawn(move || {
                    socket.write_all(&stream).unwrap();
                    let mut answers = Vec::new();
                    socket.read_to_end(&mut answers).unwrap();
                    answers
                })
            })
            .collect();
        let job = Job::default();
        job.set_capabilities(capabilities(switches)).unwrap();
        job.begin().unwrap();
        let profile = Profile::new(release, "microvm");
        let incoming = Incoming::accept(&listener, &job, &profile).unwrap();
        let arrival = receive(&Elsewhere(&guest.machine), incoming, &job, &profile).unwrap();
        assert!(arrival.running);
        drop(arrival);
        let answers: Vec<_> = sources.into_iter().map(|source| source.join().unwrap()).collect();
        assert!(answers[1..].iter().all(Vec::is_empty), "nothing comes back on page channels");
        answers[0].clone()
    })
}

/// Every byte of these streams is QEMU's (savevm/tests/data/vfio).
fn streams_of_qemu_load() {
    let cases = [("11.1-plain", NEW, 1, false), ("11.1-ack", NEW, 1, true), ("10.0-ack", OLD, 1, true)];
    for (name, release, devices, acks) in cases.into_iter().chain([("11.1-two-devices", NEW, 2, true)]) {
        let (stream, acks) = (stream_of(name), [("switchover-ack", acks)]);
        let doubles: Vec<_> = (0..devices).map(|_| Double::new("any", Shape { takes_all: true, ..SHAPE })).collect();
        let slots = doubles.iter().map(|double| slot(None, double)).collect();
        let guest = Guest::configured(16 << 20, 1, "", |config| (config.pcie, config.vfio) = (true, slots));
        let answers = load(&guest, vec![stream.clone()], release, &acks);
        assert_eq!(answers, recorded(&format!("{name}.return-path")), "{name}");
        let saved =
            sections::save(&guest.machine.save_state().unwrap(), &Profile::new(release, "microvm"), true).unwrap();
        for (number, double) in (1..).zip(&doubles) {
            // 24 bytes for the device and 36 for each port. (kernel documentation of the sample: 96 bytes for two)
            let taken = double.taken();
            assert_eq!(taken.len(), 96, "{name}");
            assert!(double.has_arrived() && stream.windows(24).any(|bytes| *bytes == taken[..24]));
            let idstr = format!("0000:00:{number:02x}.0/vfio");
            let section = saved.sections().iter().find(|section| section.idstr == *idstr.as_str()).unwrap();
            let config = on_the_wire(&section.body);
            assert_eq!(config.len(), 4132);
            assert!(is_in(&stream, &config), "{name}: another configuration goes back");
            let described = r#""size":4132,"fields":[{"name":"data","size":4132,"type":"buffer"}]"#;
            let (ours, qemus) =
                (saved.description().replace(' ', ""), String::from_utf8_lossy(&stream).replace(' ', ""));
            assert!(ours.contains(described) && qemus.contains(described), "{name}");
        }
    }
}

/// The device's state and its configuration are on the page channels.
fn streams_of_qemu_load_from_page_channels() {
    for (name, release, acks) in [("11.1-multifd", NEW, true), ("10.0-multifd", OLD, false)] {
        let files = [name.to_owned(), format!("{name}-channel-1"), format!("{name}-channel-2")];
        let streams: Vec<_> = files.iter().map(|name| stream_of(name)).collect();
        let double = Double::new("any", Shape { takes_all: true, ..SHAPE });
        let guest = Guest::configured(16 << 20, 1, "", |config| {
            (config.pcie, config.vfio) = (true, vec![slot(None, &double)]);
        });
        let switches = [("multifd", true), ("switchover-ack", acks)];
        let answers = load(&guest, streams.clone(), release, &switches);
        assert_eq!(answers, recorded(&format!("{name}.return-path")), "{name}");
        let taken = double.taken();
        assert_eq!(taken.len(), 96, "{name}");
        assert!(double.has_arrived(), "{name}");
        let saved =
            sections::save(&guest.machine.save_state().unwrap(), &Profile::new(release, "microvm"), true).unwrap();
        let section = saved.sections().iter().find(|section| section.idstr == *"0000:00:01.0/vfio").unwrap();
        for (what, bytes) in [("state", &taken[24..]), ("configuration", &section.body)] {
            assert!(!is_in(&streams[0], bytes), "{name}: the {what} is on the main channel");
            assert!(streams[1..].iter().any(|stream| is_in(stream, bytes)), "{name}: another {what}");
        }
    }
}

fn on_the_wire(configuration: &[u8]) -> Vec<u8> {
    [&CONFIG.to_be_bytes()[..], configuration, &END_OF_STATE.to_be_bytes()].concat()
}

fn is_in(stream: &[u8], bytes: &[u8]) -> bool {
    stream.windows(bytes.len()).any(|window| window == bytes)
}

/// Those of `testdev`, which the guest uses: with the number of the chunk kinds in its state
/// (conformance/lab/testdev/session.h), that state's registers, and which interrupts are on.
const IN_USE: [(&str, QemuVersion); 2] = [("11.1-testdev", NEW), ("10.0-testdev", OLD)];

fn streams_of_a_device_in_use_load() {
    for (name, release) in IN_USE {
        let stream = stream_of(name);
        let double = Double::new("any", Shape { takes_all: true, ..SHAPE });
        let function = Testdev::new(None).function();
        let backing = VfioBacking::Model { function, driver: Ok(Box::new(double.clone())), log: None };
        let device = VfioSlot { backing, ..slot(None, &double) };
        let guest = Guest::configured(16 << 20, 1, "", |config| (config.pcie, config.vfio) = (true, vec![device]));
        let answers = load(&guest, vec![stream.clone()], release, &[("switchover-ack", true)]);
        assert_eq!(answers, recorded(&format!("{name}.return-path")), "{name}");
        assert!(double.has_arrived());
        let chunks = chunks(&double.taken());
        let kinds: Vec<_> = chunks.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(
            (kinds.first(), kinds.last()),
            (Some(&1), Some(&5)),
            "{name}: initial data first, the registers last"
        );
        assert!(kinds.contains(&4), "{name}: {kinds:?}");
        let registers = &chunks.last().unwrap().1;
        let word = |at: usize| u32::from_le_bytes(*registers[at..].first_chunk().unwrap());
        let (counter, pending, raised) = (word(0), word(8), word(12));
        assert!(counter > 0 && raised > 0 && pending <= 0xf, "{name}: {counter} {pending:#x} {raised}");
        // It has counted the memory up as well as the register, and is at most one step further there.
        let memory = u32::from_le_bytes(*registers[40..].first_chunk().unwrap());
        assert!(counter.abs_diff(memory) <= 1, "{name}: {counter} {memory}");
        let state = guest.machine.save_state().unwrap();
        let function = &state.pci.as_ref().unwrap().functions[0];
        let command = u16::from_le_bytes([function.config[4], function.config[5]]);
        assert_eq!(command & 6, 6, "{name}: memory and bus mastering are on");
        // MSI-X is on in the one, and neither it nor MSI in the other.
        let (msi, msix) = (function.config[0x42] & 1 != 0, function.config[0x63] & 0x80 != 0);
        assert_eq!((msi, msix, function.msix.len()), (false, release == NEW, 65), "{name}");
        let bar = |bar: usize| u32::from_le_bytes(*function.config[0x10 + 4 * bar..].first_chunk().unwrap());
        assert!((0..3).all(|at| (0xc000_0000..0xe000_0000).contains(&bar(at))), "{name}");
        let saved = sections::save(&state, &Profile::new(release, "microvm"), true).unwrap();
        let section = saved.sections().iter().find(|section| section.idstr == *"0000:00:01.0/vfio").unwrap();
        assert!(is_in(&stream, &on_the_wire(&section.body)), "{name}: another configuration goes back");
    }
}

/// The chunks that a `testdev`'s state consists of: kind and content.
fn chunks(mut state: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut chunks = Vec::new();
    while !state.is_empty() {
        let long = |at: usize| u64::from_le_bytes(*state[at..].first_chunk().unwrap());
        assert_eq!((long(0), long(8) >> 32), (0x6b6e_7568_6376_6474, chunks.len() as u64), "magic, and its number");
        let (kind, len) = (long(8) as u32, long(16) as usize);
        chunks.push((kind, state[32..][..len].to_vec()));
        state = &state[32 + len..];
    }
    chunks
}

/// Sections whose subsections are decided by the processor, and by the ACPI tables, which a machine without a kernel
/// has none of here.
const ELSEWHERE: [&str; 2] = ["cpu", "fw_cfg"];

/// What a stream consists of, beside the guest's memory and what is sent of devices while the guest runs.
#[derive(Debug, PartialEq)]
struct Outline {
    /// START, END or FULL; name, instance, version; bytes of content, but [those](ELSEWHERE).
    sections: Vec<(SectionKind, String, u32, u32, usize)>,
    description: Value,
}

fn outline(stream: &[u8]) -> Outline {
    let options = DecoderOptions { vmdesc: true, ..DecoderOptions::default() };
    let mut driver = Driver::new(stream, Decoder::new(options));
    let mut sections: Vec<(SectionKind, String, u32, u32, usize)> = Vec::new();
    let (mut opened, mut text) = (Vec::new(), Vec::new());
    while let Some(event) = driver.next().unwrap() {
        let mut described = false;
        match event {
            Event::Section { kind, header } => {
                let name = header.idstr.to_string();
                if kind == SectionKind::Start {
                    opened.push((header.section_id, name.clone()));
                } else if let Some((_, start)) = opened.iter().find(|(id, _)| *id == header.section_id) {
                    // A FULL of a device that was sent in parts has the number of its START.
                    assert_eq!(*start, name);
                }
                sections.push((kind, name, header.instance_id, header.version_id, 0));
            }
            Event::SectionPart { kind: SectionKind::End, section_id } => {
                let (_, name) = opened.iter().find(|(id, _)| *id == section_id).unwrap();
                sections.push((SectionKind::End, name.clone(), 0, 0, 0));
            }
            Event::Body(bytes) => {
                let len = bytes.len();
                let (_, name, .., content) = sections.last_mut().unwrap();
                *content += if ELSEWHERE.contains(&name.as_str()) { 0 } else { len };
            }
            Event::VmDescription { .. } => described = true,
            _ => {}
        }
        let mut payload = Vec::new();
        driver.payload().read_to_end(&mut payload).unwrap();
        if described {
            text = payload;
        }
    }
    let mut description: Value = serde_json::from_slice(&text).unwrap();
    description["devices"]
        .as_array_mut()
        .unwrap()
        .retain(|device| !ELSEWHERE.iter().any(|name| device["name"] == *name));
    Outline { sections, description }
}

/// What a machine with these devices sends to a QEMU of this release, when its guest has used them if they can be.
fn sent(slots: Vec<VfioSlot>, testdev: Option<&Testdev>, release: QemuVersion, payload: &str) -> Vec<u8> {
    let Guest { machine, console } =
        Guest::configured(32 << 20, 1, payload, |config| (config.pcie, config.vfio) = (true, slots));
    let vmm = Vmm::new(machine, Profile::new(release, "microvm"), false);
    if let Some(testdev) = testdev {
        testdev.connect(&vmm);
    }
    vmm.cont().unwrap();
    match testdev {
        None => drop(console.wait_for_line("qevm-payload pass=")),
        Some(_) => console.wait_for("interrupts", |lines| {
            lines.iter().filter_map(|line| PciDevice::parse(line)).any(|device| device.taken > 4).then_some(())
        }),
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stream");
    vmm.migrate(format!("file:{}", path.display()).parse().unwrap()).unwrap();
    vmm.outgoing().wait();
    assert_eq!(vmm.outgoing().statistics().error, None);
    std::fs::read(path).unwrap()
}

/// Names, instances, versions, order, lengths and the description.
fn sections_are_qemus() {
    for (name, release, devices) in [("11.1-plain", NEW, 1), ("10.0-ack", OLD, 1), ("11.1-two-devices", NEW, 2)] {
        let doubles: Vec<_> = (0..devices).map(|_| Double::new("any", SHAPE)).collect();
        let slots = doubles.iter().map(|double| slot(None, double)).collect();
        equal(name, &sent(slots, None, release, &format!("{PAYLOAD} pci=1")));
    }
    for ((name, release), interrupts) in IN_USE.into_iter().zip([5, 3]) {
        let testdev = Testdev::new(None);
        let payload = format!("{PAYLOAD} dma=16M dmapages=64 pci={interrupts}");
        equal(name, &sent(vec![testdev.slot()], Some(&testdev), release, &payload));
    }
}

fn equal(name: &str, ours: &[u8]) {
    let (ours, qemus) = (outline(ours), outline(&stream_of(name)));
    assert_eq!(ours.sections, qemus.sections, "{name}");
    let of = |outline: &Outline| outline.description["devices"].as_array().unwrap().clone();
    for (ours, qemus) in of(&ours).iter().zip(of(&qemus).iter()) {
        assert_eq!(ours, qemus, "{name}");
    }
    assert_eq!(ours.description, qemus.description, "{name}");
}
