//! The walk that decodes a value.

use super::save::SUBSECTION;
use super::{Context, VmStateError};
use crate::{Error, ErrorKind, Reader};
use qevm_wire::{CountedString, WireError};
use std::fmt;

/// Reads device state; [`VmState::load_fields`](super::VmState::load_fields) and
/// [`Element::take`](super::Element::take) read from it.
pub struct Loader<'r, 'a, 'c> {
    pub(super) reader: &'r mut Reader<'a>,
    pub(super) ctx: &'c Context,
    lenient: bool,
    /// More input may come.
    open: bool,
    pub(super) depth: u32,
}

/// The header of a subsection that belongs to the VMSD being read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubsectionHeader {
    /// Its full name.
    pub name: CountedString,
    /// Its version.
    pub version: u32,
    /// Where its header starts.
    pub offset: u64,
}

impl<'r, 'a, 'c> Loader<'r, 'a, 'c> {
    pub(super) fn strict(reader: &'r mut Reader<'a>, ctx: &'c Context) -> Self {
        Loader { reader, ctx, lenient: false, open: false, depth: 0 }
    }

    pub(super) fn lenient(reader: &'r mut Reader<'a>, ctx: &'c Context) -> Self {
        Loader { reader, ctx, lenient: true, open: false, depth: 0 }
    }

    /// Of what is still arriving.
    pub(super) fn arriving(reader: &'r mut Reader<'a>, ctx: &'c Context) -> Self {
        Loader { open: true, ..Loader::lenient(reader, ctx) }
    }

    /// The facts that predicates ask.
    pub fn context(&self) -> &'c Context {
        self.ctx
    }

    /// The input, for [`Element::take`](super::Element::take).
    pub fn reader(&mut self) -> &mut Reader<'a> {
        self.reader
    }

    /// Stream offset of the next byte.
    pub fn offset(&self) -> u64 {
        self.reader.offset()
    }

    /// An error at the current offset.
    pub fn fail(&self, kind: impl Into<ErrorKind>) -> Error {
        self.reader.fail(kind)
    }

    /// Runs `read` with other facts for its predicates.
    ///
    /// # Errors
    /// What `read` reports.
    pub fn with_context<T>(
        &mut self,
        ctx: &Context,
        read: impl FnOnce(&mut Loader<'_, 'a, '_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        read(&mut Loader { reader: self.reader, ctx, lenient: self.lenient, open: self.open, depth: self.depth })
    }

    /// Runs `read`, and goes back to where it started if it fails.
    ///
    /// # Errors
    /// What `read` reports.
    pub fn attempt<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        let start = self.reader.clone();
        let depth = self.depth;
        read(self).inspect_err(|_| {
            *self.reader = start;
            self.depth = depth;
        })
    }

    /// Reports an encoding that QEMU reads but never writes; fine when loading, an error when decoding.
    ///
    /// # Errors
    /// [`VmStateError::NotCanonical`]
    pub fn not_canonical(&self, what: &'static str, found: u64, offset: u64) -> Result<(), Error> {
        if self.lenient {
            return Ok(());
        }
        Err(Error::new(VmStateError::NotCanonical { what, found }.into(), offset))
    }

    /// Checks a count that another field gives.
    ///
    /// # Errors
    /// A count above `Limits::elements`.
    pub fn expect_count(&self, count: u64) -> Result<usize, Error> {
        self.reader.within_limit("array length", count, self.ctx.limits.elements)?;
        usize::try_from(count).map_err(|_| {
            self.fail(WireError::LimitExceeded { what: "array length", found: count, limit: usize::MAX as u64 })
        })
    }

    /// The next subsection's header, if what follows is a subsection of `parent` by QEMU's rule: the byte 0x05 and a
    /// name that starts with the parent's name and is longer.
    ///
    /// # Errors
    /// The input ends inside a header.
    pub fn next_subsection(&mut self, parent: &'static str) -> Result<Option<SubsectionHeader>, Error> {
        let rest = self.reader.rest();
        if self.open && rest.is_empty() {
            // What has not come may be one.
            return Err(self.fail(WireError::Truncated { needed: 1, available: 0 }));
        }
        if rest.first() != Some(&SUBSECTION) {
            return Ok(None);
        }
        if let Some(&length) = rest.get(1) {
            let name = &rest[2..rest.len().min(2 + usize::from(length))];
            let seen = name.len().min(parent.len());
            if usize::from(length) <= parent.len() || name[..seen] != parent.as_bytes()[..seen] {
                return Ok(None);
            }
        }
        let offset = self.reader.offset();
        self.reader.u8()?;
        let name = self.reader.counted_string("subsection name")?;
        let version_offset = self.reader.offset();
        let version = self.reader.be32()?;
        // QEMU's loader keeps the low 8 bits.
        if version > 0xff {
            self.not_canonical("subsection version", version.into(), version_offset)?;
        }
        Ok(Some(SubsectionHeader { name, version: version & 0xff, offset }))
    }

    /// The error for a subsection that `parent` does not have.
    pub fn unknown_subsection(&self, parent: &'static str, header: SubsectionHeader) -> Error {
        Error::new(VmStateError::UnknownSubsection { parent, name: header.name }.into(), header.offset)
    }
}

impl fmt::Debug for Loader<'_, '_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loader").field("offset", &self.reader.offset()).finish_non_exhaustive()
    }
}
