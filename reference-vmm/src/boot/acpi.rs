//! ACPI tables for a kernel that is entered without firmware (ACPI specification 6.5): what a hardware-reduced machine
//! has to say, which is where interrupts go, how to switch off and reset, and where the serial port, the virtio-mmio
//! transports and the PCI bus are.

mod pci;

use crate::devices::{GED_IRQ, Ged, SERIAL_IRQ, SERIAL_PORT};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use qevm_microvm::virtio::VirtioDevice;
use std::ops::Range;

const OEM: [u8; 6] = *b"QEVM  ";
const TABLE: [u8; 8] = *b"MICROVM ";
const REVISION: u32 = 1;
/// Of a DSDT with integers of 64 bits.
const DSDT_REVISION: u8 = 2;
const LOCAL_APICS: u32 = 0xfee0_0000;
/// Address and first interrupt of each IOAPIC.
const IOAPICS: [(u32, u32); 2] = [(0xfec0_0000, 0), (0xfec1_0000, 24)];
/// `iapc_boot_arch`: there is no VGA to look for.
const NO_VGA: u16 = 1 << 2;
const ALIGN: usize = 64;

/// The tables for address `at`, where the root pointer is, of a machine with this many vCPUs and virtio-mmio devices.
/// One with a PCI bus has its window above 4 GiB.
pub(super) fn tables(at: u64, cpus: usize, virtio: usize, high_window: Option<Range<u64>>) -> Vec<u8> {
    let mut bytes = vec![0; size_of::<Rsdp>()];
    let mut add = |table: &dyn Aml| {
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        let address = at + bytes.len() as u64;
        table.to_aml_bytes(&mut bytes);
        address
    };
    let mcfg = high_window.as_ref().map(|_| add(&pci::mcfg()));
    let dsdt = add(&dsdt(virtio, high_window));
    let fadt = add(&fadt(dsdt));
    let madt = add(&madt(cpus));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    [fadt, madt].into_iter().chain(mcfg).for_each(|table| xsdt.add_entry(table));
    let xsdt = add(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    bytes[..root.len()].copy_from_slice(&root);
    bytes
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let register = |address| GAS::new(AddressSpace::SystemMemory, 8, 0, AccessSize::ByteAccess, address);
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = NO_VGA.into();
    fadt.sleep_control_reg = register(Ged::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(Ged::SLEEP_STATUS);
    fadt.reset_reg = register(Ged::RESET);
    fadt.reset_value = Ged::RESET_VALUE;
    fadt.finalize()
}

fn madt(cpus: usize) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(LOCAL_APICS));
    let cpus = cpus as u8;
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    for (id, (address, first)) in (cpus..).zip(IOAPICS) {
        madt.add_structure(IoApic::new(id, address, first));
    }
    madt
}

fn dsdt(virtio: usize, high_window: Option<Range<u64>>) -> Sdt {
    let mut body = Vec::new();
    device(
        &mut body,
        "COM1",
        &aml::EISAName::new("PNP0501"),
        1,
        vec![&aml::IO::new(SERIAL_PORT, SERIAL_PORT, 0, 8), &interrupt(SERIAL_IRQ)],
    );
    for position in 0..virtio {
        let (address, length, irq) = VirtioDevice::resources(position);
        let memory = aml::Memory32Fixed::new(true, address, length);
        // The identifier that Linux and QEMU use for virtio-mmio.
        device(&mut body, &format!("VR{position:02}"), &"LNRO0005", position as u8, vec![&memory, &interrupt(irq)]);
    }
    event_device(&mut body);
    high_window.into_iter().for_each(|window| pci::host_bridge(&mut body, window));
    // Soft off is sleep type 5 of the sleep control register.
    let soft_off = aml::Package::new(vec![&Ged::SOFT_OFF, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    aml::Name::new("\\_S5_".into(), &soft_off).to_aml_bytes(&mut body);
    const HEADER: u32 = 36;
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, DSDT_REVISION, OEM, TABLE, REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// The generic event device, and the power button that it tells of (ACPI specification 6.5, 5.6.9 and 4.8.2.2.1.2).
fn event_device(into: &mut Vec<u8>) {
    const STATUS_CHANGE: u8 = 0x80;
    let button = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C0C"));
    let button_uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let button = aml::Device::new("PWRB".into(), vec![&button, &button_uid]);
    let hid = aml::Name::new("_HID".into(), &"ACPI0013");
    let uid = aml::Name::new("_UID".into(), &"GED");
    let line = interrupt(GED_IRQ);
    let crs = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&line]));
    let (at, length) = (Ged::SELECTOR as usize, size_of::<u32>());
    let region = aml::OpRegion::new("EREG".into(), aml::OpRegionSpace::SystemMemory, &at, &length);
    let selector = aml::FieldEntry::Named(*b"ESEL", 8 * length);
    let (access, update) = (aml::FieldAccessType::DWord, aml::FieldUpdateRule::WriteAsZeroes);
    let field = aml::Field::new("EREG".into(), access, aml::FieldLockRule::NoLock, update, vec![selector]);
    let selector = aml::Path::new("ESEL");
    let events = aml::Local(0);
    let read = aml::Store::new(&events, &selector);
    let pressed = aml::And::new(&aml::Local(1), &events, &Ged::POWER_BUTTON);
    let is_pressed = aml::Equal::new(&aml::Local(1), &Ged::POWER_BUTTON);
    let button_path = aml::Path::new("PWRB");
    let notify = aml::Notify::new(&button_path, &STATUS_CHANGE);
    let tell = aml::If::new(&is_pressed, vec![&notify]);
    let event = aml::Method::new("_EVT".into(), 1, true, vec![&read, &pressed, &tell]);
    let device = aml::Device::new("GED_".into(), vec![&hid, &uid, &crs, &region, &field, &event]);
    aml::Scope::new("\\_SB_".into(), vec![&button, &device]).to_aml_bytes(into);
}

/// A line that rises: the second IOAPIC does not know when a level has ended.
fn interrupt(irq: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, irq)
}

fn device(into: &mut Vec<u8>, name: &str, kind: &dyn Aml, number: u8, resources: Vec<&dyn Aml>) {
    let hid = aml::Name::new("_HID".into(), kind);
    let uid = aml::Name::new("_UID".into(), &number);
    let template = aml::ResourceTemplate::new(resources);
    let crs = aml::Name::new("_CRS".into(), &template);
    let device = aml::Device::new(name.into(), vec![&hid, &uid, &crs]);
    aml::Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(into);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::{ACPI_TABLES, MP_TABLE};
    use crate::machine::MAX_CPUS;

    #[test]
    fn every_table_is_found_and_adds_up() {
        let at = 0x9_0000;
        let most = tables(at, MAX_CPUS, 24, Some(1 << 40..1 << 41)).len() as u64;
        assert!(most <= MP_TABLE - ACPI_TABLES, "{most} bytes");
        let bytes = tables(at, 4, 24, None);
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        let u64_at = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
        let table = |address: u64| {
            let start = (address - at) as usize;
            let len = u32::from_le_bytes(*bytes[start + 4..].first_chunk().unwrap()) as usize;
            let table = &bytes[start..start + len];
            assert_eq!(sum(table), 0, "{:?}", String::from_utf8_lossy(&table[..4]));
            (table, start)
        };
        assert_eq!((&bytes[..8], sum(&bytes[..20]), sum(&bytes[..36])), (b"RSD PTR ".as_slice(), 0, 0));
        let (xsdt, start) = table(u64_at(24));
        assert_eq!((&xsdt[..4], xsdt.len()), (b"XSDT".as_slice(), 36 + 2 * 8));
        let (fadt, fadt_start) = table(u64_at(start + 36));
        // Flags: hardware-reduced, with a reset register; the register and its value.
        let flags = u32::from_le_bytes(*fadt[112..].first_chunk().unwrap());
        assert_eq!((&fadt[..4], flags & (1 << 20 | 1 << 10)), (b"FACP".as_slice(), 1 << 20 | 1 << 10));
        assert_eq!((u64_at(fadt_start + 120), fadt[128]), (0xfea0_0202, 0x42));
        let (dsdt, _) = table(u64_at(fadt_start + 140));
        let count = |what: &[u8]| dsdt.windows(what.len()).filter(|window| *window == what).count();
        assert_eq!((count(b"LNRO0005"), count(b"COM1"), count(b"_S5_")), (24, 1, 1));
        // From the DSDT that QEMU 11.1.3 gives to its firmware: the operation region of the event selector, its one
        // field, and the interrupt, edge-triggered and active high.
        let region = [b"\x5b\x80EREG\x00\x0c".as_slice(), &0xfea0_0000_u32.to_le_bytes(), b"\x0a\x04"].concat();
        let wanted: [&[u8]; 4] =
            [&region, b"\x5b\x81\x0bEREG\x43ESEL\x20", &[0x89, 6, 0, 3, 1, 9, 0, 0, 0], b"ACPI0013\0"];
        wanted.iter().for_each(|part| assert_eq!(count(part), 1, "{}", String::from_utf8_lossy(part)));
        assert_eq!((count(b"PWRB"), count(b"_EVT")), (2, 1));
        let (madt, _) = table(u64_at(start + 44));
        assert_eq!((&madt[..4], madt.len()), (b"APIC".as_slice(), 44 + 4 * 8 + 2 * 12));
    }
}
