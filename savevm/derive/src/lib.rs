//! `#[derive(VmState)]` for `qevm-savevm`: the state of a device, declared once.
//!
//! `attributes` reads the `#[vmstate(…)]` attributes into a declaration and refuses what makes no sense;
//! `expand` writes the implementation of `qevm_savevm::vmstate::VmState` for it, in `walk` the parts that follow the
//! wire (save and load). `docs/vmstate.md` is the manual.
//!
//! # Example
//!
//! ```
//! use qevm_savevm::vmstate::{self, Context, VmState};
//! use qevm_wire::QemuVersion;
//!
//! /// The first fields of QEMU's `ioapic`.
//! #[derive(VmState, Debug, PartialEq)]
//! #[vmstate(name = "ioapic", version = 3, minimum_version = 1)]
//! struct Ioapic {
//!     id: u8,
//!     ioregsel: u8,
//! }
//!
//! let context = Context::new(QemuVersion::NEWEST, "microvm");
//! let (version, saved) = vmstate::save(&mut Ioapic { id: 0, ioregsel: 0x10 }, &context)?;
//! assert_eq!((version, saved), (3, vec![0, 0x10]));
//! # Ok::<(), qevm_savevm::Error>(())
//! ```
#![forbid(unsafe_code)]

mod attributes;
mod expand;
#[cfg(test)]
mod tests;
mod walk;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Implements `VmState` for a struct with named fields, which are the VMSD's fields in the wire's order.
///
/// On the struct, `#[vmstate(…)]` takes
///
/// | attribute | meaning |
/// |---|---|
/// | `name = "ioapic"` | the VMSD's name (required) |
/// | `version = 3` | the version it writes (required) |
/// | `minimum_version = 1` | the oldest version it reads; `version` if left out |
/// | `needed = \|state, ctx\| …` | as a subsection: whether this content is sent |
/// | `wire_version = \|state, ctx\| …` | the version this value is written with, where it is not always `version` |
/// | `release_versions = \|ctx\| …` | version and minimum version of the context's release, for the schema |
/// | `pre_save = path` | `fn(&mut Self, &Context) -> Result<(), VmStateError>` |
/// | `crate = path` | where `qevm-savevm` is, if a façade hands it on: `crate = vmm::savevm` |
/// | `post_load = path` | `fn(&mut Self, version: u32, &Context) -> Result<(), VmStateError>` |
///
/// and on a field
///
/// | attribute | meaning |
/// |---|---|
/// | `name = "env.eip"` | QEMU's name of the field, where it is not the Rust name |
/// | `type = "uint8 equal"` | QEMU's name of the type, where it is not the Rust type's usual one |
/// | `since = 2` | first version that has it; `Default` in older ones |
/// | `exists = expr` | the field, an `Option`, exists when `expr` holds |
/// | `released = expr` | the same, from `ctx` alone: not a condition to the schema and the descriptions |
/// | `len = expr` | length of a `Vec`, `VarBuffer` (bytes) or `Bitmap` (bits) |
/// | `null = expr` | which pointers (`index`) of a `Pointer` field are NULL |
/// | `context = expr` | the `Context` that the field's own declaration sees, made from `ctx` and earlier fields |
/// | `subsection` | the field, an `Option` of another `VmState`, is a subsection |
/// | `needed = \|state, ctx\| …` | of a subsection: whether the parent sends it |
/// | `since_release = "11.0"`, `until_release = "8.1"` | of a subsection: the releases that know it |
///
/// In the expressions of `exists`, `len`, `null` and `context` the fields declared before are in scope as references,
/// `version` is the version being written or read and `ctx` the `Context`.
///
/// Each version is a number or the name of a constant.
///
/// ```
/// use qevm_savevm::vmstate::{self, Context, VmState};
/// use qevm_wire::QemuVersion;
///
/// const WITH_PULSE: u32 = 2;
///
/// #[derive(VmState)]
/// #[vmstate(name = "button", version = WITH_PULSE, minimum_version = 1)]
/// struct Button {
///     pressed: u8,
///     #[vmstate(since = WITH_PULSE)]
///     pulse: u8,
/// }
///
/// let context = Context::new(QemuVersion::new(10, 0), "microvm");
/// let old: Button = vmstate::decode(&[1], 1, &context)?;
/// assert_eq!(vmstate::save(&mut Button { pulse: 7, ..old }, &context)?, (2, vec![1, 7]));
/// # Ok::<(), qevm_savevm::Error>(())
/// ```
///
/// They are in order, or the declaration does not compile.
///
/// ```compile_fail,E0080
/// use qevm_savevm::vmstate::VmState;
///
/// const WITH_PULSE: u32 = 2;
///
/// #[derive(VmState)]
/// #[vmstate(name = "button", version = 1)]
/// struct Button {
///     pressed: u8,
///     #[vmstate(since = WITH_PULSE)]
///     pulse: u8,
/// }
/// ```
#[proc_macro_derive(VmState, attributes(vmstate))]
pub fn derive_vm_state(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    attributes::Declaration::parse(&input)
        .map(|declaration| expand::implementation(&declaration))
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}
