//! A kernel, and what it is given.

use super::BootError;

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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Elf,
    BzImage,
}

pub(super) fn format(image: &[u8]) -> std::result::Result<Format, BootError> {
    let bytes = |at: usize| image.get(at..).unwrap_or_default().iter().take(4).copied().collect::<Vec<u8>>();
    match (bytes(0), bytes(0x202)) {
        (elf, _) if elf == b"\x7fELF" => Ok(Format::Elf),
        (_, linux) if linux == b"HdrS" => Ok(Format::BzImage),
        (at_0, at_0x202) => Err(BootError::UnknownFormat { at_0, at_0x202 }),
    }
}

/// Whether the kernel will look at ACPI tables.
pub(super) fn with_acpi(kernel: &Kernel) -> bool {
    !kernel.command_line.split_ascii_whitespace().any(|word| word == "acpi=off")
}
