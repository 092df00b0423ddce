//! One RAM block.

use super::backend::{Backing, MemoryBackend};
use super::host::{HostMemory, PAGE_SIZE, Wanted};
use crate::error::{Error, Result};
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};

/// Guest memory with a name.
///
/// The guest, the monitor and a migration use it at the same time, so nothing here hands out a plain reference: bytes
/// are copied, or reached through a [`VolatileSlice`]. The monitor's own writes are recorded and turn up in the [dirty
/// log](crate::dirty_log) beside the guest's.
///
/// ```
/// use reference_vmm::memory::RamBlock;
/// let block = RamBlock::new("microvm.ram", 8192, 8192).unwrap();
/// block.write(4096, b"QEVM").unwrap();
/// assert!(block.page_is_zero(0).unwrap());
/// assert!(!block.page_is_zero(1).unwrap());
/// ```
#[derive(Debug)]
pub struct RamBlock {
    name: String,
    used: AtomicU64,
    max: u64,
    /// The memory behind `host`.
    region: MmapRegion<AtomicBitmap>,
    host: HostMemory,
    /// The memory had not been written to when the block was made of it.
    fresh: bool,
    on_disk: bool,
    shared_file: bool,
    host_page_size: u64,
    /// The file without a name that it is, shared: a successor can have it.
    passable: Option<File>,
}

impl RamBlock {
    /// A zeroed block of `used` bytes that may grow to `max`.
    ///
    /// # Errors
    /// [`Error::Config`] for lengths that are not whole pages or a used length beyond the maximum, [`Error::Host`] when
    /// the host has no memory.
    pub fn new(name: &str, used: u64, max: u64) -> Result<RamBlock> {
        let pages = used.is_multiple_of(PAGE_SIZE) && max.is_multiple_of(PAGE_SIZE);
        if !pages || used > max || max == 0 {
            return Err(Error::Config(format!("RAM block '{name}' cannot have a length of {used} of {max} bytes")));
        }
        let len = usize::try_from(max).map_err(|_| Error::Config(format!("RAM block '{name}' is too large")))?;
        let host =
            HostMemory::new(len, Wanted::ANONYMOUS).map_err(|cause| Error::Host { what: "map guest RAM", cause })?;
        RamBlock::at(name.to_owned(), host, used, len, true, PAGE_SIZE)
    }

    /// The same, of a file that can be passed to a successor, or was by a predecessor and is not `fresh`.
    ///
    /// # Errors
    /// [`Error::Config`] for lengths that are not whole pages, [`Error::Host`] when the host has no memory.
    pub(super) fn of_file(name: &str, used: u64, file: File, fresh: bool) -> Result<RamBlock> {
        let max = file.metadata().map_err(|cause| Error::Host { what: "measure guest RAM", cause })?.len();
        if !used.is_multiple_of(PAGE_SIZE) || !max.is_multiple_of(PAGE_SIZE) || used > max || max == 0 {
            return Err(Error::Config(format!("RAM block '{name}' cannot have a length of {used} of {max} bytes")));
        }
        let wanted = Wanted { file: Some((&file, 0)), share: true, ..Wanted::ANONYMOUS };
        let host =
            HostMemory::new(max as usize, wanted).map_err(|cause| Error::Host { what: "map guest RAM", cause })?;
        let block = RamBlock::at(name.to_owned(), host, used, max as usize, fresh, PAGE_SIZE)?;
        Ok(RamBlock { passable: Some(file), ..block })
    }

    /// The block that a memory backend is.
    ///
    /// # Errors
    /// [`Error::MemoryBackend`].
    pub fn of(backend: &MemoryBackend) -> Result<RamBlock> {
        RamBlock::taken(backend, None)
    }

    /// The same, of a predecessor's file if there is one.
    pub(super) fn taken(backend: &MemoryBackend, passed: Option<File>) -> Result<RamBlock> {
        let backing = backend.make(passed)?;
        let len = backend.len();
        let Backing { memory, fresh, page_size, on_disk, shared_file, passable } = backing;
        let block = RamBlock::at(backend.block_name(), memory, len, len as usize, fresh, page_size)?;
        Ok(RamBlock { on_disk, shared_file, passable, ..block })
    }

    fn at(name: String, host: HostMemory, used: u64, len: usize, fresh: bool, host_page_size: u64) -> Result<RamBlock> {
        let map = |cause| Error::Host { what: "map guest RAM", cause };
        let page = NonZeroUsize::new(PAGE_SIZE as usize).expect("a page has bytes");
        let region = MmapRegionBuilder::new_with_bitmap(len, AtomicBitmap::new(len, page))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: `host` is a mapping of that length for reading and writing, which lives as long as the region beside
        // it.
        let region = unsafe { region.with_raw_mmap_pointer(host.start()) };
        let region = region.build().map_err(|error| map(io::Error::other(error)))?;
        Ok(RamBlock {
            name,
            used: AtomicU64::new(used),
            max: len as u64,
            region,
            host,
            fresh,
            on_disk: false,
            shared_file: false,
            host_page_size,
            passable: None,
        })
    }

    /// The name on the wire.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes in use: QEMU's `used_length`.
    pub fn used_length(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Bytes it may grow to: QEMU's `max_length`.
    pub fn max_length(&self) -> u64 {
        self.max
    }

    /// Whether it is a file that has a name, mapped shared: another machine with that file has the same memory.
    pub fn is_shared_file(&self) -> bool {
        self.shared_file
    }

    /// The file without a name that it is, if another process that has that has the same memory.
    pub fn passable(&self) -> Option<&File> {
        self.passable.as_ref()
    }

    /// Whether the memory was all zero when the block was made, other than that of a file that others have written.
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Whether it is a file of a file system that is not in memory: userfaultfd serves none of its pages.
    pub fn is_on_disk(&self) -> bool {
        self.on_disk
    }

    /// Bytes of the pages in which the host backs it: more than [`PAGE_SIZE`] for huge pages that were asked for.
    pub fn host_page_size(&self) -> u64 {
        self.host_page_size
    }

    /// Pages in use.
    pub fn pages(&self) -> u64 {
        self.used_length() / PAGE_SIZE
    }

    /// Takes over the length that the source of a migration uses.
    ///
    /// # Errors
    /// [`Error::State`] when the block cannot have this length.
    pub fn resize(&self, used: u64) -> Result<()> {
        if used > self.max || !used.is_multiple_of(PAGE_SIZE) || (used != self.max && self.fixed()) {
            return Err(Error::State(format!(
                "RAM block '{}' has {} bytes and cannot have {used}",
                self.name,
                self.used_length()
            )));
        }
        self.used.store(used, Ordering::Relaxed);
        Ok(())
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.slice(offset, into.len() as u64)?.read_slice(into, 0).map_err(|_| self.outside(offset, into.len() as u64))
    }

    /// Copies bytes in and marks the pages dirty.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.slice(offset, from.len() as u64)?.write_slice(from, 0).map_err(|_| self.outside(offset, from.len() as u64))
    }

    /// A window on the block for vectored I/O. Writes through it mark the pages dirty.
    ///
    /// The window's own methods move bytes from and to files and sockets without a copy (`vm_memory::ReadVolatile` and
    /// `WriteVolatile`).
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn slice(&self, offset: u64, len: u64) -> Result<VolatileSlice<'_, BS<'_, AtomicBitmap>>> {
        let end = offset.checked_add(len).ok_or_else(|| self.outside(offset, len))?;
        if end > self.used_length() {
            return Err(self.outside(offset, len));
        }
        self.region.get_slice(offset as usize, len as usize).map_err(|_| self.outside(offset, len))
    }

    /// Whether all bytes of a page are zero.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a page beyond the end.
    pub fn page_is_zero(&self, page: u64) -> Result<bool> {
        let mut bytes = [0; PAGE_SIZE as usize];
        let offset = page.checked_mul(PAGE_SIZE).ok_or_else(|| self.outside(page, PAGE_SIZE))?;
        self.read(offset, &mut bytes)?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().all(|word| u64::from_ne_bytes(*word) == 0))
    }

    /// Makes the host back all of the block now, rather than page by page when it is first written to.
    ///
    /// # Errors
    /// [`Error::Host`] when the host has not enough memory.
    pub fn populate(&self) -> Result<()> {
        self.host.populate().map_err(|cause| Error::Host { what: "preallocate guest RAM", cause })
    }

    /// Empties these bytes of the block, whole pages of the host's: it gives zeroed memory when they are touched.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Host`], and [`Error::Config`] for a private copy of a file.
    pub fn discard(&self, bytes: Range<u64>) -> Result<()> {
        if self.host.is_copy() {
            let why = format!(
                "RAM block '{}' is a private copy of a file, whose pages show through: use share=on",
                self.name
            );
            return Err(Error::Config(why));
        }
        self.release(bytes)
    }

    /// Gives these bytes of the block back to the host, whole pages of the host's, whose contents are not needed
    /// hold.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] and [`Error::Host`].
    pub fn release(&self, bytes: Range<u64>) -> Result<()> {
        if bytes.start > bytes.end || bytes.end > self.max {
            return Err(self.outside(bytes.start, bytes.end.saturating_sub(bytes.start)));
        }
        self.host
            .discard(bytes.start as usize..bytes.end as usize)
            .map_err(|cause| Error::Host { what: "empty guest RAM", cause })
    }

    /// Where the block lies in this process: `max_length` bytes that stay mapped as long as the block lives.
    pub fn host_address(&self) -> *mut u8 {
        self.region.as_ptr()
    }

    /// Pages written by the monitor itself since the last call, 64 to a word.
    pub(crate) fn take_vmm_writes(&self) -> Vec<u64> {
        self.region.bitmap().get_and_reset()
    }

    fn fixed(&self) -> bool {
        !self.name.starts_with("/rom@")
    }

    fn outside(&self, address: u64, len: u64) -> Error {
        Error::OutOfRange { what: format!("RAM block '{}'", self.name), address, len }
    }
}
