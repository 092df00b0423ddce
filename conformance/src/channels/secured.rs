//! `qevm receive` and `qevm send` over TLS: the certificates, and the rows in which one end must refuse the other.

use super::credentials::{SOURCE, arm, issue, receiving, sending};
use super::live::{Live, arguments, seen};
use super::receiver::Receiver;
use super::setup::{Setup, Transport};
use super::source::Flavor;
use super::table::Case;
use crate::launch::Qemu;
use crate::patience::PATIENCE;
use crate::peer::secured::{FLAWS, Flaw, Version};
use crate::roots::{Root, Suite};
use crate::subject::Subject;
use anyhow::{Context, Result, bail, ensure};
use reference_vmm::payload::IMAGE;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// Seconds that `qevm receive` waits for another source.
const TOLD: &str = "5";
const SLOW: u64 = 24 << 20;

/// Guests that go over TLS, and ends that must not trust each other.
pub(super) fn rows() -> Vec<(Flavor, String, Case)> {
    let mut rows = Vec::new();
    for suite in [Suite::Bookworm, Suite::Trixie, Suite::Sid] {
        let flavor = Flavor::new(suite, "microvm,accel=kvm");
        for version in [Version::Tls12, Version::Tls13] {
            let mut ways = vec![("plain", Setup::default()), ("multifd-4", Setup::multifd(4, "none"))];
            // 7.2 for the first ones alone, as between monitors.
            if suite != Suite::Bookworm {
                ways.extend([("multifd-1", Setup::multifd(1, "none")), ("zstd", Setup::multifd(2, "zstd"))]);
            }
            for (name, arrives) in ways {
                let leaves = arrives.clone().and("return-path").over(Transport::Tcp);
                let live = Live { leaves, arrives, each_section: false, tls: Some(version), bandwidth: SLOW };
                rows.push((flavor, format!("live/{}-{name}", version.name()), Case::Live(Box::new(live), suite)));
            }
            for (flaw, name) in FLAWS.iter().filter(|_| suite != Suite::Bookworm) {
                rows.push((flavor, format!("{}/{name}", version.name()), Case::Distrusted(version, *flaw)));
            }
        }
    }
    rows
}

/// A running guest must not get into a `qevm receive`, nor a saved one by `qevm send` into a QEMU.
///
/// # Errors
/// It does, a side hangs, or qevm does not say why.
pub fn refused(root: &Root, subject: &Subject, version: Version, flaw: Flaw) -> Result<String> {
    let scratch = tempfile::Builder::new().prefix("qevm-").tempdir()?;
    let folder = scratch.path();
    fs::write(folder.join("payload.bin"), IMAGE)?;
    issue(version, Some(flaw), folder)?;
    let serial = folder.join("source.serial");
    let mut source = Qemu::start(root, "source", &arguments(false, folder, &serial, &[]), folder)?;
    seen(&serial, PATIENCE, |p| p.pass > 2)?;
    let leaves = leave(&mut source, subject, version, flaw, folder).context("leaving")?;
    // The guest that stayed is saved, and has to stay out of a QEMU.
    source.set_parameters(&json!({ "tls-creds": "" }))?;
    source.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": [{ "capability": "return-path", "state": true }] }),
    )?;
    let mut receiver = Receiver::start(subject, folder, Transport::Tcp, &[])?;
    source.execute("migrate", json!({ "uri": receiver.uri }))?;
    let saved = receiver.finish(PATIENCE)?;
    ensure!(saved.code == Some(0), "saving the guest without TLS: {}", saved.said);
    source.quit();
    let arrives = arrive(root, subject, version, flaw, folder).context("arriving")?;
    Ok(format!("receive: {leaves}; send: {arrives}"))
}

fn leave(source: &mut Qemu, subject: &Subject, version: Version, flaw: Flaw, folder: &Path) -> Result<String> {
    if flaw != Flaw::DestinationOnly {
        arm(source, "client", version, folder)?;
    }
    let identity = if flaw == Flaw::Denied { "CN=somebody else" } else { SOURCE };
    let mut options = vec!["--timeout".to_owned(), TOLD.to_owned()];
    if flaw != Flaw::SourceOnly {
        options.extend(receiving(folder, identity));
    }
    let mut receiver = Receiver::start(subject, folder, Transport::Tcp, &options)?;
    source.execute("migrate", json!({ "uri": receiver.uri }))?;
    let received = receiver.finish(PATIENCE)?;
    let said = received.said.trim().replace('\n', "; ");
    ensure!(received.code == Some(1), "qevm receive ends with {:?}: {said}", received.code);
    ensure!(said.contains("TLS"), "qevm receive does not say what TLS has to do with it: {said}");
    let ended = |s: &Value| matches!(s["status"].as_str(), Some("failed" | "completed" | "cancelled"));
    let state = source.wait_migration(PATIENCE, ended)?;
    let status = source.execute("query-status", Value::Null)?;
    let moved = state["ram"]["transferred"].as_u64().unwrap_or(0);
    if state["status"] != "failed" || status["running"] != true || moved > 0 {
        bail!("the source is {status}, its migration {} after {moved} bytes: {said}", state["status"]);
    }
    Ok(said)
}

fn arrive(root: &Root, subject: &Subject, version: Version, flaw: Flaw, folder: &Path) -> Result<String> {
    let serial = folder.join("target.serial");
    let incoming = ["-incoming", "defer"];
    let mut target = Qemu::start(root, "target", &arguments(false, folder, &serial, &incoming), folder)?;
    if flaw == Flaw::Denied {
        let list = json!({ "qom-type": "authz-simple", "id": "authz", "identity": "CN=somebody else" });
        target.execute("object-add", list)?;
        target.set_parameters(&json!({ "tls-authz": "authz" }))?;
    }
    if flaw != Flaw::SourceOnly {
        arm(&mut target, "server", version, folder)?;
    }
    let uri = format!("unix:{}", folder.join("t").display());
    target.execute("migrate-incoming", json!({ "uri": uri }))?;
    let mut arguments: Vec<String> =
        ["send", "--to", root.suite().series(), "--timeout", TOLD].map(String::from).into();
    if flaw != Flaw::DestinationOnly {
        arguments.extend(sending(folder));
    }
    arguments.extend([folder.join("main.qevm").display().to_string(), uri]);
    let finished = subject.run(&arguments.into_iter().map(Into::into).collect::<Vec<std::ffi::OsString>>())?;
    let said = finished.stderr.trim().replace('\n', "; ");
    ensure!(finished.code == Some(1), "qevm send ends with {}: {said}", finished.status);
    let named = match flaw {
        Flaw::Host | Flaw::Expired | Flaw::Authority => said.contains("invalid peer certificate"),
        Flaw::DestinationOnly | Flaw::Denied => !said.is_empty(),
        _ => said.contains("TLS"),
    };
    ensure!(named, "qevm send does not say why: {said}");
    ensure!(!fs::read_to_string(&serial).unwrap_or_default().contains("pass="), "the guest runs at the destination");
    Ok(said)
}
