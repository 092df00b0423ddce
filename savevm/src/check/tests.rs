//! The rows of what real QEMUs refuse and accept (7.2 and 11.1), and what descriptions add.

use super::*;
use crate::command::{Command, PostcopyAdvise};
use crate::configuration::{Configuration, ConfigurationSubsection};
use crate::event::Event;
use crate::framing::{SectionHeader, SectionKind};
use crate::ram::{RamBlock, RamRecord};
use crate::vmdesc::{Description, Node, Scalar, ScalarKind, Schema, Struct, Value};
use crate::vmstate;
use qevm_wire::{CountedString, Limits, QemuVersion};
use std::collections::BTreeMap;

fn name(text: &str) -> CountedString {
    CountedString::new(text).unwrap()
}

fn section(idstr: &str, instance_id: u32, version_id: u32) -> SectionHeader {
    SectionHeader { section_id: 9, idstr: name(idstr), instance_id, version_id }
}

/// A stream of a microvm with these sections besides `timer`.
fn stream(sections: &[SectionHeader]) -> Summary {
    Summary {
        configuration: Some(Configuration::new("microvm")),
        ram: vec![RamBlock::new(name("microvm.ram"), 0x100_0000), RamBlock::new(name("/rom@etc/acpi/tables"), 0x1000)],
        sections: [&[section("timer", 0, 2)], sections].concat(),
        ..Summary::default()
    }
}

fn capabilities<const N: usize>(known: [(&str, bool); N]) -> BTreeMap<String, bool> {
    known.into_iter().map(|(name, on)| (name.to_owned(), on)).collect()
}

fn outcomes(stream: &Summary, destination: impl Into<Expectations>) -> Vec<(String, Outcome)> {
    check(stream, &destination.into()).iter().map(|f| (f.subject.to_string(), f.outcome)).collect()
}

fn one(stream: &Summary, destination: impl Into<Expectations>) -> Finding {
    let mut findings = check(stream, &destination.into());
    assert_eq!(findings.len(), 1, "{findings:?}");
    findings.remove(0)
}

#[test]
fn a_stream_loads_where_it_was_written() {
    let mut stream = stream(&[section("ioapic", 1, 3)]);
    stream.ram[0].address = Some(0);
    stream.postcopy_ram = true;
    assert_eq!(check(&stream, &stream.clone().into()), []);
    // Another destination may have capability postcopy-ram on, too: its own stream does not tell.
    let mut precopy = stream.clone();
    precopy.postcopy_ram = false;
    assert_eq!(check(&stream, &precopy.into()), []);
    assert_eq!(check(&stream, &Expectations::default()), []);
}

#[test]
fn a_section_that_the_destination_lacks_fails_and_one_it_has_more_does_not() {
    let kvm = stream(&[section("kvmclock", 0, 1)]);
    let tcg = stream(&[section("mc146818rtc", 0, 3)]);
    let expected =
        [("section 'kvmclock' 0".to_owned(), Outcome::Fails), ("section 'mc146818rtc' 0".into(), Outcome::Loads)];
    assert_eq!(outcomes(&kvm, tcg.clone()), expected);
    assert!(check(&kvm, &tcg.into())[0].cause.unwrap().contains("KVM"));
    // One with x-migrate=off takes it, and writes as little as one without the device.
    let ramfb = one(&stream(&[section("ramfb-dev", 0, 1)]), stream(&[]));
    assert!(ramfb.outcome == Outcome::MayFail && ramfb.cause.unwrap().contains("x-migrate=off"));
    let smp = one(&stream(&[section("cpu_common", 1, 1)]), stream(&[]));
    assert!(smp.outcome == Outcome::Fails && smp.cause.unwrap().contains("-smp"));
}

#[test]
fn a_newer_version_fails_and_an_older_one_may() {
    let (old, new) = (stream(&[section("x", 0, 1)]), stream(&[section("x", 0, 2)]));
    assert_eq!(one(&new, old.clone()).outcome, Outcome::Fails);
    assert_eq!(one(&old, new).outcome, Outcome::MayFail);
}

#[test]
fn machine_types_are_compared_as_far_as_they_were_sent() {
    let machine = |name: &str| Expectations { machine: Some(name.into()), ..Expectations::default() };
    let of = |name: &str| Summary { configuration: Some(Configuration::new(name)), ..Summary::default() };
    assert_eq!(one(&of("pc-q35-7.2"), machine("pc-i440fx-7.2")).outcome, Outcome::Fails);
    assert_eq!(one(&of("pc-q35-10"), machine("pc-q35-10.0")).outcome, Outcome::Loads);
    assert_eq!(one(&of("pc-q35-10.0"), machine("pc-q35-10")).outcome, Outcome::Fails);
    let none = one(&Summary::default(), machine("microvm"));
    assert_eq!((none.subject, none.outcome), (Subject::Configuration, Outcome::MayFail));
}

#[test]
fn page_size_capabilities_and_uuid_must_agree() {
    let mut found = stream(&[]);
    let shared = ConfigurationSubsection::Capabilities(vec![name("x-ignore-shared")]);
    let uuid = ConfigurationSubsection::Uuid([1; 16]);
    found.configuration.as_mut().unwrap().subsections = vec![shared, ConfigurationSubsection::TargetPageBits(14), uuid];
    let mut destination = Expectations::from(found.clone());
    assert_eq!((destination.page_size, destination.uuid), (Some(16384), Some([1; 16])));
    destination.page_size = Some(4096);
    destination.uuid = Some([2; 16]);
    destination.capabilities = capabilities([("x-ignore-shared", false), ("mapped-ram", true)]);
    let subjects: Vec<_> = outcomes(&found, destination)
        .into_iter()
        .map(|(subject, outcome)| {
            assert_eq!(outcome, Outcome::Fails);
            subject
        })
        .collect();
    assert_eq!(subjects, ["target page size", "capability x-ignore-shared", "capability mapped-ram", "UUID"]);
    // A destination without a UUID of its own, or one that was not told of: nothing to compare.
    assert_eq!(check(&found, &Expectations::default()), []);
}

#[test]
fn commands_ask_for_releases_and_capabilities() {
    let mut found = Summary::default();
    let advise = PostcopyAdvise { page_size_summary: 4096, target_page_size: 4096 };
    for event in [
        Event::Command(Command::PostcopyAdvise(Some(advise))),
        Event::Command(Command::SwitchoverStart),
        Event::Ram(RamRecord::MultifdFlush),
        Event::Configuration(Configuration::new("microvm")),
        Event::Section { kind: SectionKind::Full, header: section("timer", 0, 2) },
        Event::Ram(RamRecord::Block(RamBlock::new(name("microvm.ram"), 0x1000))),
    ] {
        found.event(&event);
    }
    assert_eq!((found.sections.len(), found.ram.len(), found.configuration.is_some()), (1, 1, true));
    let off = capabilities([("postcopy-ram", false), ("multifd", false)]);
    let release = |qemu| Expectations { qemu: Some(qemu), capabilities: off.clone(), ..Expectations::default() };
    let subjects = |qemu| check(&found, &release(qemu)).into_iter().map(|f| f.subject).collect::<Vec<_>>();
    let told = [Subject::Capability("postcopy-ram"), Subject::Capability("multifd")];
    assert_eq!(subjects(QemuVersion::new(7, 2))[0], Subject::Command("SWITCHOVER_START"));
    assert_eq!(subjects(QemuVersion::new(10, 0)), told);
}

#[test]
fn ram_blocks_must_be_there_and_of_the_same_size() {
    let found = stream(&[]);
    let mut local = found.clone();
    local.ram[0].used_length = 0x200_0000;
    local.ram[1].used_length = 0x2000;
    local.ram.push(RamBlock::new(name("0000:00:01.0/vga.vram"), 0x1000));
    let expected = [
        ("RAM block 'microvm.ram'".to_owned(), Outcome::Fails),
        ("RAM block '/rom@etc/acpi/tables'".into(), Outcome::Loads),
        ("RAM block '0000:00:01.0/vga.vram'".into(), Outcome::Loads),
    ];
    assert_eq!(outcomes(&found, local.clone()), expected);
    assert_eq!(outcomes(&local, found)[2].1, Outcome::Fails);
    let text = check(&local, &stream(&[]).into())[0].to_string();
    assert!(text.contains("0x2000000 bytes") && text.contains("0x1000000 bytes") && text.contains("-m"), "{text}");
}

#[test]
fn huge_pages_and_addresses_must_agree_where_they_are_told() {
    let mut found = stream(&[]);
    found.ram[0].page_size = Some(1 << 21);
    found.ram[0].address = Some(0x1000);
    let mut local = stream(&[]);
    local.ram[0].address = Some(0x2000);
    let outcomes: Vec<_> = outcomes(&found, local).into_iter().map(|(_, outcome)| outcome).collect();
    assert_eq!(outcomes, [Outcome::Fails, Outcome::MayFail]);
}

#[test]
fn descriptions_tell_which_fields_and_subsections_differ() {
    let describe = |fields: &str, subsections: &str| {
        let json = format!(
            r#"{{"devices": [{{"name": "x", "instance_id": 0, "vmsd_name": "x", "version": 1, "fields": [{fields}],
                "subsections": [{subsections}]}}]}}"#
        );
        let description = Some(Description::parse(json.as_bytes(), &Limits::default()).unwrap());
        Summary { description, ..Summary::default() }
    };
    let field = |name: &str, size: u32| format!(r#"{{"name": "{name}", "type": "buffer", "size": {size}}}"#);
    let sub = |version: u32| format!(r#"{{"vmsd_name": "x/s", "version": {version}, "fields": []}}"#);
    let (a, b) = (field("a", 1), field("b", 4));
    let both = format!("{a}, {b}");

    let more = one(&describe(&both, ""), describe(&a, ""));
    assert_eq!((more.outcome, more.expected.as_str()), (Outcome::MayFail, "no more fields"));
    assert!(more.found.contains("'b'"));
    assert!(one(&describe(&a, ""), describe(&field("a", 2), "")).expected.contains("2 bytes"));
    assert_eq!(one(&describe(&a, &sub(1)), describe(&a, "")).outcome, Outcome::MayFail);
    assert_eq!(one(&describe(&a, &sub(2)), describe(&a, &sub(1))).outcome, Outcome::Fails);
    assert_eq!(check(&describe(&a, ""), &describe(&a, &sub(1)).into()), []);

    // The same array, as 7.2 (each element numbered) and 11.1 (none numbered) describe it.
    let element = |index: &str| {
        format!(
            r#"{{"name": "e", {index}"type": "struct", "struct": {{"vmsd_name": "e", "version": 1, "fields": [{a}]}}, "size": 1}}"#
        )
    };
    let of_7_2 = describe(&[element(r#""index": 0, "#), element(r#""index": 1, "#)].join(","), "");
    let of_11_1 = describe(&[element(""), element("")].join(","), "");
    assert_eq!(check(&of_7_2, &of_11_1.clone().into()), []);
    let longer = one(&of_7_2, describe(&element(""), ""));
    assert!(longer.found.contains("2 × 1 bytes"), "{longer}");

    // 100 bytes of text, as 5.2 and as 10.0 describe them.
    let renamed = one(&describe(&field("a", 100), ""), describe(&[field("a", 32), field("unused", 68)].join(","), ""));
    assert_eq!(renamed.outcome, Outcome::Loads);

    let old_style = r#"{"devices": [{"name": "x", "instance_id": 0, "size": 3}]}"#;
    let description = Some(Description::parse(old_style.as_bytes(), &Limits::default()).unwrap());
    let finding = one(&Summary { description, ..Summary::default() }, describe(&a, ""));
    assert_eq!(finding.found, "3 bytes without fields");
}

#[test]
fn a_subsection_loads_where_the_destinations_models_have_it() {
    let cpu = |subsections: &str| {
        let json = format!(
            r#"{{"devices": [{{"name": "cpu", "instance_id": 0, "vmsd_name": "cpu", "version": 12, "fields": [],
                "subsections": [{subsections}]}}]}}"#
        );
        let description = Some(Description::parse(json.as_bytes(), &Limits::default()).unwrap());
        Summary { description, ..Summary::default() }
    };
    let sub = |name: &str| cpu(&format!(r#"{{"vmsd_name": "{name}", "version": 1, "fields": []}}"#));
    let model = |subsections| vmstate::Description {
        name: "cpu".into(),
        version: 12,
        minimum_version: 12,
        fields: Vec::new(),
        subsections,
    };
    let models = vec![model(vec![vmstate::Description { name: "cpu/tsc_khz".into(), ..model(Vec::new()) }])];
    let of_7_2 = Expectations { qemu: Some(QemuVersion::new(7, 2)), models, ..cpu("").into() };
    assert_eq!(one(&sub("cpu/tsc_khz"), of_7_2.clone()).outcome, Outcome::Loads);
    assert_eq!(one(&sub("cpu/of_another_release"), of_7_2).outcome, Outcome::MayFail);
    assert_eq!(one(&sub("cpu/tsc_khz"), cpu("")).outcome, Outcome::MayFail);
}

#[test]
fn a_schema_tells_device_models_and_their_versions() {
    let schema = Schema::parse(include_bytes!("../vmdesc/golden/schema.json"), &Limits::default()).unwrap();
    let destination = Expectations { schema: Some(schema), ..Expectations::default() };
    let findings = check(
        &stream(&[
            section("mc146818rtc", 0, 3),
            section("mc146818rtc", 1, 4),
            section("0000:00:01.0/nvme", 0, 1),
            section("0000:00:02.0/pvpanic-pci", 0, 1),
        ]),
        &destination,
    );
    let subjects: Vec<_> = findings.iter().map(|f| (f.subject.to_string(), f.expected.as_str())).collect();
    let rtc = ("section 'mc146818rtc' 1".to_owned(), "versions 1 to 3");
    assert_eq!(subjects, [rtc, ("section '0000:00:01.0/nvme' 0".into(), "no device of this name")]);
}

/// A stream with these numbers in the section of one device.
fn numbers(idstr: &str, numbers: &[(&str, u64)]) -> Summary {
    let member = |&(path, number): &(&'static str, u64)| Node {
        name: path.into(),
        type_name: "uint64".into(),
        offset: 0,
        len: 8,
        value: Value::Scalar(Scalar::new(ScalarKind::U64, number)),
    };
    let members =
        numbers.iter().map(|(path, number)| member(&(Box::leak((*path).to_owned().into_boxed_str()), *number)));
    let value = Value::Struct(Struct { vmsd_name: "device".into(), version: 1, members: members.collect() });
    let fields = Node { name: "device".into(), type_name: "struct".into(), offset: 0, len: 8, value };
    let mut stream = stream(&[section(idstr, 0, 1)]);
    stream.values.note(&section(idstr, 0, 1), &fields);
    stream
}

#[test]
fn features_that_a_guest_has_accepted_decide_nothing_where_the_destination_was_never_driven() {
    let driven = numbers("0000:00:02.0/virtio-blk", &[("virtio.guest_features", 1 << 13 | 1 << 28)]);
    let fresh = numbers("0000:00:02.0/virtio-blk", &[("virtio.guest_features", 1 << 28)]);
    let finding = one(&driven, fresh.clone());
    assert_eq!(finding.outcome, Outcome::MayFail);
    assert_eq!(finding.found, "accepted by the guest: discard");
    assert_eq!(check(&fresh, &driven.clone().into()), []);
    assert_eq!(check(&driven, &driven.clone().into()), []);
}

/// What hooks compare after loading, one number more and one less.
#[test]
fn numbers_that_a_hook_compares_must_be_equal() {
    for (idstr, path) in [
        ("hpet", "num_timers_save"),
        ("0000:00:02.0/e1000e", "subsys"),
        ("0000:00:02.0/virtio-mem-device-early", "tmp.block_size"),
        ("0000:00:02.0/virtio-mem", "virtio.device.addr"),
        ("0000:00:02.0/virtio-gpu", "virtio-gpu.max_outputs"),
    ] {
        for (found, local) in [(4, 3), (3, 4)] {
            let finding = one(&numbers(idstr, &[(path, found)]), numbers(idstr, &[(path, local)]));
            assert_eq!((finding.outcome, finding.expected), (Outcome::Fails, format!("exactly {local}")), "{path}");
        }
        assert_eq!(check(&numbers(idstr, &[(path, 4)]), &numbers(idstr, &[(path, 4)]).into()), [], "{path}");
    }
    let ports = |ports| numbers("0000:00:03.0/virtio-console", &[("virtio.device.nr_active_ports", ports)]);
    assert_eq!(one(&ports(1), ports(0)).outcome, Outcome::Fails);
    assert_eq!(check(&ports(0), &ports(1).into()), []);
}

#[test]
fn both_sides_have_footers_or_none() {
    let with = |footers| Summary { footers, ..stream(&[]) };
    assert_eq!(one(&with(Some(true)), with(Some(false))).subject, Subject::Footers);
    assert_eq!(one(&with(Some(false)), with(Some(true))).outcome, Outcome::Fails);
    for (a, b) in [(Some(true), Some(true)), (None, Some(true)), (Some(false), None)] {
        assert_eq!(check(&with(a), &with(b).into()), []);
    }
}
