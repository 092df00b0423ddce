//! Connections that break under way: the guest goes on at the source as if nothing had happened.

use super::endpoint::Endpoint;
use super::env::{Env, account};
use super::proxy::{Cut, broken};
use super::{Account, Journey, Moment};
use crate::patience::PATIENCE;
use anyhow::{Context, Result, bail, ensure};
use reference_vmm::payload::Transcript;
use serde_json::{Value, json};
use std::thread;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(5);

/// A journey of one hop that fails some times before it succeeds.
#[derive(Debug, Clone)]
pub struct LinkCuts {
    /// Of two stops, with a return path.
    pub journey: Journey,
    /// Where the connection breaks, try by try. Before the end of the stream: after it a destination may run the guest.
    pub cuts: Vec<Cut>,
}

impl LinkCuts {
    /// Plays it.
    ///
    /// # Errors
    /// A try succeeds although it was cut, or does not leave the guest running at the source, or the last one fails.
    pub(super) fn play(&self, env: &Env<'_>) -> Result<Account> {
        let mut here = self.journey.boot(env, &mut |_| ())?;
        for cut in &self.cuts {
            self.fail(&mut here, env, *cut).with_context(|| format!("cut {cut:?}"))?;
        }
        let mut there = self.journey.start(env, 1, true)?;
        let hop = self.journey.hop(&mut here, &mut there, env.scratch, 1, &mut |_: Moment| ())?;
        self.journey.settle(&mut there)?;
        let texts = [here.end()?, there.end()?];
        let transcript = Transcript::read(&texts.each_ref().map(Vec::as_slice))?;
        Ok(Account { cuts: self.cuts.len(), ..account(vec![hop], &transcript) })
    }

    fn fail(&self, here: &mut Endpoint, env: &Env<'_>, cut: Cut) -> Result<()> {
        let mut there = self.journey.start(env, 1, true)?;
        self.journey.prepare(here, &mut there)?;
        let [entry, exit] = ["entry", "exit"].map(|name| env.scratch.join(name));
        let _ = std::fs::remove_file(&exit);
        there.monitor().execute("migrate-incoming", json!({ "uri": format!("unix:{}", exit.display()) }))?;
        let proxy = broken(&entry, exit, cut)?;
        here.monitor().execute("migrate", json!({ "uri": format!("unix:{}", entry.display()) }))?;
        goes_on(here)?;
        ensure!(proxy.join().unwrap_or(false), "the migration ended before it was cut");
        stays_out(&mut there)
    }
}

/// Waits for the migration to fail and asserts that the guest goes on here.
pub(super) fn goes_on(here: &mut Endpoint) -> Result<String> {
    let deadline = Instant::now() + PATIENCE;
    let why = loop {
        let migration = here.monitor().migration()?;
        match migration["status"].as_str() {
            Some("failed") => break migration["error-desc"].as_str().unwrap_or_default().to_string(),
            Some("completed") => bail!("the source says that the migration has completed"),
            _ if Instant::now() > deadline => bail!("the source does not notice: {migration}"),
            _ => thread::sleep(POLL),
        }
    };
    while here.monitor().execute("query-status", Value::Null)?["status"] != "running" {
        ensure!(Instant::now() < deadline, "the guest was not started again");
        thread::sleep(POLL);
    }
    let failed_at = here.progress()?.map_or(0, |progress| progress.ms);
    let now = here.wait_progress("go on", PATIENCE, |progress| progress.ms > failed_at)?;
    ensure!(now.stale == 0, "the guest found {} stale pages", now.stale);
    Ok(why)
}

/// Asserts that the guest does not run there, and gives what the monitor said if it has ended.
pub(super) fn stays_out(there: &mut Endpoint) -> Result<()> {
    // One that ends while it is asked does not run the guest either.
    let status = there.monitor().execute("query-status", Value::Null);
    match status {
        Ok(status) => ensure!(status["running"] == false, "the guest runs at both ends: {status}"),
        Err(error) => ensure!(there.monitor().has_ended()?, "{error:#}"),
    }
    ensure!(there.text()?.is_empty(), "the guest has run at the destination");
    Ok(())
}
