//! Jobs in which a guest with VFIO devices goes from one monitor to another, and their judge.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use qevm_lab::{Change, Device, Kind, Monitor, Plan, Report, Side};
use reference_vmm::payload::{FW_CFG_NAME, Progress};
use serde_json::{Value, json};

use super::machine::Boot;
use super::{Job, Judge};

/// The address and number of the pages that a device writes, beyond what the payload uses, for each device its own.
const DMA_BASE: u64 = 16 << 20;
const DMA_PAGES: u64 = 256;
const MEMORY: &str = "32";
/// Folder of the recordings in the machine, and what their jobs' names begin with.
pub(super) const SHARE: &str = "/share";
/// A job with this at the beginning of its name is a recording.
pub const RECORDING: &str = "record-";

/// A monitor on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// QEMU of this release.
    Qemu(&'static str),
}

/// What the device's check of the guest's memory must say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Memory {
    /// Each page that it wrote has arrived.
    Right,
    /// Pages are missing: its log did not tell of them, and a check that does not notice is none.
    Stale,
    /// The device writes none.
    Unwatched,
}

/// How a guest with devices travels, and what must be seen.
#[derive(Debug, Clone)]
pub(super) struct Case {
    name: &'static str,
    path: [Stop; 2],
    devices: usize,
    driver: &'static str,
    flags: u64,
    settings: Vec<(Side, &'static str, u64)>,
    capabilities: Vec<&'static str>,
    /// `downtime-limit` and what else both sides are told.
    parameters: Value,
    /// Further properties of the devices.
    options: &'static str,
    memory: Memory,
    /// Milliseconds after `migrate` before which the source must not stop its guest.
    earliest_stop_ms: u64,
    /// Least bytes on page channels.
    on_channels: u64,
    /// Most bytes on page channels.
    at_most_on_channels: u64,
    record: bool,
    boot: Boot,
}

const PRECOPY: u64 = 7;

impl Case {
    fn new(name: &'static str, source: &'static str, destination: &'static str) -> Case {
        Case {
            name,
            path: [Stop::Qemu(source), Stop::Qemu(destination)],
            devices: 1,
            driver: "testdev",
            flags: PRECOPY,
            settings: Vec::new(),
            capabilities: vec!["return-path"],
            parameters: json!({ "downtime-limit": 2000 }),
            options: "",
            memory: Memory::Right,
            earliest_stop_ms: 0,
            on_channels: 0,
            at_most_on_channels: u64::MAX,
            record: false,
            boot: Boot::Vfio,
        }
    }

    fn mtty(self) -> Case {
        Case { driver: "mtty", memory: Memory::Unwatched, ..self }
    }

    fn ack(mut self) -> Case {
        self.capabilities.push("switchover-ack");
        self
    }

    fn multifd(mut self) -> Case {
        self.capabilities.push("multifd");
        self.parameters["multifd-channels"] = json!(2);
        self
    }

    fn set(mut self, side: Side, name: &'static str, value: u64) -> Case {
        self.settings.push((side, name, value));
        self
    }

    fn uuid(side: Side, number: usize) -> String {
        format!("7e570000-0000-4000-8000-0000000{:02}{number:03}", 1 + side as usize)
    }

    fn id(number: usize) -> String {
        format!("vfio{number}")
    }

    fn device(&self, side: Side, number: usize) -> Device {
        let (kind, mut settings) = match self.driver {
            "mtty" => ("mtty-2", Vec::new()),
            _ => ("testdev-pci", vec![("migration_flags".to_owned(), self.flags.to_string())]),
        };
        if self.memory != Memory::Unwatched {
            let base = DMA_BASE + number as u64 * DMA_PAGES * 4096;
            // The payload does not program the device.
            for (name, value) in [("dma_needs_bus_master", 0), ("dma_iova", base), ("dma_pages", DMA_PAGES)] {
                settings.push((name.to_owned(), value.to_string()));
            }
        }
        if side == Side::Source && self.memory == Memory::Stale {
            settings.push(("log".to_owned(), "0".to_owned()));
        }
        let more = self.settings.iter().filter(|(at, ..)| *at == side);
        settings.extend(more.map(|(_, name, value)| ((*name).to_owned(), value.to_string())));
        Device { side, uuid: Case::uuid(side, number), driver: self.driver.into(), kind: kind.into(), settings }
    }

    fn monitor(&self, side: Side) -> Monitor {
        let Stop::Qemu(release) = self.path[side as usize];
        let words = "-M microvm,pcie=on,accel=kvm -nodefaults -no-user-config -display none -cpu host,-svm -m";
        let mut arguments: Vec<String> = words.split(' ').map(String::from).collect();
        let mut more = |list: &[&str]| arguments.extend(list.iter().map(|a| a.to_string()));
        let dirty =
            if self.record { "dirty=8K;hold=4K;zero=4K;rate=32K" } else { "dirty=64K;hold=16K;zero=64K;rate=256K" };
        let memory = if self.record { "16" } else { MEMORY };
        let item = format!("name={FW_CFG_NAME},string={dirty};pci=1;report=100");
        more(&[memory, "-bios", "/payload.bin", "-fw_cfg", &item]);
        for number in 0..self.devices {
            let path = format!("/sys/bus/mdev/devices/{}", Case::uuid(side, number));
            let properties = format!("sysfsdev={path},enable-migration=on,migration-events=on{}", self.options);
            more(&["-device", &format!("vfio-pci,id={},{properties}", Case::id(number))]);
        }
        Monitor {
            program: format!("/qemu-{release}/run"),
            kind: Kind::Qemu,
            arguments,
            capabilities: self.capabilities.iter().map(|name| ((*name).to_owned(), true)).collect::<BTreeMap<_, _>>(),
            parameters: self.parameters.clone(),
        }
    }

    fn plan(&self) -> Plan {
        let both = Side::BOTH.into_iter();
        Plan {
            source: self.monitor(Side::Source),
            destination: self.monitor(Side::Destination),
            devices: both
                .flat_map(|side| (0..self.devices).map(move |number| (side, number)))
                .map(|(side, number)| self.device(side, number))
                .collect(),
            ready: "qevm-payload pass=".into(),
            beat: "qevm-payload pass=".into(),
            before_ms: 0,
            after_ms: 500,
            changes: Vec::<Change>::new(),
            limit_s: 120,
            record: self.record.then(|| format!("{SHARE}/{}", self.name)),
        }
    }

    /// What is wrong with a migration, or numbers.
    fn judge(&self, report: &Report) -> Result<Value> {
        self.judge_ends(report)?;
        let passes = judge_guest(report)?;
        let mut devices = Vec::new();
        for number in 0..self.devices {
            self.judge_states(report, number).with_context(|| format!("device {}", Case::id(number)))?;
            if self.driver == "testdev" {
                let judged = self.judge_device(report, number);
                devices.push(judged.with_context(|| format!("device {}", Case::id(number)))?);
            }
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
        Ok(json!({
            "stop_to_resume_ms": (resume - stop).round(),
            "stop_to_running_ms": (running - stop).round(),
            "reported_downtime_ms": report.migration["downtime"],
            "total_ms": report.migration["total-time"],
            "syncs": report.migration["ram"]["dirty-sync-count"],
            "passes": passes,
            "devices": devices,
        }))
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

    fn judge_device(&self, report: &Report, number: usize) -> Result<Value> {
        let [source, destination] = Side::BOTH.map(|side| Case::uuid(side, number));
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
        exactly(&source, "dma_errors", 0)?;
        exactly(&destination, "dma_errors", 0)?;
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
                ensure!(count(&source, "log_pages") > 0, "its log told of no page");
            }
            Memory::Stale => {
                exactly(&destination, "checks_bad", 1)?;
                exactly(&source, "log_pages", 0)?;
            }
        }
        if self.settings.iter().any(|(_, name, value)| *name == "reinits" && *value > 0) {
            ensure!(count(&source, "reinits") > 0, "there were no initial data a second time");
        }
        let names = ["data_size", "precopy_info", "log_reports", "log_pages", "dma_writes", "read_bytes"];
        Ok(names.iter().map(|name| ((*name).to_owned(), json!(count(&source, name)))).collect())
    }
}

/// The guest ran at the source and runs at the destination, goes on where it was, by its clock too, and has found all its memory as it
/// should be.
fn judge_guest(report: &Report) -> Result<Value> {
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
    ensure!(arrived.stale == 0, "{} stale pages: {}", arrived.stale, report.destination_serial);
    ensure!(!report.destination_serial.contains("stale-page"), "{}", report.destination_serial);
    Ok(json!({ "before": last.pass, "after": arrived.pass }))
}

impl From<Case> for Job {
    fn from(case: Case) -> Job {
        let plan = serde_json::to_string(&case.plan()).unwrap_or_default();
        Job {
            name: case.name.into(),
            command: format!("/driver /plans/{}", case.name),
            plan: Some(plan),
            boot: case.boot,
            judge: Judge::Case(Box::new(case)),
        }
    }
}

/// Judges what the driver printed.
pub(super) fn judge(case: &Case, said: &str) -> Result<Value> {
    let line = said.lines().find_map(|line| line.strip_prefix(Report::MARK)).context("the driver gave no report")?;
    case.judge(&serde_json::from_str(line).context("the driver's report")?)
}

const NEW: &str = "11.1";
const OLD: &str = "10.0";

/// Right and wrong.
pub(super) fn cases() -> Vec<Case> {
    use Side::{Destination, Source};
    const LARGE: u64 = 4 << 20;
    vec![
        Case::new("vfio-mtty", NEW, NEW).mtty(),
        Case::new("vfio-mtty-ack", NEW, NEW).mtty().ack(),
        Case::new("vfio-plain", NEW, NEW),
        // The source has to wait until the destination has loaded the initial data.
        Case { earliest_stop_ms: 1000, ..Case::new("vfio-ack", NEW, NEW).ack() }.set(
            Destination,
            "load_initial_ms",
            1000,
        ),
        Case { earliest_stop_ms: 2000, ..Case::new("vfio-reinit", NEW, NEW).ack() }
            .set(Destination, "load_initial_ms", 1000)
            // At once after the first ones: QEMU fails a migration whose device asks anew when it has decided to switch over.
            .set(Source, "dirty_rounds", 0)
            .set(Source, "reinits", 1),
        Case { on_channels: LARGE, ..Case::new("vfio-multifd", NEW, NEW).multifd() }.set(Source, "final_size", LARGE),
        Case {
            options: ",x-migration-multifd-transfer=off",
            at_most_on_channels: LARGE - 1,
            ..Case::new("vfio-multifd-off", NEW, NEW).multifd()
        }
        .set(Source, "final_size", LARGE),
        Case { flags: 1, ..Case::new("vfio-stop-copy", NEW, NEW) },
        Case { flags: 3, ..Case::new("vfio-p2p", NEW, NEW) },
        Case { devices: 2, ..Case::new("vfio-two-devices", NEW, NEW).ack() },
        Case::new("vfio-10.0-to-11.1", OLD, NEW).ack(),
        Case::new("vfio-11.1-to-10.0", NEW, OLD).ack(),
        // The check of the guest's memory must fail. While the source waits for the ack, every page is written again.
        Case { memory: Memory::Stale, ..Case::new("vfio-log-off", NEW, NEW).ack() }.set(
            Destination,
            "load_initial_ms",
            1000,
        ),
    ]
}

/// What is kept for tests that have no such machine.
pub(super) fn recordings() -> Vec<Case> {
    let record = |case: Case| Case { record: true, ..case.mtty() };
    vec![
        record(Case::new("record-11.1-plain", NEW, NEW)),
        record(Case::new("record-11.1-ack", NEW, NEW).ack()),
        record(Case { devices: 2, ..Case::new("record-11.1-two-devices", NEW, NEW).ack() }),
        record(Case::new("record-11.1-multifd", NEW, NEW).ack().multifd()),
        record(Case::new("record-10.0-ack", OLD, OLD).ack()),
        record(Case::new("record-10.0-multifd", OLD, OLD).multifd()),
    ]
}

/// Figures, by the number of instructions: a device whose initial data take 1,480 ms to load, with and without switchover-ack.
pub(super) fn figures() -> Vec<Case> {
    use Side::{Destination, Source};
    let slow = |case: Case| {
        Case { boot: Boot::Counted, parameters: json!({ "downtime-limit": 1000, "max-bandwidth": 0 }), ..case }
            .set(Source, "initial_size", 15 << 20)
            .set(Source, "final_size", 1 << 20)
            .set(Source, "dirty_rounds", 0)
            .set(Destination, "load_initial_ms", 1480)
    };
    vec![
        slow(Case::new("figures-16M-no-ack", NEW, NEW)),
        slow(Case::new("figures-16M-ack", NEW, NEW).ack()),
        slow(Case::new("figures-16M-no-ack-10.0", OLD, OLD)),
        slow(Case::new("figures-16M-ack-10.0", OLD, OLD).ack()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the driver saw of two QEMUs 11.1 in the lab: everything in order, and a device whose log told nothing.
    const GOOD: &str = include_str!("../../tests/data/lab/11.1-ack.json");
    const LOG_OFF: &str = include_str!("../../tests/data/lab/11.1-log-off.json");

    fn report(text: &str) -> Report {
        serde_json::from_str(text).unwrap()
    }

    fn plain() -> Case {
        Case::new("x", NEW, NEW)
    }

    #[test]
    fn a_migration_holds_if_device_guest_and_memory_do() {
        let good = || report(GOOD);
        assert!(plain().judge(&good()).is_ok(), "{:?}", plain().judge(&good()));
        let refused = |what: &str, change: &dyn Fn(&mut Report)| {
            let mut report = good();
            change(&mut report);
            let error = plain().judge(&report).expect_err(what);
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
            let uuid = Case::uuid(Side::Destination, 0);
            refused(name, &|r| *r.counters.get_mut(&uuid).unwrap().get_mut(name).unwrap() = value);
        }
        let early = Case { earliest_stop_ms: 60_000, ..plain() };
        assert!(early.judge(&good()).is_err());
        assert!(Case { on_channels: 1, ..plain() }.judge(&good()).is_err());
        assert!(Case { devices: 2, ..plain() }.judge(&good()).is_err());
        assert!(Case { flags: 1, ..plain() }.judge(&good()).is_err());
    }

    #[test]
    fn a_device_that_does_not_log_must_be_found_out() {
        let stale = Case { memory: Memory::Stale, ..plain() };
        assert!(stale.judge(&report(LOG_OFF)).is_ok(), "{:?}", stale.judge(&report(LOG_OFF)));
        assert!(plain().judge(&report(LOG_OFF)).is_err());
        assert!(stale.judge(&report(GOOD)).is_err());
    }

    #[test]
    fn no_report_is_no_success() {
        assert!(judge(&plain(), "driver: the source does not start").is_err());
        assert!(judge(&plain(), &format!("noise\n{}{GOOD}\n", Report::MARK)).is_ok());
    }

    #[test]
    fn jobs_have_names_of_their_own_and_recordings_are_told_by_them() {
        let mut names: Vec<_> = cases().iter().chain(&recordings()).chain(&figures()).map(|case| case.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(recordings().iter().all(|case| case.name.starts_with(RECORDING) && case.record));
    }
}
