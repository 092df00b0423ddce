//! How the walks go into values: structures, elements, arrays and subsections, which call them back.

use super::load::SubsectionHeader;
use super::save::SUBSECTION;
use super::{Element, FieldInfo, IndexNotation, Loader, Saver, VmState, VmStateError};
use crate::Error;
use crate::vmdesc::{FieldDescription, StructDescription};
use qevm_wire::{CountedString, Within};

/// How a description says that an entry belongs to an array.
#[derive(Clone, Copy)]
enum Notation {
    /// Not at all: a single value, or an element that the release does not number.
    No,
    /// `array_len`: the entry stands for this number of elements.
    Len(u64),
    /// `index`: the entry is the element of that number.
    Index(u64),
}

impl Saver<'_> {
    /// Writes the fields and subsections of `value` in place.
    ///
    /// # Errors
    /// As [`VmState::save_fields`].
    pub fn object<T: VmState>(&mut self, value: &T, version: u32) -> Result<(), Error> {
        if let Some(recorder) = &mut self.recorder {
            let vmsd_name = T::NAME.to_owned();
            recorder.open.push(StructDescription { vmsd_name, version, ..StructDescription::default() });
        }
        value.save_fields(self, version)?;
        if let Some(recorder) = &mut self.recorder {
            recorder.finished.extend(recorder.open.pop());
        }
        Ok(())
    }

    /// Writes a field that is one element.
    ///
    /// # Errors
    /// As [`Element::put`].
    pub fn single<T: Element>(&mut self, value: &T, info: &FieldInfo) -> Result<(), Error> {
        self.element(value, info, Some(Notation::No))
    }

    /// Writes a field that is an array.
    ///
    /// # Errors
    /// As [`Element::put`].
    pub fn array<T: Element>(&mut self, values: &[T], info: &FieldInfo) -> Result<(), Error> {
        let last = values.len().saturating_sub(1);
        let compressed = T::COMPRESSIBLE && !info.conditional;
        if let (Some(bytes), [first, rest @ ..], true) = (T::BYTES, values, compressed) {
            let array = if rest.is_empty() { Notation::No } else { Notation::Len(values.len() as u64) };
            self.element(first, info, Some(array))?;
            self.out.bytes((bytes.of)(rest));
            return Ok(());
        }
        for (i, value) in values.iter().enumerate() {
            let array = match self.ctx.index_notation() {
                _ if last == 0 => Some(Notation::No),
                _ if compressed => (i == 0).then_some(Notation::Len(values.len() as u64)),
                IndexNotation::All => Some(Notation::Index(i as u64)),
                IndexNotation::AllButLast if i < last => Some(Notation::Index(i as u64)),
                IndexNotation::AllButLast | IndexNotation::None => Some(Notation::No),
            };
            self.element(value, info, array).within(|| format!("element {i}"))?;
        }
        Ok(())
    }

    /// Writes a subsection with its header, if there is one.
    ///
    /// # Errors
    /// As [`VmState::save_fields`].
    pub fn subsection<T: VmState>(&mut self, value: Option<&T>) -> Result<(), Error> {
        let Some(value) = value else { return Ok(()) };
        let name = CountedString::new(T::NAME).ok_or_else(|| {
            let found = T::NAME.len() as u64;
            self.fail(qevm_wire::WireError::TooLong { what: "subsection name", found, max: 255 })
        })?;
        let version = value.wire_version(self.ctx);
        self.out.u8(SUBSECTION).counted_string(&name).be32(version);
        self.object(value, version).within(|| format!("subsection {}", T::NAME))?;
        if let Some(recorder) = &mut self.recorder
            && let Some(parent) = recorder.open.last_mut()
        {
            parent.subsections.extend(recorder.finished.pop());
        }
        Ok(())
    }

    fn element<T: Element>(&mut self, value: &T, info: &FieldInfo, array: Option<Notation>) -> Result<(), Error> {
        let start = self.out.len();
        let mark = self.recorder.as_ref().map_or(0, |r| r.finished.len());
        value.put(self)?;
        let size = (self.out.len() - start) as u64;
        let type_name = info.type_name.unwrap_or(value.type_name(self.ctx));
        let Some(recorder) = &mut self.recorder else { return Ok(()) };
        let nested = recorder.finished.split_off(mark.min(recorder.finished.len()));
        let (Some(array), Some(parent)) = (array, recorder.open.last_mut()) else { return Ok(()) };
        let (array_len, index) = match array {
            Notation::No => (None, None),
            Notation::Len(n) => (Some(n), None),
            Notation::Index(n) => (None, Some(n)),
        };
        let (name, type_name) = (info.json_name.to_owned(), type_name.to_owned());
        parent.fields.push(FieldDescription { name, type_name, size, array_len, index, nested });
        Ok(())
    }
}

impl Loader<'_, '_, '_> {
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
