//! A decoder that is told what is being written, so that its writer learns what it would refuse.

use super::{Decoder, DecoderOptions, Package, State};
use crate::event::PayloadKind;
use crate::ram::{PageAt, RamBlock, RamReader};

impl Decoder {
    /// A decoder for the content of a package that is not in the stream yet, whose end only its writer knows.
    pub(crate) fn unbounded_package(&self) -> Decoder {
        let depth = self.package.map_or(0, |package| package.depth).saturating_add(1);
        let mut package = Decoder {
            pages: self.pages,
            footers: self.footers,
            sections: self.sections.nested(),
            ram: RamReader::new(self.ram.blocks.clone()),
            advised_page_sizes: self.advised_page_sizes,
            package: Some(Package { start: 0, end: u64::MAX, depth }),
            ..Self::with_state(DecoderOptions { offset: 0, ..self.options.clone() }, State::Item)
        };
        package.cursor.end();
        package
    }

    /// Takes the record of `page`, `len` bytes long, unless none may come here; what is left of the payload before it
    /// is taken for read.
    #[inline]
    pub(crate) fn takes_page(&mut self, page: &PageAt, len: u64, payload: bool) -> bool {
        if self.state != State::Ram || !self.ram.takes_page(self.options.mapped_ram) {
            return false;
        }
        self.ram.pass_end_of_blocks();
        self.ram.current = Some(page.block);
        self.cursor.move_to(self.cursor.offset().saturating_add(self.cursor.payload()).saturating_add(len));
        let of = PayloadKind::Page { block: page.block, offset: page.offset };
        self.expect_payload(if payload { self.pages.size() } else { 0 }, of);
        true
    }

    /// Takes the entry of `block`, `len` bytes long, where only what follows can tell which optional words it has.
    /// False if [`next`](qevm_wire::Decode::next) is to tell, which then knows of the words that follow from
    /// capabilities: not every stream tells these.
    pub(crate) fn takes_block(&mut self, block: &RamBlock, len: u64) -> bool {
        self.options.mapped_ram |= block.mapped_ram.is_some();
        self.options.x_ignore_shared |= block.address.is_some();
        let doubtful = self.advised_page_sizes != 0 && block.mapped_ram.is_none();
        if !doubtful || self.state != State::Ram || !self.ram.takes_block(block, self.pages) {
            return false;
        }
        self.cursor.move_to(self.cursor.offset().saturating_add(len));
        true
    }

    /// Does without the event for the end of the block list, if that is what is due.
    pub(crate) fn pass_end_of_blocks(&mut self) {
        self.ram.pass_end_of_blocks();
    }
}
