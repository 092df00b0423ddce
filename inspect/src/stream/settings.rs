//! What is to be done while a migration is read.

use super::layouts::Layouts;
use crate::bounds::Spool;
use crate::ram::Keep;

/// What is to be done on the way.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What is kept of RAM pages.
    pub keep: Keep,
    /// Re-encode everything and compare.
    pub reencode: bool,
    /// Everything that belongs to the migration must be there; otherwise what is missing is only a note.
    pub complete: bool,
    /// The description of device sections must be whole and true; otherwise what is wrong with it is only a note.
    pub strict: bool,
    /// The source is alive: it waits for answers, so nothing may be read ahead, and further channels come elsewhere.
    pub live: bool,
    /// How device sections are read that no description tells about.
    pub layouts: Layouts,
    /// The room for temporary files.
    pub spool: Spool,
    /// Bytes of guest memory above which a stream is refused; `u64::MAX` where absent pages cost nothing.
    pub max_ram: u64,
}
