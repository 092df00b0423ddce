//! Field types beyond numbers: buffers, unused ranges, timers, lists, bitmaps, pointers.
//!
//! They are thin wrappers that say how the bytes are laid out and what QEMU's descriptions call them.

use super::field::{fixed, load_elements};
use super::{
    Context, Count, Description, Element, ElementDescription, Field, FieldDescription, FieldInfo, Layout, Loader,
    Saver, VarField, VmState, VmStateError,
};
use crate::{Error, element_is_field};
use qevm_wire::Within;
use std::fmt;
use std::ops::{Deref, DerefMut};

macro_rules! wrapper {
    ([$($generics:tt)*] $type:ty => $inner:ty) => {
        impl<$($generics)*> Deref for $type {
            type Target = $inner;
            fn deref(&self) -> &$inner {
                &self.0
            }
        }
        impl<$($generics)*> DerefMut for $type {
            fn deref_mut(&mut self) -> &mut $inner {
                &mut self.0
            }
        }
        impl<$($generics)*> From<$inner> for $type {
            fn from(inner: $inner) -> Self {
                Self(inner)
            }
        }
    };
}

macro_rules! bytes {
    ($type:ident, $name:literal) => {
        impl<const N: usize> Default for $type<N> {
            fn default() -> Self {
                $type([0; N])
            }
        }
        impl<const N: usize> fmt::Debug for $type<N> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($type), "(\"{}\")"), self.0.escape_ascii())
            }
        }
        impl<const N: usize> Element for $type<N> {
            const TYPE: &'static str = $name;
            fn put(&self, out: &mut Saver<'_>) -> Result<(), Error> {
                out.writer().bytes(&self.0);
                Ok(())
            }
            fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
                input.reader().array().map($type)
            }
            fn describe(_: &Context) -> ElementDescription {
                fixed($name, N as u64)
            }
        }
        wrapper!([const N: usize] $type<N> => [u8; N]);
        element_is_field!([const N: usize] $type<N>);
    };
}

/// `N` raw bytes (QEMU's `buffer`).
#[derive(Clone, PartialEq, Eq)]
pub struct Buffer<const N: usize>(pub [u8; N]);
bytes!(Buffer, "buffer");

/// `N` bytes that are no longer used (QEMU's `unused_buffer`): written as zeroes, ignored when loading.
///
/// The bytes are kept, since a release that still used them may have written something else than zeroes.
#[derive(Clone, PartialEq, Eq)]
pub struct Unused<const N: usize>(pub [u8; N]);
bytes!(Unused, "unused_buffer");

/// An array of fixed length that is too long to be kept in place or to have a default: [`Field`] of its own,
/// on the wire the same as `[T; N]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table<T, const N: usize>(Box<[T; N]>);

impl<T, const N: usize> Table<T, N> {
    /// A table of what `element` gives for each index.
    pub fn from_fn(element: impl FnMut(usize) -> T) -> Self {
        Table(Box::new(std::array::from_fn(element)))
    }
}

impl<T: Default, const N: usize> Default for Table<T, N> {
    fn default() -> Self {
        Self::from_fn(|_| T::default())
    }
}

impl<T, const N: usize> From<[T; N]> for Table<T, N> {
    fn from(elements: [T; N]) -> Self {
        Table(Box::new(elements))
    }
}

impl<T, const N: usize> Deref for Table<T, N> {
    type Target = [T; N];
    fn deref(&self) -> &[T; N] {
        &self.0
    }
}

impl<T, const N: usize> DerefMut for Table<T, N> {
    fn deref_mut(&mut self) -> &mut [T; N] {
        &mut self.0
    }
}

impl<T: Element, const N: usize> Field for Table<T, N> {
    const COMPRESSIBLE: bool = T::COMPRESSIBLE;
    fn save(&self, out: &mut Saver<'_>, info: &FieldInfo) -> Result<(), Error> {
        out.array(&self.0[..], info)
    }
    fn load(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
        let elements = load_elements(input, N)?.into_boxed_slice();
        elements.try_into().map(Table).map_err(|elements: Box<[T]>| {
            let (found, expected) = (elements.len() as u64, N as u64);
            input.fail(VmStateError::LengthMismatch { field: "table", found, expected })
        })
    }
    fn describe(info: &FieldInfo, ctx: &Context) -> FieldDescription {
        <[T; N] as Field>::describe(info, ctx)
    }
    fn prepare(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        self.0.iter_mut().try_for_each(|element| element.prepare(ctx))
    }
    fn accept(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        self.0.iter_mut().try_for_each(|element| element.accept(ctx))
    }
}

/// When a timer fires, in ns of its clock; [`Timer::NOT_ARMED`] if it does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Timer(pub i64);

impl Timer {
    /// A timer that is not armed: all ones on the wire.
    pub const NOT_ARMED: Timer = Timer(-1);

    /// When it fires, in ns; `None` if it is not armed.
    pub fn expires(self) -> Option<i64> {
        (self != Self::NOT_ARMED).then_some(self.0)
    }
}

impl Default for Timer {
    fn default() -> Self {
        Self::NOT_ARMED
    }
}

impl Element for Timer {
    const TYPE: &'static str = "timer";
    fn put(&self, out: &mut Saver<'_>) -> Result<(), Error> {
        out.writer().be_i64(self.0);
        Ok(())
    }
    fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
        input.reader().be_i64().map(Timer)
    }
    fn describe(_: &Context) -> ElementDescription {
        fixed(Self::TYPE, 8)
    }
}
element_is_field!([] Timer);

/// Raw bytes (QEMU's `buffer`) as many as another field says.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct VarBuffer(pub Vec<u8>);
wrapper!([] VarBuffer => Vec<u8>);

impl fmt::Debug for VarBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VarBuffer(\"{}\")", self.0.escape_ascii())
    }
}

/// [`VarBuffer`] and [`Bitmap`] are one element whose length in bytes is only known when it is saved or loaded.
struct Blob<'a>(&'a [u8]);

impl Element for Blob<'_> {
    const TYPE: &'static str = "buffer";
    fn put(&self, out: &mut Saver<'_>) -> Result<(), Error> {
        out.writer().bytes(self.0);
        Ok(())
    }
    fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
        // A blob is only ever made from a value.
        Err(input.fail(VmStateError::FieldMissing { field: "buffer" }))
    }
    fn describe(_: &Context) -> ElementDescription {
        ElementDescription { type_name: Some(Self::TYPE.into()), layout: Layout::Variable }
    }
}

macro_rules! without_hooks {
    () => {
        fn prepare(&mut self, _: &Context) -> Result<(), VmStateError> {
            Ok(())
        }
        fn accept(&mut self, _: &Context) -> Result<(), VmStateError> {
            Ok(())
        }
    };
}

impl VarField for VarBuffer {
    const COMPRESSIBLE: bool = true;
    fn save(&self, out: &mut Saver<'_>, info: &FieldInfo, len: u64) -> Result<(), Error> {
        out.expect_len(info.name, self.0.len(), len)?;
        out.single(&Blob(&self.0), info)
    }
    fn load(input: &mut Loader<'_, '_, '_>, len: u64) -> Result<Self, Error> {
        Ok(VarBuffer(input.reader().take(len)?.to_vec()))
    }
    fn describe(info: &FieldInfo, ctx: &Context) -> FieldDescription {
        info.describe(Count::One, Blob::describe(ctx))
    }
    without_hooks!();
}

/// A bitmap of as many bits as another field says, in words of 64: bit 0 of word 0 is bit 0 of the map.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bitmap {
    /// The words; bits beyond the map's length are kept as they came.
    pub words: Vec<u64>,
}

impl VarField for Bitmap {
    const COMPRESSIBLE: bool = true;
    fn save(&self, out: &mut Saver<'_>, info: &FieldInfo, bits: u64) -> Result<(), Error> {
        out.expect_len(info.name, self.words.len(), bits.div_ceil(64))?;
        let bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_be_bytes()).collect();
        let info = FieldInfo { type_name: info.type_name.or(Some("bitmap")), ..*info };
        out.single(&Blob(&bytes), &info)
    }
    fn load(input: &mut Loader<'_, '_, '_>, bits: u64) -> Result<Self, Error> {
        let mut bytes = input.reader().sub(bits.div_ceil(64) * 8)?;
        let mut words = Vec::with_capacity(bytes.remaining() / 8);
        while !bytes.is_empty() {
            words.push(bytes.be64()?);
        }
        Ok(Bitmap { words })
    }
    fn describe(info: &FieldInfo, ctx: &Context) -> FieldDescription {
        let mut element = Blob::describe(ctx);
        element.type_name = Some("bitmap".into());
        info.describe(Count::One, element)
    }
    without_hooks!();
}

/// A structure that QEMU fills from a temporary of its own (QEMU's `tmp`): its fields, nothing more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tmp<T>(pub T);
wrapper!([T] Tmp<T> => T);

/// A structure saved at a version of its own choosing (QEMU's `vstruct`) rather than its newest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VStruct<T, const VERSION: u32>(pub T);
wrapper!([T, const VERSION: u32] VStruct<T, VERSION> => T);

macro_rules! nested {
    ([$($generics:tt)*] $type:ty, $name:literal, $version:expr) => {
        impl<$($generics)*> Element for $type {
            const TYPE: &'static str = $name;
            fn put(&self, out: &mut Saver<'_>) -> Result<(), Error> {
                out.object(&self.0, $version)
            }
            fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
                input.object($version).map(Self)
            }
            fn describe(ctx: &Context) -> ElementDescription {
                ElementDescription {
                    type_name: Some($name.into()),
                    layout: Layout::Struct(Description { version: $version, ..T::description(ctx) }),
                }
            }
            fn prepare(&mut self, ctx: &Context) -> Result<(), VmStateError> {
                self.0.prepare(ctx)
            }
            fn accept(&mut self, ctx: &Context) -> Result<(), VmStateError> {
                self.0.accept($version, ctx)
            }
        }
        element_is_field!([$($generics)*] $type);
    };
}

nested!([T: VmState] Tmp<T>, "tmp", T::VERSION);
nested!([T: VmState, const VERSION: u32] VStruct<T, VERSION>, "vstruct", VERSION);

const LIST_NEXT: u8 = 1;
const LIST_END: u8 = 0;

macro_rules! list {
    ($(#[$doc:meta])* $type:ident, $name:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $type<T>(pub Vec<T>);
        wrapper!([T] $type<T> => Vec<T>);

        impl<T> Default for $type<T> {
            fn default() -> Self {
                $type(Vec::new())
            }
        }

        impl<T: VmState> Element for $type<T> {
            const TYPE: &'static str = $name;
            fn put(&self, out: &mut Saver<'_>) -> Result<(), Error> {
                for element in &self.0 {
                    out.writer().u8(LIST_NEXT);
                    out.object(element, T::VERSION)?;
                }
                out.writer().u8(LIST_END);
                Ok(())
            }
            fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
                load_list(input, concat!($name, " marker")).map($type)
            }
            fn describe(ctx: &Context) -> ElementDescription {
                ElementDescription { type_name: Some($name.into()), layout: Layout::List(T::description(ctx)) }
            }
            fn prepare(&mut self, ctx: &Context) -> Result<(), VmStateError> {
                self.0.iter_mut().try_for_each(|element| element.prepare(ctx))
            }
            fn accept(&mut self, ctx: &Context) -> Result<(), VmStateError> {
                self.0.iter_mut().try_for_each(|element| element.accept(T::VERSION, ctx))
            }
        }
        element_is_field!([T: VmState] $type<T>);
    };
}

// A boxed buffer is the buffer: only its place in memory differs.
impl<const N: usize> Field for Box<Buffer<N>> {
    const COMPRESSIBLE: bool = true;
    fn save(&self, out: &mut Saver<'_>, info: &FieldInfo) -> Result<(), Error> {
        Field::save(&**self, out, info)
    }
    fn load(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
        <Buffer<N> as Field>::load(input).map(Box::new)
    }
    fn describe(info: &FieldInfo, ctx: &Context) -> FieldDescription {
        <Buffer<N> as Field>::describe(info, ctx)
    }
    fn prepare(&mut self, _: &Context) -> Result<(), VmStateError> {
        Ok(())
    }
    fn accept(&mut self, _: &Context) -> Result<(), VmStateError> {
        Ok(())
    }
}

list! {
    /// A queue of any length (QEMU's `qtailq`): each element after a byte 1, then a byte 0.
    QTailQ, "qtailq"
}
list! {
    /// A list of any length (QEMU's `qlist`): each element after a byte 1, then a byte 0.
    QList, "qlist"
}

fn load_list<T: VmState>(input: &mut Loader<'_, '_, '_>, marker: &'static str) -> Result<Vec<T>, Error> {
    let mut elements = Vec::new();
    loop {
        let offset = input.offset();
        match input.reader().u8()? {
            LIST_END => return Ok(elements),
            LIST_NEXT => {}
            found => {
                let kind = VmStateError::BadMarker { what: marker, found, expected: "0 or 1" };
                return Err(Error::new(kind.into(), offset));
            }
        }
        input.expect_count(elements.len() as u64 + 1)?;
        let i = elements.len();
        elements.push(input.object(T::VERSION).within(|| format!("element {i}"))?);
    }
}
