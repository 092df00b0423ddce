//! Device state, declared: one declaration gives encoding, decoding, the JSON description and a static schema.
//!
//! QEMU describes the state of a device by a *VMSD*: a name, a version, a list of fields and a list of subsections. The
//! stream carries the fields without tags, so both sides must know the VMSD. Here a VMSD is a struct with
//! `#[derive(VmState)]`; its fields are the wire's fields in the wire's order.
//!
//! Read in this order: [`VmState`] (what a declaration provides), [`Context`] (the facts that predicates may ask),
//! [`Field`] and [`Element`] with the field types of [`kinds`] and [`pointers`] (what a field can be), [`Saver`] and
//! [`Loader`] (the two walks), [`encode_described`] (the entry of the stream's description for one save) and
//! [`Description`] (the schema), [`compare`] (what of a source's state a destination would refuse). `docs/vmstate.md`
//! shows how to declare a device.
//!
//! # Promises
//!
//! * [`decode`] accepts only what [`encode`] gives back byte for byte; [`load`] accepts what QEMU accepts.
//! * No input makes a decoder panic or allocate more than its input's length times a small constant; counts are checked
//!   against [`Limits`](qevm_wire::Limits) and nesting against `Limits::depth`.
//! * [`encode`] never loses data silently: a value that the declaration has no place for is an error.
//!
//! # Example
//!
//! ```
//! use qevm_savevm::vmstate::{self, Context, VmState};
//! use qevm_wire::QemuVersion;
//!
//! /// A made-up device: two registers, and a third that newer versions add.
//! #[derive(VmState, Debug, Clone, Default, PartialEq)]
//! #[vmstate(name = "toy", version = 2, minimum_version = 1)]
//! struct Toy {
//!     control: u32,
//!     fifo: [u8; 4],
//!     #[vmstate(since = 2)]
//!     mask: u16,
//! }
//!
//! let ctx = Context::new(QemuVersion::new(10, 0), "microvm");
//! let toy = Toy { control: 1, fifo: [1, 2, 3, 4], mask: 0xff };
//! let bytes = vmstate::encode(&toy, &ctx)?;
//! assert_eq!(bytes, [0, 0, 0, 1, 1, 2, 3, 4, 0, 0xff]);
//! assert_eq!(vmstate::decode::<Toy>(&bytes, Toy::VERSION, &ctx)?, toy);
//! // An older source sends version 1 and no mask.
//! assert_eq!(vmstate::decode::<Toy>(&bytes[..8], 1, &ctx)?.mask, 0);
//! # Ok::<(), qevm_savevm::Error>(())
//! ```

pub mod compare;
mod context;
mod description;
mod error;
mod field;
pub mod kinds;
mod load;
mod nested;
mod pci_facts;
pub mod pointers;
mod save;
#[cfg(all(test, feature = "derive"))]
mod tests;

pub use context::{Accel, Context, IndexNotation, VirtioFacts};
pub use description::{Count, Description, ElementDescription, FieldDescription, Layout};
pub use error::VmStateError;
pub use field::{Bytes, Element, Field, FieldInfo, VarField, describe_single};
pub use kinds::{Bitmap, Buffer, QList, QTailQ, Table, Timer, Tmp, Unused, VStruct, VarBuffer};
pub use load::{Loader, SubsectionHeader};
pub use pci_facts::PciFacts;
#[cfg(feature = "derive")]
pub use qevm_savevm_derive::VmState;
pub use save::Saver;

use crate::vmdesc::StructDescription;
use crate::{Error, Reader};
pub use pointers::{MarkedPointers, Pointer, PointerField};
use qevm_wire::Cursor;
#[doc(hidden)]
pub use qevm_wire::{QemuVersion, Within};

/// True if the name of a subsection starts with its VMSD's and goes on, as loaders ask.
///
/// ```
/// use qevm_savevm::vmstate::VmState;
///
/// #[derive(VmState)]
/// #[vmstate(name = "toy/sub", version = 1)]
/// struct Sub {}
///
/// #[derive(VmState)]
/// #[vmstate(name = "toy", version = 1)]
/// struct Toy {
///     #[vmstate(subsection)]
///     sub: Option<Sub>,
/// }
/// ```
///
/// Under another name the same does not compile.
///
/// ```compile_fail,E0080
/// use qevm_savevm::vmstate::VmState;
///
/// #[derive(VmState)]
/// #[vmstate(name = "other/sub", version = 1)]
/// struct Sub {}
///
/// #[derive(VmState)]
/// #[vmstate(name = "toy", version = 1)]
/// struct Toy {
///     #[vmstate(subsection)]
///     sub: Option<Sub>,
/// }
/// ```
#[doc(hidden)]
pub const fn __names_subsection(vmsd: &str, subsection: &str) -> bool {
    let (vmsd, subsection) = (vmsd.as_bytes(), subsection.as_bytes());
    subsection.len() > vmsd.len() && starts_with(subsection, vmsd)
}

/// True if two subsections have one name.
///
/// ```
/// use qevm_savevm::vmstate::VmState;
///
/// #[derive(VmState)]
/// #[vmstate(name = "toy/first", version = 1)]
/// struct First {}
///
/// #[derive(VmState)]
/// #[vmstate(name = "toy/second", version = 1)]
/// struct Second {}
///
/// #[derive(VmState)]
/// #[vmstate(name = "toy", version = 1)]
/// struct Toy {
///     #[vmstate(subsection)]
///     first: Option<First>,
///     #[vmstate(subsection)]
///     second: Option<Second>,
/// }
/// ```
///
/// Under one name the same does not compile.
///
/// ```compile_fail,E0080
/// use qevm_savevm::vmstate::VmState;
///
/// #[derive(VmState)]
/// #[vmstate(name = "toy/sub", version = 1)]
/// struct First {}
///
/// #[derive(VmState)]
/// #[vmstate(name = "toy/sub", version = 1)]
/// struct Second {}
///
/// #[derive(VmState)]
/// #[vmstate(name = "toy", version = 1)]
/// struct Toy {
///     #[vmstate(subsection)]
///     first: Option<First>,
///     #[vmstate(subsection)]
///     second: Option<Second>,
/// }
/// ```
#[doc(hidden)]
pub const fn __same_name(one: &str, other: &str) -> bool {
    one.len() == other.len() && starts_with(one.as_bytes(), other.as_bytes())
}

const fn starts_with(text: &[u8], start: &[u8]) -> bool {
    let mut at = 0;
    while at < start.len() {
        if text[at] != start[at] {
            return false;
        }
        at += 1;
    }
    true
}

/// The state of one device (or of a structure or subsection in it) as QEMU's VMSD of that name lays it out.
///
/// Implemented by `#[derive(VmState)]`. Use the functions of this module rather than the methods.
pub trait VmState: Sized {
    /// QEMU's name of the VMSD, e.g. `ioapic` or `cpu/pkru`.
    const NAME: &'static str;
    /// The newest version this declaration writes and reads.
    const VERSION: u32;
    /// The oldest version this declaration reads.
    const MINIMUM_VERSION: u32;
    /// True if QEMU describes an array of these as one entry with `array_len`: no conditional field and no subsection
    /// anywhere inside.
    const COMPRESSIBLE: bool;

    /// The version a subsection or section of this value is written with; [`VERSION`](Self::VERSION) for nearly all.
    fn wire_version(&self, ctx: &Context) -> u32;
    /// As a subsection: true if QEMU's `needed` test would send this content.
    fn needed(&self, ctx: &Context) -> bool;
    /// Appends the fields of `version` and then the subsections.
    ///
    /// # Errors
    /// The value does not fit its declaration.
    fn save_fields(&self, out: &mut Saver<'_>, version: u32) -> Result<(), Error>;
    /// Reads the fields of `version` and then the subsections.
    ///
    /// # Errors
    /// The input is truncated, malformed, or not as declared.
    fn load_fields(input: &mut Loader<'_, '_, '_>, version: u32) -> Result<Self, Error>;
    /// Runs the pre-save hooks from the outside in, and leaves out subsections whose `needed` test fails.
    ///
    /// # Errors
    /// A hook refuses, or the profile's release has no place for state that is there.
    fn prepare(&mut self, ctx: &Context) -> Result<(), VmStateError>;
    /// Runs the post-load hooks from the inside out.
    ///
    /// # Errors
    /// A hook refuses.
    fn accept(&mut self, version: u32, ctx: &Context) -> Result<(), VmStateError>;
    /// The static schema for the release and machine of `ctx`.
    fn description(ctx: &Context) -> Description;
}

/// Encodes `value` as the payload of a section of its [`wire_version`](VmState::wire_version). No hook runs.
///
/// # Errors
/// A value that does not fit its declaration: a length that disagrees with its count, a conditional field that is
/// missing or in excess.
pub fn encode<T: VmState>(value: &T, ctx: &Context) -> Result<Vec<u8>, Error> {
    encode_version(value, value.wire_version(ctx), ctx)
}

/// Like [`encode`], as an older `version` of the section.
///
/// # Errors
/// As [`encode`], and a `version` that the declaration does not know.
pub fn encode_version<T: VmState>(value: &T, version: u32, ctx: &Context) -> Result<Vec<u8>, Error> {
    let mut saver = Saver::new(ctx);
    nested::check_version::<T>(version, 0)?;
    value.save_fields(&mut saver, version).within(|| T::NAME)?;
    Ok(saver.into_bytes())
}

/// Encodes `value` and gives the description QEMU would put into the stream's JSON for it.
///
/// # Errors
/// As [`encode_version`].
pub fn encode_described<T: VmState>(
    value: &T,
    version: u32,
    ctx: &Context,
) -> Result<(Vec<u8>, StructDescription), Error> {
    let mut saver = Saver::describing(ctx);
    nested::check_version::<T>(version, 0)?;
    saver.object(value, version).within(|| T::NAME)?;
    Ok(saver.into_described())
}

/// Decodes the payload of a section of `version`, and accepts only what re-encodes to the same bytes. No hook runs.
///
/// # Errors
/// Truncated, malformed or undeclared content, bytes left over, and encodings QEMU reads but never writes
/// ([`VmStateError::NotCanonical`]).
pub fn decode<T: VmState>(payload: &[u8], version: u32, ctx: &Context) -> Result<T, Error> {
    let mut reader = Reader::new(payload);
    let value = decode_from(&mut reader, version, ctx)?;
    reader.expect_end("section payload").within(|| T::NAME)?;
    Ok(value)
}

/// Like [`decode`], for a reader that may hold more than the section, with offsets that count from the stream's start.
///
/// # Errors
/// As [`decode`], except for bytes left over.
pub fn decode_from<T: VmState>(reader: &mut Reader<'_>, version: u32, ctx: &Context) -> Result<T, Error> {
    let mut loader = Loader::strict(reader, ctx);
    nested::check_version::<T>(version, loader.offset())?;
    T::load_fields(&mut loader, version).within(|| T::NAME)
}

/// What a source does at switchover: runs the pre-save hooks, drops subsections that are not needed, encodes.
///
/// Gives the section's version and payload.
///
/// # Errors
/// As [`encode`], what a hook refuses, and [`VmStateError::NotInRelease`] for state the profile's release cannot hold.
pub fn save<T: VmState>(value: &mut T, ctx: &Context) -> Result<(u32, Vec<u8>), Error> {
    value.prepare(ctx).map_err(|kind| Error::new(kind.into(), 0)).within(|| T::NAME)?;
    let version = value.wire_version(ctx);
    Ok((version, encode_version(value, version, ctx)?))
}

/// Like [`save`], with the description QEMU would put into the stream's JSON.
///
/// # Errors
/// As [`save`].
pub fn save_described<T: VmState>(value: &mut T, ctx: &Context) -> Result<(u32, Vec<u8>, StructDescription), Error> {
    value.prepare(ctx).map_err(|kind| Error::new(kind.into(), 0)).within(|| T::NAME)?;
    let version = value.wire_version(ctx);
    let (payload, described) = encode_described(value, version, ctx)?;
    Ok((version, payload, described))
}

/// What a destination does: decodes as leniently as QEMU (subsections in any order, any non-zero byte is true) and runs
/// the post-load hooks.
///
/// # Errors
/// As [`decode`] without `NotCanonical`, and what a hook refuses.
pub fn load<T: VmState>(reader: &mut Reader<'_>, version: u32, ctx: &Context) -> Result<T, Error> {
    load_by(Loader::lenient(reader, ctx), version, ctx)
}

/// What [`load_step`] has made of the input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoadStep<T> {
    /// The state is complete.
    Loaded {
        /// How many bytes of the input it was.
        consumed: usize,
        /// The state.
        state: T,
    },
    /// The input is too short.
    NeedMore {
        /// How many bytes, counted from the front of this input, the next call must show at least. Never more than
        /// a stream has with what follows the content.
        at_least: usize,
    },
}

/// Like [`load`], for content that is still arriving: `input` begins with it, and may go on past it.
///
/// The content has no length. It is over where no subsection follows, which the byte after it tells: so that has to be
/// there, and always is in a stream. Each call reads from the beginning; show it all that has come.
///
/// ```
/// use qevm_savevm::vmstate::{self, Context, LoadStep, VmState};
/// use qevm_wire::QemuVersion;
/// use std::io::Read;
///
/// #[derive(VmState, Debug, PartialEq)]
/// #[vmstate(name = "button", version = 1)]
/// struct Button {
///     pressed: u32,
///     times: u64,
/// }
///
/// /// Reads the state of a button, and gives what was read of the stream after it.
/// fn button(mut stream: impl Read, ctx: &Context) -> Result<(Button, Vec<u8>), Box<dyn std::error::Error>> {
///     let (mut input, mut shown) = (Vec::new(), 0);
///     loop {
///         match vmstate::load_step::<Button>(&input, 1, ctx)? {
///             LoadStep::Loaded { consumed, state } => return Ok((state, input.split_off(consumed))),
///             LoadStep::NeedMore { at_least } => input.resize(at_least, 0),
///         }
///         stream.read_exact(&mut input[shown..])?;
///         shown = input.len();
///     }
/// }
///
/// let stream = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0x7e, 0, 0, 0, 3];
/// let (button, rest) = button(&stream[..], &Context::new(QemuVersion::new(11, 1), "microvm"))?;
/// assert_eq!((button, &rest[..]), (Button { pressed: 1, times: 7 }, &[0x7e][..])); // a footer begins
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`load`], but for input that is too short: that is [`LoadStep::NeedMore`].
pub fn load_step<T: VmState>(input: &[u8], version: u32, ctx: &Context) -> Result<LoadStep<T>, Error> {
    let mut reader = Reader::new(input);
    match load_by(Loader::arriving(&mut reader, ctx), version, ctx) {
        Ok(state) => Ok(LoadStep::Loaded { consumed: input.len() - reader.remaining(), state }),
        Err(error) => match Cursor::<()>::at(0).need_more(&error, false) {
            Some(at_least) => Ok(LoadStep::NeedMore { at_least }),
            None => Err(error),
        },
    }
}

fn load_by<T: VmState>(mut loader: Loader<'_, '_, '_>, version: u32, ctx: &Context) -> Result<T, Error> {
    let start = loader.offset();
    nested::check_version::<T>(version, start)?;
    let mut value = T::load_fields(&mut loader, version).within(|| T::NAME)?;
    value.accept(version, ctx).map_err(|kind| Error::new(kind.into(), start)).within(|| T::NAME)?;
    Ok(value)
}

/// The example of the manual is run with the tests.
#[cfg(all(doctest, feature = "derive"))]
#[doc = include_str!("../../docs/vmstate.md")]
struct Manual;
