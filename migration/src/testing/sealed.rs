//! A channel that seals what it carries, as a TLS session does.

use crate::{Channel, ReadSlice, WriteSlice};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a record's head: two for the length of its body, four for a sum over it.
const HEAD: usize = 6;
/// Most bytes of a record's body, as in TLS.
const BODY: usize = 16 << 10;

/// A [`Channel`] over another: bytes go in records that are scrambled with a key and checked with a sum, and an end
/// that the peer has not sealed is an error. It shows what an encrypting channel has to do; it keeps no
/// secret.
///
/// ```
/// use qevm_migration::{Channel, Socket, WriteSlice, ReadSlice, testing::Sealed};
/// use std::{os::unix::net::UnixStream, sync::Arc};
///
/// let (here, there) = UnixStream::pair()?;
/// let here = Sealed::new(Arc::new(Socket::Unix(here)), 7);
/// let there = Sealed::new(Arc::new(Socket::Unix(there)), 7);
/// here.write(&[WriteSlice::bytes(b"page"), WriteSlice::bytes(b"s")])?;
/// let mut bytes = [0; 8];
/// assert_eq!(there.read(&mut [ReadSlice::bytes(&mut bytes)])?, 5);
/// assert_eq!(&bytes[..5], b"pages");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Sealed {
    inner: Arc<dyn Channel>,
    key: u64,
    writing: Mutex<Writing>,
    reading: Mutex<Reading>,
}

#[derive(Debug, Default)]
struct Writing {
    /// Records sealed so far.
    records: u64,
    /// Sealed bytes that the channel below has not taken.
    left: VecDeque<u8>,
    ended: bool,
}

#[derive(Debug, Default)]
struct Reading {
    records: u64,
    /// What has come of the next record.
    sealed: Vec<u8>,
    plain: VecDeque<u8>,
    ended: bool,
}

impl Sealed {
    /// Seals what goes over `inner`; the peer needs the same key.
    pub fn new(inner: Arc<dyn Channel>, key: u64) -> Self {
        Sealed { inner, key, writing: Mutex::default(), reading: Mutex::default() }
    }

    /// A record with this body.
    fn seal(&self, number: u64, body: &mut [u8]) -> Vec<u8> {
        let sum = self.sum(number, body);
        self.scramble(number, body);
        [&(body.len() as u16).to_be_bytes()[..], &sum.to_be_bytes(), body].concat()
    }

    /// Scrambles, or the other way round.
    fn scramble(&self, number: u64, body: &mut [u8]) {
        let mut stream = super::Random::new(self.key ^ number);
        for part in body.chunks_mut(8) {
            part.iter_mut().zip(stream.number().to_le_bytes()).for_each(|(byte, key)| *byte ^= key);
        }
    }

    fn sum(&self, number: u64, body: &[u8]) -> u32 {
        let begin = (self.key ^ number ^ body.len() as u64) as u32;
        body.iter().fold(begin, |sum, byte| sum.rotate_left(5).wrapping_mul(0x9e37_79b1) ^ u32::from(*byte))
    }

    /// Writes what is left of sealed records.
    fn flush(&self, writing: &mut Writing) -> io::Result<()> {
        while !writing.left.is_empty() {
            let count = match self.inner.write(&[WriteSlice::bytes(writing.left.make_contiguous())]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                written => written?,
            };
            writing.left.drain(..count);
        }
        Ok(())
    }

    /// Reads until a record is whole, and opens it.
    fn open(&self, reading: &mut Reading) -> io::Result<()> {
        let mut chunk = vec![0; BODY];
        loop {
            if let Some((head, rest)) = reading.sealed.split_first_chunk::<HEAD>() {
                let len = usize::from(u16::from_be_bytes([head[0], head[1]]));
                if let Some(body) = rest.get(..len) {
                    let mut body = body.to_vec();
                    self.scramble(reading.records, &mut body);
                    if self.sum(reading.records, &body).to_be_bytes() != head[2..] {
                        return Err(io::Error::new(
                            io::ErrorKind::InvalidData,
                            "a sealed record was changed on its way",
                        ));
                    }
                    reading.records += 1;
                    reading.ended = body.is_empty();
                    reading.plain.extend(body);
                    reading.sealed.drain(..HEAD + len);
                    return Ok(());
                }
            }
            match self.inner.read(&mut [ReadSlice::bytes(&mut chunk)])? {
                0 => return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the connection was cut")),
                count => reading.sealed.extend(&chunk[..count]),
            }
        }
    }
}

impl Channel for Sealed {
    fn write(&self, parts: &[WriteSlice<'_>]) -> io::Result<usize> {
        let mut writing = self.writing.lock();
        self.flush(&mut writing)?;
        let mut body = Vec::new();
        for part in parts {
            let part = part.first(BODY - body.len());
            let old = body.len();
            body.resize(old + part.len(), 0);
            // Guest memory may change any time: only the copy is looked at.
            part.copy_to(&mut body[old..]);
        }
        let count = body.len();
        if count == 0 {
            return Ok(0);
        }
        let record = self.seal(writing.records, &mut body);
        writing.records += 1;
        writing.left.extend(record);
        // These bytes are taken; if the channel below is broken, the next call tells.
        let _ = self.flush(&mut writing);
        Ok(count)
    }

    fn read(&self, parts: &mut [ReadSlice<'_>]) -> io::Result<usize> {
        let mut reading = self.reading.lock();
        while reading.plain.is_empty() && !reading.ended {
            self.open(&mut reading)?;
        }
        let mut total = 0;
        for part in parts {
            let count = part.len().min(reading.plain.len());
            part.fill(&reading.plain.make_contiguous()[..count]);
            reading.plain.drain(..count);
            total += count;
        }
        Ok(total)
    }

    fn backlog(&self) -> io::Result<u64> {
        Ok(self.inner.backlog()? + self.writing.lock().left.len() as u64)
    }

    fn is_open(&self) -> io::Result<bool> {
        self.inner.is_open()
    }

    fn limit_silence(&self, limit: Option<Duration>) -> io::Result<()> {
        self.inner.limit_silence(limit)
    }

    fn finish_writing(&self) {
        let mut writing = self.writing.lock();
        if !std::mem::replace(&mut writing.ended, true) {
            let end = self.seal(writing.records, &mut []);
            writing.left.extend(end);
            // A peer that does not get the end reports a cut.
            let _ = self.flush(&mut writing);
        }
        self.inner.finish_writing();
    }

    fn stop_reading(&self) {
        self.inner.stop_reading();
    }

    fn close(&self) {
        self.inner.close();
    }
}
