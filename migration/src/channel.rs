//! Byte channels to a peer, with vectored transfers straight from and into guest memory.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::time::Duration;
use vm_memory::VolatileSlice;

/// One part of a vectored write: bytes of the caller, or guest memory that vCPUs may be changing meanwhile.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct WriteSlice<'a>(libc::iovec, PhantomData<&'a [u8]>);

/// One part of a vectored read: room of the caller, or guest memory.
#[repr(transparent)]
pub struct ReadSlice<'a>(libc::iovec, PhantomData<&'a mut [u8]>);

impl<'a> WriteSlice<'a> {
    /// Bytes that do not change.
    pub fn bytes(bytes: &'a [u8]) -> Self {
        WriteSlice(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }, PhantomData)
    }

    /// Guest memory, of which the kernel takes a copy when it writes.
    pub fn guest(memory: &VolatileSlice<'a>) -> Self {
        WriteSlice(
            libc::iovec { iov_base: memory.ptr_guard().as_ptr().cast_mut().cast(), iov_len: memory.len() },
            PhantomData,
        )
    }

    /// Copies the first bytes into `bytes`, which is at most as long, for channels that are no system calls.
    ///
    /// # Panics
    /// Never: bytes beyond the part are left as they are.
    pub fn copy_to(&self, bytes: &mut [u8]) {
        let count = bytes.len().min(self.len());
        // SAFETY: the part is readable for its lifetime; `bytes` is exclusively ours, so they do not overlap.
        unsafe { std::ptr::copy(self.0.iov_base.cast::<u8>(), bytes.as_mut_ptr(), count) };
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// True if there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Without the first `count` bytes (at most all of them).
    #[must_use]
    pub fn skip(self, count: usize) -> Self {
        let count = count.min(self.len());
        let iov_base = self.0.iov_base.cast::<u8>().wrapping_add(count).cast();
        WriteSlice(libc::iovec { iov_base, iov_len: self.len() - count }, PhantomData)
    }

    /// Only the first `count` bytes (at most all of them).
    #[must_use]
    pub fn first(self, count: usize) -> Self {
        WriteSlice(libc::iovec { iov_len: count.min(self.len()), ..self.0 }, PhantomData)
    }
}

impl<'a> ReadSlice<'a> {
    /// A buffer of ours.
    pub fn bytes(bytes: &'a mut [u8]) -> Self {
        ReadSlice(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }, PhantomData)
    }

    /// Guest memory.
    pub fn guest(memory: &VolatileSlice<'a>) -> Self {
        ReadSlice(libc::iovec { iov_base: memory.ptr_guard_mut().as_ptr().cast(), iov_len: memory.len() }, PhantomData)
    }

    /// Copies `bytes` to the start, as many as there is room for: for channels that are no system calls.
    pub fn fill(&mut self, bytes: &[u8]) {
        let count = bytes.len().min(self.len());
        // SAFETY: the part is writable for its lifetime and no slice overlaps it.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.0.iov_base.cast::<u8>(), count) };
    }

    /// The same room, which may be used up while this stays as it is.
    pub(crate) fn part(&mut self) -> ReadSlice<'_> {
        ReadSlice(self.0, PhantomData)
    }

    /// Takes the first `count` bytes (at most all of them) away.
    pub(crate) fn advance(&mut self, count: usize) {
        let count = count.min(self.len());
        self.0.iov_base = self.0.iov_base.cast::<u8>().wrapping_add(count).cast();
        self.0.iov_len -= count;
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// True if there is no room.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A connected, bidirectional, blocking byte channel, shared by the threads that use it.
pub trait Channel: Send + Sync + fmt::Debug {
    /// Writes some of `parts`, in order, and says how many bytes.
    ///
    /// # Errors
    /// As `writev(2)`; [`io::ErrorKind::Interrupted`] is for the caller to repeat.
    fn write(&self, parts: &[WriteSlice<'_>]) -> io::Result<usize>;

    /// Makes [`write_in_place`](Self::write_in_place) do what it says.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`], or the system's: this connection copies what it sends.
    fn send_in_place(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// As [`write`](Self::write), but the kernel may send the bytes later out of the memory itself, as they are then.
    /// Every call that gives a number has to be [waited for](Self::sent_in_place); the memory may go before that, and
    /// no other memory is sent in its place.
    ///
    /// # Errors
    /// As `write`; `ENOBUFS` when the kernel keeps no more memory in place, or this process may not have it locked.
    fn write_in_place(&self, parts: &[WriteSlice<'_>]) -> io::Result<usize> {
        self.write(parts)
    }

    /// Waits until the kernel is done with some of the calls of [`write_in_place`](Self::write_in_place): how many, and
    /// whether it had copied their bytes all the same.
    ///
    /// # Errors
    /// As `recvmsg(2)`; [`io::ErrorKind::WouldBlock`] is for the caller to repeat. The connection broke.
    fn sent_in_place(&self) -> io::Result<(u32, bool)> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Reads into `parts`, in order, and says how many bytes; 0 when the peer has closed.
    ///
    /// # Errors
    /// As `readv(2)`; [`io::ErrorKind::Interrupted`] is for the caller to repeat.
    fn read(&self, parts: &mut [ReadSlice<'_>]) -> io::Result<usize>;

    /// Bytes that were written and have not arrived at the peer's host, where that can be known, and else 0.
    ///
    /// # Errors
    /// As `ioctl(2)`.
    fn backlog(&self) -> io::Result<u64> {
        Ok(0)
    }

    /// Whether the peer can still send: it has neither closed the connection nor ended its direction, where that can be
    /// known.
    ///
    /// # Errors
    /// The connection was reset, or broke otherwise.
    fn is_open(&self) -> io::Result<bool> {
        Ok(true)
    }

    /// Makes a read fail when nothing comes for so long, where that can be done; at first it waits as long as it takes.
    ///
    /// # Errors
    /// The system's.
    fn limit_silence(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    /// Makes a read, a write or [`settle`](Self::settle) fail with [`io::ErrorKind::WouldBlock`] when it has waited for
    /// `each`, and the connection break when the peer's host has not acknowledged anything for `unacknowledged` (or as
    /// long as the system likes), where that can be done.
    ///
    /// # Errors
    /// The system's.
    fn limit_waits(&self, each: Duration, unacknowledged: Option<Duration>) -> io::Result<()> {
        let _ = (each, unacknowledged);
        Ok(())
    }

    /// Whether anything can be written to the peer at all.
    fn answers(&self) -> bool {
        true
    }

    /// Ends the writing direction and waits until what was written has been taken, where that can be known: until the
    /// peer has closed in order, a pipe is empty, or a command has ended.
    ///
    /// # Errors
    /// [`io::ErrorKind::BrokenPipe`] if the peer is gone and did not read everything. With every other error it may
    /// have: the connection was reset, the command has failed.
    fn settle(&self) -> io::Result<()> {
        Ok(())
    }

    /// Tells the peer that nothing more comes, where there are words for that (TLS's `close_notify`). The connection
    /// stays as it is.
    fn say_end(&self) {}

    /// Ends the writing direction: the peer reads to the end of what was written.
    fn finish_writing(&self);

    /// Ends the reading direction: a thread that is blocked in a read, or reads later, reads the end, as if the
    /// peer had closed.
    fn stop_reading(&self);

    /// Ends both directions at once, which wakes every thread that is blocked here.
    fn close(&self);
}

/// A channel as anything else that can be read.
pub(crate) struct Reading<'c>(pub(crate) &'c dyn Channel);

impl io::Read for Reading<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(&mut [ReadSlice::bytes(bytes)])
    }
}

/// Most parts that one vectored call takes (`IOV_MAX` of Linux).
pub(crate) const MAX_PARTS: usize = 1024;

/// What is left of `parts` when their first `written` bytes have gone.
pub(crate) fn use_up<'p, 's>(mut parts: &'p mut [WriteSlice<'s>], mut written: usize) -> &'p mut [WriteSlice<'s>] {
    while written > 0 {
        let step = written.min(parts[0].len());
        parts[0] = parts[0].skip(step);
        written -= step;
        if parts[0].is_empty() {
            parts = &mut parts[1..];
        }
    }
    parts
}

/// Writes all of `parts`. They are used up as they go.
pub(crate) fn write_all(channel: &dyn Channel, mut parts: &mut [WriteSlice<'_>]) -> io::Result<()> {
    while !parts.is_empty() {
        if parts[0].is_empty() {
            parts = &mut parts[1..];
            continue;
        }
        let upto = parts.len().min(MAX_PARTS);
        match channel.write(&parts[..upto]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => parts = use_up(parts, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads until the first `at_least` bytes of `parts` are there, and as much after them as has come by then. Says how
/// many bytes that were: fewer than `at_least` if the peer has closed.
pub(crate) fn read_at_least(
    channel: &dyn Channel,
    mut parts: &mut [ReadSlice<'_>],
    at_least: usize,
) -> io::Result<usize> {
    let mut total = 0;
    while total < at_least {
        while parts.first().is_some_and(ReadSlice::is_empty) {
            parts = &mut parts[1..];
        }
        let upto = parts.len().min(MAX_PARTS);
        match channel.read(&mut parts[..upto]) {
            Ok(0) => break,
            Ok(mut count) => {
                total += count;
                while count > 0 {
                    let step = count.min(parts[0].len());
                    parts[0].advance(step);
                    count -= step;
                    if parts[0].is_empty() {
                        parts = &mut parts[1..];
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(total)
}

// `WriteSlice` and `ReadSlice` are read and written as arrays of iovec, the layout that these two types promise as
// well.
const _: () = assert!(size_of::<WriteSlice<'_>>() == size_of::<IoSlice<'_>>());
const _: () = assert!(size_of::<ReadSlice<'_>>() == size_of::<IoSliceMut<'_>>());

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes at most three bytes at a time, and is interrupted before each.
    #[derive(Debug, Default)]
    struct Trickle(parking_lot::Mutex<(Vec<u8>, bool)>);

    impl Channel for Trickle {
        fn write(&self, parts: &[WriteSlice<'_>]) -> io::Result<usize> {
            let mut state = self.0.lock();
            state.1 = !state.1;
            if state.1 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let mut left = 3;
            for part in parts {
                let mut bytes = vec![0; part.first(left).len()];
                part.copy_to(&mut bytes);
                state.0.extend(&bytes);
                left -= bytes.len();
            }
            Ok(3 - left)
        }
        fn read(&self, _: &mut [ReadSlice<'_>]) -> io::Result<usize> {
            Ok(0)
        }
        fn finish_writing(&self) {}
        fn stop_reading(&self) {}
        fn close(&self) {}
    }

    #[test]
    fn short_and_interrupted_writes_lose_nothing() {
        let channel = Trickle::default();
        let mut parts = [&b"ab"[..], b"", b"cdefgh", b"i", b""].map(WriteSlice::bytes);
        write_all(&channel, &mut parts).unwrap();
        assert_eq!(channel.0.lock().0, b"abcdefghi");
    }
}
