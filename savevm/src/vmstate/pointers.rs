//! Pointers, which may be NULL, and what stands for them on the wire.

use super::field::fixed;
use super::{
    Context, Count, Element, ElementDescription, Field, FieldDescription, FieldInfo, IndexNotation, Layout, Loader,
    Saver, VmState, VmStateError,
};
use crate::{Error, element_is_field};
use qevm_wire::Within;

/// The byte that stands for a NULL pointer ('0').
const NULL_MARKER: u8 = 0x30;

/// The byte before an element that is there ('1'), where pointers are marked.
const PRESENT_MARKER: u8 = 0x31;
/// What 11.1 calls a marker in its descriptions.
const MARKER_TYPE: &str = "ptr-marker";

/// A pointer in an array of pointers, before QEMU 11.0: the structure, or the byte 0x30 in its place.
///
/// The wire does not say which of the two it is: QEMU's loader looks at its own pointer. Attribute `null`, a predicate
/// over `index` and the earlier fields, takes the place of that look; without it no pointer is NULL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pointer<T>(pub Option<Box<T>>);

impl<T: VmState> Element for Pointer<T> {
    const TYPE: &'static str = "struct";
    const COMPRESSIBLE: bool = false;
    fn type_name(&self, ctx: &Context) -> &'static str {
        match ctx.index_notation() {
            _ if self.0.is_some() => Self::TYPE,
            // 5.2 and 7.2 describe a NULL pointer as an empty structure.
            IndexNotation::All => Self::TYPE,
            IndexNotation::AllButLast => "nullptr",
            IndexNotation::None => MARKER_TYPE,
        }
    }
    fn put(&self, out: &mut Saver<'_>) -> Result<(), Error> {
        match &self.0 {
            Some(value) => out.object(&**value, T::VERSION),
            None => {
                out.writer().u8(NULL_MARKER);
                Ok(())
            }
        }
    }
    fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
        Ok(Pointer(Some(Box::new(input.object(T::VERSION)?))))
    }
    fn describe(ctx: &Context) -> ElementDescription {
        ElementDescription { type_name: Some(Self::TYPE.into()), layout: Layout::Struct(T::description(ctx)) }
    }
    fn prepare(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        self.0.as_deref_mut().map_or(Ok(()), |value| value.prepare(ctx))
    }
    fn accept(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        self.0.as_deref_mut().map_or(Ok(()), |value| value.accept(T::VERSION, ctx))
    }
}
element_is_field!([T: VmState] Pointer<T>);

/// A field of pointers that may be NULL: attribute `null`.
pub trait PointerField: Sized {
    /// Reads the field; `null` tells for each index whether the pointer is NULL. `len` is the length another field
    /// gives, for a `Vec`.
    ///
    /// # Errors
    /// A NULL pointer without its marker, or what the structure reports.
    fn load(input: &mut Loader<'_, '_, '_>, len: u64, null: &dyn Fn(usize) -> bool) -> Result<Self, Error>;
}

impl<T: VmState> PointerField for Pointer<T> {
    fn load(input: &mut Loader<'_, '_, '_>, _: u64, null: &dyn Fn(usize) -> bool) -> Result<Self, Error> {
        load_pointer(input, null(0))
    }
}

impl<T: VmState, const N: usize> PointerField for [Pointer<T>; N] {
    fn load(input: &mut Loader<'_, '_, '_>, _: u64, null: &dyn Fn(usize) -> bool) -> Result<Self, Error> {
        let mut pointers = [const { Pointer(None) }; N];
        for (i, pointer) in pointers.iter_mut().enumerate() {
            *pointer = load_pointer(input, null(i)).within(|| format!("element {i}"))?;
        }
        Ok(pointers)
    }
}

impl<T: VmState> PointerField for Vec<Pointer<T>> {
    fn load(input: &mut Loader<'_, '_, '_>, len: u64, null: &dyn Fn(usize) -> bool) -> Result<Self, Error> {
        let len = input.expect_count(len)?;
        (0..len).map(|i| load_pointer(input, null(i)).within(|| format!("element {i}"))).collect()
    }
}

fn load_pointer<T: VmState>(input: &mut Loader<'_, '_, '_>, null: bool) -> Result<Pointer<T>, Error> {
    if !null {
        return Pointer::take(input);
    }
    let offset = input.offset();
    match input.reader().u8()? {
        NULL_MARKER => Ok(Pointer(None)),
        found => {
            let kind = VmStateError::BadMarker { what: "NULL pointer marker", found, expected: "0x30" };
            Err(Error::new(kind.into(), offset))
        }
    }
}

/// An array of `N` pointers that the loader allocates (since QEMU 11.0; seen in 11.1's nvme): each is the byte 0x31 and
/// the structure, or the byte 0x30 alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkedPointers<T, const N: usize>(pub [Option<Box<T>>; N]);

impl<T, const N: usize> Default for MarkedPointers<T, N> {
    fn default() -> Self {
        MarkedPointers([const { None }; N])
    }
}

struct Marker(u8);

impl Element for Marker {
    const TYPE: &'static str = MARKER_TYPE;
    fn put(&self, out: &mut Saver<'_>) -> Result<(), Error> {
        out.writer().u8(self.0);
        Ok(())
    }
    fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
        input.reader().u8().map(Marker)
    }
    fn describe(_: &Context) -> ElementDescription {
        fixed(MARKER_TYPE, 1)
    }
}

impl<T: VmState + Element, const N: usize> Field for MarkedPointers<T, N> {
    const COMPRESSIBLE: bool = false;
    fn save(&self, out: &mut Saver<'_>, info: &FieldInfo) -> Result<(), Error> {
        for (i, pointer) in self.0.iter().enumerate() {
            out.single(&Marker(if pointer.is_some() { PRESENT_MARKER } else { NULL_MARKER }), info)?;
            if let Some(value) = pointer {
                out.single(&**value, info).within(|| format!("element {i}"))?;
            }
        }
        Ok(())
    }
    fn load(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
        let mut pointers = Self::default();
        for (i, pointer) in pointers.0.iter_mut().enumerate() {
            let offset = input.offset();
            *pointer = match Marker::take(input)?.0 {
                NULL_MARKER => None,
                PRESENT_MARKER => Some(Box::new(T::take(input).within(|| format!("element {i}"))?)),
                found => {
                    let kind = VmStateError::BadMarker { what: "pointer marker", found, expected: "0x30 or 0x31" };
                    return Err(Error::new(kind.into(), offset));
                }
            };
        }
        Ok(pointers)
    }
    fn describe(info: &FieldInfo, ctx: &Context) -> FieldDescription {
        info.describe(Count::Variable, <T as Element>::describe(ctx))
    }
    fn prepare(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        self.0.iter_mut().flatten().try_for_each(|value| Element::prepare(&mut **value, ctx))
    }
    fn accept(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        self.0.iter_mut().flatten().try_for_each(|value| Element::accept(&mut **value, ctx))
    }
}
