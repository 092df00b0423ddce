//! The walk that encodes a value and, when asked, describes what it wrote.

use super::{Context, VmStateError};
use crate::Error;
use crate::vmdesc::StructDescription;
use qevm_wire::Writer;
use std::fmt;

/// The byte that opens a subsection inside device state (`QEMU_VM_SUBSECTION`, since 0.14).
pub(super) const SUBSECTION: u8 = 0x05;

/// Appends device state to a buffer; [`VmState::save_fields`](super::VmState::save_fields) and
/// [`Element::put`](super::Element::put) write to it.
pub struct Saver<'c> {
    pub(super) ctx: &'c Context,
    pub(super) out: Writer,
    pub(super) recorder: Option<Recorder>,
}

/// Objects being described, innermost last, and finished ones that wait for the entry they belong to.
#[derive(Default)]
pub(super) struct Recorder {
    pub(super) open: Vec<StructDescription>,
    pub(super) finished: Vec<StructDescription>,
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

    /// The buffer, for [`Element::put`](super::Element::put).
    pub fn writer(&mut self) -> &mut Writer {
        &mut self.out
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
}

impl fmt::Debug for Saver<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Saver").field("written", &self.out.len()).finish_non_exhaustive()
    }
}
