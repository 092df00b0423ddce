//! Reads dumps in the kdump-compressed format, and compares two of the same guest. `docs/format/kdump.md` has the
//! offsets.

use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;

const FLAT: &[u8] = b"makedumpfile\0\0\0\0";
const FLAT_HEADER: usize = 4096;
const SIGNATURE: &[u8] = b"KDUMP   ";
const MACHINE: Range<usize> = 272..337;
const ZLIB: u64 = 1;
const ZSTD: u64 = 0x20;

/// Where the content of a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    offset: u64,
    len: u64,
    compression: u64,
}

/// A dump in memory.
#[derive(Debug)]
pub(super) struct Dump {
    bytes: Vec<u8>,
    big_endian: bool,
    wide: bool,
    frame_size: usize,
    /// Where the notes start and end.
    notes: (usize, usize),
    /// By the number of the page.
    pages: BTreeMap<u64, Place>,
}

/// What is alike in two dumps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Alike {
    pub(super) pages: usize,
    /// Pages that the judge alone has.
    pub(super) more: usize,
}

impl Dump {
    /// Of the bytes of a file, be it the flat form or not.
    pub(super) fn read(bytes: Vec<u8>) -> Result<Dump> {
        let bytes = if bytes.starts_with(FLAT) { unfold(&bytes)? } else { bytes };
        ensure!(bytes.len() > 8192 && bytes.starts_with(SIGNATURE), "this is no dump");
        let mut dump =
            Dump { big_endian: bytes[8] == 0, wide: true, frame_size: 0, notes: (0, 0), pages: BTreeMap::new(), bytes };
        ensure!(dump.number(8, 4)? == 6, "this is not version 6");
        // Where 64-bit dumps have the way of compression and the bytes of a block, others have small counts and zeroes.
        dump.wide = [ZLIB, ZSTD].contains(&dump.number(424, 4)?) && dump.number(428, 4)? >= 4096;
        let blocks = if dump.wide { 428 } else { 416 };
        let [frame_size, second, bitmaps] = [0, 4, 8].map(|field| dump.number(blocks + field, 4));
        let (frame_size, second, bitmaps) = (frame_size? as usize, second? as usize, bitmaps? as usize);
        dump.frame_size = frame_size;
        ensure!(frame_size.is_power_of_two() && frame_size >= 4096, "blocks of {frame_size} bytes");
        let (notes, word) = if dump.wide { (0x30, 8) } else { (0x20, 4) };
        let start = dump.number(frame_size + notes, 8)? as usize;
        dump.notes = (start, start + dump.number(frame_size + notes + 8, word)? as usize);
        let first = (1 + second) * frame_size;
        ensure!(dump.notes.1 <= first, "the notes reach into the bitmaps");
        let half = bitmaps / 2 * frame_size;
        let descriptors = first + 2 * half;
        ensure!(dump.part(first, half)? == dump.part(first + half, half)?, "pages are left out");
        let mut at = descriptors;
        for bit in 0..half * 8 {
            if dump.bytes[first + bit / 8] >> (bit % 8) & 1 == 0 {
                continue;
            }
            let [offset, len, compression, more] =
                [(0, 8), (8, 4), (12, 4), (16, 8)].map(|(field, len)| dump.number(at + field, len));
            ensure!(more? == 0, "page {bit:#x} has flags");
            dump.pages.insert(bit as u64, Place { offset: offset?, len: len?, compression: compression? });
            at += 24;
        }
        dump.judge_counts(bitmaps)?;
        dump.judge_contents(at as u64)?;
        Ok(dump)
    }

    fn part(&self, at: usize, len: usize) -> Result<&[u8]> {
        let end = at.checked_add(len).context("an offset beyond all files")?;
        self.bytes.get(at..end).with_context(|| format!("the dump ends before {end}"))
    }

    fn number(&self, at: usize, len: usize) -> Result<u64> {
        let bytes = self.part(at, len)?;
        let shift_in = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
        Ok(if self.big_endian { bytes.iter().fold(0, shift_in) } else { bytes.iter().rev().fold(0, shift_in) })
    }

    /// Offsets of what the last page decides: the bitmaps' length and the end in both headers.
    fn counts(&self) -> [(usize, usize); 3] {
        let (blocks, end) = if self.wide { (436, 96) } else { (424, 72) };
        [(blocks, 4), (blocks + 4, 4), (self.frame_size + end, 8)]
    }

    fn judge_counts(&self, bitmaps: usize) -> Result<()> {
        let end = self.pages.last_key_value().map_or(0, |(page, _)| page + 1);
        let blocks = 2 * (end as usize).div_ceil(8).div_ceil(self.frame_size);
        ensure!(bitmaps == blocks, "{bitmaps} blocks of bitmaps for {end:#x} pages");
        for (at, len) in &self.counts()[1..] {
            ensure!(self.number(*at, *len)? == end, "the end is not {end:#x}, the last page's");
        }
        Ok(())
    }

    /// Contents follow one another: a page of zeroes that all such pages have, then each of the others in order.
    fn judge_contents(&self, start: u64) -> Result<()> {
        let size = self.frame_size as u64;
        let zeroes = Place { offset: start, len: size, compression: 0 };
        ensure!(self.content(&zeroes)?.iter().all(|byte| *byte == 0), "the first content is not zero");
        let mut end = start + size;
        for (page, place) in self.pages.iter().filter(|(_, place)| **place != zeroes) {
            ensure!(place.offset == end, "page {page:#x} is at {:#x}, and not at {end:#x}", place.offset);
            ensure!((place.len < size) == (place.compression != 0), "page {page:#x} takes {} bytes", place.len);
            end += place.len;
        }
        ensure!(end == self.bytes.len() as u64, "the contents end at {end:#x}, the file does not");
        Ok(())
    }

    fn content(&self, place: &Place) -> Result<Vec<u8>> {
        let (content, mut page) = (self.part(place.offset as usize, place.len as usize)?, Vec::new());
        match place.compression {
            0 => page.extend_from_slice(content),
            ZLIB => drop(flate2::read::ZlibDecoder::new(content).read_to_end(&mut page)?),
            ZSTD => page = zstd::decode_all(content)?,
            other => bail!("a page is compressed in way {other:#x}"),
        }
        ensure!(page.len() == self.frame_size, "a page of {} bytes", page.len());
        Ok(page)
    }

    /// Holds `ours` against this one, a judge's. Pages in `apart` (addresses) may have other contents; the judge may
    /// have more pages, if `more` allows their address. `notes`: they are to be the same, too.
    pub(super) fn judge(
        &self,
        ours: &Dump,
        apart: &Range<u64>,
        more: impl Fn(u64) -> bool,
        notes: bool,
    ) -> Result<Alike> {
        let headers = [self, ours].map(|dump| {
            let mut bytes = dump.bytes[..if notes { dump.notes.1 } else { dump.notes.0 }].to_vec();
            // Newer releases do not tell the machine.
            if self.bytes[MACHINE].starts_with(b"Unknown\0") {
                bytes[MACHINE].fill(0);
            }
            // zstd is not a judge's.
            bytes[if dump.wide { 424 } else { 412 }..][..4].fill(0);
            if self.pages.keys().last() != ours.pages.keys().last() {
                dump.counts().iter().for_each(|(at, len)| bytes[*at..at + len].fill(0));
            }
            bytes
        });
        let differs = headers[0].iter().zip(&headers[1]).position(|(theirs, ours)| theirs != ours);
        ensure!(differs.is_none() && headers[0].len() == headers[1].len(), "the headers differ at {differs:?}");
        let address = |page: &u64| page * self.frame_size as u64;
        for (page, ours_at) in &ours.pages {
            let theirs_at = self.pages.get(page).with_context(|| format!("the judge has no page {page:#x}"))?;
            let same = || Ok::<_, anyhow::Error>(self.content(theirs_at)? == ours.content(ours_at)?);
            ensure!(apart.contains(&address(page)) || same()?, "page {page:#x} differs");
        }
        let alone: Vec<&u64> = self.pages.keys().filter(|page| !ours.pages.contains_key(page)).collect();
        if let Some(page) = alone.iter().find(|page| !more(address(page))) {
            bail!("page {page:#x} is missing");
        }
        Ok(Alike { pages: ours.pages.len(), more: alone.len() })
    }
}

/// The file that the flat form tells of.
fn unfold(flat: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| -> Result<u64> {
        let bytes = flat.get(at..at + 8).context("the flat form is cut")?;
        Ok(u64::from_be_bytes(bytes.try_into()?))
    };
    let (mut file, mut at) = (Vec::new(), FLAT_HEADER);
    loop {
        let (offset, len) = (word(at)?, word(at + 8)?);
        if offset == u64::MAX {
            return Ok(file);
        }
        let (offset, len) = (offset as usize, len as usize);
        let piece = flat.get(at + 16..).and_then(|rest| rest.get(..len)).context("the flat form is cut")?;
        ensure!(offset < 1 << 40, "a piece at {offset:#x}");
        file.resize(file.len().max(offset + len), 0);
        file[offset..offset + len].copy_from_slice(piece);
        at += 16 + len;
    }
}
