//! `virtio-blk-device` on a raw file (virtio 1.2, 5.2).
//!
//! Requests are done one after the other, when the guest tells of them: none is under way while the machine stands still.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use vm_memory::{ReadVolatile, WriteVolatile};

use super::chain::{Buffer, Chain, pieces, windows};
use super::image_lock;
use super::queue::RingError;
use super::transport::{Access, Model};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::state::{VirtioDeviceState, VirtioRequest};

/// Device number.
const ID: u32 = 2;
/// `VIRTIO_BLK_F_RO`
const READ_ONLY: u64 = 1 << 5;
/// `VIRTIO_BLK_F_CONFIG_WCE`
const CONFIG_WCE: u64 = 1 << 11;
/// SEG_MAX, GEOMETRY, BLK_SIZE, SCSI, FLUSH, TOPOLOGY, CONFIG_WCE, DISCARD, WRITE_ZEROES, NOTIFY_ON_EMPTY, INDIRECT_DESC,
/// EVENT_IDX (HostFeatures of 7.2.22, 10.0.13 and 11.1.3).
const FEATURES: u64 = 0x3100_6ed4;
/// QueueNumMax of 11.1.3, and `virtio/ringsize` of 7.2.22.
const QUEUE: u32 = 256;
/// Bytes of the configuration space: up to `write_zeroes_may_unmap` (sections of 7.2 to 11.1).
const CONFIG_LEN: usize = 57;
/// Offset of `writeback` in it.
const WRITEBACK: usize = 32;
const SECTOR: u64 = 512;
/// Largest discard and write of zeroes, in sectors.
const MAX_SECTORS: u32 = 0x003f_ffff;
const HEADER: usize = 16;
/// Bytes of the answer to `GET_ID`.
const SERIAL: usize = 20;

/// Request types. The bit of `OUT` says which way the data goes.
mod request {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
    /// Set by old drivers, and ignored.
    pub(super) const BARRIER: u32 = 1 << 31;
}

/// What the device answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A disk, with the names of QEMU's `-drive` and `-device`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockOptions {
    /// `file`: a raw image, whole sectors of 512 bytes.
    pub file: PathBuf,
    /// `readonly`
    pub readonly: bool,
    /// `serial`: at most 20 bytes count.
    pub serial: String,
}

/// The device.
#[derive(Debug)]
pub struct Block {
    file: File,
    options: BlockOptions,
    sectors: u64,
    /// Writes may stay in the host's cache until the guest flushes.
    writeback: bool,
    /// Something was written since the last flush.
    dirty: bool,
    /// What the source of a migration had not done.
    requests: Vec<Chain>,
}

impl Block {
    /// Opens the file.
    ///
    /// # Errors
    /// [`Error::Config`] when it cannot be opened or is no whole number of sectors.
    pub fn open(options: BlockOptions) -> Result<Block> {
        let path = options.file.display().to_string();
        let failed = |cause: io::Error| Error::Config(format!("cannot use the drive {path}: {cause}"));
        let file = OpenOptions::new().read(true).write(!options.readonly).open(&options.file).map_err(failed)?;
        let bytes = (&file).seek(SeekFrom::End(0)).map_err(failed)?;
        if !bytes.is_multiple_of(SECTOR) {
            return Err(Error::Config(format!(
                "the drive {path} has {bytes} bytes: wanted whole sectors of 512 bytes"
            )));
        }
        Ok(Block { file, options, sectors: bytes / SECTOR, writeback: true, dirty: false, requests: Vec::new() })
    }

    /// Does a request and gives it back.
    fn serve(&mut self, chain: &Chain, access: &mut Access<'_>) -> Result<(), RingError> {
        let mut header = [0; HEADER];
        let malformed = |what| Err(RingError::Request { what });
        let room = chain.writable_len();
        if room == 0 {
            return malformed("a disk request without room for its status");
        }
        if chain.read(access.memory, 0, &mut header)? != HEADER {
            return malformed("a disk request without a whole header");
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = header.last_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let status = match kind & !request::BARRIER {
            request::IN => self.transfer(&chain.writable, 0, room - 1, sector, access.memory, false),
            request::OUT => {
                let len = chain.readable_len() - HEADER as u64;
                self.transfer(&chain.readable, HEADER as u64, len, sector, access.memory, true)
            }
            request::FLUSH => self.flush(),
            request::GET_ID => {
                let mut serial = [0; SERIAL];
                serial.iter_mut().zip(self.options.serial.bytes()).for_each(|(into, byte)| *into = byte);
                let len = (room - 1).min(SERIAL as u64) as usize;
                chain.write(access.memory, 0, &serial[..len])?;
                Status::Ok
            }
            kind @ (request::DISCARD | request::WRITE_ZEROES) => self.clear(chain, kind, access.memory)?,
            _ => Status::Unsupported,
        };
        chain.write(access.memory, room - 1, &[status as u8])?;
        access.push(0, chain.head, u32::try_from(room).unwrap_or(u32::MAX))
    }

    /// Whether the guest may access these sectors.
    fn has(&self, sector: u64, sectors: u64) -> bool {
        sector.checked_add(sectors).is_some_and(|end| end <= self.sectors)
    }

    /// Moves `len` bytes of the buffers, from `skip` on, to or from the file.
    fn transfer(
        &mut self,
        buffers: &[Buffer],
        skip: u64,
        len: u64,
        sector: u64,
        memory: &GuestMemory,
        write: bool,
    ) -> Status {
        if !len.is_multiple_of(SECTOR) || !self.has(sector, len / SECTOR) || write && self.options.readonly {
            return Status::IoError;
        }
        let moved = self.file.seek(SeekFrom::Start(sector * SECTOR)).map_err(vm_memory::VolatileMemoryError::IOError);
        let moved = moved.and_then(|_| {
            for piece in pieces(buffers, skip, len) {
                let windows = windows(memory, piece)
                    .map_err(|error| vm_memory::VolatileMemoryError::IOError(io::Error::other(error)))?;
                for mut window in windows {
                    match write {
                        true => self.file.write_all_volatile(&window)?,
                        false => self.file.read_exact_volatile(&mut window)?,
                    }
                }
            }
            Ok(())
        });
        if let Err(error) = moved {
            tracing::error!(%error, sector, write, file = %self.options.file.display(), "a disk request failed");
            return Status::IoError;
        }
        self.dirty |= write;
        self.written(write)
    }

    /// A write is done; without a write cache it has to be on the disk.
    fn written(&mut self, write: bool) -> Status {
        if write && !self.writeback { self.flush() } else { Status::Ok }
    }

    fn flush(&mut self) -> Status {
        match self.file.sync_data() {
            Ok(()) => {
                self.dirty = false;
                Status::Ok
            }
            Err(error) => {
                tracing::error!(%error, file = %self.options.file.display(), "the disk cannot be flushed");
                Status::IoError
            }
        }
    }

    /// Discards sectors, which may leave them as they are (as QEMU's `discard=ignore` does), or fills them with zeroes.
    fn clear(&mut self, chain: &Chain, kind: u32, memory: &GuestMemory) -> Result<Status> {
        /// A segment: sector, number of sectors, flags.
        const SEGMENT: usize = 16;
        const UNMAP: u32 = 1;
        let mut segment = [0; SEGMENT];
        if self.options.readonly {
            return Ok(Status::IoError);
        }
        // One segment at most is offered.
        if chain.readable_len() != (HEADER + SEGMENT) as u64 {
            return Ok(Status::Unsupported);
        }
        chain.read(memory, HEADER as u64, &mut segment)?;
        let word = u128::from_le_bytes(segment);
        let (sector, sectors, flags) = (word as u64, (word >> 64) as u32, (word >> 96) as u32);
        let known = if kind == request::WRITE_ZEROES { UNMAP } else { 0 };
        if flags & !known != 0 {
            return Ok(Status::Unsupported);
        }
        if sectors > MAX_SECTORS || !self.has(sector, sectors.into()) {
            return Ok(Status::IoError);
        }
        if kind == request::DISCARD || sectors == 0 {
            return Ok(Status::Ok);
        }
        if let Err(error) = zero(&mut self.file, sector * SECTOR, u64::from(sectors) * SECTOR) {
            tracing::error!(%error, sector, sectors, file = %self.options.file.display(), "zeroes cannot be written");
            return Ok(Status::IoError);
        }
        self.dirty = true;
        Ok(self.written(true))
    }
}

/// Fills a range of the file with zeroes.
fn zero(file: &mut File, offset: u64, mut len: u64) -> io::Result<()> {
    let (from, count) = (offset as libc::off_t, len as libc::off_t);
    let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is open; the call touches no memory.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, from, count) } == 0 {
        return Ok(());
    }
    // Not every filesystem can do that.
    let zeroes = [0; 64 << 10];
    file.seek(SeekFrom::Start(offset))?;
    while len > 0 {
        let piece = len.min(zeroes.len() as u64) as usize;
        file.write_all(&zeroes[..piece])?;
        len -= piece as u64;
    }
    Ok(())
}

impl Model for Block {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        if self.options.readonly { FEATURES | READ_ONLY } else { FEATURES }
    }

    fn queues(&self) -> Vec<u32> {
        vec![QUEUE]
    }

    fn config(&self) -> Vec<u8> {
        const HEADS: u64 = 16;
        const SECTORS_PER_TRACK: u64 = 63;
        let cylinders = (self.sectors / (HEADS * SECTORS_PER_TRACK)).clamp(2, 16383) as u16;
        let mut config = Vec::with_capacity(CONFIG_LEN);
        config.extend(self.sectors.to_le_bytes());
        config.extend(0u32.to_le_bytes()); // size_max
        config.extend((QUEUE - 2).to_le_bytes()); // seg_max
        config.extend(cylinders.to_le_bytes());
        config.extend([HEADS as u8, SECTORS_PER_TRACK as u8]);
        config.extend((SECTOR as u32).to_le_bytes()); // blk_size
        config.extend([0; 8]); // topology
        config.extend([self.writeback.into(), 0]);
        config.extend(1u16.to_le_bytes()); // num_queues
        config.extend(MAX_SECTORS.to_le_bytes()); // max_discard_sectors
        config.extend(1u32.to_le_bytes()); // max_discard_seg
        config.extend(1u32.to_le_bytes()); // discard_sector_alignment
        config.extend(MAX_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        config.extend(1u32.to_le_bytes()); // max_write_zeroes_seg
        config.push(1); // write_zeroes_may_unmap
        config
    }

    fn write_config(&mut self, offset: usize, data: &[u8], features: u64) {
        if features & CONFIG_WCE != 0
            && let Some(byte) = WRITEBACK.checked_sub(offset).and_then(|at| data.get(at))
        {
            self.writeback = *byte != 0;
            if !self.writeback {
                self.flush();
            }
        }
    }

    fn process(&mut self, queue: usize, access: &mut Access<'_>) -> Result<(), RingError> {
        while let Some(chain) = access.pop(queue)? {
            self.serve(&chain, access)?;
        }
        Ok(())
    }

    fn resume(&mut self, access: &mut Access<'_>) -> Result<(), RingError> {
        std::mem::take(&mut self.requests).iter().try_for_each(|chain| self.serve(chain, access))
    }

    fn pause(&mut self) {
        // Whoever takes the guest over reads what it wrote.
        if self.dirty {
            self.flush();
        }
    }

    fn activate(&mut self) -> Result<()> {
        image_lock::take(&self.file, self.options.readonly)
            .map_err(|cause| Error::Config(format!("the drive {}: {cause}", self.options.file.display())))
    }

    fn inactivate(&mut self) {
        image_lock::release(&self.file);
    }

    fn reset(&mut self) {
        self.requests.clear();
        self.writeback = true;
    }

    fn save(&self) -> VirtioDeviceState {
        VirtioDeviceState::Block(self.requests.iter().map(Chain::save).collect())
    }

    fn load(&mut self, state: &VirtioDeviceState) -> Result<(), String> {
        let VirtioDeviceState::Block(requests) = state else { return Err("it is no disk".into()) };
        self.requests = requests.iter().map(|request: &VirtioRequest| Chain::load(request)).collect();
        Ok(())
    }
}
