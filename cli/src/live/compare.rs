//! What QEMU says to a difference between two sides.

use super::facts::{Cpu, Device, Facts, Properties};
use qevm_savevm::check::Outcome;
use serde_json::Value;
use std::collections::BTreeMap;

/// A difference between two sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What differs.
    pub subject: String,
    /// What the source has.
    pub source: String,
    /// What the destination has.
    pub destination: String,
    /// What a migration comes to because of it.
    pub outcome: Outcome,
    /// What to change, and on which side.
    pub advice: String,
}

struct Judge<'f> {
    source: &'f Facts,
    destination: &'f Facts,
    found: Vec<Difference>,
}

/// Compares what is known of both sides, in the order in which a destination would meet the differences.
pub fn compare(source: &Facts, destination: &Facts) -> Vec<Difference> {
    let mut judge = Judge { source, destination, found: Vec::new() };
    judge.capabilities();
    judge.machine();
    judge.ram();
    judge.processors();
    judge.devices();
    judge.found
}

/// Capabilities that must be the same on both sides.
const BOTH: [&str; 6] = ["multifd", "mapped-ram", "x-ignore-shared", "postcopy-preempt", "compress", "rdma-pin-all"];
/// Capabilities that the destination must have if the source has them.
const FOLLOWED: [&str; 1] = ["postcopy-ram"];
/// Parameters of page channels, which must be the same on both sides.
const OF_CHANNELS: [&str; 2] = ["multifd-channels", "multifd-compression"];

/// Properties of the machine, a processor or a device that belong to the host, or that no stream depends on.
const OF_THE_HOST: [&str; 48] = [
    "acpi-index",
    "addr",
    "append",
    "backend",
    "bootindex",
    "chardev",
    "check",
    "core-id",
    "die-id",
    "discard_granularity",
    "drive",
    "dt-compatible",
    "dtb",
    "dump-guest-core",
    "dumpdtb",
    "enforce",
    "failover_pair_id",
    "fill-mtrr-mask",
    "firmware",
    "graphics",
    "hotpluggable",
    "hotplugged",
    "id",
    "initrd",
    "ioeventfd",
    "iothread",
    "kernel",
    "kvm",
    "mac",
    "mem-merge",
    "memory-encryption",
    "migratable",
    "module-id",
    "netdev",
    "node-id",
    "parent_bus",
    "phandle-start",
    "realized",
    "romfile",
    "serial",
    "shim",
    "socket-id",
    "start-powered-off",
    "sysfsdev",
    "thread-id",
    "usb",
    "vhost",
    "write-cache",
];

/// Properties that show in bytes of the configuration space that a destination compares.
const IN_CONFIGURATION_SPACE: [&str; 8] = ["vectors", "port", "slot", "hotplug", "x-speed", "x-width", "aer", "ats"];

/// Switches of a processor that are no flags: they say how its leaves are filled in, and a release may have them or
/// not.
const NO_FLAGS: [&str; 6] = [
    "full-cpuid-auto-level",
    "hv-enforce-cpuid",
    "hv-passthrough",
    "kvm-pv-enforce-cpuid",
    "legacy-multi-node",
    "tcg-cpuid",
];

/// What a guest reads of its processor.
const IDENTITY: [&str; 4] = ["family", "model", "stepping", "phys-bits"];

impl Judge<'_> {
    fn add(
        &mut self,
        subject: impl Into<String>,
        sides: [&dyn std::fmt::Display; 2],
        outcome: Outcome,
        advice: String,
    ) {
        let [source, destination] = sides.map(|side| side.to_string());
        self.found.push(Difference { subject: subject.into(), source, destination, outcome, advice });
    }

    fn capabilities(&mut self) {
        let (source, destination) = (self.source, self.destination);
        let on = |on: bool| if on { "on" } else { "off" };
        if let (Some(here), Some(there)) = (&source.capabilities, &destination.capabilities) {
            let has = |all: &BTreeMap<String, bool>, name: &str| all.get(name).copied().unwrap_or(false);
            let unlike = BOTH.iter().filter(|name| has(here, name) != has(there, name));
            let missing = FOLLOWED.iter().filter(|name| has(here, name) && !has(there, name));
            for name in unlike.chain(missing) {
                let (here, there) = (on(has(here, name)), on(has(there, name)));
                let advice = format!("migrate-set-capabilities: give {name} the same state on both sides");
                self.add(format!("capability {name}"), [&here, &there], Outcome::Fails, advice);
            }
            if has(here, "validate-uuid")
                && let (Some(here), Some(there)) = (&source.uuid, &destination.uuid)
                && here != there
            {
                self.add("UUID", [here, there], Outcome::Fails, format!("start the destination with -uuid {here}"));
            }
        }
        let (Some(here), Some(there)) = (&source.parameters, &destination.parameters) else { return };
        let multifd = [source, destination].into_iter().filter_map(|side| side.capabilities.as_ref());
        let multifd = multifd.into_iter().any(|all| all.get("multifd") == Some(&true));
        for name in OF_CHANNELS.iter().filter(|_| multifd) {
            if let (Some(here), Some(there)) = (here.get(*name), there.get(*name))
                && here != there
            {
                let advice = format!("migrate-set-parameters: {name} must be the same on both sides");
                self.add(format!("parameter {name}"), [&shown(here), &shown(there)], Outcome::Fails, advice);
            }
        }
        let tls = |all: &Properties| all.get("tls-creds").and_then(Value::as_str).is_some_and(|name| !name.is_empty());
        if tls(here) != tls(there) {
            let word = |tls: bool| if tls { "set" } else { "not set" };
            let advice = "migrate-set-parameters: both sides use TLS, or none does".to_owned();
            self.add("parameter tls-creds", [&word(tls(here)), &word(tls(there))], Outcome::Fails, advice);
        }
    }

    fn machine(&mut self) {
        let (source, destination) = (self.source, self.destination);
        if let (Some(here), Some(there)) = (&source.arch, &destination.arch)
            && here != there
        {
            self.add("target", [here, there], Outcome::Fails, format!("the destination must be qemu-system-{here}"));
        }
        if let (Some(here), Some(there)) = (&source.machine, &destination.machine)
            && here != there
        {
            let alias = !there.contains('.') && here.contains(&format!("{there}-"));
            let outcome = if alias { Outcome::MayFail } else { Outcome::Fails };
            self.add("machine type", [here, there], outcome, format!("start the destination with -machine {here}"));
        }
        if let (Some(here), Some(there)) = (&source.accelerator, &destination.accelerator)
            && here != there
        {
            let outcome = if here == "kvm" && self.is_x86() { Outcome::Fails } else { Outcome::MayFail };
            let advice = "use the same accelerator on both sides: devices of KVM have sections of their own".to_owned();
            self.add("accelerator", [here, there], outcome, advice);
        }
        let slots = |side: &Facts| side.machine_properties.get("memory slots").and_then(Value::as_u64);
        if let (Some(here), Some(there)) = (slots(source), slots(destination))
            && here != there
        {
            let outcome = if self.is_pc() { Outcome::Fails } else { Outcome::MayFail };
            self.add("memory slots", [&here, &there], outcome, format!("start the destination with -m …,slots={here}"));
        }
        let unlike = unlike(&source.machine_properties, &destination.machine_properties);
        for (name, here, there) in unlike.into_iter().filter(|(name, ..)| *name != "memory slots") {
            let advice = format!("start the destination with -machine …,{name}={}", shown(here));
            self.add(
                format!("property {name} of the machine"),
                [&shown(here), &shown(there)],
                Outcome::MayFail,
                advice,
            );
        }
    }

    fn is_x86(&self) -> bool {
        self.source.arch.as_deref().is_some_and(|arch| ["x86_64", "i386"].contains(&arch))
    }

    fn is_pc(&self) -> bool {
        self.source.machine.as_deref().is_some_and(|machine| machine.starts_with("pc-"))
    }

    fn ram(&mut self) {
        let (source, destination) = (self.source, self.destination);
        let (Some(here), Some(there)) = (&source.ram, &destination.ram) else {
            if let (Some(here), Some(there)) = (source.memory, destination.memory)
                && here != there
            {
                let sides = [here, there].map(|bytes| format!("{bytes} bytes"));
                let advice = format!("start the destination with {} MiB of memory", here >> 20);
                self.add("memory", [&sides[0], &sides[1]], Outcome::Fails, advice);
            }
            return;
        };
        for (name, len) in here {
            let subject = format!("RAM block '{name}'");
            match there.get(name) {
                Some(other) if other == len => {}
                // QEMU resizes the tables that firmware gets through fw_cfg.
                Some(_) if name.starts_with("/rom@etc/") => {}
                Some(other) => {
                    let advice =
                        format!("give the memory, backend or ROM {len} bytes on both sides (-m, size=, romsize=)");
                    let sides = [len, other].map(|bytes| format!("{bytes} bytes"));
                    self.add(subject, [&sides[0], &sides[1]], Outcome::Fails, advice);
                }
                None => {
                    let advice = "the destination lacks the block's device, or has it at another place".to_owned();
                    self.add(subject, [&format!("{len} bytes"), &"no such block"], Outcome::Fails, advice);
                }
            }
        }
    }

    fn processors(&mut self) {
        let (Some(here), Some(there)) = (&self.source.cpu, &self.destination.cpu) else { return };
        if here.count > there.count {
            let advice = format!("start the destination with -smp {}", here.count);
            self.add("processors", [&here.count, &there.count], Outcome::Fails, advice);
        }
        if let (Some(most), Some(other)) = (here.max, there.max)
            && most != other
        {
            let outcome = if self.is_pc() { Outcome::Fails } else { Outcome::MayFail };
            let advice = format!("start the destination with -smp …,maxcpus={most}");
            self.add("possible processors", [&most, &other], outcome, advice);
        }
        if here.properties.is_empty() || there.properties.is_empty() {
            return;
        }
        let lacking = flags(here, there);
        if !lacking.is_empty() {
            let advice =
                "no QEMU compares them, but the guest goes on to use what it has found: start the destination \
                          with them (-cpu …,+flag), or the source without them"
                    .to_owned();
            self.add(
                format!("flags of the processor ({})", here.model),
                [&lacking, &"not there"],
                Outcome::MayFail,
                advice,
            );
        }
        for name in IDENTITY {
            if let (Some(mine), Some(other)) = (here.properties.get(name), there.properties.get(name))
                && mine != other
            {
                let advice = format!("use the same model on both sides: the source has {}", here.model);
                self.add(format!("{name} of the processor"), [&shown(mine), &shown(other)], Outcome::MayFail, advice);
            }
        }
    }

    fn devices(&mut self) {
        let (Some(here), Some(there)) = (&self.source.devices, &self.destination.devices) else { return };
        let told = |device: &Device| !self.destination.only_placed || (device.pci && !device.built_in);
        let known: Vec<_> = here.iter().filter(|(_, device)| told(device)).collect();
        for (place, device) in known {
            match there.get(place) {
                Some(other) => self.one_device(place, device, other),
                None => {
                    let elsewhere =
                        there.iter().find(|(at, other)| other.kind == device.kind && !here.contains_key(*at));
                    let expected = elsewhere.map_or("no such device".to_owned(), |(at, _)| format!("at {at}"));
                    let outcome = if device.pci { Outcome::Fails } else { Outcome::MayFail };
                    let advice = match (elsewhere, device.pci) {
                        (Some(_), true) => {
                            format!("put it at the same place on the destination: {place} (bus=, addr=)")
                        }
                        _ => format!("start the destination with -device {}, at the same place", device.kind),
                    };
                    self.add(format!("device {} at {place}", device.kind), [&"there", &expected], outcome, advice);
                }
            }
        }
    }

    fn one_device(&mut self, place: &str, device: &Device, other: &Device) {
        let family = |kind: &str| kind.trim_end_matches("-transitional").trim_end_matches("-non").to_owned();
        if !other.kind.is_empty() && family(&device.kind) != family(&other.kind) {
            let advice = format!("put a {} there on the destination, too", device.kind);
            let outcome = if device.pci { Outcome::Fails } else { Outcome::MayFail };
            return self.add(format!("device at {place}"), [&device.kind, &other.kind], outcome, advice);
        }
        for (name, mine, theirs) in unlike(&device.properties, &other.properties) {
            let decisive = device.pci && IN_CONFIGURATION_SPACE.contains(&name);
            let outcome = if decisive { Outcome::Fails } else { Outcome::MayFail };
            let advice = format!(
                "give the device the same {name} on both sides: -device {},{name}={}",
                device.kind,
                shown(mine)
            );
            let subject = format!("property {name} of {} at {place}", device.kind);
            self.add(subject, [&shown(mine), &shown(theirs)], outcome, advice);
        }
    }
}

/// Properties that both have, with different values, but for those of the host.
fn unlike<'p>(here: &'p Properties, there: &'p Properties) -> Vec<(&'p str, &'p Value, &'p Value)> {
    let differs = |(name, mine): (&'p String, &'p Value)| {
        let theirs = there.get(name).filter(|theirs| *theirs != mine)?;
        (!OF_THE_HOST.contains(&name.as_str())).then_some((name.as_str(), mine, theirs))
    };
    here.iter().filter_map(differs).collect()
}

/// Names of the flags that a processor has and the other has not.
fn flags(here: &Cpu, there: &Cpu) -> String {
    let lacks = |(name, on): &(&String, &Value)| {
        **on == true
            && there.properties.get(*name) != Some(&Value::Bool(true))
            && !OF_THE_HOST.contains(&name.as_str())
            && !NO_FLAGS.contains(&name.as_str())
            && !name.starts_with("x-")
            && !name.contains('_')
    };
    here.properties.iter().filter(lacks).map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(on) => if *on { "on" } else { "off" }.to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;
