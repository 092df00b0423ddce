//! Pages that are written to a stream as they come, while they come in order.

use crate::failure::Elsewhere;
use qevm_savevm::StreamWriter;
use qevm_savevm::ram::BlockId;
use std::fs::File;
use std::io::{self, Write};

/// Bytes that are gathered before they are written.
const CHUNK: usize = 64 << 10;

/// Writes the pages of a plain stream each time one comes. A stream has each page once, in the order of the blocks:
/// with the first page that comes again or late, this ends, and the memory is read once more when all of it came.
#[derive(Debug)]
pub struct OrderedCopy {
    file: File,
    /// As errors call the file.
    name: String,
    stream: StreamWriter,
    /// What precedes the pages.
    front: Vec<u8>,
    page_size: u64,
    sent: u64,
    /// Block and offset in it, before which no page may come.
    next: (usize, u64),
    is_in_order: bool,
}

/// The pages of all blocks, written.
#[derive(Debug)]
pub(crate) struct Ordered {
    /// Writes what follows the pages. What it holds is not in the file yet.
    pub(crate) stream: StreamWriter,
    /// What precedes the pages.
    pub(crate) front: Vec<u8>,
    /// Bytes that are written.
    pub(crate) sent: u64,
}

impl OrderedCopy {
    /// Copies to `file`, which is called `name` in errors and is empty up to now, in pages of `page_size` bytes.
    /// `stream` has written what precedes the pages.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn new(file: &File, name: &str, stream: StreamWriter, page_size: u64) -> io::Result<Self> {
        let (file, name, front) = (file.try_clone()?, name.to_owned(), stream.bytes().to_vec());
        Ok(OrderedCopy { file, name, stream, front, page_size, sent: 0, next: (0, 0), is_in_order: true })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// A page comes, with its content; `None` for zeroes.
    pub(super) fn page(&mut self, block: usize, offset: u64, content: Option<&[u8]>) -> io::Result<()> {
        if !self.comes_in_order(block, offset) {
            return Ok(());
        }
        self.next = (block, offset + self.page_size);
        let (id, stream) = (BlockId(block as u32), &mut self.stream);
        let written = match content {
            Some(content) => stream.page_header(id, offset).and_then(|()| stream.payload(content)),
            None => stream.zero_page(id, offset),
        };
        // Whoever writes the memory later says what is wrong.
        self.is_in_order = written.is_ok();
        if self.stream.bytes().len() < CHUNK {
            return Ok(());
        }
        let bytes = self.stream.bytes();
        self.file.write_all(bytes).map_err(|error| Elsewhere::failed(&self.name, self.sent, error))?;
        self.sent += bytes.len() as u64;
        self.stream.clear();
        Ok(())
    }

    /// False, from now on, if what happens to this page is to come before what was written.
    pub(super) fn comes_in_order(&mut self, block: usize, offset: u64) -> bool {
        self.is_in_order &= (block, offset) >= self.next;
        self.is_in_order
    }

    /// What was written, if all pages came in order.
    pub(super) fn finish(self) -> Option<Ordered> {
        let OrderedCopy { stream, front, sent, .. } = self;
        self.is_in_order.then_some(Ordered { stream, front, sent })
    }
}
