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
//! ACPI tables (`acpi`), as under QEMU's `-M microvm`. One whose command line says `acpi=off` has a table of the
//! multiprocessor specification (`mp_table`), and `virtio_mmio.device=` added to its command line, as under `-M
//! microvm,acpi=off`.
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
mod kernel;
mod mp_table;
mod ram;

use std::ops::Range;

use crate::error::Result;
use crate::memory::GuestMemory;
pub(crate) use entry::Entry;
pub use error::BootError;
pub(crate) use firmware::add_items;
pub use kernel::Kernel;
use kernel::{Format, format, with_acpi};
use qevm_microvm::virtio::VirtioDevice;
use ram::{ACPI_TABLES, COMMAND_LINE, COMMAND_LINE_MAX, MP_POINTER, MP_TABLE, Ram};

/// Loads the kernel into the RAM of a machine that has not run, with everything it is given, and says how to enter it.
///
/// # Errors
/// [`Error::Boot`](crate::Error::Boot).
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

#[cfg(test)]
mod tests;
