//! An ELF kernel, entered by the PVH protocol.

use super::kernel::{Kernel, with_acpi};
use super::ram::{ACPI_TABLES, CAN_BE_HERE, COMMAND_LINE, Ram};
use super::{BootError, Entry, initrd};
use crate::error::Result;
use crate::memory::GuestMemory;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability, start_info as xen};
use std::io::Cursor;
use vm_memory::ByteValued;

const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x6080;
/// The version with a memory map.
const START_INFO_VERSION: u32 = 1;

pub(super) fn load(memory: &GuestMemory, ram: &Ram, kernel: &Kernel) -> Result<Entry> {
    let segments = segments(&kernel.image, ram)?;
    let start = segments.iter().map(|segment| segment.start).min().unwrap_or_default();
    let end = segments.iter().map(|segment| segment.end).max().unwrap_or_default();
    // The loader leaves alone what is not in the file, and RAM may hold what an earlier kernel left there.
    for segment in &segments {
        clear(memory, segment.file_end, segment.end)?;
    }
    let loaded = Elf::load(&ram.view, None, &mut Cursor::new(&kernel.image), None).map_err(BootError::Loader)?;
    for segment in &segments {
        memory.mark_dirty(segment.start, segment.file_end - segment.start)?;
    }
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvhEntry.into());
    };
    if !(start..end).contains(&entry.0) {
        let (ram_start, ram_end) = (start, end);
        return Err(BootError::NoRoom {
            what: "the entry point",
            start: entry.0,
            end: entry.0 + 1,
            ram_start,
            ram_end,
        }
        .into());
    }
    let initrd = initrd::load(memory, &kernel.initrd, end, ram.low_end)?;
    let map: Vec<u8> = ram.map.iter().flat_map(|(addr, size, kind)| memory_map_entry(*addr, *size, *kind)).collect();
    memory.write(MEMORY_MAP, &map)?;
    if let Some((paddr, size)) = initrd {
        memory.write(MODULES, xen::hvm_modlist_entry { paddr, size, ..Default::default() }.as_slice())?;
    }
    let info = xen::hvm_start_info {
        magic: xen::XEN_HVM_START_MAGIC_VALUE,
        version: START_INFO_VERSION,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: if with_acpi(kernel) { ACPI_TABLES } else { 0 },
        memmap_paddr: MEMORY_MAP,
        memmap_entries: ram.map.len() as u32,
        ..Default::default()
    };
    memory.write(START_INFO, info.as_slice())?;
    Ok(Entry::Pvh { entry: entry.0 as u32, start_info: START_INFO as u32 })
}

fn memory_map_entry(addr: u64, size: u64, kind: u32) -> Vec<u8> {
    xen::hvm_memmap_table_entry { addr, size, type_: kind, reserved: 0 }.as_slice().to_vec()
}

// Offsets and values of the ELF-64 object file format, version 1.5.
const CLASS: usize = 4;
const CLASS_64: u8 = 2;
const PHOFF: usize = 32;
const PHENTSIZE: usize = 54;
const PHNUM: usize = 56;
const PROGRAM_HEADER: usize = 56;
const PT_LOAD: u32 = 1;

/// A piece of the loaded kernel: addresses of its first byte and of those after the last from the file and the last of
/// all.
struct Segment {
    start: u64,
    file_end: u64,
    end: u64,
}

fn clear(memory: &GuestMemory, start: u64, end: u64) -> Result<()> {
    static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
    for at in (start..end).step_by(ZEROES.len()) {
        memory.write(at, &ZEROES[..(end - at).min(ZEROES.len() as u64) as usize])?;
    }
    Ok(())
}

/// Where the kernel goes, one segment at least. The loader does not say where a kernel has no room, nor does it know
/// what must not be overwritten; so this is found out before it writes anything.
fn segments(image: &[u8], ram: &Ram) -> std::result::Result<Vec<Segment>, BootError> {
    let header =
        |offset: usize, what, found: u64, wanted| BootError::Header { offset: offset as u64, what, found, wanted };
    let bytes = |at: usize, what| {
        image.get(at..).and_then(|rest| rest.first_chunk::<8>()).ok_or(header(
            at,
            what,
            image.len() as u64,
            "a longer file (this is its length)",
        ))
    };
    let u64_at = |at, what| bytes(at, what).map(|bytes| u64::from_le_bytes(*bytes));
    let u16_at = |at, what| bytes(at, what).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    let class = bytes(0, "the length of the ELF header")?[CLASS];
    if class != CLASS_64 {
        return Err(header(CLASS, "the ELF class", class.into(), "2, 64 bits"));
    }
    let (offset, size) = (u64_at(PHOFF, "e_phoff")?, u16_at(PHENTSIZE, "e_phentsize")?);
    if usize::from(size) != PROGRAM_HEADER {
        return Err(header(PHENTSIZE, "the size of a program header", size.into(), "56"));
    }
    let mut segments = Vec::new();
    for index in 0..usize::from(u16_at(PHNUM, "e_phnum")?) {
        let bad =
            || header(PHOFF, "the offset of the program headers", offset, "one that leaves room for them in the file");
        let at = usize::try_from(offset).ok().and_then(|at| at.checked_add(index * PROGRAM_HEADER)).ok_or_else(bad)?;
        let end = at.checked_add(PROGRAM_HEADER).filter(|end| *end <= image.len()).ok_or_else(bad)?;
        let field = |field: usize| {
            let (words, _) = image[at..end].as_chunks::<8>();
            u64::from_le_bytes(words[field])
        };
        if field(0) as u32 != PT_LOAD {
            continue;
        }
        let (from, start, in_file, in_memory) = (field(1), field(3), field(4), field(5));
        if from.checked_add(in_file).is_none_or(|end| end > image.len() as u64) {
            return Err(header(
                at,
                "the end of a segment in the file",
                from.saturating_add(in_file),
                "at most the file's length",
            ));
        }
        if in_file > in_memory {
            return Err(header(at, "a segment's length in the file", in_file, "at most its length in memory"));
        }
        if in_memory == 0 {
            continue;
        }
        let end = ram.check("a segment of the kernel", start, start.checked_add(in_memory))?;
        segments.push(Segment { start, file_end: start + in_file, end });
    }
    if segments.is_empty() {
        return Err(header(PHNUM, "the number of segments to load", 0, "at least one"));
    }
    Ok(segments)
}

// What is written below must not be where a kernel can be.
const _: () = assert!(MEMORY_MAP + 24 * 8 < CAN_BE_HERE);
