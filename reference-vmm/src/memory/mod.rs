//! Guest RAM: named blocks as in QEMU's stream, and where the guest sees them.
//!
//! A [`RamBlock`] is memory with a name; a [`Mapping`] shows a piece of it at a guest-physical address. One block may
//! be shown in several places: `microvm.ram` is split by the hole below 4 GiB, `pc.bios` appears below 4 GiB and below
//! 1 MiB. Everything that crosses the wire is addressed by block and offset, everything the guest says by
//! guest-physical address.

mod backend;
mod block;
mod error;
mod files;
mod host;
mod layout;
mod missing;
mod protected;
mod shared;
mod slot;

use std::fs::File;
use std::sync::Arc;

pub use backend::{BackendKind, MemoryBackend};
pub use block::RamBlock;
pub use error::BackendError;
pub use files::Files;
pub use host::PAGE_SIZE;
pub use layout::{ACPI_RSDP, ACPI_TABLES, BIOS, LOW_RAM_MAX, MAX_BIOS, Mapping, RAM, TABLE_LOADER};
pub(crate) use missing::Userfault;
pub(crate) use protected::WriteProtection;
pub use shared::SharedPages;
pub(crate) use slot::{set_memory_flags, set_memory_slot};

use crate::error::{Error, Result};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap};

/// All RAM of a machine.
#[derive(Debug)]
pub struct GuestMemory {
    blocks: Vec<Arc<RamBlock>>,
    mappings: Vec<Mapping>,
}

impl GuestMemory {
    /// The RAM of a `microvm` with `ram` bytes and this firmware.
    ///
    /// Blocks and addresses are those of QEMU's microvm (read from `info ramblock` and `info mtree -f` of 11.1.3).
    ///
    /// # Errors
    /// [`Error::Config`] for sizes that microvm cannot have, [`Error::Host`] when the host has no memory.
    pub fn microvm(ram: u64, bios: &[u8]) -> Result<GuestMemory> {
        layout::check(ram, bios)?;
        GuestMemory::with(RamBlock::new(RAM, ram, ram)?, bios, &mut Files::default())
    }

    /// The same, with RAM that this backend is, and of its name.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes that microvm cannot have, [`Error::MemoryBackend`] for what the backend cannot be,
    /// [`Error::Host`] when the host has no memory.
    pub fn of(backend: &MemoryBackend, bios: &[u8]) -> Result<GuestMemory> {
        GuestMemory::of_files(backend.len(), Some(backend), bios, Files::default())
    }

    /// RAM of `ram` bytes that others may have as well, as far as its files say so.
    ///
    /// # Errors
    /// As [`of`](Self::of); [`Error::MemoryBackend`] also for files that a predecessor has not passed, or others.
    pub fn of_files(ram: u64, backend: Option<&MemoryBackend>, bios: &[u8], mut files: Files) -> Result<GuestMemory> {
        layout::check(ram, bios)?;
        let block = match backend {
            Some(backend) => files.backend(backend)?,
            // Without a backend it is private, whatever is said of other RAM.
            None if files.are_used() => return Err(BackendError::Private.into()),
            None => RamBlock::new(RAM, ram, ram)?,
        };
        let memory = GuestMemory::with(block, bios, &mut files)?;
        for name in files.passed.iter().flatten().map(|(name, _)| name) {
            tracing::warn!("the source has passed a descriptor '{name}', which this machine has no use for");
        }
        Ok(memory)
    }

    /// The files that a successor needs, by the names of their blocks; and the names of blocks that it cannot have.
    pub fn passable(&self) -> (Vec<(&str, &File)>, Vec<&str>) {
        let there = self.blocks.iter().filter_map(|block| Some((block.name(), block.passable()?))).collect();
        let private = |block: &&Arc<RamBlock>| block.passable().is_none() && !block.is_shared_file();
        (there, self.blocks.iter().filter(private).map(|block| block.name()).collect())
    }

    fn with(ram: RamBlock, bios: &[u8], files: &mut Files) -> Result<GuestMemory> {
        let (blocks, mappings) = layout::microvm(ram, bios, files)?;
        Ok(GuestMemory { blocks: blocks.into_iter().map(Arc::new).collect(), mappings })
    }

    /// The block with the machine's RAM.
    pub fn ram(&self) -> &Arc<RamBlock> {
        &self.blocks[0]
    }

    /// The blocks, in the order in which QEMU lists them in the stream.
    pub fn blocks(&self) -> &[Arc<RamBlock>] {
        &self.blocks
    }

    /// The block of that name.
    pub fn block(&self, name: &str) -> Option<&Arc<RamBlock>> {
        self.blocks.iter().find(|block| block.name() == name)
    }

    /// Where the guest sees what; the index is the KVM memory slot.
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Reads guest-physical memory.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when not all of it is RAM.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < into.len() {
            let (block, offset, len) = self.piece(gpa, done, into.len())?;
            block.read(offset, &mut into[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    /// Writes guest-physical memory and marks it dirty.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when not all of it is RAM; the part before the first hole has been written then.
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < from.len() {
            let (block, offset, len) = self.piece(gpa, done, from.len())?;
            block.write(offset, &from[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    /// Marks guest-physical memory dirty that was written by other means.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when not all of it is RAM.
    pub fn mark_dirty(&self, gpa: u64, len: u64) -> Result<()> {
        self.slices(gpa, len)?.iter().for_each(|slice| slice.bitmap().mark_dirty(0, slice.len()));
        Ok(())
    }

    /// Whether all of a guest-physical range is RAM.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when not all of it is.
    pub fn check(&self, gpa: u64, len: u64) -> Result<()> {
        self.slices(gpa, len).map(drop)
    }

    /// The windows on the blocks behind a guest-physical range, one for each mapping that it touches. Writes through
    /// them mark the pages dirty.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when not all of it is RAM.
    pub fn slices(&self, gpa: u64, len: u64) -> Result<Vec<VolatileSlice<'_, BS<'_, AtomicBitmap>>>> {
        let outside = || Error::OutOfRange { what: "guest RAM".to_owned(), address: gpa, len };
        let len = usize::try_from(len).map_err(|_| outside())?;
        let (mut slices, mut done) = (Vec::new(), 0);
        while done < len {
            let (block, offset, here) = self.piece(gpa, done, len)?;
            slices.push(block.slice(offset, here as u64)?);
            done += here;
        }
        Ok(slices)
    }

    /// The longest piece of one block at `gpa + done`, of an access of `len` bytes at `gpa`.
    fn piece(&self, gpa: u64, done: usize, len: usize) -> Result<(&RamBlock, u64, usize)> {
        let outside = || Error::OutOfRange { what: "guest RAM".to_owned(), address: gpa, len: len as u64 };
        let at = gpa.checked_add(done as u64).ok_or_else(outside)?;
        let mapping = self.mappings.iter().find(|m| at >= m.gpa && at - m.gpa < m.len).ok_or_else(outside)?;
        let within = at - mapping.gpa;
        let here = (mapping.len - within).min((len - done) as u64);
        Ok((&self.blocks[mapping.block], mapping.offset + within, here as usize))
    }
}

#[cfg(test)]
mod tests;
