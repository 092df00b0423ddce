//! RAM blocks and addresses of QEMU's `-M microvm`, read from `info ramblock` and `info mtree -f` of 11.1.3.

use super::block::RamBlock;
use super::error::BackendError;
use super::files::Files;
use super::host::PAGE_SIZE;
use crate::error::{Error, Result};

/// Name of the block with the machine's RAM, where no memory backend gives it another.
pub const RAM: &str = "microvm.ram";
/// Name of the block with the firmware.
pub const BIOS: &str = "pc.bios";
/// Name of the block behind fw_cfg's `etc/acpi/tables`.
pub const ACPI_TABLES: &str = "/rom@etc/acpi/tables";
/// Name of the block behind fw_cfg's `etc/table-loader`.
pub const TABLE_LOADER: &str = "/rom@etc/table-loader";
/// Name of the block behind fw_cfg's `etc/acpi/rsdp`.
pub const ACPI_RSDP: &str = "/rom@etc/acpi/rsdp";

/// RAM beyond this goes to 4 GiB.
pub const LOW_RAM_MAX: u64 = 3 << 30;
/// Largest firmware: what fits between the MMIO of the local APICs and 4 GiB.
pub const MAX_BIOS: usize = 16 << 20;

const FOUR_GIB: u64 = 1 << 32;
const ONE_MIB: u64 = 1 << 20;
/// The firmware seen below 1 MiB is at most this long.
const MAX_LOW_BIOS: u64 = 128 << 10;
const BIOS_ALIGN: usize = 64 << 10;
/// More RAM than this cannot be addressed by the guests of today.
const MAX_RAM: u64 = 1 << 40;

/// A piece of a block as the guest sees it. All values are bytes and page-aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Guest-physical address.
    pub gpa: u64,
    /// Index of the block in [`GuestMemory::blocks`](super::GuestMemory::blocks).
    pub block: usize,
    /// Where in the block the piece starts.
    pub offset: u64,
    /// Length of the piece.
    pub len: u64,
}

/// Whether a microvm can have so much RAM, and this firmware.
pub(super) fn check(ram: u64, bios: &[u8]) -> Result<()> {
    if !(2 * ONE_MIB..=MAX_RAM).contains(&ram) || !ram.is_multiple_of(PAGE_SIZE) {
        return Err(Error::Config(format!(
            "the machine cannot have {ram} bytes of RAM: wanted whole pages of 4096 bytes, from 2 MiB to 1 TiB"
        )));
    }
    if bios.is_empty() || bios.len() > MAX_BIOS || !bios.len().is_multiple_of(BIOS_ALIGN) {
        return Err(Error::Config(format!(
            "the firmware has {} bytes: wanted a multiple of 64 KiB, at most 16 MiB",
            bios.len()
        )));
    }
    Ok(())
}

/// The blocks of a microvm with this one as RAM, in the order of the stream, and where the guest sees them.
pub(super) fn microvm(block: RamBlock, bios: &[u8], files: &mut Files) -> Result<(Vec<RamBlock>, Vec<Mapping>)> {
    let ram = block.used_length();
    let bios_len = bios.len() as u64;
    let blocks = vec![
        block,
        // The tables are not mapped: the guest gets them through fw_cfg.
        files.block(ACPI_TABLES, PAGE_SIZE, 2 << 20)?,
        files.block(BIOS, bios_len, bios_len)?,
        files.block(TABLE_LOADER, PAGE_SIZE, 64 << 10)?,
        files.block(ACPI_RSDP, PAGE_SIZE, PAGE_SIZE)?,
    ];
    let ram_name = blocks[0].name();
    if blocks[1..].iter().any(|other| other.name() == ram_name) {
        return Err(BackendError::Name(ram_name.to_owned()).into());
    }
    let low_bios = bios_len.min(MAX_LOW_BIOS);
    let mut mappings = vec![
        Mapping { gpa: 0, block: 0, offset: 0, len: ONE_MIB - low_bios },
        Mapping { gpa: ONE_MIB - low_bios, block: 2, offset: bios_len - low_bios, len: low_bios },
        Mapping { gpa: ONE_MIB, block: 0, offset: ONE_MIB, len: ram.min(LOW_RAM_MAX) - ONE_MIB },
        Mapping { gpa: FOUR_GIB - bios_len, block: 2, offset: 0, len: bios_len },
    ];
    if ram > LOW_RAM_MAX {
        mappings.push(Mapping { gpa: FOUR_GIB, block: 0, offset: LOW_RAM_MAX, len: ram - LOW_RAM_MAX });
    }
    if !files.are_used() {
        blocks[2].write(0, bios)?;
        blocks[2].take_vmm_writes();
    }
    Ok((blocks, mappings))
}
