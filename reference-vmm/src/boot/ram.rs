//! The machine's RAM as a kernel sees it, and what lies where in it.

use super::BootError;
use crate::devices::pci::ECAM;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, RamBlock};
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

pub(super) const CAN_BE_HERE: u64 = 1 << 20;
pub(super) const FOUR_GIB: u64 = 1 << 32;
/// The last KiB of conventional memory, where a kernel looks for the pointer to the multiprocessor table.
pub(super) const MP_POINTER: u64 = 0x9_fc00;
/// The table, which has 20 bytes for each processor.
pub(super) const MP_TABLE: u64 = 0x9_f000;
pub(super) const ACPI_TABLES: u64 = 0x9_0000;
pub(super) const COMMAND_LINE: u64 = 0x2_0000;
pub(super) const COMMAND_LINE_MAX: usize = 0x1_0000;

/// Kinds of memory in a memory map (ACPI specification 6.5, table 15.374).
pub(super) const USABLE: u32 = 1;
pub(super) const RESERVED: u32 = 2;
pub(super) const ACPI: u32 = 3;

/// The machine's RAM as a kernel sees it.
pub(super) struct Ram {
    /// Address after the RAM below 4 GiB.
    pub(super) low_end: u64,
    /// The memory map: address, bytes, kind.
    pub(super) map: Vec<(u64, u64, u32)>,
    /// For the loader.
    pub(super) view: GuestMemoryMmap<()>,
    /// What `view` shows.
    _blocks: Vec<Arc<RamBlock>>,
}

impl Ram {
    pub(super) fn of(memory: &GuestMemory, pci: bool) -> Result<Ram> {
        let mut map = vec![
            (0, ACPI_TABLES, USABLE),
            (ACPI_TABLES, MP_TABLE - ACPI_TABLES, ACPI),
            (MP_TABLE, CAN_BE_HERE - MP_TABLE, RESERVED),
        ];
        if pci {
            // Linux uses what the MCFG tells from the beginning only where the memory map reserves it.
            map.push((ECAM.start, ECAM.end - ECAM.start, RESERVED));
        }
        let (mut low_end, mut regions, mut blocks) = (0, Vec::new(), Vec::new());
        let host = |cause| Error::Host { what: "map guest RAM to load a kernel", cause };
        for mapping in memory.mappings() {
            let block = &memory.blocks()[mapping.block];
            if !Arc::ptr_eq(block, memory.ram()) {
                continue;
            }
            let start = block.host_address().wrapping_add(mapping.offset as usize);
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a mapping is a part of its block, and the block stays mapped as long as `blocks` holds it.
            let region = unsafe { MmapRegion::build_raw(start, mapping.len as usize, protection, flags) }
                .map_err(|error| host(std::io::Error::other(error)))?;
            blocks.push(Arc::clone(block));
            let end = mapping.gpa + mapping.len;
            if mapping.gpa >= CAN_BE_HERE {
                map.push((mapping.gpa, mapping.len, USABLE));
            }
            if end <= FOUR_GIB {
                low_end = low_end.max(end);
            }
            regions.extend(GuestRegionMmap::new(region, GuestAddress(mapping.gpa)));
        }
        let view = GuestMemoryMmap::from_regions(regions).map_err(|error| host(std::io::Error::other(error)))?;
        Ok(Ram { low_end, map, view, _blocks: blocks })
    }

    /// Whether `what` fits between 1 MiB and the end of the RAM below 4 GiB.
    pub(super) fn check(
        &self,
        what: &'static str,
        start: u64,
        end: Option<u64>,
    ) -> std::result::Result<u64, BootError> {
        let (ram_start, ram_end) = (CAN_BE_HERE, self.low_end);
        match end {
            Some(end) if start >= ram_start && start <= end && end <= ram_end => Ok(end),
            _ => Err(BootError::NoRoom { what, start, end: end.unwrap_or(u64::MAX), ram_start, ram_end }),
        }
    }
}
