//! The last moments of a handover: the source does not know what the destination does, and still one guest runs.

use super::endpoint::Endpoint;
use super::env::{Env, account};
use super::link_cuts::stays_out;
use super::proxy::{Cut, broken};
use super::{Account, Journey};
use anyhow::{Result, ensure};
use reference_vmm::payload::Transcript;
use serde_json::{Value, json};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);
/// The return path up to the middle of SHUT: PONGs to three PINGs, of 8 bytes each, come before.
const WITHIN_VERDICT: u64 = 3 * 8 + 3;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubtful {
    /// The destination's process is stopped when the guest is, the operator cancels, and then it goes on.
    Standstill,
    /// The destination runs the guest, and the connection breaks when it says so.
    LostVerdict,
}

/// A journey of one hop with a doubtful end, from reference-vmm. Nothing is told of a return path.
#[derive(Debug, Clone)]
pub struct Doubt {
    /// Of two stops.
    pub journey: Journey,
    /// What goes wrong.
    pub what: Doubtful,
}

impl Doubt {
    /// Plays it.
    ///
    /// # Errors
    /// No guest runs at the end or two do, or the operator is not told who must decide.
    pub(super) fn play(&self, env: &Env<'_>) -> Result<Account> {
        let mut here = self.journey.boot(env, &mut |_| ())?;
        let mut there = self.journey.start(env, 1, true)?;
        self.journey.prepare(&mut here, &mut there)?;
        match self.what {
            Doubtful::Standstill => {
                self.stand_still(&mut here, &mut there, env)?;
                drop(there);
                there = self.journey.start(env, 1, true)?;
                self.journey.hop(&mut here, &mut there, env.scratch, 1, &mut |_| ())?;
            }
            Doubtful::LostVerdict => lose_verdict(&mut here, &mut there, env)?,
        }
        self.journey.settle(&mut there)?;
        let texts = [here.end()?, there.end()?];
        Ok(account(Vec::new(), &Transcript::read(&texts.each_ref().map(Vec::as_slice))?))
    }

    fn stand_still(&self, here: &mut Endpoint, there: &mut Endpoint, env: &Env<'_>) -> Result<()> {
        here.monitor().set_capabilities(&["pause-before-switchover"])?;
        self.journey.leave(here, there, env.scratch, 1)?;
        here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "pre-switchover")?;
        signal(there, "-STOP")?;
        here.monitor().execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
        here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "device")?;
        here.monitor().execute("migrate_cancel", Value::Null)?;
        ended(here, "cancelled")?;
        let status = here.monitor().execute("query-status", Value::Null)?;
        ensure!(status["running"] == true, "the destination cannot have the guest, and here it is {status}");
        signal(there, "-CONT")?;
        // It sees that the connection is closed, and may take what it has for a guest.
        let deadline = Instant::now() + PATIENCE;
        while there.monitor().last_words().is_none() {
            let migration = match there.monitor().migration() {
                Ok(migration) => migration,
                // It may end while it is asked.
                Err(error) => {
                    ensure!(there.monitor().has_ended()?, "{error:#}");
                    break;
                }
            };
            if migration["status"] == "failed" || migration["status"] == "completed" {
                break;
            }
            ensure!(Instant::now() < deadline, "the destination still waits: {migration}");
        }
        stays_out(there)?;
        let off = json!([{ "capability": "pause-before-switchover", "state": false }]);
        here.monitor().execute("migrate-set-capabilities", json!({ "capabilities": off }))?;
        Ok(())
    }
}

fn lose_verdict(here: &mut Endpoint, there: &mut Endpoint, env: &Env<'_>) -> Result<()> {
    let [entry, exit] = ["entry", "exit"].map(|name| env.scratch.join(name));
    there.monitor().execute("migrate-incoming", json!({ "uri": format!("unix:{}", exit.display()) }))?;
    let proxy = broken(&entry, exit, Cut::Back(WITHIN_VERDICT))?;
    here.monitor().execute("migrate", json!({ "uri": format!("unix:{}", entry.display()) }))?;
    let migration = ended(here, "failed")?;
    ensure!(proxy.join().unwrap_or(false), "the migration ended before it was cut");
    let why = migration["error-desc"].as_str().unwrap_or_default();
    ensure!(why.contains("may run there") && why.contains("'cont'"), "the operator is not told who must decide: {why}");
    let status = here.monitor().execute("query-status", Value::Null)?;
    ensure!(status["status"] == "postmigrate", "the guest may run at the destination, and here it is {status}");
    let status = there.monitor().execute("query-status", Value::Null)?;
    ensure!(status["status"] == "running", "the guest has arrived, and is {status}");
    Ok(())
}

/// Waits until a migration has ended so.
fn ended(endpoint: &mut Endpoint, wanted: &str) -> Result<Value> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let migration = endpoint.monitor().migration()?;
        let status = migration["status"].as_str().unwrap_or_default();
        if status == wanted {
            return Ok(migration);
        }
        ensure!(!["completed", "failed", "cancelled"].contains(&status), "{migration}, {wanted} wanted");
        ensure!(Instant::now() < deadline, "the migration does not end: {migration}");
        thread::sleep(POLL);
    }
}

fn signal(endpoint: &mut Endpoint, signal: &str) -> Result<()> {
    let told = Command::new("kill").args([signal, &endpoint.monitor().pid().to_string()]).status()?;
    ensure!(told.success(), "kill {signal} failed");
    Ok(())
}
