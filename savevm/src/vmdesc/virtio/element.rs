//! A request that is in flight, as QEMU dumps it.

use super::super::ScalarKind;
use super::Fields;
use crate::Error;

/// Descriptors an element has room for.
const DESCRIPTORS: u64 = 1024;

/// Reads an element (49 168 bytes): a structure as the x86-64 host has it in memory, little-endian.
///
/// With `packed` (the device offers VIRTIO_F_RING_PACKED) the number of descriptors is before it.
pub(in super::super) fn element(fields: &mut Fields<'_, '_>, name: String, packed: bool) -> Result<(), Error> {
    fields.structure(name, "VirtQueueElement", "VirtQueueElement", 0, |fields| {
        if packed {
            fields.u32("ndescs")?;
        }
        let mut word = |name| fields.scalar(name, "uint32 little-endian", ScalarKind::U32Le).map(|s| s.as_u64());
        word("index")?;
        let (out_num, in_num) = (word("out_num")?, word("in_num")?);
        word("padding")?;
        if out_num > DESCRIPTORS || in_num > DESCRIPTORS {
            return Err(fields.unexpected("descriptors of an element", out_num.max(in_num), DESCRIPTORS));
        }
        for array in ["in_addr", "out_addr"] {
            fields.scalars(array, "uint64 little-endian", ScalarKind::U64Le, DESCRIPTORS)?;
        }
        // Pairs of a host address, written as 0, and a length.
        for array in ["in_sg", "out_sg"] {
            fields.scalars(array, "uint64 little-endian", ScalarKind::U64Le, 2 * DESCRIPTORS)?;
        }
        Ok(())
    })
}
