//! The machines, as `machines.txt` lists them.

use crate::suite::Suite;
use anyhow::{Context, Result, bail, ensure};

const MACHINES: &str = include_str!("machines.txt");

/// A machine whose stream is captured and judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Whose QEMU it runs in.
    pub suite: Suite,
    /// The target, as in the name of the program.
    pub target: &'static str,
    /// What tells it from other machines of the target.
    pub label: &'static str,
    /// Its firmware runs for a moment before it is stopped; otherwise not one instruction is executed.
    pub runs: bool,
    /// QEMU's arguments.
    pub arguments: Vec<&'static str>,
    /// In what it is unlike the others.
    pub exceptions: Exceptions,
}

/// What is known to be otherwise with a machine. Each is tried, and a machine of which one is not true fails.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Exceptions {
    /// QEMU does not save it, saying this.
    pub save: Option<&'static str>,
    /// QEMU does not load the stream that it wrote itself, saying this.
    pub load: Option<&'static str>,
    /// QEMU may die of loading the stream that it wrote itself, or may not, for this reason. This alone is not tried.
    pub dies: Option<&'static str>,
    /// This RAM block changes when QEMU loads the stream that it wrote itself.
    pub changes: Option<&'static str>,
    /// `analyze-migration.py` does not read the stream, saying this.
    pub script: Option<&'static str>,
    /// This many bytes are shown raw.
    pub opaque: u64,
}

impl Machine {
    /// Release, target and label.
    pub fn name(&self) -> String {
        format!("{} {} {}", self.suite.series(), self.target, self.label)
    }

    /// It is a PC or a microvm.
    pub(super) fn is_x86(&self) -> bool {
        matches!(self.target, "x86_64" | "i386")
    }
}

/// All machines, in the order of the list.
///
/// # Errors
/// The list is not as it should be; the error quotes the line.
pub fn all() -> Result<Vec<Machine>> {
    let lines = MACHINES.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| parse(line).with_context(|| format!("machines.txt: {line}"))).collect()
}

/// `11.1 riscv64 sifive_u run -M sifive_u -m 128 ; load: Assertion`: release, target, label, perhaps `run`, arguments,
/// and exceptions.
fn parse(line: &'static str) -> Result<Machine> {
    let mut parts = line.split(" ; ");
    let mut words = parts.next().unwrap_or_default().split_whitespace();
    let suite = words.next().and_then(Suite::of_series).context("no such release")?;
    let (target, label) = (words.next().context("no target")?, words.next().context("no label")?);
    let mut arguments: Vec<&str> = words.collect();
    let runs = arguments.first() == Some(&"run");
    arguments.drain(..usize::from(runs));
    ensure!(arguments.first() == Some(&"-M"), "no machine type");
    let mut exceptions = Exceptions::default();
    for part in parts {
        let (kind, what) = part.split_once(": ").context("an exception without a text")?;
        match kind {
            "save" => exceptions.save = Some(what),
            "load" => exceptions.load = Some(what),
            "dies" => exceptions.dies = Some(what),
            "changes" => exceptions.changes = Some(what),
            "script" => exceptions.script = Some(what),
            "opaque" => exceptions.opaque = what.parse().context("no number of bytes")?,
            _ => bail!("no exception is called '{kind}'"),
        }
    }
    Ok(Machine { suite, target, label, runs, arguments, exceptions })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_line_is_read() {
        let machine = parse("11.1 riscv64 sifive_u run -M sifive_u -m 128 ; load: Assertion ; opaque: 46").unwrap();
        assert_eq!(machine.name(), "11.1 riscv64 sifive_u");
        assert_eq!((machine.runs, &machine.arguments[..]), (true, &["-M", "sifive_u", "-m", "128"][..]));
        let expected = Exceptions { load: Some("Assertion"), opaque: 46, ..Default::default() };
        assert_eq!(machine.exceptions, expected);
        for bad in ["3.0 arm a -M a", "11.1 arm a", "11.1 arm a -M a ; loud: yes", "11.1 arm a -M a ; opaque: many"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_list_has_forty_machines_and_all_targets() {
        /// Every target of Debian's packages beside x86 whose machines QEMU migrates.
        const TARGETS: &str = "aarch64 alpha arm avr hexagon hppa loongarch64 m68k microblaze microblazeel mips mips64 \
            mips64el mipsel or1k ppc ppc64 riscv32 riscv64 rx s390x sparc sparc64 tricore";
        let machines = all().unwrap();
        let saved = || machines.iter().filter(|machine| machine.exceptions.save.is_none());
        let names: BTreeSet<String> = machines.iter().map(Machine::name).collect();
        assert_eq!(names.len(), machines.len());
        assert!(saved().count() >= 40, "{}", saved().count());
        let targets: BTreeSet<&str> = saved().map(|machine| machine.target).collect();
        let missing: Vec<&str> = TARGETS.split_whitespace().filter(|target| !targets.contains(target)).collect();
        assert_eq!((TARGETS.split_whitespace().count(), missing), (24, vec![]));
    }
}
