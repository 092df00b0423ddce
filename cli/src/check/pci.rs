//! PCI configuration space: what of it a destination cannot take over, because it is not for a guest to change.
//!
//! A destination compares the read-only bytes of the configuration space that comes with those of its own device, and
//! refuses the stream where they differ. Compared here are those that the PCI specifications make read-only and that say
//! what the device is: IDs, class, header type, the list of capabilities, and the size and place of its MSI-X tables.

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
/// Capability ID of MSI-X; behind ID and pointer are control, table and pending bit array (section 6.8.2).
const MSIX: u8 = 0x11;
/// Read-only bits of the bytes of an MSI-X capability from its control word on: 11 bits of size, two offsets.
const MSIX_MASKS: [u8; 10] = [0xff, 0x07, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
/// The list has at most so many entries; a stream may hold a circle.
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
    both.filter_map(|((idstr, instance_id), found, expected)| {
        let masks = read_only(expected);
        let refused = |at: &usize| (found[*at] ^ expected[*at]) & masks[*at] != 0;
        let at = (0..found.len().min(expected.len())).find(refused)?;
        let (read, device) = (found[at], expected[at]);
        let subject =
            Subject::Fields { idstr: idstr.clone(), instance_id: *instance_id, path: "PCI configuration space".into() };
        let (found, expected) = (format!("{read:#x} at {at:#x}"), format!("{device:#x}"));
        let cause = Some("give the device the same properties on both sides, e.g. vectors=");
        let says = format!("get_pci_config_device: Bad config data: i={at:#x} read: {read:x} device: {device:x}");
        Some((Finding { subject, found, expected, outcome: Outcome::Fails, cause }, says))
    })
    .collect()
}

/// For each byte of a device's configuration space, the bits that nothing changes.
fn read_only(space: &[u8]) -> Vec<u8> {
    let mut masks = vec![0; space.len()];
    for at in IDS.chain(REVISION_AND_CLASS).chain([HEADER_TYPE, CAPABILITIES]) {
        masks[at] = 0xff;
    }
    let mut at = usize::from(space[CAPABILITIES]);
    for _ in 0..MAX_CAPABILITIES {
        // The list lies behind the header, in the first 256 bytes.
        let Some(&[id, next]) = space.get(at..at + 2).filter(|_| at > CAPABILITIES) else { break };
        masks[at..at + 2].fill(0xff);
        if id == MSIX && at + 2 + MSIX_MASKS.len() <= LENGTHS[0] {
            masks[at + 2..][..MSIX_MASKS.len()].copy_from_slice(&MSIX_MASKS);
        }
        at = next.into();
    }
    masks
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device with an MSI-X capability at 0x98 and nothing behind it.
    fn space(change: impl FnOnce(&mut Vec<u8>)) -> Spaces {
        let mut space = vec![0; 256];
        space[..4].copy_from_slice(&[0xf4, 0x1a, 0x00, 0x10]);
        space[CAPABILITIES] = 0x98;
        space[0x98..0x9c].copy_from_slice(&[MSIX, 0, 2, 0]);
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

    #[test]
    fn a_circle_of_capabilities_ends() {
        let circle = space(|space| space[0x99] = 0x98);
        assert_eq!(compare(&circle, &circle), []);
        let beyond = space(|space| space[CAPABILITIES] = 0xff);
        assert_eq!(compare(&beyond, &beyond), []);
    }
}
