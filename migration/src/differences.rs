//! Pages as differences to what was sent of them before (capability `xbzrle`).
//!
//! What the destination has of a page is what was sent of it last. So a page of a running guest is copied first; the
//! copy is compared with what was sent, and is what goes out and what is remembered. Nothing is remembered of the first
//! pass, in which every page goes: from the second on only those come that the guest writes to.

use super::channel::{WriteSlice, write_all};
use super::core::source::{Batch, DifferencePass, Sent};
use super::ram_sender::RamSender;
use super::{Channel, GuestError, MigrationError, XbzrleStatistics};
use qevm_savevm::StreamWriter;
use qevm_savevm::ram::BlockId;
use qevm_savevm::xbzrle::{Cache, Outcome};
use qevm_wire::PageGeometry;
use std::time::Duration;
use vm_memory::{Bytes, VolatileSlice};

/// The least time over which rates are measured.
const PERIOD: Duration = Duration::from_secs(1);

/// What was sent of pages, and how much that has saved.
pub(crate) struct Differences {
    cache: Cache,
    pages: PageGeometry,
    /// Where each block begins, in one numbering of all.
    starts: Vec<u64>,
    page: Vec<u8>,
    difference: Vec<u8>,
    /// The size that the operator last wanted of the cache.
    wanted: u64,
    statistics: XbzrleStatistics,
    /// Pages of every kind that came here.
    seen: u64,
    /// The pass, and what there was when the period began that rates are measured over.
    pass: u64,
    before: Before,
}

#[derive(Default)]
struct Before {
    at: Duration,
    seen: u64,
    statistics: XbzrleStatistics,
}

impl Differences {
    /// For blocks of these lengths, with a cache of `size` bytes.
    pub(crate) fn new(
        lengths: impl Iterator<Item = u64>,
        size: u64,
        pages: PageGeometry,
    ) -> Result<Self, MigrationError> {
        let starts = lengths.scan(0u64, |end, length| Some(std::mem::replace(end, end.saturating_add(length))));
        Ok(Differences {
            cache: cache(size, pages).map_err(MigrationError::guest("remember what is sent of pages"))?,
            pages,
            starts: starts.collect(),
            page: vec![0; pages.size() as usize],
            difference: Vec::new(),
            wanted: size,
            statistics: XbzrleStatistics { cache_size: size, ..XbzrleStatistics::default() },
            seen: 0,
            pass: 0,
            before: Before::default(),
        })
    }

    pub(crate) fn statistics(&self) -> XbzrleStatistics {
        self.statistics
    }

    /// The cache is to have this many bytes from now on. Of another size it begins anew.
    pub(crate) fn resize(&mut self, size: u64) {
        if std::mem::replace(&mut self.wanted, size) == size {
            return;
        }
        match cache(size, self.pages) {
            Ok(cache) => (self.cache, self.statistics.cache_size) = (cache, size),
            Err(error) => tracing::warn!("the cache of what was sent of pages keeps its size: {error}"),
        }
    }

    /// Sends a batch after what `stream` holds already. Nothing is left in `stream`.
    pub(crate) fn send(
        &mut self,
        ram: &RamSender<'_>,
        channel: &dyn Channel,
        stream: &mut StreamWriter,
        (batch, pass): (&Batch, DifferencePass),
        now: Duration,
    ) -> Result<Sent, MigrationError> {
        self.begin_pass(pass, now);
        let mut sent = Sent::default();
        for run in &batch.runs {
            for number in run.pages.clone() {
                let offset = number * self.pages.size();
                self.add(stream, (run.block, offset), &ram.page(run.block, offset)?, pass, &mut sent)?;
            }
        }
        sent.bytes = stream.bytes().len() as u64;
        write_all(channel, &mut [WriteSlice::bytes(stream.bytes())])
            .map_err(|source| MigrationError::Send { doing: "pages", source })?;
        stream.clear();
        Ok(sent)
    }

    /// Adds what is to be sent of a page to the stream.
    fn add(
        &mut self,
        stream: &mut StreamWriter,
        (block, offset): (usize, u64),
        memory: &VolatileSlice<'_>,
        pass: DifferencePass,
        sent: &mut Sent,
    ) -> Result<(), MigrationError> {
        memory
            .read_slice(&mut self.page, 0)
            .map_err(|error| MigrationError::guest("read guest memory")(error.into()))?;
        let id = BlockId(block as u32);
        let address = self.starts.get(block).copied().unwrap_or_default().saturating_add(offset);
        self.seen += 1;
        if self.page.iter().all(|byte| *byte == 0) {
            self.cache.zero_page(address, pass.number);
            stream.zero_page(id, offset)?;
            sent.zero += 1;
            return Ok(());
        }
        match self.cache.page(address, &self.page, pass.number, pass.last, &mut self.difference) {
            Outcome::Unchanged => {
                self.statistics.pages += 1;
                sent.differences += 1;
            }
            Outcome::Difference => {
                stream.xbzrle_page(id, offset, &self.difference)?;
                self.statistics.pages += 1;
                self.statistics.bytes += HEADER + self.difference.len() as u64;
                sent.differences += 1;
            }
            outcome => {
                if outcome == Outcome::Overflow {
                    self.statistics.overflow += 1;
                    self.statistics.bytes += self.pages.size();
                } else {
                    self.statistics.cache_miss += 1;
                }
                stream.page_header(id, offset)?;
                stream.payload(&self.page)?;
                sent.normal += 1;
            }
        }
        Ok(())
    }

    /// At the beginning of a pass, rates are reckoned of what came since they were last, if that is long enough ago.
    fn begin_pass(&mut self, pass: DifferencePass, now: Duration) {
        if std::mem::replace(&mut self.pass, pass.number) == pass.number || now.saturating_sub(self.before.at) < PERIOD
        {
            return;
        }
        let part = |new: u64, of: u64| if of == 0 { 0.0 } else { new as f64 / of as f64 };
        let (total, before) = (self.statistics, &self.before.statistics);
        let whole = (total.pages - before.pages) * self.pages.size();
        self.statistics.cache_miss_rate = part(total.cache_miss - before.cache_miss, self.seen - self.before.seen);
        self.statistics.encoding_rate = part(whole, total.bytes - before.bytes);
        self.before = Before { at: now, seen: self.seen, statistics: self.statistics };
    }
}

/// What counts of a record beside its data: the encoding, and how long they are.
const HEADER: u64 = 3;

fn cache(size: u64, pages: PageGeometry) -> Result<Cache, GuestError> {
    Cache::new(size, pages).map_err(Into::into)
}

#[cfg(test)]
mod tests;
