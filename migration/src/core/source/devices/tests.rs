//! What a source sends of an iterative device, and in which order: as QEMU 10.0 and 11.1 do.

use super::super::phase::Phase;
use super::super::*;
use super::Completion;
use crate::core::DeviceOptions;
use crate::pending::DeviceSize;
use crate::{Capabilities, DeviceSection, SavedDevices};
use qevm_returnpath::Message;
use qevm_savevm::command::Command;
use qevm_savevm::vfio::VfioRecord;
use qevm_savevm::{Decoder, DecoderOptions, Event};
use qevm_wire::{Driver, Profile, QemuVersion};

const CONFIG: &[u8] = b"the configuration";
const DEVICE: u32 = 2;

/// A device in a script: what is left of its initial data and of the rest, while the guest runs and then.
struct Device {
    initial: u64,
    dirty: u64,
    stopcopy: u64,
}

/// Runs a migration of a page of RAM and a device, which is transferred or not, with this flow of acks.
fn run(release: QemuVersion, device: Device, transfer: bool) -> (Vec<u8>, Vec<Vec<u8>>, SourceCore) {
    let Outcome { stream, transfers, core, result, .. } = drive(release, device, transfer, true);
    result.unwrap();
    (stream, transfers, core)
}

/// What became of a migration.
struct Outcome {
    stream: Vec<u8>,
    transfers: Vec<Vec<u8>>,
    core: SourceCore,
    result: Result<(), MigrationError>,
    /// From the destination's answer that it has all initial data to the end.
    since_answer: Duration,
}

/// The same with a destination that agrees to the switchover or, though it has loaded the initial data, does not.
fn drive(release: QemuVersion, mut device: Device, transfer: bool, agrees: bool) -> Outcome {
    let idstr = CountedString::new("0000:00:04.0/vfio").unwrap();
    let capabilities = Capabilities::default().with([("return-path", true), ("switchover-ack", true)]).unwrap();
    let profile = Profile::new(release, "microvm");
    let flow = profile.switchover_ack;
    let options = SourceOptions {
        profile,
        capabilities,
        machine_type: "microvm".into(),
        uuid: None,
        blocks: vec![("microvm.ram".into(), 4096)],
        host_page_sizes: Vec::new(),
        shared: Vec::new(),
        devices: vec![DeviceOptions { switchover_ack: true, transfer, ..DeviceOptions::new(idstr.clone()) }],
        route: PageRoute::Main,
        reader: Reader::Answers,
        patience: None,
    };
    let mut core = SourceCore::new(options, Parameters { max_bandwidth: 0, ..Parameters::default() });
    let mut answers = Answers::new(flow, true);
    let (mut stream, mut transfers, mut now, mut stopped) = (Vec::new(), Vec::new(), Duration::ZERO, false);
    let mut answered = Duration::ZERO;
    for _ in 0..10_000 {
        now += Duration::from_millis(1);
        match core.poll(now, Some(&mut answers)) {
            Action::End(result) => {
                let since_answer = now - answered;
                return Outcome { stream, transfers, core, result, since_answer };
            }
            Action::Resume => core.resumed(Ok(())),
            Action::ReadLog => core.found(0, 0, 0),
            Action::Send { .. } | Action::SendEnd => {
                let bytes = core.stream().take();
                core.sent(Sent { bytes: bytes.len() as u64, ..Sent::default() });
                for value in [1, crate::handover::ANNOUNCE] {
                    let ping = [&[8, 0, 2, 0, 4], &value.to_be_bytes()[..]].concat();
                    if bytes.windows(9).any(|window| window == ping) {
                        let agreed = if value == 1 { 1 } else { crate::handover::AGREED };
                        answers.message(Message::Pong { value: agreed }, 0);
                    }
                }
                // What answers INIT_DATA_SENT, and the PING after it.
                if bytes.windows(8).any(|window| window == 0xffff_ffff_ef10_0005_u64.to_be_bytes()) {
                    if agrees {
                        answers.message(Message::SwitchoverAck, 0);
                    }
                    answers.message(Message::Pong { value: crate::handover::INITIAL_DATA }, 0);
                    answered = now;
                }
                let is_end = matches!(core.phase(), Phase::Ending);
                stream.extend(bytes);
                if is_end {
                    core.end_sent(Ok(()), now);
                    answers.message(Message::Shut { status: 0 }, 0);
                }
            }
            // They do not matter here.
            Action::Pages(_) => stream.extend(core.stream().take()),
            Action::AskDevices { exact } => {
                let Device { initial, dirty, stopcopy } = device;
                let estimate = crate::Pending { precopy: initial + dirty, stopcopy: 0 };
                let exact = exact.then_some(crate::Pending { stopcopy, ..estimate });
                core.device_sizes(vec![DeviceSize { estimate, initial, exact }]);
            }
            Action::ReadDevice { limit, .. } => {
                let left = if stopped { device.stopcopy } else { device.initial + device.dirty };
                let count = left.min(limit as u64);
                let state = vec![7; count as usize];
                if stopped {
                    device.stopcopy -= count;
                } else {
                    let first = count.min(device.initial);
                    device.initial -= first;
                    device.dirty -= count - first;
                }
                core.device_state(&state).unwrap();
            }
            Action::Pause => {
                stopped = true;
                core.paused(true);
            }
            Action::SaveDevices { .. } => {
                let section =
                    DeviceSection { idstr: idstr.clone(), instance_id: 0, version_id: 1, body: CONFIG.into() };
                core.devices_saved(SavedDevices::opaque(vec![section]));
            }
            Action::TransferDevices(configurations) => {
                transfers.extend(configurations.into_iter().map(|(_, configuration)| configuration));
            }
            Action::Commit => core.committed(Ok(())),
            Action::Confirm(_) => {
                core.confirmed(Ok(()));
                answers.end(Ok(()));
            }
            Action::MeasureBacklog { .. } => core.backlog(0),
            Action::Settle => core.settled(Ok(())),
            _ => {}
        }
    }
    panic!("it does not end: {core:?}");
}

/// What the stream says of the device: sections, records with their lengths, and where the source switches over.
fn device(stream: &[u8]) -> Vec<String> {
    let mut stream = Driver::new(stream, Decoder::new(DecoderOptions::default()));
    let (mut told, mut open) = (Vec::new(), false);
    while let Some(event) = stream.next().unwrap() {
        match event {
            Event::Section { kind, header } => {
                open = header.section_id == DEVICE;
                if open {
                    told.push(format!("{kind:?} {} {}", header.idstr, header.version_id));
                }
            }
            Event::SectionPart { kind, section_id } => {
                open = section_id == DEVICE;
                if open {
                    told.push(format!("{kind:?}"));
                }
            }
            Event::Vfio(VfioRecord::Data { len }) => told.push(format!("data {len}")),
            Event::Vfio(record) => told.push(format!("{record:?}")),
            Event::Body(body) if open => told.push(String::from_utf8_lossy(body).into()),
            Event::Command(Command::SwitchoverStart) => told.push("switchover".into()),
            _ => {}
        }
    }
    told
}

const START: [&str; 3] = ["Start 0000:00:04.0/vfio 1", "Setup", "EndOfState"];
const FULL: &str = "Full 0000:00:04.0/vfio 1";

#[test]
fn the_records_of_a_device_come_in_the_order_of_qemu() {
    for release in [QemuVersion::new(10, 0), QemuVersion::NEWEST] {
        let sizes = Device { initial: 1_500_000, dirty: 10, stopcopy: 3 };
        let (stream, transfers, _) = run(release, sizes, false);
        let mut expected = START.to_vec();
        // INIT_DATA_SENT ends the PART with the last of the initial data, in place of END_OF_STATE.
        expected.extend(["Part", "data 1048576", "EndOfState", "Part", "data 451434", "InitDataSent"]);
        expected.extend(["switchover", "End", "data 3", "EndOfState"]);
        expected.extend([FULL, "Config", "the configuration", "EndOfState"]);
        assert_eq!(device(&stream), expected, "{release}");
        assert!(transfers.is_empty());
    }
}

#[test]
fn what_is_transferred_leaves_empty_sections() {
    let sizes = Device { initial: 5, dirty: 0, stopcopy: 3 };
    let (stream, transfers, _) = run(QemuVersion::NEWEST, sizes, true);
    let mut expected = START.to_vec();
    expected.extend(["Part", "data 5", "InitDataSent", "switchover", "End", "EndOfState", FULL, "EndOfState"]);
    assert_eq!(device(&stream), expected);
    let (front, end) = (0xffff_ffff_ef10_0002_u64.to_be_bytes(), 0xffff_ffff_ef10_0001_u64.to_be_bytes());
    assert_eq!(transfers, [[&front[..], CONFIG, &end].concat()]);
}

#[test]
fn a_device_without_initial_data_says_so_at_its_first_turn() {
    let (stream, _, core) = run(QemuVersion::NEWEST, Device { initial: 0, dirty: 0, stopcopy: 0 }, false);
    let told = device(&stream);
    assert_eq!(told[3..6], ["Part", "InitDataSent", "switchover"]);
    assert_eq!(core.initial.devices, [Completion::Sent]);
}

/// As a source towards a QEMU 10.0, which acks once for two devices, where it takes it for an 11.1.
#[test]
fn a_destination_that_has_everything_and_does_not_agree_is_an_error_within_a_second() {
    for (release, flow) in [(QemuVersion::new(10, 0), "as QEMU 10.0 does"), (QemuVersion::NEWEST, "as QEMU 11.1 does")]
    {
        let Outcome { result, since_answer, .. } =
            drive(release, Device { initial: 9, dirty: 0, stopcopy: 3 }, false, false);
        let error = result.unwrap_err();
        assert!(matches!(error, MigrationError::SwitchoverAcks { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("0 of 1 switchover acks came") && text.contains(flow), "{text}");
        assert!(since_answer <= Duration::from_secs(1), "{since_answer:?}");
    }
}

#[test]
fn a_device_that_sends_its_state_elsewhere_and_has_no_configuration_is_an_error_of_the_guest() {
    let idstr = CountedString::new("0000:00:04.0/vfio").unwrap();
    let mut core = SourceCore::new(
        SourceOptions {
            profile: Profile::new(QemuVersion::NEWEST, "microvm"),
            capabilities: Capabilities::default(),
            machine_type: "microvm".into(),
            uuid: None,
            blocks: Vec::new(),
            host_page_sizes: Vec::new(),
            shared: Vec::new(),
            devices: vec![DeviceOptions { transfer: true, ..DeviceOptions::new(idstr) }],
            route: PageRoute::Channels,
            reader: Reader::Nobody,
            patience: None,
        },
        Parameters::default(),
    );
    let error = core.begin_transfers(&[]).unwrap_err();
    assert!(matches!(error, MigrationError::Guest { .. }), "{error}");
    assert!(error.to_string().contains("no section '0000:00:04.0/vfio' was saved"), "{error}");
}
