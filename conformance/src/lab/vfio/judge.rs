//! The judge of trips with VFIO devices.

use super::case::{Case, Ending, Memory, PRECOPY, Says, Stop};
use anyhow::{Context, Result, ensure};
use qevm_lab::{Report, Side};
use reference_vmm::payload::Progress;
use serde_json::{Value, json};

/// Milliseconds that a cancellation may take.
const CANCEL_MS: f64 = 1000.0;
/// KiB by which a source may grow for a device that goes on sending.
const GROWTH_KIB: u64 = 256 << 10;

impl Case {
    /// What is wrong with the migration from this stop to the next, or numbers.
    fn judge(&self, report: &Report, stop: usize) -> Result<Value> {
        let measured = match &self.ending {
            // What fails or is measured is the last migration.
            _ if stop + 2 < self.path.len() => Value::Null,
            Ending::Arrives => Value::Null,
            Ending::Fault { runs, says } => return self.judge_fault(report, *runs, says.as_ref()),
            Ending::Ends if report.status != "completed" => return self.judge_failure(report),
            Ending::Ends => return judge_guest(report, false),
            Ending::Measured => {
                let measured = json!({ "waits": self.waits(report), "after_shrink_ms": Case::after_shrink(report) });
                if report.status == "limit" {
                    return Ok(measured);
                }
                measured
            }
        };
        self.judge_ends(report)?;
        let passes = judge_guest(report, self.memory == Memory::Stale)?;
        let used = if self.is_used() { self.judge_use(report)? } else { Value::Null };
        let mut devices = Vec::new();
        for number in 0..self.devices {
            self.judge_states(report, number).with_context(|| format!("device {}", Case::id(number)))?;
            if self.driver == "testdev" {
                let judged = self.judge_device(report, stop, number);
                devices.push(judged.with_context(|| format!("device {}", Case::id(number)))?);
            }
        }
        if matches!(self.path[stop], Stop::Reference(_)) {
            // Of all devices, in sections and on channels.
            let told = report.migration["vfio"]["transferred"].as_u64().unwrap_or_default();
            let read = (0..self.devices).map(|number| report.counter(&Case::uuid(stop, number), "read_bytes"));
            let read = read.sum::<i64>() as u64;
            let most = read + 5000 * self.devices as u64;
            ensure!(self.driver != "testdev" || (read..most).contains(&told), "{told} bytes of {read} are told");
        }
        let channels = report.migration["ram"]["multifd-bytes"].as_u64().unwrap_or_default();
        ensure!(channels >= self.on_channels, "{channels} bytes on page channels, and not {}", self.on_channels);
        ensure!(channels <= self.at_most_on_channels, "{channels} bytes on page channels");
        let ms = |event: &str, side| report.event(side, event, 0.0).map(|event| event.ms);
        let (stop, resume) =
            ms("STOP", Side::Source).zip(ms("RESUME", Side::Destination)).context("no STOP or RESUME")?;
        ensure!(stop >= self.earliest_stop_ms as f64, "the guest was stopped {stop:.0} ms after the start");
        let running = (0..self.devices).filter_map(|number| {
            let states = report.device_states(Side::Destination, &Case::id(number));
            states.iter().rev().find(|(state, _)| *state == "running").map(|(_, ms)| *ms)
        });
        let running = running.fold(resume, f64::max);
        let mut numbers = json!({
            "stop_to_resume_ms": (resume - stop).round(),
            "stop_to_running_ms": (running - stop).round(),
            "reported_downtime_ms": report.migration["downtime"],
            "total_ms": report.migration["total-time"],
            "syncs": report.migration["ram"]["dirty-sync-count"],
            "passes": passes,
            "devices": devices,
            "used": used,
        });
        if let (Some(numbers), Value::Object(measured)) = (numbers.as_object_mut(), measured) {
            numbers.extend(measured);
        }
        Ok(numbers)
    }

    /// The guest runs where it has to, and nowhere else; a monitor says why.
    fn judge_fault(&self, report: &Report, runs: Option<Side>, says: Option<&(Says, Vec<String>)>) -> Result<Value> {
        let said = |side: Side| {
            let (monitor, migration) = match side {
                Side::Source => (&report.source_stderr, &report.migration),
                Side::Destination => (&report.destination_stderr, &report.incoming),
            };
            format!("{monitor}\n{}", migration["error-desc"].as_str().unwrap_or_default())
        };
        let all = || format!("source: {}; destination: {}", said(Side::Source), said(Side::Destination));
        let status = report.status.as_str();
        ensure!(["completed", "failed", "cancelled"].contains(&status), "it ended as {status}: {}", all());
        let running = |status: &Value| status["status"] == "running";
        let found: Vec<_> = [(Side::Source, &report.left), (Side::Destination, &report.arrived)]
            .into_iter()
            .filter_map(|(side, status)| running(status).then_some(side))
            .collect();
        ensure!(found == Vec::from_iter(runs), "the guest runs at {found:?}, and not at {runs:?}: {}", all());
        match runs {
            Some(Side::Source) => {
                ensure!(status != "completed", "the source reports 'completed': {}", all());
                ensure!(report.goes_on, "the guest at the source does nothing more: {}", all());
            }
            Some(Side::Destination) => drop(judge_guest(report, false)?),
            None => {}
        }
        if self.driver == "testdev" {
            self.judge_devices_at(report, runs)?;
        }
        if let Some((at, words)) = says {
            let said = match at {
                Says::Error => report.migration["error-desc"].as_str().unwrap_or_default().to_owned(),
                Says::Log(side) => said(*side),
            };
            let line = said.lines().find(|line| words.iter().all(|word| line.contains(word.as_str())));
            let line = line.with_context(|| format!("{at:?} does not say {words:?}: {}", all()))?;
            let mut what = json!({ "runs": format!("{runs:?}"), "says": line.trim() });
            if let Some((bytes, within)) = self.fails_within {
                let took = self.fails_after(report, bytes).context("the destination has not loaded that much")?;
                ensure!(took <= within, "it failed {took:.0} ms after the initial data were loaded");
                what["after_ms"] = json!(took.round());
            }
            return Ok(what);
        }
        let Some(cancelled) = report.events.iter().find(|event| event.name == "CANCEL") else {
            return Ok(json!({ "runs": format!("{runs:?}") }));
        };
        let took = report.ended_ms - cancelled.ms;
        ensure!(status == "cancelled", "it ended as {status}, and not cancelled: {}", all());
        ensure!(took <= CANCEL_MS, "it ended {took:.0} ms after it was cancelled");
        let held: Vec<_> = report.samples.iter().filter_map(|sample| sample.resident_kib).collect();
        let (first, most) = held.first().zip(held.iter().max()).context("there is no sample of the memory")?;
        ensure!(most - first <= GROWTH_KIB, "the source held {first} KiB at first, and then {most} KiB");
        Ok(json!({ "runs": format!("{runs:?}"), "cancelled_ms": took.round(), "grew_kib": most - first }))
    }

    /// Milliseconds from when the destination's devices had loaded this many bytes to the end of the migration.
    fn fails_after(&self, report: &Report, bytes: i64) -> Option<f64> {
        let loaded = |sample: &&qevm_lab::Sample| {
            let devices = (0..self.devices).map(|number| Case::uuid(self.path.len() - 1, number));
            let written = devices.filter_map(|uuid| sample.counters.get(&uuid)?.get("written_bytes").copied());
            written.sum::<i64>() >= bytes
        };
        Some(report.ended_ms - report.samples.iter().find(loaded)?.ms)
    }

    /// Devices work where the guest runs, and nowhere else.
    fn judge_devices_at(&self, report: &Report, runs: Option<Side>) -> Result<()> {
        let last = self.path.len() - 1;
        for (side, stop) in [(Side::Source, last - 1), (Side::Destination, last)] {
            for number in 0..self.devices {
                let state = report.states.get(&Case::uuid(stop, number)).map_or("closed", String::as_str);
                // Where no guest has come yet, QEMU's device has left RUNNING at the latest when its state comes.
                if runs == Some(side) || side == Side::Source {
                    let works = state == "RUNNING";
                    ensure!(works == (runs == Some(side)), "device {number} at the {side:?} is in {state}");
                }
            }
        }
        Ok(())
    }

    /// A failure with a name, after which the guest runs on at the source.
    fn judge_failure(&self, report: &Report) -> Result<Value> {
        let error = report.migration["error-desc"].as_str().unwrap_or_default();
        ensure!(report.status == "failed" && !error.is_empty(), "{}: {}", report.status, report.migration);
        ensure!(report.left["status"] == "running" && report.goes_on, "the source is left {}", report.left);
        ensure!(report.arrived["status"] != "running", "the destination is {}", report.arrived);
        Ok(json!({ "fails": error, "destination": report.destination_stderr.trim() }))
    }

    fn judge_ends(&self, report: &Report) -> Result<()> {
        let said = || {
            let (source, destination) = (report.source_stderr.trim(), report.destination_stderr.trim());
            format!("{}; source: {source}; destination: {destination}", report.migration)
        };
        ensure!(report.status == "completed", "{}: {}", report.status, said());
        ensure!(report.left["status"] == "postmigrate", "the source is left {}: {}", report.left, said());
        ensure!(report.arrived["status"] == "running", "the destination is {}: {}", report.arrived, said());
        Ok(())
    }

    /// The states of migration, in the order of VFIO's documentation.
    fn judge_states(&self, report: &Report, number: usize) -> Result<()> {
        let flags = if self.driver == "mtty" { PRECOPY } else { self.flags };
        let (there, back): (&[&str], &[&str]) = match flags {
            7 => (&["pre-copy", "pre-copy-p2p", "stop-copy", "stop"], &["resuming", "running-p2p", "running"]),
            3 => (&["running-p2p", "stop", "stop-copy", "stop"], &["resuming", "running-p2p", "running"]),
            _ => (&["stop", "stop-copy", "stop"], &["resuming", "running"]),
        };
        for (side, wanted) in [(Side::Source, there), (Side::Destination, back)] {
            let told = report.device_states(side, &Case::id(number));
            // QEMU 11 also tells before it sets one.
            let told: Vec<_> = told.iter().map(|(state, _)| *state).filter(|s| !s.ends_with("-prepare")).collect();
            ensure!(told == wanted, "its states at the {side:?} were {told:?}, and not {wanted:?}");
        }
        Ok(())
    }

    fn judge_device(&self, report: &Report, stop: usize, number: usize) -> Result<Value> {
        let [source, destination] = [stop, stop + 1].map(|stop| Case::uuid(stop, number));
        let count = |uuid: &String, name: &str| report.counter(uuid, name);
        let exactly = |uuid: &String, name: &str, wanted: i64| -> Result<()> {
            let found = count(uuid, name);
            ensure!(found == wanted, "{name} is {found}, and not {wanted}: {:?}", report.counters);
            Ok(())
        };
        exactly(&source, "saves", 1)?;
        exactly(&destination, "loads", 1)?;
        exactly(&destination, "load_errors", 0)?;
        exactly(&destination, "state_bad", 0)?;
        exactly(&destination, "written_bytes", count(&source, "read_bytes"))?;
        for (uuid, stop) in [(&source, stop), (&destination, stop + 1)] {
            // Elsewhere it is opened before RAM is mapped for it, and writes at once where it does not wait to be bus
            // master.
            if self.is_used() || matches!(self.path[stop], Stop::Qemu(_)) && !self.iommufd {
                exactly(uuid, "dma_errors", 0)?;
            }
            if self.is_used() && matches!(self.path[stop], Stop::Reference(_)) {
                // The guest reaches the device's memory by itself.
                let asked = report.counters.get(uuid).and_then(|all| all.get("memory_accesses"));
                ensure!(asked == Some(&0), "its memory was not mapped: {asked:?} accesses");
            }
        }
        ensure!(count(&destination, "state_good") > 0, "no state was checked");
        let state = |uuid: &String| report.states.get(uuid).map(String::as_str);
        ensure!(state(&destination) == Some("RUNNING"), "it is {:?} at the destination", state(&destination));
        let written = count(&source, "dma_writes");
        match self.memory {
            Memory::Unwatched => {}
            Memory::Right => {
                ensure!(written > 0, "it wrote no page");
                exactly(&destination, "checks_bad", 0)?;
                exactly(&destination, "checks_good", 1)?;
                let offered = !self.settings.iter().any(|(_, name, value)| *name == "log_offered" && value == "0");
                let told = count(&source, "log_pages") > 0;
                ensure!(told == offered, "its log told of {} pages", count(&source, "log_pages"));
            }
            Memory::Stale => {
                exactly(&destination, "checks_bad", 1)?;
                exactly(&source, "log_pages", 0)?;
            }
        }
        if self.settings.iter().any(|(_, name, value)| *name == "reinits" && value != "0") {
            ensure!(count(&source, "reinits") > 0, "there were no initial data a second time");
        }
        let names = ["data_size", "precopy_info", "log_reports", "log_pages", "dma_writes", "read_bytes"];
        Ok(names.iter().map(|name| ((*name).to_owned(), json!(count(&source, name)))).collect())
    }
}

/// The guest ran at the source and runs at the destination, goes on where it was, by its clock too, and has found all
/// its memory as it should be; where pages of devices get `lost` it may have found out.
fn judge_guest(report: &Report, lost: bool) -> Result<Value> {
    let progress = |serial: &str| serial.lines().filter_map(Progress::parse).collect::<Vec<_>>();
    let (before, after) = (progress(&report.source_serial), progress(&report.destination_serial));
    let last = before.last().context("the guest said nothing at the source")?;
    let arrived = after.last().context("the guest says nothing at the destination")?;
    ensure!(after.len() >= 2, "the guest said one line at the destination");
    ensure!(!report.destination_serial.contains("qevm-payload start"), "the guest started anew");
    let on = after[0].pass >= last.pass && after[0].ms >= last.ms;
    ensure!(on, "the guest went back from {last:?} to {:?}", after[0]);
    ensure!(arrived.pass > after[0].pass || arrived.ticks > after[0].ticks, "the guest stands at {arrived:?}");
    ensure!(arrived.tsc_back == 0, "the guest's TSC went back: {arrived:?}");
    let stale: Vec<_> = report.destination_serial.lines().filter(|line| line.contains("stale-page")).collect();
    let others = stale.iter().find(|line| !lost || !line.contains("kind=pci-dma "));
    ensure!(others.is_none(), "{}: {}", others.unwrap_or(&""), report.destination_serial);
    ensure!(arrived.stale == 0 || lost, "{} stale pages: {}", arrived.stale, report.destination_serial);
    Ok(json!({ "before": last.pass, "after": arrived.pass }))
}

/// Judges what the driver printed: a report of each migration of the trip.
pub(in crate::lab) fn judge(case: &Case, said: &str) -> Result<Value> {
    let lines: Vec<_> = said.lines().filter_map(|line| line.strip_prefix(Report::MARK)).collect();
    ensure!(!lines.is_empty(), "the driver gave no report");
    ensure!(lines.len() < case.path.len(), "the driver gave {} reports", lines.len());
    let mut judged = Vec::new();
    for (stop, line) in lines.iter().enumerate() {
        let report = serde_json::from_str(line).context("the driver's report")?;
        let way = || format!("from {:?} to {:?}", case.path[stop], case.path[stop + 1]);
        judged.push(case.judge(&report, stop).with_context(way)?);
    }
    ensure!(judged.len() + 1 == case.path.len(), "the trip ended after {} migrations", judged.len());
    Ok(if judged.len() == 1 { judged.remove(0) } else { judged.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the driver saw of two QEMUs 11.1 in the lab: everything in order, and a device whose log told nothing.
    const GOOD: &str = include_str!("../../../tests/data/lab/11.1-ack.json");
    const LOG_OFF: &str = include_str!("../../../tests/data/lab/11.1-log-off.json");

    fn report(text: &str) -> Report {
        serde_json::from_str(text).unwrap()
    }

    fn plain() -> Case {
        Case::new("x", "11.1", "11.1")
    }

    #[test]
    fn a_migration_holds_if_device_guest_and_memory_do() {
        let good = || report(GOOD);
        assert!(plain().judge(&good(), 0).is_ok(), "{:?}", plain().judge(&good(), 0));
        let refused = |what: &str, change: &dyn Fn(&mut Report)| {
            let mut report = good();
            change(&mut report);
            let error = plain().judge(&report, 0).expect_err(what);
            assert!(format!("{error:#}").contains(what), "{what}: {error:#}");
        };
        refused("failed", &|r| r.status = "failed".into());
        refused("the source is left", &|r| r.left = json!({ "status": "running" }));
        refused("the destination is", &|r| r.arrived = json!({ "status": "paused" }));
        refused("says nothing", &|r| r.destination_serial.clear());
        refused("went back", &|r| r.destination_serial = r.source_serial.replace("qevm-payload start", ""));
        refused("stale", &|r| r.destination_serial = r.destination_serial.replace("stale=0", "stale=1"));
        refused("its states at the Destination", &|r| r.events.retain(|e| e.data["device-state"] != "running-p2p"));
        for (name, value) in [
            ("loads", 0),
            ("load_errors", 1),
            ("state_bad", 1),
            ("written_bytes", 1),
            ("checks_bad", 1),
            ("checks_good", 0),
        ] {
            let uuid = Case::uuid(1, 0);
            refused(name, &|r| *r.counters.get_mut(&uuid).unwrap().get_mut(name).unwrap() = value);
        }
        let early = Case { earliest_stop_ms: 60_000, ..plain() };
        assert!(early.judge(&good(), 0).is_err());
        assert!(Case { on_channels: 1, ..plain() }.judge(&good(), 0).is_err());
        assert!(Case { devices: 2, ..plain() }.judge(&good(), 0).is_err());
        assert!(Case { flags: 1, ..plain() }.judge(&good(), 0).is_err());
    }

    #[test]
    fn a_fault_leaves_the_guest_where_it_has_to_be_with_the_reason() {
        let failed = || {
            let mut report = report(GOOD);
            report.status = "failed".into();
            report.migration = json!({ "status": "failed", "error-desc": "device 'vfio0': no (os error 5)" });
            report.left = json!({ "status": "running" });
            report.arrived = json!({ "status": "inmigrate" });
            report.goes_on = true;
            report.states.insert(Case::uuid(0, 0), "RUNNING".into());
            report
        };
        let case = |runs| {
            let says = Some((Says::Error, vec!["'vfio0'".to_owned(), "(os error 5)".to_owned()]));
            Case { ending: Ending::Fault { runs, says }, ..plain() }
        };
        let source = case(Some(Side::Source));
        assert!(source.judge(&failed(), 0).is_ok(), "{:?}", source.judge(&failed(), 0));
        let refused = |change: &dyn Fn(&mut Report)| {
            let mut report = failed();
            change(&mut report);
            assert!(source.judge(&report, 0).is_err());
        };
        refused(&|r| r.status = "limit".into());
        refused(&|r| r.status = "completed".into());
        refused(&|r| {
            r.source_stderr = "device 'vfio0': no (os error 5)".into();
            r.migration = json!({ "error-desc": "device 'vfio0': no" });
        });
        refused(&|r| r.left = json!({ "status": "paused" }));
        refused(&|r| r.arrived = json!({ "status": "running" }));
        refused(&|r| r.goes_on = false);
        refused(&|r| drop(r.states.insert(Case::uuid(0, 0), "STOP_COPY".into())));
        assert!(case(None).judge(&failed(), 0).is_err());
        assert!(case(Some(Side::Destination)).judge(&failed(), 0).is_err());
        assert!(case(Some(Side::Source)).judge(&report(GOOD), 0).is_err());
    }

    #[test]
    fn a_device_that_does_not_log_must_be_found_out() {
        let stale = Case { memory: Memory::Stale, ..plain() };
        assert!(stale.judge(&report(LOG_OFF), 0).is_ok(), "{:?}", stale.judge(&report(LOG_OFF), 0));
        assert!(plain().judge(&report(LOG_OFF), 0).is_err());
        assert!(stale.judge(&report(GOOD), 0).is_err());
    }

    #[test]
    fn no_report_is_no_success() {
        assert!(judge(&plain(), "driver: the source does not start").is_err());
        assert!(judge(&plain(), &format!("noise\n{}{GOOD}\n", Report::MARK)).is_ok());
    }

    #[test]
    fn every_migration_of_a_trip_counts() {
        let visit = Case::visit("x", "11.1");
        let one = format!("{}{GOOD}\n", Report::MARK);
        let error = judge(&visit, &one).unwrap_err().to_string();
        assert!(error.contains("after 1 migrations"), "{error}");
        // The second begins where the first ended.
        let error = format!("{:#}", judge(&visit, &format!("{one}{one}")).unwrap_err());
        assert!(error.contains("from Reference(\"11.1\") to Qemu"), "{error}");
    }
}
