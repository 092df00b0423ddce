//! The second channel of `postcopy-preempt`.

use super::{ListWords, RamBlocks, RamError, RamReader, RamRecord, decode::RecordContext};
use crate::{Error, ErrorKind, Step};
use qevm_wire::{Limits, Located, PageGeometry, WireError};
use std::sync::Arc;

/// Reads the channel on which a source with capability `postcopy-preempt` (7.1) sends the pages that the destination
/// asked for: bare ZERO and PAGE records, without header, sections and footers.
///
/// It ends when the source shuts the connection down, or with EOS if the source is a 7.1 or 7.2, or one that has
/// `migration.x-preempt-pre-7-2=on`. It has no CONTINUE state in common with the main channel.
///
/// ```
/// use qevm_savevm::{Step, ram::{PreemptDecoder, RamBlock, RamBlocks, RamRecord}};
/// use qevm_wire::{CountedString, PageGeometry};
/// use std::sync::Arc;
///
/// let mut blocks = RamBlocks::default();
/// blocks.push(RamBlock::new(CountedString::new(b"pc.ram").unwrap(), 0x8000)).unwrap();
/// let mut decoder = PreemptDecoder::new(Arc::new(blocks), PageGeometry::X86);
/// let step = decoder.next(b"\0\0\0\0\0\0\x30\x08\x06pc.ram")?;
/// let Step::Event { consumed: 15, event: RamRecord::Page(page) } = step else { panic!("{step:?}") };
/// assert_eq!(page.offset, 0x3000);
/// assert_eq!(decoder.payload_remaining(), 4096); // the page is next on the channel
/// # Ok::<(), qevm_savevm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct PreemptDecoder {
    ram: RamReader,
    pages: PageGeometry,
    limits: Limits,
    offset: u64,
    payload: u64,
    input_ended: bool,
    ended: bool,
}

impl PreemptDecoder {
    /// A decoder for a channel that carries pages of `blocks`, the list of the main channel.
    pub fn new(blocks: Arc<RamBlocks>, pages: PageGeometry) -> Self {
        PreemptDecoder {
            ram: RamReader::new(blocks),
            pages,
            limits: Limits::default(),
            offset: 0,
            payload: 0,
            input_ended: false,
            ended: false,
        }
    }

    /// Bytes of the current page that were not skipped yet.
    pub fn payload_remaining(&self) -> u64 {
        self.payload
    }

    /// Says that `count` bytes of the page were taken from the channel.
    ///
    /// # Errors
    /// [`StreamError::SkipTooFar`](crate::StreamError::SkipTooFar) if that is more than remain.
    pub fn skip_payload(&mut self, count: u64) -> Result<(), Error> {
        crate::decode::skip(&mut self.payload, &mut self.offset, count)
    }

    /// Says that no byte follows those that were shown.
    pub fn end_of_input(&mut self) {
        self.input_ended = true;
    }

    /// The next record at the front of `input`; see [`Decoder::next`](crate::Decoder::next).
    ///
    /// # Errors
    /// As the main channel's; [`RamError::InPostcopy`] for all records but ZERO, PAGE and EOS.
    pub fn next<'a>(&mut self, input: &'a [u8]) -> Result<Step<RamRecord<'a>>, Error> {
        if self.payload > 0 {
            if self.input_ended && (input.len() as u64) < self.payload {
                let kind = WireError::Truncated { needed: self.payload, available: input.len() as u64 };
                return Err(Located::new(kind.into(), self.offset));
            }
            return Ok(Step::Payload { remaining: self.payload });
        }
        if self.ended || self.input_ended && input.is_empty() {
            return Ok(Step::End);
        }
        let context = RecordContext {
            pages: self.pages,
            limits: &self.limits,
            words: ListWords::default(),
            start: false,
            postcopy: true,
            at_end: self.input_ended,
        };
        let mut reader = crate::Reader::at(input, self.offset);
        match self.ram.record(&mut reader, &context) {
            Ok((RamRecord::MultifdFlush, _)) => {
                let found = super::flag::MULTIFD_FLUSH;
                Err(Located::new(RamError::InPostcopy { found }.into(), self.offset))
            }
            Ok((record, payload)) => {
                self.payload = payload;
                self.offset = reader.offset();
                self.ended = record == RamRecord::EndOfSection;
                Ok(Step::Event { consumed: reader.position(), event: record })
            }
            Err(Located { kind: ErrorKind::Wire(WireError::Truncated { needed, .. }), offset, .. })
                if !self.input_ended =>
            {
                Ok(Step::NeedMore { at_least: (offset - self.offset + needed) as usize })
            }
            Err(error) => Err(error.within("preempt channel")),
        }
    }
}
