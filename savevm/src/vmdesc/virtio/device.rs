//! What each virtio device saves between its queues and the subsections.

use super::super::ScalarKind;
use super::super::tree::{SUBSECTION, Value};
use super::common::Common;
use super::element::element;
use super::{Fields, net};
use crate::Error;

/// Reads the device's own part, `size` bytes. One that is not as known here is an opaque leaf if `opaque` allows it.
pub(super) fn own_part(
    fields: &mut Fields<'_, '_>,
    size: u64,
    common: &Common<'_>,
    device: &str,
    opaque: bool,
) -> Result<(), Error> {
    if size == 0 {
        return Ok(());
    }
    let layouts: &[Layout] = match device {
        "virtio-blk" => &[|f, c| requests(f, c, false), |f, c| requests(f, c, true)],
        "virtio-net" => &[net::device],
        "virtio-console" => &[|f, _| serial(f, false), |f, _| serial(f, true)],
        "virtio-balloon" => &[|f, _| balloon(f)],
        "virtio-mem" => &[|f, _| memory(f)],
        "virtio-iommu" => &[|f, _| iommu(f)],
        _ => &[],
    };
    for layout in layouts {
        let known = fields.attempt(|fields| {
            fields.bounded(size, "virtio device", |fields| {
                fields.structure("device", "struct", device.to_owned(), 0, |fields| layout(fields, common))
            })
        });
        if known {
            return Ok(());
        }
    }
    if !opaque {
        return Err(fields.unexpected("bytes of the virtio device's own part", size, 0));
    }
    fields.opaque("device", device.to_owned(), size)
}

pub(super) type Layout = fn(&mut Fields<'_, '_>, &Common<'_>) -> Result<(), Error>;

/// Block: requests in flight. With more than one queue each says which it came from.
fn requests(fields: &mut Fields<'_, '_>, common: &Common<'_>, packed: bool) -> Result<(), Error> {
    fields.list("requests", "list", |fields| {
        for index in 0.. {
            if !fields.element_marker(index)? {
                break;
            }
            if common.queues > 1 {
                fields.u32(format!("[{index}].queue"))?;
            }
            element(fields, format!("[{index}]"), packed)?;
        }
        Ok(())
    })
}

/// Console and serial ports.
fn serial(fields: &mut Fields<'_, '_>, packed: bool) -> Result<(), Error> {
    fields.u16("cols")?;
    fields.u16("rows")?;
    // In the byte order of the guest, as its driver reads it: no device has 65536 ports.
    let plain = matches!(fields.input.reader.rest(), [0, 0, ..]);
    let ports_max = match plain {
        true => fields.u32("max_nr_ports")?.into(),
        false => fields.scalar("max_nr_ports", "uint32", ScalarKind::U32Le)?.as_u64(),
    };
    fields.scalars("ports_map", "uint32", ScalarKind::U32, ports_max.div_ceil(32))?;
    let ports = fields.u32("nr_active_ports")?;
    for port in 0..ports {
        fields.structure(format!("ports[{port}]"), "struct", "virtio-serial-port", 0, |fields| {
            fields.u32("id")?;
            fields.bool("guest_connected")?;
            fields.bool("host_connected")?;
            if fields.u32("elem_popped")? != 0 {
                fields.u32("iov_idx")?;
                fields.u64("iov_offset")?;
                element(fields, "elem".to_owned(), packed)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn balloon(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    fields.u32("num_pages")?;
    fields.u32("actual")?;
    while fields.input.reader.peek() == Some(SUBSECTION) {
        let before = fields.members.len();
        fields.attempt(|fields| {
            fields.subsection("virtio-balloon-device/free-page-report", 1, |fields| {
                fields.u32("free_page_hint_cmd_id")?;
                fields.u32("free_page_hint_status").map(drop)
            })
        });
        if fields.members.len() == before {
            fields.subsection("virtio-balloon-device/page-poison", 1, |f| f.u32("poison_val").map(drop))?;
        }
    }
    Ok(())
}

/// Memory device. Where its bitmap travels in the section `virtio-mem-device-early`, two sizes are left.
fn memory(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    const EARLY_MIGRATION: usize = 16;
    const BLOCKS_PER_WORD: u64 = 64;
    if fields.input.reader.remaining() == EARLY_MIGRATION {
        fields.u64("usable_region_size")?;
        return fields.u64("requested_size").map(drop);
    }
    fields.u64("addr")?;
    let region = fields.u64("region_size")?;
    let block = fields.u64("block_size")?;
    fields.u32("node")?;
    fields.u64("usable_region_size")?;
    fields.u64("size")?;
    fields.u64("requested_size")?;
    let Some(blocks) = region.checked_div(block) else {
        return Err(fields.unexpected("block size of a memory device", 0, 1));
    };
    fields.leaf("bitmap", "bitmap", blocks.div_ceil(BLOCKS_PER_WORD) * 8, |b| Value::Bitmap(b.into())).map(drop)
}

/// IOMMU: address domains as a tree, and whether requests bypass it (7.2 to 11.1; version 1 of the device had no such
/// flag).
fn iommu(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    fields.list("domains", "gtree", |fields| {
        let domains = fields.u32("count")?;
        for index in 0..u64::from(domains) {
            if !fields.element_marker(index)? {
                return Err(fields.unexpected("element marker", 0, 1));
            }
            fields.u64(format!("[{index}].key"))?;
            fields.structure(format!("[{index}]"), "struct", "domain", 0, domain)?;
        }
        fields.element_marker(domains.into()).map(drop)
    })?;
    if !fields.input.reader.is_empty() {
        fields.bool("bypass")?;
    }
    Ok(())
}

/// One address domain: its mappings as a tree, its endpoints as a list.
fn domain(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    fields.u32("id")?;
    fields.list("mappings", "gtree", |fields| {
        let mappings = fields.u32("count")?;
        for index in 0..u64::from(mappings) {
            fields.element_marker(index)?;
            for name in ["low", "high", "phys_addr"] {
                fields.u64(format!("[{index}].{name}"))?;
            }
            fields.u32(format!("[{index}].flags"))?;
        }
        fields.element_marker(mappings.into()).map(drop)
    })?;
    fields.list("endpoints", "qlist", |fields| {
        for index in 0.. {
            if !fields.element_marker(index)? {
                break;
            }
            fields.u32(format!("[{index}].id"))?;
        }
        Ok(())
    })
}
