//! What a virtio transport saves before the device.

use super::super::ScalarKind;
use super::super::composite::msix_tables;
use super::Fields;
use crate::Error;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Mmio,
    /// With this number of bytes of configuration space.
    Pci(u64),
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
pub(super) fn candidates(idstr: &str, start: &[u8]) -> [Transport; 3] {
    let config = start.get(PCI_VERSION_ID..).and_then(|config| config.get(..PCI_CONFIG as usize));
    let express = config.is_some_and(|config| capability(config, PCI_CAP_ID_EXPRESS).is_some());
    let (likelier, other) = if express { (PCIE_CONFIG, PCI_CONFIG) } else { (PCI_CONFIG, PCIE_CONFIG) };
    let (likelier, other) = (Transport::Pci(likelier), Transport::Pci(other));
    match idstr.starts_with("virtio-mmio@") {
        true => [Transport::Mmio, likelier, other],
        false => [likelier, other, Transport::Mmio],
    }
}

impl Transport {
    pub(super) fn name(self) -> &'static str {
        match self {
            Transport::Mmio => "virtio-mmio",
            Transport::Pci(_) => "virtio-pci",
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
        }
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
