//! What something cost, and what it may cost.

use std::fmt;

/// Memory that any input may take.
pub(crate) const MEMORY_BASE: u64 = 64 << 20;
/// Memory for each byte of input.
pub(crate) const MEMORY_PER_BYTE: u64 = 8;
/// How much more work an input twice as long may make.
const DOUBLING: f64 = 2.2;

/// What reading an input cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    /// Most bytes of memory at a time.
    pub(crate) peak: u64,
    /// Calls of decoders, or of the operating system.
    pub(crate) calls: u64,
    /// Allocations; 0 where they cannot be counted.
    pub(crate) allocations: u64,
    /// Bytes allocated, or read and written.
    pub(crate) moved: u64,
}

/// The work that needs no input, and the work that each byte of it is worth: no bound of the promise, but what finds
/// bombs of work that do not grow.
const MOVED_BASE: u64 = 64 << 20;
const MOVED_PER_BYTE: u64 = 32 << 10;

impl Cost {
    /// What is wrong with this cost for `n` bytes of input.
    pub(crate) fn judge(&self, n: u64) -> Result<(), String> {
        let memory = MEMORY_BASE + MEMORY_PER_BYTE * n;
        if self.peak > memory {
            return Err(format!("{} bytes of memory, more than {memory}", self.peak));
        }
        let moved = MOVED_BASE + MOVED_PER_BYTE * n;
        if self.moved > moved {
            return Err(format!("{} bytes allocated, more than {moved}", self.moved));
        }
        Ok(())
    }

    /// What is wrong with the cost of twice as much input being `twice`.
    pub(crate) fn judge_doubling(&self, twice: &Cost) -> Result<(), String> {
        // Below these, what any input needs is most of it.
        let counts = [
            ("calls", self.calls, twice.calls, 200),
            ("allocations", self.allocations, twice.allocations, 500),
            ("bytes moved", self.moved, twice.moved, 512 << 10),
        ];
        for (what, once, twice, floor) in counts {
            if twice as f64 > once as f64 * DOUBLING + floor as f64 {
                return Err(format!("{what}: {once}, and {twice} for an input twice as long"));
            }
        }
        Ok(())
    }

    /// How bad it is: memory and work for each byte of input.
    pub(crate) fn weight(&self, n: u64) -> u64 {
        (self.peak + self.moved) / (n + 64)
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cost { peak, calls, allocations, moved } = self;
        write!(f, "peak {peak:>10}, moved {moved:>11}, allocations {allocations:>8}, calls {calls:>7}")
    }
}

/// The worst of many, and all that are beyond the bounds.
#[derive(Default)]
pub(crate) struct Verdicts {
    worst: Vec<(u64, String)>,
    pub(crate) beyond: Vec<String>,
    pub(crate) judged: u64,
}

impl Verdicts {
    /// Judges the cost of one input.
    pub(crate) fn add(&mut self, what: impl Fn() -> String, n: u64, cost: Cost) {
        self.judged += 1;
        if let Err(reason) = cost.judge(n) {
            self.beyond.push(format!("{} ({n} bytes): {reason}", what()));
        }
        let weight = cost.weight(n);
        if self.worst.len() < 10 || self.worst.last().is_some_and(|(least, _)| *least < weight) {
            self.worst.push((weight, format!("{weight:>9} per byte of {n:>8}: {cost}: {}", what())));
            self.worst.sort_by_key(|(weight, _)| std::cmp::Reverse(*weight));
            self.worst.truncate(10);
        }
    }

    /// Adds what another found.
    pub(crate) fn merge(&mut self, other: Verdicts) {
        self.worst.extend(other.worst);
        self.worst.sort_by_key(|(weight, _)| std::cmp::Reverse(*weight));
        self.worst.truncate(10);
        self.beyond.extend(other.beyond);
        self.judged += other.judged;
    }

    /// Prints the worst ten, and fails if anything was beyond the bounds.
    pub(crate) fn print(&self, title: &str) {
        println!("{title}: {} judged; the worst:", self.judged);
        self.worst.iter().for_each(|(_, line)| println!("  {line}"));
        assert!(self.beyond.is_empty(), "{} beyond their bounds:\n{}", self.beyond.len(), self.beyond.join("\n"));
    }
}
