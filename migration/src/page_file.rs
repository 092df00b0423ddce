//! Files in which every page has its place (capability `mapped-ram`, QEMU 9.0), here or at a page server.

use super::atomic_page_set::AtomicPageSet;
use super::channel::{ReadSlice, WriteSlice};
use super::core::source::Sent;
use super::multifd::Counts;
use super::page_server::PageServer;
use super::zero::is_zero;
use super::{Guest, GuestError, LoadError, MigrationError, PAGE_SIZE, RamView};
use qevm_multifd::mapped_ram::{FileRun, PageArea};
use qevm_savevm::mapped_ram::{MappedBlock, PageBitmap};
use qevm_wire::{CountedString, Located, PageGeometry};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};
use std::thread;
use vm_memory::VolatileSlice;

/// A file whose pages are read and written where they belong, straight from and into guest memory, by any thread. The
/// stream goes over a channel that shares the file's position.
#[derive(Debug, Clone)]
pub(crate) enum PageFile {
    /// A file of this host.
    Local {
        /// The file.
        file: Arc<File>,
        /// The same for pages, where that is another: past the page cache (parameter `direct-io`).
        pages: Arc<File>,
    },
    /// One at a page server, which is read and not written.
    Served(Arc<PageServer>),
}

impl PageFile {
    pub(crate) fn new(file: File, direct: Option<File>) -> Self {
        let file = Arc::new(file);
        PageFile::Local { pages: direct.map_or_else(|| file.clone(), Arc::new), file }
    }

    /// Where the stream is in the file.
    pub(crate) fn position(&self) -> io::Result<u64> {
        match self {
            PageFile::Local { file, .. } => (&**file).stream_position(),
            PageFile::Served(server) => Ok(server.position()),
        }
    }

    /// Lets the stream go on there.
    pub(crate) fn seek(&self, position: u64) -> io::Result<()> {
        match self {
            PageFile::Local { file, .. } => (&**file).seek(SeekFrom::Start(position)).map(drop),
            PageFile::Served(server) => {
                server.seek(position);
                Ok(())
            }
        }
    }

    /// Length in bytes, where that can be known: not of a device.
    fn len(&self) -> io::Result<Option<u64>> {
        match self {
            PageFile::Local { file, .. } => {
                let metadata = file.metadata()?;
                Ok(metadata.is_file().then_some(metadata.len()))
            }
            PageFile::Served(server) => server.len().map(Some),
        }
    }

    /// Fills `bytes` from the file, by way of the page cache.
    pub(crate) fn read_bytes(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            PageFile::Local { file, .. } => file.read_exact_at(bytes, at),
            PageFile::Served(server) => server.read_at(bytes, at),
        }
    }

    fn write_bytes(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        match self {
            PageFile::Local { file, .. } => file.write_all_at(bytes, at),
            PageFile::Served(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn write_page_run(&self, memory: &VolatileSlice<'_>, mut at: u64) -> io::Result<()> {
        let PageFile::Local { pages, .. } = self else { return Err(io::ErrorKind::Unsupported.into()) };
        let mut part = WriteSlice::guest(memory);
        while !part.is_empty() {
            let offset = file_offset(at)?;
            // SAFETY: `WriteSlice` is a transparent iovec whose memory lives as long as its lifetime says; the kernel
            // only reads it.
            let written = unsafe { libc::pwritev(pages.as_raw_fd(), (&raw const part).cast(), 1, offset) };
            match usize::try_from(written) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    part = part.skip(written);
                    at += written as u64;
                }
                Err(_) => repeat(io::Error::last_os_error())?,
            }
        }
        Ok(())
    }

    fn read_page_run(&self, memory: &VolatileSlice<'_>, mut at: u64) -> io::Result<()> {
        let pages = match self {
            PageFile::Local { pages, .. } => pages,
            PageFile::Served(server) => return read_served(server, memory, at),
        };
        let mut part = ReadSlice::guest(memory);
        while !part.is_empty() {
            let offset = file_offset(at)?;
            // SAFETY: `ReadSlice` is a transparent iovec over guest memory, which is open to changes at any time.
            let read = unsafe { libc::preadv(pages.as_raw_fd(), (&raw mut part).cast(), 1, offset) };
            match usize::try_from(read) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    part.advance(read);
                    at += read as u64;
                }
                Err(_) => repeat(io::Error::last_os_error())?,
            }
        }
        Ok(())
    }
}

/// Bytes that are read from a page server at a time on their way into guest memory.
const SERVED_READ: usize = 1 << 20;

fn read_served(server: &PageServer, memory: &VolatileSlice<'_>, mut at: u64) -> io::Result<()> {
    let mut bytes = vec![0; memory.len().min(SERVED_READ)];
    let mut part = ReadSlice::guest(memory);
    while !part.is_empty() {
        let count = part.len().min(bytes.len());
        server.read_at(&mut bytes[..count], at)?;
        part.fill(&bytes[..count]);
        part.advance(count);
        at += count as u64;
    }
    Ok(())
}

fn file_offset(at: u64) -> io::Result<libc::off_t> {
    at.try_into().map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

fn repeat(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) }
}

/// Pages on their way into a file.
#[derive(Debug)]
pub(crate) struct Saving {
    pub(crate) file: PageFile,
    /// Pages of zeroes are looked for, and become holes.
    pub(crate) holes: bool,
    blocks: OnceLock<Vec<Place>>,
}

#[derive(Debug)]
struct Place {
    layout: MappedBlock,
    /// Pages that are in the file and are not zero.
    present: AtomicPageSet,
}

impl Saving {
    pub(crate) fn new(file: PageFile, holes: bool) -> Self {
        Saving { file, holes, blocks: OnceLock::new() }
    }

    /// Says where the blocks are, in the order of the guest's.
    pub(crate) fn lay_out(&self, layouts: Vec<MappedBlock>) {
        let place = |layout: MappedBlock| Place { present: AtomicPageSet::new(layout.pages(), false), layout };
        // There is one list in a migration.
        let _ = self.blocks.set(layouts.into_iter().map(place).collect());
    }

    /// Writes pages of a block, those at `offsets`, to their places. The same pages are not written elsewhere
    /// meanwhile.
    pub(crate) fn save(&self, block: usize, view: &RamView<'_>, offsets: &[u64]) -> Result<Counts, MigrationError> {
        let place = self.blocks.get().and_then(|blocks| blocks.get(block)).ok_or(MigrationError::ChannelsEnded)?;
        let pages = PageGeometry::X86;
        let mut normal = Vec::with_capacity(offsets.len());
        for &offset in offsets {
            if self.holes && is_zero(&part(view, offset, pages.size())?) {
                let page = pages.index(offset);
                place.present.clear(page..page + 1);
            } else {
                normal.push(offset);
            }
        }
        let unplaced = || MigrationError::guest("place a RAM block in a file")("it does not fit".into());
        let area = PageArea::new(place.layout.header.pages_offset, place.layout.used_length, pages);
        let runs = area.ok_or_else(unplaced)?.writes(&normal).map_err(|_| unplaced())?;
        for FileRun { file_offset, block_offset, len } in runs {
            self.file
                .write_page_run(&part(view, block_offset, len)?, file_offset)
                .map_err(|source| MigrationError::Send { doing: "pages to their places in the file", source })?;
            place.present.mark(pages.index(block_offset)..pages.index(block_offset + len));
        }
        let normal = normal.len() as u64;
        let zero = offsets.len() as u64 - normal;
        Ok(Counts { bytes: normal * pages.size(), normal, zero, copied: 0 })
    }

    /// Writes copies of pages of a block, from `offset` on, to their places.
    pub(crate) fn save_copy(&self, block: usize, offset: u64, copied: &[u8]) -> Result<Sent, MigrationError> {
        let place = self.blocks.get().and_then(|blocks| blocks.get(block)).ok_or(MigrationError::ChannelsEnded)?;
        let mut sent = Sent::default();
        for (at, content) in (offset..).step_by(PAGE_SIZE as usize).zip(copied.chunks(PAGE_SIZE as usize)) {
            if self.holes && content.iter().all(|byte| *byte == 0) {
                sent.zero += 1;
                continue;
            }
            self.file
                .write_bytes(content, place.layout.header.pages_offset + at)
                .map_err(|source| MigrationError::Send { doing: "pages to their places in the file", source })?;
            place.present.mark(at / PAGE_SIZE..at / PAGE_SIZE + 1);
            sent.normal += 1;
        }
        sent.bytes = sent.normal * PAGE_SIZE;
        Ok(sent)
    }

    /// Writes which pages are there, when all are, and says how many bytes that took.
    pub(crate) fn finish(&self) -> Result<u64, MigrationError> {
        let mut bytes = 0;
        for place in self.blocks.get().into_iter().flatten() {
            let bitmap = place.present.to_bytes();
            self.file
                .write_bytes(&bitmap, place.layout.header.bitmap_offset)
                .map_err(|source| MigrationError::Send { doing: "the bitmap of a RAM block", source })?;
            bytes += bitmap.len() as u64;
        }
        Ok(bytes)
    }
}

/// Pages that one thread reads at least.
const SHARE: u64 = 4 << 20;

/// Which pages of a block are in the file, all of them within it.
pub(crate) fn present(file: &PageFile, layout: &MappedBlock) -> Result<PageBitmap, Located<LoadError>> {
    let header = layout.header;
    let at = |offset| move |error: LoadError| Located::new(error, offset);
    // The block's length is that of the guest's own, so this is an eighth of a byte for each page that there is.
    let mut bitmap = vec![0; layout.bitmap_len() as usize];
    file.read_bytes(&mut bitmap, header.bitmap_offset)
        .map_err(failed("read the bitmap of a RAM block", header.bitmap_offset))?;
    let present = PageBitmap::from_bytes(bitmap, layout.pages());
    let present = present.map_err(LoadError::from).map_err(at(header.bitmap_offset))?;
    if let Some(len) = file.len().map_err(failed("measure the file", header.pages_offset))? {
        layout.check_file_len(&present, len).map_err(LoadError::from).map_err(at(len))?;
    }
    Ok(present)
}

fn failed(doing: &'static str, offset: u64) -> impl Fn(io::Error) -> Located<LoadError> {
    move |source| Located::new(LoadError::File { doing, source }, offset)
}

/// Reads the pages of a block into guest memory with up to `threads` threads, and says how many bytes of pages that
/// were. Pages that are not in the file are zero.
pub(crate) fn load(
    file: &PageFile,
    layout: &MappedBlock,
    guest: &dyn Guest,
    name: &CountedString,
    written: &AtomicPageSet,
    threads: u8,
) -> Result<u64, Located<LoadError>> {
    let header = layout.header;
    let at = |offset| move |error: LoadError| Located::new(error, offset);
    let present = present(file, layout)?;
    let unplaced = || at(header.pages_offset)(LoadError::Devices("the block does not fit".into()));
    let view = || guest.ram().into_iter().find(|view| *name == *view.name).ok_or_else(unplaced);
    clear_absent(layout, &present, &view()?, written).map_err(LoadError::Devices).map_err(at(header.pages_offset))?;
    let area = PageArea::new(header.pages_offset, layout.used_length, PageGeometry::X86).ok_or_else(unplaced)?;
    let threads = threads.clamp(1, u8::try_from((layout.used_length / SHARE).max(1)).unwrap_or(u8::MAX));
    let read_share = |thread: u8| -> Result<(), Located<LoadError>> {
        let view = view()?;
        for FileRun { file_offset, block_offset, len } in area.reads(present.as_bytes(), area.share(thread, threads)) {
            let memory = part(&view, block_offset, len);
            let memory = memory.map_err(|error| at(file_offset)(LoadError::Devices(error.into())))?;
            written.mark(PageGeometry::X86.index(block_offset)..PageGeometry::X86.index(block_offset + len));
            file.read_page_run(&memory, file_offset).map_err(failed("read pages", file_offset))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let readers: Vec<_> = (1..threads)
            .map(|thread| {
                scope.spawn({
                    let read_share = &read_share;
                    move || read_share(thread)
                })
            })
            .collect();
        let mut result = read_share(0);
        for reader in readers {
            let read = reader.join().unwrap_or_else(|_| Err(unplaced()));
            result = result.and(read);
        }
        result
    })?;
    Ok(present.count() * PageGeometry::X86.size())
}

/// Clears what the guest has in its memory already, such as its firmware, where the file has nothing.
fn clear_absent(
    layout: &MappedBlock,
    present: &PageBitmap,
    view: &RamView<'_>,
    written: &AtomicPageSet,
) -> Result<(), GuestError> {
    for page in (0..layout.pages()).filter(|page| written.contains(*page) && !present.contains(*page)) {
        let memory = part(view, page * PageGeometry::X86.size(), PageGeometry::X86.size())?;
        if !is_zero(&memory) {
            memory.copy_from(&super::zero::ZERO_PAGE);
        }
    }
    Ok(())
}

fn part<'g>(view: &RamView<'g>, offset: u64, len: u64) -> Result<VolatileSlice<'g>, MigrationError> {
    view.memory
        .subslice(offset as usize, len as usize)
        .map_err(|error| MigrationError::Guest { doing: "reach a page of guest memory", source: error.into() })
}
