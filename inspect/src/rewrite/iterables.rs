//! Iterable sections beside `ram` that can be rewritten: what they said on the way is said once more, in one go.

use super::unwritable::cannot_write;
use crate::failure::Error;
use qevm_savevm::framing::{Content, SectionHeader};
use qevm_savevm::hash_table::HashTableRecord;
use qevm_savevm::storage_attributes::StorageAttributesRecord;
use qevm_savevm::{Event, StreamWriter};

/// An iterable section that is not memory.
#[derive(Debug)]
pub(super) struct Iterable {
    pub(super) header: SectionHeader,
    state: State,
}

#[derive(Debug)]
enum State {
    HashTable { size: Option<u32>, chunks: Records<HashTableRecord> },
    StorageAttributes { attributes: Records<StorageAttributesRecord> },
}

/// Records in the order in which they came, each with its payload.
#[derive(Debug)]
struct Records<R> {
    records: Vec<(R, usize)>,
    payload: Vec<u8>,
}

impl<R: Copy> Records<R> {
    fn new() -> Self {
        Records { records: Vec::new(), payload: Vec::new() }
    }

    fn push(&mut self, record: R) {
        self.records.push((record, 0));
    }

    fn payload(&mut self, bytes: &[u8]) {
        if let Some((_, len)) = self.records.last_mut() {
            *len += bytes.len();
            self.payload.extend_from_slice(bytes);
        }
    }

    fn write(&self, stream: &mut StreamWriter, event: impl Fn(R) -> Event<'static>) -> Result<(), Error> {
        let mut rest = &self.payload[..];
        for (record, len) in &self.records {
            stream.event(&event(*record)).map_err(cannot_write)?;
            let (payload, after) = rest.split_at(*len);
            stream.payload(payload).map_err(cannot_write)?;
            rest = after;
        }
        Ok(())
    }
}

impl Iterable {
    /// The section that a START opens; `None` if what it says cannot be said again in another form.
    pub(super) fn new(header: &SectionHeader) -> Option<Self> {
        let state = match header.content() {
            Content::HashTable => State::HashTable { size: None, chunks: Records::new() },
            Content::StorageAttributes => State::StorageAttributes { attributes: Records::new() },
            _ => return None,
        };
        Some(Iterable { header: header.clone(), state })
    }

    /// A record of the section came. A size starts the hash page table anew.
    pub(super) fn event(&mut self, event: &Event<'_>) {
        match (&mut self.state, event) {
            (State::HashTable { size, chunks }, Event::HashTable(record)) => match record {
                HashTableRecord::Size(shift) => (*size, *chunks) = (Some(*shift), Records::new()),
                HashTableRecord::Chunk { .. } => chunks.push(*record),
                _ => {}
            },
            (
                State::StorageAttributes { attributes },
                Event::StorageAttributes(record @ StorageAttributesRecord::Attributes { .. }),
            ) => attributes.push(*record),
            _ => {}
        }
    }

    /// A piece of the last record's payload came.
    pub(super) fn payload(&mut self, bytes: &[u8]) {
        match &mut self.state {
            State::HashTable { chunks, .. } => chunks.payload(bytes),
            State::StorageAttributes { attributes } => attributes.payload(bytes),
        }
    }

    /// Writes START.
    pub(super) fn write_start(&self, stream: &mut StreamWriter) -> Result<(), Error> {
        stream.section_start(&self.header).map_err(cannot_write)?;
        let event = match &self.state {
            State::HashTable { size, .. } => Event::HashTable(HashTableRecord::Size(size.unwrap_or(NO_TABLE))),
            State::StorageAttributes { .. } => Event::StorageAttributes(StorageAttributesRecord::EndOfSection),
        };
        stream.event(&event).map_err(cannot_write)?;
        stream.footer().map_err(cannot_write)
    }

    /// Writes END, with everything.
    pub(super) fn write_end(&self, stream: &mut StreamWriter) -> Result<(), Error> {
        stream.section_end(self.header.section_id).map_err(cannot_write)?;
        match &self.state {
            State::HashTable { size: None | Some(NO_TABLE), .. } => {
                stream.event(&Event::HashTable(HashTableRecord::Size(NO_TABLE))).map_err(cannot_write)?;
            }
            State::HashTable { chunks, .. } => {
                stream.event(&Event::HashTable(HashTableRecord::Chunks)).map_err(cannot_write)?;
                chunks.write(stream, Event::HashTable)?;
                stream.event(&Event::HashTable(HashTableRecord::EndOfChunks)).map_err(cannot_write)?;
            }
            State::StorageAttributes { attributes } => {
                attributes.write(stream, Event::StorageAttributes)?;
                let end = [StorageAttributesRecord::Done, StorageAttributesRecord::EndOfSection];
                end.into_iter()
                    .try_for_each(|record| stream.event(&Event::StorageAttributes(record)))
                    .map_err(cannot_write)?;
            }
        }
        stream.footer().map_err(cannot_write)
    }
}

/// Size of the hash page table of a guest that has none.
const NO_TABLE: u32 = u32::MAX;
