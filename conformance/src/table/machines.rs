//! Machine types, accelerators and processors.

use crate::roots::Suite::{self, Bookworm, Bullseye, Sid, Trixie};
use crate::scenario::{Guest, Scenario};
use crate::suite::since;

/// Versioned machine types by suite. 2.3 and older have neither configuration nor footers nor description.
const VERSIONED: &[(Suite, &[&str])] = &[
    (Bullseye, &["pc-i440fx-2.2", "pc-i440fx-2.3", "pc-i440fx-2.12", "pc-q35-2.12", "pc-i440fx-5.2", "pc-q35-5.2"]),
    (
        Bookworm,
        &["pc-i440fx-2.0", "pc-i440fx-2.3", "pc-q35-4.2", "pc-i440fx-5.2", "pc-q35-5.2", "pc-i440fx-7.2", "pc-q35-7.2"],
    ),
    (Trixie, &["pc-q35-5.2", "pc-i440fx-7.2", "pc-q35-7.2", "pc-q35-8.1", "pc-i440fx-9.2", "pc-q35-10.0"]),
    (Sid, &["pc-q35-5.2", "pc-i440fx-7.2", "pc-q35-8.2", "pc-q35-9.2", "pc-q35-10.0", "pc-i440fx-10.2", "pc-q35-11.0"]),
];

/// Devices whose streams depend on the machine version.
const SENSITIVE: &str = "-device VGA -netdev hubport,id=n0,hubid=0 -device virtio-net-pci,netdev=n0 \
    -drive file={dir}/disk.raw,if=none,id=d0,format=raw -device virtio-blk-pci,drive=d0 -device virtio-balloon-pci \
    -device virtio-rng-pci -netdev hubport,id=n1,hubid=0 -device e1000,netdev=n1 -serial null";

pub(super) fn rows() -> Vec<Scenario> {
    let mut rows = Vec::new();
    for suite in Suite::ALL {
        let row = |machine: &str, what: &str| Scenario::new(suite, machine, what);
        rows.push(row("microvm", "plain").quick());
        rows.push(row("q35", "plain").quick());
        rows.push(row("pc", "plain"));
        rows.push(row("isapc", "plain"));
        rows.push(row("none", "plain").guest(Guest::Idle));
        rows.push(row("microvm", "live").guest(Guest::FirmwareLive));
        rows.push(row("q35", "live").guest(Guest::FirmwareLive).with("-device VGA -serial null"));
        rows.push(row("q35", "4-processors").with("-smp 4 -cpu max"));
        rows.push(row("pc", "sockets").with("-smp 2,sockets=2 -cpu qemu32"));
        rows.push(row("microvm", "bare").with("-M pic=off,pit=off,rtc=off,isa-serial=off,x-option-roms=off"));
        rows.push(row("microvm", "serial").with("-M rtc=on -serial null"));
        // KVM rewrites the kvmclock page as soon as QEMU loads it, so that a reloaded guest's RAM differs by that page.
        rows.push(row("microvm", "kvm").kvm().with("-cpu qemu64,kvmclock=off").quick());
        rows.push(row("microvm", "kvm-clock").kvm().not_reloaded());
        rows.push(row("q35", "kvm").kvm().with("-cpu qemu64,kvmclock=off"));
        rows.push(row("microvm", "kvm-split").kvm().with("-M kernel-irqchip=split -smp 2 -cpu qemu64,kvmclock=off"));
        rows.push(row("pc", "no-description").with("-M suppress-vmdesc=on"));
    }
    for suite in since(Bookworm) {
        rows.push(
            Scenario::new(suite, "microvm", "pcie")
                .with("-M pcie=on -device virtio-rng-pci -device virtio-balloon-pci"),
        );
        rows.push(Scenario::new(suite, "microvm", "no-ioapic2").with("-M ioapic2=off,acpi=off"));
    }
    for (suite, machines) in VERSIONED {
        for machine in *machines {
            rows.push(Scenario::new(*suite, machine, "versioned").with(SENSITIVE));
        }
    }
    rows
}
