//! How fast qevm reads a stream, next to QEMU's own `analyze-migration.py` in the same run.
//!
//! The stream is a [`machine`] whose memory is full of different pages. It is read once before anything is measured, so
//! that it is in the page cache; then the readers take turns, so that what else the machine does meets them all alike.
//! The figures are medians with the fastest and the slowest run. Every reader's answer is checked: a reader that fails
//! fast would win.
//!
//! [`link`] measures running guests over a limited `network` link, and [`figures`] holds what came out against QEMU's.
//! [`tool`] measures what writes images in another form beside `cp`.

pub mod figures;
pub mod link;
pub mod tool;
mod watch;

use crate::analyze::Script;
use crate::subject::Subject;
use crate::trial::machine;
use anyhow::{Context, Result, ensure};
use qevm_wire::QemuVersion;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// What skimming over RAM has to reach, bytes per second.
pub const SKIM_GOAL: f64 = 4e9;
/// What it may take of memory at most, bytes.
pub const MEMORY_GOAL: u64 = 64 << 20;

/// The script takes long, and its time varies little.
const SCRIPT_RUNS: u64 = 3;
const POLL: Duration = Duration::from_millis(1);
const TIMEOUT: Duration = Duration::from_secs(600);
const PAGE: usize = 4096;

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Guest RAM, MiB.
    pub mib: u64,
    /// How often each reader runs.
    pub repetitions: u64,
    /// Say nothing on the way.
    pub quiet: bool,
}

/// One reader's figures.
#[derive(Debug, Clone)]
pub struct Reader {
    /// What it is, as a key.
    pub name: &'static str,
    /// Wall time of each run, seconds, the fastest first.
    pub seconds: Vec<f64>,
    /// The largest resident set that was seen, bytes.
    pub peak_memory: u64,
}

impl Reader {
    /// The median of the wall times, seconds.
    pub fn median(&self) -> f64 {
        let half = self.seconds.len() / 2;
        match self.seconds.len() % 2 {
            1 => self.seconds[half],
            _ => (self.seconds[half - 1] + self.seconds[half]) / 2.0,
        }
    }
}

/// All figures.
#[derive(Debug, Clone)]
pub struct Report {
    /// Length of the stream, bytes.
    pub bytes: u64,
    /// The readers, the script last if there is one.
    pub readers: Vec<Reader>,
    /// Why there is no script, if there is none.
    pub without_script: Option<String>,
}

/// Measures reading.
///
/// # Errors
/// There is no room for the stream, or a reader fails or does not say about the stream what it should.
pub fn decode(options: &Options, subject: &Subject) -> Result<Report> {
    let scratch = tempfile::Builder::new().prefix("qevm-bench-").tempdir()?;
    let path = scratch.path().join("stream.qevm");
    let say = |line: String| {
        if !options.quiet {
            println!("{line}")
        }
    };
    if cfg!(debug_assertions) {
        say("this is a debug build: its figures mean nothing".into());
    }
    write(&path, options.mib << 20)?;
    let bytes = fs::metadata(&path)?.len();
    say(format!("a stream of {bytes} bytes, {} MiB of RAM in pages that all differ", options.mib));
    // The script comes over the network once; without it the other figures are still worth something.
    let (script, without_script) = match Script::install() {
        Ok(script) => (Some(script), None),
        Err(why) => (None, Some(format!("{why:#}"))),
    };
    let mut readers: Vec<Reader> = QEVM.iter().map(|(name, _)| Reader::new(name)).collect();
    readers.extend(script.as_ref().map(|_| Reader::new(SCRIPT)));
    io::copy(&mut File::open(&path)?, &mut io::sink())?;
    for round in 0..options.repetitions {
        for reader in &mut readers {
            let qevm = QEVM.iter().find(|(name, _)| *name == reader.name);
            let mut command = match (qevm, &script) {
                (Some((_, arguments)), _) => {
                    let mut command = subject.command();
                    command.args(*arguments).arg(&path);
                    command
                }
                (None, Some(script)) if round < SCRIPT_RUNS => script.command(&path),
                _ => continue,
            };
            let run = measure(&mut command).with_context(|| reader.name.to_owned())?;
            check(reader.name, &run.output, options.mib)?;
            reader.seconds.push(run.seconds);
            reader.peak_memory = reader.peak_memory.max(run.peak_memory);
        }
    }
    readers.iter_mut().for_each(|reader| reader.seconds.sort_by(f64::total_cmp));
    let report = Report { bytes, readers, without_script };
    say(report.text());
    Ok(report)
}

const SKIM: &str = "skim";
const SCRIPT: &str = "analyze-migration.py";
/// The readers of qevm.
const QEVM: [(&str, &[&str]); 3] = [
    (SKIM, &["inspect", "--json", "--no-digest"]),
    ("digest", &["inspect", "--json"]),
    ("verify", &["verify", "--json"]),
];

impl Reader {
    fn new(name: &'static str) -> Reader {
        Reader { name, seconds: Vec::new(), peak_memory: 0 }
    }
}

/// Every page is different, and none compresses.
fn write(path: &Path, memory: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let page = |_, content: &mut [u8; PAGE]| {
        for word in content.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        true
    };
    machine::write(QemuVersion::NEWEST, memory, &[0xf4; PAGE], page, &mut out)?;
    out.flush().with_context(|| format!("writing {}", path.display()))
}

struct Run {
    seconds: f64,
    peak_memory: u64,
    output: String,
}

fn measure(command: &mut Command) -> Result<Run> {
    // A file for the output, as a pipe that is not read would stop the reader.
    let output = tempfile::NamedTempFile::new()?;
    command.stdin(Stdio::null()).stdout(output.reopen()?).stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = command.spawn()?;
    let status = format!("/proc/{}/status", child.id());
    let mut peak_memory = 0;
    let ended = loop {
        if let Some(ended) = child.try_wait()? {
            break ended;
        }
        // The kernel's high-water mark: it misses nothing but what grows within the last moment.
        peak_memory = high_water(&status).unwrap_or(0).max(peak_memory);
        if started.elapsed() > TIMEOUT {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("still running after {} s", TIMEOUT.as_secs());
        }
        thread::sleep(POLL);
    };
    let seconds = started.elapsed().as_secs_f64();
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        io::Read::read_to_string(&mut stderr, &mut said)?;
    }
    ensure!(ended.success(), "{ended}: {}", said.trim_end());
    Ok(Run { seconds, peak_memory, output: fs::read_to_string(output.path())? })
}

/// Bytes.
fn high_water(status: &str) -> Option<u64> {
    let text = fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// A reader must have found the RAM block, with all its pages.
fn check(name: &str, output: &str, mib: u64) -> Result<()> {
    if name == SCRIPT {
        let read: Value = serde_json::from_str(output).context("the script printed no JSON")?;
        let mut sections = read.as_object().into_iter().flatten();
        let cpu = sections.any(|(name, fields)| name.starts_with("cpu (") && !fields["env.eip"].is_null());
        ensure!(cpu, "the script did not find the CPU");
        return Ok(());
    }
    let read: Value = serde_json::from_str(output.lines().last().unwrap_or_default())?;
    let pages = &read["ram"][0]["pages"];
    ensure!(read["ok"] == true && *pages == (mib << 20) / PAGE as u64, "{name} found {pages} pages: {}", read["error"]);
    Ok(())
}

impl Report {
    fn reader(&self, name: &str) -> Option<&Reader> {
        self.readers.iter().find(|reader| reader.name == name && !reader.seconds.is_empty())
    }

    fn rate(&self, seconds: f64) -> f64 {
        self.bytes as f64 / seconds
    }

    /// How many times as fast as the script.
    fn ratio(&self, reader: &Reader) -> Option<f64> {
        Some(self.reader(SCRIPT)?.median() / reader.median())
    }

    /// A table for people.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{:<22} {:>10} {:>18} {:>10} {:>12} {:>14}\n",
            "reader", "GB/s", "slowest..fastest", "median s", "peak memory", "times script"
        );
        for reader in self.readers.iter().filter(|reader| !reader.seconds.is_empty()) {
            let rate = |seconds: &f64| self.rate(*seconds) / 1e9;
            let spread = (reader.seconds.last().map_or(0.0, rate), reader.seconds.first().map_or(0.0, rate));
            let ratio = self.ratio(reader).map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.1}"));
            text += &format!(
                "{:<22} {:>10.2} {:>8.2}..{:<8.2} {:>10.3} {:>8} KiB {:>14}\n",
                reader.name,
                rate(&reader.median()),
                spread.0,
                spread.1,
                reader.median(),
                reader.peak_memory >> 10,
                ratio
            );
        }
        if let Some(why) = &self.without_script {
            text += &format!("no ratio to {SCRIPT}: {why}\n");
        }
        text + "goal of skim: 4 GB/s within 64 MiB; it jumps over page contents, digest and verify read every byte"
    }

    /// The figures for machines.
    pub fn json(&self) -> Value {
        let readers: serde_json::Map<String, Value> = self
            .readers
            .iter()
            .filter(|reader| !reader.seconds.is_empty())
            .map(|reader| {
                let figures = json!({
                    "bytes_per_second": self.rate(reader.median()),
                    "seconds": reader.seconds,
                    "peak_memory": reader.peak_memory,
                    "times_script": self.ratio(reader),
                });
                (reader.name.to_owned(), figures)
            })
            .collect();
        json!({
            "bytes": self.bytes,
            "readers": readers,
            "debug_build": cfg!(debug_assertions),
            "goal_reached": self.holds(),
            "without_script": self.without_script,
        })
    }

    /// Whether skimming over RAM is as fast, and as small, as it has to be.
    pub fn holds(&self) -> bool {
        self.reader(SKIM)
            .is_some_and(|skim| self.rate(skim.median()) >= SKIM_GOAL && (1..=MEMORY_GOAL).contains(&skim.peak_memory))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(skim: &[f64], peak_memory: u64) -> Report {
        let reader = |name, seconds: &[f64]| Reader { name, seconds: seconds.to_vec(), peak_memory };
        Report {
            bytes: 1_000_000_000,
            readers: vec![reader(SKIM, skim), reader(SCRIPT, &[4.0, 6.0])],
            without_script: None,
        }
    }

    #[test]
    fn the_median_decides() {
        assert!(report(&[0.1, 0.2, 9.0], 1 << 20).holds());
        assert!(!report(&[0.1, 0.26, 0.27], 1 << 20).holds());
        assert!(!report(&[0.1], 65 << 20).holds());
        assert!(!report(&[0.1], 0).holds(), "memory that was not measured");
        assert_eq!(report(&[0.1, 0.2, 9.0], 1).json()["readers"]["skim"]["times_script"], 25.0);
    }
}
