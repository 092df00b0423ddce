//! A running guest over a limited link.

use super::figures::{COLUMNS, Figures, Summary};
use super::watch::Silence;
use crate::network::{Network, PORT};
use crate::peer::{Env, Journey, Link, Load, Monitor, Stop};
use crate::processor_time;
use crate::roots::{Root, Suite};
use crate::scenario::Accel;
use anyhow::{Context, Result, ensure};
use reference_vmm::payload::Transcript;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a migration may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Milliseconds between the guest's progress lines: how finely the downtime is known.
const REPORT: u32 = 5;
/// No further repetition begins when it would end after this time; with another build to compare with it is twice as
/// long.
const BUDGET: Duration = Duration::from_secs(270);
/// What is asked of reference-vmm: at most this part of QEMU's figure.
const GOALS: [(&str, f64); 3] = [("downtime ms", 0.1), ("total ms", 1.0), ("CPU ms", 0.6)];

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whose QEMU.
    pub suite: Suite,
    /// Megabits per second.
    pub megabits: u32,
    /// `downtime-limit`, ms.
    pub downtime_limit: u64,
    /// Working sets of the guest, MiB.
    pub sets: Vec<u32>,
    /// MiB per second that it dirties of them.
    pub rate: u32,
    /// How often each migration is measured.
    pub repetitions: u32,
    /// QEMU to reference-vmm and back as well.
    pub pairs: bool,
    /// Destinations do not touch their memory before pages arrive.
    pub fresh: bool,
    /// `multifd-channels`; pages go over the main channel if this is 0.
    pub multifd: u8,
}

/// Who sends to whom.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Route {
    stops: [Stop; 2],
    /// Which reference-vmm: 0 is the one under judgement.
    program: usize,
}

impl Route {
    /// The first is the measure of the others; `programs` builds of reference-vmm take turns.
    fn all(qemu: Stop, pairs: bool, programs: usize) -> Vec<Route> {
        let mut stops = vec![[Stop::Reference; 2]];
        if pairs {
            stops.extend([[qemu, Stop::Reference], [Stop::Reference, qemu]]);
        }
        let ours = stops.iter().flat_map(|&stops| (0..programs).map(move |program| Route { stops, program }));
        std::iter::once(Route { stops: [qemu; 2], program: 0 }).chain(ours).collect()
    }

    /// Whether goals are set for it.
    fn is_judged(self) -> bool {
        self == Route { stops: [Stop::Reference; 2], program: 0 }
    }

    fn name(self) -> String {
        format!("{} to {}{}", self.stops[0], self.stops[1], if self.program == 0 { "" } else { ", before" })
    }
}

/// Measures, prints every migration and the comparison, and gives it as JSON. All of that was on the same guest, with
/// the same limits, over the same link, by turns; a stale page is an error. `before` is another build of reference-vmm.
///
/// # Errors
/// A migration fails, or there is no link to measure on.
pub fn run(options: &Options, program: &Monitor, before: Option<&Monitor>) -> Result<Value> {
    let root = Root::install(options.suite)?;
    let link = Network::new(Some(options.megabits))?;
    let qemu = Stop::Qemu(options.suite, Accel::Kvm);
    let programs: Vec<&Monitor> = std::iter::once(program).chain(before).collect();
    let routes = Route::all(qemu, options.pairs, programs.len());
    let budget = BUDGET * programs.len() as u32;
    println!(
        "QEMU {}, {} Mbit/s, downtime-limit {} ms, the guest dirties {} MiB/s; CPU of both ends without vCPUs",
        root.version(),
        options.megabits,
        options.downtime_limit,
        options.rate
    );
    let bench = LinkBench { options, link: &link, root: &root, programs: &programs };
    let mut measured: BTreeMap<(usize, usize), Vec<Figures>> = BTreeMap::new();
    let (begin, mut longest) = (Instant::now(), Duration::ZERO);
    for repetition in 0..options.repetitions {
        if begin.elapsed() + longest > budget {
            println!("only {repetition} repetitions: this machine is slow, and {} s are up", budget.as_secs());
            break;
        }
        let repetition_begin = Instant::now();
        for (set, megabytes) in options.sets.iter().enumerate() {
            // A machine may be faster at the beginning, so no route always comes first.
            for n in 0..routes.len() {
                let route = (n + repetition as usize) % routes.len();
                let name = routes[route].name();
                let figures = bench
                    .migrate(routes[route], *megabytes)
                    .with_context(|| format!("{name}, {megabytes} MiB, repetition {repetition}"))?;
                println!("{name:<22} {megabytes:>3} MiB  {}", line(&figures));
                measured.entry((set, route)).or_default().push(figures);
            }
        }
        longest = longest.max(repetition_begin.elapsed());
    }
    Ok(compare(options, &routes, &measured))
}

fn line(figures: &Figures) -> String {
    COLUMNS.iter().map(|(name, of)| format!("{name} {:.1}", of(figures))).collect::<Vec<_>>().join(", ")
}

/// Prints medians, and the ratios within each repetition.
fn compare(options: &Options, routes: &[Route], measured: &BTreeMap<(usize, usize), Vec<Figures>>) -> Value {
    let (mut rows, mut goals) = (Vec::new(), true);
    for (set, megabytes) in options.sets.iter().enumerate() {
        let count = measured.get(&(set, 0)).map_or(0, Vec::len);
        println!("\nworking set {megabytes} MiB: median (least-greatest) of {count}");
        for (n, route) in routes.iter().enumerate() {
            let mut row = json!({ "set_mib": megabytes, "route": route.name() });
            let before = routes.iter().position(|other| *other == Route { program: 1, ..*route });
            for (column, of) in COLUMNS {
                let values = |route| measured.get(&(set, route)).into_iter().flatten().map(of);
                let to = |other| Summary::of_ratios(values(n), values(other));
                let (Some(ours), Some(ratio)) = (Summary::of(values(n)), to(0)) else {
                    goals = false;
                    continue;
                };
                row[column] = json!({ "summary": ours, "times_qemu": ratio });
                let mut text = format!("  {:<22} {column:<15} {ours:<28} times QEMU {}", route.name(), ratio.ratio());
                if let Some(ratio) = before.filter(|before| *before != n).and_then(to) {
                    text += &format!("  times before {}", ratio.ratio());
                    row[column]["times_before"] = json!(ratio);
                }
                if let Some((_, most)) = GOALS.iter().find(|(name, _)| *name == column && route.is_judged()) {
                    let met = ratio.median <= *most;
                    goals &= met;
                    text += &format!("  goal {most}: {}", if met { "met" } else { "MISSED" });
                }
                println!("{text}");
            }
            rows.push(row);
        }
    }
    json!({ "goals_met": goals, "rows": rows })
}

struct LinkBench<'b> {
    options: &'b Options,
    link: &'b Network,
    root: &'b Root,
    programs: &'b [&'b Monitor],
}

impl LinkBench<'_> {
    fn migrate(&self, route: Route, megabytes: u32) -> Result<Figures> {
        let Options { suite, downtime_limit, rate, multifd, .. } = *self.options;
        let scratch = tempfile::Builder::new().prefix("qevm-bench-").tempdir()?;
        let journey = Journey {
            name: route.name(),
            stops: route.stops.to_vec(),
            link: Link::Tcp,
            capabilities: if multifd == 0 { vec![] } else { vec!["multifd"] },
            parameters: (multifd > 0).then(|| ("multifd-channels".into(), multifd.into())).into_iter().collect(),
            postcopy: None,
            tls: None,
            load: Load {
                memory: 256,
                mem_prealloc: !self.options.fresh,
                payload: format!("dirty={megabytes}M rate={rate}M hold=128M zero=8M verify=32768 report={REPORT}"),
                // The link is the limit.
                max_bandwidth: 10 << 30,
                downtime_limit,
                ..Load::default()
            },
            quick: false,
        };
        let root = |namespace: &str| BTreeMap::from([(suite, self.root.inside(namespace))]);
        let (here_roots, there_roots) = (root(self.link.source()), root(self.link.destination()));
        let program = self.programs[route.program];
        let (here_program, there_program) =
            (program.inside(self.link.source()), program.inside(self.link.destination()));
        let env = Env { roots: &here_roots, program: &here_program, scratch: scratch.path(), more: &[] };
        let mut here = journey.boot(&env, &mut |_| ())?;
        let env = Env { roots: &there_roots, program: &there_program, ..env };
        let mut there = journey.start(&env, 1, true)?;
        journey.prepare(&mut here, &mut there)?;
        let uri = format!("tcp:{}:{PORT}", self.link.address());
        there.monitor().execute("migrate-incoming", json!({ "uri": uri }))?;

        let pids = [here.monitor().pid(), there.monitor().pid()];
        let before = (times(pids)?, self.link.sent()?);
        let consoles: [&Path; 2] = [here.console(), there.console()];
        let silence = Silence::watch(consoles[0], consoles[1]);
        let start = Instant::now();
        here.monitor().execute("migrate", json!({ "uri": uri }))?;
        let done = here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed");
        let done = match done {
            Err(error) => return Err(there.monitor().last_words().map_or(error, |said| anyhow::anyhow!(said))),
            Ok(done) => done,
        };
        let (last, first) = silence.ends(PATIENCE)?;
        let after = (times(pids)?, self.link.sent()?);
        let stopped = here.monitor().wait_event("STOP", PATIENCE)?.time.context("STOP has no timestamp")?;
        let resumed = there.monitor().wait_event("RESUME", PATIENCE)?.time.context("RESUME has no timestamp")?;
        journey.settle(&mut there)?;
        let texts = [here.end()?, there.end()?];
        let transcript = Transcript::read(&texts.each_ref().map(Vec::as_slice))?;
        ensure!(transcript.last.stale == 0, "the guest found {} stale pages", transcript.last.stale);

        let cpu = [0, 1].map(|end| (after.0[end] - before.0[end]) * 1e3);
        Ok(Figures {
            total_ms: (first - start).as_secs_f64() * 1e3,
            downtime_ms: first.saturating_duration_since(last).as_secs_f64() * 1e3,
            stop_to_resume_ms: resumed.saturating_sub(stopped).as_secs_f64() * 1e3,
            megabytes: (after.1 - before.1) as f64 / 1e6,
            cpu_ms: cpu[0] + cpu[1],
            cpu_source_ms: cpu[0],
            rounds: done["ram"]["dirty-sync-count"].as_u64().context("no dirty-sync-count")? as f64,
        })
    }
}

fn times(pids: [u32; 2]) -> Result<[f64; 2]> {
    let time = |pid| processor_time::without_vcpus(pid).map(|time| time.as_secs_f64());
    Ok([time(pids[0])?, time(pids[1])?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_is_the_measure_and_one_build_is_judged() {
        let qemu = Stop::Qemu(Suite::Sid, Accel::Kvm);
        for (pairs, programs, count) in [(false, 1, 2), (false, 2, 3), (true, 1, 4), (true, 2, 7)] {
            let routes = Route::all(qemu, pairs, programs);
            assert_eq!((routes.len(), routes[0].stops), (count, [qemu; 2]));
            let judged: Vec<_> = routes.iter().filter(|route| route.is_judged()).collect();
            assert_eq!(judged, [&Route { stops: [Stop::Reference; 2], program: 0 }]);
            assert_eq!(
                routes.iter().filter(|route| route.name().ends_with(", before")).count(),
                (programs - 1) * routes.len() / 2
            );
        }
    }
}
