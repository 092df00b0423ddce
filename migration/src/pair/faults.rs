//! A channel that fails as it is told.

use crate::{Channel, ReadSlice, Socket, WriteSlice};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What goes wrong, counted in bytes from the start of each direction.
#[derive(Clone, Default)]
pub(crate) struct Faults {
    /// The connection is cut when the source has written so much.
    pub(crate) cut_at: Option<u64>,
    /// The connection is cut when the source has read so much.
    pub(crate) cut_return_path_at: Option<u64>,
    /// This byte of what the source writes is xored with the value.
    pub(crate) flip: Option<(u64, u8)>,
    /// Called when the source has written so much.
    pub(crate) call_at: Option<(u64, Arc<dyn Fn() + Send + Sync>)>,
    /// The source cannot write faster than this many bytes per millisecond.
    pub(crate) bytes_per_ms: Option<u64>,
    /// This many times the source is told that a megabyte is still on its way.
    pub(crate) backlog: Arc<AtomicU64>,
}

/// A socket with [`Faults`], which calls a function before everything that is written.
pub(crate) struct Faulty {
    inner: Socket,
    faults: Faults,
    written: AtomicU64,
    read: AtomicU64,
    before_write: Box<dyn Fn() + Send + Sync>,
}

/// Most bytes that go through in one call, so that a guest finds many places to work between two of them.
const STEP: u64 = 64 << 10;

impl Faulty {
    pub(crate) fn new(inner: Socket, faults: Faults, before_write: impl Fn() + Send + Sync + 'static) -> Self {
        let (written, read) = (AtomicU64::new(0), AtomicU64::new(0));
        Faulty { inner, faults, written, read, before_write: Box::new(before_write) }
    }

    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }
}

impl Channel for Faulty {
    fn write(&self, parts: &[WriteSlice<'_>]) -> io::Result<usize> {
        (self.before_write)();
        let at = self.written();
        let mut upto = at + STEP;
        if let Some(cut) = self.faults.cut_at {
            if at >= cut {
                self.close();
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            upto = upto.min(cut);
        }
        if let Some((place, call)) = &self.faults.call_at {
            match place {
                _ if at == *place => call(),
                _ if at < *place => upto = upto.min(*place),
                _ => {}
            }
        }
        let flipped;
        let mut cut: Vec<WriteSlice<'_>> = first(parts, upto - at);
        if let Some((place, mask)) = self.faults.flip {
            if at < place {
                cut = first(parts, (upto - at).min(place - at));
            } else if at == place {
                flipped = [peek(&parts[0]) ^ mask];
                cut = vec![WriteSlice::bytes(&flipped)];
            }
        }
        if let Some(speed) = self.faults.bytes_per_ms {
            let bytes: usize = cut.iter().map(WriteSlice::len).sum();
            std::thread::sleep(Duration::from_micros(bytes as u64 * 1000 / speed));
        }
        let count = self.inner.write(&cut)?;
        self.written.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    fn read(&self, parts: &mut [ReadSlice<'_>]) -> io::Result<usize> {
        let Some(cut) = self.faults.cut_return_path_at else { return self.inner.read(parts) };
        let left = cut.saturating_sub(self.read.load(Ordering::Relaxed)) as usize;
        if left == 0 {
            self.close();
            return Ok(0);
        }
        let mut bytes = vec![0; left.min(parts[0].len())];
        let count = self.inner.read(&mut [ReadSlice::bytes(&mut bytes)])?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        parts[0].fill(&bytes[..count]);
        Ok(count)
    }

    fn backlog(&self) -> io::Result<u64> {
        let left = self.faults.backlog.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        Ok(if left.is_ok() { 1 << 20 } else { 0 })
    }

    fn finish_writing(&self) {
        self.inner.finish_writing();
    }

    fn stop_reading(&self) {
        self.inner.stop_reading();
    }

    fn close(&self) {
        self.inner.close();
    }
}

fn first<'a>(parts: &[WriteSlice<'a>], mut left: u64) -> Vec<WriteSlice<'a>> {
    let mut cut = Vec::new();
    for part in parts {
        let part = part.first(left as usize);
        left -= part.len() as u64;
        cut.push(part);
        if left == 0 {
            break;
        }
    }
    cut
}

fn peek(part: &WriteSlice<'_>) -> u8 {
    let mut byte = [0];
    part.copy_to(&mut byte);
    byte[0]
}

impl std::fmt::Debug for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Faulty").field("inner", &self.inner).finish_non_exhaustive()
    }
}
