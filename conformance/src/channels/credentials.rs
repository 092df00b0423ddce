//! Certificates for both ends, and the options that name them.

use anyhow::Result;
use serde_json::json;
use std::path::Path;

use crate::launch::Qemu;
pub(super) use crate::peer::secured::SOURCE;
use crate::peer::secured::{Flaw, Secured, Version};

/// The name in the destination's certificate.
const DESTINATION: &str = "destination.example";

/// Makes the certificates in `folder`.
pub(super) fn issue(version: Version, flaw: Option<Flaw>, folder: &Path) -> Result<()> {
    Secured { version, authz: false, flaw }.issue(&folder.join("pki"))
}

/// Gives a QEMU its credentials for this side.
pub(super) fn arm(qemu: &mut Qemu, side: &str, version: Version, folder: &Path) -> Result<()> {
    let credentials = json!({
        "qom-type": "tls-creds-x509", "id": "tls", "dir": folder.join("pki").join(side), "endpoint": side,
        "priority": version.priority(), "sanity-check": false,
    });
    qemu.execute("object-add", credentials)?;
    let mut parameters = json!({ "tls-creds": "tls" });
    if side == "client" {
        parameters["tls-hostname"] = DESTINATION.into();
    }
    qemu.set_parameters(&parameters)
}

/// The options of a `qevm receive` that expects `identity`.
pub(super) fn receiving(folder: &Path, identity: &str) -> Vec<String> {
    let pki = folder.join("pki/server").display().to_string();
    ["--tls-creds", &pki, "--tls-authz", identity].map(String::from).into()
}

/// The options of `qevm send`.
pub(super) fn sending(folder: &Path) -> Vec<String> {
    let pki = folder.join("pki/client").display().to_string();
    ["--tls-creds", &pki, "--tls-hostname", DESTINATION].map(String::from).into()
}
