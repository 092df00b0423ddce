//! The description at the end of a stream, and device sections read with it.
//!
//! Read in this order: [`Description`] (what QEMU says it wrote).
//!
//! # Promises
//!
//! Nothing here panics or recurses deeper than [`Limits::depth`](qevm_wire::Limits) allows. A parsed description takes
//! memory in proportion to its text, which [`Limits::vmdesc`](qevm_wire::Limits) bounds.

mod error;
mod json;
mod model;

pub use error::VmdescError;
pub use model::{Description, DeviceBody, DeviceDescription, FieldDescription, StructDescription};
