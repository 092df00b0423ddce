//! What is measured, by the number of instructions, and the tables of that.

use super::case::{Case, Ending, NEW, PRECOPY, Stop};
use super::faults::faults;
use crate::lab::boot::Boot;
use crate::lab::job::Outcome;
use qevm_lab::{Report, Sample, Side};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const REPEATS: u32 = 3;
/// Milliseconds that a destination takes to load the initial part.
const LOAD_MS: u64 = 1480;
/// When the device shrinks, in milliseconds after `migrate`; in each repetition so much later.
const SHRINK_MS: (u64, u64) = (5000, 230);
/// Seconds that a migration may take.
const LIMIT_S: u64 = 40;
const MIB: u64 = 1 << 20;
/// Questions, readings of the dirty log and reports in a second, at most.
const MOST_A_SECOND: f64 = 20.0;
/// Of a processor, in per cent.
const MOST_CPU: f64 = 5.0;
/// Milliseconds by which a switchover without the capability may take longer than with it.
const MOST_WITHOUT_ACK: f64 = 100.0;
/// Milliseconds from the shrink to the guest at the destination.
const MOST_AFTER_SHRINK: f64 = 1000.0;

const RUNNING: &str = "/stop_to_running_ms";
/// How long the guest does not run: none may be longer than QEMU's.
const PAUSES: [(&str, &str); 3] = [
    ("/stop_to_resume_ms", "from STOP to RESUME"),
    (RUNNING, "to the device's running"),
    ("/reported_downtime_ms", "of reported downtime"),
];

/// Who migrates: the source first.
const MONITORS: [(&str, [Stop; 2]); 4] = [
    ("QEMU", [Stop::Qemu(NEW), Stop::Qemu(NEW)]),
    ("reference-vmm", [Stop::Reference(NEW), Stop::Reference(NEW)]),
    ("reference-vmm to QEMU", [Stop::Reference(NEW), Stop::Qemu(NEW)]),
    ("QEMU to reference-vmm", [Stop::Qemu(NEW), Stop::Reference(NEW)]),
];

/// All that `lab --figures` runs.
pub(in crate::lab) fn figures() -> Vec<Case> {
    let mut all = Vec::new();
    for repeat in 1..=REPEATS {
        for (monitors, path) in MONITORS {
            all.extend(headline(monitors, path, repeat));
        }
        for (monitors, path) in &MONITORS[..2] {
            all.extend(shrinking(monitors, *path, repeat));
        }
    }
    all.extend(faults());
    all
}

fn named(parts: &[&str], repeat: u32) -> String {
    format!("{}-{repeat}", parts.join("-").replace(' ', "-").to_lowercase())
}

fn measured(name: String, path: [Stop; 2], downtime_limit: u64) -> Case {
    // QEMU takes the bandwidth that it has measured while there was nothing to send, and would not end otherwise.
    let parameters = json!({ "downtime-limit": downtime_limit, "max-bandwidth": 0 });
    let path = path.to_vec();
    Case {
        path,
        boot: Boot::Counted,
        parameters,
        ending: Ending::Measured,
        limit_s: LIMIT_S,
        ..Case::new(name, NEW, NEW)
    }
}

/// States whose initial part takes long to load.
fn headline(monitors: &str, path: [Stop; 2], repeat: u32) -> Vec<Case> {
    let mut all = Vec::new();
    for (size, initial) in [(16, 15), (300, 1)] {
        // 300 MB take a minute each. By way of the other monitor, the small ones tell enough.
        if size > 16 && monitors.contains(" to ") {
            continue;
        }
        for multifd in [false, true] {
            for ack in [false, true] {
                let name = named(&["figures", &format!("{size}M"), channels(multifd), with_ack(ack), monitors], repeat);
                let mut case = measured(name, path, 1000)
                    .set(Side::Source, "initial_size", initial * MIB)
                    .set(Side::Source, "final_size", (size - initial) * MIB)
                    .set(Side::Source, "dirty_rounds", 0)
                    .set(Side::Destination, "load_initial_ms", LOAD_MS);
                case.parameters["avail-switchover-bandwidth"] = json!(4_u64 << 30);
                case = if ack { case.ack() } else { case };
                all.push(if multifd { case.multifd() } else { case });
            }
        }
    }
    all
}

fn channels(multifd: bool) -> &'static str {
    if multifd { "multifd" } else { "plain" }
}

fn with_ack(ack: bool) -> &'static str {
    if ack { "ack" } else { "no-ack" }
}

/// A device that says it has 1 GiB, which do not fit the downtime limit, and then 1 MiB.
fn shrinking(monitors: &str, path: [Stop; 2], repeat: u32) -> Vec<Case> {
    let kinds = [("stop-copy", 3, 0), ("pre-copy", PRECOPY, 0), ("slow-query", PRECOPY, 100)];
    let case = |(kind, flags, query_ms): (&str, u64, u64)| {
        let case = measured(named(&["shrink", kind, monitors], repeat), path, 300)
            .set(Side::Source, "data_size", 1024 * MIB)
            .set(Side::Source, "data_size_ms", query_ms)
            .change(SHRINK_MS.0 + SHRINK_MS.1 * u64::from(repeat), "data_size", MIB);
        Case { flags, ..case }
    };
    kinds.into_iter().map(case).collect()
}

impl Case {
    /// What was seen while the source could not pause the guest: from when all initial data were read, or from a second
    /// after the start for a device that is too large, to when it did, or could.
    pub(super) fn waits(&self, report: &Report) -> Value {
        let uuid = Case::uuid(self.path.len() - 2, 0);
        let initial = |(side, name, value): &(Side, &str, String)| {
            (*side == Side::Source && *name == "initial_size").then(|| value.parse::<i64>().ok()).flatten()
        };
        let count = |sample: &Sample, name: &str| sample.counters.get(&uuid).and_then(|all| all.get(name)).copied();
        let shrinks = report.events.iter().find(|event| event.name == "CHANGE").map(|event| event.ms);
        let begin = match self.settings.iter().find_map(initial) {
            Some(bytes) => report.samples.iter().position(|sample| count(sample, "read_bytes") >= Some(bytes)),
            None => report.samples.iter().position(|sample| sample.ms >= 1000.0),
        };
        let stop = report.event(Side::Source, "STOP", 0.0).map(|stop| stop.ms);
        let end = shrinks.or(stop).unwrap_or(f64::MAX);
        let samples = begin.and_then(|begin| report.samples.get(begin..)).unwrap_or_default();
        let within: Vec<_> = samples.iter().filter(|sample| sample.ms <= end).collect();
        let (Some(first), Some(last)) = (within.first(), within.last()) else { return Value::Null };
        let seconds = (last.ms - first.ms) / 1e3;
        if seconds < 0.5 {
            return Value::Null;
        }
        let rate = |of: &dyn Fn(&Sample) -> Option<f64>| Some(of(last)? - of(first)?).map(|n| round(n / seconds));
        json!({
            "ms": (seconds * 1e3).round(),
            "queries": rate(&|s| count(s, "data_size").map(|n| n as f64)),
            "syncs": rate(&|s| Some(s.syncs as f64)),
            "reports": rate(&|s| count(s, "log_reports").map(|n| n as f64)),
            "cpu": rate(&|s| s.cpu_ms.map(|ms| ms as f64 / 10.0)),
        })
    }

    /// Milliseconds from the shrink to the guest at the destination.
    pub(super) fn after_shrink(report: &Report) -> Option<f64> {
        let shrink = report.events.iter().find(|event| event.name == "CHANGE")?.ms;
        report.event(Side::Destination, "RESUME", shrink).map(|resume| (resume.ms - shrink).round())
    }
}

fn round(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

/// The figures of one row: those of each repetition.
type Rows<'o> = BTreeMap<String, Vec<&'o Value>>;

/// The tables of what was measured, and which goals it misses.
pub(in crate::lab) fn tables(outcomes: &[Outcome]) -> (String, Vec<String>) {
    let mut rows = Rows::new();
    for outcome in outcomes {
        if let (Ok(numbers), Some((row, _))) = (&outcome.result, outcome.name.rsplit_once('-')) {
            rows.entry(row.to_owned()).or_default().push(numbers);
        }
    }
    let (mut text, mut missed) = (String::new(), Vec::new());
    headline_table(&rows, &mut text, &mut missed);
    shrink_table(&rows, &mut text, &mut missed);
    (text, missed)
}

fn headline_table(rows: &Rows<'_>, text: &mut String, missed: &mut Vec<String>) {
    let mut lines = String::new();
    for size in ["16M", "300M"] {
        for multifd in [false, true] {
            for (monitors, _) in MONITORS {
                let key = |ack: bool, monitors: &str| {
                    let name = named(&["figures", size, channels(multifd), with_ack(ack), monitors], 0);
                    name.trim_end_matches("-0").to_owned()
                };
                for ack in [false, true] {
                    let Some(row) = rows.get(&key(ack, monitors)) else { continue };
                    let what = format!("{size} {} {} {monitors}", channels(multifd), with_ack(ack));
                    lines.push_str(&format!(
                        "| {size} | {} | {} | {monitors} | {} | {} | {} | {} | {} | {} |\n",
                        if multifd { "yes" } else { "no" },
                        if ack { "yes" } else { "no" },
                        cell(row, "/stop_to_resume_ms"),
                        cell(row, RUNNING),
                        cell(row, "/reported_downtime_ms"),
                        cell(row, "/devices/0/data_size"),
                        cell(row, "/syncs"),
                        waiting(row),
                    ));
                    if monitors != "reference-vmm" {
                        continue;
                    }
                    busy(&what, row, &["queries", "syncs", "reports", "cpu"], missed);
                    let other = |ack: bool, monitors: &str, what: &str| median(rows.get(&key(ack, monitors))?, what);
                    for (pointer, until) in PAUSES {
                        let Some(own) = median(row, pointer) else { continue };
                        if let Some(qemu) = other(ack, "QEMU", pointer).filter(|qemu| own > *qemu) {
                            missed.push(format!("{what}: {own} ms {until}, QEMU {qemu} ms"));
                        }
                    }
                    let Some(own) = median(row, RUNNING) else { continue };
                    if let Some(with) = other(true, monitors, RUNNING).filter(|with| own > with + MOST_WITHOUT_ACK) {
                        missed.push(format!("{what}: {own} ms to the device's running, with switchover-ack {with} ms"));
                    }
                }
            }
        }
    }
    if !lines.is_empty() {
        text.push_str(
            "| state | multifd | switchover-ack | | STOP to RESUME | STOP to the device's `running` | reported downtime | exact queries | syncs | while it waits |\n\
             |---|---|---|---|---|---|---|---|---|---|\n",
        );
        text.push_str(&lines);
    }
}

fn shrink_table(rows: &Rows<'_>, text: &mut String, missed: &mut Vec<String>) {
    let mut lines = String::new();
    for kind in ["stop-copy", "pre-copy", "slow-query"] {
        for (monitors, _) in &MONITORS[..2] {
            let key = named(&["shrink", kind, monitors], 0);
            let Some(row) = rows.get(key.trim_end_matches("-0")) else { continue };
            let ended = row.iter().all(|numbers| numbers["after_shrink_ms"].is_number());
            let after = if ended { cell(row, "/after_shrink_ms") } else { format!("not within {LIMIT_S} s") };
            lines.push_str(&format!("| {kind} | {monitors} | {after} | {} |\n", waiting(row)));
            if *monitors == "reference-vmm" {
                let what = format!("shrink {kind}");
                // Its log has two ranges, and a report of each.
                busy(&what, row, &["queries", "syncs", "cpu"], missed);
                match median(row, "/after_shrink_ms").filter(|_| ended) {
                    Some(ms) if ms <= MOST_AFTER_SHRINK => {}
                    after => missed.push(format!("{what}: ended {after:?} ms after it")),
                }
            }
        }
    }
    if !lines.is_empty() {
        text.push_str("\n| device | | shrink to RESUME | before it |\n|---|---|---|---|\n");
        text.push_str(&lines);
    }
}

/// What the source does while it waits, by the second.
fn waiting(row: &[&Value]) -> String {
    let rates = ["queries", "syncs", "reports"].map(|name| cell(row, &format!("/waits/{name}")));
    if rates.iter().all(|rate| rate == "–") {
        return "–".to_owned();
    }
    let [queries, syncs, reports] = rates;
    format!(
        "{queries} queries, {syncs} syncs, {reports} reports a second, {} % of a processor",
        cell(row, "/waits/cpu")
    )
}

fn busy(what: &str, row: &[&Value], of: &[&str], missed: &mut Vec<String>) {
    for name in of {
        let most = if *name == "cpu" { MOST_CPU } else { MOST_A_SECOND };
        if let Some(found) = median(row, &format!("/waits/{name}")).filter(|found| *found > most) {
            let unit = if *name == "cpu" { "% of a processor" } else { "a second" };
            missed.push(format!("{what}: {name}: {found} {unit}, at most {most}"));
        }
    }
}

fn numbers(row: &[&Value], pointer: &str) -> Vec<f64> {
    let mut all: Vec<_> = row.iter().filter_map(|numbers| numbers.pointer(pointer)?.as_f64()).collect();
    all.sort_by(f64::total_cmp);
    all
}

fn median(row: &[&Value], pointer: &str) -> Option<f64> {
    let all = numbers(row, pointer);
    all.get(all.len() / 2).copied()
}

/// The median, and the range if there is one.
fn cell(row: &[&Value], pointer: &str) -> String {
    let all = numbers(row, pointer);
    match (all.first(), all.get(all.len() / 2), all.last()) {
        (Some(least), Some(median), Some(most)) if least < most => format!("{median} ({least} to {most})"),
        (_, Some(median), _) => median.to_string(),
        _ => "–".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(name: &str, numbers: Value) -> Outcome {
        Outcome { name: name.into(), result: Ok(numbers), said: String::new() }
    }

    #[test]
    fn a_goal_that_is_missed_is_named() {
        let row = |running: u64, queries: f64| {
            let waits = json!({ "ms": 1400, "queries": queries, "syncs": 10, "reports": 10, "cpu": 1 });
            json!({ "stop_to_resume_ms": 9, "stop_to_running_ms": running, "reported_downtime_ms": 9, "waits": waits })
        };
        let rows = |own: Value, qemu: Value, without: Value| {
            let mut all = Vec::new();
            for (name, numbers) in [("ack-reference-vmm", own), ("ack-qemu", qemu), ("no-ack-reference-vmm", without)] {
                all.extend((1..=3).map(|n| outcome(&format!("figures-16m-plain-{name}-{n}"), numbers.clone())));
            }
            tables(&all)
        };
        let (text, missed) = rows(row(10, 10.0), row(11, 70.0), row(12, 10.0));
        assert!(missed.is_empty(), "{missed:?}");
        assert_eq!(text.lines().count(), 5, "{text}");
        let (_, missed) = rows(row(12, 10.0), row(11, 70.0), row(12, 10.0));
        assert!(missed[0].contains("QEMU 11"), "{missed:?}");
        for pause in ["stop_to_resume_ms", "reported_downtime_ms"] {
            let mut own = row(10, 10.0);
            own[pause] = json!(10);
            let (_, missed) = rows(own, row(11, 70.0), row(12, 10.0));
            assert!(missed.len() == 1 && missed[0].contains("10 ms ") && missed[0].contains("QEMU 9"), "{missed:?}");
        }
        let (_, missed) = rows(row(10, 21.0), row(11, 70.0), row(12, 10.0));
        assert!(missed[0].contains("queries: 21"), "{missed:?}");
        let (_, missed) = rows(row(10, 10.0), row(11, 70.0), row(111, 10.0));
        assert!(missed[0].contains("with switchover-ack 10"), "{missed:?}");
    }

    #[test]
    fn a_shrink_that_is_not_noticed_in_time_is_named() {
        let shrunk =
            |after: Value| tables(&[outcome("shrink-pre-copy-reference-vmm-1", json!({ "after_shrink_ms": after }))]);
        assert!(shrunk(json!(990)).1.is_empty());
        assert_eq!(shrunk(json!(1010)).1.len(), 1);
        assert_eq!(shrunk(Value::Null).1.len(), 1);
    }
}
