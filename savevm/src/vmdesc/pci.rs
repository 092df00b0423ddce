//! PCI configuration space, register by register: the header, each capability by its name, and the extended
//! capabilities of PCI Express (PCI Local Bus Specification 3.0, chapter 6 and appendix H; PCI Express Base
//! Specification 3.0, chapter 7).

mod registers;

use self::registers::{
    BRIDGE, CAPABILITY, COMMON, DEVICE, EXTENDED_CAPABILITY, Registers, capability, extended_capability,
};
use super::ScalarKind;
use super::fields::{Fields, Input};
use super::msix::{MSIX_ENTRY, msix_len};
use super::tree::{Name, Node, Struct, Value};
use crate::Error;
use crate::vmstate::PciFacts;
use qevm_wire::{Limits, WireError};

const CONVENTIONAL: usize = 256;
const EXPRESS: usize = 4096;
const HEADER: usize = 0x40;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const HEADER_TYPE: usize = 0x0e;
const POINTER: usize = 0x34;
/// A list has at most this many entries; one in a stream may go round.
const MOST_CAPABILITIES: usize = 48;
const MOST_EXTENDED: usize = (EXPRESS - CONVENTIONAL) / 4;
/// Levels of INTA to INTD.
const LINES: u64 = 4;

/// Where the capabilities in the first 256 bytes begin, in their order there.
fn capabilities(space: &[u8]) -> Vec<usize> {
    let listed = space.get(STATUS).is_some_and(|status| status & STATUS_CAPABILITIES != 0);
    let next = |at: usize| Some(usize::from(*space.get(at)? & !3)).filter(|at| (HEADER..CONVENTIONAL).contains(at));
    let first = listed.then_some(POINTER).and_then(next);
    places(std::iter::successors(first, |at| next(at + 1)).take(MOST_CAPABILITIES))
}

/// The same of the extended ones.
fn extended_capabilities(space: &[u8]) -> Vec<usize> {
    let header = |at: usize| space.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let next = |at: &usize| {
        let next = (header(*at)? >> 20) as usize & !3;
        (CONVENTIONAL..EXPRESS).contains(&next).then_some(next)
    };
    let first = header(CONVENTIONAL).filter(|header| ![0, u32::MAX].contains(header)).map(|_| CONVENTIONAL);
    places(std::iter::successors(first, next).take(MOST_EXTENDED))
}

fn places(found: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut places: Vec<_> = found.collect();
    places.sort_unstable();
    places.dedup();
    places
}

fn named(name: &'static str, what: &str, id: u16) -> Name {
    if name.is_empty() { format!("{what}_{id:#04x}").into() } else { name.into() }
}

/// Reads registers as far as there is room for them up to `end`.
fn registers(fields: &mut Fields<'_, '_>, registers: Registers, end: u64) -> Result<(), Error> {
    for (name, bytes) in registers {
        if fields.offset() + bytes > end {
            break;
        }
        match bytes {
            1 => fields.u8(*name).map(drop)?,
            2 => fields.scalar(*name, "uint16 little-endian", ScalarKind::U16Le).map(drop)?,
            4 => fields.scalar(*name, "uint32 little-endian", ScalarKind::U32Le).map(drop)?,
            bytes => fields.buffer(*name, *bytes).map(drop)?,
        }
    }
    Ok(())
}

/// Reads a configuration space of `size` bytes, 256 or 4096.
pub(super) fn config_space(fields: &mut Fields<'_, '_>, size: u64) -> Result<(), Error> {
    let Some(space) = fields.input.ahead().get(..size as usize).filter(|space| space.len() >= CONVENTIONAL) else {
        return fields.buffer("bytes", size).map(drop);
    };
    let start = fields.offset();
    let at = |place: usize| start + place as u64;
    registers(fields, COMMON, at(HEADER))?;
    match space[HEADER_TYPE] & 0x7f {
        0 => registers(fields, DEVICE, at(HEADER))?,
        1 => registers(fields, BRIDGE, at(HEADER))?,
        _ => fields.buffer("header", at(HEADER) - fields.offset()).map(drop)?,
    }
    let gap = |fields: &mut Fields<'_, '_>, to: usize, name: &'static str| match at(to) - fields.offset() {
        0 => Ok(()),
        len => fields.buffer(name, len).map(drop),
    };
    let list = capabilities(space);
    for (index, here) in list.iter().enumerate() {
        let end = list.get(index + 1).copied().unwrap_or(CONVENTIONAL);
        gap(fields, *here, "device_specific")?;
        let id = space[*here];
        let (name, rest) = capability(id, &space[*here..end]);
        let name = named(name, "capability", id.into());
        fields.structure(name, "pci capability", "", 0, |fields| {
            registers(fields, CAPABILITY, at(end))?;
            registers(fields, rest, at(end))?;
            // A vendor's has its own length.
            let len = usize::from(*space.get(here + 2).unwrap_or(&0));
            if id == 0x09 && (4..=end - here).contains(&len) {
                fields.buffer("data", len as u64 - 3)?;
            }
            Ok(())
        })?;
    }
    gap(fields, CONVENTIONAL, "device_specific")?;
    let list = if space.len() == EXPRESS { extended_capabilities(space) } else { Vec::new() };
    for (index, here) in list.iter().enumerate() {
        let end = list.get(index + 1).copied().unwrap_or(EXPRESS);
        gap(fields, *here, "extended")?;
        let id = u16::from_le_bytes([space[*here], space[here + 1]]);
        let (name, rest) = extended_capability(id);
        let name = named(name, "extended_capability", id);
        fields.structure(name, "pci extended capability", "", 0, |fields| {
            registers(fields, EXTENDED_CAPABILITY, at(end))?;
            registers(fields, rest, at(end))
        })?;
    }
    gap(fields, space.len(), "extended")
}

/// The configuration of a VFIO device: what its section has between the record CONFIG and END_OF_STATE, the first byte
/// of it at stream offset `offset`. The configuration space and the MSI-X table are named to the register.
///
/// # Errors
/// [`WireError::Unexpected`] if it does not have the size that its configuration space says, which a subsection that is
/// unknown here would make; otherwise as [`DeviceDescription::decode`](super::DeviceDescription::decode).
///
/// ```
/// use qevm_savevm::vmdesc::vfio_configuration;
/// use qevm_wire::Limits;
///
/// let mut body = vec![0; 4 + 256 + 16];
/// body[3] = 2; // the structure's version
/// body[4..8].copy_from_slice(&[0x86, 0x80, 0x0e, 0x10]);
/// let node = vfio_configuration(&body, 1000, &Limits::default())?;
/// let device = node.find("parent_obj.config.device_id").unwrap();
/// assert_eq!((device.offset, device.scalar().unwrap().as_u64()), (1006, 0x100e));
/// # Ok::<(), qevm_savevm::Error>(())
/// ```
pub fn vfio_configuration(body: &[u8], offset: u64, limits: &Limits) -> Result<Node, Error> {
    const VERSION: u64 = 4;
    let mut input = Input::new(body, offset, limits);
    let mut fields = Fields::new(&mut input);
    let Some(facts) = PciFacts::from_payload(body, true) else {
        let (found, expected) = (body.len() as u64, VERSION + EXPRESS as u64 + 4 * LINES);
        let what = "size of a VFIO device's configuration";
        return Err(fields.input.reader.fail(WireError::Unexpected { what, found, expected }));
    };
    let size = if facts.express { EXPRESS } else { CONVENTIONAL } as u64;
    fields.structure("parent_obj", "struct", "PCIDevice", 2, |fields| {
        fields.i32("version_id")?;
        fields.structure("config", "pci config", "", 0, |fields| config_space(fields, size))?;
        fields.scalars("irq_state", "pci irq state", ScalarKind::I32, LINES)
    })?;
    let vectors = u64::from(facts.msix_vectors);
    if vectors > 0 {
        debug_assert_eq!(fields.input.ahead().len(), msix_len(vectors));
        fields.structure("msix", "msix state", "msix", 0, |fields| {
            // Address, its upper half, data, control.
            for vector in 0..vectors {
                let (name, type_name) = (format!("table[{vector}]"), "uint32 little-endian");
                fields.scalars(name, type_name, ScalarKind::U32Le, MSIX_ENTRY / 4)?;
            }
            fields.buffer("pending", vectors.div_ceil(8)).map(drop)
        })?;
    }
    fields.input.reader.expect_end("VFIO device's configuration")?;
    let members = std::mem::take(&mut fields.members);
    let value = Value::Struct(Struct { vmsd_name: "VFIOPCIDevice".into(), version: 1, members });
    Ok(Node { name: "vfio".into(), type_name: "section".into(), offset, len: body.len() as u64, value })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(body: &[u8]) -> Node {
        let node = vfio_configuration(body, 0, &Limits::default()).unwrap();
        let mut written = Vec::new();
        node.encode(&mut written).unwrap();
        assert_eq!(written, body);
        node
    }

    fn number(node: &Node, path: &str) -> u64 {
        node.find(path).unwrap_or_else(|| panic!("{path}")).scalar().unwrap_or_else(|| panic!("{path}")).as_u64()
    }

    fn capability_names(node: &Node) -> Vec<&str> {
        let config = node.find("parent_obj.config").unwrap();
        let listed = config.children().iter().filter(|node| node.type_name.contains("capability"));
        listed.map(|node| &*node.name).collect()
    }

    /// `-device nvme` of QEMU 11.1 (1b36:0010, class 0108, programming interface 2; 65 vectors).
    #[test]
    fn a_pci_express_device_of_qemu_is_named_to_the_register() {
        let node = read(include_bytes!("../../tests/data/pci/11.1-nvme.bin"));
        let config = |path: &str| number(&node, &format!("parent_obj.config.{path}"));
        assert_eq!((config("vendor_id"), config("device_id")), (0x1b36, 0x0010));
        assert_eq!((config("class"), config("subclass"), config("programming_interface")), (1, 8, 2));
        assert_eq!((config("subsystem_vendor_id"), config("subsystem_id")), (0x1af4, 0x1100));
        // Memory and bus master; a list of capabilities; 64 bits of memory at 0xfebf8000.
        assert_eq!((config("command"), config("status"), config("bar0")), (0x0107, 0x0010, 0xfebf_8004));
        assert_eq!((config("interrupt_line"), config("interrupt_pin")), (0x0a, 1));
        assert_eq!(capability_names(&node), ["msix", "pm", "pcie"]);
        // 65 vectors, off; the table in BAR 0 at 0x2000, the pending bits at 0x3000.
        assert_eq!(
            (config("msix.control"), config("msix.table"), config("msix.pending_bits")),
            (0x0040, 0x2000, 0x3000)
        );
        assert_eq!((config("pm.capabilities"), config("pm.control")), (0x0003, 0x0008));
        // Version 2, an endpoint in the root complex; with reset of a function.
        assert_eq!((config("pcie.capabilities"), config("pcie.device_capabilities")), (0x92, 0x1000_8020));
        let msix = node.find("msix").unwrap();
        assert_eq!((msix.children().len(), &*msix.children()[64].name, msix.children()[65].len), (66, "table[64]", 9));
        assert_eq!(node.find("parent_obj.irq_state").unwrap().offset, 4 + 4096);
    }

    /// As `testdev` of the lab has it (conformance/lab/testdev), with MSI on; and with extended capabilities.
    fn testdev() -> Vec<u8> {
        let mut space = vec![0; EXPRESS];
        space[..8].copy_from_slice(&[0x57, 0x7e, 0x01, 0x00, 0x06, 0x04, 0x10, 0]);
        space[POINTER] = 0x40;
        space[0x40..0x4e].copy_from_slice(&[0x05, 0x60, 0xa5, 0, 0, 0, 0xe0, 0xfe, 1, 0, 0, 0, 0x60, 0x40]);
        space[0x60..0x6c].copy_from_slice(&[0x11, 0x70, 3, 0, 2, 0, 0, 0, 2, 8, 0, 0]);
        space[0x70..0x78].copy_from_slice(&[0x09, 0x80, 8, 1, 2, 3, 4, 5]);
        space[0x80..0x82].copy_from_slice(&[0x7e, 0]);
        space[0x100..0x10c].copy_from_slice(&[0x03, 0, 0x01, 0x15, 1, 2, 3, 4, 5, 6, 7, 8]);
        space[0x150..0x158].copy_from_slice(&[0x0f, 0, 0x01, 0x00, 0x20, 0, 0x1f, 0x80]);
        [&[0, 0, 0, 2][..], &space, &[0; 16], &[0x5a; 4 * 16], &[0x0a]].concat()
    }

    #[test]
    fn every_capability_has_its_name_and_its_registers() {
        let node = read(&testdev());
        let config = |path: &str| number(&node, &format!("parent_obj.config.{path}"));
        let names = ["msi", "msix", "vendor_specific", "capability_0x7e", "serial_number", "ats"];
        assert_eq!(capability_names(&node), names);
        let msi = ["control", "address", "address_upper", "data"].map(|register| config(&format!("msi.{register}")));
        assert_eq!(msi, [0xa5, 0xfee0_0000, 1, 0x4060]);
        assert_eq!(node.find("parent_obj.config.vendor_specific.data").unwrap().len, 5);
        assert_eq!((config("serial_number.lower"), config("serial_number.upper")), (0x0403_0201, 0x0807_0605));
        assert_eq!((config("ats.capabilities"), config("ats.control")), (0x20, 0x801f));
        let Value::Scalars(entry) = &node.find("msix.table[3]").unwrap().value else { panic!("no numbers") };
        assert_eq!(entry.iter().map(|word| word.as_u64()).collect::<Vec<_>>(), [0x5a5a_5a5a; 4]);
        assert_eq!(node.opaque_bytes(), 0);
    }

    #[test]
    fn a_list_that_goes_round_or_overlaps_ends() {
        let mut body = testdev();
        body[4 + 0x81] = 0x40;
        assert_eq!(capability_names(&read(&body)).len(), 6);
        // MSI-X within MSI: registers that reach into it are not told.
        let mut body = testdev();
        body[4 + 0x41] = 0x44;
        body[4 + 0x44..4 + 0x48].copy_from_slice(&[0x11, 0, 3, 0]);
        let node = read(&body);
        assert!(node.find("parent_obj.config.msi.control").is_some());
        assert!(node.find("parent_obj.config.msi.address").is_none());
        // Extended ones as well.
        let mut body = testdev();
        body[4 + 0x152..4 + 0x154].copy_from_slice(&[0x01, 0x10]);
        assert_eq!(capability_names(&read(&body)).len(), 6);
    }

    #[test]
    fn another_size_is_an_error() {
        for cut in [1, 16, 4096 + 16 + 60] {
            let body = testdev();
            let error = vfio_configuration(&body[..body.len() - cut], 70, &Limits::default()).unwrap_err();
            assert!(error.to_string().contains("size of a VFIO device's configuration"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_configuration_space_is_taken(header in prop::collection::vec(any::<u8>(), 256),
            extended in prop::collection::vec(any::<u8>(), 3840), express: bool) {
            let mut space = header;
            if express {
                space.extend(extended);
            }
            let mut body = [&[0, 0, 0, 2][..], &space, &[0; 16]].concat();
            // Without MSI-X the size is known.
            let msix = PciFacts::from_payload(&[&body[..], &[0; 40_000]].concat(), false).map_or(0, |f| f.msix_vectors);
            body.resize(body.len() + if msix > 0 { msix_len(msix.into()) } else { 0 }, 0);
            if PciFacts::from_payload(&body, true).is_some() {
                read(&body);
            }
        }
    }
}
