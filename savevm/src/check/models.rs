//! Which subsections a destination's device models can read, whether they had a reason to write them or not.

use super::Expectations;
use crate::vmstate::{self, Layout};
use qevm_wire::QemuVersion;

/// What is known of a destination's device models.
pub(super) struct Models<'a> {
    /// By its `-dump-vmstate`: all of them.
    dumped: Option<Vec<vmstate::Description>>,
    /// As they were handed in.
    declared: &'a [vmstate::Description],
    qemu: Option<QemuVersion>,
}

impl<'a> Models<'a> {
    pub(super) fn of(destination: &'a Expectations) -> Self {
        Models {
            dumped: destination.schema.as_ref().map(|schema| schema.descriptions()),
            declared: &destination.models,
            qemu: destination.qemu,
        }
    }

    /// Whether a device with this VMSD reads this subsection, as far as that is known.
    pub(super) fn read(&self, vmsd_name: &str, subsection: &str) -> Option<bool> {
        let mut dumped = self.dumped.iter().flatten().filter(|model| model.name == vmsd_name).peekable();
        if dumped.peek().is_some() {
            return Some(dumped.any(|model| has(model, subsection)));
        }
        let mut declared = self.declared.iter().filter(|model| model.name == vmsd_name);
        if declared.any(|model| has(model, subsection)) {
            return Some(true);
        }
        by_release(vmsd_name, subsection, self.qemu?)
    }
}

/// Releases that write this subsection whenever they can read it: 10.0 and 11.1 abort where a TCO watchdog comes that
/// the destination has not (`ICH9-LPC.enable_tco=off`), and 7.2 reads it.
const ALWAYS_WRITTEN: &[(&str, QemuVersion)] = &[("ich9_pm/tco", QemuVersion::new(10, 0))];

impl Models<'_> {
    /// The destination would have written the subsection if it could read it.
    pub(super) fn must_write(&self, subsection: &str) -> bool {
        let since = |(name, since): &(&str, QemuVersion)| *name == subsection && self.qemu >= Some(*since);
        ALWAYS_WRITTEN.iter().any(since)
    }
}

/// True if the VMSD has the subsection, itself or in a structure inside.
fn has(model: &vmstate::Description, subsection: &str) -> bool {
    let nested = |layout: &Layout| match layout {
        Layout::Struct(nested) | Layout::List(nested) => has(nested, subsection),
        Layout::Bytes(_) | Layout::Variable => false,
    };
    model.subsections.iter().any(|own| own.name == subsection || has(own, subsection))
        || model.fields.iter().any(|field| nested(&field.element.layout))
}

/// By the table below. A release between two that are in there is what both are.
fn by_release(vmsd_name: &str, subsection: &str, qemu: QemuVersion) -> Option<bool> {
    let (.., marks) = SUBSECTIONS.iter().find(|(vmsd, name, _)| (*vmsd, *name) == (vmsd_name, subsection))?;
    let at = |index: usize| match marks.get(index)? {
        b'x' => Some(true),
        b'-' => Some(false),
        _ => None,
    };
    let after = RELEASES.iter().take_while(|release| **release < qemu).count();
    match RELEASES.get(after) {
        Some(release) if *release == qemu => at(after),
        // A model is dropped with all of its subsections; a newer release still reads what the newest one here did.
        None => at(after - 1).filter(|read| *read),
        Some(_) => at(after.checked_sub(1)?).filter(|read| at(after) == Some(*read)),
    }
}

/// The releases of the table.
const RELEASES: [QemuVersion; 4] =
    [QemuVersion::new(5, 2), QemuVersion::new(7, 2), QemuVersion::new(10, 0), QemuVersion::new(11, 1)];

/// VMSD of a device, a subsection of it or of a structure in it, and for each release whether it reads it (`x`), does
/// not (`-`), or has no such device (`.`): from the releases' `-dump-vmstate`, which a test of `qevm-conformance`
/// compares.
#[rustfmt::skip]
const SUBSECTIONS: &[(&str, &str, &[u8; 4])] = &[
    ("ICH9LPC", "ICH9LPC/rst_cnt", b"xxxx"),
    ("ICH9LPC", "ICH9LPC/smi_feat", b"xxxx"),
    ("ICH9LPC", "ich9_pm/cpuhp", b"xxxx"),
    ("ICH9LPC", "ich9_pm/memhp", b"xxxx"),
    ("ICH9LPC", "ich9_pm/pcihp", b"-xxx"),
    ("ICH9LPC", "ich9_pm/tco", b"xxxx"),
    ("PIIX3", "PIIX3/rcr", b"xxxx"),
    ("SCSIDevice", "SCSIDevice/sense", b"xxxx"),
    ("acpi-ged", "acpi-ged/cpuhp", b"--xx"),
    ("acpi-ged", "acpi-ged/ghes", b"xxxx"),
    ("acpi-ged", "acpi-ged/hest", b"---x"),
    ("acpi-ged", "acpi-ged/memhp", b"xxxx"),
    ("acpi-ged", "acpi-ged/pcihp", b"---x"),
    ("e1000", "e1000/full_mac_state", b"xxxx"),
    ("e1000", "e1000/mit_state", b"xxxx"),
    ("e1000", "e1000/tx_tso_state", b"xxxx"),
    ("fdc", "fdc/phase", b"xxxx"),
    ("fdc", "fdc/reset_sensei", b"xxxx"),
    ("fdc", "fdc/result_timer", b"xxxx"),
    ("fdc", "fdrive/media_changed", b"xxxx"),
    ("fdc", "fdrive/media_rate", b"xxxx"),
    ("fdc", "fdrive/perpendicular", b"xxxx"),
    ("fw_cfg", "fw_cfg/acpi_mr", b"xxxx"),
    ("fw_cfg", "fw_cfg/dma", b"xxxx"),
    ("hda-audio", "hda-audio-stream/buffer", b"xxxx"),
    ("hpet", "hpet/offset", b"xxxx"),
    ("hpet", "hpet/rtc_irq_level", b"xxxx"),
    ("i8259", "i8259/ltim", b"--xx"),
    ("ich9_ahci", "ide_bus/error", b"xxxx"),
    ("ich9_ahci", "ide_drive/atapi/gesn_state", b"xxxx"),
    ("ich9_ahci", "ide_drive/pio_state", b"xxxx"),
    ("ich9_ahci", "ide_drive/tray_state", b"xxxx"),
    ("ide", "ide bmdma/status", b"..xx"),
    ("ide", "ide bmdma_current", b"..xx"),
    ("ide", "ide_bus/error", b"..xx"),
    ("ide", "ide_drive/atapi/gesn_state", b"..xx"),
    ("ide", "ide_drive/pio_state", b"..xx"),
    ("ide", "ide_drive/tray_state", b"..xx"),
    ("kvmclock", "kvmclock/clock_is_reliable", b"xxxx"),
    ("mc146818rtc", "mc146818rtc/irq_reinject_on_ack_count", b"xxxx"),
    ("ohci", "ohci-core/eof-timer", b"xxxx"),
    ("pci-serial", "serial/fifo_timeout_timer", b"xxxx"),
    ("pci-serial", "serial/poll", b"xxxx"),
    ("pci-serial", "serial/recv_fifo", b"xxxx"),
    ("pci-serial", "serial/thr_ipending", b"xxxx"),
    ("pci-serial", "serial/timeout_ipending", b"xxxx"),
    ("pci-serial", "serial/tsr", b"xxxx"),
    ("pci-serial", "serial/xmit_fifo", b"xxxx"),
    ("pci-serial-multi", "serial/fifo_timeout_timer", b"xxxx"),
    ("pci-serial-multi", "serial/poll", b"xxxx"),
    ("pci-serial-multi", "serial/recv_fifo", b"xxxx"),
    ("pci-serial-multi", "serial/thr_ipending", b"xxxx"),
    ("pci-serial-multi", "serial/timeout_ipending", b"xxxx"),
    ("pci-serial-multi", "serial/tsr", b"xxxx"),
    ("pci-serial-multi", "serial/xmit_fifo", b"xxxx"),
    ("pciespscsi", "esp/pdma", b"xx--"),
    ("pckbd", "pckbd/extended_state", b"-xxx"),
    ("pckbd", "pckbd_outport", b"xxxx"),
    ("pckbd-mmio", "pckbd/extended_state", b".xxx"),
    ("pckbd-mmio", "pckbd_outport", b".xxx"),
    ("pflash_cfi01", "pflash_cfi01_blk_write", b"-xxx"),
    ("piix4_pm", "piix4_pm/cpuhp", b"xxxx"),
    ("piix4_pm", "piix4_pm/memhp", b"xxxx"),
    ("ps2kbd", "ps2kbd/command_reply_queue", b".xxx"),
    ("ps2kbd", "ps2kbd/ledstate", b".xxx"),
    ("ps2kbd", "ps2kbd/need_high_bit", b".xxx"),
    ("pvscsi", "pvscsi/pcie", b"xxxx"),
    ("qxl", "qxl/monitors-config", b"xxxx"),
    ("qxl", "vga.endian", b"xxxx"),
    ("rtl8139", "rtl8139/hotplug_ready", b"xxxx"),
    ("scsi-disk", "SCSIDevice/sense", b"xxxx"),
    ("scsi-disk", "scsi-disk/pr", b"---x"),
    ("sd-card", "sd-card/ext_csd_modes-state", b"--xx"),
    ("sd-card", "sd-card/ocr-state", b"xxxx"),
    ("sdhci", "sdhci/pending-insert", b"xxxx"),
    ("serial", "serial/fifo_timeout_timer", b"xxxx"),
    ("serial", "serial/poll", b"xxxx"),
    ("serial", "serial/recv_fifo", b"xxxx"),
    ("serial", "serial/thr_ipending", b"xxxx"),
    ("serial", "serial/timeout_ipending", b"xxxx"),
    ("serial", "serial/tsr", b"xxxx"),
    ("serial", "serial/xmit_fifo", b"xxxx"),
    ("sysbus-ahci", "ide_bus/error", b"xx.."),
    ("sysbus-ahci", "ide_drive/atapi/gesn_state", b"xx.."),
    ("sysbus-ahci", "ide_drive/pio_state", b"xx.."),
    ("sysbus-ahci", "ide_drive/tray_state", b"xx.."),
    ("sysbusespscsi", "esp/pdma", b"xx--"),
    ("tpm-crb", "tpm-crb/chunk", b"---x"),
    ("uefi-vars-sysbus", "uefi-variable-digest", b"..-x"),
    ("usb-hub", "usb-hub/port-timer", b"xxxx"),
    ("usb-redir", "usb-redir-ep/bulk-receiving", b"xxxx"),
    ("usb-redir", "usb-redir-ep/stream-state", b"xxxx"),
    ("vga", "vga.endian", b"xxxx"),
    ("vga-isa", "vga.endian", b"...x"),
    ("vhost-user-blk", "vhost-inflight-region/buffer", b"---x"),
    ("vhost-user-blk", "vhost-user-blk/inflight", b"---x"),
    ("vhost-user-fs", "vhost-user-fs-backend", b"--xx"),
    ("virtio-gpu", "virtio-gpu/blob", b"--xx"),
    ("virtio-vga", "vga.endian", b"xxxx"),
    ("vmbus-bridge", "vmbus/rx_queue", b"xxxx"),
    ("vmxnet3", "vmxnet3/mcast_list", b"xxxx"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_between_two_is_what_both_are() {
        let read = |name, major, minor| by_release("ICH9LPC", name, QemuVersion::new(major, minor));
        assert_eq!(read("ich9_pm/pcihp", 5, 2), Some(false));
        assert_eq!(read("ich9_pm/pcihp", 6, 1), None, "somewhere between 5.2 and 7.2 it came");
        assert_eq!(read("ich9_pm/pcihp", 7, 2), Some(true));
        assert_eq!(read("ich9_pm/pcihp", 8, 0), Some(true));
        assert_eq!(read("ich9_pm/cpuhp", 12, 0), Some(true));
        assert_eq!(read("ich9_pm/cpuhp", 4, 2), None);
        assert_eq!(read("nothing", 10, 0), None);
        assert_eq!(by_release("acpi-ged", "acpi-ged/hest", QemuVersion::new(10, 0)), Some(false));
    }
}
