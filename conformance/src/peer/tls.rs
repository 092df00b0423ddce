//! Journeys over TLS, and those that must not take place.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, DnValue, IsCa, KeyPair};
use reference_vmm::payload::Transcript;
use serde_json::{Map, Value, json};

use super::journey::{Stage, account};
use super::outage::{goes_on, stays_out};
use super::party::Party;
use super::rows::PEERS;
use super::{Account, Departure, Journey, Link, Load, Stop};
use crate::patience::PATIENCE;
use crate::roots::Suite;
use crate::scenario::Accel;

const POLL: Duration = Duration::from_millis(10);
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
    /// The destination expects somebody else.
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

/// A hop that one end must refuse before anything of the guest has moved.
#[derive(Debug, Clone)]
pub struct Distrust {
    /// Of two stops, with a flaw.
    pub journey: Journey,
}

impl Secured {
    /// Gives both ends their credentials.
    pub(super) fn arm(self, here: &mut Party, there: &mut Party, scratch: &Path) -> Result<()> {
        let pki = scratch.join("pki");
        self.issue(&pki)?;
        for (party, side, alone) in [(here, "client", Flaw::DestinationOnly), (there, "server", Flaw::SourceOnly)] {
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
            party.monitor().execute("object-add", credentials)?;
            let mut parameters = json!({ "tls-creds": id });
            if side == "client" {
                // A UNIX socket has no host, and the loopback is no name to trust.
                parameters["tls-hostname"] = "destination.example".into();
            } else if self.authz || self.flaw == Some(Flaw::Denied) {
                let identity = if self.flaw == Some(Flaw::Denied) { "CN=somebody else" } else { SOURCE };
                let list = json!({ "qom-type": "authz-simple", "id": "authz", "identity": identity });
                party.monitor().execute("object-add", list)?;
                parameters["tls-authz"] = "authz".into();
            }
            party.monitor().set_parameters(&parameters)?;
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

impl Distrust {
    /// Plays it.
    ///
    /// # Errors
    /// The guest leaves, does not go on at the source, anything of it moves, or a reason is missing.
    pub(super) fn play(&self, stage: &Stage<'_>) -> Result<Account> {
        let mut here = self.journey.boot(stage, &mut |_| ())?;
        let mut there = self.journey.start(stage, 1, true)?;
        let secured = self.journey.tls.context("a journey without TLS")?;
        secured.arm(&mut here, &mut there, stage.scratch)?;
        self.journey.prepare(&mut here, &mut there)?;
        self.journey.leave(&mut here, &mut there, stage.scratch, 1)?;
        let why = goes_on(&mut here)?;
        let moved = here.monitor().migration()?["ram"]["transferred"].as_u64().unwrap_or(0);
        ensure!(moved == 0, "{moved} bytes of guest memory had been sent when the source said '{why}'");
        let ours = [here.stop(), there.stop()].map(|stop| stop == Stop::Reference);
        // The source may know before the destination has written it down.
        let deadline = Instant::now() + PATIENCE;
        let said = loop {
            let said = there.monitor().said();
            if !ours[1] || said.contains("TLS") || Instant::now() > deadline {
                break said;
            }
            thread::sleep(POLL);
        };
        // TLS tells a source whose certificate is not wanted no more than that the session has ended.
        let certificate = [Flaw::Host, Flaw::Expired, Flaw::Authority].map(Some).contains(&secured.flaw);
        let unwanted = [Flaw::NoCertificate, Flaw::SourceAuthority, Flaw::Denied].map(Some).contains(&secured.flaw);
        let named = match ours[0] {
            true if certificate => why.contains("invalid peer certificate"),
            true if unwanted => why.contains("'tls-authz'") || why.to_lowercase().contains("alert"),
            _ => !why.is_empty(),
        };
        ensure!(named, "the source does not say why: '{why}'");
        let plain = ours[0] && secured.flaw == Some(Flaw::DestinationOnly);
        ensure!(!plain || why.contains("'tls-creds'"), "the source does not name what it lacks: '{why}'");
        ensure!(!ours[1] || said.contains("TLS"), "the destination does not say what TLS has to do with it: '{said}'");
        stays_out(&mut there)?;
        let text = here.end()?;
        Ok(account(Vec::new(), &Transcript::read(&[&text])?))
    }
}

/// Guests that go in sessions, by each release, version and kind of channels.
pub(super) fn journeys() -> Vec<Journey> {
    let mut journeys = Vec::new();
    for suite in PEERS {
        let qemu = Stop::Qemu(suite, Accel::Kvm);
        for stops in [[qemu, Stop::Reference], [Stop::Reference, qemu]] {
            journeys.extend([Version::Tls12, Version::Tls13].into_iter().flat_map(|version| ways(stops, version)));
        }
    }
    let ours = [Stop::Reference; 2];
    journeys.extend([Version::Tls12, Version::Tls13].into_iter().flat_map(|version| ways(ours, version)));
    journeys
}

fn ways(stops: [Stop; 2], version: Version) -> Vec<Journey> {
    let old = stops.contains(&Stop::Qemu(Suite::Bookworm, Accel::Kvm));
    let (new, middle) = (Stop::Qemu(Suite::Sid, Accel::Kvm), Stop::Qemu(Suite::Trixie, Accel::Kvm));
    let kinds: [(&str, &[&'static str], Value); 6] = [
        ("plain", &["return-path"], json!({})),
        ("multifd/1", &["return-path", "multifd"], json!({ "multifd-channels": 1 })),
        ("multifd/4", &["return-path", "multifd"], json!({ "multifd-channels": 4 })),
        ("zstd", &["return-path", "multifd"], json!({ "multifd-channels": 2, "multifd-compression": "zstd" })),
        ("postcopy", &["postcopy-ram"], json!({ "max-postcopy-bandwidth": 32 << 20 })),
        ("preempt", &["postcopy-ram", "postcopy-preempt"], json!({ "max-postcopy-bandwidth": 32 << 20 })),
    ];
    let mut journeys = Vec::new();
    for (kind, capabilities, parameters) in kinds {
        let postcopy = capabilities.contains(&"postcopy-ram");
        // 7.2 for the first ones alone.
        if old && (postcopy || kind == "zstd") {
            continue;
        }
        let quick = match (kind, version) {
            ("plain", Version::Tls12) => stops == [middle, Stop::Reference],
            ("multifd/4", Version::Tls13) => stops == [Stop::Reference, new] || stops == [new, Stop::Reference],
            ("postcopy", Version::Tls13) => stops == [Stop::Reference; 2],
            ("preempt", Version::Tls13) => stops == [new, Stop::Reference],
            _ => false,
        };
        let load = match postcopy {
            true => Load { downtime_limit: 1, ..Load::default() },
            false => Load::default(),
        };
        journeys.push(Journey {
            name: format!("{}>{}/{}/{kind}", stops[0], stops[1], version.name()),
            stops: stops.into(),
            link: if kind == "multifd/1" { Link::Unix } else { Link::Tcp },
            capabilities: capabilities.into(),
            parameters: parameters.as_object().cloned().unwrap_or_default(),
            postcopy: postcopy.then_some(Departure::AtOnce),
            tls: Some(Secured { version, authz: kind.starts_with("multifd"), flaw: None }),
            load,
            quick,
        });
    }
    journeys
}

/// What each end has to refuse, towards and from a QEMU of each release, and between ours.
pub(super) fn distrust() -> Vec<Distrust> {
    let mut all = Vec::new();
    let peers = [Suite::Trixie, Suite::Sid].map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let ways = peers.into_iter().flat_map(|qemu| [[qemu, Stop::Reference], [Stop::Reference, qemu]]);
    for stops in ways.chain([[Stop::Reference; 2]]) {
        for version in [Version::Tls12, Version::Tls13] {
            for (flaw, name) in FLAWS {
                let journey = Journey {
                    name: format!("{}>{}/{}/{name}", stops[0], stops[1], version.name()),
                    stops: stops.into(),
                    link: Link::Tcp,
                    capabilities: vec!["return-path"],
                    parameters: Map::new(),
                    postcopy: None,
                    tls: Some(Secured { version, authz: false, flaw: Some(flaw) }),
                    load: Load::default(),
                    quick: version == Version::Tls13
                        && stops.contains(&Stop::Qemu(Suite::Sid, Accel::Kvm))
                        && [Flaw::Host, Flaw::NoCertificate, Flaw::Denied].contains(&flaw),
                };
                all.push(Distrust { journey });
            }
        }
    }
    all
}
