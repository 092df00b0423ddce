//! What the tool costs beside what it cannot do without: `extract` and `convert` beside `cp` of the same image, and
//! `inspect` without digests beside one with them.
//!
//! Each repetition runs a command and what it is held against one after the other, now the one first and now the other,
//! on an image in the page cache. What is written is deleted after each run. Wall time is of the whole process,
//! processor time what the kernel counts of it in hundredths of a second.

use super::figures::Summary;
use super::{check, measure, write};
use crate::subject::Subject;
use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;

/// How many times `cp`'s time writing an image in another form may take.
const WRITING: f64 = 1.5;
/// How many times the time with digests looking may take without.
const LOOKING: f64 = 1.0;

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Guest RAM, MiB.
    pub mib: u64,
    /// How often each pair runs.
    pub repetitions: u64,
}

/// A command of the tool and what it is held against.
struct Pair {
    name: &'static str,
    /// In arguments, OUT is the file that is written; the image comes last.
    arguments: &'static [&'static str],
    /// The tool with these arguments; `cp` if there are none.
    against: &'static [&'static str],
    goal: f64,
}

const LOOK: &[&str] = &["inspect", "--json"];
/// On a plain stream.
const PLAIN: [Pair; 5] = [
    writes("plain: extract --memory", &["extract", "--memory", "OUT"]),
    writes("plain: extract --elf", &["extract", "--elf", "OUT"]),
    writes("plain: convert to mapped-ram", &["convert", "--format", "mapped-ram", "--out", "OUT"]),
    writes("plain: convert to plain", &["convert", "--out", "OUT"]),
    Pair {
        name: "plain: inspect --no-digest",
        arguments: &["inspect", "--json", "--no-digest"],
        against: LOOK,
        goal: LOOKING,
    },
];
/// On a mapped-ram file.
const MAPPED: [Pair; 4] = [
    writes("mapped-ram: extract --memory", &["extract", "--memory", "OUT"]),
    writes("mapped-ram: convert to mapped-ram", &["convert", "--format", "mapped-ram", "--out", "OUT"]),
    writes("mapped-ram: convert to plain", &["convert", "--out", "OUT"]),
    Pair {
        name: "mapped-ram: inspect --no-digest",
        arguments: &["inspect", "--json", "--no-digest"],
        against: LOOK,
        goal: LOOKING,
    },
];

const fn writes(name: &'static str, arguments: &'static [&'static str]) -> Pair {
    Pair { name, arguments, against: &[], goal: WRITING }
}

/// What one run took, seconds.
#[derive(Debug, Clone, Copy)]
struct Taken {
    wall: f64,
    processor: f64,
}

/// The figures of a pair.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What ran, on what.
    pub name: &'static str,
    /// What it may take at most, as a multiple of what it is held against.
    pub goal: f64,
    /// Wall time, seconds.
    pub wall: Compared,
    /// Processor time, seconds.
    pub processor: Compared,
}

/// A figure of both sides.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Compared {
    /// The tool's.
    pub ours: Summary,
    /// Of what it is held against.
    pub reference: Summary,
    /// One by the other, in each repetition.
    pub ratio: Summary,
}

impl Compared {
    fn of(ours: &[f64], reference: &[f64]) -> Option<Compared> {
        let all = |values: &[f64]| Summary::of(values.iter().copied());
        let ratio = Summary::of_ratios(ours.iter().copied(), reference.iter().copied())?;
        Some(Compared { ours: all(ours)?, reference: all(reference)?, ratio })
    }
}

impl Row {
    fn of(pair: &Pair, runs: &[[Taken; 2]]) -> Option<Row> {
        let compared = |figure: fn(&Taken) -> f64| {
            let [ours, reference] = [0, 1].map(|side| runs.iter().map(|run| figure(&run[side])).collect::<Vec<_>>());
            Compared::of(&ours, &reference)
        };
        let (wall, processor) = (compared(|taken| taken.wall)?, compared(|taken| taken.processor)?);
        Some(Row { name: pair.name, goal: pair.goal, wall, processor })
    }

    /// Both medians are within the goal.
    pub fn holds(&self) -> bool {
        [self.wall, self.processor].iter().all(|figure| figure.ratio.median <= self.goal)
    }

    fn line(&self) -> String {
        let figure = |figure: &Compared| {
            format!("{:.2} / {:.2} s, {}", figure.ours.median, figure.reference.median, figure.ratio.ratio())
        };
        let (word, wall, processor) =
            (if self.holds() { "ok" } else { "MISS" }, figure(&self.wall), figure(&self.processor));
        format!("{word:<4} {:<34} wall {wall:<36} CPU {processor:<36} goal {}", self.name, self.goal)
    }
}

/// All figures.
#[derive(Debug, Clone)]
pub struct Report {
    /// Length of the plain stream, bytes.
    pub bytes: u64,
    /// A row for each pair.
    pub rows: Vec<Row>,
}

impl Report {
    /// Every goal is reached.
    pub fn holds(&self) -> bool {
        !self.rows.is_empty() && self.rows.iter().all(Row::holds)
    }

    /// The figures for machines.
    pub fn json(&self) -> Value {
        json!({
            "bytes": self.bytes,
            "rows": self.rows,
            "missed": self.rows.iter().filter(|row| !row.holds()).map(|row| row.name).collect::<Vec<_>>(),
            "debug_build": cfg!(debug_assertions),
            "goal_reached": self.holds(),
        })
    }
}

/// Measures it. `tell` gets lines for people.
///
/// # Errors
/// There is no room for the image and what is made of it (twice its size), or a command fails.
pub fn tool(options: &Options, subject: &Subject, tell: impl Fn(&str)) -> Result<Report> {
    let scratch = tempfile::Builder::new().prefix("qevm-bench-").tempdir()?;
    let [plain, mapped, out] = ["plain.qevm", "mapped.qevm", "out"].map(|name| scratch.path().join(name));
    write(&plain, options.mib << 20)?;
    let bytes = fs::metadata(&plain)?.len();
    tell(&format!("an image of {bytes} bytes, {} MiB of RAM in pages that all differ; ours / reference", options.mib));
    let mut rows = Vec::new();
    for (image, pairs) in [(&plain, &PLAIN[..]), (&mapped, &MAPPED[..])] {
        if image == &mapped {
            measure(subject.command().args(["convert", "--format", "mapped-ram", "--out"]).args([&mapped, &plain]))?;
            fs::remove_file(&plain)?;
        }
        io::copy(&mut File::open(image)?, &mut io::sink())?;
        for pair in pairs {
            let mut runs = Vec::new();
            for number in 0..options.repetitions {
                let ours = || run(subject, pair.arguments, image, &out, options.mib);
                let reference = || run(subject, pair.against, image, &out, options.mib);
                let taken = match number % 2 {
                    0 => {
                        let first = reference()?;
                        [ours()?, first]
                    }
                    _ => [ours()?, reference()?],
                };
                runs.push(taken);
            }
            if let Some(row) = Row::of(pair, &runs) {
                tell(&row.line());
                rows.push(row);
            }
        }
    }
    Ok(Report { bytes, rows })
}

fn run(subject: &Subject, arguments: &[&str], image: &Path, out: &Path, mib: u64) -> Result<Taken> {
    let mut command = match arguments {
        [] => Command::new("cp"),
        arguments => {
            let mut command = subject.command();
            command.args(arguments.iter().map(|word| if *word == "OUT" { out.as_os_str() } else { word.as_ref() }));
            command
        }
    };
    command.arg(image);
    if arguments.is_empty() {
        command.arg(out);
    }
    let before = children()?;
    let run = measure(&mut command).with_context(|| format!("{command:?}"))?;
    let taken = Taken { wall: run.seconds, processor: children()? - before };
    match arguments.first() {
        Some(&"inspect") => check("inspect", &run.output, mib)?,
        _ => {
            let len = fs::metadata(out)?.len();
            anyhow::ensure!(len >= mib << 20, "{command:?} wrote {len} bytes");
            fs::remove_file(out)?;
        }
    }
    Ok(taken)
}

/// Processor time of all children that have ended, seconds.
fn children() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat").context("reading /proc/self/stat")?;
    // The program's name, in parentheses, may contain blanks. After it come, among others, cutime and cstime (proc(5)).
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok());
    let both = ticks(13).zip(ticks(14)).context("/proc/self/stat has no processor times")?;
    Ok((both.0 + both.1) / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ours: [f64; 2], reference: [f64; 2]) -> Row {
        let taken = |[wall, processor]: [f64; 2]| Taken { wall, processor };
        Row::of(&PLAIN[0], &[[taken(ours), taken(reference)]]).unwrap()
    }

    #[test]
    fn both_times_have_to_be_within_the_goal() {
        assert!(row([1.5, 3.0], [1.0, 2.0]).holds());
        assert!(!row([1.6, 3.0], [1.0, 2.0]).holds());
        assert!(!row([1.5, 3.1], [1.0, 2.0]).holds());
        let report = Report { bytes: 1, rows: vec![row([1.6, 3.0], [1.0, 2.0])] };
        assert!(!report.holds() && !Report { rows: Vec::new(), ..report.clone() }.holds());
        assert_eq!(report.json()["missed"][0], PLAIN[0].name);
    }

    #[test]
    fn a_child_that_ended_counts() {
        let before = children().unwrap();
        let spin = "i=0; while [ $i -lt 60000 ]; do i=$((i + 1)); done";
        assert!(Command::new("sh").args(["-c", spin]).status().unwrap().success());
        assert!(children().unwrap() > before);
    }
}
