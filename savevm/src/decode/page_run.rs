//! Pages by the run.

use super::Decoder;
use crate::event::PayloadKind;
use crate::ram::flag;

/// Bytes of a record in front of its page: offset and flags.
const WORD: usize = 8;

impl Decoder {
    /// Passes over the records at the front of `input` that hold, whole, the page of the present RAM block at byte
    /// `next` and those that follow it, and gives how many pages that are. Each takes eight bytes and those of the
    /// page.
    ///
    /// [`next`](qevm_wire::Decode::next) gives the same pages one by one, with more work for each. Everything else is
    /// left to it: other records, a page that is cut, and what is wrong.
    ///
    /// ```
    /// use qevm_savevm::framing::SectionHeader;
    /// use qevm_savevm::ram::{BlockId, RamBlock, RamRecord};
    /// use qevm_savevm::{Decoder, DecoderOptions, Event, StreamWriter};
    /// use qevm_wire::{Decode, Step};
    ///
    /// let mut stream = StreamWriter::default();
    /// stream.header(None)?;
    /// stream.section_start(&SectionHeader::new(2, "ram".try_into()?, 4))?;
    /// stream.ram_setup([RamBlock::new("pc.ram".try_into()?, 0x4000)])?;
    /// (0..4).try_for_each(|page| stream.page(BlockId(0), page << 12, &[1; 4096]))?;
    /// let (bytes, mut decoder, mut at) = (stream.take(), Decoder::new(DecoderOptions::default()), 0);
    /// while at < bytes.len() {
    ///     let Step::Event { consumed, event } = decoder.next(&bytes[at..])? else { break };
    ///     at += consumed;
    ///     if let Event::Ram(RamRecord::Page(page)) = event {
    ///         decoder.skip_payload(4096)?;
    ///         at += 4096;
    ///         let pages = decoder.take_pages(page.offset + 4096, &bytes[at..]);
    ///         assert_eq!(pages, 3);
    ///         at += 3 * (8 + 4096);
    ///     }
    /// }
    /// assert_eq!(at, bytes.len());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn take_pages(&mut self, next: u64, input: &[u8]) -> u64 {
        let size = self.pages.size();
        let Some(block) = self.ram.current.filter(|_| self.expects_page() && next.is_multiple_of(size)) else {
            return 0;
        };
        let Some(used_length) = self.ram.blocks.get(block).map(|block| block.used_length) else { return 0 };
        let records = self.bounded(input).0.chunks_exact(WORD + size as usize);
        let expected = (next..used_length).step_by(size as usize).map(|offset| offset | flag::PAGE | flag::CONTINUE);
        let pages = records.zip(expected).take_while(|(record, word)| record.starts_with(&word.to_be_bytes())).count();
        if let Some(last) = (pages as u64).checked_sub(1) {
            self.cursor.move_to(self.cursor.offset() + (pages * (WORD + size as usize)) as u64);
            self.cursor.expect(0, PayloadKind::Page { block, offset: next + last * size });
        }
        pages as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::framing::SectionHeader;
    use crate::ram::{BlockId, PageAt, RamBlock, RamRecord};
    use crate::{DecoderOptions, Event, StreamWriter};
    use proptest::prelude::*;
    use qevm_wire::{Decode, Step};

    const PAGE: usize = 4096;

    fn stream(pages: &[(u32, u64, u8)]) -> Vec<u8> {
        let mut stream = StreamWriter::default();
        stream.header(None).unwrap();
        stream.section_start(&SectionHeader::new(2, "ram".try_into().unwrap(), 4)).unwrap();
        let blocks = ["a", "b"].map(|name| RamBlock::new(name.try_into().unwrap(), 16 * PAGE as u64));
        stream.ram_setup(blocks).unwrap();
        for (block, page, content) in pages {
            stream.page(BlockId(*block), page << 12, &[*content; PAGE]).unwrap();
        }
        stream.take()
    }

    /// Pages with content in `bytes`, and where reading them ended; `window` bytes are shown to take runs from.
    fn read(bytes: &[u8], window: Option<usize>) -> (Vec<(PageAt, u8)>, u64, Option<PayloadKind>) {
        let (mut decoder, mut at, mut pages) = (Decoder::new(DecoderOptions::default()), 0, Vec::new());
        while let Ok(Step::Event { consumed, event }) = decoder.next(&bytes[at..]) {
            at += consumed;
            let Event::Ram(RamRecord::Page(page)) = event else { continue };
            if decoder.skip_payload(PAGE as u64).is_err() || at + PAGE > bytes.len() {
                break;
            }
            pages.push((PageAt { named: false, ..page }, bytes[at]));
            at += PAGE;
            let Some(window) = window else { continue };
            let shown = &bytes[at..bytes.len().min(at + window)];
            let first = page.offset + PAGE as u64;
            for n in 0..decoder.take_pages(first, shown) {
                pages.push((PageAt { offset: first + n * PAGE as u64, named: false, ..page }, bytes[at + WORD]));
                at += WORD + PAGE;
            }
        }
        (pages, decoder.offset(), decoder.payload_of().cloned())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn runs_are_what_records_are(
            pages in prop::collection::vec((0..2u32, 0..16u64, prop_oneof![Just(0u8), 1..9u8]), 0..12),
            run in (0..2u32, 0..8u64, 1..9u64),
            window in 0..40_000usize,
            cut in 0..5000usize,
        ) {
            let (block, first, count) = run;
            let mut all: Vec<_> = (first..first + count).map(|page| (block, page, 1 + page as u8)).collect();
            all.extend(pages);
            let bytes = stream(&all);
            let bytes = &bytes[..bytes.len().saturating_sub(cut)];
            prop_assert_eq!(read(bytes, Some(window)), read(bytes, None));
        }
    }

    #[test]
    fn what_is_no_next_page_is_left() {
        let bytes = stream(&[(0, 0, 1), (0, 1, 2)]);
        let start = bytes.len() - 2 * PAGE - WORD;
        let at_first = || {
            let (mut decoder, mut at) = (Decoder::new(DecoderOptions::default()), 0);
            while at < start {
                let Ok(Step::Event { consumed, .. }) = decoder.next(&bytes[at..]) else { panic!("no event") };
                at += consumed;
            }
            decoder
        };
        let record = &bytes[start + PAGE..];
        // Its page is still to come; then another place, one that is no page's, half of it, and itself.
        assert_eq!(at_first().take_pages(4096, record), 0);
        let mut decoder = at_first();
        decoder.skip_payload(PAGE as u64).unwrap();
        for (next, input) in [(8192, record), (4096 + 8, record), (4096, &record[..record.len() - 1]), (4096, &[])] {
            assert_eq!((decoder.take_pages(next, input), decoder.offset()), (0, (start + PAGE) as u64), "{next}");
        }
        assert_eq!((decoder.take_pages(4096, record), decoder.offset()), (1, bytes.len() as u64));
        // Nothing is outside of a block.
        let mut outside = record.to_vec();
        outside[..WORD].copy_from_slice(&(0x10000 | flag::PAGE | flag::CONTINUE).to_be_bytes());
        assert_eq!(decoder.take_pages(0x10000, &outside), 0);
    }
}
