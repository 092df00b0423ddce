//! The reading end of a channel: a buffer for records, and a way past it for pages.

use super::channel::ReadSlice;
use super::page_file::PageFile;
use super::zero::ZERO_PAGE;
use super::{Channel, MigrationError};
use std::collections::VecDeque;
use std::io;
use vm_memory::{Bytes, VolatileSlice};

/// Bytes that were read and not used yet.
pub(crate) struct StreamReader<'c> {
    channel: &'c dyn Channel,
    /// Pages that lie in their places already, with the records before them, which are used first.
    prefetched: VecDeque<Prefetched<'c>>,
    /// The record of a prefetched page was used, and this many bytes of the page are there.
    begun: Option<usize>,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Where the next byte to use is.
    offset: u64,
    received: u64,
}

/// A page that is likely to be next.
pub(crate) struct Expected<'c> {
    /// The record before it.
    pub(crate) record: Record,
    /// Where it goes. Nothing but zeroes is there.
    pub(crate) memory: VolatileSlice<'c>,
}

/// The record before a page of the same block as the page before.
pub(crate) type Record = [u8; 8];

/// Most pages that are expected at a time: as many as arrive at once.
pub(crate) const MOST_EXPECTED: usize = 31;

/// An expected page, and what has come in its place.
struct Prefetched<'c> {
    expected: Expected<'c>,
    /// What came as the record, and how much of it.
    record: Record,
    record_len: usize,
    /// How much of the page came.
    page_len: usize,
}

impl Prefetched<'_> {
    fn is_as_expected(&self) -> bool {
        self.record_len == self.record.len() && self.record == self.expected.record
    }
}

/// Room of the buffer at first: enough for the records of many small pages, little enough for a second-level cache.
const ROOM: usize = 128 << 10;

impl<'c> StreamReader<'c> {
    /// `first` is what was read from the channel already. Bytes are counted from `offset` on.
    pub(crate) fn new(channel: &'c dyn Channel, first: &[u8], offset: u64) -> Self {
        let mut buffer = first.to_vec();
        buffer.resize(first.len().max(ROOM), 0);
        let received = offset + first.len() as u64;
        StreamReader {
            channel,
            prefetched: VecDeque::new(),
            begun: None,
            buffer,
            start: 0,
            end: first.len(),
            offset,
            received,
        }
    }

    /// What has arrived and is not used; or, if a page is in its place already, the record before it alone.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.prefetched.front().map_or(&self.buffer[self.start..self.end], |page| &page.record)
    }

    /// Where the next byte to use is: this many bytes were used so far, and lie in front of the stream in its file.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Leaves everything out up to byte `offset`, which is not beyond what is here or what the file has.
    pub(crate) fn jump(&mut self, offset: u64, file: &PageFile) -> Result<(), MigrationError> {
        let distance = offset.saturating_sub(self.offset());
        match usize::try_from(distance).ok().filter(|distance| *distance <= self.bytes().len()) {
            Some(distance) => self.consume(distance),
            None => {
                file.seek(offset).map_err(|source| MigrationError::Receive { offset: self.received, source })?;
                (self.start, self.end, self.offset, self.received) = (0, 0, offset, offset);
            }
        }
        Ok(())
    }

    /// Uses up the first `count` bytes; of a page that is in its place already, the record before it.
    pub(crate) fn consume(&mut self, count: usize) {
        self.offset += count.min(self.bytes().len()) as u64;
        match self.prefetched.pop_front() {
            Some(page) => self.begun = Some(page.page_len),
            None => self.start = (self.start + count).min(self.end),
        }
    }

    /// Reads until at least `at_least` bytes are there; false if the peer closed before.
    pub(crate) fn fill(&mut self, at_least: usize) -> Result<bool, MigrationError> {
        if !self.prefetched.is_empty() {
            // There is the whole record of a page, and nothing else to come before the page.
            return Ok(false);
        }
        if self.start > 0 {
            // Moving bytes to where they are would still touch all of them, at every read of a long section.
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        while self.end < at_least {
            if self.end == self.buffer.len() {
                // Grows as data arrives, not as the peer promises; and by all of its length, for a search for the
                // end of a section asks for one byte more at a time.
                self.buffer.resize(2 * self.buffer.len(), 0);
            }
            let room = &mut self.buffer[self.end..];
            match read(self.channel, &mut [ReadSlice::bytes(room)], self.received)? {
                0 => return Ok(false),
                count => {
                    self.end += count;
                    self.received += count as u64;
                }
            }
        }
        Ok(true)
    }

    /// Moves the next bytes into all of `memory`: those that are in the buffer from there, the others straight from the
    /// channel, together with as much as comes after them. Pages that `expect` names and that do come next lie in their
    /// places then. False if the peer closed before.
    pub(crate) fn read_into(
        &mut self,
        memory: &VolatileSlice<'_>,
        expect: impl Fn() -> Vec<Expected<'c>>,
    ) -> Result<bool, MigrationError> {
        let mut done = match self.begun.take() {
            Some(arrived) => arrived,
            None => {
                let buffered = self.bytes().len().min(memory.len());
                // The slice is at least that long.
                memory.write_slice(&self.buffer[self.start..self.start + buffered], 0).map_err(unreachable_memory)?;
                self.start += buffered;
                buffered
            }
        };
        while done < memory.len() {
            (self.start, self.end) = (0, 0);
            let rest = memory.offset(done).map_err(unreachable_memory)?;
            let expected = expect();
            let mut records = [Record::default(); MOST_EXPECTED];
            let mut targets = Vec::with_capacity(2 * MOST_EXPECTED + 2);
            targets.push(ReadSlice::guest(&rest));
            for (record, page) in records.iter_mut().zip(&expected) {
                targets.extend([ReadSlice::bytes(record), ReadSlice::guest(&page.memory)]);
            }
            targets.push(ReadSlice::bytes(&mut self.buffer));
            let count = match read(self.channel, &mut targets, self.received)? {
                0 => return Ok(false),
                count => count,
            };
            self.received += count as u64;
            let direct = count.min(rest.len());
            done += direct;
            self.settle_prefetch(expected, &records, count - direct)?;
        }
        self.offset += memory.len() as u64;
        Ok(true)
    }

    /// This many bytes have come into the places of `expected` and, after them, the buffer. Pages that came as expected
    /// stay; all that is after the first that did not goes to the buffer, and its places are cleared.
    fn settle_prefetch(
        &mut self,
        expected: Vec<Expected<'c>>,
        records: &[Record],
        mut count: usize,
    ) -> Result<(), MigrationError> {
        let mut take = |most: usize| {
            let taken = count.min(most);
            count -= taken;
            taken
        };
        let mut stray = Vec::new();
        for (expected, record) in expected.into_iter().zip(records) {
            let (record_len, page_len) = (take(record.len()), take(expected.memory.len()));
            let page = Prefetched { expected, record: *record, record_len, page_len };
            match page.is_as_expected() && stray.is_empty() {
                true => self.prefetched.push_back(page),
                false => stray.push(page),
            }
        }
        let moved: usize = stray.iter().map(|page| page.record_len + page.page_len).sum();
        self.end = moved + count;
        if moved == 0 {
            return Ok(());
        }
        self.buffer.resize(self.end.max(self.buffer.len()), 0);
        self.buffer.copy_within(..count, moved);
        let mut room = &mut self.buffer[..moved];
        for page in stray {
            let (record, behind) = room.split_at_mut(page.record_len);
            record.copy_from_slice(&page.record[..page.record_len]);
            let (content, behind) = behind.split_at_mut(page.page_len);
            let memory = &page.expected.memory;
            memory.read_slice(content, 0).map_err(unreachable_memory)?;
            memory.write_slice(&ZERO_PAGE[..page.page_len], 0).map_err(unreachable_memory)?;
            room = behind;
        }
        Ok(())
    }
}

fn unreachable_memory(error: vm_memory::VolatileMemoryError) -> MigrationError {
    MigrationError::Guest { doing: "write guest memory", source: error.into() }
}

fn read(channel: &dyn Channel, targets: &mut [ReadSlice<'_>], offset: u64) -> Result<usize, MigrationError> {
    loop {
        match channel.read(targets) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(MigrationError::Receive { offset, source }),
            Ok(count) => return Ok(count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WriteSlice;
    use parking_lot::Mutex;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const PAGE: usize = ZERO_PAGE.len();
    const PAGES: usize = 40;

    /// A file: gives all there is room for, and counts the reads.
    #[derive(Debug)]
    struct Counted {
        left: AtomicUsize,
        reads: AtomicUsize,
    }

    impl Channel for Counted {
        fn read(&self, parts: &mut [ReadSlice<'_>]) -> io::Result<usize> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            let count = self.left.load(Ordering::Relaxed).min(parts.iter().map(ReadSlice::len).sum());
            self.left.fetch_sub(count, Ordering::Relaxed);
            Ok(count)
        }
        fn write(&self, _: &[WriteSlice<'_>]) -> io::Result<usize> {
            Ok(0)
        }
        fn finish_writing(&self) {}
        fn stop_reading(&self) {}
        fn close(&self) {}
    }

    /// Who looks for the end of a section whose length the wire does not tell asks for one byte more than there is,
    /// again and again.
    #[test]
    fn a_long_section_takes_few_reads() {
        const MIB: usize = 1 << 20;
        let channel = Counted { left: (16 * MIB).into(), reads: 0.into() };
        let mut reader = StreamReader::new(&channel, &[], 0);
        while reader.bytes().len() < 16 * MIB {
            assert!(reader.fill(reader.bytes().len() + 1).unwrap());
            assert!(channel.reads.load(Ordering::Relaxed) < 16 * 100, "{} bytes are here", reader.bytes().len());
        }
        assert!(reader.buffer.len() <= 2 * 16 * MIB, "{}", reader.buffer.len());
        assert!(!reader.fill(16 * MIB + 1).unwrap());
    }

    /// Gives a stream in pieces of these lengths, over and over.
    #[derive(Debug)]
    struct Pieces(Mutex<(Vec<u8>, VecDeque<usize>)>);

    impl Channel for Pieces {
        fn read(&self, parts: &mut [ReadSlice<'_>]) -> io::Result<usize> {
            let (stream, lengths) = &mut *self.0.lock();
            lengths.rotate_left(1);
            let length = lengths[0].min(stream.len()).min(parts.iter().map(ReadSlice::len).sum());
            let mut piece = &stream[..length];
            for part in parts {
                part.fill(piece);
                piece = &piece[part.len().min(piece.len())..];
            }
            stream.drain(..length);
            Ok(length)
        }
        fn write(&self, _: &[WriteSlice<'_>]) -> io::Result<usize> {
            Ok(0)
        }
        fn finish_writing(&self) {}
        fn stop_reading(&self) {}
        fn close(&self) {}
    }

    fn record(page: usize) -> Record {
        (page as u64).to_be_bytes()
    }

    proptest! {
        /// Pages in any order, in any pieces, with any number of them expected to go on in order, arrive as without
        /// expectations.
        #[test]
        fn pages_arrive_whatever_was_expected(
            pages in prop::collection::vec((0..PAGES, 1u8..), 1..60),
            lengths in prop::collection::vec(1usize..60_000, 1..6),
            ahead in 0usize..12,
        ) {
            let mut stream = Vec::new();
            let (mut sent, mut written) = (vec![0; PAGES * PAGE], [false; PAGES]);
            for (page, fill) in &pages {
                stream.extend(record(*page));
                stream.extend([*fill; PAGE]);
                sent[page * PAGE..][..PAGE].fill(*fill);
            }
            let total = stream.len() as u64;
            let channel = Pieces(Mutex::new((stream, lengths.into())));
            let mut arrived = vec![0; PAGES * PAGE];
            let memory = VolatileSlice::from(&mut arrived[..]);
            let place = |page: usize| memory.subslice(page * PAGE, PAGE).unwrap();
            let mut reader = StreamReader::new(&channel, &[], 0);
            for (page, _) in &pages {
                if reader.bytes().len() < 8 {
                    prop_assert!(reader.fill(8).unwrap());
                }
                prop_assert_eq!(&reader.bytes()[..8], &record(*page));
                reader.consume(8);
                written[*page] = true;
                let expect = || (page + 1..PAGES).take(ahead).take_while(|page| !written[*page])
                    .map(|page| Expected { record: record(page), memory: place(page) }).collect();
                prop_assert!(reader.read_into(&place(*page), expect).unwrap());
            }
            prop_assert_eq!(reader.offset(), total);
            prop_assert!(!reader.fill(1).unwrap());
            prop_assert!(arrived == sent);
        }
    }
}
