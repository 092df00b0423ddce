//! The first vCPU at the kernel's entry point.

use crate::error::Result;
use crate::memory::GuestMemory;
use qevm_microvm::state::{DescriptorTable, Registers, Segment, SpecialRegisters};

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// In 32-bit protected mode without paging; both are addresses.
    Pvh { entry: u32, start_info: u32 },
    /// In long mode; both are addresses.
    Linux64 { entry: u64, zero_page: u64 },
}

const DESCRIPTORS: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
/// Four of them, for 4 GiB.
const DIRECTORIES: u64 = 0xb000;
const PAGE: u64 = 0x1000;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 always reads as one.
const FLAGS: u64 = 1 << 1;

const RBX: usize = 3;
const RSI: usize = 6;

// Selectors of the Linux boot protocol: __BOOT_CS and __BOOT_DS.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
/// Execute and read, accessed.
const CODE_TYPE: u8 = 0xb;
/// Read and write, accessed.
const DATA_TYPE: u8 = 0x3;
/// A busy TSS.
const TASK_TYPE: u8 = 0xb;
const TASK_LIMIT: u32 = 0x67;

impl Entry {
    /// Makes the page tables and descriptors for an entry in long mode.
    pub(super) fn long_mode(memory: &GuestMemory, entry: u64, zero_page: u64) -> Result<Entry> {
        memory.write(PML4, &(PDPT | PRESENT_WRITABLE).to_le_bytes())?;
        for i in 0..4 {
            let directory = DIRECTORIES + i * PAGE;
            memory.write(PDPT + 8 * i, &(directory | PRESENT_WRITABLE).to_le_bytes())?;
            let entries = (512 * i..).map(|page| (page * LARGE_PAGE) | PRESENT_WRITABLE | LARGE).take(512);
            memory.write(directory, &entries.flat_map(u64::to_le_bytes).collect::<Vec<u8>>())?;
        }
        let descriptors = [code(true), data(), task()].map(|segment| descriptor(&segment));
        let first = DESCRIPTORS + u64::from(CODE);
        memory.write(first, &descriptors.into_iter().flat_map(u64::to_le_bytes).collect::<Vec<u8>>())?;
        Ok(Entry::Linux64 { entry, zero_page })
    }

    /// Changes the registers after a reset to those at the entry.
    pub(crate) fn apply(self, regs: &mut Registers, sregs: &mut SpecialRegisters) {
        regs.rflags = FLAGS;
        let long = match self {
            Entry::Pvh { entry, start_info } => {
                regs.rip = entry.into();
                regs.gpr[RBX] = start_info.into();
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                false
            }
            Entry::Linux64 { entry, zero_page } => {
                regs.rip = entry;
                regs.gpr[RSI] = zero_page;
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.cr3 = PML4;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
                sregs.gdt = DescriptorTable { base: DESCRIPTORS, limit: TASK + 7 };
                sregs.idt = DescriptorTable::default();
                true
            }
        };
        sregs.segs = [data(), code(long), data(), data(), data(), data()];
        sregs.tr = task();
    }
}

fn code(long: bool) -> Segment {
    Segment { selector: CODE, kind: CODE_TYPE, l: long, db: !long, ..data() }
}

fn data() -> Segment {
    Segment {
        selector: DATA,
        limit: u32::MAX,
        kind: DATA_TYPE,
        present: true,
        s: true,
        db: true,
        g: true,
        ..Segment::default()
    }
}

fn task() -> Segment {
    Segment { selector: TASK, limit: TASK_LIMIT, kind: TASK_TYPE, present: true, ..Segment::default() }
}

/// The descriptor that a segment register with base 0 is loaded from (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &Segment) -> u64 {
    let bit = |flag: bool, at: u32| u64::from(flag) << at;
    let limit = u64::from(if segment.g { segment.limit >> 12 } else { segment.limit });
    limit & 0xffff
        | (limit >> 16 & 0xf) << 48
        | u64::from(segment.kind) << 40
        | bit(segment.s, 44)
        | u64::from(segment.dpl) << 45
        | bit(segment.present, 47)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        // Flat 4 GiB segments as the boot protocol demands them, encoded by hand from the SDM.
        assert_eq!(descriptor(&code(true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&code(false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&data()), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn four_gib_are_mapped_one_to_one() {
        let memory = GuestMemory::microvm(8 << 20, &[0; 64 << 10]).unwrap();
        Entry::long_mode(&memory, 0x10_0200, 0x7000).unwrap();
        let read = |gpa| {
            let mut bytes = [0; 8];
            memory.read(gpa, &mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        for linear in [0u64, 0x20_0000, 0x1234_5678, 0xffff_ffff] {
            let table = |entry: u64| entry & !0xfff;
            let directory = table(read(table(read(PML4)) + 8 * (linear >> 30)));
            let page = read(directory + 8 * (linear >> 21 & 511));
            assert_eq!((page & !0x1f_ffff) + (linear & 0x1f_ffff), linear);
            assert_eq!(page & 0x83, 0x83);
        }
    }
}
