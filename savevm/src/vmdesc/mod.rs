//! The description at the end of a stream, and device sections read with it.
//!
//! Read in this order: [`Description`] (what QEMU says it wrote), [`DeviceDescription::decode`] (a section's bytes to
//! fields), [`Node`] and [`Value`] (the fields; they encode to the bytes they came from),
//! [`Schema`] and `Catalogue` (feature `catalogue`; what to use where there is no description).
//!
//! # Promises
//!
//! Nothing here panics or recurses deeper than [`Limits::depth`](qevm_wire::Limits) allows. A parsed description takes
//! memory in proportion to its text, which [`Limits::vmdesc`](qevm_wire::Limits) bounds.

#[cfg(feature = "catalogue")]
mod catalogue;
mod composite;
mod context;
mod decode;
mod error;
mod fields;
mod json;
mod model;
mod msix;
mod pci;
mod registers;
mod s390x;
mod schema;
mod scsi;
mod slirp;
mod text;
mod tree;
mod value;
mod virtio;

#[cfg(feature = "catalogue")]
pub use catalogue::{BadCatalogue, Catalogue, Found};
pub use error::VmdescError;
pub use model::{Description, DeviceBody, DeviceDescription, FieldDescription, StructDescription};
pub use pci::vfio_configuration;
pub use schema::{Schema, Verdict};
pub use text::TextStyle;
pub use tree::{Name, Node, Struct, Value};
pub use value::{Scalar, ScalarKind, Scalars};
