//! Starting a Linux kernel without firmware.
//!
//! Two protocols, chosen by what the kernel's file is:
//!
//! | file | protocol | state at entry |
//! |---|---|---|
//! | ELF with the note PHYS32_ENTRY | PVH (Xen's document "x86/HVM direct boot ABI") | 32 bits, no paging, EBX = `hvm_start_info` |
//! | bzImage, protocol 2.12 or newer | Linux's 64-bit boot protocol ("The Linux/x86 Boot Protocol") | long mode, 4 GiB mapped one to one, RSI = zero page |
//!
//! The kernel finds the processors, both IOAPICs, the serial port, the virtio-mmio transports and how to switch off by
//! ACPI tables (`acpi`), as under QEMU's `-M microvm`. One whose command line says `acpi=off` has a table of the multiprocessor
//! specification (`mp_table`), and `virtio_mmio.device=` added to its command line, as under `-M microvm,acpi=off`.
//!
//! What lies where below 1 MiB:
//!
//! | address | what |
//! |---|---|
//! | 0x500 | segment descriptors |
//! | 0x6000 | `hvm_start_info`, list of modules, memory map |
//! | 0x7000 | zero page |
//! | 0x9000 to 0xf000 | page tables |
//! | 0x20000 | command line |
//! | 0x90000 | ACPI tables |
//! | 0x9fc00 | multiprocessor table |

mod acpi;
mod bzimage;
mod elf;
mod entry;
mod error;
mod firmware;
mod initrd;
mod mp_table;

use std::ops::Range;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::devices::pci::ECAM;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, RamBlock};
pub(crate) use entry::Entry;
pub use error::BootError;
pub(crate) use firmware::add_items;
use qevm_microvm::virtio::VirtioDevice;

/// A kernel and what it is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// The kernel's file.
    pub image: Vec<u8>,
    /// The initial RAM disk; empty if there is none.
    pub initrd: Vec<u8>,
    /// The command line.
    pub command_line: String,
    /// Let the firmware find the kernel in fw_cfg and start it, instead of entering it at once.
    pub by_firmware: bool,
}

const CAN_BE_HERE: u64 = 1 << 20;
const FOUR_GIB: u64 = 1 << 32;
/// The last KiB of conventional memory, where a kernel looks for the pointer to the multiprocessor table.
const MP_POINTER: u64 = 0x9_fc00;
/// The table, which has 20 bytes for each processor.
const MP_TABLE: u64 = 0x9_f000;
const ACPI_TABLES: u64 = 0x9_0000;
const COMMAND_LINE: u64 = 0x2_0000;
const COMMAND_LINE_MAX: usize = 0x1_0000;

/// Loads the kernel into the RAM of a machine that has not run, with everything it is given, and says how to enter it.
///
/// # Errors
/// [`Error::Boot`].
///
/// A machine with a PCI bus tells the bus's window above 4 GiB.
pub(crate) fn load(
    memory: &GuestMemory,
    kernel: &Kernel,
    cpus: usize,
    virtio: &[VirtioDevice],
    high_window: Option<Range<u64>>,
) -> Result<Entry> {
    let ram = Ram::of(memory, high_window.is_some())?;
    let command_line = command_line(kernel, virtio)?;
    memory.write(COMMAND_LINE, &command_line)?;
    if with_acpi(kernel) {
        memory.write(ACPI_TABLES, &acpi::tables(ACPI_TABLES, cpus, virtio.len(), high_window))?;
    }
    memory.write(MP_POINTER, &mp_table::pointer(MP_TABLE as u32))?;
    memory.write(MP_TABLE, &mp_table::table(cpus))?;
    match format(&kernel.image)? {
        Format::Elf => elf::load(memory, &ram, kernel),
        Format::BzImage => bzimage::load(memory, &ram, kernel, command_line.len() - 1),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Elf,
    BzImage,
}

fn format(image: &[u8]) -> std::result::Result<Format, BootError> {
    let bytes = |at: usize| image.get(at..).unwrap_or_default().iter().take(4).copied().collect::<Vec<u8>>();
    match (bytes(0), bytes(0x202)) {
        (elf, _) if elf == b"\x7fELF" => Ok(Format::Elf),
        (_, linux) if linux == b"HdrS" => Ok(Format::BzImage),
        (at_0, at_0x202) => Err(BootError::UnknownFormat { at_0, at_0x202 }),
    }
}

/// Whether the kernel will look at ACPI tables.
fn with_acpi(kernel: &Kernel) -> bool {
    !kernel.command_line.split_ascii_whitespace().any(|word| word == "acpi=off")
}

/// With a zero at the end.
fn command_line(kernel: &Kernel, virtio: &[VirtioDevice]) -> std::result::Result<Vec<u8>, BootError> {
    let told = if with_acpi(kernel) { 0 } else { virtio.len() };
    let transports = (0..told).map(|position| format!(" {}", VirtioDevice::kernel_parameter(position)));
    let text = [kernel.command_line.clone()].into_iter().chain(transports).collect::<String>();
    if let Some(zero) = text.bytes().position(|byte| byte == 0) {
        return Err(BootError::CommandLineZero(zero));
    }
    if text.len() >= COMMAND_LINE_MAX {
        return Err(BootError::CommandLineLength { found: text.len(), most: COMMAND_LINE_MAX - 1 });
    }
    let mut bytes = text.into_bytes();
    bytes.push(0);
    Ok(bytes)
}

/// Kinds of memory in a memory map (ACPI specification 6.5, table 15.374).
const USABLE: u32 = 1;
const RESERVED: u32 = 2;
const ACPI: u32 = 3;

/// The machine's RAM as a kernel sees it.
struct Ram {
    /// Address after the RAM below 4 GiB.
    low_end: u64,
    /// The memory map: address, bytes, kind.
    map: Vec<(u64, u64, u32)>,
    /// For the loader.
    view: GuestMemoryMmap<()>,
    /// What `view` shows.
    _blocks: Vec<Arc<RamBlock>>,
}

impl Ram {
    fn of(memory: &GuestMemory, pci: bool) -> Result<Ram> {
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
    fn check(&self, what: &'static str, start: u64, end: Option<u64>) -> std::result::Result<u64, BootError> {
        let (ram_start, ram_end) = (CAN_BE_HERE, self.low_end);
        match end {
            Some(end) if start >= ram_start && start <= end && end <= ram_end => Ok(end),
            _ => Err(BootError::NoRoom { what, start, end: end.unwrap_or(u64::MAX), ram_start, ram_end }),
        }
    }
}

#[cfg(test)]
mod tests;
