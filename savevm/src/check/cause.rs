//! The usual causes of what real QEMUs refuse.

/// Why a section of this name can be in a stream and not at its destination.
pub(super) fn of_missing_section(idstr: &str, instance_id: u32) -> &'static str {
    let device = idstr.rsplit('/').next().unwrap_or(idstr);
    match (device, instance_id) {
        ("kvmclock", _) => "only KVM has it: a stream from accel=kvm does not load under accel=tcg",
        ("mc146818rtc", _) => "-M microvm has no RTC under KVM unless told rtc=on",
        ("cpu" | "cpu_common" | "apic", 1..) => "the destination has fewer CPUs: give it the same -smp",
        ("ioapic", 1..) => "QEMU 5.2 has one I/O APIC: start the source with ioapic2=off",
        ("i8254" | "i8259" | "serial", _) => "a machine option turns it off: compare pit=, pic=, isa-serial=",
        ("slirp", _) => "the source has a network of -netdev user",
        ("dirty-bitmap", _) => "capability dirty-bitmaps is on at the source",
        ("block", _) => "block migration is on at the source, which releases since 9.1 do not have",
        ("globalstate", _) => "migration.store-global-state differs",
        ("ramfb-dev", _) => {
            "the destination has no ramfb, or one with x-migrate=off, which takes this: compare -device ramfb"
        }
        ("virtio-mem-device-early", _) => "releases before 8.0 have no early migration of virtio-mem",
        _ => "the destination lacks the device, or has it at another place",
    }
}

/// Why a RAM block can have another size.
pub(super) fn of_block_size(name: &str) -> &'static str {
    match name {
        "pc.bios" => "another firmware file: give both sides the same -bios",
        "pc.ram" | "microvm.ram" => "give both sides the same -m",
        name if name.ends_with(".rom") => "another option ROM: give both sides the same romfile=",
        name if name.ends_with("vram") || name.ends_with("vgamem") => "another size of video memory",
        _ => "the block's device is configured differently",
    }
}

/// Why an array has another number of elements, where it is known that the configuration says it.
pub(super) fn of_configured_length(idstr: &str, field: &str) -> Option<&'static str> {
    let device = idstr.rsplit('/').next().unwrap_or(idstr);
    Some(match (device, field) {
        ("ICH9LPC" | "piix4_pm" | "acpi-ged", "devs" | "cpuhp_state") => {
            "-smp maxcpus= or -m slots= differs: give both sides the same"
        }
        ("xhci", _) => "give both sides the same p2=, p3= and intrs= of the xhci",
        (_, "scanout" | "scanouts") => "max_outputs= differs: give both sides the same",
        _ => return None,
    })
}

/// Why only one side has a field, where it is known that the configuration or the release says it, and not the guest's
/// state.
pub(super) fn of_optional_field(idstr: &str, field: &str) -> Option<&'static str> {
    let device = idstr.rsplit('/').next().unwrap_or(idstr);
    Some(match (device, field) {
        ("piix4_pm", field) if field.starts_with("acpi_pci_hotplug.") => {
            "acpi-pci-hotplug-with-bridge-support= or x-not-migrate-acpi-index= differs: give both sides the same -global"
        }
        ("e1000e", "core.timadj") => "migrate-timadj= differs: give both sides the same, or the same machine type",
        ("cpu", "cpreg_vmstate_array_len") => "releases up to 10.0 write an Arm CPU without it",
        _ => return None,
    })
}
