//! Why a kernel cannot be booted.

use linux_loader::loader;

/// What is wrong with a kernel, its initial RAM disk or its command line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// Neither format that is known.
    #[error(
        "the kernel is of no known format: found {at_0:02x?} at offset 0 and {at_0x202:02x?} at offset 0x202, wanted \
         [7f, 45, 4c, 46] (an ELF file) or [48, 64, 72, 53] (a bzImage)"
    )]
    UnknownFormat {
        /// The first four bytes, or fewer.
        at_0: Vec<u8>,
        /// Four bytes at offset 0x202, or fewer.
        at_0x202: Vec<u8>,
    },
    /// The file contradicts itself or ends too early.
    #[error("the kernel, at offset {offset:#x} of its file: {what} is {found:#x}, wanted {wanted}")]
    Header {
        /// Where in the file.
        offset: u64,
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
        /// What it can be.
        wanted: &'static str,
    },
    /// An ELF file that does not say where it is to be entered.
    #[error(
        "the kernel is an ELF file without the note that PVH needs (owner \"Xen\", type 18, PHYS32_ENTRY): build it with \
         CONFIG_PVH, or boot its bzImage"
    )]
    NoPvhEntry,
    /// The loader refused.
    #[error("the kernel cannot be loaded: {0}")]
    Loader(#[source] loader::Error),
    /// Something has no room in RAM.
    #[error(
        "{what} would be at {start:#x} to {end:#x}, and the RAM for it is from {ram_start:#x} to {ram_end:#x}; more RAM \
         (--memory) moves the end"
    )]
    NoRoom {
        /// What.
        what: &'static str,
        /// Its first byte.
        start: u64,
        /// The byte after it.
        end: u64,
        /// The first byte it may have.
        ram_start: u64,
        /// The byte after the last it may have.
        ram_end: u64,
    },
    /// The initial RAM disk and the kernel do not fit beside each other.
    #[error(
        "the initial RAM disk of {size} bytes does not fit between the end of the kernel at {kernel_end:#x} and \
         {limit:#x}, up to which this kernel and the RAM let it be"
    )]
    InitrdNoRoom {
        /// Bytes.
        size: u64,
        /// The first byte after the kernel as it runs.
        kernel_end: u64,
        /// The byte after the last that the RAM disk may have.
        limit: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error(
        "the kernel's command line has {found} bytes with what the monitor adds, and this kernel takes at most {most}"
    )]
    CommandLineLength {
        /// Bytes.
        found: usize,
        /// The most it can be.
        most: usize,
    },
    /// A byte that ends the command line early.
    #[error("the kernel's command line has a zero byte at offset {0}")]
    CommandLineZero(usize),
}
