//! From bytes to RAM records.

use super::{BlockId, MappedRamHeader, PageAt, RamBlock, RamBlocks, RamError, RamRecord, XBZRLE_ENCODING, flag};
use crate::{Error, Reader};
use qevm_wire::{Limits, Located, PageGeometry, Within};
use std::sync::Arc;

/// What a stream of RAM records needs to remember: one for each channel that carries some.
#[derive(Debug, Clone)]
pub(crate) struct RamReader {
    pub(crate) blocks: Arc<RamBlocks>,
    /// Block of the last page record; survives the ends of sections.
    pub(crate) current: Option<BlockId>,
    /// Bytes that the blocks to come in the list sum up to; 0 where its end is to be told, `None` outside the list.
    list_left: Option<u64>,
    total: u64,
}

/// Which optional words the entries of the block list have.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ListWords {
    /// The page sizes that blocks have according to POSTCOPY_ADVISE (bitwise or), or 0 without one.
    pub(crate) page_sizes: u64,
    pub(crate) address: bool,
    pub(crate) mapped_ram: bool,
}

/// What decides which records are legal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RecordContext<'l> {
    pub(crate) pages: PageGeometry,
    pub(crate) limits: &'l Limits,
    pub(crate) words: ListWords,
    /// The section is a START.
    pub(crate) start: bool,
    /// The guest runs at the destination.
    pub(crate) postcopy: bool,
    /// No input comes after that of the reader.
    pub(crate) at_end: bool,
}

impl RamReader {
    pub(crate) fn new(blocks: Arc<RamBlocks>) -> Self {
        RamReader { blocks, current: None, list_left: None, total: 0 }
    }

    /// Whether a page may come next.
    pub(crate) fn takes_page(&self, mapped_ram: bool) -> bool {
        !mapped_ram && self.list_left.is_none_or(|left| left == 0)
    }

    /// Takes an entry of the list, unless none may come next.
    pub(crate) fn takes_block(&mut self, block: &RamBlock, pages: PageGeometry) -> bool {
        let left = self.list_left.filter(|left| *left > 0).and_then(|left| left.checked_sub(block.used_length));
        if left.is_none() || pages.count(block.used_length).is_none() {
            return false;
        }
        let listed = Arc::make_mut(&mut self.blocks).push(block.clone()).is_ok();
        self.list_left = if listed { left } else { self.list_left };
        listed
    }

    /// Does without the event for the end of the list, if that is what is due.
    pub(crate) fn pass_end_of_blocks(&mut self) {
        self.list_left = self.list_left.filter(|left| *left > 0);
    }

    /// Reads one record and says how many bytes of payload follow it. Changes `self` only on success.
    pub(crate) fn record<'a>(
        &mut self,
        reader: &mut Reader<'a>,
        context: &RecordContext<'_>,
    ) -> Result<(RamRecord<'a>, u64), Error> {
        match self.list_left {
            Some(0) => {
                self.list_left = None;
                Ok((RamRecord::EndOfBlocks, 0))
            }
            Some(left) => self.list_entry(reader, context, left),
            None => self.plain_record(reader, context),
        }
    }

    #[inline]
    fn plain_record<'a>(
        &mut self,
        reader: &mut Reader<'a>,
        context: &RecordContext<'_>,
    ) -> Result<(RamRecord<'a>, u64), Error> {
        let at = reader.offset();
        let word = reader.be64()?;
        let (offset, flags) = context.pages.split(word);
        let kind = flags & !flag::CONTINUE;
        if kind == flag::PAGE {
            let page = self.page(reader, context, at, offset, flags)?;
            self.current = Some(page.block);
            return Ok((RamRecord::Page(page), context.pages.size()));
        }
        if kind == flag::ZERO {
            // An idle guest is made of these.
            let page = self.page(reader, context, at, offset, flags)?;
            let at = reader.offset();
            let fill = reader.u8().map_err(|error| error.within(self.blocks.path(page.block)))?;
            if fill != 0 {
                let error = Located::new(RamError::Fill { found: fill }.into(), at);
                return Err(error.within(self.blocks.path(page.block)));
            }
            self.current = Some(page.block);
            return Ok((RamRecord::Zero(page), 0));
        }
        let record = match kind {
            flag::XBZRLE | flag::COMPRESS_PAGE => {
                let page = self.page(reader, context, at, offset, flags)?;
                let record = small_page(reader, context, kind, page).within(|| self.blocks.path(page.block))?;
                self.current = Some(page.block);
                record
            }
            flag::HOOK => return Err(Located::new(RamError::Hook.into(), at)),
            flag::MEM_SIZE if flags == kind => return self.list_start(at, offset, context),
            flag::EOS | flag::MULTIFD_FLUSH if flags == kind => {
                if offset != 0 {
                    return Err(Located::new(RamError::StrayAddress { found: word }.into(), at));
                }
                match kind {
                    flag::EOS => RamRecord::EndOfSection,
                    _ if context.words.mapped_ram => {
                        return Err(Located::new(RamError::InMappedRam { found: flags }.into(), at));
                    }
                    _ => RamRecord::MultifdFlush,
                }
            }
            _ => return Err(Located::new(RamError::Flags { found: flags }.into(), at)),
        };
        Ok((record, 0))
    }

    /// Reads the block name, if there is one, and checks that the page is in the block.
    #[inline]
    fn page(
        &self,
        reader: &mut Reader<'_>,
        context: &RecordContext<'_>,
        at: u64,
        offset: u64,
        flags: u64,
    ) -> Result<PageAt, Error> {
        let kind = flags & !flag::CONTINUE;
        if context.words.mapped_ram {
            return Err(Located::new(RamError::InMappedRam { found: flags }.into(), at));
        }
        if context.postcopy && !matches!(kind, flag::ZERO | flag::PAGE) {
            return Err(Located::new(RamError::InPostcopy { found: flags }.into(), at));
        }
        let named = flags & flag::CONTINUE == 0;
        let block = if named { Some(self.named_block(reader)?) } else { self.current };
        let Some(block) = block else {
            return Err(Located::new(RamError::ContinueWithoutBlock.into(), at));
        };
        let used_length = self.blocks.known(block, at)?.used_length;
        // Blocks are whole pages, so a page that starts inside also ends inside.
        if offset >= used_length {
            let error = Located::new(RamError::OutsideBlock { offset, used_length }.into(), at);
            return Err(error.within(self.blocks.path(block)));
        }
        Ok(PageAt { block, offset, named })
    }

    fn named_block(&self, reader: &mut Reader<'_>) -> Result<BlockId, Error> {
        let at = reader.offset();
        let mut name = reader.clone();
        let bytes = reader.counted_bytes()?;
        match self.blocks.find(bytes) {
            Some(block) => Ok(block),
            None => {
                let name = name.counted_string("RAM block name")?;
                Err(Located::new(RamError::UnknownBlock { name }.into(), at))
            }
        }
    }

    fn list_start<'a>(
        &mut self,
        at: u64,
        total: u64,
        context: &RecordContext<'_>,
    ) -> Result<(RamRecord<'a>, u64), Error> {
        if !context.start {
            return Err(Located::new(RamError::UnexpectedList.into(), at));
        }
        self.blocks = Arc::default();
        self.current = None;
        self.total = total;
        self.list_left = Some(total);
        Ok((RamRecord::MemSize { total }, 0))
    }

    fn list_entry<'a>(
        &mut self,
        reader: &mut Reader<'a>,
        context: &RecordContext<'_>,
        left: u64,
    ) -> Result<(RamRecord<'a>, u64), Error> {
        let at = reader.offset();
        let name = reader.counted_string("RAM block name")?;
        let path = || format!("block '{name}'");
        reader.within_limit("RAM block count", self.blocks.len() as u64 + 1, context.limits.ram_blocks).within(path)?;
        let length_at = reader.offset();
        let length_error = |kind: RamError| Located::new(kind.into(), length_at).within(path());
        let used_length = reader.clone().be64()?;
        reader.within_limit("RAM block length", used_length, context.limits.ram_block_len).within(path)?;
        reader.be64()?;
        if context.pages.count(used_length).is_none() {
            let page_size = context.pages.size();
            return Err(length_error(RamError::PartialPage { found: used_length, page_size }));
        }
        let Some(left) = left.checked_sub(used_length) else {
            let found = (self.total - left).saturating_add(used_length);
            return Err(length_error(RamError::ListSum { found, total: self.total }));
        };
        let page_size = page_size_word(reader, context)?;
        let address = if context.words.address { Some(reader.be64()?) } else { None };
        let mapped_ram = if context.words.mapped_ram {
            Some(MappedRamHeader::decode(reader, used_length, context.pages, address.is_some()).within(path)?)
        } else {
            None
        };
        let payload = mapped_ram.and_then(|header| header.gap(reader.offset(), used_length)).unwrap_or(0);
        let block = RamBlock { name, used_length, page_size, address, mapped_ram };
        Arc::make_mut(&mut self.blocks).push(block.clone()).map_err(|kind| Located::new(kind.into(), at))?;
        self.list_left = Some(left);
        Ok((RamRecord::Block(block), payload))
    }
}

/// The forms of a page that are handed out whole.
fn small_page<'a>(
    reader: &mut Reader<'a>,
    context: &RecordContext<'_>,
    kind: u64,
    page: PageAt,
) -> Result<RamRecord<'a>, Error> {
    match kind {
        flag::XBZRLE => {
            let at = reader.offset();
            let found = reader.u8()?;
            if found != XBZRLE_ENCODING {
                return Err(Located::new(RamError::XbzrleEncoding { found }.into(), at));
            }
            let (found, max) = (reader.be16()?, context.pages.size());
            if u64::from(found) > max {
                return Err(Located::new(RamError::XbzrleLength { found, max }.into(), at + 1));
            }
            Ok(RamRecord::Xbzrle { page, data: reader.take(found.into())? })
        }
        _ => {
            let length = reader.clone().be32()?;
            reader.within_limit("compressed page length", length.into(), context.limits.compressed)?;
            reader.be32()?;
            Ok(RamRecord::Compressed { page, data: reader.take(length.into())? })
        }
    }
}

/// Reads the page size of a block, if it is there.
///
/// With `postcopy-ram` the source puts this word after the length of each block whose page size is not the default of
/// *its host*, which the stream does not tell. But what can be there instead starts with a byte that the word cannot
/// start with, or has low bits set that the word cannot have:
///
/// * the name of the next block starts with its length, which is not 0, and a page size starts with a 0 byte;
/// * after the last block a record follows, whose word has flags, and a page size has none;
/// * an address (`x-ignore-shared`) looks like a page size only if it is one. Then the 8 bytes after decide: an
///   address follows a page size, and is aligned to pages; a name or a record follows an address, and is not.
fn page_size_word(reader: &mut Reader<'_>, context: &RecordContext<'_>) -> Result<Option<u64>, Error> {
    let words = context.words;
    if words.page_sizes == 0 || context.at_end && reader.remaining() < 8 {
        return Ok(None);
    }
    let mut ahead = reader.clone();
    if ahead.clone().u8()? != 0 {
        return Ok(None);
    }
    let word = ahead.be64()?;
    if !word.is_power_of_two() || word & words.page_sizes == 0 {
        return Ok(None);
    }
    if words.address && (ahead.clone().u8()? != 0 || context.pages.split(ahead.be64()?).1 != 0) {
        return Ok(None);
    }
    reader.be64().map(Some)
}
