//! A kernel that the firmware boots: where it finds the parts in fw_cfg (QEMU document "QEMU Firmware Configuration
//! (fw_cfg) Device"; the setup header's fields are those of "The Linux/x86 Boot Protocol").

use super::BootError;
use super::kernel::{Format, Kernel, format};
use super::ram::{COMMAND_LINE_MAX, FOUR_GIB, USABLE};
use crate::error::Result;
use crate::memory::{LOW_RAM_MAX, PAGE_SIZE};
use std::collections::BTreeMap;

const KERNEL_ADDRESS: u16 = 0x07;
const KERNEL_SIZE: u16 = 0x08;
const INITRD_ADDRESS: u16 = 0x0a;
const INITRD_SIZE: u16 = 0x0b;
const KERNEL_DATA: u16 = 0x11;
const INITRD_DATA: u16 = 0x12;
const COMMAND_LINE_ADDRESS: u16 = 0x13;
const COMMAND_LINE_SIZE: u16 = 0x14;
const COMMAND_LINE_DATA: u16 = 0x15;
const SETUP_ADDRESS: u16 = 0x16;
const SETUP_SIZE: u16 = 0x17;
const SETUP_DATA: u16 = 0x18;
/// The file with the memory map.
const E820: &str = "etc/e820";

const SETUP_AT: u32 = 0x1_0000;
const COMMAND_LINE_AT: u32 = 0x2_0000;
const KERNEL_AT: u32 = 0x10_0000;
/// Left free at the end of RAM, where firmware puts tables.
const TABLES: u64 = 128 << 10;
const HEADER_END: usize = 0x26c;
const CAN_USE_HEAP: u8 = 0x80;
/// `type_of_loader` of QEMU.
const LOADER_QEMU: u8 = 0xb0;
/// The highest address of a RAM disk for protocols before 2.03.
const OLD_INITRD_MAX: u32 = 0x37ff_ffff;

/// Adds the memory map and the kernel, if there is one that the firmware is to boot.
///
/// # Errors
/// [`BootError`], for a kernel that is no bzImage as well.
pub(crate) fn add_items(
    items: &mut BTreeMap<u16, Vec<u8>>,
    files: &mut BTreeMap<String, Vec<u8>>,
    ram: u64,
    kernel: Option<&Kernel>,
) -> Result<()> {
    files.entry(E820.to_owned()).or_insert_with(|| memory_map(ram));
    let Some(kernel) = kernel.filter(|kernel| kernel.by_firmware) else { return Ok(()) };
    if format(&kernel.image)? != Format::BzImage {
        let wanted = "\"HdrS\": firmware boots a bzImage only";
        return Err(BootError::Header { offset: 0x202, what: "the magic", found: 0, wanted }.into());
    }
    let found = kernel.image.len() as u64;
    let sectors = kernel.image[0x1f1];
    let setup_len = (usize::from(if sectors == 0 { 4 } else { sectors }) + 1) * 512;
    if kernel.image.len() <= setup_len.max(HEADER_END) {
        let wanted = "more than the setup sectors have";
        return Err(BootError::Header { offset: found, what: "the length of the file", found, wanted }.into());
    }
    let (setup, rest) = kernel.image.split_at(setup_len);
    let mut setup = setup.to_vec();
    let version = u16::from_le_bytes([setup[0x206], setup[0x207]]);
    let mut put = |at: usize, value: u32| setup[at..at + 4].copy_from_slice(&value.to_le_bytes());
    let mut text = kernel.command_line.clone().into_bytes();
    if let Some(zero) = text.iter().position(|byte| *byte == 0) {
        return Err(BootError::CommandLineZero(zero).into());
    }
    if text.len() >= COMMAND_LINE_MAX {
        return Err(BootError::CommandLineLength { found: text.len(), most: COMMAND_LINE_MAX - 1 }.into());
    }
    text.push(0);
    put(0x228, COMMAND_LINE_AT);
    let initrd_max = match version {
        0x203.. => u32::from_le_bytes(*kernel.image[0x22c..].first_chunk().expect("the header is longer")),
        _ => OLD_INITRD_MAX,
    };
    let kernel_end = u64::from(KERNEL_AT) + rest.len() as u64;
    let limit = ram.min(LOW_RAM_MAX).saturating_sub(TABLES).min(u64::from(initrd_max) + 1);
    let size = kernel.initrd.len() as u64;
    let at = limit.checked_sub(size).map(|at| at & !(PAGE_SIZE - 1)).filter(|at| *at >= kernel_end);
    let initrd_at = at.ok_or(BootError::InitrdNoRoom { size, kernel_end, limit })? as u32;
    if size > 0 {
        put(0x218, initrd_at);
        put(0x21c, size as u32);
        items.insert(INITRD_ADDRESS, initrd_at.to_le_bytes().to_vec());
        items.insert(INITRD_SIZE, (size as u32).to_le_bytes().to_vec());
        items.insert(INITRD_DATA, kernel.initrd.clone());
    }
    setup[0x210] = LOADER_QEMU;
    setup[0x211] |= CAN_USE_HEAP;
    // Up to the command line, counted as the protocol has it.
    let heap_end = (COMMAND_LINE_AT - SETUP_AT - 0x200) as u16;
    setup[0x224..0x226].copy_from_slice(&heap_end.to_le_bytes());
    let mut number = |key, value: u32| items.insert(key, value.to_le_bytes().to_vec());
    number(KERNEL_ADDRESS, KERNEL_AT);
    number(KERNEL_SIZE, rest.len() as u32);
    number(COMMAND_LINE_ADDRESS, COMMAND_LINE_AT);
    number(COMMAND_LINE_SIZE, text.len() as u32);
    number(SETUP_ADDRESS, SETUP_AT);
    number(SETUP_SIZE, setup.len() as u32);
    items.insert(KERNEL_DATA, rest.to_vec());
    items.insert(COMMAND_LINE_DATA, text);
    items.insert(SETUP_DATA, setup);
    Ok(())
}

/// Little-endian u64 address, u64 length, u32 kind: RAM, as QEMU's microvm lists it.
fn memory_map(ram: u64) -> Vec<u8> {
    let entry =
        |at: u64, len: u64, kind: u32| [&at.to_le_bytes()[..], &len.to_le_bytes(), &kind.to_le_bytes()].concat();
    let mut map = entry(0, ram.min(LOW_RAM_MAX), USABLE);
    if ram > LOW_RAM_MAX {
        map.extend(entry(FOUR_GIB, ram - LOW_RAM_MAX, USABLE));
    }
    map
}
