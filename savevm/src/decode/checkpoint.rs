//! What follows a stream of COLO.

use super::{Decoder, DecoderOptions, State};

impl Decoder {
    /// A decoder for a part of a COLO checkpoint, which starts at `offset` of a connection whose stream is over: the
    /// end of section `ram` with the memory that has changed, or the device sections. Either ends as a stream does.
    /// Sections and RAM blocks are those of `self`, the decoder of the part before or of the stream.
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
    /// stream.ram_setup([RamBlock::new("pc.ram".try_into()?, 0x2000)])?;
    /// stream.zero_page(BlockId(0), 0)?;
    /// let (bytes, mut decoder, mut at) = (stream.take(), Decoder::new(DecoderOptions::default()), 0);
    /// while let Step::Event { consumed, .. } = decoder.next(&bytes[at..])? {
    ///     at += consumed;
    /// }
    /// // The end of section 2: a page of zeroes in the block of the page before.
    /// let memory = b"\x03\0\0\0\x02\0\0\0\0\0\0\x10\x22\0";
    /// let mut checkpoint = decoder.checkpoint(at as u64 + 8);
    /// let Step::Event { consumed, .. } = checkpoint.next(memory)? else { panic!("no section") };
    /// let Step::Event { event, .. } = checkpoint.next(&memory[consumed..])? else { panic!("no page") };
    /// assert!(matches!(event, Event::Ram(RamRecord::Zero(page)) if page.offset == 0x1000));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn checkpoint(&self, offset: u64) -> Decoder {
        let options = DecoderOptions { offset, allow_trailing: true, vmdesc: false, ..self.options.clone() };
        Decoder {
            pages: self.pages,
            footers: self.footers,
            sections: self.sections.after_end(),
            ram: self.ram.clone(),
            advised_page_sizes: self.advised_page_sizes,
            hash_table_entries: self.hash_table_entries,
            totals: self.totals.detached(),
            ..Self::with_state(options, State::Item)
        }
    }
}
