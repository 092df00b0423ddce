//! Monitors that do not fit each other: the destination says what differs and why that may be, and the guest goes on at
//! the source.

use super::env::{Env, account};
use super::link_cuts::{goes_on, stays_out};
use super::{Account, Journey};
use anyhow::{Result, ensure};
use reference_vmm::payload::Transcript;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

/// A hop that cannot succeed.
#[derive(Debug, Clone)]
pub struct MismatchCase {
    /// Of two stops.
    pub journey: Journey,
    /// Arguments of the source beside the usual ones; those given twice count the second time.
    pub source: Vec<&'static str>,
    /// The destination's.
    pub destination: Vec<&'static str>,
    /// Capabilities that are on at the source alone.
    pub capabilities: Vec<&'static str>,
    /// What the destination says, in parts.
    pub said: Vec<&'static str>,
    /// What the source reports.
    pub reported: &'static str,
}

impl MismatchCase {
    /// Plays it.
    ///
    /// # Errors
    /// The hop succeeds, leaves no guest running at the source, or is not explained.
    pub(super) fn play(&self, env: &Env<'_>) -> Result<Account> {
        let source = Env { more: &self.source, ..*env };
        let mut here = self.journey.boot(&source, &mut |_| ())?;
        let mut there = self.journey.start(&Env { more: &self.destination, ..*env }, 1, true)?;
        self.journey.prepare(&mut here, &mut there)?;
        here.monitor().set_capabilities(&self.capabilities)?;
        self.journey.leave(&mut here, &mut there, env.scratch, 1)?;
        let why = goes_on(&mut here)?;
        ensure!(why.contains(self.reported), "the source reports '{why}', not '{}'", self.reported);
        // A QEMU 7.2 that has failed may keep the connection, and the destination gives it some seconds.
        let deadline = Instant::now() + PATIENCE;
        let said = loop {
            let said = there.monitor().last_words();
            if said.is_some() || self.said.is_empty() || Instant::now() > deadline {
                break said;
            }
        };
        stays_out(&mut there)?;
        if let Some(part) = self.said.iter().find(|part| !said.as_deref().unwrap_or_default().contains(**part)) {
            anyhow::bail!("'{part}' is not in what the destination says: {said:?}");
        }
        let text = here.end()?;
        Ok(account(Vec::new(), &Transcript::read(&[&text])?))
    }
}
