//! Static comparison, judged by what real QEMUs accept and refuse.

use crate::tail::{Tail, tails};
use qevm_devices::descriptions;
use qevm_savevm::check::{Expectations, Outcome, Summary, check};
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

/// What a check knows of a release by the declarations: the subsections that a section of its may have.
#[test]
fn a_check_loads_the_subsections_that_a_release_declares() {
    let cpu = |subsections: &str| {
        let json = format!(
            r#"{{"devices": [{{"name": "cpu", "instance_id": 0, "vmsd_name": "cpu", "version": 12, "fields": [],
                "subsections": [{subsections}]}}]}}"#
        );
        let description = Some(vmdesc::Description::parse(json.as_bytes(), &Limits::default()).unwrap());
        Summary { description, ..Summary::default() }
    };
    let sub = |name: &str| cpu(&format!(r#"{{"vmsd_name": "{name}", "version": 1, "fields": []}}"#));
    let outcome = |name: &str, models| {
        let destination = Expectations { models, ..cpu("").into() };
        check(&sub(name), &destination).iter().map(|finding| finding.outcome).collect::<Vec<_>>()
    };
    assert_eq!(outcome("cpu/tsc_khz", descriptions(&context("7.2"))), [Outcome::Loads]);
    assert_eq!(outcome("cpu/of_another_release", descriptions(&context("7.2"))), [Outcome::MayFail]);
    assert_eq!(outcome("cpu/tsc_khz", Vec::new()), [Outcome::MayFail]);
}
