//! Processors and interrupt lines as the MultiProcessor Specification 1.4 of Intel tells them to a kernel without ACPI.

const LOCAL_APICS: u32 = 0xfee0_0000;
/// Address and first interrupt of each IOAPIC.
const IOAPICS: [(u32, u8); 2] = [(0xfec0_0000, 0), (0xfec1_0000, 24)];
const PINS: u8 = 24;
const ISA_LINES: u8 = 16;

const HEADER_LEN: u16 = 44;
const REVISION: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
const CPU_FPU_AND_APIC: u32 = 0x201;

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
const ALL_APICS: u8 = 0xff;
const ISA: u8 = 0;

/// The floating pointer to the table at address `table`.
pub(super) fn pointer(table: u32) -> Vec<u8> {
    let mut pointer = b"_MP_".to_vec();
    pointer.extend(table.to_le_bytes());
    pointer.extend([1, REVISION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer
}

/// The table.
pub(super) fn table(cpus: usize) -> Vec<u8> {
    let (mut entries, mut count) = (Vec::new(), 0u16);
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    let cpus = cpus as u8;
    for cpu in 0..cpus {
        let flags = ENABLED | if cpu == 0 { BOOT_PROCESSOR } else { 0 };
        let mut entry = vec![PROCESSOR, cpu, APIC_VERSION, flags, 0, 6, 0, 0];
        entry.extend(CPU_FPU_AND_APIC.to_le_bytes());
        entry.extend([0; 8]);
        add(&entry);
    }
    add(&[&[BUS, ISA], b"ISA   ".as_slice()].concat());
    for (id, (address, _)) in (cpus..).zip(IOAPICS) {
        add(&[&[IOAPIC, id, IOAPIC_VERSION, ENABLED], address.to_le_bytes().as_slice()].concat());
    }
    // Flags of 0: as the bus has it, which for ISA is edge-triggered and active high.
    for (id, (_, first)) in (cpus..).zip(IOAPICS) {
        for pin in 0..PINS {
            let line = first + pin;
            // The PIT's interrupt is at pin 2, where the second 8259 has none.
            match (line, pin) {
                (0, _) => add(&[IO_INTERRUPT, VECTORED, 0, 0, ISA, 0, id, 2]),
                (2, _) => {}
                (ISA_LINES.., _) if first == 0 => {}
                _ => add(&[IO_INTERRUPT, VECTORED, 0, 0, ISA, line, id, pin]),
            }
        }
    }
    add(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, NMI, 0, 0, ISA, 0, ALL_APICS, 1]);

    let mut header = b"PCMP".to_vec();
    header.extend((HEADER_LEN + entries.len() as u16).to_le_bytes());
    header.extend([REVISION, 0]);
    header.extend(b"QEVM    MICROVM     ");
    header.extend([0; 6]);
    header.extend(count.to_le_bytes());
    header.extend(LOCAL_APICS.to_le_bytes());
    header.extend([0; 4]);
    header.extend(entries);
    header[7] = checksum(&header);
    header
}

/// Makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::{MP_POINTER, MP_TABLE};
    use crate::machine::MAX_CPUS;

    #[test]
    fn the_table_adds_up_and_fits() {
        let pointer = pointer(MP_TABLE as u32);
        assert_eq!(pointer[4..8], (MP_TABLE as u32).to_le_bytes());
        for cpus in 1..=MAX_CPUS {
            let config = table(cpus);
            assert!(config.len() as u64 <= MP_POINTER - MP_TABLE, "{} bytes", config.len());
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!((sum(&pointer), sum(&config)), (0, 0));
            assert_eq!(usize::from(u16::from_le_bytes([config[4], config[5]])), config.len());
            // Entry by entry: 20 bytes for a processor, 8 for all others.
            let (mut at, mut kinds) = (44, Vec::new());
            while at < config.len() {
                kinds.push(config[at]);
                at += if config[at] == PROCESSOR { 20 } else { 8 };
            }
            assert_eq!(kinds.len(), usize::from(u16::from_le_bytes([config[34], config[35]])));
            assert_eq!(kinds.iter().filter(|kind| **kind == PROCESSOR).count(), cpus);
            assert!(kinds.is_sorted(), "the specification orders entries by kind");
        }
    }
}
