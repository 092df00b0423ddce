//! A bzImage, entered by Linux's 64-bit boot protocol.

use super::kernel::{Kernel, with_acpi};
use super::ram::{ACPI_TABLES, COMMAND_LINE, Ram};
use super::{BootError, Entry, initrd};
use crate::error::Result;
use crate::memory::{GuestMemory, PAGE_SIZE};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::bzimage::BzImage;
use std::io::Cursor;
use vm_memory::ByteValued;

const ZERO_PAGE: u64 = 0x7000;
/// Of the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// The first version of the protocol that says whether there is a 64-bit entry.
const VERSION_MIN: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1 << 0;
/// `type_of_loader` of one that has no number.
const LOADER_UNDEFINED: u8 = 0xff;
const VERSION_AT: u64 = 0x206;
const XLOADFLAGS_AT: u64 = 0x236;
/// Of the header, from 0x1f1 on, as version 2.15 has it.
const HEADER_END: usize = 0x26c;

/// `command_line` is its length.
pub(super) fn load(memory: &GuestMemory, ram: &Ram, kernel: &Kernel, command_line: usize) -> Result<Entry> {
    let found = kernel.image.len() as u64;
    if kernel.image.len() < HEADER_END {
        let wanted = "at least 0x26c, the end of the setup header";
        return Err(BootError::Header { offset: found, what: "the length of the file", found, wanted }.into());
    }
    let field = |at: usize| u16::from_le_bytes([kernel.image[at], kernel.image[at + 1]]);
    let (version, flags) = (field(VERSION_AT as usize), field(XLOADFLAGS_AT as usize));
    if version < VERSION_MIN {
        let wanted = "at least 0x20c, with a 64-bit entry point";
        let (offset, found) = (VERSION_AT, version.into());
        return Err(BootError::Header { offset, what: "the version of the boot protocol", found, wanted }.into());
    }
    if flags & XLF_KERNEL_64 == 0 {
        let wanted = "bit 0, a 64-bit entry point";
        return Err(BootError::Header { offset: XLOADFLAGS_AT, what: "xloadflags", found: flags.into(), wanted }.into());
    }
    let code_32 = u32::from_le_bytes(*kernel.image[0x214..].first_chunk().expect("the header is longer"));
    let sectors = match u64::from(kernel.image[0x1f1]) {
        0 => 4,
        sectors => sectors,
    };
    let Some(size) = found.checked_sub((sectors + 1) * 512).filter(|size| *size > ENTRY_64) else {
        let (wanted, found) = ("fewer, so that a kernel follows them in the file", sectors);
        return Err(BootError::Header { offset: 0x1f1, what: "the number of setup sectors", found, wanted }.into());
    };
    let start = u64::from(code_32);
    ram.check("the kernel", start, start.checked_add(size))?;
    let loaded = BzImage::load(&ram.view, None, &mut Cursor::new(&kernel.image), None).map_err(BootError::Loader)?;
    // The loader writes past the record of what is dirty.
    memory.mark_dirty(start, size)?;
    let mut header = loaded.setup_header.unwrap_or_default();

    // It unpacks itself to the address it prefers, or to where it was loaded if that is higher.
    let runs_at = start.max(header.pref_address);
    let init_size = u64::from(header.init_size).max(size);
    let end = ram.check("the kernel as it runs", runs_at, runs_at.checked_add(init_size))?;
    let most = header.cmdline_size as usize;
    if command_line > most {
        return Err(BootError::CommandLineLength { found: command_line, most }.into());
    }
    let limit = ram.low_end.min(u64::from(header.initrd_addr_max) + 1);
    let initrd = initrd::load(memory, &kernel.initrd, end.next_multiple_of(PAGE_SIZE), limit)?;
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = COMMAND_LINE as u32;
    if let Some((address, size)) = initrd {
        // Both are below 4 GiB.
        (header.ramdisk_image, header.ramdisk_size) = (address as u32, size as u32);
    }
    let mut zero_page = boot_params { hdr: header, e820_entries: ram.map.len() as u8, ..boot_params::default() };
    zero_page.acpi_rsdp_addr = if with_acpi(kernel) { ACPI_TABLES } else { 0 };
    for (into, (addr, size, kind)) in zero_page.e820_table.iter_mut().zip(&ram.map) {
        *into = boot_e820_entry { addr: *addr, size: *size, r#type: *kind };
    }
    memory.write(ZERO_PAGE, zero_page.as_slice())?;
    Entry::long_mode(memory, start + ENTRY_64, ZERO_PAGE)
}
