//! Static comparison, judged by what real QEMUs accept and refuse.

use crate::tail::{Tail, tails};
use qevm_savevm::devices::descriptions;
use qevm_savevm::vmdesc::{self, DeviceBody, Schema};
use qevm_savevm::vmstate::compare::{Difference, Finding, Severity, Source, compare};
use qevm_savevm::vmstate::{Context, Description};
use qevm_wire::Limits;
use std::io::Read;

const RELEASES: [&str; 4] = ["5.2", "7.2", "10.0", "11.1"];

fn context(release: &str) -> Context {
    Context::new(release.parse().unwrap(), "microvm")
}

fn dump(release: &str) -> Vec<Description> {
    let path = format!("{}/tests/data/dump-vmstate/{release}.json.gz", env!("CARGO_MANIFEST_DIR"));
    let mut text = Vec::new();
    flate2::read::GzDecoder::new(std::fs::File::open(path).unwrap()).read_to_end(&mut text).unwrap();
    Schema::parse(&text, &Limits::default()).unwrap().descriptions()
}

fn devices(tail: &Tail) -> Vec<Description> {
    let parsed = vmdesc::Description::parse(&tail.description, &Limits::default()).unwrap();
    let structures = parsed.devices.into_iter().filter_map(|device| match device.body {
        DeviceBody::Struct(structure) => Some(Description::from_stream(&structure)),
        DeviceBody::OldStyle { .. } => None,
    });
    structures.collect()
}

fn severe(findings: &[Finding]) -> Vec<String> {
    findings.iter().filter(|f| f.severity != Severity::Fine).map(ToString::to_string).collect()
}

/// Every microvm stream loads into its own release and into every newer one.
#[test]
fn streams_suit_their_own_and_newer_releases() {
    for tail in tails() {
        for release in RELEASES {
            let ctx = context(release);
            if ctx.profile.qemu < tail.ctx.profile.qemu {
                continue;
            }
            for device in devices(&tail) {
                let findings = compare(&device, Source::Stream, &descriptions(&ctx));
                let fails: Vec<_> = findings.iter().filter(|f| f.severity == Severity::Fails).collect();
                // globalstate's 100-byte name became 32 bytes and further fields; both are 104 bytes in all.
                if device.name != "globalstate" {
                    assert!(fails.is_empty(), "{} to {release}: {fails:?}", tail.name);
                }
                if release == tail.ctx.profile.qemu.to_string() {
                    assert_eq!(severe(&findings), [""; 0], "{} to {release}", tail.name);
                }
            }
        }
    }
}

/// QEMU's own dumps tell the same as our declarations, in both directions.
#[test]
fn declarations_agree_with_qemus_own_schema() {
    for release in RELEASES {
        let (ours, dump) = (descriptions(&context(release)), dump(release));
        let mut compared = 0;
        for device in &dump {
            let Some(declared) = ours.iter().find(|d| d.name == device.name) else {
                panic!("{release}: {} is not declared", device.name);
            };
            assert_eq!((declared.version, declared.minimum_version), (device.version, device.minimum_version));
            for findings in [
                compare(declared, Source::Schema, std::slice::from_ref(device)),
                compare(device, Source::Schema, std::slice::from_ref(declared)),
            ] {
                let fails: Vec<_> = findings.iter().filter(|f| f.severity == Severity::Fails).collect();
                let renamed = device.name == "acpi-ged"; // ghes_addr_le and hw_error_le
                assert!(fails.is_empty() || renamed, "{release} {}: {fails:?}", device.name);
            }
            let names = |d: &Description| d.subsections.iter().map(|s| s.name.clone()).collect::<Vec<_>>();
            assert_eq!(names(declared), names(device), "{release} {}", device.name);
            compared += 1;
        }
        assert_eq!(compared, 13);
    }
}

#[test]
fn streams_suit_the_schema_of_the_qemu_that_wrote_them() {
    for tail in tails() {
        let schema = dump(&tail.ctx.profile.qemu.to_string());
        for device in devices(&tail).iter().filter(|device| schema.iter().any(|s| s.name == device.name)) {
            let findings = compare(device, Source::Stream, &schema);
            let fails: Vec<_> = findings.iter().filter(|f| f.severity == Severity::Fails).collect();
            assert!(fails.is_empty(), "{}: {fails:?}", tail.name);
        }
    }
}

/// A stream of a newer release may hold a subsection that an older one refuses.
#[test]
fn a_subsection_of_a_newer_release_fails() {
    let newer = tails().into_iter().find(|tail| tail.name == "7.2-tcg-msr").unwrap();
    let cpu = devices(&newer).into_iter().find(|device| device.name == "cpu").unwrap();
    let findings = compare(&cpu, Source::Stream, &descriptions(&context("5.2")));
    let [finding] = &findings[..] else { panic!("{findings:?}") };
    assert_eq!(finding.severity, Severity::Fails);
    assert!(matches!(&finding.difference, Difference::SubsectionUnknown { name } if name == "cpu/pkrs"));
}

#[test]
fn every_difference_is_told_with_both_values() {
    use qevm_savevm::vmstate::{Count, ElementDescription, FieldDescription, Layout};
    let field = |name: &str, type_name: &str, size, count| FieldDescription {
        name: name.into(),
        since: 0,
        conditional: false,
        count,
        element: ElementDescription { type_name: Some(type_name.into()), layout: Layout::Bytes(size) },
    };
    let base = Description {
        name: "toy".into(),
        version: 2,
        minimum_version: 2,
        fields: vec![field("a", "uint32", 4, Count::One), field("b", "uint8", 1, Count::Fixed(4))],
        subsections: vec![],
    };
    let against = |change: &dyn Fn(&mut Description)| {
        let mut source = base.clone();
        change(&mut source);
        let findings = compare(&source, Source::Stream, std::slice::from_ref(&base));
        findings.into_iter().map(|f| (f.path, f.difference, f.severity)).collect::<Vec<_>>()
    };
    let toy = |difference, severity| vec![("toy".to_owned(), difference, severity)];
    assert_eq!(against(&|_| {}), []);
    let newer = Difference::VersionTooNew { source: 3, destination: 2 };
    assert_eq!(against(&|s| s.version = 3), toy(newer, Severity::Fails));
    let older = Difference::VersionTooOld { source: 1, minimum: 2 };
    assert_eq!(against(&|s| s.version = 1), toy(older, Severity::Fails));
    let missing = Difference::FieldMissing { field: "a".into() };
    assert_eq!(against(&|s| drop(s.fields.remove(0))), toy(missing, Severity::Fails));
    let unknown = Difference::FieldUnknown { field: "c".into() };
    assert_eq!(against(&|s| s.fields.push(field("c", "bool", 1, Count::One))), toy(unknown, Severity::Fails));
    let size = Difference::Size { source: 8, destination: 4 };
    let at_a = |difference, severity| vec![("toy › a".to_owned(), difference, severity)];
    assert_eq!(against(&|s| s.fields[0] = field("a", "uint64", 8, Count::One)), at_a(size, Severity::Fails));
    let types = Difference::Type { source: "int32".into(), destination: "uint32".into() };
    assert_eq!(against(&|s| s.fields[0] = field("a", "int32", 4, Count::One)), at_a(types, Severity::Suspicious));
    let length = Difference::Length { source: 5, destination: 4 };
    assert_eq!(
        against(&|s| s.fields[1].count = Count::Fixed(5)),
        vec![("toy › b".to_owned(), length, Severity::Fails)]
    );
    let section = Difference::SectionUnknown { name: "other".into() };
    assert_eq!(against(&|s| s.name = "other".into()), vec![("other".to_owned(), section, Severity::Fails)]);
}
