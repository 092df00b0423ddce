//! From RAM records to bytes.

use super::{BlockId, PageAt, RamBlocks, RamError, RamRecord, XBZRLE_ENCODING, flag};
use qevm_wire::{Located, PageGeometry, WireError, Writer};

/// Writes one record; its payload, if it has one, is the caller's to write after it.
pub(crate) fn encode<K: From<WireError> + From<RamError>>(
    record: &RamRecord<'_>,
    blocks: &mut RamBlocks,
    current: &mut Option<BlockId>,
    pages: PageGeometry,
    writer: &mut Writer,
) -> Result<(), Located<K>> {
    let at = writer.len() as u64;
    let mut page_word = |page: &PageAt, kind: u64, writer: &mut Writer| -> Result<(), Located<K>> {
        let block = blocks.known(page.block, at)?;
        let (offset, used_length) = (page.offset, block.used_length);
        if offset >= used_length {
            return Err(Located::new(RamError::OutsideBlock { offset, used_length }.into(), at));
        }
        aligned(offset, pages, at)?;
        if page.named {
            writer.be64(offset | kind).counted_string(&block.name);
        } else if *current == Some(page.block) {
            writer.be64(offset | kind | flag::CONTINUE);
        } else {
            return Err(Located::new(RamError::ContinueElsewhere.into(), at));
        }
        *current = Some(page.block);
        Ok(())
    };
    match record {
        RamRecord::Page(page) => page_word(page, flag::PAGE, writer)?,
        RamRecord::Zero(page) => {
            page_word(page, flag::ZERO, writer)?;
            writer.u8(0);
        }
        RamRecord::Xbzrle { page, data } => {
            let found = u16::try_from(data.len()).unwrap_or(u16::MAX);
            if data.len() as u64 > pages.size() || data.len() > u16::MAX.into() {
                return Err(Located::new(RamError::XbzrleLength { found, max: pages.size() }.into(), at));
            }
            page_word(page, flag::XBZRLE, writer)?;
            writer.u8(XBZRLE_ENCODING).be16(found).bytes(data);
        }
        RamRecord::Compressed { page, data } => {
            let length = u32::try_from(data.len()).map_err(|_| {
                let (found, max) = (data.len() as u64, u32::MAX.into());
                Located::new(WireError::TooLong { what: "compressed page length", found, max }.into(), at)
            })?;
            page_word(page, flag::COMPRESS_PAGE, writer)?;
            writer.be32(length).bytes(data);
        }
        RamRecord::MultifdFlush => drop(writer.be64(flag::MULTIFD_FLUSH)),
        RamRecord::EndOfSection => drop(writer.be64(flag::EOS)),
        RamRecord::MemSize { total } => {
            aligned(*total, pages, at)?;
            writer.be64(total | flag::MEM_SIZE);
            blocks.clear();
            *current = None;
        }
        RamRecord::EndOfBlocks => {}
        RamRecord::Block(block) => {
            blocks.push(block.clone()).map_err(|kind| Located::new(kind.into(), at))?;
            writer.counted_string(&block.name).be64(block.used_length);
            block.page_size.map(|size| writer.be64(size).len());
            block.address.map(|address| writer.be64(address).len());
            if let Some(header) = &block.mapped_ram {
                header.encode(writer);
            }
        }
    }
    Ok(())
}

fn aligned<K: From<RamError>>(found: u64, pages: PageGeometry, at: u64) -> Result<(), Located<K>> {
    match pages.split(found) {
        (_, 0) => Ok(()),
        _ => Err(Located::new(RamError::Unaligned { found, page_size: pages.size() }.into(), at)),
    }
}
