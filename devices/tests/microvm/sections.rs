//! Declared sections against real ones: what QEMU 5.2, 7.2, 10.0 and 11.1 wrote for `-M microvm`.

use crate::tail::{Tail, tails};
use qevm_devices::DeviceState;
use qevm_savevm::Reader;
use qevm_savevm::vmdesc::{Description, DeviceBody, DeviceDescription, TextStyle};
use qevm_savevm::vmstate::LoadStep;
use qevm_wire::{Limits, QemuVersion};
use std::collections::BTreeSet;

/// Sections of old-style handlers, which have no VMSD to declare.
const OLD_STYLE: [&str; 1] = ["slirp"];

#[test]
fn every_section_decodes_and_encodes_to_the_same_bytes_and_description() {
    let mut sections = 0;
    for Tail { name, ctx, sections: list, .. } in tails() {
        for section in list {
            let at = format!("{name}: section {} instance {}", section.idstr, section.instance_id);
            if OLD_STYLE.contains(&&*section.idstr) {
                continue;
            }
            let state = DeviceState::decode(&section.idstr, section.version, &section.payload, &ctx)
                .unwrap_or_else(|| panic!("{at} is not declared"))
                .unwrap_or_else(|error| panic!("{at}: {error}"));
            let (bytes, described) = state.encode_described(section.version, &ctx).unwrap();
            assert_eq!(bytes, section.payload, "{at}");
            assert_eq!(state.version(&ctx), section.version, "{at}");
            let (name, body) = (section.idstr.clone(), DeviceBody::Struct(described));
            let device = DeviceDescription { name, instance_id: section.instance_id, body };
            let mut description = Description::default();
            description.devices.push(device);
            for style in [TextStyle::Compact, TextStyle::Spaced] {
                let text = description.to_json(style);
                let ours: serde_json::Value = serde_json::from_str(&text).unwrap();
                assert_eq!(ours["devices"][0], section.description, "{at}");
            }
            sections += 1;
        }
    }
    assert!(sections >= 350, "only {sections} sections were checked");
}

/// A destination that shows little more of the stream than it is asked for loads a section of each kind, and nothing
/// after it.
#[test]
fn sections_load_while_they_arrive() {
    let mut seen = BTreeSet::new();
    for Tail { name, ctx, sections: list, .. } in tails() {
        for section in list.into_iter().filter(|section| !OLD_STYLE.contains(&&*section.idstr)) {
            if !seen.insert((section.idstr.clone(), section.version, section.payload.len())) {
                continue;
            }
            let at = format!("{name}: section {} instance {}", section.idstr, section.instance_id);
            let step = |input: &[u8]| DeviceState::load_step(&section.idstr, section.version, input, &ctx).unwrap();
            // A footer follows, or another section.
            let stream = [&section.payload[..], &[0x7e]].concat();
            let (mut shown, mut asked) = (0, 0);
            let (consumed, loaded) = loop {
                match step(&stream[..shown]).unwrap_or_else(|error| panic!("{at}: {error}")) {
                    LoadStep::Loaded { consumed, state } => break (consumed, state),
                    LoadStep::NeedMore { at_least } => {
                        assert!((shown + 1..=stream.len()).contains(&at_least), "{at}: {at_least} after {shown}");
                        shown = at_least.max(shown + stream.len() / 50).min(stream.len());
                        asked += 1;
                    }
                }
            };
            assert_eq!((consumed, shown), (section.payload.len(), stream.len()), "{at}");
            let whole = DeviceState::load(&section.idstr, section.version, &mut Reader::new(&section.payload), &ctx);
            assert_eq!(Some(Ok(loaded)), whole, "{at}");
            assert!(asked > 1, "{at}");
        }
    }
    assert!(seen.len() >= 20, "only {} sections were checked", seen.len());
}

/// A description that was parsed is written as QEMU wrote it, white space included.
#[test]
fn descriptions_are_written_as_qemu_writes_them() {
    for Tail { name, ctx, description, .. } in tails() {
        let style = if ctx.profile.qemu < QemuVersion::new(6, 0) { TextStyle::Spaced } else { TextStyle::Compact };
        let parsed = Description::parse(&description, &Limits::default()).unwrap();
        assert_eq!(parsed.to_json(style), String::from_utf8(description).unwrap(), "{name}");
    }
}

/// The hooks and `needed` tests of a source change nothing in a state that a source has just prepared.
#[test]
fn saving_what_qemu_saved_changes_nothing() {
    for Tail { name, ctx, sections, .. } in tails() {
        for section in sections {
            let Some(state) = DeviceState::decode(&section.idstr, section.version, &section.payload, &ctx) else {
                continue;
            };
            let mut state = state.unwrap();
            state.prepare(&ctx).unwrap();
            let bytes = state.encode(section.version, &ctx).unwrap();
            assert_eq!(bytes, section.payload, "{name}: section {} instance {}", section.idstr, section.instance_id);
        }
    }
}

#[test]
fn a_destination_loads_every_section() {
    for Tail { name, ctx, sections, .. } in tails() {
        for section in sections {
            let mut reader = qevm_savevm::Reader::new(&section.payload);
            let loaded = DeviceState::load(&section.idstr, section.version, &mut reader, &ctx);
            if let Some(loaded) = loaded {
                loaded.unwrap_or_else(|error| panic!("{name}: {}: {error}", section.idstr));
                assert!(reader.is_empty(), "{name}: {} leaves bytes over", section.idstr);
            }
        }
    }
}

/// A read that the firmware issued and the disk did not answer travels as an element with its buffers.
#[test]
fn requests_in_flight_are_typed() {
    let mut found = Vec::new();
    for Tail { name, ctx, sections, .. } in tails() {
        for section in sections {
            let state = DeviceState::decode(&section.idstr, section.version, &section.payload, &ctx);
            let Some(Ok(DeviceState::VirtioBlk(device))) = state else { continue };
            for request in device.virtio.device.requests.iter() {
                let element = &request.element;
                // A virtio-blk read: the device reads a header of 16 bytes, and writes the data and a status byte.
                assert_eq!((element.out_num.0, element.in_num.0), (1, 2), "{name}");
                assert_eq!((element.out_sg[0].len.0, element.in_sg[1].len.0), (16, 1), "{name}");
                assert_eq!(element.in_sg[0].len.0 % 512, 0, "{name}");
                found.push((name.clone(), request.queue));
            }
        }
    }
    found.sort();
    let of = |name: &str, queue| (name.to_owned(), queue);
    assert_eq!(
        found,
        [
            of("10.0-tcg-inflight", None),
            of("10.0-tcg-inflight-mq", Some(0)),
            of("11.1-tcg-inflight", None),
            of("11.1-tcg-inflight-mq", Some(0)),
        ]
    );
}
