//! `qevm check` says beforehand what a real destination does: it is given a stream of the source and one of the
//! destination, and its verdict must be the destination's, with the line that the destination prints.

use super::question::{Trial, TrialEnv};
use super::side::Fate::{self, Fails, Loads};
use super::side::{Side, load, side, with, write};
use crate::roots::Suite::{Bookworm, Bullseye, Sid, Trixie};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::ffi::OsStr;

const A_UUID: &str = "microvm -uuid 2bbd4b29-9d2b-4e0b-9d0e-1f3f6f0e7a11";
const ANOTHER_UUID: &str = "microvm -uuid 11111111-2222-4333-8444-555555555555";
const NO_START: &str = "microvm -bios {zeroes} -global migration.send-switchover-start=off";

pub(super) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (what, source, destination, fate) in PAIRS {
        let name = format!("foreseen/{what}/{} to {}", source.suite.series(), destination.suite.series());
        let kvm = source.arguments.contains("kvm") || destination.arguments.contains("kvm");
        let suites = [source.suite, destination.suite];
        trials.push(Trial::new(name, &suites, kvm, move |env| pair(env, source, destination, *fate)));
    }
    trials
}

#[rustfmt::skip]
const PAIRS: &[(&str, Side<'_>, Side<'_>, Fate)] = &[
    ("same", side(Sid, "microvm"), side(Sid, "microvm"), Loads),
    ("less memory", side(Sid, "microvm -m 32"), side(Sid, "microvm -m 16"), Fails),
    ("more memory", side(Bookworm, "pc -m 32"), side(Bookworm, "pc -m 64"), Fails),
    ("device missing", side(Trixie, "q35 -device virtio-rng-pci"), side(Trixie, "q35"), Fails),
    ("device missing", side(Bullseye, "pc -device virtio-rng-pci"), side(Bullseye, "pc"), Fails),
    ("device extra", side(Trixie, "q35"), side(Trixie, "q35 -device virtio-rng-pci"), Loads),
    ("device moved", side(Sid, "q35 -device virtio-rng-pci,addr=4"), side(Sid, "q35 -device virtio-rng-pci,addr=5"), Fails),
    ("RAM block missing", side(Sid, "q35 -device VGA"), side(Sid, "q35"), Fails),
    ("video memory", side(Sid, "q35 -device VGA,vgamem_mb=16"), side(Sid, "q35 -device VGA,vgamem_mb=32"), Fails),
    ("fewer CPUs", side(Sid, "microvm -smp 2"), side(Sid, "microvm -smp 1"), Fails),
    ("fewer CPUs", side(Bookworm, "q35 -smp 2"), side(Bookworm, "q35 -smp 1"), Fails),
    ("more CPUs", side(Sid, "microvm -smp 1"), side(Sid, "microvm -smp 2"), Loads),
    ("CPU model", side(Bookworm, "q35 -cpu qemu64"), side(Bookworm, "q35 -cpu max"), Loads),
    ("alias", side(Trixie, "q35"), side(Sid, "q35"), Fails),
    ("machine type", side(Bookworm, "pc-q35-7.2"), side(Bookworm, "pc-i440fx-7.2"), Fails),
    ("x-ignore-shared at the source", with(Sid, "microvm", "x-ignore-shared"), side(Sid, "microvm"), Fails),
    ("x-ignore-shared at the destination", side(Bookworm, "microvm"), with(Bookworm, "microvm", "x-ignore-shared"), Fails),
    ("postcopy-ram at the source", with(Trixie, "microvm", "postcopy-ram"), side(Trixie, "microvm"), Fails),
    ("postcopy-ram at the destination", side(Bookworm, "microvm"), with(Bookworm, "microvm", "postcopy-ram"), Loads),
    ("xbzrle at the source", with(Bookworm, "microvm", "xbzrle"), side(Bookworm, "microvm"), Loads),
    ("another UUID", with(Sid, A_UUID, "validate-uuid"), with(Sid, ANOTHER_UUID, "validate-uuid"), Fails),
    ("another UUID unvalidated", side(Sid, A_UUID), side(Sid, ANOTHER_UUID), Loads),
    ("SWITCHOVER_START", side(Sid, "microvm -bios {zeroes}"), side(Bookworm, "microvm -bios {zeroes}"), Fails),
    ("without SWITCHOVER_START", side(Sid, NO_START), side(Bookworm, "microvm -bios {zeroes}"), Loads),
    ("second I/O APIC", side(Bookworm, "microvm -bios {zeroes}"), side(Bullseye, "microvm -bios {zeroes}"), Fails),
    ("firmware of another size", side(Sid, "microvm"), side(Sid, "microvm -bios {zeroes}"), Fails),
    ("upward", side(Bullseye, "microvm -bios {zeroes}"), side(Trixie, "microvm -bios {zeroes}"), Loads),
    ("versioned", side(Bullseye, "pc-q35-5.2"), side(Trixie, "pc-q35-5.2"), Loads),
    ("versioned", side(Trixie, "pc-q35-5.2"), side(Bullseye, "pc-q35-5.2"), Loads),
    ("versioned", side(Bookworm, "pc-i440fx-7.2 -device virtio-net-pci"), side(Sid, "pc-i440fx-7.2 -device virtio-net-pci"), Loads),
    ("no kvmclock in TCG", side(Sid, "microvm,accel=kvm,rtc=on"), side(Sid, "microvm"), Fails),
    ("no RTC in KVM", side(Bookworm, "microvm"), side(Bookworm, "microvm,accel=kvm"), Fails),
    ("TCG to KVM with an RTC", side(Trixie, "microvm"), side(Trixie, "microvm,accel=kvm,rtc=on"), Loads),
    ("MSI-X vectors", side(Bookworm, "q35 -device virtio-net-pci,vectors=3"), side(Bookworm, "q35 -device virtio-net-pci,vectors=10"), Fails),
    ("MSI-X vectors", side(Sid, "q35 -device virtio-net-pci,vectors=3"), side(Sid, "q35 -device virtio-net-pci,vectors=10"), Fails),
    ("timers of the HPET", side(Sid, "q35"), side(Sid, "q35 -global hpet.timers=4"), Fails),
    ("footers at the source", side(Sid, "q35"), side(Sid, "q35 -global migration.send-section-footer=off"), Fails),
    ("footers at the destination", side(Bookworm, "q35 -global migration.send-section-footer=off"), side(Bookworm, "q35"), Fails),
    ("globalstate at the source", side(Sid, "q35"), side(Sid, "q35 -global migration.store-global-state=off"), Loads),
    ("TCO at the source", side(Sid, "q35"), side(Sid, "q35 -global ICH9-LPC.enable_tco=off"), Fails),
    ("TCO at the source", side(Bookworm, "q35"), side(Bookworm, "q35 -global ICH9-LPC.enable_tco=off"), Loads),
    ("memory slots at the source", side(Sid, "q35 -m 16,slots=2,maxmem=1G"), side(Sid, "q35 -m 16"), Fails),
    ("memory slots at the destination", side(Trixie, "pc -m 16"), side(Trixie, "pc -m 16,slots=2,maxmem=1G"), Fails),
    ("hotplug of bridges", side(Sid, "pc"), side(Sid, "pc -global PIIX4_PM.acpi-pci-hotplug-with-bridge-support=off"), Fails),
    ("outputs of a display", side(Sid, "q35 -device virtio-gpu-pci,max_outputs=2"), side(Sid, "q35 -device virtio-gpu-pci"), Fails),
    ("outputs of a display", side(Bookworm, "q35 -device virtio-gpu-pci"), side(Bookworm, "q35 -device virtio-gpu-pci,max_outputs=4"), Fails),
    ("ports of a console", side(Sid, "q35 -device virtio-serial-pci"), side(Sid, "q35 -chardev null,id=c -device virtio-serial-pci -device virtserialport,chardev=c"), Fails),
    ("another port of a console", side(Bookworm, "q35 -chardev null,id=c -device virtio-serial-pci -device virtserialport,chardev=c,nr=2"), side(Bookworm, "q35 -chardev null,id=c -device virtio-serial-pci -device virtserialport,chardev=c,nr=3"), Fails),
    ("console at the source", side(Sid, "q35 -chardev null,id=c -device virtio-serial-pci -device virtconsole,chardev=c"), side(Sid, "q35 -device virtio-serial-pci"), Fails),
    ("blocks of virtio-mem", side(Sid, MEMORY_DEVICE), side(Sid, "q35 -m 16,slots=1,maxmem=1G -object memory-backend-ram,id=m,size=64M -device virtio-mem-pci,memdev=m,block-size=4M"), Fails),
    ("place of virtio-mem", side(Sid, MEMORY_DEVICE), side(Sid, "q35 -m 16,slots=1,maxmem=1G -object memory-backend-ram,id=m,size=64M -device virtio-mem-pci,memdev=m,memaddr=0x120000000"), Fails),
    ("subsystem of e1000e", side(Sid, "q35 -device e1000e"), side(Sid, "q35 -device e1000e,subsys=5"), Fails),
    ("timers of e1000e", side(Sid, "q35 -device e1000e"), side(Sid, "q35 -device e1000e,migrate-timadj=off"), Fails),
    ("xhci without MSI-X", side(Sid, "q35 -device nec-usb-xhci,msix=off"), side(Sid, "q35 -device nec-usb-xhci,msix=off"), Fails),
    ("older BMC", side(Trixie, "pc-q35-10.0 -device ipmi-bmc-sim,id=b -device isa-ipmi-kcs,bmc=b"), side(Sid, "pc-q35-10.0 -device ipmi-bmc-sim,id=b -device isa-ipmi-kcs,bmc=b"), Loads),
];

const MEMORY_DEVICE: &str =
    "q35 -m 16,slots=1,maxmem=1G -object memory-backend-ram,id=m,size=64M -device virtio-mem-pci,memdev=m";

fn pair(env: &TrialEnv<'_>, source: &Side<'_>, destination: &Side<'_>, fate: Fate) -> Result<String> {
    let (stream, local) = (env.scratch.join("source.qevm"), env.scratch.join("destination.qevm"));
    write(env, source, "source", &stream)?;
    write(env, destination, "destination", &local)?;
    let (real, said) = load(env, destination, &stream)?;
    ensure!(real == fate, "QEMU itself: {real:?} instead of {fate:?}: {said}");

    let mut arguments: Vec<&OsStr> = ["check", "--json", "--against"].map(OsStr::new).to_vec();
    arguments.extend([local.as_os_str(), stream.as_os_str()]);
    // What a destination's own stream does not show, its operator knows.
    let known = known(destination.capabilities);
    arguments.extend(known.iter().map(OsStr::new));
    let ran = env.subject.run(&arguments)?;
    let last = ran.stdout.lines().last().unwrap_or_default();
    let found: Value = serde_json::from_str(last).with_context(|| format!("qevm check: {}", ran.stderr.trim_end()))?;
    let (verdict, code) = match fate {
        Loads => ("loads", 0),
        Fails => ("fails", 1),
    };
    ensure!(
        found["verdict"] == verdict && ran.code == Some(code),
        "QEMU {verdict}, but qevm check ({}): {found}",
        ran.status
    );
    let fatal: Vec<&Value> =
        found["findings"].as_array().into_iter().flatten().filter(|f| f["outcome"] == "fails").collect();
    let foretold: Vec<&str> = fatal.iter().filter_map(|f| f["qemu_says"].as_str()).collect();
    if fate == Fails && !foretold.iter().any(|line| is_in(line, &said)) {
        bail!(
            "QEMU said: {said}; qevm check foretold {foretold:?} of {}",
            Value::from_iter(fatal.into_iter().cloned())
        );
    }
    Ok(match foretold.as_slice() {
        [] => format!("{} harmless differences", found["findings"].as_array().map_or(0, Vec::len)),
        lines => lines.join("; "),
    })
}

/// Newer releases have shortened "savevm section" to "section".
fn is_in(line: &str, said: &str) -> bool {
    said.contains(line) || said.contains(&line.replace("savevm section", "section"))
}

/// Capabilities of a destination on the command line of `qevm check`: `postcopy-ram` is off unless it is on.
fn known(capabilities: &str) -> Vec<String> {
    let mut known = vec!["postcopy-ram=off".to_owned()];
    for name in capabilities.split_whitespace() {
        known.retain(|other| other.split('=').next() != Some(name));
        known.push(format!("{name}=on"));
    }
    known.into_iter().map(|capability| format!("--capability={capability}")).collect()
}
