//! How soon a guest runs that is restored from a file in which every page has its place: QEMU's full load,
//! reference-vmm's, and lazily (capabilities `mapped-ram` and `postcopy-ram`) from the file and from a page server, by
//! turns, in one run and from one file.
//!
//! Every page of the guest's memory holds random numbers, and it touches a twentieth of it: most by rewriting it, and
//! the rest by reads at random, each of which it measures. The file is in the page cache. Numbers mean something only
//! on a machine that does nothing else.

use super::endpoint::Endpoint;
use super::monitor::Monitor;
use super::served::PageServer;
use super::{Env, Load, Stop, bench};
use crate::bench::figures::Summary;
use crate::patience::PATIENCE;
use crate::roots::{Root, Suite};
use crate::scenario::Accel;
use anyhow::{Context, Result, ensure};
use reference_vmm::payload::Reads;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// What is measured.
#[derive(Debug, Clone)]
pub struct Options {
    /// Guest RAM, MiB; each size by itself.
    pub mib: Vec<u32>,
    /// How often each way is measured.
    pub repetitions: u64,
    /// Guests from one file at once, whose memory stays there until it is touched.
    pub guests: usize,
    /// The release of QEMU.
    pub suite: Suite,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Qemu,
    Full,
    Lazy,
    Served,
}

impl Way {
    const ALL: [(Way, &'static str); 4] = [
        (Way::Qemu, "QEMU"),
        (Way::Full, "reference-vmm"),
        (Way::Lazy, "reference-vmm lazy"),
        (Way::Served, "reference-vmm served"),
    ];
}

/// One restore, from the start of the process, ms.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// To the event RESUME: the guest runs.
    runs: f64,
    /// To the end of the first pass over what it touches.
    pass: f64,
    /// What 99 of 100 reads did not exceed that took longer than any page that is in memory takes, by the guest's
    /// clock, µs. None did where all memory is loaded.
    p99: Option<f64>,
}

/// What a read of a page that is in memory seldom takes.
const FAULT: Duration = Duration::from_micros(8);

/// Restores guests of each size by turns, tells each and each median, and gives all medians.
///
/// # Errors
/// A monitor does not start, a guest cannot be saved or loaded, or finds a page that is not as it has left it.
pub fn restore(options: &Options, program: &Monitor, mut tell: impl FnMut(&str)) -> Result<Value> {
    let roots = BTreeMap::from([(options.suite, Root::install(options.suite)?)]);
    let mut results = Vec::new();
    for &mib in &options.mib {
        let scratch = tempfile::Builder::new().prefix("qevm-bench-").tempdir()?;
        let env = Env { roots: &roots, program, scratch: scratch.path(), more: &[] };
        let run = Run { options, mib, env, image: scratch.path().join("guest") };
        let saved = run.save()?;
        let mut samples: [Vec<Sample>; Way::ALL.len()] = Default::default();
        for repetition in 0..options.repetitions as usize {
            for turn in (0..Way::ALL.len()).map(|turn| (turn + repetition) % Way::ALL.len()) {
                let (way, name) = Way::ALL[turn];
                let (sample, there) = run.load(way, &saved, "there").with_context(|| name.to_owned())?;
                there.end()?;
                let p99 = sample.p99.map_or(String::new(), |p99| format!(", p99 of faults {p99:.1} us"));
                tell(&format!(
                    "{mib} MiB {name}: runs after {:.1} ms, first pass {:.1} ms{p99}",
                    sample.runs, sample.pass
                ));
                samples[turn].push(sample);
            }
        }
        let mut result = json!({ "mib": mib });
        for (n, (_, name)) in Way::ALL.into_iter().enumerate() {
            for (what, of) in [("runs_ms", (|s| s.runs) as fn(&Sample) -> f64), ("first_pass_ms", |s| s.pass)] {
                let figures = Summary::of(samples[n].iter().map(of)).context("no samples")?;
                let times = Summary::of_ratios(samples[n].iter().map(of), samples[0].iter().map(of));
                let times = times.context("no samples")?;
                let ratio = times.ratio();
                tell(&format!("{mib} MiB {name:<20} {what:<14} {:9.1}, times QEMU {ratio}", figures.median));
                result[name][what] = json!({ "ms": figures, "times_qemu": times });
            }
            if let Some(p99) = Summary::of(samples[n].iter().filter_map(|sample| sample.p99)) {
                tell(&format!("{mib} MiB {name:<20} p99 of faults, us {p99}"));
                result[name]["fault_p99_us"] = json!(p99);
            }
        }
        if options.guests > 0 {
            let each = run.side_by_side(&saved)?;
            tell(&format!("{mib} MiB, {} guests from one file: {each:.1} MiB of memory each", options.guests));
            result["guests"] =
                json!({ "number": options.guests, "proportional_set_mib_each": each, "touched_mib_each": mib / 20 });
        }
        results.push(result);
    }
    Ok(json!({ "qemu": options.suite.series(), "repetitions": options.repetitions, "results": results }))
}

struct Run<'r> {
    options: &'r Options,
    mib: u32,
    env: Env<'r>,
    image: PathBuf,
}

/// A guest in a file.
struct Saved {
    /// The pass that it was in.
    pass: u64,
    /// What it had read.
    reads: Reads,
    server: PageServer,
}

/// What a guest has read here, as it said last.
fn last_reads(endpoint: &mut Endpoint) -> Result<Reads> {
    endpoint.wait_text("read at random", PATIENCE, |text| text.lines().filter_map(Reads::parse).next_back())
}

impl Run<'_> {
    fn load_of(&self) -> Load {
        let read = (self.mib / 100).max(1);
        let rewritten = (self.mib / 20).saturating_sub(read).max(1);
        let payload = format!("dirty={rewritten}M rate=0 hold={read}M zero=0 verify=0 timer=0 reader=1 report=20");
        Load { memory: self.mib, payload, ..Load::default() }
    }

    fn start(&self, stop: Stop, name: &str, more: &[&'static str], incoming: bool) -> Result<Endpoint> {
        let env = Env { more, ..self.env };
        let root = match stop {
            Stop::Qemu(suite, _) => self.env.roots.get(&suite),
            Stop::Reference => None,
        };
        Endpoint::start(stop, root, &env, &self.load_of(), name, incoming, false)
    }

    /// Saves a guest whose memory is full of random numbers, and serves it.
    fn save(&self) -> Result<Saved> {
        // On tmpfs where there is one; it is gone before anything is measured.
        let shm = Path::new("/dev/shm");
        let folder = if shm.is_dir() { shm } else { self.env.scratch };
        let memory = tempfile::Builder::new().prefix("qevm-bench-").tempfile_in(folder)?;
        bench::fill(memory.path(), u64::from(self.mib) << 20)?;
        // Where the guest keeps its own data, it finds zeros, as in any machine.
        memory.as_file().write_all_at(&vec![0; 4 << 20], 0)?;
        let backend = format!(
            "memory-backend-file,id=microvm.ram,size={}M,share=on,mem-path={}",
            self.mib,
            memory.path().display()
        );
        let more = ["--machine", "microvm,memory-backend=microvm.ram", "--object", backend.leak()];
        let mut here = self.start(Stop::Reference, "here", &more, false)?;
        here.wait_progress("complete its passes", PATIENCE, |progress| progress.pass >= 2)?;
        here.monitor().set_capabilities(&["mapped-ram"])?;
        here.meets(Stop::Qemu(self.options.suite, Accel::Kvm))?;
        here.monitor().set_parameters(&json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": 2000 }))?;
        here.monitor().execute("migrate", json!({ "uri": format!("file:{}", self.image.display()) }))?;
        here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
        let pass = here.progress()?.context("the guest says nothing")?.pass;
        let reads = last_reads(&mut here)?;
        here.end()?;
        // Into the page cache, once for all.
        io::copy(&mut fs::File::open(&self.image)?, &mut io::sink())?;
        let server = PageServer::start(&self.image, &self.env.scratch.join("pages"))?;
        Ok(Saved { pass, reads, server })
    }

    fn load(&self, way: Way, saved: &Saved, name: &str) -> Result<(Sample, Endpoint)> {
        let (begun, at) = (Instant::now(), SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?);
        let stop = if way == Way::Qemu { Stop::Qemu(self.options.suite, Accel::Kvm) } else { Stop::Reference };
        let lazy = matches!(way, Way::Lazy | Way::Served);
        let more: &[_] = if lazy { &["--no-load-ahead"] } else { &[] };
        let mut there = self.start(stop, name, more, true)?;
        there.meets(Stop::Qemu(self.options.suite, Accel::Kvm))?;
        let lazily = lazy.then_some("postcopy-ram");
        let on: Vec<_> = std::iter::once("mapped-ram").chain(lazily).collect();
        there.monitor().set_capabilities(&on)?;
        let uri = match way {
            Way::Served => saved.server.uri.clone(),
            _ => format!("file:{}", self.image.display()),
        };
        there.monitor().execute("migrate-incoming", json!({ "uri": uri }))?;
        let resumed = there.monitor().wait_event("RESUME", PATIENCE)?.time.context("RESUME has no timestamp")?;
        // The pass that it was in is over, and one more.
        let progress = there.wait_progress("complete a pass", PATIENCE, |progress| progress.pass >= saved.pass + 2)?;
        let pass = begun.elapsed().as_secs_f64() * 1e3;
        ensure!(progress.stale == 0, "the guest found {} stale pages", progress.stale);
        let runs = resumed.checked_sub(at).context("the guest ran before its monitor")?;
        let reads = last_reads(&mut there)?.since(&saved.reads).slower(FAULT);
        let p99 = reads.quantile(0.99).filter(|_| lazy).map(|p99| p99.as_secs_f64() * 1e6);
        Ok((Sample { runs: runs.as_secs_f64() * 1e3, pass, p99 }, there))
    }

    /// What guests from one file take of the host's memory, each, MiB.
    fn side_by_side(&self, saved: &Saved) -> Result<f64> {
        let names: Vec<String> = (0..self.options.guests).map(|n| format!("guest{n}")).collect();
        let mut guests = Vec::new();
        for name in &names {
            let mut guest = self.load(Way::Lazy, saved, name)?.1;
            // It would go round for ever, and leave the others no processor.
            guest.monitor().execute("stop", Value::Null)?;
            guests.push(guest);
        }
        let mut kib = 0;
        for guest in &mut guests {
            let path = format!("/proc/{}/smaps_rollup", guest.monitor().pid());
            let text = fs::read_to_string(&path).with_context(|| path.clone())?;
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("smaps_rollup has no Pss")?;
            kib += line.trim().trim_end_matches(" kB").parse::<u64>()?;
        }
        for guest in guests {
            guest.end()?;
        }
        Ok(kib as f64 / 1024.0 / names.len() as f64)
    }
}
