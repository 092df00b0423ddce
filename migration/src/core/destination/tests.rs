//! Iterative devices at the destination: what their sections mean, and in which order they may come.

use super::*;
use crate::DeviceSection;
use crate::core::{DeviceOptions, DeviceStateError};
use qevm_returnpath::SwitchoverError;
use qevm_returnpath::switchover::SwitchoverAckFlow;
use qevm_savevm::command::Command;
use qevm_savevm::framing::{SectionHeader, SectionKind};
use qevm_savevm::ram::{BlockId, RamBlock};
use qevm_savevm::vfio::VfioRecord;
use qevm_savevm::{Event, StreamWriter};
use qevm_wire::{Blame, CountedString, Fault};

const CONFIG: &[u8] = b"the configuration";
const RAM: u32 = 1;

fn name(text: &str) -> CountedString {
    CountedString::new(text).unwrap()
}

/// The device with this number, whose section has this number, too.
fn device(number: u32) -> CountedString {
    name(&format!("0000:00:{number:02x}.0/vfio"))
}

fn options(transfer: bool) -> DestinationOptions {
    let device = |number| DeviceOptions { switchover_ack: true, transfer, ..DeviceOptions::new(device(number)) };
    DestinationOptions {
        machine_type: "microvm".into(),
        ram: vec!["ram".into()],
        devices: [4, 5].map(device).into(),
        answers: true,
        switchover_ack: Some(SwitchoverAckFlow::Legacy),
        ..DestinationOptions::default()
    }
}

/// A stream, and how each of its devices is sent.
struct Stream(StreamWriter);

impl Stream {
    /// RAM of one block without pages, and two devices that begin.
    fn new() -> Self {
        let mut stream = Stream(StreamWriter::default());
        stream.0.header(None).unwrap();
        stream.0.command(Command::OpenReturnPath).unwrap();
        let header = SectionHeader { section_id: RAM, idstr: name("ram"), instance_id: 0, version_id: 4 };
        stream.0.section_start(&header).unwrap();
        stream.0.ram_setup([RamBlock::new(name("ram"), 4096)]).unwrap();
        stream.0.eos().unwrap();
        stream.0.footer().unwrap();
        for number in [4, 5] {
            stream.open(SectionKind::Start, number, &[VfioRecord::Setup, VfioRecord::EndOfState]);
        }
        stream
    }

    fn open(&mut self, kind: SectionKind, number: u32, records: &[VfioRecord]) {
        let header = SectionHeader { section_id: number, idstr: device(number), instance_id: 0, version_id: 1 };
        self.0.event(&Event::Section { kind, header }).unwrap();
        self.records(records);
    }

    fn part(&mut self, kind: SectionKind, number: u32, records: &[VfioRecord]) {
        self.0.event(&Event::SectionPart { kind, section_id: number }).unwrap();
        self.records(records);
    }

    fn records(&mut self, records: &[VfioRecord]) {
        for record in records {
            self.0.event(&Event::Vfio(*record)).unwrap();
            match record {
                VfioRecord::Data { len } => self.0.payload(&b"state of a device"[..*len as usize]).unwrap(),
                VfioRecord::Config => self.0.event(&Event::Body(CONFIG)).unwrap(),
                _ => {}
            }
        }
        self.0.footer().unwrap();
    }

    /// Both agree.
    fn initial(&mut self) {
        for number in [5, 4] {
            self.part(SectionKind::Part, number, &[VfioRecord::Data { len: 5 }, VfioRecord::InitDataSent]);
        }
    }

    /// The switchover and the end of RAM.
    fn stop(&mut self) {
        self.0.command(Command::SwitchoverStart).unwrap();
        self.0.section_end(RAM).unwrap();
        self.0.eos().unwrap();
        self.0.footer().unwrap();
    }

    fn end(&mut self) {
        [4, 5].iter().for_each(|number| self.part(SectionKind::End, *number, &[VfioRecord::EndOfState]));
    }

    fn full(&mut self, number: u32, records: &[VfioRecord]) {
        self.open(SectionKind::Full, number, records);
    }

    /// What a destination without description does with it all.
    fn load(mut self, options: DestinationOptions) -> Result<Loaded, MigrationError> {
        self.0.eof().unwrap();
        let (bytes, mut at) = (self.0.take(), 0);
        let mut core = Destination::new(options);
        let mut loaded = Loaded::default();
        loop {
            let turn = core.next(&bytes[at..])?;
            at += turn.consumed;
            match turn.action {
                Action::Block(_) => core.block_fits(),
                Action::Section { usage, .. } => core.section(usage.map(drop).ok_or("none".into()))?,
                Action::LoadPiece { idstr, state } => loaded.pieces.push((idstr, state.to_vec())),
                Action::Send(message) => loaded.sent.push((message, loaded.pieces.len())),
                Action::SwitchOver => loaded.switched_over = true,
                Action::DeviceStates => {
                    assert!(loaded.switched_over);
                    let framed = [
                        &0xffff_ffff_ef10_0002_u64.to_be_bytes()[..],
                        CONFIG,
                        &0xffff_ffff_ef10_0001_u64.to_be_bytes(),
                    ];
                    core.device_states(Ok([4, 5].map(|number| (device(number), framed.concat())).into()))?;
                }
                Action::LoadDevices => {
                    loaded.devices = core.devices().to_vec();
                    return Ok(loaded);
                }
                Action::Read { .. } => core.end_of_input(),
                _ => {}
            }
        }
    }

    fn refused(self, options: DestinationOptions) -> LoadError {
        match self.load(options) {
            Err(MigrationError::Load(error)) => error.kind,
            other => panic!("{other:?}"),
        }
    }
}

#[derive(Debug, Default)]
struct Loaded {
    pieces: Vec<(CountedString, Vec<u8>)>,
    /// What was sent, and how many pieces had been loaded then.
    sent: Vec<(Message, usize)>,
    switched_over: bool,
    devices: Vec<DeviceSection>,
}

#[test]
fn a_configuration_comes_in_a_full_section_under_the_id_of_the_device() {
    let mut stream = Stream::new();
    stream.initial();
    stream.stop();
    stream.part(SectionKind::End, 4, &[VfioRecord::Data { len: 17 }, VfioRecord::EndOfState]);
    stream.part(SectionKind::End, 5, &[VfioRecord::EndOfState]);
    [5, 4].iter().for_each(|number| stream.full(*number, &[VfioRecord::Config, VfioRecord::EndOfState]));
    let loaded = stream.load(options(false)).unwrap();
    let section = |number| DeviceSection { idstr: device(number), instance_id: 0, version_id: 1, body: CONFIG.into() };
    assert_eq!(loaded.devices, [section(5), section(4)], "in the order of the stream");
    let piece = |number, state: &[u8]| (device(number), state.to_vec());
    assert_eq!(loaded.pieces, [piece(5, b"state"), piece(4, b"state"), piece(4, b"state of a device")]);
}

#[test]
fn each_flow_has_its_acks_when_the_initial_data_are_loaded() {
    let ack = |pieces| (Message::SwitchoverAck, pieces);
    let flows =
        [(Some(SwitchoverAckFlow::Legacy), vec![ack(2)]), (Some(SwitchoverAckFlow::Counted), vec![ack(1), ack(2)])];
    for (flow, acks) in flows {
        let mut stream = Stream::new();
        stream.initial();
        stream.stop();
        stream.end();
        let loaded = stream.load(DestinationOptions { switchover_ack: flow, ..options(false) }).unwrap();
        assert_eq!(loaded.sent, acks, "{flow:?}");
    }
}

#[test]
fn a_device_that_may_not_agree_to_the_switchover_is_refused() {
    let agree = |number: u32| {
        let mut stream = Stream::new();
        stream.part(SectionKind::Part, number, &[VfioRecord::InitDataSent]);
        stream
    };
    let off = DestinationOptions { switchover_ack: None, ..options(false) };
    let error = agree(4).refused(off);
    assert!(matches!(error, LoadError::CapabilityDiffers { name: "switchover-ack", here: false }), "{error}");

    let mut one = options(false);
    one.devices[0].switchover_ack = false;
    let LoadError::Switchover(error) = agree(4).refused(one) else { panic!("it has not announced that it wants to") };
    assert_eq!(error, SwitchoverError::UnknownDevice { device: device(4).to_string() });

    let mut twice = agree(4);
    twice.part(SectionKind::Part, 4, &[VfioRecord::InitDataSent]);
    let LoadError::Switchover(error) = twice.refused(options(false)) else { panic!("twice") };
    assert_eq!(error, SwitchoverError::Repeated { device: device(4).to_string() });

    // It reaches no watcher; that is the source's fault and not a caller's.
    let mut unheard = Stream(StreamWriter::default());
    unheard.0.header(None).unwrap();
    unheard.open(SectionKind::Start, 4, &[VfioRecord::InitDataSent]);
    let error = unheard.refused(options(false));
    assert!(matches!(error, LoadError::AckUnheard { .. }), "{error}");
    assert_eq!(error.fault(), Fault::Malformed);
}

#[test]
fn configurations_over_page_channels_get_the_places_of_their_sections() {
    // QEMU 10.1 may say that it is to be loaded now, with or without END_OF_STATE.
    let endings: [&[VfioRecord]; 3] = [
        &[VfioRecord::EndOfState],
        &[VfioRecord::ConfigLoadReady, VfioRecord::EndOfState],
        &[VfioRecord::ConfigLoadReady],
    ];
    for records in endings {
        let mut stream = Stream::new();
        stream.stop();
        stream.end();
        [5, 4].iter().for_each(|number| stream.full(*number, records));
        let loaded = stream.load(options(true)).unwrap();
        let places: Vec<_> = loaded.devices.iter().map(|section| (section.idstr.clone(), &*section.body)).collect();
        assert_eq!(places, [(device(5), CONFIG), (device(4), CONFIG)]);
    }
}

#[test]
fn both_sides_must_agree_on_where_the_state_travels() {
    let mut main = Stream::new();
    main.stop();
    main.end();
    main.full(4, &[VfioRecord::Config, VfioRecord::EndOfState]);
    let LoadError::DeviceState(error) = main.refused(options(true)) else { panic!("on the main channel") };
    assert_eq!(error, DeviceStateError::OnMain { idstr: device(4) });

    let mut elsewhere = Stream::new();
    elsewhere.stop();
    elsewhere.end();
    elsewhere.full(4, &[VfioRecord::EndOfState]);
    let LoadError::DeviceState(error) = elsewhere.refused(options(false)) else { panic!("nowhere") };
    assert_eq!((error.fault(), error), (Fault::Mismatch, DeviceStateError::NotOnMain { idstr: device(4) }));
}

#[test]
fn a_device_that_has_not_come_as_a_whole_is_refused() {
    let mut open = Stream::new();
    open.stop();
    open.part(SectionKind::End, 4, &[VfioRecord::EndOfState]);
    let error = open.refused(options(false));
    assert!(matches!(&error, LoadError::DeviceIncomplete { idstr, missing: "END" } if *idstr == device(5)), "{error}");

    let mut absent = Stream::new();
    absent.stop();
    absent.end();
    let mut three = options(false);
    three.devices.push(DeviceOptions::new(device(6)));
    let error = absent.refused(three);
    assert!(
        matches!(&error, LoadError::DeviceIncomplete { idstr, missing: "START" } if *idstr == device(6)),
        "{error}"
    );

    // No FULL section says where its configuration belongs.
    let mut placeless = Stream::new();
    placeless.stop();
    placeless.end();
    placeless.full(4, &[VfioRecord::EndOfState]);
    let error = placeless.refused(options(true));
    assert!(matches!(&error, LoadError::DeviceIncomplete { idstr, missing: "FULL" } if *idstr == device(5)), "{error}");

    let mut twice = Stream::new();
    twice.full(4, &[VfioRecord::Config, VfioRecord::EndOfState]);
    twice.full(4, &[VfioRecord::Config, VfioRecord::EndOfState]);
    let error = twice.refused(options(false));
    assert!(matches!(&error, LoadError::SectionAgain { idstr, .. } if *idstr == device(4)), "{error}");
}

/// QEMU's background snapshots have no END: their memory is whole if every page came once.
#[test]
fn memory_without_an_end_is_a_background_snapshot_of_which_every_page_came_once() {
    for (told, pages, whole) in [(true, 2, true), (true, 1, false), (true, 3, false), (false, 2, false)] {
        let mut stream = Stream(StreamWriter::default());
        stream.0.header(None).unwrap();
        let header = SectionHeader { section_id: RAM, idstr: name("ram"), instance_id: 0, version_id: 4 };
        stream.0.section_start(&header).unwrap();
        stream.0.ram_setup([RamBlock::new(name("ram"), 2 * 4096)]).unwrap();
        stream.0.eos().unwrap();
        stream.0.footer().unwrap();
        stream.0.section_part(RAM).unwrap();
        (0..pages).for_each(|page| stream.0.zero_page(BlockId(0), page % 2 * 4096).unwrap());
        stream.0.eos().unwrap();
        stream.0.footer().unwrap();
        let ram = vec!["ram".into()];
        let options = DestinationOptions { ram, background_snapshot: told, ..DestinationOptions::default() };
        match stream.load(options) {
            Ok(_) => assert!(whole, "{told} {pages}"),
            Err(error) => assert!(!whole && error.to_string().contains("without END of section 'ram'"), "{error}"),
        }
    }
}
