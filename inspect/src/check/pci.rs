//! PCI configuration space: what of it a destination cannot take over, because it is not for a guest to change.
//!
//! A destination compares the read-only bytes of the configuration space that comes with those of its own device, and
//! refuses the stream where they differ. Compared here are those that the PCI specifications make read-only and that
//! say what the device is: IDs, class, header type, the list of capabilities, and of each capability the registers that
//! tell what the device can do.

use qevm_savevm::check::{Finding, Outcome, Subject};
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::vmdesc::{Node, Value};
use std::collections::BTreeMap;

/// Length of the configuration space of PCI and of PCI Express devices.
const LENGTHS: [usize; 2] = [256, 4096];
/// Offsets in the header (PCI Local Bus Specification 3.0, section 6.1).
const IDS: std::ops::Range<usize> = 0..4;
const REVISION_AND_CLASS: std::ops::Range<usize> = 8..12;
const HEADER_TYPE: usize = 0x0e;
const CAPABILITIES: usize = 0x34;
/// Where the extended capabilities of PCI Express begin.
const EXTENDED: usize = 256;
/// Capability ID of those of a vendor: the byte after the pointer is its length.
const VENDOR: u8 = 0x09;
/// Vendor of virtio's devices, and the type of its capability that a guest writes to (virtio 1.2, section 4.1.4.9).
const VIRTIO: [u8; 2] = [0xf4, 0x1a];
const VIRTIO_PCI_CFG: u8 = 5;

/// The read-only bits of a capability: pairs of an offset from its start and a mask.
type Masks = &'static [(usize, &'static [u8])];

/// Of the capabilities in the first 256 bytes, by ID (PCI Local Bus Specification 3.0, sections 6.7, 6.8 and appendix
/// H; PCI Express Base Specification 3.0, section 7.8; PCI-to-PCI Bridge and AF specifications).
fn registers(id: u8) -> Masks {
    match id {
        // Power management: what it can do.
        0x01 => &[(2, &[0xff; 2])],
        // Slot numbering: the number of slots.
        0x04 => &[(2, &[0xff])],
        // MSI: how many messages, 64 bits, masks per vector.
        0x05 => &[(2, &[0x8e, 0x01])],
        // Subsystem of a bridge.
        0x0d => &[(4, &[0xff; 4])],
        // PCI Express: kind of port, and the capabilities of device, link, slot and root; then the second ones of
        // device and link.
        0x10 => &[
            (2, &[0xff; 2]),
            (4, &[0xff; 4]),
            (0x0c, &[0xff; 4]),
            (0x14, &[0xff; 4]),
            (0x1e, &[0xff; 2]),
            (0x24, &[0xff; 4]),
        ],
        // MSI-X: 11 bits of size, two offsets.
        0x11 => &[(2, &[0xff, 0x07, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])],
        // Advanced features: function level reset.
        0x13 => &[(2, &[0xff; 2])],
        _ => &[],
    }
}

/// Of the extended capabilities (PCI Express Base Specification 3.0, sections 7.10 to 7.30; ATS 1.1).
fn extended_registers(id: u16) -> Masks {
    match id {
        // Serial number of the device.
        0x0003 => &[(4, &[0xff; 8])],
        // Access control, alternative routing IDs, address translation: what it can do.
        0x000d..=0x000f => &[(4, &[0xff; 2])],
        _ => &[],
    }
}

/// The list has at most this many entries; a stream may hold a circle.
const MAX_CAPABILITIES: usize = 48;

/// The configuration spaces of a stream, by section name and instance.
pub(super) type Spaces = BTreeMap<(String, u32), Vec<u8>>;

/// Takes the configuration space from the fields of a section, if it is in there.
pub(super) fn note(header: &SectionHeader, fields: &Node, spaces: &mut Spaces) {
    let mut found = None;
    fields.leaves(&mut |_, leaf| {
        let named = leaf.name == "config" || leaf.type_name == "pci config";
        if let Value::Buffer(bytes) = &leaf.value
            && found.is_none()
            && named
            && LENGTHS.contains(&bytes.len())
        {
            found = Some(bytes.to_vec());
        }
    });
    if let Some(space) = found {
        spaces.insert((header.idstr.to_string(), header.instance_id), space);
    }
}

/// The first byte of each device that its destination refuses, with what QEMU prints for it.
pub(super) fn compare(stream: &Spaces, destination: &Spaces) -> Vec<(Finding, String)> {
    let both = stream.iter().filter_map(|(key, found)| Some((key, found, destination.get(key)?)));
    let aborts = both.clone().filter_map(|(key, _, expected)| without_msix(key, expected));
    let refused = both.filter_map(|((idstr, instance_id), found, expected)| {
        let masks = read_only(expected);
        let refused = |at: &usize| (found[*at] ^ expected[*at]) & masks[*at] != 0;
        let at = (0..found.len().min(expected.len())).find(refused)?;
        let (read, device) = (found[at], expected[at]);
        let subject =
            Subject::Fields { idstr: idstr.clone(), instance_id: *instance_id, path: "PCI configuration space".into() };
        let (found, expected) = (format!("{read:#x} at {at:#x}"), format!("{device:#x}"));
        let cause = Some(
            "give the device the same properties on both sides (vectors=, slot=, chassis=, x-speed=, aer=, ats= …)",
        );
        let says = format!("get_pci_config_device: Bad config data: i={at:#x} read: {read:x} device: {device:x}");
        Some((Finding { subject, found, expected, outcome: Outcome::Fails, cause }, says))
    });
    refused.chain(aborts).collect()
}

/// A destination's xHCI controller that has no MSI-X aborts whatever comes (7.2 to 11.1).
fn without_msix((idstr, instance_id): &(String, u32), space: &[u8]) -> Option<(Finding, String)> {
    const MSIX: u8 = 0x11;
    if !idstr.ends_with("/xhci") || capabilities(space).any(|(_, id)| id == MSIX) {
        return None;
    }
    let path = "PCI configuration space".into();
    let finding = Finding {
        subject: Subject::Fields { idstr: idstr.clone(), instance_id: *instance_id, path },
        found: "an xHCI controller".into(),
        expected: "one without MSI-X".into(),
        outcome: Outcome::Fails,
        cause: Some("QEMU cannot load such a controller, not even its own: start both sides without msix=off"),
    };
    Some((finding, "msix_vector_unuse: Assertion `vector < dev->msix_entries_nr' failed.".into()))
}

/// The capabilities in the first 256 bytes: where they are, and their IDs.
fn capabilities(space: &[u8]) -> impl Iterator<Item = (usize, u8)> + '_ {
    let mut at = space.get(CAPABILITIES).copied().map_or(0, usize::from);
    (0..MAX_CAPABILITIES).map_while(move |_| {
        // The list lies after the header.
        let &[id, next] = space.get(at..at + 2).filter(|_| at > CAPABILITIES && at + 4 <= EXTENDED)? else {
            return None;
        };
        let here = at;
        at = next.into();
        Some((here, id))
    })
}

/// For each byte of a device's configuration space, the bits that nothing changes.
fn read_only(space: &[u8]) -> Vec<u8> {
    let mut masks = vec![0; space.len()];
    for at in IDS.chain(REVISION_AND_CLASS).chain([HEADER_TYPE, CAPABILITIES]) {
        masks[at] = 0xff;
    }
    for (at, id) in capabilities(space) {
        masks[at..at + 2].fill(0xff);
        cover(&mut masks[..EXTENDED], at, registers(id));
        if id == VENDOR {
            let [len, kind] = [space[at + 2], space[at + 3]];
            let written = space[..2] == VIRTIO && kind == VIRTIO_PCI_CFG;
            let len = if written { 4 } else { usize::from(len).max(3) };
            let end = (at + len).min(EXTENDED);
            masks[at..end].fill(0xff);
        }
    }
    let mut at = EXTENDED;
    for _ in 0..MAX_CAPABILITIES {
        let Some(header) = space.get(at..at + 4).filter(|_| at >= EXTENDED) else { break };
        let header = u32::from_le_bytes(header.try_into().expect("four bytes"));
        if header == 0 {
            // It has none, and takes whatever the source had there (measured with 11.1).
            break;
        }
        masks[at..at + 4].fill(0xff);
        cover(&mut masks, at, extended_registers(header as u16));
        at = (header >> 20) as usize;
    }
    masks
}

/// Puts the masks of a capability at `at`, as far as there is room.
fn cover(masks: &mut [u8], at: usize, registers: Masks) {
    for (offset, bits) in registers {
        if let Some(place) = masks.get_mut(at + offset..at + offset + bits.len()) {
            place.copy_from_slice(bits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device with an MSI-X capability at 0x98 and nothing after it.
    fn space(change: impl FnOnce(&mut Vec<u8>)) -> Spaces {
        let mut space = vec![0; 256];
        space[..4].copy_from_slice(&[0xf4, 0x1a, 0x00, 0x10]);
        space[CAPABILITIES] = 0x98;
        space[0x98..0x9c].copy_from_slice(&[0x11, 0, 2, 0]);
        change(&mut space);
        Spaces::from([(("0000:00:02.0/virtio-net".to_owned(), 0), space)])
    }

    fn refused(change: impl FnOnce(&mut Vec<u8>)) -> Option<String> {
        compare(&space(change), &space(|_| ())).pop().map(|(_, says)| says)
    }

    #[test]
    fn what_a_guest_may_write_is_not_compared() {
        assert_eq!(refused(|_| ()), None);
        // Command, base address, MSI-X enable and mask.
        assert_eq!(refused(|space| [4, 0x10, 0x3c].map(|at| space[at] = 0xff).into_iter().for_each(drop)), None);
        assert_eq!(refused(|space| space[0x9b] = 0xc0), None);
    }

    #[test]
    fn what_the_device_is_is_compared() {
        let vectors = "get_pci_config_device: Bad config data: i=0x9a read: 9 device: 2";
        assert_eq!(refused(|space| space[0x9a] = 9).as_deref(), Some(vectors));
        for at in [0, 3, 9, 0x0e, 0x34, 0x98, 0x9b] {
            assert!(refused(|space| space[at] ^= 1).is_some(), "byte {at:#x}");
        }
    }

    /// A port of PCI Express, with capabilities in both lists.
    fn port(change: impl FnOnce(&mut Vec<u8>)) -> Spaces {
        let mut space = vec![0; 4096];
        space[CAPABILITIES] = 0x54;
        space[0x54..0x58].copy_from_slice(&[0x10, 0x80, 0x42, 0x01]);
        space[0x80..0x88].copy_from_slice(&[VENDOR, 0x90, 8, 1, 2, 3, 4, 5]);
        space[0x90..0x94].copy_from_slice(&[0x05, 0, 0x80, 0x01]);
        space[0x100..0x104].copy_from_slice(&0x1502_0001u32.to_le_bytes());
        space[0x150..0x154].copy_from_slice(&0x0001_0003u32.to_le_bytes());
        change(&mut space);
        Spaces::from([("0000:00:01.0/pcie-root-port".to_owned(), 0)].map(|key| (key, space.clone())))
    }

    fn port_refused(at: usize, bits: u8) -> bool {
        !compare(&port(|space| space[at] ^= bits), &port(|_| ())).is_empty()
    }

    #[test]
    fn registers_of_capabilities_are_compared() {
        // Number of the slot, width of the link, FLR, a vendor's bytes, masks per vector, serial number, the end of a
        // list.
        for (at, bits) in
            [(0x6a, 0x18), (0x60, 0x10), (0x5b, 0x10), (0x86, 1), (0x93, 1), (0x154, 1), (0x15b, 1), (0x153, 0x10)]
        {
            assert!(port_refused(at, bits), "byte {at:#x}");
        }
        // Control and status of device, link and slot; MSI enable, address; state of AER.
        for (at, bits) in
            [(0x5c, 0xff), (0x64, 3), (0x66, 0xff), (0x6c, 0xff), (0x6e, 1), (0x92, 1), (0x94, 0xff), (0x104, 1)]
        {
            assert!(!port_refused(at, bits), "byte {at:#x}");
        }
    }

    #[test]
    fn a_destination_without_extended_capabilities_takes_those_of_the_source() {
        let without = || port(|space| space[0x100..0x104].fill(0));
        assert_eq!(compare(&port(|_| ()), &without()), []);
        let says = "get_pci_config_device: Bad config data: i=0x100 read: 0 device: 1";
        assert_eq!(compare(&without(), &port(|_| ())).pop().map(|(_, says)| says).as_deref(), Some(says));
    }

    /// A guest reaches a BAR of virtio through a capability that it writes to.
    #[test]
    fn a_window_into_a_virtio_device_is_not_compared() {
        let window = |bytes: &[u8]| {
            space(|space| {
                space[0x99] = 0xa8;
                space[0xa8..0xac].copy_from_slice(&[VENDOR, 0, 20, VIRTIO_PCI_CFG]);
                space[0xac..0xac + bytes.len()].copy_from_slice(bytes);
            })
        };
        assert_eq!(compare(&window(&[4, 0, 0, 0, 9]), &window(&[])), []);
    }

    #[test]
    fn a_circle_of_capabilities_ends() {
        let circle = space(|space| space[0x99] = 0x98);
        assert_eq!(compare(&circle, &circle), []);
        let beyond = space(|space| space[CAPABILITIES] = 0xff);
        assert_eq!(compare(&beyond, &beyond), []);
    }
}
