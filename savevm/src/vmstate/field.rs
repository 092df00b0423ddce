//! What a field of a declaration can be: the two traits, and their implementations for numbers and arrays.

use super::{Context, Count, ElementDescription, FieldDescription, Layout, Loader, Saver, VmStateError};
use crate::Error;
use qevm_wire::Within;

/// What the declaration says of a field, beyond its Rust type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FieldInfo {
    /// QEMU's name of the field.
    pub name: &'static str,
    /// That name with the `[k]` that descriptions append to names occurring several times.
    pub json_name: &'static str,
    /// The type name, where it is not the Rust type's usual one.
    pub type_name: Option<&'static str>,
    /// The first version that has the field.
    pub since: u32,
    /// True if a predicate decides whether it exists.
    pub conditional: bool,
}

impl FieldInfo {
    /// An unconditional field of every version with its type's usual name; the derive macro's starting point.
    pub const fn new(name: &'static str, json_name: &'static str) -> Self {
        FieldInfo { name, json_name, type_name: None, since: 0, conditional: false }
    }

    /// The same with another type name.
    #[must_use]
    pub const fn type_name(mut self, type_name: &'static str) -> Self {
        self.type_name = Some(type_name);
        self
    }

    /// The same, in versions from `since`.
    #[must_use]
    pub const fn since(mut self, since: u32) -> Self {
        self.since = since;
        self
    }

    /// The same, existing under a condition.
    #[must_use]
    pub const fn conditional(mut self) -> Self {
        self.conditional = true;
        self
    }

    pub(super) fn describe(&self, count: Count, mut element: ElementDescription) -> FieldDescription {
        if let Some(name) = self.type_name {
            element.type_name = Some(name.into());
        }
        FieldDescription { name: self.name.into(), since: self.since, conditional: self.conditional, count, element }
    }
}

/// Arrays of elements that are bytes, as bytes.
#[derive(Debug, Clone, Copy)]
pub struct Bytes<T> {
    /// The bytes of some elements.
    pub of: fn(&[T]) -> &[u8],
    /// The elements that are these bytes.
    pub into: fn(&[u8]) -> Vec<T>,
}

/// One thing on the wire: what a field holds once, or an array several times.
pub trait Element: Sized {
    /// The name descriptions give to the type.
    const TYPE: &'static str;
    /// False for structures with conditional fields or subsections, see [`super::VmState::COMPRESSIBLE`].
    const COMPRESSIBLE: bool = true;
    /// For elements that are bytes on the wire as they are in memory: how arrays of them are moved at once.
    const BYTES: Option<Bytes<Self>> = None;

    /// The name descriptions give to this value's type, where it depends on the value.
    fn type_name(&self, _ctx: &Context) -> &'static str {
        Self::TYPE
    }
    /// Appends the element.
    ///
    /// # Errors
    /// The value does not fit its declaration.
    fn put(&self, out: &mut Saver<'_>) -> Result<(), Error>;
    /// Reads the element.
    ///
    /// # Errors
    /// The input is truncated or malformed.
    fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error>;
    /// Its schema.
    fn describe(ctx: &Context) -> ElementDescription;
    /// See [`super::VmState::prepare`].
    ///
    /// # Errors
    /// A hook refuses.
    fn prepare(&mut self, _ctx: &Context) -> Result<(), VmStateError> {
        Ok(())
    }
    /// See [`super::VmState::accept`].
    ///
    /// # Errors
    /// A hook refuses.
    fn accept(&mut self, _ctx: &Context) -> Result<(), VmStateError> {
        Ok(())
    }
}

/// A field whose Rust type alone says how long it is: an [`Element`], or an array `[T; N]` of them.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is nothing that a field of a VMSD can be",
    label = "QEMU has no such field",
    note = "integers of 8 to 64 bits, `bool`, arrays `[T; N]`, and structs with `#[derive(VmState)]` can be fields, and what `vmstate::kinds` has",
    note = "a `Vec`, `VarBuffer` or `Bitmap` needs `len = …`, an `Option` `exists = …`, `released` or `subsection`"
)]
pub trait Field: Sized {
    /// See [`Element::COMPRESSIBLE`].
    const COMPRESSIBLE: bool;

    /// Appends the field.
    ///
    /// # Errors
    /// As [`Element::put`].
    fn save(&self, out: &mut Saver<'_>, info: &FieldInfo) -> Result<(), Error>;
    /// Reads the field.
    ///
    /// # Errors
    /// As [`Element::take`].
    fn load(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error>;
    /// Its schema.
    fn describe(info: &FieldInfo, ctx: &Context) -> FieldDescription;
    /// As [`Element::prepare`].
    ///
    /// # Errors
    /// As [`Element::prepare`].
    fn prepare(&mut self, ctx: &Context) -> Result<(), VmStateError>;
    /// As [`Element::accept`].
    ///
    /// # Errors
    /// As [`Element::accept`].
    fn accept(&mut self, ctx: &Context) -> Result<(), VmStateError>;
}

/// A field whose length another field gives: attribute `len`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no length that another field could give",
    label = "`len` is for `Vec`, `VarBuffer` and `Bitmap`"
)]
pub trait VarField: Sized {
    /// See [`Element::COMPRESSIBLE`].
    const COMPRESSIBLE: bool;

    /// Appends the field, which must have length `len`.
    ///
    /// # Errors
    /// [`VmStateError::LengthMismatch`], and as [`Element::put`].
    fn save(&self, out: &mut Saver<'_>, info: &FieldInfo, len: u64) -> Result<(), Error>;
    /// Reads a field of length `len`.
    ///
    /// # Errors
    /// A length above the limits, and as [`Element::take`].
    fn load(input: &mut Loader<'_, '_, '_>, len: u64) -> Result<Self, Error>;
    /// Its schema.
    fn describe(info: &FieldInfo, ctx: &Context) -> FieldDescription;
    /// As [`Element::prepare`].
    ///
    /// # Errors
    /// As [`Element::prepare`].
    fn prepare(&mut self, ctx: &Context) -> Result<(), VmStateError>;
    /// As [`Element::accept`].
    ///
    /// # Errors
    /// As [`Element::accept`].
    fn accept(&mut self, ctx: &Context) -> Result<(), VmStateError>;
}

/// Implements [`Field`](crate::vmstate::Field) for an [`Element`](crate::vmstate::Element): a type of one's own that a
/// declaration can have as a field, as an array's element and in a list.
///
/// In brackets stand the parameters of the type, where it has some.
///
/// ```
/// use qevm_savevm::vmstate::{self, Context, Element, ElementDescription, Layout, Loader, Saver, VmState};
///
/// /// A number in the guest's byte order.
/// #[derive(Debug, Clone, Copy, Default, PartialEq)]
/// struct LittleEndian(u16);
///
/// impl Element for LittleEndian {
///     const TYPE: &'static str = "uint16";
///     fn put(&self, out: &mut Saver<'_>) -> Result<(), qevm_savevm::Error> {
///         out.writer().bytes(&self.0.to_le_bytes());
///         Ok(())
///     }
///     fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, qevm_savevm::Error> {
///         Ok(LittleEndian(u16::from_le_bytes(input.reader().array()?)))
///     }
///     fn describe(_: &Context) -> ElementDescription {
///         ElementDescription { type_name: Some(Self::TYPE.into()), layout: Layout::Bytes(2) }
///     }
/// }
/// qevm_savevm::element_is_field!([] LittleEndian);
///
/// #[derive(VmState, Debug, Clone, Default, PartialEq)]
/// #[vmstate(name = "ring", version = 1)]
/// struct Ring {
///     used: LittleEndian,
/// }
///
/// let ctx = Context::new("11.1".parse()?, "microvm");
/// assert_eq!(vmstate::encode(&Ring { used: LittleEndian(0x102) }, &ctx)?, [2, 1]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[macro_export]
macro_rules! element_is_field {
    ([$($generics:tt)*] $type:ty) => {
        impl<$($generics)*> $crate::vmstate::Field for $type {
            const COMPRESSIBLE: bool = <Self as $crate::vmstate::Element>::COMPRESSIBLE;
            fn save(
                &self,
                out: &mut $crate::vmstate::Saver<'_>,
                info: &$crate::vmstate::FieldInfo,
            ) -> ::core::result::Result<(), $crate::Error> {
                out.single(self, info)
            }
            fn load(input: &mut $crate::vmstate::Loader<'_, '_, '_>) -> ::core::result::Result<Self, $crate::Error> {
                <Self as $crate::vmstate::Element>::take(input)
            }
            fn describe(
                info: &$crate::vmstate::FieldInfo,
                ctx: &$crate::vmstate::Context,
            ) -> $crate::vmstate::FieldDescription {
                $crate::vmstate::describe_single::<Self>(info, ctx)
            }
            fn prepare(
                &mut self,
                ctx: &$crate::vmstate::Context,
            ) -> ::core::result::Result<(), $crate::vmstate::VmStateError> {
                <Self as $crate::vmstate::Element>::prepare(self, ctx)
            }
            fn accept(
                &mut self,
                ctx: &$crate::vmstate::Context,
            ) -> ::core::result::Result<(), $crate::vmstate::VmStateError> {
                <Self as $crate::vmstate::Element>::accept(self, ctx)
            }
        }
    };
}

#[doc(hidden)]
pub fn describe_single<T: Element>(info: &FieldInfo, ctx: &Context) -> FieldDescription {
    info.describe(Count::One, T::describe(ctx))
}

pub(super) fn fixed(type_name: &str, size: u64) -> ElementDescription {
    ElementDescription { type_name: Some(type_name.into()), layout: Layout::Bytes(size) }
}

macro_rules! numbers {
    ($($type:ty, $name:literal, $method:ident $(, $bytes:expr)?;)*) => {$(
        impl Element for $type {
            const TYPE: &'static str = $name;
            $(const BYTES: Option<Bytes<Self>> = Some($bytes);)?
            fn put(&self, out: &mut Saver<'_>) -> Result<(), Error> {
                out.writer().$method(*self);
                Ok(())
            }
            fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
                input.reader().$method()
            }
            fn describe(_: &Context) -> ElementDescription {
                fixed($name, size_of::<$type>() as u64)
            }
        }
        element_is_field!([] $type);
    )*};
}

numbers! {
    u8, "uint8", u8, Bytes { of: |bytes| bytes, into: <[u8]>::to_vec };
    u16, "uint16", be16;
    u32, "uint32", be32;
    u64, "uint64", be64;
    i8, "int8", i8;
    i16, "int16", be_i16;
    i32, "int32", be_i32;
    i64, "int64", be_i64;
}

impl Element for bool {
    const TYPE: &'static str = "bool";
    fn put(&self, out: &mut Saver<'_>) -> Result<(), Error> {
        out.writer().u8((*self).into());
        Ok(())
    }
    fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
        let offset = input.offset();
        let byte = input.reader().u8()?;
        if byte > 1 {
            input.not_canonical("bool", byte.into(), offset)?;
        }
        Ok(byte != 0)
    }
    fn describe(_: &Context) -> ElementDescription {
        fixed("bool", 1)
    }
}
element_is_field!([] bool);

impl<T: Element, const N: usize> Field for [T; N] {
    const COMPRESSIBLE: bool = T::COMPRESSIBLE;
    fn save(&self, out: &mut Saver<'_>, info: &FieldInfo) -> Result<(), Error> {
        out.array(self, info)
    }
    fn load(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
        let elements = load_elements(input, N)?;
        elements.try_into().map_err(|elements: Vec<T>| {
            let (found, expected) = (elements.len() as u64, N as u64);
            input.fail(VmStateError::LengthMismatch { field: "array", found, expected })
        })
    }
    fn describe(info: &FieldInfo, ctx: &Context) -> FieldDescription {
        info.describe(Count::Fixed(N as u64), T::describe(ctx))
    }
    fn prepare(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        self.iter_mut().try_for_each(|element| element.prepare(ctx))
    }
    fn accept(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        self.iter_mut().try_for_each(|element| element.accept(ctx))
    }
}

impl<T: Element> VarField for Vec<T> {
    const COMPRESSIBLE: bool = T::COMPRESSIBLE;
    fn save(&self, out: &mut Saver<'_>, info: &FieldInfo, len: u64) -> Result<(), Error> {
        out.expect_len(info.name, self.len(), len)?;
        out.array(self, info)
    }
    fn load(input: &mut Loader<'_, '_, '_>, len: u64) -> Result<Self, Error> {
        let len = input.expect_count(len)?;
        load_elements(input, len)
    }
    fn describe(info: &FieldInfo, ctx: &Context) -> FieldDescription {
        info.describe(Count::Variable, T::describe(ctx))
    }
    fn prepare(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        self.iter_mut().try_for_each(|element| element.prepare(ctx))
    }
    fn accept(&mut self, ctx: &Context) -> Result<(), VmStateError> {
        self.iter_mut().try_for_each(|element| element.accept(ctx))
    }
}

pub(super) fn load_elements<T: Element>(input: &mut Loader<'_, '_, '_>, count: usize) -> Result<Vec<T>, Error> {
    // Nearly every element takes at least a byte: what is left bounds what it is worth to reserve.
    let possible = count.min(input.reader().remaining());
    let mut elements = match T::BYTES {
        Some(bytes) => (bytes.into)(input.reader().take(possible as u64)?),
        None => Vec::with_capacity(possible),
    };
    for i in elements.len()..count {
        elements.push(T::take(input).within(|| format!("element {i}"))?);
    }
    Ok(elements)
}
