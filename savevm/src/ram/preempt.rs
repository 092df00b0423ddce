//! The second channel of `postcopy-preempt`.

use super::decode::RecordContext;
use super::{ListWords, RamBlocks, RamError, RamReader, RamRecord};
use crate::{Error, ErrorKind, PayloadKind, Step};
use qevm_wire::{Cursor, Decode, Limits, Located, PageGeometry};
use std::sync::Arc;

/// Reads the channel on which a source with capability `postcopy-preempt` (7.1) sends the pages that the destination
/// asked for: bare ZERO and PAGE records, without header, sections and footers.
///
/// It ends when the source shuts the connection down, or with EOS if the source is a 7.1 or 7.2, or one that has
/// `migration.x-preempt-pre-7-2=on`. It has no CONTINUE state in common with the main channel.
///
/// ```
/// use qevm_savevm::{Step, ram::{PreemptDecoder, RamBlock, RamBlocks, RamRecord}};
/// use qevm_wire::{CountedString, Decode, PageGeometry};
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
    cursor: Cursor<PayloadKind>,
    ended: bool,
}

impl PreemptDecoder {
    /// A decoder for a channel that carries pages of `blocks`, the list of the main channel.
    pub fn new(blocks: Arc<RamBlocks>, pages: PageGeometry) -> Self {
        PreemptDecoder {
            ram: RamReader::new(blocks),
            pages,
            limits: Limits::default(),
            cursor: Cursor::default(),
            ended: false,
        }
    }
}

impl Decode for PreemptDecoder {
    type Event<'a> = RamRecord<'a>;
    type Payload = PayloadKind;
    type Kind = ErrorKind;

    fn next<'a>(&mut self, input: &'a [u8]) -> Result<Step<RamRecord<'a>, PayloadKind>, Error> {
        let at_end = self.cursor.has_ended();
        if let Some(step) = self.cursor.pending(input.len() as u64, at_end) {
            return step.map_err(|error: Error| error.within("preempt channel"));
        }
        if self.ended || at_end && input.is_empty() {
            return Ok(Step::End);
        }
        let context = RecordContext {
            pages: self.pages,
            limits: &self.limits,
            words: ListWords::default(),
            start: false,
            postcopy: true,
            at_end,
        };
        let mut reader = crate::Reader::at(input, self.cursor.offset());
        match self.ram.record(&mut reader, &context) {
            Ok((RamRecord::MultifdFlush, _)) => {
                let found = super::flag::MULTIFD_FLUSH;
                Err(Located::new(RamError::InPostcopy { found }.into(), self.cursor.offset()).within("preempt channel"))
            }
            Ok((record, payload)) => {
                self.cursor.move_to(reader.offset());
                if let RamRecord::Page(page) = &record {
                    self.cursor.expect(payload, PayloadKind::Page { block: page.block, offset: page.offset });
                }
                self.ended = record == RamRecord::EndOfSection;
                Ok(Step::Event { consumed: reader.position(), event: record })
            }
            Err(error) => match self.cursor.need_more(&error, at_end) {
                Some(at_least) => Ok(Step::NeedMore { at_least }),
                None => Err(error.within("preempt channel")),
            },
        }
    }

    fn payload_remaining(&self) -> u64 {
        self.cursor.payload()
    }

    fn payload_of(&self) -> Option<&PayloadKind> {
        self.cursor.payload_of()
    }

    fn skip_payload(&mut self, count: u64) -> Result<(), Error> {
        self.cursor.skip(count)
    }

    fn end_of_input(&mut self) {
        self.cursor.end();
    }

    fn offset(&self) -> u64 {
        self.cursor.offset()
    }
}
