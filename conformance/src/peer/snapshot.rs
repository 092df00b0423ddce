//! A background snapshot: the guest runs on where it is, and as a copy of one instant elsewhere.

use super::env::{Env, account};
use super::{Account, Endpoint, Journey, Link, Load, Stop};
use crate::exec;
use crate::patience::PATIENCE;
use crate::roots::Suite;
use crate::scenario::Accel;
use anyhow::{Context, Result, ensure};
use reference_vmm::payload::Transcript;
use serde_json::{Map, Value, json};

/// Bytes per second into the file: the guest writes to most of its memory several times before all of it is there.
const SLOW: u64 = 16 << 20;
const BACKGROUND: &str = "background-snapshot";

/// A guest of which a snapshot is taken while it runs.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Of two stops: who takes it, and who loads it.
    pub journey: Journey,
}

impl Snapshot {
    /// Plays it.
    ///
    /// # Errors
    /// The guest does not run on, or either guest finds a page that is not as it has left it.
    pub(super) fn play(&self, env: &Env<'_>) -> Result<Account> {
        let path = env.scratch.join("snapshot");
        let mut here = self.journey.boot(env, &mut |_| ())?;
        let mut there = self.journey.start(env, 1, true)?;
        here.meets(there.stop())?;
        there.meets(here.stop())?;
        let on: Vec<_> = self.journey.capabilities.iter().copied().chain([BACKGROUND]).collect();
        here.monitor().set_capabilities(&on)?;
        here.monitor().set_parameters(&json!({ "max-bandwidth": SLOW }))?;
        let uri = here.writes_file(&path);
        here.monitor().execute("migrate", json!({ "uri": uri }))?;
        here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
        exec::finish(&path)?;
        here.wait_status("running")?;
        runs_on(&mut here, self.journey.load.cpus)?;

        // A QEMU's goes without the end of its memory.
        let told = (there.stop() == Stop::Reference).then_some(BACKGROUND);
        let on: Vec<_> = self.journey.capabilities.iter().copied().chain(told).collect();
        there.monitor().set_capabilities(&on)?;
        let uri = there.reads_file(&path);
        there.monitor().execute("migrate-incoming", json!({ "uri": uri }))?;
        there.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
        there.wait_status("running")?;
        self.journey.settle(&mut there)?;
        there.end()?;
        let text = here.end()?;
        Ok(account(Vec::new(), &Transcript::read(&[text.as_slice()])?))
    }
}

/// Waits until a guest that has printed something before has rewritten all of its memory and checked the rest from now
/// on.
pub(super) fn runs_on(endpoint: &mut Endpoint, cpus: u32) -> Result<()> {
    let now = endpoint.progress()?.context("the guest has said nothing")?;
    let (pass, rounds) = (now.pass + 2, now.rounds + u64::from(cpus) + 1);
    let after = endpoint.wait_progress("run on", PATIENCE, |p| p.pass >= pass && p.rounds >= rounds)?;
    ensure!(after.stale == 0, "the guest found {} stale pages", after.stale);
    ensure!(after.tsc_back == 0, "the guest's clock ran backwards {} times", after.tsc_back);
    Ok(())
}

/// Who takes them and who loads them.
pub(super) fn all() -> Vec<Snapshot> {
    let mut snapshots = Vec::new();
    let peers = [Suite::Bookworm, Suite::Trixie, Suite::Sid].map(|suite| Stop::Qemu(suite, Accel::Kvm));
    for peer in peers {
        for stops in [[Stop::Reference, peer], [peer, Stop::Reference]] {
            for capabilities in [vec![], vec!["mapped-ram"]] {
                // 7.2 has no such capability.
                if !capabilities.is_empty() && peer == peers[0] {
                    continue;
                }
                let with = if capabilities.is_empty() { "file" } else { "mapped-ram" };
                let name = format!("{}>{}/background-snapshot/{with}", stops[0], stops[1]);
                let quick = peer == peers[2] && stops[0] == Stop::Reference && capabilities.is_empty();
                let (stops, load) = (stops.into(), Load { cpus: 2, ..Load::default() });
                let (link, parameters) = (Link::File, Map::<String, Value>::new());
                snapshots.push(Snapshot {
                    journey: Journey {
                        name,
                        stops,
                        link,
                        capabilities,
                        parameters,
                        postcopy: None,
                        tls: None,
                        load,
                        quick,
                    },
                });
            }
        }
    }
    snapshots
}
