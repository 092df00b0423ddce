//! What `qevm check` knows of the subsections that a release reads, next to the `-dump-vmstate` of that release. A
//! release that cannot be installed is skipped by name; `QEVM_REQUIRE_QEMU=1` turns such skips into failures.

use qevm_conformance::corpus::dump_vmstate;
use qevm_conformance::matrix::{REQUIRE_QEMU, required};
use qevm_conformance::roots::{Root, Suite};
use qevm_savevm::check::{Expectations, Outcome, Summary, check};
use qevm_savevm::vmdesc::{Description, Schema};
use qevm_savevm::vmstate::{self, Layout};
use qevm_wire::Limits;
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::Write;

/// The file in which `make test` collects the names of tests that could not run.
const SKIPPED_TESTS: &str = "QEVM_SKIPPED_TESTS";

/// A VMSD, and a subsection of it or of a structure in it.
type Pair = (String, String);

fn collect(model: &vmstate::Description, device: &str, pairs: &mut BTreeSet<Pair>) {
    for subsection in &model.subsections {
        pairs.insert((device.to_owned(), subsection.name.to_string()));
        collect(subsection, device, pairs);
    }
    for field in &model.fields {
        if let Layout::Struct(nested) | Layout::List(nested) = &field.element.layout {
            collect(nested, device, pairs);
        }
    }
}

fn description((vmsd, subsection): &Pair, written: bool) -> Option<Description> {
    let mut device =
        serde_json::json!({ "name": vmsd, "instance_id": 0, "vmsd_name": vmsd, "version": 1, "fields": [] });
    if written {
        device["subsections"] = serde_json::json!([{ "vmsd_name": subsection, "version": 1, "fields": [] }]);
    }
    let text = serde_json::json!({ "page_size": 4096, "devices": [device] }).to_string();
    Some(Description::parse(text.as_bytes(), &Limits::default()).unwrap())
}

#[test]
fn subsections_are_read_as_each_release_dumps_them() {
    let mut releases = Vec::new();
    for suite in Suite::ALL {
        let root = match Root::install(suite) {
            Ok(root) => root,
            Err(why) => {
                assert!(!required(REQUIRE_QEMU), "{why:#}");
                if let Some(path) = std::env::var_os(SKIPPED_TESTS) {
                    let mut list = OpenOptions::new().create(true).append(true).open(path).unwrap();
                    writeln!(list, "qevm-conformance subsections of {}: {why:#}", suite.series()).unwrap();
                }
                continue;
            }
        };
        let dir = tempfile::tempdir().unwrap();
        dump_vmstate(&root, dir.path()).unwrap();
        let text = std::fs::read(dir.path().join(format!("{}-microvm.json", suite.series()))).unwrap();
        let models = Schema::parse(&text, &Limits::default()).unwrap().descriptions();
        let mut pairs = BTreeSet::new();
        models.iter().for_each(|model| collect(model, &model.name, &mut pairs));
        let devices: BTreeSet<String> = models.iter().map(|model| model.name.to_string()).collect();
        releases.push((suite, devices, pairs));
    }
    let all: BTreeSet<&Pair> = releases.iter().flat_map(|(.., pairs)| pairs).collect();
    let mut wrong = Vec::new();
    for (suite, devices, pairs) in &releases {
        for pair in all.iter().filter(|(device, _)| devices.contains(device)) {
            let stream = Summary { description: description(pair, true), ..Summary::default() };
            let qemu = suite.series().parse().unwrap();
            let destination = Expectations {
                qemu: Some(qemu),
                models: qevm_devices::descriptions(&vmstate::Context::new(qemu, "microvm")),
                description: description(pair, false),
                ..Expectations::default()
            };
            let found: Vec<_> = check(&stream, &destination).iter().map(|finding| finding.outcome).collect();
            // The dump does not say that it is read only where it is written, too: trial "foreseen" asks QEMU.
            let both = pair.1 == "ich9_pm/tco" && *suite >= Suite::Trixie;
            let wanted = if pairs.contains(*pair) && !both { Outcome::Loads } else { Outcome::Fails };
            if found != [wanted] {
                wrong.push(format!("{} {pair:?}: {found:?}, expected {wanted:?}", suite.series()));
            }
        }
    }
    assert!(releases.is_empty() || all.len() > 50, "{} subsections", all.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
