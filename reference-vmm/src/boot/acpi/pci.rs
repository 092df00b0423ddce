//! The PCI bus in the tables: the host bridge with its windows, and where the interrupt pins of its devices go (ACPI
//! specification 6.5, 6.2.13; PCI Firmware Specification 3.3, 4.1).

use super::{OEM, REVISION, TABLE};
use crate::devices::pci::{ECAM, FIRST_GSI, LINES, LOW_WINDOW, MOST_DEVICES, line_of};
use acpi_tables::Aml;
use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, Device, EISAName, Interrupt, Method, Name, Package, PackageBuilder,
    Path, ResourceTemplate, Return, Scope,
};
use acpi_tables::mcfg::MCFG;
use std::ops::Range;

const SEGMENT: u16 = 0;
const LAST_BUS: u8 = 0xff;

/// Where the configuration space is.
pub(super) fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(ECAM.start, SEGMENT, 0, LAST_BUS);
    mcfg
}

/// The name of the link device of an interrupt line.
fn link(line: usize) -> Path {
    Path::new(&format!("GSI{line}"))
}

/// The host bridge, and the devices that link its interrupt lines to the IOAPIC's.
pub(super) fn host_bridge(into: &mut Vec<u8>, high_window: Range<u64>) {
    for line in 0..LINES {
        let gsi = FIRST_GSI + line as u32;
        // Level-triggered, active high.
        let interrupt = Interrupt::new(true, false, false, false, gsi);
        let resources = ResourceTemplate::new(vec![&interrupt]);
        let hid = Name::new("_HID".into(), &EISAName::new("PNP0C0F"));
        let uid = Name::new("_UID".into(), &(line as u8));
        let (possible, current) = (Name::new("_PRS".into(), &resources), Name::new("_CRS".into(), &resources));
        let set = Method::new("_SRS".into(), 1, false, Vec::new());
        let device = Device::new(link(line), vec![&hid, &uid, &possible, &current, &set]);
        Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(into);
    }
    let (hid, cid) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
    let (hid, cid) = (Name::new("_HID".into(), &hid), Name::new("_CID".into(), &cid));
    let [segment, first_bus, uid] = ["_SEG", "_BBN", "_UID"].map(|name| Name::new(name.into(), &aml::ZERO));
    // Reads and writes of devices are coherent with the caches.
    let coherent = Name::new("_CCA".into(), &aml::ONE);
    let routing = Name::new("_PRT".into(), &routing());
    let base = Return::new(&ECAM.start);
    let base = Method::new("_CBA".into(), 0, false, vec![&base]);
    let buses = AddressSpace::<u16>::new_bus_number(0, LAST_BUS.into());
    let memory = AddressSpaceCacheable::NotCacheable;
    let low = AddressSpace::<u32>::new_memory(memory, true, LOW_WINDOW.start as u32, (LOW_WINDOW.end - 1) as u32, None);
    let memory = AddressSpaceCacheable::NotCacheable;
    let high = AddressSpace::<u64>::new_memory(memory, true, high_window.start, high_window.end - 1, None);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&buses, &low, &high]));
    // What holds the configuration space, so that nothing else is put there.
    let reserved_hid = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let memory = AddressSpaceCacheable::NotCacheable;
    let reserved = AddressSpace::<u64>::new_memory(memory, true, ECAM.start, ECAM.end - 1, None);
    let reserved = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&reserved]));
    let reserved = Device::new("RES0".into(), vec![&reserved_hid, &reserved]);
    let bridge = Device::new(
        "PCI0".into(),
        vec![&hid, &cid, &segment, &first_bus, &uid, &coherent, &routing, &base, &resources, &reserved],
    );
    Scope::new("\\_SB_".into(), vec![&bridge]).to_aml_bytes(into);
}

/// For each pin of each device the link of its line.
fn routing() -> PackageBuilder {
    let mut routing = PackageBuilder::new();
    for device in 0..MOST_DEVICES {
        for pin in 0..LINES {
            // All functions of the device.
            let address = (device as u32) << 16 | 0xffff;
            let source = link(line_of(device, pin));
            routing.add_element(&Package::new(vec![&address, &(pin as u8), &source, &aml::ZERO]));
        }
    }
    routing
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts of the DSDT that QEMU 11.1.3 gives to its firmware with `pcie=on`, where link devices are called L000
    /// to L003.
    #[test]
    fn bridge_and_links_are_qemus() {
        let mut body = Vec::new();
        host_bridge(&mut body, 0xc0_0000_0000..0x100_0000_0000);
        let count = |what: &[u8]| body.windows(what.len()).filter(|window| *window == what).count();
        for line in 0..4_u8 {
            let resources = [0x89, 6, 0, 1, 1, 0x10 + line, 0, 0, 0, 0x79, 0];
            assert_eq!(count(&resources), 2, "possible and current, level and active high: {line}");
        }
        assert_eq!((count(b"\x06_SRS\x01"), count(b"_PRT\x12"), count(b"_CBA")), (4, 1, 1));
        // Device 1: INTA is line 1; device 31: INTD is line 2.
        assert_eq!(count(b"\x0c\xff\xff\x01\x00\x00GSI1\x00"), 1);
        assert_eq!(count(b"\x0c\xff\xff\x1f\x00\x0a\x03GSI2\x00"), 1);
        let lines = (0..4).map(|line| count(format!("GSI{line}\0").as_bytes())).collect::<Vec<_>>();
        assert_eq!(lines, [32; 4]);
        // Address, range and length of the windows and the buses.
        let bus = [0x88, 0x0d, 0, 2, 0x0c, 0, 0, 0, 0, 0, 0xff, 0, 0, 0, 0, 1];
        let low = [
            [0x87, 0x17, 0, 0, 0x0c, 1].as_slice(),
            &[0; 4],
            &0xc000_0000_u32.to_le_bytes(),
            &0xdfff_ffff_u32.to_le_bytes(),
            &[0; 4],
            &0x2000_0000_u32.to_le_bytes(),
        ];
        let high = [
            [0x8a, 0x2b, 0, 0, 0x0c, 1].as_slice(),
            &[0; 8],
            &0xc0_0000_0000_u64.to_le_bytes(),
            &0xff_ffff_ffff_u64.to_le_bytes(),
            &[0; 8],
            &0x40_0000_0000_u64.to_le_bytes(),
        ];
        for part in [bus.to_vec(), low.concat(), high.concat()] {
            assert_eq!(count(&part), 1, "{part:02x?}");
        }
    }

    #[test]
    fn a_machine_with_a_bus_has_one_table_more() {
        let entries = |window: Option<Range<u64>>| {
            let bytes = super::super::tables(0x9_0000, 1, 0, window);
            assert!(bytes.len() < 0x8000, "{} bytes", bytes.len());
            let mcfg = bytes.windows(4).position(|window| window == b"MCFG");
            mcfg.map(|at| (bytes[at + 4], bytes[at + 44..at + 56].to_vec()))
        };
        assert_eq!(entries(None), None);
        // 36 bytes of header, 8 reserved, then base address, segment, first and last bus.
        let (length, entry) = entries(Some(0xc0_0000_0000..0x100_0000_0000)).unwrap();
        assert_eq!((length, entry), (60, [0, 0, 0, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0xff].to_vec()));
    }
}
