//! Guests that go before their memory in the lab: rows of the table of `qevm-conformance peer`, played by the program
//! itself.

use crate::cpio::Archive;
use crate::roots::{ROOT_STAMP, Root};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs;

/// The program in the lab's machine.
pub(super) const PROGRAM: &str = "qevm-conformance";
/// Where it looks for its QEMUs there.
const CACHE: &str = "cache";

/// A job, and the row that it plays: of each kind one in each direction, and a ring.
const ROWS: [(&str, &str); 10] = [
    ("peer-postcopy-out", "ref>11.1/postcopy/tcp/at-once"),
    ("peer-postcopy-in", "11.1>ref/postcopy/unix/after-pass"),
    ("peer-preempt-out", "ref>11.1/postcopy/unix/preempt"),
    ("peer-preempt-in", "11.1>ref/postcopy/tcp/preempt"),
    ("peer-recovery-out", "ref>11.1/recovery/1"),
    ("peer-recovery-in", "11.1>ref/recovery/1"),
    ("peer-multifd-out", "ref>11.1/postcopy/multifd/at-once"),
    ("peer-multifd-in", "11.1>ref/postcopy/multifd/at-once"),
    ("peer-recovery-ours", "ref>ref/recovery/1"),
    ("peer-ring", "ring/postcopy/short"),
];

/// The name of each job, and its command.
pub(super) fn commands() -> impl Iterator<Item = (&'static str, String)> {
    ROWS.into_iter().map(|(job, row)| {
        let play = format!("/{PROGRAM} peer --only '{row}' --gently --json");
        (job, format!("QEVM_CACHE=/{CACHE} QEVM_REQUIRE_KVM=1 QEVM_REQUIRE_QEMU=1 {play}"))
    })
}

/// Adds the QEMU in `folder` of the archive as the root that it was taken from.
pub(super) fn add_root(archive: &mut Archive, folder: &str, root: &Root) -> Result<()> {
    let stamp = root.dir().join(ROOT_STAMP);
    let stamp = fs::read(&stamp).with_context(|| format!("reading {}", stamp.display()))?;
    let there = format!("{CACHE}/qemu/{}", root.suite());
    for path in [CACHE, &format!("{CACHE}/qemu"), &there] {
        archive.folder(path);
    }
    for path in ["usr", "usr/bin", "usr/lib", "usr/share"] {
        archive.folder(&format!("{there}/{path}"));
    }
    archive.file(&format!("{there}/{ROOT_STAMP}"), &stamp);
    archive.link(&format!("{there}/usr/bin/qemu-system-x86_64"), &format!("/{folder}/qemu"));
    for path in ["usr/lib/x86_64-linux-gnu", "usr/share/qemu"] {
        archive.link(&format!("{there}/{path}"), &format!("/{folder}"));
    }
    Ok(())
}

/// The row held, and its guest has checked pages after it had arrived.
pub(super) fn judge(said: &str) -> Result<Value> {
    let line = said.lines().rev().find(|line| line.trim_start().starts_with('{')).context("it printed no summary")?;
    let summary: Value = serde_json::from_str(line.trim()).with_context(|| format!("the summary {line}"))?;
    ensure!(summary["held"] == 1 && summary["rows"] == 1 && summary["ok"] == true, "{summary}");
    ensure!(summary["hops"].as_u64() > Some(0) && summary["pages"].as_u64() > Some(0), "{summary}");
    Ok(json!({ "hops": summary["hops"], "cuts": summary["cuts"], "pages": summary["pages"], "stale_pages": 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::table;

    #[test]
    fn each_job_plays_one_row() {
        let names: Vec<_> = table::all().iter().map(|case| case.journey().name.clone()).collect();
        for (job, row) in ROWS {
            assert_eq!(names.iter().filter(|name| name.contains(row)).count(), 1, "{job}");
        }
    }

    #[test]
    fn a_row_that_failed_or_was_not_played_does_not_hold() {
        const GOOD: &str = r#"{"cuts":1,"failed":0,"held":1,"hops":1,"ok":true,"pages":9,"rows":1,"skipped":0}"#;
        assert_eq!(judge(&format!("ok  a\n{GOOD}\n")).unwrap()["cuts"], 1);
        for (good, bad) in
            [("\"held\":1", "\"held\":0"), ("true", "false"), ("hops\":1", "hops\":0"), ("\"rows\":1", "\"rows\":2")]
        {
            assert!(GOOD.contains(good) && judge(&GOOD.replace(good, bad)).is_err(), "{bad}");
        }
        assert!(judge("ok  a\n").is_err());
    }
}
