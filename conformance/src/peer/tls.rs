//! Journeys over TLS, and those that must not take place.

use super::env::{Env, account};
use super::link_cuts::{goes_on, stays_out};
use super::rows::PEERS;
use super::secured::{FLAWS, Flaw, Secured, Version};
use super::{Account, Departure, Journey, Link, Load, Stop};
use crate::patience::PATIENCE;
use crate::roots::Suite;
use crate::scenario::Accel;
use anyhow::{Context, Result, ensure};
use reference_vmm::payload::Transcript;
use serde_json::{Map, Value, json};
use std::thread;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(10);
/// A hop that one end must refuse before anything of the guest has moved.
#[derive(Debug, Clone)]
pub struct Distrust {
    /// Of two stops, with a flaw.
    pub journey: Journey,
}

impl Distrust {
    /// Plays it.
    ///
    /// # Errors
    /// The guest leaves, does not go on at the source, anything of it moves, or a reason is missing.
    pub(super) fn play(&self, env: &Env<'_>) -> Result<Account> {
        let mut here = self.journey.boot(env, &mut |_| ())?;
        let mut there = self.journey.start(env, 1, true)?;
        let secured = self.journey.tls.context("a journey without TLS")?;
        secured.arm(&mut here, &mut there, env.scratch)?;
        self.journey.prepare(&mut here, &mut there)?;
        self.journey.leave(&mut here, &mut there, env.scratch, 1)?;
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
