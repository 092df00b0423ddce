//! Arrays that carry their own length.

use qevm_savevm::Error;
use qevm_savevm::vmstate::{Context, Element, ElementDescription, Layout, Loader, Saver, VmStateError};
use qevm_wire::{WireError, Within};
use std::ops::{Deref, DerefMut};

/// A be32 count and as many elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted<T>(pub Vec<T>);

impl<T> Default for Counted<T> {
    fn default() -> Self {
        Counted(Vec::new())
    }
}

impl<T> Deref for Counted<T> {
    type Target = Vec<T>;
    fn deref(&self) -> &Vec<T> {
        &self.0
    }
}

impl<T> DerefMut for Counted<T> {
    fn deref_mut(&mut self) -> &mut Vec<T> {
        &mut self.0
    }
}

impl<T: Element> Element for Counted<T> {
    const TYPE: &'static str = "counted array";

    fn put(&self, out: &mut Saver<'_>) -> Result<(), Error> {
        let count = u32::try_from(self.0.len()).map_err(|_| {
            let (found, max) = (self.0.len() as u64, u32::MAX.into());
            out.fail(WireError::TooLong { what: "counted array", found, max })
        })?;
        out.writer().be32(count);
        self.0.iter().try_for_each(|element| element.put(out))
    }

    fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
        let count = input.reader().be32()?;
        let count = input.expect_count(count.into())?;
        let mut elements = Vec::with_capacity(count.min(input.reader().remaining()));
        for i in 0..count {
            elements.push(T::take(input).within(|| format!("element {i}"))?);
        }
        Ok(Counted(elements))
    }

    fn describe(_: &Context) -> ElementDescription {
        ElementDescription { type_name: Some(Self::TYPE.into()), layout: Layout::Variable }
    }

    fn prepare(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        self.0.iter_mut().try_for_each(|element| element.prepare(ctx))
    }

    fn accept(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        self.0.iter_mut().try_for_each(|element| element.accept(ctx))
    }
}
qevm_savevm::element_is_field!([T: Element] Counted<T>);
