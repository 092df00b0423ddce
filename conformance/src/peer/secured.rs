//! How connections are secured: certificates of every kind, right and wrong.

use super::endpoint::Endpoint;
use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, DnValue, IsCa, KeyPair};
use serde_json::json;
use std::fs;
use std::path::Path;

/// The distinguished name in a source's certificate, as both monitors write it.
pub(crate) const SOURCE: &str = "C=DE,O=qevm,CN=source";

/// How the connections of a journey are secured, by X.509 certificates at both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Secured {
    /// The version that both ends are restricted to.
    pub version: Version,
    /// The destination asks who comes, and expects the source.
    pub authz: bool,
    /// What is wrong.
    pub flaw: Option<Flaw>,
}

/// A version of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// TLS 1.2.
    Tls12,
    /// TLS 1.3.
    Tls13,
}

impl Version {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Version::Tls12 => "tls1.2",
            Version::Tls13 => "tls1.3",
        }
    }

    /// For GnuTLS, and as reference-vmm reads it.
    pub(crate) fn priority(self) -> &'static str {
        match self {
            Version::Tls12 => "NORMAL:-VERS-ALL:+VERS-TLS1.2",
            Version::Tls13 => "NORMAL:-VERS-ALL:+VERS-TLS1.3",
        }
    }
}

/// Why a guest must not go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// The destination's certificate is for another host.
    Host,
    /// The destination's certificate has expired.
    Expired,
    /// Another authority has signed the destination's certificate.
    Authority,
    /// The source has no certificate, and the destination asks for one.
    NoCertificate,
    /// Another authority has signed the source's certificate.
    SourceAuthority,
    /// The destination expects another source.
    Denied,
    /// TLS at the source alone.
    SourceOnly,
    /// TLS at the destination alone.
    DestinationOnly,
}

pub(crate) const FLAWS: [(Flaw, &str); 8] = [
    (Flaw::Host, "wrong-host"),
    (Flaw::Expired, "expired"),
    (Flaw::Authority, "other-ca"),
    (Flaw::NoCertificate, "no-certificate"),
    (Flaw::SourceAuthority, "source-of-other-ca"),
    (Flaw::Denied, "authz-refused"),
    (Flaw::SourceOnly, "source-only"),
    (Flaw::DestinationOnly, "destination-only"),
];

impl Secured {
    /// Gives both ends their credentials.
    pub(super) fn arm(self, here: &mut Endpoint, there: &mut Endpoint, scratch: &Path) -> Result<()> {
        let pki = scratch.join("pki");
        self.issue(&pki)?;
        for (endpoint, side, alone) in [(here, "client", Flaw::DestinationOnly), (there, "server", Flaw::SourceOnly)] {
            if self.flaw == Some(alone) {
                continue;
            }
            let id = format!("tls-{side}");
            let credentials = json!({
                "qom-type": "tls-creds-x509", "id": id, "dir": pki.join(side), "endpoint": side,
                "priority": self.version.priority(),
                // A QEMU would refuse its own certificate. Here the other side has to.
                "sanity-check": self.flaw.is_none(),
            });
            endpoint.monitor().execute("object-add", credentials)?;
            let mut parameters = json!({ "tls-creds": id });
            if side == "client" {
                // A UNIX socket has no host, and the loopback is no name to trust.
                parameters["tls-hostname"] = "destination.example".into();
            } else if self.authz || self.flaw == Some(Flaw::Denied) {
                let identity = if self.flaw == Some(Flaw::Denied) { "CN=somebody else" } else { SOURCE };
                let list = json!({ "qom-type": "authz-simple", "id": "authz", "identity": identity });
                endpoint.monitor().execute("object-add", list)?;
                parameters["tls-authz"] = "authz".into();
            }
            endpoint.monitor().set_parameters(&parameters)?;
        }
        Ok(())
    }

    /// Makes the certificates: a folder for each side.
    pub(crate) fn issue(self, pki: &Path) -> Result<()> {
        let (authority, other) = (authority("authority")?, authority("another authority")?);
        let flaw = |flaw| self.flaw == Some(flaw);
        for (side, name) in [("client", "source"), ("server", "destination")] {
            let folder = pki.join(side);
            fs::create_dir_all(&folder)?;
            fs::write(folder.join("ca-cert.pem"), authority.pem())?;
            if side == "client" && flaw(Flaw::NoCertificate) {
                continue;
            }
            let host = if flaw(Flaw::Host) { "elsewhere.example" } else { "destination.example" };
            let mut params = CertificateParams::new(vec![host.to_owned()])?;
            params.distinguished_name = DistinguishedName::new();
            // As X.520 has it: GnuTLS does not read another form.
            params.distinguished_name.push(DnType::CountryName, DnValue::PrintableString("DE".try_into()?));
            params.distinguished_name.push(DnType::OrganizationName, "qevm");
            params.distinguished_name.push(DnType::CommonName, name);
            // GnuTLS's clocks and ours may differ by a zone.
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            if side == "server" && flaw(Flaw::Expired) {
                params.not_after = rcgen::date_time_ymd(2021, 1, 1);
            }
            let foreign = match side {
                "client" => flaw(Flaw::SourceAuthority),
                _ => flaw(Flaw::Authority),
            };
            let key = KeyPair::generate()?;
            let certificate = params.signed_by(&key, if foreign { &other } else { &authority })?;
            fs::write(folder.join(format!("{side}-cert.pem")), certificate.pem())?;
            fs::write(folder.join(format!("{side}-key.pem")), key.serialize_pem())?;
        }
        Ok(())
    }
}

fn authority(name: &str) -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate()?).context("making an authority")
}
