//! Plays journeys and tells how they went.

use super::huge_pages::Reserved;
use super::{
    Account, Cuts, Distrust, Doubt, Env, Journey, LinkCuts, MismatchCase, Monitor, Recovery, RoundTrip, Served,
    Snapshot, Stop,
};
use crate::bench::figures::Summary;
use crate::matrix::{REQUIRE_KVM, REQUIRE_QEMU, kvm};
use crate::outcome::{Outcome, Report, Row};
use crate::roots::{Root, Suite};
use anyhow::Result;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

/// What a guest does in a machine that is emulated: it rewrites 4 MiB of its memory in a second or more.
const GENTLE: &str = "dirty=4M rate=4M hold=2M zero=1M verify=4096 report=50";

/// One thing to try.
#[derive(Debug, Clone)]
pub enum Case {
    /// The guest arrives.
    Journey(Journey),
    /// It arrives at last.
    LinkCuts(LinkCuts),
    /// It runs at one end, though one of them cannot know what the other does.
    Doubt(Doubt),
    /// It stays, and why is said.
    MismatchCase(MismatchCase),
    /// It stays, because one end must not trust the other.
    Distrust(Distrust),
    /// It comes back as it was.
    RoundTrip(RoundTrip),
    /// It runs on, and so does a copy of it.
    Snapshot(Snapshot),
    /// It arrives before its memory, which comes over many connections.
    Recovery(Recovery),
    /// It arrives before its memory, many times, each over two connections.
    Cuts(Cuts),
    /// It starts from what a page server gives.
    Served(Served),
}

impl Case {
    /// The way of the guest; its name is the case's.
    pub fn journey(&self) -> &Journey {
        match self {
            Case::Journey(journey) => journey,
            Case::LinkCuts(link_cuts) => &link_cuts.journey,
            Case::Doubt(doubt) => &doubt.journey,
            Case::MismatchCase(mismatch) => &mismatch.journey,
            Case::Distrust(distrust) => &distrust.journey,
            Case::RoundTrip(round_trip) => &round_trip.journey,
            Case::Snapshot(snapshot) => &snapshot.journey,
            Case::Recovery(recovery) => &recovery.journey,
            Case::Cuts(cuts) => &cuts.journey,
            Case::Served(served) => &served.journey,
        }
    }

    fn journey_mut(&mut self) -> &mut Journey {
        match self {
            Case::Journey(journey) => journey,
            Case::LinkCuts(link_cuts) => &mut link_cuts.journey,
            Case::Doubt(doubt) => &mut doubt.journey,
            Case::MismatchCase(mismatch) => &mut mismatch.journey,
            Case::Distrust(distrust) => &mut distrust.journey,
            Case::RoundTrip(round_trip) => &mut round_trip.journey,
            Case::Snapshot(snapshot) => &mut snapshot.journey,
            Case::Recovery(recovery) => &mut recovery.journey,
            Case::Cuts(cuts) => &mut cuts.journey,
            Case::Served(served) => &mut served.journey,
        }
    }

    /// The same on a machine that is many times slower: the guest writes less, so that a migration of it comes to its
    /// end.
    #[must_use]
    pub fn gently(mut self) -> Case {
        self.journey_mut().load.payload = GENTLE.into();
        self
    }

    fn play(&self, env: &Env<'_>) -> Result<Account> {
        match self {
            Case::Journey(journey) => journey.play(env, |_| ()),
            Case::LinkCuts(link_cuts) => link_cuts.play(env),
            Case::Doubt(doubt) => doubt.play(env),
            Case::MismatchCase(mismatch) => mismatch.play(env),
            Case::Distrust(distrust) => distrust.play(env),
            Case::RoundTrip(round_trip) => round_trip.play(env),
            Case::Snapshot(snapshot) => snapshot.play(env),
            Case::Recovery(recovery) => recovery.play(env),
            Case::Cuts(cuts) => cuts.play(env),
            Case::Served(served) => served.play(env),
        }
    }
}

/// Plays cases one after the other, telling `each` about every row as it ends. `keep` is where consoles and logs stay.
///
/// # Errors
/// No scratch folder can be made. Everything else is a row of the report.
pub fn run(
    cases: &[Case],
    program: &Monitor,
    keep: Option<PathBuf>,
    mut each: impl FnMut(&Row<Account>),
) -> Result<Report<Account>> {
    let scratch = tempfile::Builder::new().prefix("qevm-peer-").tempdir()?;
    let folder = keep.unwrap_or_else(|| scratch.path().to_path_buf());
    let mut roots: BTreeMap<Suite, Result<Root, String>> = BTreeMap::new();
    let kvm = kvm();
    let mut rows = Vec::new();
    for case in cases {
        let journey = case.journey();
        let started = Instant::now();
        let suites = journey.stops.iter().filter_map(|stop| match stop {
            Stop::Qemu(suite, _) => Some(*suite),
            Stop::Reference => None,
        });
        let (mut here, mut missing) = (BTreeMap::new(), None);
        for suite in suites {
            match roots.entry(suite).or_insert_with(|| Root::install(suite).map_err(|e| format!("{e:#}"))) {
                Ok(root) => drop(here.insert(suite, root.clone())),
                Err(why) => missing = Some((REQUIRE_QEMU, why.clone())),
            }
        }
        if let Err(why) = &kvm {
            missing = Some((REQUIRE_KVM, why.clone()));
        }
        let reserved = match missing {
            None => Reserved::of(journey),
            Some(_) => Ok(None),
        };
        let folder = folder.join(journey.name.replace(['/', '>', ' '], "_"));
        let outcome = match (missing, reserved) {
            (Some((variable, why)), _) => Outcome::unavailable(variable, &why),
            (None, Err(why)) => Outcome::Skipped(why),
            (None, Ok(_reserved)) => {
                fs::create_dir_all(&folder)?;
                case.play(&Env { roots: &here, program, scratch: &folder, more: &[] }).into()
            }
        };
        let row = Row { name: journey.name.clone(), outcome, seconds: started.elapsed().as_secs_f64() };
        each(&row);
        rows.push(row);
    }
    Ok(Report { rows })
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Account { hops, pages, cuts, .. } = self;
        if hops.is_empty() {
            return write!(f, "as expected; none of {pages} pages stale");
        }
        if *cuts > 0 {
            write!(f, "{cuts} cut connections, then ")?;
        }
        let downtimes = Summary::of(hops.iter().map(|hop| hop.downtime_ms));
        let (least, most) = downtimes.map_or((0.0, 0.0), |summary| (summary.min, summary.max));
        let rounds = || hops.iter().map(|hop| hop.rounds);
        write!(
            f,
            "{} hops, none of {pages} pages stale, downtime {least:.1} to {most:.1} ms, {} to {} rounds",
            hops.len(),
            rounds().min().unwrap_or(0),
            rounds().max().unwrap_or(0),
        )
    }
}

/// The numbers alone.
pub fn summary(report: &Report<Account>) -> Value {
    let held = || report.held();
    let mut summary = report.summary();
    summary["hops"] = held().map(|account| account.hops.len()).sum::<usize>().into();
    summary["cuts"] = held().map(|account| account.cuts).sum::<usize>().into();
    summary["pages"] = held().map(|account| account.pages).sum::<u64>().into();
    summary
}
