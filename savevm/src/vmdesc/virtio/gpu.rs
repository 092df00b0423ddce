//! The field of type `virtio-gpu`: resources and scanouts.

use super::super::fields::Input;
use super::Fields;
use crate::Error;
use qevm_wire::Limits;

/// Bytes of a scanout up to the cursor (QEMU 5.2, 7.2).
const SCANOUT: u64 = 40;
/// Bytes of a scanout with its frame buffer (QEMU 10.0, 11.1).
const SCANOUT_WITH_FRAME_BUFFER: u64 = SCANOUT + 24;
/// Every pixel format of virtio-gpu takes so many bytes (virtio 1.2, 5.7.6.8).
const BYTES_PER_PIXEL: u64 = 4;

/// Reads the resources up to resource id 0, then the scanouts, which are all that is left.
pub(in super::super) fn resources_and_scanouts(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    content(fields, None)
}

/// How long the field may be that `rest` starts with.
pub(in super::super) fn lengths(rest: &[u8]) -> Vec<usize> {
    let length = |frame_buffer| {
        let mut input = Input::new(rest, 0, &Limits::default());
        let mut fields = Fields::new(&mut input);
        content(&mut fields, Some(frame_buffer)).ok().map(|()| fields.offset() as usize)
    };
    let mut lengths: Vec<usize> = [false, true].into_iter().filter_map(length).collect();
    lengths.dedup();
    lengths
}

/// `frame_buffer`: scanouts have one; `None` if what is left tells.
fn content(fields: &mut Fields<'_, '_>, frame_buffer: Option<bool>) -> Result<(), Error> {
    for index in 0.. {
        let mut next = fields.input.reader.clone();
        if next.be32()? == 0 {
            break;
        }
        fields.structure(format!("resources[{index}]"), "struct", "virtio-gpu-resource", 0, resource)?;
    }
    fields.u32("resources.end")?;
    fields.i32("enable")?;
    let scanouts = fields.u32("max_outputs")?;
    let left = fields.input.reader.remaining() as u64;
    let frame_buffer = frame_buffer.unwrap_or(left == u64::from(scanouts) * SCANOUT_WITH_FRAME_BUFFER);
    for index in 0..scanouts {
        fields.structure(format!("scanout[{index}]"), "struct", "virtio-gpu-one-scanout", 1, |fields| {
            for name in ["resource_id", "width", "height"] {
                fields.u32(name)?;
            }
            for name in ["x", "y"] {
                fields.i32(name)?;
            }
            for name in ["resource_id", "hot_x", "hot_y", "pos.x", "pos.y"] {
                fields.u32(format!("cursor.{name}"))?;
            }
            if frame_buffer {
                for name in ["format", "bytes_pp", "width", "height", "stride", "offset"] {
                    fields.u32(format!("fb.{name}"))?;
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A two-dimensional resource: its backing pages in the guest, and its pixels.
fn resource(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    fields.u32("resource_id")?;
    let width = fields.u32("width")?;
    let height = fields.u32("height")?;
    fields.u32("format")?;
    let pages = fields.u32("iov_cnt")?;
    for page in 0..pages {
        fields.u64(format!("addrs[{page}]"))?;
        fields.u32(format!("iov[{page}].len"))?;
    }
    let pixels = u64::from(width) * u64::from(height);
    fields.buffer("pixels", pixels.saturating_mul(BYTES_PER_PIXEL)).map(drop)
}
