//! The walk that decodes a value.

use super::save::SUBSECTION;
use super::{Context, VmState, VmStateError};
use crate::{Error, ErrorKind, Reader};
use qevm_wire::{CountedString, WireError, Within};
use std::fmt;

/// Reads device state; [`VmState::load_fields`] and [`Element::take`](super::Element::take) read from it.
pub struct Loader<'r, 'a, 'c> {
    reader: &'r mut Reader<'a>,
    ctx: &'c Context,
    lenient: bool,
    depth: u32,
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
        Loader { reader, ctx, lenient: false, depth: 0 }
    }

    pub(super) fn lenient(reader: &'r mut Reader<'a>, ctx: &'c Context) -> Self {
        Loader { reader, ctx, lenient: true, depth: 0 }
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

    /// Reads the fields and subsections of a `T`, one level deeper than what is being read.
    ///
    /// # Errors
    /// As [`VmState::load_fields`], and nesting beyond `Limits::depth`.
    pub fn object<T: VmState>(&mut self, version: u32) -> Result<T, Error> {
        self.reader.within_limit("nesting of device state", u64::from(self.depth) + 1, self.ctx.limits.depth.into())?;
        self.depth += 1;
        let value = T::load_fields(self, version);
        self.depth -= 1;
        value
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
        read(&mut Loader { reader: self.reader, ctx, lenient: self.lenient, depth: self.depth })
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

    /// Reads the content of the subsection of `header` into `slot`.
    ///
    /// `order` is this subsection's place in the declaration, `last` that of the previous one.
    ///
    /// # Errors
    /// A version the declaration does not read, a subsection that was there already, and what its fields report.
    pub fn subsection<T: VmState>(
        &mut self,
        slot: &mut Option<T>,
        header: &SubsectionHeader,
        order: usize,
        last: &mut usize,
    ) -> Result<(), Error> {
        let mut content = |input: &mut Self| {
            check_version::<T>(header.version, header.offset)?;
            if slot.is_some() {
                return Err(Error::new(VmStateError::RepeatedSubsection { name: T::NAME }.into(), header.offset));
            }
            if order < *last {
                input.not_canonical("position of the subsection", order as u64, header.offset)?;
            }
            *last = order;
            let value: T = input.object(header.version)?;
            if value.wire_version(input.ctx) != header.version {
                input.not_canonical("subsection version", header.version.into(), header.offset)?;
            }
            *slot = Some(value);
            Ok(())
        };
        content(self).within(|| format!("subsection {}", T::NAME))
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

/// QEMU's version rule for sections and subsections.
pub(super) fn check_version<T: VmState>(found: u32, offset: u64) -> Result<(), Error> {
    if found > T::VERSION {
        let kind = VmStateError::VersionTooNew { name: T::NAME, found, supported: T::VERSION };
        return Err(Error::new(kind.into(), offset).within(T::NAME));
    }
    if found < T::MINIMUM_VERSION {
        let kind = VmStateError::VersionTooOld { name: T::NAME, found, minimum: T::MINIMUM_VERSION };
        return Err(Error::new(kind.into(), offset).within(T::NAME));
    }
    Ok(())
}
