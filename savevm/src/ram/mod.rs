//! The `ram` section: the list of RAM blocks, and one record for each page that travels on the main channel.
//!
//! [`RamRecord`] is what a section holds, [`RamBlocks`] the list that page records refer to by [`BlockId`].
//! [`PreemptDecoder`] reads the second channel of `postcopy-preempt`, which carries bare page records.
//!
//! A page's bytes are never part of a record: [`RamRecord::Page`] says where they go, and they are the next bytes of
//! the stream. Only the small forms of a page (XBZRLE, compressed) are handed out as slices of the input.

mod blocks;
mod decode;
mod encode;
mod error;
mod preempt;
mod record;
mod words;

pub use blocks::{BlockId, MappedRamHeader, RamBlock, RamBlocks};
pub(crate) use decode::{ListWords, RamReader, RecordContext};
pub(crate) use encode::encode;
pub use error::RamError;
pub use preempt::PreemptDecoder;
pub use record::{PageAt, RamRecord};
pub use words::{XBZRLE_ENCODING, flag};

/// Version of the section (`ram` version 4 in every release examined).
pub const SECTION_VERSION: u32 = 4;
