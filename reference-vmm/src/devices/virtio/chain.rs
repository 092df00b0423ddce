//! The buffers of a request.

use super::queue::{Descriptor, RingError};
use crate::error::Result;
use crate::memory::GuestMemory;
use qevm_microvm::state::VirtioRequest;

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buffer {
    /// Guest-physical address.
    pub(crate) gpa: u64,
    /// Bytes.
    pub(crate) len: u32,
}

/// A chain that was popped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    /// The descriptor that it is given back by.
    pub(crate) head: u16,
    /// What the device reads.
    pub(crate) readable: Vec<Buffer>,
    /// What the device writes.
    pub(crate) writable: Vec<Buffer>,
}

impl Chain {
    pub(super) fn descriptors(&self) -> usize {
        self.readable.len() + self.writable.len()
    }

    pub(super) fn save(&self) -> VirtioRequest {
        let list = |buffers: &[Buffer]| buffers.iter().map(|buffer| (buffer.gpa, buffer.len)).collect();
        VirtioRequest { head: self.head, readable: list(&self.readable), writable: list(&self.writable) }
    }

    pub(super) fn load(request: &VirtioRequest) -> Chain {
        let list = |pairs: &[(u64, u32)]| pairs.iter().map(|(gpa, len)| Buffer { gpa: *gpa, len: *len }).collect();
        Chain { head: request.head, readable: list(&request.readable), writable: list(&request.writable) }
    }

    /// Adds a descriptor.
    pub(super) fn add(&mut self, memory: &GuestMemory, descriptor: &Descriptor) -> std::result::Result<(), RingError> {
        let buffer = descriptor.buffer();
        if buffer.len == 0 {
            return Err(RingError::Empty);
        }
        memory.check(buffer.gpa, buffer.len.into())?;
        if descriptor.is_written() {
            self.writable.push(buffer);
        } else if self.writable.is_empty() {
            self.readable.push(buffer);
        } else {
            return Err(RingError::Order);
        }
        Ok(())
    }

    /// Reads from `skip` bytes on into `into`; says how many bytes there were.
    pub(crate) fn read(&self, memory: &GuestMemory, skip: u64, into: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        for piece in pieces(&self.readable, skip, into.len() as u64) {
            let end = done + piece.len as usize;
            memory.read(piece.gpa, &mut into[done..end])?;
            done = end;
        }
        Ok(done)
    }

    /// Writes `from` from `skip` bytes on; says for how many bytes there was room.
    pub(crate) fn write(&self, memory: &GuestMemory, skip: u64, from: &[u8]) -> Result<usize> {
        let mut done = 0;
        for piece in pieces(&self.writable, skip, from.len() as u64) {
            let end = done + piece.len as usize;
            memory.write(piece.gpa, &from[done..end])?;
            done = end;
        }
        Ok(done)
    }

    /// Bytes that the device can read.
    pub(crate) fn readable_len(&self) -> u64 {
        self.readable.iter().map(|buffer| u64::from(buffer.len)).sum()
    }

    /// Bytes that the device can write.
    pub(crate) fn writable_len(&self) -> u64 {
        self.writable.iter().map(|buffer| u64::from(buffer.len)).sum()
    }
}

/// `len` bytes of the buffers, from `skip` on.
pub(crate) fn pieces(buffers: &[Buffer], mut skip: u64, mut len: u64) -> impl Iterator<Item = Buffer> {
    buffers.iter().filter_map(move |buffer| {
        let passed = skip.min(buffer.len.into());
        skip -= passed;
        let here = (u64::from(buffer.len) - passed).min(len);
        len -= here;
        (here > 0).then_some(Buffer { gpa: buffer.gpa.wrapping_add(passed), len: here as u32 })
    })
}
