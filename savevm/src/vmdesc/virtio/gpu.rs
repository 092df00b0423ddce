//! The field of type `virtio-gpu`: resources and scanouts.

use super::super::ScalarKind;
use super::super::fields::Input;
use super::Fields;
use crate::Error;
use qevm_wire::Limits;

/// Bytes of a scanout up to the cursor (QEMU 5.2, 7.2).
const SCANOUT: u64 = 40;
/// Bytes of its frame buffer (QEMU 10.0, 11.1).
const FRAME_BUFFER: u64 = 24;
/// Scanouts that a display can have (virtio 1.2, 5.7.4).
const SCANOUTS_MAX: u32 = 16;
/// Every pixel format of virtio-gpu takes this number of bytes (virtio 1.2, 5.7.6.8).
const BYTES_PER_PIXEL: u64 = 4;

/// Reads the resources up to resource id 0, then the scanouts, which are all that is left.
pub(in super::super) fn resources_and_scanouts(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    let scanouts = head(fields)?;
    let left = fields.input.reader.remaining() as u64;
    let without = u64::from(scanouts) * SCANOUT;
    let frame_buffers = left.saturating_sub(without) / FRAME_BUFFER;
    if frame_buffers == 0 || frame_buffers == u64::from(scanouts) {
        return (0..scanouts).try_for_each(|index| scanout(fields, index, frame_buffers > 0));
    }
    if frame_buffers > scanouts.into() || left != without + frame_buffers * FRAME_BUFFER {
        return Err(fields.unexpected("bytes of a display's scanouts", left, without));
    }
    // The first has a frame buffer. Which of the others have one depends on the source's memory (seen in 10.0 and 11.1
    // with `max_outputs` above 2), and nothing in the stream tells.
    scanout(fields, 0, true)?;
    fields.scalars("scanout[1..]", "uint32", ScalarKind::U32, (left - SCANOUT - FRAME_BUFFER) / 4)
}

/// How long the field may be that `rest` starts with.
#[cfg_attr(not(feature = "catalogue"), allow(dead_code))]
pub(in super::super) fn lengths(rest: &[u8]) -> Vec<usize> {
    let mut input = Input::new(rest, 0, &Limits::default());
    let mut fields = Fields::new(&mut input);
    let Ok(scanouts) = head(&mut fields) else { return Vec::new() };
    let start = fields.offset();
    let with_frame_buffer = 0..=u64::from(scanouts.min(SCANOUTS_MAX));
    let lengths = with_frame_buffer.map(|n| start + u64::from(scanouts) * SCANOUT + n * FRAME_BUFFER);
    lengths.filter(|len| *len <= rest.len() as u64).map(|len| len as usize).collect()
}

/// Reads what is before the scanouts, and says how many there are.
fn head(fields: &mut Fields<'_, '_>) -> Result<u32, Error> {
    for index in 0.. {
        let mut next = fields.input.reader.clone();
        if next.be32()? == 0 {
            break;
        }
        fields.structure(format!("resources[{index}]"), "struct", "virtio-gpu-resource", 0, resource)?;
    }
    fields.u32("resources.end")?;
    fields.i32("enable")?;
    fields.u32("max_outputs")
}

fn scanout(fields: &mut Fields<'_, '_>, index: u32, frame_buffer: bool) -> Result<(), Error> {
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
    })
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
