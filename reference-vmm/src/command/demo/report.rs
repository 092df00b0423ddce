//! What the demo shows: a timeline for people, one object for programs.

use reference_vmm::payload::{Progress, Transcript};
use serde_json::{Map, Value, json};
use std::time::{Duration, Instant};

pub(super) struct Report {
    quiet: bool,
    start: Instant,
    shown: usize,
    object: Map<String, Value>,
}

impl Report {
    pub(super) fn new(quiet: bool) -> Report {
        Report { quiet, start: Instant::now(), shown: 0, object: Map::new() }
    }

    /// A line of the timeline.
    pub(super) fn say(&self, line: &str) {
        if !self.quiet {
            println!("{:8.3} s  {line}", self.start.elapsed().as_secs_f64());
        }
    }

    pub(super) fn rounds_header(&self) {
        self.say("round        dirty pages      sent       took   the guest dirtied");
    }

    /// Shows the rounds that were not shown yet.
    pub(super) fn rounds(&mut self, rounds: &[Value]) {
        for (i, round) in rounds.iter().enumerate().skip(self.shown) {
            let number = |key: &str| round[key].as_u64().unwrap_or(0);
            self.say(&format!(
                "{:>5}        {:>11} {:>6.1} MB {:>7.1} ms {:>8.1} MB/s",
                i + 1,
                number("pages"),
                number("bytes") as f64 / 1e6,
                number("took-us") as f64 / 1e3,
                number("dirty-rate") as f64 / 1e6,
            ));
        }
        self.shown = self.shown.max(rounds.len());
        self.object.insert("rounds".into(), self.shown.into());
    }

    /// What `query-migrate` says at the end.
    pub(super) fn migrated(&mut self, migration: &Value) {
        let ram = &migration["ram"];
        let number = |key: &str| ram[key].as_u64().unwrap_or(0);
        self.say(&format!(
            "completed    {:.1} MB in {} ms: {} pages in full, {} as zero; the log of dirty pages was read {} times",
            number("transferred") as f64 / 1e6,
            migration["total-time"],
            number("normal"),
            number("duplicate"),
            number("dirty-sync-count")
        ));
        self.object.insert("bytes".into(), number("transferred").into());
        self.object.insert("total_ms".into(), migration["total-time"].clone());
        self.object.insert("downtime_bytes".into(), number("downtime-bytes").into());
        self.object.insert("dirty_sync_count".into(), number("dirty-sync-count").into());
    }

    /// How long the guest was paused.
    pub(super) fn downtime(&mut self, gap: Duration, migration: &Value) {
        let gap = gap.as_micros() as f64 / 1e3;
        self.say(&format!(
            "downtime     {gap:.2} ms from the stop at the source to the start at the destination (QEMU's figure: {} ms)",
            migration["downtime"]
        ));
        self.object.insert("downtime_ms".into(), json!(gap));
        self.object.insert("source_downtime_ms".into(), migration["downtime"].clone());
    }

    /// What the guest says.
    pub(super) fn verdict(&mut self, before: &Progress, after: &Progress, transcript: &Transcript) {
        let cut = if transcript.cut > 0 { ", one of them cut in two by the switchover" } else { "" };
        self.say(&format!("guest        printed {} lines{cut}; the text goes on without a gap", transcript.lines));
        let last = &transcript.last;
        self.say(&format!(
            "guest        pass {} before, pass {} at the destination: {} pages checked, {} stale; it runs on one side only",
            before.pass, last.pass, last.written + last.checked, last.stale
        ));
        self.object.insert("stale_pages".into(), last.stale.into());
        self.object.insert("passes_before".into(), before.pass.into());
        self.object.insert("passes_after".into(), after.pass.into());
    }

    /// The object, with the result.
    pub(super) fn finish(self, error: Option<String>) -> Value {
        let mut object = Map::new();
        object.insert("result".into(), if error.is_none() { "ok".into() } else { "failed".into() });
        object.extend(self.object);
        // Always there, so that a program can rely on them.
        for key in ["stale_pages", "rounds", "bytes", "downtime_ms", "total_ms"] {
            object.entry(key).or_insert(Value::Null);
        }
        object.extend(error.map(|error| ("error".to_owned(), error.into())));
        object.into()
    }
}
