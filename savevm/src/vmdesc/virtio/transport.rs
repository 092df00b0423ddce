//! What a virtio transport saves before the device.

use super::super::ScalarKind;
use super::super::msix::msix_tables;
use super::super::tree::SUBSECTION;
use super::Fields;
use crate::Error;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Mmio,
    /// With this number of bytes of configuration space.
    Pci(u64),
    /// Channel I/O of s390x.
    Ccw,
}

/// Bytes before the configuration space.
const PCI_VERSION_ID: usize = 4;
/// Configuration space of conventional PCI devices.
const PCI_CONFIG: u64 = 256;
/// Configuration space of PCI Express devices.
const PCIE_CONFIG: u64 = 4096;
/// PCI local bus specification 3.0: status register, its "capabilities list" bit, pointer to the list, MSI-X id.
const PCI_STATUS: usize = 0x06;
const PCI_STATUS_CAP_LIST: u8 = 0x10;
const PCI_CAPABILITY_LIST: usize = 0x34;
const PCI_CAP_ID_EXPRESS: u8 = 0x10;
const PCI_CAP_ID_MSIX: u8 = 0x11;
const PCI_MSIX_TABLE_SIZE: u16 = 0x7ff;
/// The list fits into the 192 bytes after the header, at 4 bytes each.
const PCI_CAPABILITIES_MAX: usize = 48;

/// The transports to try for content that starts with `start`, the likeliest first.
pub(super) fn candidates(idstr: &str, start: &[u8]) -> Vec<Transport> {
    if is_subchannel(idstr) {
        // Its bytes can be read as those of a PCI device, with values that mean nothing.
        return vec![Transport::Ccw];
    }
    let config = start.get(PCI_VERSION_ID..).and_then(|config| config.get(..PCI_CONFIG as usize));
    let express = config.is_some_and(|config| capability(config, PCI_CAP_ID_EXPRESS).is_some());
    let (likelier, other) = if express { (PCIE_CONFIG, PCI_CONFIG) } else { (PCI_CONFIG, PCIE_CONFIG) };
    let (likelier, other) = (Transport::Pci(likelier), Transport::Pci(other));
    match idstr.starts_with("virtio-mmio@") {
        true => vec![Transport::Mmio, likelier, other],
        false => vec![likelier, other, Transport::Mmio],
    }
}

/// The name of a section starts with the place of a device in a channel subsystem, `/fe.0.0001/`.
fn is_subchannel(idstr: &str) -> bool {
    let place = idstr.strip_prefix('/').and_then(|rest| rest.split_once('/'));
    place.is_some_and(|(place, _)| {
        let parts: Vec<&str> = place.split('.').collect();
        parts.len() == 3 && parts.iter().all(|part| u16::from_str_radix(part, 16).is_ok())
    })
}

impl Transport {
    pub(super) fn name(self) -> &'static str {
        match self {
            Transport::Mmio => "virtio-mmio",
            Transport::Pci(_) => "virtio-pci",
            Transport::Ccw => "virtio-ccw",
        }
    }

    pub(super) fn has_queue_align(self) -> bool {
        self == Transport::Mmio
    }

    /// Reads the transport's part; true if each queue has an interrupt vector.
    pub(super) fn config(self, fields: &mut Fields<'_, '_>) -> Result<bool, Error> {
        match self {
            Transport::Mmio => {
                fields.u32("host_features_sel")?;
                fields.u32("guest_features_sel")?;
                fields.u32("guest_page_shift")?;
                Ok(false)
            }
            Transport::Pci(config_len) => pci(fields, config_len),
            Transport::Ccw => ccw(fields),
        }
    }
}

/// A subchannel with its device's identification, then the adapter. Facts: streams of QEMU 7.2 and 11.1; the subchannel
/// information block, channel commands and the answer to SENSE ID are those of the z/Architecture Principles of
/// Operation. Of the channel program there are the address in the operation-request block, the command that was last
/// carried out and the format of the commands, as guests of 11.1 show whose firmware used a disk and a network card.
fn ccw(fields: &mut Fields<'_, '_>) -> Result<bool, Error> {
    fields.u8("cssid")?;
    fields.u8("ssid")?;
    fields.u16("schid")?;
    fields.u16("devno")?;
    fields.bool("thinint_active")?;
    fields.structure("schib.pmcw", "struct", "pmcw", 0, |fields| {
        fields.u32("intparm")?;
        fields.u16("flags")?;
        fields.u16("devno")?;
        for name in ["lpm", "pnom", "lpum", "pim"] {
            fields.u8(name)?;
        }
        fields.u16("mbi")?;
        fields.u8("pom")?;
        fields.u8("pam")?;
        fields.buffer("chpid", 8)?;
        fields.u32("chars").map(drop)
    })?;
    fields.structure("schib.scsw", "struct", "scsw", 0, |fields| {
        fields.u16("flags")?;
        fields.u16("ctrl")?;
        fields.u32("cpa")?;
        fields.u8("dstat")?;
        fields.u8("cstat")?;
        fields.u16("count").map(drop)
    })?;
    fields.u64("schib.mba")?;
    fields.buffer("schib.mda", 4)?;
    fields.buffer("sense_data", 32)?;
    fields.u64("channel_program")?;
    fields.structure("last_command", "struct", "ccw1", 0, |fields| {
        fields.u8("code")?;
        fields.u8("flags")?;
        fields.u16("count")?;
        fields.u32("data").map(drop)
    })?;
    fields.bool("last_command_valid")?;
    fields.structure("id", "struct", "sense id", 0, |fields| {
        fields.u8("reserved")?;
        fields.u16("cu_type")?;
        fields.u8("cu_model")?;
        fields.u16("dev_type")?;
        fields.u8("dev_model")?;
        fields.u8("unused")?;
        fields.buffer("ciw", CCW_COMMANDS).map(drop)
    })?;
    fields.bool("format_1")?;
    fields.u8("commands_without_data")?;
    optional(fields, "s390_subch_dev/orb", |fields| fields.buffer("orb", 12).map(drop));
    fields.opaque("indicators", "virtio-ccw", 36)?;
    fields.u16("config_vector")?;
    fields.opaque("adapter", "virtio-ccw", 8)?;
    optional(fields, "s390_adapter_info/summary_offset", |fields| fields.u32("summary_offset").map(drop));
    fields.u8("thinint_isc")?;
    fields.u32("revision")?;
    Ok(true)
}

/// Bytes of the commands that a device tells of in its answer to SENSE ID.
const CCW_COMMANDS: u64 = 62 * 4;

/// Reads a subsection if it is there.
fn optional<'a>(
    fields: &mut Fields<'_, 'a>,
    name: &str,
    content: impl FnOnce(&mut Fields<'_, 'a>) -> Result<(), Error>,
) {
    if fields.input.reader.peek() == Some(SUBSECTION) {
        fields.attempt(|fields| fields.subsection(name, 1, content));
    }
}

fn pci(fields: &mut Fields<'_, '_>, config_len: u64) -> Result<bool, Error> {
    fields.scalar("version_id", "int32 le", ScalarKind::I32)?;
    let config = fields.buffer("config", config_len)?;
    for pin in ["irq_state[0]", "irq_state[1]", "irq_state[2]", "irq_state[3]"] {
        match fields.scalar(pin, "pci irq state", ScalarKind::I32)?.as_u64() {
            0 | 1 => {}
            found => return Err(fields.unexpected("level of a PCI interrupt pin", found, 1)),
        }
    }
    let vectors = msix_vectors(config);
    if vectors > 0 {
        fields.structure("msix", "msix state", "", 0, |fields| msix_tables(fields, vectors))?;
        fields.u16("config_vector")?;
    }
    Ok(vectors > 0)
}

/// Entries of the MSI-X table that the capability list announces, 0 without one.
pub(in super::super) fn msix_vectors(config: &[u8]) -> u64 {
    let control = capability(config, PCI_CAP_ID_MSIX).and_then(|at| config.get(at + 2..at + 4)?.try_into().ok());
    control.map_or(0, |control| u64::from(u16::from_le_bytes(control) & PCI_MSIX_TABLE_SIZE) + 1)
}

/// Where the capability `id` is in a configuration space.
fn capability(config: &[u8], id: u8) -> Option<usize> {
    let byte = |at: usize| config.get(at).copied();
    if byte(PCI_STATUS)? & PCI_STATUS_CAP_LIST == 0 {
        return None;
    }
    let mut at = usize::from(byte(PCI_CAPABILITY_LIST)? & !3);
    for _ in 0..PCI_CAPABILITIES_MAX {
        if at == 0 {
            return None;
        }
        if byte(at)? == id {
            return Some(at);
        }
        at = usize::from(byte(at + 1)? & !3);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::super::fields::Input;
    use super::*;
    use crate::vmdesc::Node;

    /// A disk of QEMU 11.1 (`virtio-blk-ccw`) after the firmware has tried to start from it: the last command was SENSE
    /// ID (0xe4) with a buffer of 256 bytes, without an incorrect-length indication.
    #[test]
    fn a_channel_program_is_that_of_the_operation_request_block() {
        let mut transport = [0; 495];
        let pieces: [(usize, &[u8]); 7] = [
            (0, b"\xfe"),
            (12, b"\x81\0\0\x80\0\0\x80\0\0\xff\x80"),
            (36, b"\x80\0\0\x03\xd2\x1d\xd8\x0c"),
            (95, b"\x03\xd2\x1d\xd0\xe4\x20\x01\0\x03\xd1\x90\x40\x01\xff\x38\x32\x02"),
            (364, b"\x01\0\x05\x12s390_subch_dev/orb\0\0\0\x01\0\0\0\0\0\xc2\xff\0\x03\xd2\x1d\xd0"),
            (438, b"\xff\xff"),
            (448, b"\x05\x20s390_adapter_info/summary_offset\0\0\0\x01"),
        ];
        for (at, piece) in pieces {
            transport[at..at + piece.len()].copy_from_slice(piece);
        }
        let mut input = Input::new(&transport, 0, &qevm_wire::Limits::default());
        let mut fields = Fields::new(&mut input);
        assert!(Transport::Ccw.config(&mut fields).unwrap());
        let members = std::mem::take(&mut fields.members);
        assert_eq!(members.iter().map(|node| node.len).sum::<u64>(), 495);
        // What is not taken apart: indicators and adapter.
        assert_eq!(members.iter().map(Node::opaque_bytes).sum::<u64>(), 44);
        let mut told = Vec::new();
        for node in &members {
            node.leaves(&mut |path, leaf| {
                let value = leaf.scalar().map(|scalar| scalar.as_u64());
                told.extend(value.map(|value| (path.rsplit('.').next().unwrap_or_default().to_owned(), value)));
            });
        }
        let value = |name: &str| told.iter().find(|(told, _)| told == name).map(|(_, value)| *value);
        for (name, expected) in [
            ("channel_program", 0x3d2_1dd0),
            ("cpa", 0x3d2_1dd0 + 8),
            ("code", 0xe4),
            ("flags", 0x81),
            ("count", 0),
            ("data", 0x3d1_9040),
            ("last_command_valid", 1),
            ("format_1", 1),
            ("commands_without_data", 0),
            ("cu_type", 0x3832),
        ] {
            assert_eq!(value(name), Some(expected), "{name}: {told:?}");
        }
    }

    #[test]
    fn a_place_in_a_channel_subsystem_is_no_pci_device() {
        for name in ["/fe.0.0000/virtio-net", "/fe.3.ffff/virtio-blk", "/0.1.abcd/virtio-scsi"] {
            assert_eq!(candidates(name, &[0; 300]), [Transport::Ccw], "{name}");
        }
        for name in
            ["0000:00:01.0/virtio-net", "virtio-mmio@00000000feb00000/virtio-blk", "/fe.0/x", "/a.b.c.d/x", "/x.0.0/y"]
        {
            assert!(!candidates(name, &[0; 300]).contains(&Transport::Ccw), "{name}");
        }
    }
}
