//! What the guest's clocks do while it does not run, by QEMU and by reference-vmm, and the page that tells it. What
//! this machine lacks is skipped by name; `QEVM_REQUIRE_QEMU=1` and `QEVM_REQUIRE_KVM=1` turn such skips into failures.

use qevm_conformance::matrix::{REQUIRE_KVM, REQUIRE_QEMU, kvm, required};
use qevm_conformance::outcome::list_skips;
use qevm_conformance::peer::Monitor;
use qevm_conformance::peer::clock::{Case, Cause, Clocks, cases, measure, page};
use qevm_conformance::roots::{Root, Suite};
use qevm_conformance::subject::Subject;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

/// Writes the page instead of comparing it.
const WRITE_PAGES: &str = "QEVM_WRITE_PAGES";
/// Cases at a time: they wait most of the time.
const AT_ONCE: usize = 6;

fn skipped(variable: &str, why: &str) {
    assert!(!required(variable), "{variable}=1, but {why}");
    list_skips("clock", [("the_clocks_are_what_the_page_says", why)]).unwrap();
}

#[test]
fn the_clocks_are_what_the_page_says() {
    if let Err(why) = kvm() {
        return skipped(REQUIRE_KVM, &why);
    }
    let mut roots = BTreeMap::new();
    for suite in [Suite::Trixie, Suite::Sid] {
        match Root::install(suite) {
            Ok(root) => drop(roots.insert(suite, root)),
            Err(why) => return skipped(REQUIRE_QEMU, &format!("{why:#}")),
        }
    }
    let judge = PathBuf::from(env!("CARGO_BIN_EXE_qevm-conformance"));
    let (program, subject) = (Monitor::new(judge.clone()), Subject::new(judge));
    let play = |case: &Case| {
        let played = measure(*case, &roots, &program, &subject);
        played.unwrap_or_else(|error| panic!("{}, {}: {error:#}", case.cause, case.way()))
    };
    let cases = cases();
    let mut rows: Vec<(Case, Clocks)> = Vec::new();
    for some in cases.chunks(AT_ONCE) {
        let clocks: Vec<Clocks> = thread::scope(|scope| {
            let playing: Vec<_> = some.iter().map(|case| scope.spawn(move || play(case))).collect();
            playing.into_iter().map(|playing| playing.join().expect("it has told why")).collect()
        });
        rows.extend(some.iter().copied().zip(clocks));
    }

    for (case, clocks) in &rows {
        eprintln!("{}, {}: time stamp counter {}", case.cause, case.way(), clocks.tsc);
    }
    // Every way is as between two QEMUs of 11.1.
    for cause in [Cause::Pause, Cause::Restore, Cause::Migration] {
        let mut alike = rows.iter().filter(|(case, _)| case.cause == cause);
        let (_, wanted) = alike.clone().find(|(case, _)| case.way().ends_with("QEMU 11.1")).expect("a case of 11.1");
        assert!(alike.all(|(_, clocks)| clocks == wanted), "{cause}: {rows:?}");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/guest-clock.md");
    if std::env::var_os(WRITE_PAGES).is_some() {
        fs::write(&path, page(&rows)).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == page(&rows),
        "{} is not what was found: {WRITE_PAGES}=1 writes it\n{}",
        path.display(),
        page(&rows)
    );
}
