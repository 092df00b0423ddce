//! The walk that encodes a value and, when asked, describes what it wrote.

use super::{Context, Element, FieldInfo, IndexNotation, VmState, VmStateError};
use crate::Error;
use crate::vmdesc::{FieldDescription, StructDescription};
use qevm_wire::{CountedString, Within, Writer};
use std::fmt;

/// The byte that opens a subsection inside device state (`QEMU_VM_SUBSECTION`, since 0.14).
pub(super) const SUBSECTION: u8 = 0x05;

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

/// Appends device state to a buffer; [`VmState::save_fields`] and [`Element::put`] write to it.
pub struct Saver<'c> {
    ctx: &'c Context,
    out: Writer,
    recorder: Option<Recorder>,
}

/// Objects being described, innermost last, and finished ones that wait for the entry they belong to.
#[derive(Default)]
struct Recorder {
    open: Vec<StructDescription>,
    finished: Vec<StructDescription>,
}

impl<'c> Saver<'c> {
    pub(super) fn new(ctx: &'c Context) -> Self {
        Saver { ctx, out: Writer::new(), recorder: None }
    }

    pub(super) fn describing(ctx: &'c Context) -> Self {
        Saver { ctx, out: Writer::new(), recorder: Some(Recorder::default()) }
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.out.into_bytes()
    }

    /// The bytes and the one object that was written with [`Saver::object`].
    pub(super) fn into_described(self) -> (Vec<u8>, StructDescription) {
        let described = self.recorder.and_then(|mut recorder| recorder.finished.pop());
        (self.out.into_bytes(), described.unwrap_or_default())
    }

    /// The facts that predicates ask.
    pub fn context(&self) -> &'c Context {
        self.ctx
    }

    /// The buffer, for [`Element::put`].
    pub fn writer(&mut self) -> &mut Writer {
        &mut self.out
    }

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

    /// Runs `write` with other facts for its predicates.
    ///
    /// # Errors
    /// What `write` reports.
    pub fn with_context<T>(
        &mut self,
        ctx: &Context,
        write: impl FnOnce(&mut Saver<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut inner = Saver { ctx, out: std::mem::take(&mut self.out), recorder: self.recorder.take() };
        let result = write(&mut inner);
        self.out = inner.out;
        self.recorder = inner.recorder;
        result
    }

    /// Runs `write` without describing what it writes: for types that are opaque in QEMU's descriptions.
    ///
    /// # Errors
    /// What `write` reports.
    pub fn undescribed<T>(&mut self, write: impl FnOnce(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        let recorder = self.recorder.take();
        let result = write(self);
        self.recorder = recorder;
        result
    }

    /// An error at the place that is being written.
    pub fn fail(&self, kind: impl Into<crate::ErrorKind>) -> Error {
        Error::new(kind.into(), self.out.len() as u64)
    }

    /// Checks the length of a field against the count another field gives.
    ///
    /// # Errors
    /// [`VmStateError::LengthMismatch`]
    pub fn expect_len(&self, field: &'static str, found: usize, expected: u64) -> Result<(), Error> {
        if found as u64 != expected {
            return Err(self.fail(VmStateError::LengthMismatch { field, found: found as u64, expected }));
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

impl fmt::Debug for Saver<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Saver").field("written", &self.out.len()).finish_non_exhaustive()
    }
}
