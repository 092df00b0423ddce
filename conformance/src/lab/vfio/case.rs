//! How a guest with devices travels, and what must be seen.

use crate::lab::boot::Boot;
use crate::lab::guest;
use qevm_lab::{Change, Device, Kind, Monitor, Plan, Side};
use reference_vmm::payload::FW_CFG_NAME;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The releases between which guests travel.
pub(super) const NEW: &str = "11.1";
pub(super) const OLD: &str = "10.0";

/// The address and number of the pages that a device writes, beyond what the payload uses, for each device its own.
pub(super) const DMA_BASE: u64 = 16 << 20;
pub(super) const DMA_PAGES: u64 = 256;
pub(super) const MEMORY: &str = "32";
/// Folder of the recordings in the machine, and what their jobs' names begin with.
const SHARE: &str = "/share";

/// In a recording, whose guest has less.
pub(super) const RECORDED_DMA: (u64, u64) = (12 << 20, 16);
/// The same for Linux, which keeps out of there (`memmap=`).
pub(super) const LINUX_DMA_BASE: u64 = 48 << 20;
pub(super) const LINUX_MEMORY: &str = "96";

/// A monitor on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// QEMU of this release.
    Qemu(&'static str),
    /// reference-vmm towards a QEMU of this release.
    Reference(&'static str),
}

/// What the device's check of the guest's memory must say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    /// Each page that it wrote has arrived.
    Right,
    /// Pages are missing: its log did not tell of them, and a check that does not notice is none.
    Stale,
    /// The device writes none.
    Unwatched,
}

/// What the guest does with its devices: the payload's key `pci`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Use {
    /// Nothing: it does not touch them.
    None = 1,
    /// It programs them, and uses registers, memory, DMA and the interrupt pin.
    Intx = 3,
    /// The same with MSI.
    Msi = 4,
    /// The same with MSI-X.
    MsiX = 5,
}

/// Who uses the devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Guest {
    /// The payload of reference-vmm.
    Payload,
    /// Linux, which has found the device by ACPI, and a program in it (`conformance/lab/driver/src/bin/linux-guest.rs`)
    /// by UIO.
    Linux,
}

/// How a guest with devices travels, and what must be seen.
#[derive(Debug, Clone)]
pub(in crate::lab) struct Case {
    pub(in crate::lab) name: String,
    pub(super) path: Vec<Stop>,
    pub(super) devices: usize,
    /// `addr=` of each device, and its place on the bus; without the option devices take slots in order.
    pub(super) addresses: &'static [(Option<u64>, u64)],
    pub(super) driver: &'static str,
    pub(super) flags: u64,
    pub(super) settings: Vec<(Side, &'static str, String)>,
    /// What is written to the first device of the source on the way to the last stop: milliseconds after the start,
    /// file, text.
    pub(super) changes: Vec<(u64, &'static str, String)>,
    /// Of both sides, or of one.
    pub(super) capabilities: Vec<(Option<Side>, &'static str)>,
    /// Acks of the switchover are counted as by QEMU 10.0.
    pub(super) legacy_acks: bool,
    /// Devices are attached to an iommufd by their device files, and not by their groups.
    pub(super) iommufd: bool,
    /// What reference-vmm's `--accel` is.
    pub(super) accel: &'static str,
    /// `downtime-limit` and what else both sides are told.
    pub(super) parameters: Value,
    /// Further properties of the devices.
    pub(super) options: &'static str,
    pub(super) memory: Memory,
    pub(super) used: Use,
    pub(super) guest: Guest,
    /// Milliseconds after `migrate` before which the source must not stop its guest.
    pub(super) earliest_stop_ms: u64,
    /// Least bytes on page channels.
    pub(super) on_channels: u64,
    /// Most bytes on page channels.
    pub(super) at_most_on_channels: u64,
    pub(super) record: bool,
    pub(in crate::lab) boot: Boot,
    pub(super) ending: Ending,
    /// Milliseconds in which it fails when the destination has loaded this many bytes.
    pub(super) fails_within: Option<(i64, f64)>,
    /// Milliseconds after `migrate` at which it is cancelled.
    pub(super) cancel_after_ms: Option<u64>,
    /// Seconds after which it has to have ended.
    pub(super) limit_s: u64,
}

/// Who reports a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Says {
    /// In the source's `query-migrate`.
    Error,
    /// In what the monitor of this side prints, or its `query-migrate`.
    Log(Side),
}

/// How the last migration of a trip has to end.
#[derive(Debug, Clone)]
pub(super) enum Ending {
    /// The guest arrives, and everything is as it should be.
    Arrives,
    /// Something fails: the guest runs at this side alone, or is paused at both, and a monitor says why.
    Fault {
        /// Where the guest runs.
        runs: Option<Side>,
        /// Where it is said, and words that are all in one line there.
        says: Option<(Says, Vec<String>)>,
    },
    /// It ends, in whichever way, with a named failure or with a guest that has arrived.
    Ends,
    /// It is measured, and may not end within its time.
    Measured,
}

pub(super) const PRECOPY: u64 = 7;

impl Case {
    pub(super) fn new(name: impl Into<String>, source: &'static str, destination: &'static str) -> Case {
        Case {
            name: name.into(),
            path: vec![Stop::Qemu(source), Stop::Qemu(destination)],
            devices: 1,
            addresses: &[],
            driver: "testdev",
            flags: PRECOPY,
            settings: Vec::new(),
            changes: Vec::new(),
            capabilities: vec![(None, "return-path")],
            legacy_acks: false,
            iommufd: false,
            accel: "kvm",
            parameters: json!({ "downtime-limit": 2000 }),
            options: "",
            memory: Memory::Right,
            used: Use::None,
            guest: Guest::Payload,
            earliest_stop_ms: 0,
            on_channels: 0,
            at_most_on_channels: u64::MAX,
            record: false,
            boot: Boot::Vfio,
            ending: Ending::Arrives,
            fails_within: None,
            cancel_after_ms: None,
            limit_s: 120,
        }
    }

    /// From a QEMU of this release to reference-vmm, and from there to such a QEMU.
    pub(super) fn visit(name: impl Into<String>, release: &'static str) -> Case {
        let path = vec![Stop::Qemu(release), Stop::Reference(release), Stop::Qemu(release)];
        Case { path, ..Case::new(name, release, release) }
    }

    pub(super) fn mtty(self) -> Case {
        Case { driver: "mtty", memory: Memory::Unwatched, ..self }
    }

    /// The guest uses its devices.
    pub(super) fn used(self, used: Use) -> Case {
        Case { used, ..self }
    }

    /// The guest is Linux, and uses its device, by its interrupt pin.
    pub(super) fn linux(self) -> Case {
        Case { guest: Guest::Linux, used: Use::Intx, limit_s: 300, ..self }
    }

    pub(super) fn is_used(&self) -> bool {
        self.used > Use::None
    }

    pub(super) fn ack(mut self) -> Case {
        self.capabilities.push((None, "switchover-ack"));
        self
    }

    pub(super) fn multifd(mut self) -> Case {
        self.capabilities.push((None, "multifd"));
        self.parameters["multifd-channels"] = json!(2);
        self
    }

    pub(super) fn set(mut self, side: Side, name: &'static str, value: impl ToString) -> Case {
        self.settings.push((side, name, value.to_string()));
        self
    }

    pub(super) fn change(mut self, after_ms: u64, name: &'static str, value: impl ToString) -> Case {
        self.changes.push((after_ms, name, value.to_string()));
        self
    }

    /// Whether the figures count, and the migration is looked at while it is under way.
    pub(super) fn is_measured(&self) -> bool {
        self.boot == Boot::Counted
    }

    pub(super) fn uuid(stop: usize, number: usize) -> String {
        format!("7e570000-0000-4000-8000-0000000{:02}{number:03}", 1 + stop)
    }

    /// Which ends of migrations a stop is.
    pub(super) fn sides(&self, stop: usize) -> impl Iterator<Item = Side> {
        let is = move |side: &Side, last: bool| match side {
            Side::Source => !last,
            Side::Destination => stop > 0,
        };
        let last = stop + 1 == self.path.len();
        Side::BOTH.into_iter().filter(move |side| is(side, last))
    }

    pub(super) fn id(number: usize) -> String {
        format!("vfio{number}")
    }

    /// Its number on the bus.
    pub(super) fn slot(&self, number: usize) -> u64 {
        self.addresses.get(number).map_or(1 + number as u64, |(_, slot)| *slot)
    }

    pub(super) fn device(&self, stop: usize, number: usize) -> Device {
        let (kind, mut settings) = match self.driver {
            "mtty" => ("mtty-2", Vec::new()),
            _ => ("testdev-pci", vec![("migration_flags".to_owned(), self.flags.to_string())]),
        };
        if self.memory != Memory::Unwatched && !self.is_used() {
            let base = DMA_BASE + number as u64 * DMA_PAGES * 4096;
            // Nothing else says where.
            for (name, value) in [("dma_needs_bus_master", 0), ("dma_iova", base), ("dma_pages", DMA_PAGES)] {
                settings.push((name.to_owned(), value.to_string()));
            }
        }
        let is = |wanted: Side| self.sides(stop).any(|side| side == wanted);
        if is(Side::Source) && self.memory == Memory::Stale {
            settings.push(("log".to_owned(), "0".to_owned()));
        }
        let more = self.settings.iter().filter(|(at, ..)| is(*at));
        settings.extend(more.map(|(_, name, value)| ((*name).to_owned(), value.clone())));
        Device { stop, uuid: Case::uuid(stop, number), driver: self.driver.into(), kind: kind.into(), settings }
    }

    /// The monitor's options that describe the guest: QEMU's have one dash, reference-vmm's two. A guest that comes
    /// brings its own kernel.
    pub(super) fn guest_arguments(&self, stop: usize) -> Vec<String> {
        let (dash, memory) = match self.path[stop] {
            Stop::Qemu(_) => ("-", "-m"),
            Stop::Reference(_) => ("--", "--memory"),
        };
        if self.guest == Guest::Linux {
            let bios = format!("/qemu-{}/bios-microvm.bin", NEW);
            let mut all = vec![memory.into(), LINUX_MEMORY.into(), format!("{dash}bios"), bios];
            if stop == 0 {
                let (megabytes, end) = ((DMA_PAGES * 4096) >> 20, LINUX_DMA_BASE >> 20);
                let append = format!(
                    "console=ttyS0 quiet loglevel=0 reboot=t panic=-1 no_timer_check tsc=reliable mitigations=off \
                     random.trust_cpu=on memmap={megabytes}M${end}M -- {LINUX_DMA_BASE} {DMA_PAGES}"
                );
                let file = |name: &str| format!("/{}/{name}", guest::USER);
                for (option, value) in [("kernel", file("vmlinuz")), ("initrd", file("initrd")), ("append", append)] {
                    all.extend([format!("{dash}{option}"), value]);
                }
            }
            return all;
        }
        let dirty =
            if self.record { "dirty=8K;hold=4K;zero=4K;rate=32K" } else { "dirty=64K;hold=16K;zero=64K;rate=256K" };
        let (base, pages) = if self.record { RECORDED_DMA } else { (DMA_BASE, DMA_PAGES) };
        let used = match self.is_used() {
            true => format!("rate=1M;dma={base};dmapages={pages};pci={}", self.used as u8),
            false => "pci=1".to_owned(),
        };
        let item = format!("name={FW_CFG_NAME},string={dirty};{used};report=100");
        let item_option = if dash == "-" { "-fw_cfg" } else { "--fw-cfg" };
        let megabytes = if self.record { "16" } else { MEMORY };
        [memory, megabytes, &format!("{dash}bios"), "/payload.bin", item_option, &item].map(String::from).to_vec()
    }

    pub(super) fn monitor(&self, stop: usize) -> Monitor {
        let (program, kind, mut words) = match self.path[stop] {
            Stop::Qemu(release) => {
                // The names of threads tell vCPUs from the others.
                let mut words =
                    "-M microvm,pcie=on,accel=kvm -nodefaults -no-user-config -display none -cpu host,-svm \
                                 -name lab,debug-threads=on"
                        .to_owned();
                if self.legacy_acks {
                    words.push_str(" -global migration.switchover-ack-legacy=on");
                }
                (format!("/qemu-{release}/run"), Kind::Qemu, words)
            }
            Stop::Reference(release) => {
                let release = if self.legacy_acks { OLD } else { release };
                let words = format!("--machine microvm,pcie=on,qemu={release} --accel {}", self.accel);
                ("/reference-vmm".to_owned(), Kind::Reference, words)
            }
        };
        // QEMU takes two dashes as well.
        let mut attached = "";
        if self.iommufd {
            words.push_str(" --object iommufd,id=iommufd0");
            attached = ",iommufd=iommufd0";
        }
        for number in 0..self.devices {
            let path = format!("/sys/bus/mdev/devices/{}", Case::uuid(stop, number));
            let address = self.addresses.get(number).and_then(|(address, _)| *address);
            let address = address.map(|address| format!(",addr={address:x}")).unwrap_or_default();
            let properties =
                format!("sysfsdev={path},enable-migration=on,migration-events=on{attached}{address}{}", self.options);
            words.push_str(&format!(" --device vfio-pci,id={},{properties}", Case::id(number)));
        }
        Monitor {
            program,
            kind,
            arguments: words.split(' ').map(String::from).chain(self.guest_arguments(stop)).collect(),
            capabilities: self.capabilities(stop),
            parameters: self.parameters.clone(),
        }
    }

    pub(super) fn capabilities(&self, stop: usize) -> BTreeMap<String, bool> {
        let own = |side: &Option<Side>| side.is_none_or(|side| self.sides(stop).any(|own| own == side));
        self.capabilities.iter().filter(|(side, _)| own(side)).map(|(_, name)| ((*name).to_owned(), true)).collect()
    }

    pub(in crate::lab) fn plan(&self) -> Plan {
        let source = Case::uuid(self.path.len() - 2, 0);
        let change = |(after_ms, name, value): &(u64, &str, String)| Change {
            after_ms: *after_ms,
            uuid: source.clone(),
            name: (*name).to_owned(),
            value: value.clone(),
        };
        let stops = 0..self.path.len();
        Plan {
            stops: stops.clone().map(|stop| self.monitor(stop)).collect(),
            devices: stops
                .flat_map(|stop| (0..self.devices).map(move |number| (stop, number)))
                .map(|(stop, number)| self.device(stop, number))
                .collect(),
            ready: "qevm-payload pass=".into(),
            ready_s: if self.guest == Guest::Linux { 900 } else { 120 },
            beat: "qevm-payload pass=".into(),
            before_ms: 0,
            after_ms: if self.is_used() { 3000 } else { 500 },
            changes: self.changes.iter().map(change).collect(),
            limit_s: self.limit_s,
            record: self.record.then(|| format!("{SHARE}/{}", self.name)),
            cancel_after_ms: self.cancel_after_ms,
            samples: self.is_measured(),
        }
    }
}
