//! What is said of connections that were dropped: a line for each, but not more than a person can read.

use super::caller::What;
use crate::socket::Peer;
use qevm_inspect::failure::printable;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::{Duration, Instant};

/// Lines within a period.
const LINES: u32 = 10;
const PERIOD: Duration = Duration::from_secs(1);

/// The connections that were dropped.
#[derive(Debug, Default)]
pub(super) struct Dropped {
    /// How many of each kind.
    kinds: BTreeMap<Cow<'static, str>, u64>,
    /// When the present period began, and the lines written in it.
    period: Option<Instant>,
    lines: u32,
    /// Connections of which nothing was said.
    unsaid: u64,
}

impl Dropped {
    /// A connection of `peer` was dropped, because it is `what`.
    pub(super) fn note(&mut self, peer: &Peer, what: &What) {
        *self.kinds.entry(what.kind.clone()).or_default() += 1;
        self.flush();
        match self.lines < LINES && say(&format!("dropped a connection from {peer}: {what}")) {
            true => self.lines += 1,
            false => self.unsaid += 1,
        }
    }

    /// Begins a new period if it is time, and says what was left out in the last one.
    pub(super) fn flush(&mut self) {
        if self.period.is_none_or(|since| since.elapsed() >= PERIOD) {
            (self.period, self.lines) = (Some(Instant::now()), 0);
            self.say_unsaid();
        }
    }

    fn say_unsaid(&mut self) {
        if self.unsaid > 0 && say(&format!("dropped {} more connections", self.unsaid)) {
            self.unsaid = 0;
        }
    }

    /// All that came, with what still `waits`; `None` if no connection came.
    pub(super) fn summary(&self, waits: impl Iterator<Item = Cow<'static, str>>) -> Option<String> {
        let mut kinds = self.kinds.clone();
        waits.for_each(|kind| *kinds.entry(kind).or_default() += 1);
        let all: Vec<String> = kinds
            .iter()
            .map(|(kind, count)| match count {
                1 => kind.to_string(),
                _ => format!("{kind} ({count} times)"),
            })
            .collect();
        (!all.is_empty()).then(|| all.join(", "))
    }
}

impl Drop for Dropped {
    fn drop(&mut self) {
        self.say_unsaid();
    }
}

/// Writes a line to standard error; false if that would wait for its reader, whom a migration does not wait for.
fn say(line: &str) -> bool {
    let stderr = io::stderr();
    let mut ready = [PollFd::new(&stderr, PollFlags::OUT)];
    match poll(&mut ready, Some(&Timespec::default())) {
        Ok(1) => writeln!(stderr.lock(), "qevm: {}", printable(line)).is_ok(),
        _ => false,
    }
}
