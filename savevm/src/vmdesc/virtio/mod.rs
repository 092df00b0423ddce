//! The field of type `virtio`: transport, common part, queues, the device's own part, subsections.
//!
//! A description gives only its size. Its parts have no lengths either; where the device's own part ends is known from
//! the subsections after it, whose names and sizes are fixed. So the own part of a device that is not known here is
//! one opaque leaf, and all the rest is still taken apart. Facts: streams of QEMU 5.2, 7.2, 10.0 and 11.1.

mod common;
mod device;
mod element;
pub(super) mod gpu;
mod net;
mod subsection;
mod transport;

use super::context::Context;
use super::fields::{Fields, Input};
use crate::Error;
use common::common;
use qevm_wire::Limits;
use transport::Transport;

pub(super) use element::element;
pub(super) use transport::msix_vectors;

/// Reads the whole content of a field of type `virtio`.
///
/// A stream does not say which transport it is, nor how long a PCI device's configuration space is. Only one choice
/// lets everything be read to the last byte; one that leaves the device's own part unread is the last resort.
pub(super) fn device(fields: &mut Fields<'_, '_>, context: &Context<'_>) -> Result<(), Error> {
    let candidates = transport::candidates(context.idstr, fields.input.reader.rest());
    for opaque_part in [false, true] {
        for &transport in &candidates {
            if fields.attempt(|fields| with_transport(fields, transport, context, opaque_part)) {
                return Ok(());
            }
        }
    }
    Err(fields.unexpected("transport of a virtio device", 0, 0))
}

fn with_transport(
    fields: &mut Fields<'_, '_>,
    transport: Transport,
    context: &Context<'_>,
    opaque_part: bool,
) -> Result<(), Error> {
    let mut vectors = false;
    fields.structure("transport", transport.name(), transport.name(), 0, |fields| {
        vectors = transport.config(fields)?;
        Ok(())
    })?;
    let common = common(fields, transport, vectors)?;
    let own = subsection::start(fields)?;
    device::own_part(fields, own, &common, context.device, opaque_part)?;
    subsection::chain(fields)?;
    fields.input.reader.expect_end("virtio")
}

/// How long the field may be that `rest` starts with: up to where its subsections end, or its queues, or all.
#[cfg_attr(not(feature = "catalogue"), allow(dead_code))]
pub(super) fn lengths(rest: &[u8]) -> Vec<usize> {
    let mut lengths = subsection::ends(rest);
    for transport in transport::candidates("", rest) {
        let mut input = Input::new(rest, 0, &Limits::default());
        let mut fields = Fields::new(&mut input);
        let vectors = transport.config(&mut fields);
        if vectors.is_ok_and(|vectors| common(&mut fields, transport, vectors).is_ok()) {
            lengths.push(fields.offset() as usize);
        }
    }
    lengths.push(rest.len());
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}
