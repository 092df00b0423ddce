//! The requests of a disk, a piece at a time.

use super::{Block, MAX_SECTORS, SECTOR};
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::model::{Access, Task};
use crate::devices::virtio::queue::RingError;
use crate::memory::GuestMemory;
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const HEADER: usize = size_of::<Header>();
/// Bytes of the answer to `GET_ID`.
const SERIAL: usize = 20;
/// Most bytes that are moved at once.
const PIECE: u64 = 1 << 20;

/// What a request begins with.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Header {
    kind: U32,
    priority: U32,
    sector: U64,
}

/// Sectors to discard or to fill with zeroes.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Segment {
    sector: U64,
    sectors: U32,
    flags: U32,
}

/// Request types. The bit of `OUT` says which way the data goes.
mod kind {
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

/// Which way a request moves data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ToGuest,
    ToDisk,
    Zeroes,
}

/// How far a request is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    way: Way,
    /// Where in the file it goes on.
    offset: u64,
    /// Bytes of the buffers before that.
    skip: u64,
    left: u64,
    /// It ends with a flush.
    flush: bool,
}

/// What a task does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The next piece of this many bytes.
    Move(u64),
    Flush,
}

impl Block {
    /// Looks at requests until one takes its time.
    pub(super) fn next_step(&mut self, access: &mut Access<'_>) -> Result<Option<Task>, RingError> {
        loop {
            let Some(chain) = self.requests.front() else {
                self.flush_due &= self.dirty;
                return Ok(self.flush_due.then(|| self.flush()));
            };
            let progress = match self.progress {
                Some(progress) => progress,
                None => match self.look(chain, access.memory) {
                    Ok(Ok(progress)) => *self.progress.insert(progress),
                    Ok(Err(status)) => {
                        self.complete(status, access)?;
                        continue;
                    }
                    Err(error) => {
                        self.requests.pop_front();
                        return Err(error);
                    }
                },
            };
            let Progress { way, offset, skip, left, flush } = progress;
            if left == 0 && !flush {
                self.complete(Status::Ok, access)?;
                continue;
            }
            if left == 0 {
                return Ok(Some(self.flush()));
            }
            let len = left.min(PIECE);
            let file = Arc::clone(&self.file);
            let mut bytes = vec![0; if way == Way::Zeroes { 0 } else { len as usize }];
            if way == Way::ToDisk {
                chain.read(access.memory, skip, &mut bytes)?;
            }
            self.step = Some(Step::Move(len));
            return Ok(Some(Task::new(move || {
                match way {
                    Way::ToGuest => file.read_exact_at(&mut bytes, offset)?,
                    Way::ToDisk => file.write_all_at(&bytes, offset)?,
                    Way::Zeroes => zero(&file, offset, len)?,
                }
                Ok(bytes)
            })));
        }
    }

    /// Puts on the disk what was written.
    pub(super) fn flush(&mut self) -> Task {
        self.step = Some(Step::Flush);
        let file = Arc::clone(&self.file);
        Task::new(move || file.sync_data().map(|()| Vec::new()))
    }

    /// What a task was for is done, too. Without access to the guest it is not, and the request is begun anew later.
    pub(super) fn step_done(
        &mut self,
        result: io::Result<Vec<u8>>,
        access: Option<&mut Access<'_>>,
    ) -> Result<(), RingError> {
        let step = self.step.take();
        let forgotten = std::mem::take(&mut self.forgotten);
        let file = self.options.file.display();
        let progress = self.progress.as_mut().filter(|_| !forgotten);
        match (step, &result) {
            (Some(Step::Flush), Ok(_)) => self.dirty = false,
            (Some(Step::Flush), Err(error)) => tracing::error!(%error, %file, "the disk cannot be flushed"),
            // Some of it may have been written in any case.
            (Some(Step::Move(_)), Ok(_)) => self.dirty |= progress.as_ref().is_none_or(|p| p.way != Way::ToGuest),
            (Some(Step::Move(_)), Err(error)) => {
                let offset = progress.as_ref().map(|progress| progress.offset);
                tracing::error!(%error, offset, %file, "a disk request failed");
            }
            (None, _) => {}
        }
        let Some(progress) = progress else {
            // Once: a disk that cannot be flushed is not asked again and again.
            self.flush_due &= step != Some(Step::Flush);
            return Ok(());
        };
        let Some(access) = access else { return Ok(()) };
        match (step, result) {
            (_, Err(_)) => return self.complete(Status::IoError, access),
            (Some(Step::Flush), Ok(_)) => progress.flush = false,
            (Some(Step::Move(len)), Ok(bytes)) => {
                if progress.way == Way::ToGuest
                    && let Some(chain) = self.requests.front()
                {
                    chain.write(access.memory, progress.skip, &bytes)?;
                }
                progress.offset += len;
                progress.skip += len;
                progress.left -= len;
            }
            (None, Ok(_)) => {}
        }
        Ok(())
    }

    /// Gives the first request back.
    fn complete(&mut self, status: Status, access: &mut Access<'_>) -> Result<(), RingError> {
        self.progress = None;
        let Some(chain) = self.requests.pop_front() else { return Ok(()) };
        let room = chain.writable_len();
        chain.write(access.memory, room.saturating_sub(1), &[status as u8])?;
        access.push(0, chain.head, u32::try_from(room).unwrap_or(u32::MAX))
    }

    /// What a request asks for; the status of one that is done or refused without the disk.
    fn look(&self, chain: &Chain, memory: &GuestMemory) -> Result<Result<Progress, Status>, RingError> {
        let mut header = Header::new_zeroed();
        let malformed = |what| Err(RingError::Request { what });
        let room = chain.writable_len();
        if room == 0 {
            return malformed("a disk request without room for its status");
        }
        if chain.read(memory, 0, header.as_mut_bytes())? != HEADER {
            return malformed("a disk request without a whole header");
        }
        let sector = header.sector.get();
        Ok(match header.kind.get() & !kind::BARRIER {
            kind::IN => self.transfer(Way::ToGuest, sector, 0, room - 1),
            kind::OUT => self.transfer(Way::ToDisk, sector, HEADER as u64, chain.readable_len() - HEADER as u64),
            kind::FLUSH => Ok(Progress { way: Way::ToDisk, offset: 0, skip: 0, left: 0, flush: true }),
            kind::GET_ID => {
                let mut serial = [0; SERIAL];
                serial.iter_mut().zip(self.options.serial.bytes()).for_each(|(into, byte)| *into = byte);
                let len = (room - 1).min(SERIAL as u64) as usize;
                chain.write(memory, 0, &serial[..len])?;
                Err(Status::Ok)
            }
            kind @ (kind::DISCARD | kind::WRITE_ZEROES) => self.clear(chain, kind, memory)?,
            _ => Err(Status::Unsupported),
        })
    }

    /// `len` bytes of the buffers, from `skip` on, to or from the disk.
    fn transfer(&self, way: Way, sector: u64, skip: u64, len: u64) -> Result<Progress, Status> {
        let write = way != Way::ToGuest;
        if !len.is_multiple_of(SECTOR) || !self.has(sector, len / SECTOR) || write && self.options.readonly {
            return Err(Status::IoError);
        }
        // Without a write cache what was written has to be on the disk.
        Ok(Progress { way, offset: sector * SECTOR, skip, left: len, flush: write && !self.writeback })
    }

    /// Discards sectors, which may leave them as they are (as QEMU's `discard=ignore` does), or fills them with zeroes.
    fn clear(&self, chain: &Chain, kind: u32, memory: &GuestMemory) -> Result<Result<Progress, Status>, RingError> {
        const UNMAP: u32 = 1;
        let mut segment = Segment::new_zeroed();
        if self.options.readonly {
            return Ok(Err(Status::IoError));
        }
        // One segment at most is offered.
        if chain.readable_len() != (HEADER + size_of::<Segment>()) as u64 {
            return Ok(Err(Status::Unsupported));
        }
        chain.read(memory, HEADER as u64, segment.as_mut_bytes())?;
        let (sector, sectors, flags) = (segment.sector.get(), segment.sectors.get(), segment.flags.get());
        let known = if kind == kind::WRITE_ZEROES { UNMAP } else { 0 };
        if flags & !known != 0 {
            return Ok(Err(Status::Unsupported));
        }
        if sectors > MAX_SECTORS || !self.has(sector, sectors.into()) {
            return Ok(Err(Status::IoError));
        }
        if kind == kind::DISCARD || sectors == 0 {
            return Ok(Err(Status::Ok));
        }
        Ok(self.transfer(Way::Zeroes, sector, 0, u64::from(sectors) * SECTOR))
    }
}

/// Fills a piece of the file with zeroes.
fn zero(file: &File, offset: u64, len: u64) -> io::Result<()> {
    if fallocate(file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, len).is_ok() {
        return Ok(());
    }
    // Not every filesystem can do that.
    file.write_all_at(&vec![0; len as usize], offset)
}
