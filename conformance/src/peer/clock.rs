//! What the guest's clocks do while it does not run: paused, saved and loaded later, or held before the switchover.
//!
//! Clocks are read where both kinds of monitor write them: in the device state of the stopped guest. Two readings, how
//! long the guest ran between them and how long that took by the host's clock tell whether a clock has stopped with the
//! guest.

use super::env::Env;
use super::{Endpoint, Load, Monitor, Stop};
use crate::patience::PATIENCE;
use crate::roots::{Root, Suite};
use crate::scenario::Accel;
use crate::subject::Subject;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Add;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long the guest is stopped at least.
const GAP: Duration = Duration::from_secs(5);
/// How long it runs before it is looked at again.
const RUN: Duration = Duration::from_secs(1);
/// Seconds by which a reading of the real-time clock, which counts seconds, can be wrong, and a tenth for all clocks.
const TOLERANCE: f64 = 1.1;
/// How often a case is played, when the machine was so busy that what was found has two meanings.
const TRIES: usize = 4;
/// Seconds of a day, after which the time of day begins anew.
const DAY: f64 = 86_400.0;

/// Why the guest is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// `stop`, and `cont` later.
    Pause,
    /// It is saved to a file, from which another monitor starts it later.
    Restore,
    /// A migration stops it, and `migrate-continue` lets it go later.
    Migration,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Cause::Pause => "`stop`, `cont`",
            Cause::Restore => "saved, loaded later",
            Cause::Migration => "migrated",
        })
    }
}

/// What a clock has done meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// It has stopped, too.
    Stops,
    /// It has counted on.
    CountsOn,
    /// It is the host's own, which a guest reads as it is.
    Hosts,
}

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Clock::Stops => "stops",
            Clock::CountsOn => "counts on",
            Clock::Hosts => "the host's",
        })
    }
}

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clocks {
    /// `kvmclock`.
    pub kvmclock: Clock,
    /// The clock by which the PIT and timers of devices go.
    pub virtual_clock: Clock,
    /// The time that the real-time clock tells.
    pub real_time: Clock,
    /// The time stamp counter of the first vCPU.
    pub tsc: Clock,
}

/// A case: the guest goes from one monitor to the other, or stays.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Why it is stopped.
    pub cause: Cause,
    /// Where it ran before.
    pub from: Stop,
    /// Where it runs after.
    pub to: Stop,
}

impl Case {
    /// Which way, for people.
    pub fn way(&self) -> String {
        let name = |stop: Stop| match stop {
            Stop::Reference => "reference-vmm".to_owned(),
            other => format!("QEMU {other}"),
        };
        if self.cause == Cause::Pause { name(self.from) } else { format!("{} → {}", name(self.from), name(self.to)) }
    }
}

/// Every case: QEMUs by themselves, reference-vmm by itself, and each with the other.
pub fn cases() -> Vec<Case> {
    let [middle, new] = [Suite::Trixie, Suite::Sid].map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let ours = Stop::Reference;
    let alone = [(middle, middle), (new, new), (ours, ours)];
    let mixed = [(middle, ours), (new, ours), (ours, middle), (ours, new)];
    let case = |cause| move |(from, to)| Case { cause, from, to };
    let mut cases: Vec<Case> = alone.into_iter().map(case(Cause::Pause)).collect();
    for cause in [Cause::Restore, Cause::Migration] {
        cases.extend(alone.into_iter().chain(mixed).map(case(cause)));
    }
    cases
}

/// The clocks of a stopped guest, seconds.
#[derive(Debug, Clone, Copy)]
struct Reading {
    /// The guest was told to stop at the first, had stopped at the second, and its clocks had been saved at the third.
    told: Instant,
    stopped: Instant,
    saved: Instant,
    kvmclock: f64,
    virtual_clock: f64,
    time_of_day: f64,
    tsc: f64,
}

/// A time that nothing measures to the instant, seconds: what lies between two moments, each of which was somewhere
/// between two readings of the host's clock. A busy machine makes it longer, and no judgement wrong.
#[derive(Debug, Clone, Copy, Default)]
struct Span {
    least: f64,
    most: f64,
}

impl Span {
    fn between(from: (Instant, Instant), to: (Instant, Instant)) -> Self {
        Span { least: (to.0 - from.1).as_secs_f64(), most: (to.1 - from.0).as_secs_f64() }
    }

    fn holds(&self, seconds: f64) -> bool {
        (self.least - TOLERANCE..=self.most + TOLERANCE).contains(&seconds)
    }
}

impl Add for Span {
    type Output = Span;

    fn add(self, more: Span) -> Span {
        Span { least: self.least + more.least, most: self.most + more.most }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} to {:.2} s", self.least, self.most)
    }
}

/// Plays a case, until what is found has one meaning.
///
/// # Errors
/// A migration fails, or a clock has neither stopped nor counted on.
pub fn measure(case: Case, roots: &BTreeMap<Suite, Root>, program: &Monitor, subject: &Subject) -> Result<Clocks> {
    for _ in 1..TRIES {
        if let Some(clocks) = play(case, roots, program, subject)? {
            return Ok(clocks);
        }
    }
    play(case, roots, program, subject)?.with_context(|| format!("the machine was too busy {TRIES} times to tell"))
}

fn play(case: Case, roots: &BTreeMap<Suite, Root>, program: &Monitor, subject: &Subject) -> Result<Option<Clocks>> {
    let scratch = tempfile::Builder::new().prefix("qevm-").tempdir()?;
    let scratch = scratch.path();
    let env = Env { roots, program, scratch, more: &[] };
    let load = Load { memory: 32, payload: "dirty=1M rate=1M hold=1M zero=1M report=100".into(), ..Load::default() };
    let start = |stop: Stop, name: &str, incoming: bool| {
        let root = match stop {
            Stop::Qemu(suite, _) => Some(roots.get(&suite).context("QEMU is not installed")?),
            Stop::Reference => None,
        };
        Endpoint::start(stop, root, &env, &load, name, incoming, true)
    };
    let mut here = start(case.from, "here", false)?;
    here.wait_progress("complete a pass", PATIENCE, |progress| progress.pass >= 1)?;
    here.meets(case.to)?;
    thread::sleep(RUN);
    let before = read(&mut here, subject, &scratch.join("before"))?;
    // When the guest was let go for the last time; how long it had run by then since the first reading; and how long it
    // was stopped besides, where a clock that counts on while a migration stops it stops: at most, before the migration
    // and between the two monitors.
    let (mut here, go, ran, besides) = match case.cause {
        Cause::Pause => {
            thread::sleep(GAP);
            let go = Instant::now();
            here.monitor().execute("cont", Value::Null)?;
            (here, go, Span::default(), Duration::ZERO)
        }
        Cause::Restore => {
            here.end()?;
            thread::sleep(GAP);
            let mut there = start(case.to, "there", true)?;
            let uri = format!("file:{}", scratch.join("before").display());
            there.monitor().execute("migrate-incoming", json!({ "uri": uri }))?;
            // It was stopped when it was saved, and arrives so.
            there.wait_status("paused")?;
            let go = Instant::now();
            there.monitor().execute("cont", Value::Null)?;
            (there, go, Span::default(), Duration::ZERO)
        }
        Cause::Migration => {
            let mut there = start(case.to, "there", true)?;
            there.meets(case.from)?;
            let on = ["return-path", "pause-before-switchover"];
            here.monitor().set_capabilities(&on)?;
            there.monitor().set_capabilities(&on[..1])?;
            let told = Instant::now();
            here.monitor().execute("cont", Value::Null)?;
            let runs = Instant::now();
            let uri = json!({ "uri": format!("unix:{}", scratch.join("link").display()) });
            there.monitor().execute("migrate-incoming", uri.clone())?;
            let asked = Instant::now();
            here.monitor().execute("migrate", uri)?;
            here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "pre-switchover")?;
            let ran = Span::between((told, runs), (asked, Instant::now()));
            thread::sleep(GAP);
            let go = Instant::now();
            here.monitor().execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
            there.wait_status("running")?;
            let paused = (runs - before.told) + go.elapsed();
            here.end()?;
            (there, go, ran, paused)
        }
    };
    here.wait_status("running")?;
    let runs = Instant::now();
    thread::sleep(RUN);
    let after = read(&mut here, subject, &scratch.join("after"))?;
    here.end()?;
    let ran = ran + Span::between((go, runs), (after.told, after.stopped));
    let mut all = Span::between((before.told, before.saved), (after.told, after.saved));
    all.least -= besides.as_secs_f64();
    let judge = |name: &str, before: f64, after: f64| {
        judge(after - before, ran, all).with_context(|| format!("{name}, at first {before} s"))
    };
    let kvmclock = judge("kvmclock", before.kvmclock, after.kvmclock)?;
    let virtual_clock = judge("the virtual clock", before.virtual_clock, after.virtual_clock)?;
    let real_time = judge("the real-time clock", before.time_of_day, after.time_of_day)?;
    let tsc = match before.tsc > before.kvmclock + 60.0 {
        // Since the host has been switched on.
        true => Some(Clock::Hosts),
        false => judge("the time stamp counter", before.tsc, after.tsc)?,
    };
    let told = (kvmclock, virtual_clock, real_time, tsc);
    let (Some(kvmclock), Some(virtual_clock), Some(real_time), Some(tsc)) = told else { return Ok(None) };
    Ok(Some(Clocks { kvmclock, virtual_clock, real_time, tsc }))
}

/// What a clock has done, unless that cannot be told: the guest ran so long, or so long cannot be told when it did.
fn judge(advanced: f64, ran: Span, all: Span) -> Result<Option<Clock>> {
    let advanced = advanced.rem_euclid(DAY);
    match (ran.holds(advanced), all.holds(advanced)) {
        (true, true) => Ok(None),
        (true, false) => Ok(Some(Clock::Stops)),
        (false, true) => Ok(Some(Clock::CountsOn)),
        (false, false) => bail!("it advanced by {advanced:.2} s, while the guest ran for {ran} of {all}"),
    }
}

/// Stops the guest and reads its clocks from what is saved of it.
fn read(endpoint: &mut Endpoint, subject: &Subject, path: &Path) -> Result<Reading> {
    let told = Instant::now();
    endpoint.monitor().execute("stop", Value::Null)?;
    let stopped = Instant::now();
    // A file has no way back.
    let off = ["return-path", "pause-before-switchover"].map(|name| json!({ "capability": name, "state": false }));
    endpoint.monitor().execute("migrate-set-capabilities", json!({ "capabilities": off }))?;
    endpoint.monitor().execute("migrate", json!({ "uri": format!("file:{}", path.display()) }))?;
    endpoint.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
    let saved = Instant::now();
    let field = |section: &str, name: &str| -> Result<Value> {
        let path = path.display().to_string();
        let ran = subject.run(&["inspect", "--json", "--section", section, "--field", name, &path])?;
        let last = ran.stdout.lines().last().unwrap_or_default();
        let told: Value = serde_json::from_str(last).with_context(|| format!("qevm inspect: {}", ran.stderr.trim()))?;
        let found = told["fields"].as_array().into_iter().flatten().find(|field| field["path"] == *name);
        Ok(found.with_context(|| format!("{section} has no {name}"))?["value"].clone())
    };
    let number = |section: &str, name: &str| -> Result<f64> {
        field(section, name)?.as_f64().with_context(|| format!("{name} is no number"))
    };
    let tsc = number("cpu", "env.tsc")? / (number("cpu", "cpu/tsc_khz.env.tsc_khz")? * 1e3);
    let memory = field("mc146818rtc", "cmos_data")?;
    Ok(Reading {
        told,
        stopped,
        saved,
        kvmclock: number("kvmclock", "clock")? / 1e9,
        virtual_clock: number("timer", "cpu_clock_offset")? / 1e9,
        time_of_day: time_of_day(memory.as_str().unwrap_or_default()).context("the real-time clock has no time")?,
        tsc,
    })
}

/// Seconds since midnight, by the registers of an MC146818 in hexadecimal digits, which are BCD as a machine starts.
fn time_of_day(registers: &str) -> Option<f64> {
    let bcd = |register: usize| registers.get(2 * register..2 * register + 2)?.parse::<u32>().ok();
    let [seconds, minutes, hours] = [bcd(0)?, bcd(2)?, bcd(4)?];
    Some(f64::from(seconds + 60 * (minutes + 60 * hours)))
}

/// The page of `docs`. It leaves out the time stamp counter, which is the host's under some KVMs.
pub fn page(rows: &[(Case, Clocks)]) -> String {
    let mut page = PREFACE.to_owned();
    for (case, clocks) in rows {
        let Clocks { kvmclock, virtual_clock, real_time, .. } = clocks;
        page.push_str(&format!("| {} | {} | {kvmclock} | {virtual_clock} | {real_time} |\n", case.cause, case.way()));
    }
    page
}

const PREFACE: &str = "\
# The guest's clocks

What a guest's clocks do while it does not run. The table is written by `conformance/tests/clock.rs`
(`QEVM_WRITE_PAGES=1`), which plays every row: the guest is stopped for five seconds, and its clocks are read before and
after from the device state that the monitor saves. The test fails where a row is not what this page says.

* `kvmclock` is what a Linux guest takes for its monotonic clock under KVM, and from which it counts its wall clock on.
  Where it stops, the guest does not see that time has passed; its wall clock is late until something, NTP or an agent,
  sets it. Where a migration stops the guest, it counts on until the device state is saved.
* The virtual clock drives the PIT and the timers of devices (section `timer`).
* The real-time clock is the MC146818 of `-M microvm,rtc=on`: it tells the host's UTC, whichever monitor runs the guest.
* The time stamp counter is restored with the vCPU where KVM gives guests one of their own; a paravirtual KVM may let
  them read the host's as it is. The test holds every way that reference-vmm has part in to what QEMU does with it on the
  same host.

| the guest | where | `kvmclock` | virtual clock | real-time clock |
|---|---|---|---|---|
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_judged_by_what_may_have_been_and_not_where_that_is_everything() {
        let (ran, all) = (Span { least: 1.0, most: 1.5 }, Span { least: 6.0, most: 9.3 });
        let found = [1.0, 2.5, 6.2, 10.3].map(|advanced| judge(advanced, ran, all).unwrap());
        let (stops, on) = (Some(Clock::Stops), Some(Clock::CountsOn));
        assert_eq!(found, [stops, stops, on, on]);
        // Over midnight, too.
        assert_eq!(judge(1.2 - DAY, ran, all).unwrap(), stops);
        assert!(judge(3.5, ran, all).is_err() && judge(11.0, ran, all).is_err() && judge(-0.5, ran, all).is_err());
        assert_eq!(judge(4.0, Span { least: 1.0, most: 4.0 }, Span { least: 3.0, most: 9.0 }).unwrap(), None);
    }
}
