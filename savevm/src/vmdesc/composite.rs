//! Types that are one field in a description and have a layout of their own on the wire.

use super::context::Context;
use super::fields::Fields;
use super::msix::{MSIX_ENTRY, msix_tables};
use super::tree::Value;
use super::{ScalarKind, registers, scsi, virtio};
use crate::Error;

/// Reads a field of `size` bytes whose type is no number.
///
/// A type whose layout is not known here, or that does not keep to its layout, becomes an opaque leaf: its length is
/// known in any case.
pub(super) fn field(
    fields: &mut Fields<'_, '_>,
    name: &str,
    type_name: &str,
    size: u64,
    context: &Context<'_>,
) -> Result<(), Error> {
    let (owned_name, owned_type) = (|| name.to_owned(), || type_name.to_owned());
    match type_name {
        "buffer" | "pci config" => {
            return fields.leaf(owned_name(), owned_type(), size, |b| Value::Buffer(b.into())).map(drop);
        }
        "unused_buffer" => return fields.leaf(owned_name(), owned_type(), size, |b| Value::Unused(b.into())).map(drop),
        "bitmap" if size.is_multiple_of(8) => {
            return fields.leaf(owned_name(), owned_type(), size, |b| Value::Bitmap(b.into())).map(drop);
        }
        "pci irq state" if size.is_multiple_of(4) => {
            return fields.scalars(owned_name(), owned_type(), ScalarKind::I32, size / 4);
        }
        _ => {}
    }
    if registers::number(fields, name, type_name, size)? {
        return Ok(());
    }
    let known = fields.attempt(|fields| {
        fields.bounded(size, "field", |fields| {
            fields.structure(owned_name(), owned_type(), "", 0, |fields| match type_name {
                "msix state" => msix(fields, size),
                "shpc" => shpc(fields, size),
                "capability" => capability(fields),
                "scsi-requests" => scsi::requests(fields),
                "usb-redir-parser" => usb_redir_parser(fields),
                "usb-redir-bufpq" => usb_redir_packets(fields),
                "usb-redir-packet-id-q" => usb_redir_packet_ids(fields),
                "virtio-gpu" => virtio::gpu::resources_and_scanouts(fields),
                "avr" => registers::altivec(fields),
                "slbe" => registers::segment(fields),
                "fpr" => registers::mips_float(fields),
                "tlb_entry" => registers::mips_tlb(fields, size),
                "virtio" => virtio::device(fields, context),
                _ => Err(fields.unexpected("size of an unknown type", size, 0)),
            })
        })
    });
    if !known {
        fields.opaque(owned_name(), owned_type(), size)?;
    }
    Ok(())
}

/// MSI-X table and pending bit array as the device has them in memory.
fn msix(fields: &mut Fields<'_, '_>, size: u64) -> Result<(), Error> {
    let vectors = size * 8 / (8 * MSIX_ENTRY + 1);
    if vectors * MSIX_ENTRY + vectors.div_ceil(8) != size {
        return Err(fields.unexpected("size of an MSI-X state", size, vectors * MSIX_ENTRY + vectors.div_ceil(8)));
    }
    msix_tables(fields, vectors)
}

/// Registers of a standard hot-plug controller (PCI Standard Hot-Plug Controller and Subsystem Specification 1.0,
/// chapter 4), little-endian: a working register set, then one dword for each slot.
fn shpc(fields: &mut Fields<'_, '_>, size: u64) -> Result<(), Error> {
    const WORKING_REGISTER_DWORDS: u64 = 9;
    let slots = (size / 4).checked_sub(WORKING_REGISTER_DWORDS);
    let Some(slots) = slots.filter(|_| size.is_multiple_of(4)) else {
        return Err(fields.unexpected("size of the hot-plug registers", size, 4 * WORKING_REGISTER_DWORDS));
    };
    fields.scalars("registers", "uint32 little-endian", ScalarKind::U32Le, WORKING_REGISTER_DWORDS)?;
    fields.scalars("slots", "uint32 little-endian", ScalarKind::U32Le, slots)
}

/// A capability name of the configuration section.
fn capability(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    let len = fields.u8("length")?;
    fields.buffer("name", len.into()).map(drop)
}

/// What libusbredirparser serialises of a connection; none (seen with QEMU 11.1) if no peer is connected.
fn usb_redir_parser(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    let len = fields.u32("length")?;
    fields.buffer("data", len.into()).map(drop)
}

/// Packets that a redirected device has sent and the guest has not fetched: the empty queue was seen with QEMU 11.1,
/// the packets are from memory of the format, and only taken where all bytes come out even.
fn usb_redir_packets(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    for index in 0..fields.u32("packets")? {
        fields.structure(format!("[{index}]"), "struct", "usb-redir-packet", 0, |fields| {
            let len = fields.u32("length")?;
            fields.u32("status")?;
            fields.buffer("data", len.into()).map(drop)
        })?;
    }
    Ok(())
}

/// Ids of packets that were cancelled or that the peer already has; as for the packets, only the empty queue was seen.
fn usb_redir_packet_ids(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    let count = fields.u32("ids")?;
    fields.scalars("id", "uint64", ScalarKind::U64, count.into())
}
