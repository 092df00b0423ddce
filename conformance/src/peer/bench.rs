//! How fast a guest moves, over the main channel alone and over page channels: real QEMU and reference-vmm in every
//! pairing, in one run.
//!
//! A stopped guest whose memory is random numbers, or zeros, goes from QEMU to QEMU, on to reference-vmm, to another
//! reference-vmm and back to QEMU; from there it goes the same way with another reference-vmm, if there is one to
//! compare with, and then the next repetition begins. So the pairings take turns, and a machine that becomes slower or
//! faster meanwhile does so for all of them: ratios are those within a repetition. Every destination has its memory
//! from the host before it starts, unless that is to be measured as well. Numbers mean something only on a machine that
//! does nothing else.

use super::endpoint::Endpoint;
use super::monitor::Monitor;
use super::{Env, Load, Secured, Stop, Version};
use crate::bench::figures::Summary;
use crate::processor_time;
use crate::roots::{Root, Suite};
use crate::scenario::Accel;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long one migration may take: zlib on two busy processors needs minutes for 2 GiB.
const PATIENCE: Duration = Duration::from_secs(600);
const POLL: Duration = Duration::from_millis(5);
/// Far above what any machine does.
const NO_LIMIT: u64 = 1 << 40;

/// What is measured.
#[derive(Debug, Clone)]
pub struct Options {
    /// Guest RAM, MiB.
    pub mib: u32,
    /// How often each pairing is measured.
    pub repetitions: u64,
    /// Numbers of page channels; each goes with each method.
    pub channels: Vec<u64>,
    /// Values of `multifd-compression`.
    pub methods: Vec<String>,
    /// The main channel alone is measured, too: over TCP and a UNIX socket, and a guest of zeros over TCP.
    pub main_channel: bool,
    /// Destinations do not touch their memory before pages arrive.
    pub fresh: bool,
    /// All channels are TLS sessions of this version. Both libraries agree on AES-256 in GCM by themselves.
    pub tls: Option<Version>,
    /// The release of QEMU.
    pub suite: Suite,
}

/// One migration.
#[derive(Debug, Clone, Copy)]
struct Sample {
    seconds: f64,
    source_cpu: f64,
    destination_cpu: f64,
}

impl Sample {
    /// Of source and destination, seconds.
    fn both(&self) -> f64 {
        self.source_cpu + self.destination_cpu
    }
}

/// Measures every number of channels with every method, tells each migration and each median, and gives all medians.
/// `before` are other builds of reference-vmm, which take turns with `program`.
///
/// # Errors
/// A monitor does not start, or a migration fails.
pub fn migrate(options: &Options, program: &Monitor, before: &[Monitor], mut tell: impl FnMut(&str)) -> Result<Value> {
    ensure!(options.repetitions > 0, "nothing to measure");
    let scratch = tempfile::Builder::new().prefix("qevm-bench-").tempdir()?;
    // On tmpfs where there is one, so that no disk takes part.
    let shm = Path::new("/dev/shm");
    let memory_folder =
        tempfile::Builder::new().prefix("qevm-bench-").tempdir_in(if shm.is_dir() { shm } else { scratch.path() })?;
    let images = [Content::Random, Content::Zeros].map(|content| (content, memory_folder.path().join(content.name())));
    for (content, image) in &images {
        content.fill(image, u64::from(options.mib) << 20)?;
    }
    let images = BTreeMap::from(images);
    let roots = BTreeMap::from([(options.suite, Root::install(options.suite)?)]);
    let programs: Vec<&Monitor> = std::iter::once(program).chain(before).collect();
    let mut results = Vec::new();
    for way in Way::all(options) {
        let mut samples: BTreeMap<Pairing, Vec<Sample>> = BTreeMap::new();
        for repetition in 0..options.repetitions {
            let image = &images[&way.content];
            let run = Run { options, programs: &programs, roots: &roots, scratch: scratch.path(), image, way };
            for (pairing, sample) in run.chain(repetition)? {
                tell(&format!(
                    "{way} {pairing}: {:.2} s, CPU {:.2} s and {:.2} s",
                    sample.seconds, sample.source_cpu, sample.destination_cpu
                ));
                samples.entry(pairing).or_default().push(sample);
            }
        }
        for (pairing, ours) in &samples {
            let medians = Medians::of(ours, options.mib).context("no samples")?;
            tell(&format!("{:<24} {:<18} {}", way.to_string(), pairing.to_string(), medians.line()));
            let mut result = way.json(&pairing.to_string(), &medians);
            for (of, theirs) in pairing.measures().filter_map(|(of, other)| Some((of, samples.get(&other)?))) {
                let ratios = Medians::ratios(ours, theirs).context("no samples")?;
                tell(&format!("{:<24} {:<18} {}", "", "", ratios.ratio_line(of)));
                result[format!("times_{of}")] = ratios.json();
            }
            results.push(result);
        }
    }
    Ok(
        json!({ "qemu": options.suite.series(), "mib": options.mib, "repetitions": options.repetitions, "fresh": options.fresh, "results": results }),
    )
}

/// Who sends to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pairing {
    route: Route,
    /// Which reference-vmm: 0 is the one under judgement.
    program: usize,
}

/// In the order of the guest's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Route {
    QemuToQemu,
    QemuToReference,
    ReferenceToReference,
    ReferenceToQemu,
}

impl Pairing {
    /// What the others are compared with.
    const BASELINE: Pairing = Pairing { route: Route::QemuToQemu, program: 0 };

    /// The way of the guest in one repetition: a machine may be faster at its beginning, so no program always comes
    /// first.
    fn chain(programs: usize, repetition: u64) -> Vec<Pairing> {
        let first = (repetition % programs as u64) as usize;
        let routes = [Route::QemuToReference, Route::ReferenceToReference, Route::ReferenceToQemu];
        let turns = (0..programs).map(|n| (first + n) % programs);
        let turns = turns.flat_map(|program| routes.map(|route| Pairing { route, program }));
        std::iter::once(Pairing::BASELINE).chain(turns).collect()
    }

    fn destination(self, qemu: Stop) -> Stop {
        match self.route {
            Route::QemuToQemu | Route::ReferenceToQemu => qemu,
            Route::QemuToReference | Route::ReferenceToReference => Stop::Reference,
        }
    }

    /// What it is a multiple of: QEMU's figures and those of the first reference-vmm to compare with.
    fn measures(self) -> impl Iterator<Item = (&'static str, Pairing)> {
        let qemu = (self != Pairing::BASELINE).then_some(("qemu", Pairing::BASELINE));
        let before = (self.program == 0).then_some(("before", Pairing { program: 1, ..self }));
        qemu.into_iter().chain(before)
    }
}

impl fmt::Display for Pairing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.route {
            Route::QemuToQemu => "qemu>qemu",
            Route::QemuToReference => "qemu>ref",
            Route::ReferenceToReference => "ref>ref",
            Route::ReferenceToQemu => "ref>qemu",
        })?;
        match self.program {
            0 => Ok(()),
            1 => f.write_str(" before"),
            n => write!(f, " before {n}"),
        }
    }
}

/// What guest memory is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Content {
    /// Numbers that no method can compress.
    Random,
    /// Zeros, of which only headers are sent.
    Zeros,
}

impl Content {
    fn name(self) -> &'static str {
        match self {
            Content::Random => "random",
            Content::Zeros => "zeros",
        }
    }

    fn fill(self, path: &Path, len: u64) -> Result<()> {
        match self {
            Content::Random => fill(path, len),
            Content::Zeros => Ok(File::create(path)?.set_len(len)?),
        }
    }
}

/// What a guest travels over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Way<'o> {
    transport: &'static str,
    content: Content,
    /// Number of page channels, and their method.
    multifd: Option<(u64, &'o str)>,
    tls: Option<Version>,
}

impl<'o> Way<'o> {
    fn all(options: &'o Options) -> Vec<Way<'o>> {
        let main = |transport, content| Way { transport, content, multifd: None, tls: options.tls };
        let alone = [main("tcp", Content::Random), main("unix", Content::Random), main("tcp", Content::Zeros)];
        let channels = options.methods.iter().flat_map(|method| {
            let way = |&channels| Way { multifd: Some((channels, method.as_str())), ..main("tcp", Content::Random) };
            options.channels.iter().map(way)
        });
        alone.into_iter().filter(|_| options.main_channel).chain(channels).collect()
    }

    fn json(&self, pairing: &str, medians: &Medians) -> Value {
        json!({
            "transport": self.transport, "content": self.content.name(),
            "method": self.multifd.map(|(_, method)| method), "channels": self.multifd.map_or(0, |(channels, _)| channels),
            "tls": self.tls.map(Version::name), "pairing": pairing,
            "gb_per_s": medians.throughput, "source_cpu_s_per_gib": medians.source,
            "destination_cpu_s_per_gib": medians.destination, "both_cpu_s_per_gib": medians.both,
        })
    }
}

impl fmt::Display for Way<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Way { transport, content, multifd, tls } = self;
        match multifd {
            Some((channels, method)) => write!(f, "{transport} {channels} x {method}")?,
            None => write!(f, "{transport} main channel")?,
        }
        if let Some(version) = tls {
            write!(f, ", {}", version.name())?;
        }
        if *content == Content::Zeros { f.write_str(", zeros") } else { Ok(()) }
    }
}

struct Run<'r> {
    options: &'r Options,
    programs: &'r [&'r Monitor],
    roots: &'r BTreeMap<Suite, Root>,
    scratch: &'r Path,
    image: &'r Path,
    way: Way<'r>,
}

impl Run<'_> {
    fn chain(&self, repetition: u64) -> Result<Vec<(Pairing, Sample)>> {
        let qemu = Stop::Qemu(self.options.suite, Accel::Kvm);
        // The name that QEMU gives the RAM of a machine without a backend.
        let backend = format!(
            "memory-backend-file,id=microvm.ram,x-use-canonical-path-for-ramblock-id=off,size={}M,share=on,mem-path={}",
            self.options.mib,
            self.image.display()
        );
        let stopped = ["-S", "-machine", "memory-backend=microvm.ram", "-object", backend.leak()];
        let mut here = self.start(qemu, self.programs[0], 0, &stopped, false)?;
        let mut samples = Vec::new();
        for (n, pairing) in (1..).zip(Pairing::chain(self.programs.len(), repetition)) {
            let program = self.programs[pairing.program];
            let mut there = self.start(pairing.destination(qemu), program, n, &[], true)?;
            let sample = self.hop(&mut here, &mut there).with_context(|| format!("{pairing}, {}", self.way))?;
            samples.push((pairing, sample));
            std::mem::replace(&mut here, there).end()?;
        }
        here.end()?;
        Ok(samples)
    }

    fn start(
        &self,
        stop: Stop,
        program: &Monitor,
        n: usize,
        more: &[&'static str],
        incoming: bool,
    ) -> Result<Endpoint> {
        let load = Load { memory: self.options.mib, mem_prealloc: !self.options.fresh, ..Load::default() };
        let env = Env { roots: self.roots, program, scratch: self.scratch, more };
        let root = match stop {
            Stop::Qemu(suite, _) => self.roots.get(&suite),
            Stop::Reference => None,
        };
        Endpoint::start(stop, root, &env, &load, &format!("stop{n}"), incoming, false)
    }

    fn hop(&self, here: &mut Endpoint, there: &mut Endpoint) -> Result<Sample> {
        here.meets(there.stop())?;
        there.meets(here.stop())?;
        for endpoint in [&mut *here, &mut *there] {
            endpoint.monitor().set_capabilities(&["return-path"])?;
            if let Some((channels, method)) = self.way.multifd {
                endpoint.monitor().set_capabilities(&["multifd"])?;
                let parameters = json!({ "multifd-channels": channels, "multifd-compression": method });
                endpoint.monitor().set_parameters(&parameters)?;
            }
        }
        if let Some(version) = self.way.tls {
            Secured { version, authz: false, flaw: None }.arm(here, there, self.scratch)?;
        }
        here.monitor().set_parameters(&json!({ "max-bandwidth": NO_LIMIT, "downtime-limit": 300 }))?;
        let path = self.scratch.join("migration");
        let to =
            if self.way.transport == "unix" { format!("unix:{}", path.display()) } else { "tcp:127.0.0.1:0".into() };
        there.monitor().execute("migrate-incoming", json!({ "uri": to }))?;
        let waiting = there.monitor().migration()?;
        let to = match waiting["socket-address"][0]["port"].as_str() {
            Some(port) => format!("tcp:127.0.0.1:{port}"),
            None => to,
        };
        let cpus = (cpu_seconds(here.monitor().pid())?, cpu_seconds(there.monitor().pid())?);
        let begun = Instant::now();
        here.monitor().execute("migrate", json!({ "uri": to }))?;
        here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
        while there.monitor().execute("query-status", Value::Null)?["status"] == "inmigrate" {
            ensure!(begun.elapsed() < PATIENCE, "the guest did not arrive");
            std::thread::sleep(POLL);
        }
        let seconds = begun.elapsed().as_secs_f64();
        let source_cpu = cpu_seconds(here.monitor().pid())? - cpus.0;
        let destination_cpu = cpu_seconds(there.monitor().pid())? - cpus.1;
        Ok(Sample { seconds, source_cpu, destination_cpu })
    }
}

/// Figures of a pairing: 10⁹ bytes per second, and CPU seconds per GiB of guest memory.
struct Medians {
    throughput: Summary,
    source: Summary,
    destination: Summary,
    /// Source and destination together.
    both: Summary,
}

impl Medians {
    fn of(samples: &[Sample], mib: u32) -> Option<Medians> {
        let (bytes, gib) = (f64::from(mib) * 1_048_576.0, f64::from(mib) / 1024.0);
        Some(Medians {
            throughput: Summary::of(samples.iter().map(|sample| bytes / 1e9 / sample.seconds))?,
            source: Summary::of(samples.iter().map(|sample| sample.source_cpu / gib))?,
            destination: Summary::of(samples.iter().map(|sample| sample.destination_cpu / gib))?,
            both: Summary::of(samples.iter().map(|sample| sample.both() / gib))?,
        })
    }

    /// How many times as much as `others`, which were taken in the same repetitions.
    fn ratios(samples: &[Sample], others: &[Sample]) -> Option<Medians> {
        let of = |figure: fn(&Sample) -> f64| Summary::of_ratios(samples.iter().map(figure), others.iter().map(figure));
        Some(Medians {
            throughput: of(|sample| 1.0 / sample.seconds)?,
            source: of(|sample| sample.source_cpu)?,
            destination: of(|sample| sample.destination_cpu)?,
            both: of(Sample::both)?,
        })
    }

    fn line(&self) -> String {
        format!(
            "{:6.3} GB/s ({:.3} to {:.3}), CPU-s/GiB source {:.2} destination {:.2} both {:.2} ({:.2} to {:.2})",
            self.throughput.median,
            self.throughput.min,
            self.throughput.max,
            self.source.median,
            self.destination.median,
            self.both.median,
            self.both.min,
            self.both.max,
        )
    }

    fn ratio_line(&self, of: &str) -> String {
        format!(
            "times {of}: throughput {}, CPU source {} destination {} both {}",
            self.throughput.ratio(),
            self.source.ratio(),
            self.destination.ratio(),
            self.both.ratio(),
        )
    }

    fn json(&self) -> Value {
        json!({ "throughput": self.throughput, "source_cpu": self.source, "destination_cpu": self.destination, "both_cpu": self.both })
    }
}

/// Fills a file with numbers that no method can compress (xorshift64*).
pub(super) fn fill(path: &Path, len: u64) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..len / 8 {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        file.write_all(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes())?;
    }
    file.flush().with_context(|| format!("writing {}", path.display()))
}

fn cpu_seconds(pid: u32) -> Result<f64> {
    Ok(processor_time::of(pid)?.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios_are_those_of_the_samples() {
        let sample = |seconds: f64, cpu: f64| Sample { seconds, source_cpu: cpu, destination_cpu: 2.0 * cpu };
        let slow = [sample(4.0, 2.0), sample(2.0, 1.0), sample(8.0, 4.0)];
        let fast = [sample(1.0, 1.0), sample(1.0, 1.0), sample(4.0, 1.0)];
        let medians = Medians::of(&slow, 1024).unwrap();
        assert_eq!((medians.throughput.median, medians.source.min), (1.073_741_824 / 4.0, 1.0));
        let ratios = Medians::ratios(&fast, &slow).unwrap();
        let both = Summary { median: 0.5, min: 0.25, max: 1.0, lower_quartile: 0.375, upper_quartile: 0.75 };
        assert_eq!((ratios.throughput.median, ratios.both), (2.0, both));
    }

    #[test]
    fn every_build_takes_its_turn_at_every_place() {
        let line =
            |repetition| Pairing::chain(2, repetition).iter().map(Pairing::to_string).collect::<Vec<_>>().join(", ");
        let (after, before) = ("qemu>ref, ref>ref, ref>qemu", "qemu>ref before, ref>ref before, ref>qemu before");
        assert_eq!(line(0), format!("qemu>qemu, {after}, {before}"));
        assert_eq!(line(1), format!("qemu>qemu, {before}, {after}"));
        assert_eq!(line(2), line(0));
        // And each leg begins where the one before has ended.
        let mut here = Stop::Qemu(Suite::Sid, Accel::Kvm);
        for pairing in Pairing::chain(3, 1) {
            let from_qemu = matches!(pairing.route, Route::QemuToQemu | Route::QemuToReference);
            assert_eq!(here != Stop::Reference, from_qemu, "{pairing}");
            here = pairing.destination(Stop::Qemu(Suite::Sid, Accel::Kvm));
        }
    }
}
