//! How fast a guest moves, over the main channel alone and over page channels: real QEMU and reference-vmm in every pairing, in one run.
//!
//! A stopped guest whose memory is random numbers, or zeros, goes from QEMU to QEMU, on to reference-vmm, to another reference-vmm and back
//! to QEMU; then the next repetition begins. So the pairings take turns, and a machine that becomes slower or faster meanwhile does
//! so for all of them. Every destination has its memory from the host before it starts, unless that is to be measured as well. Numbers mean something only on a machine that does nothing else.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::party::{Monitor, Party};
use super::{Load, Stage, Stop};
use crate::processor_time;
use crate::roots::{Root, Suite};
use crate::scenario::Accel;

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

/// Measures every number of channels with every method, tells each migration and each median, and gives all medians.
///
/// # Errors
/// A monitor does not start, or a migration fails.
pub fn migrate(options: &Options, program: &Monitor, mut tell: impl FnMut(&str)) -> Result<Value> {
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
    let mut results = Vec::new();
    for way in Way::all(options) {
        let mut samples: BTreeMap<String, Vec<Sample>> = BTreeMap::new();
        for _ in 0..options.repetitions {
            let image = &images[&way.content];
            let run = Run { options, program, roots: &roots, scratch: scratch.path(), image, way };
            for (pairing, sample) in run.chain()? {
                tell(&format!(
                    "{way} {pairing}: {:.2} s, CPU {:.2} s and {:.2} s",
                    sample.seconds, sample.source_cpu, sample.destination_cpu
                ));
                samples.entry(pairing).or_default().push(sample);
            }
        }
        let baseline = Medians::of(&samples[PAIRINGS[0]], options.mib);
        for pairing in PAIRINGS {
            let medians = Medians::of(&samples[pairing], options.mib);
            tell(&medians.line(&format!("{:<24} {pairing:<9}", way.to_string()), &baseline));
            results.push(medians.json(&way, pairing, &baseline));
        }
    }
    Ok(
        json!({ "qemu": options.suite.series(), "mib": options.mib, "repetitions": options.repetitions, "fresh": options.fresh, "results": results }),
    )
}

/// The pairings in the order of the guest's way; the first is what the others are compared with.
const PAIRINGS: [&str; 4] = ["qemu>qemu", "qemu>ref", "ref>ref", "ref>qemu"];

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
}

impl<'o> Way<'o> {
    fn all(options: &'o Options) -> Vec<Way<'o>> {
        let main = |transport, content| Way { transport, content, multifd: None };
        let alone = [main("tcp", Content::Random), main("unix", Content::Random), main("tcp", Content::Zeros)];
        let channels = options.methods.iter().flat_map(|method| {
            let way = |&channels| Way { multifd: Some((channels, method.as_str())), ..main("tcp", Content::Random) };
            options.channels.iter().map(way)
        });
        alone.into_iter().filter(|_| options.main_channel).chain(channels).collect()
    }
}

impl fmt::Display for Way<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Way { transport, content, multifd } = self;
        match multifd {
            Some((channels, method)) => write!(f, "{transport} {channels} x {method}")?,
            None => write!(f, "{transport} main channel")?,
        }
        if *content == Content::Zeros { f.write_str(", zeros") } else { Ok(()) }
    }
}

struct Run<'r> {
    options: &'r Options,
    program: &'r Monitor,
    roots: &'r BTreeMap<Suite, Root>,
    scratch: &'r Path,
    image: &'r Path,
    way: Way<'r>,
}

impl Run<'_> {
    fn chain(&self) -> Result<Vec<(String, Sample)>> {
        let qemu = Stop::Qemu(self.options.suite, Accel::Kvm);
        // The name that QEMU gives the RAM of a machine without a backend.
        let backend = format!(
            "memory-backend-file,id=microvm.ram,x-use-canonical-path-for-ramblock-id=off,size={}M,share=on,mem-path={}",
            self.options.mib,
            self.image.display()
        );
        let stopped = ["-S", "-machine", "memory-backend=microvm.ram", "-object", backend.leak()];
        let mut here = self.start(qemu, 0, &stopped, false)?;
        let mut samples = Vec::new();
        for (n, (pairing, stop)) in (1..).zip(PAIRINGS.into_iter().zip([qemu, Stop::Reference, Stop::Reference, qemu]))
        {
            let mut there = self.start(stop, n, &[], true)?;
            let sample = self.hop(&mut here, &mut there).with_context(|| format!("{pairing}, {}", self.way))?;
            samples.push((pairing.to_owned(), sample));
            std::mem::replace(&mut here, there).end()?;
        }
        here.end()?;
        Ok(samples)
    }

    fn start(&self, stop: Stop, n: usize, more: &[&'static str], incoming: bool) -> Result<Party> {
        let load = Load { memory: self.options.mib, mem_prealloc: !self.options.fresh, ..Load::default() };
        let stage = Stage { roots: self.roots, program: self.program, scratch: self.scratch, more };
        let root = match stop {
            Stop::Qemu(suite, _) => self.roots.get(&suite),
            Stop::Reference => None,
        };
        Party::start(stop, root, &stage, &load, &format!("stop{n}"), incoming, false)
    }

    fn hop(&self, here: &mut Party, there: &mut Party) -> Result<Sample> {
        here.meets(there.stop())?;
        there.meets(here.stop())?;
        for party in [&mut *here, &mut *there] {
            party.monitor().set_capabilities(&["return-path"])?;
            if let Some((channels, method)) = self.way.multifd {
                party.monitor().set_capabilities(&["multifd"])?;
                let parameters = json!({ "multifd-channels": channels, "multifd-compression": method });
                party.monitor().set_parameters(&parameters)?;
            }
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

/// Median, lowest and highest of a figure.
#[derive(Debug, Clone, Copy)]
struct Spread {
    median: f64,
    low: f64,
    high: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Spread {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => (values[middle - 1] + values[middle]) / 2.0,
            _ => values[middle],
        };
        Spread { median, low: values[0], high: values[values.len() - 1] }
    }

    fn json(self) -> Value {
        json!({ "median": self.median, "low": self.low, "high": self.high })
    }
}

/// Figures of a pairing: 10⁹ bytes per second, and CPU seconds per GiB of guest memory.
struct Medians {
    throughput: Spread,
    source: Spread,
    destination: Spread,
    /// Source and destination together.
    both: Spread,
}

impl Medians {
    fn of(samples: &[Sample], mib: u32) -> Medians {
        let (bytes, gib) = (f64::from(mib) * 1_048_576.0, f64::from(mib) / 1024.0);
        Medians {
            throughput: Spread::of(samples.iter().map(|sample| bytes / 1e9 / sample.seconds)),
            source: Spread::of(samples.iter().map(|sample| sample.source_cpu / gib)),
            destination: Spread::of(samples.iter().map(|sample| sample.destination_cpu / gib)),
            both: Spread::of(samples.iter().map(|sample| (sample.source_cpu + sample.destination_cpu) / gib)),
        }
    }

    /// Throughput, and CPU of the source, of the destination and of both, as multiples of those of QEMU to QEMU.
    fn ratios(&self, baseline: &Medians) -> [f64; 4] {
        [
            self.throughput.median / baseline.throughput.median,
            self.source.median / baseline.source.median,
            self.destination.median / baseline.destination.median,
            self.both.median / baseline.both.median,
        ]
    }

    fn line(&self, name: &str, baseline: &Medians) -> String {
        let [throughput, source, destination, both] = self.ratios(baseline);
        format!(
            "{name} {:6.3} GB/s ({:.3} to {:.3}) {throughput:5.2}x, CPU-s/GiB source {:.2} {source:5.2}x destination {:.2} \
             {destination:5.2}x both {:.2} ({:.2} to {:.2}) {both:5.2}x",
            self.throughput.median,
            self.throughput.low,
            self.throughput.high,
            self.source.median,
            self.destination.median,
            self.both.median,
            self.both.low,
            self.both.high,
        )
    }

    fn json(&self, way: &Way<'_>, pairing: &str, baseline: &Medians) -> Value {
        let [throughput, source, destination, both] = self.ratios(baseline);
        json!({
            "transport": way.transport, "content": way.content.name(),
            "method": way.multifd.map(|(_, method)| method), "channels": way.multifd.map_or(0, |(channels, _)| channels),
            "pairing": pairing,
            "gb_per_s": self.throughput.json(), "source_cpu_s_per_gib": self.source.json(),
            "destination_cpu_s_per_gib": self.destination.json(), "both_cpu_s_per_gib": self.both.json(),
            "ratio": { "throughput": throughput, "source_cpu": source, "destination_cpu": destination, "both_cpu": both },
        })
    }
}

/// Fills a file with numbers that no method can compress (xorshift64*).
fn fill(path: &Path, len: u64) -> Result<()> {
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
        let slow = Medians::of(&[sample(4.0, 2.0), sample(2.0, 1.0), sample(8.0, 4.0)], 1024);
        let fast = Medians::of(&[sample(1.0, 1.0), sample(3.0, 1.0)], 1024);
        assert_eq!((slow.throughput.median, slow.source.low), (1.073_741_824 / 4.0, 1.0));
        let ratios = fast.ratios(&slow);
        let expected = [8.0 / 3.0, 0.5, 0.5, 0.5];
        assert!(ratios.iter().zip(expected).all(|(ratio, expected)| (ratio - expected).abs() < 1e-9), "{ratios:?}");
    }
}
