//! What a release refuses, and when, that another takes: asked of it, and of a reference-vmm that was told of it.

use super::{Both, Monitor, reply};
use crate::launch::Qemu;
use crate::peer::endpoint::start_reference;
use crate::roots::{Root, Suite};
use anyhow::{Result, ensure};
use serde_json::json;
use std::path::Path;

/// Page channels with postcopy: one after the other, and together.
const ASKED: &[(&str, &str)] = &[
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"multifd","state":true}]}"#),
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"postcopy-ram","state":true}]}"#),
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"multifd","state":false}]}"#),
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"postcopy-ram","state":true}]}"#),
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"multifd","state":true}]}"#),
    ("migrate-set-capabilities", r#"{"capabilities":[{"capability":"postcopy-ram","state":false}]}"#),
    (
        "migrate-set-capabilities",
        r#"{"capabilities":[{"capability":"multifd","state":true},{"capability":"postcopy-ram","state":true}]}"#,
    ),
];

/// Asks both in each role, and gives what they answered differently, and how many replies were compared.
///
/// # Errors
/// One of them does not start, dies, or does not answer; a guest may go to a destination that would not get over it.
pub fn compare(root: &Root, program: &Monitor, scratch: &Path) -> Result<(Vec<String>, usize)> {
    let (mut differences, mut replies) = (Vec::new(), 0);
    let release = root.suite().series();
    for (role, more) in [("source", &["-S"][..]), ("destination", &["--incoming", "defer"])] {
        let words = |machine: &str| more.iter().copied().chain(["-M", machine]).map(String::from).collect::<Vec<_>>();
        let ours = words(&format!("microvm,qemu={release}"));
        let ours = start_reference(program, &format!("{release}-{role}-ours"), &ours, scratch)?;
        let qemu = Qemu::start(root, &format!("{release}-{role}-qemu"), &words("microvm,accel=tcg"), scratch)?;
        let mut both = Both { qemu, ours, differences: Vec::new() };
        replies += both.ask_all(ASKED, scratch)?;
        differences.extend(both.differences.drain(..).map(|difference| format!("{release}, {role}: {difference}")));
        if role == "source" {
            let reply = reply(&mut both.ours, "migrate", json!({ "uri": "unix:/nonexistent/nobody" }))?;
            let refused = reply.to_string().contains("'postcopy-ram' and 'multifd' together need QEMU 10.1 or later");
            let takes_both = [Suite::Bullseye, Suite::Bookworm].contains(&root.suite());
            ensure!(refused == takes_both, "{release}: migrate is answered with {reply}");
        }
        both.qemu.quit();
        both.ours.quit();
    }
    Ok((differences, replies))
}
