//! The field of type `scsi-requests`: what a SCSI disk was doing.

use super::ScalarKind;
use super::fields::{Fields, Input};
use super::virtio::element;
use crate::Error;
use qevm_wire::Limits;

const CDB: u64 = 16;
/// The request waits to be tried again, after an error that stopped the guest.
const RETRY: u64 = 1;
/// The request was under way.
const UNDER_WAY: u64 = 2;

/// Reads the requests in flight: a list with a marker of its own kind.
///
/// Between a request and the disk's part of it, a bus may write what it needs; only virtio's does. Seen are requests of
/// `usb-storage`, QEMU 5.2 to 11.1; virtio's part and data on its way to the disk are from memory of the format, and
/// only taken where all bytes come out even.
pub(super) fn requests(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    for bus in Bus::ALL {
        if fields.attempt(|fields| {
            list(fields, bus)?;
            fields.input.reader.expect_end("scsi-requests")
        }) {
            return Ok(());
        }
    }
    Err(fields.unexpected("SCSI requests", fields.input.reader.remaining() as u64, 1))
}

/// How long the field may be that `rest` starts with.
#[cfg_attr(not(feature = "catalogue"), allow(dead_code))]
pub(super) fn lengths(rest: &[u8]) -> Vec<usize> {
    let length = |bus| {
        let mut input = Input::new(rest, 0, &Limits::default());
        let mut fields = Fields::new(&mut input);
        list(&mut fields, bus).ok().map(|()| fields.offset() as usize)
    };
    let mut lengths: Vec<usize> = Bus::ALL.into_iter().filter_map(length).collect();
    lengths.dedup();
    lengths
}

#[derive(Clone, Copy)]
enum Bus {
    Plain,
    Virtio { packed: bool },
}

impl Bus {
    const ALL: [Bus; 3] = [Bus::Plain, Bus::Virtio { packed: false }, Bus::Virtio { packed: true }];
}

fn list(fields: &mut Fields<'_, '_>, bus: Bus) -> Result<(), Error> {
    for index in 0.. {
        let marker = fields.scalar(format!("[{index}].state"), "element marker", ScalarKind::ElementMarker)?.as_u64();
        match marker {
            0 => break,
            RETRY | UNDER_WAY => fields.structure(format!("[{index}]"), "struct", "scsi-request", 0, |fields| {
                request(fields, bus, marker == RETRY)
            })?,
            found => return Err(fields.unexpected("state of a SCSI request", found, UNDER_WAY)),
        }
    }
    Ok(())
}

fn request(fields: &mut Fields<'_, '_>, bus: Bus, retry: bool) -> Result<(), Error> {
    let operation = fields.buffer("cdb", CDB)?.first().copied().unwrap_or_default();
    fields.u32("tag")?;
    fields.u32("lun")?;
    if let Bus::Virtio { packed } = bus {
        fields.u32("queue")?;
        element(fields, "elem".to_owned(), packed)?;
    }
    fields.u64("sector")?;
    fields.u32("sector_count")?;
    let buffer_len = fields.u32("buflen")?;
    if buffer_len == 0 {
        return Ok(());
    }
    if is_write(operation) {
        return fields.buffer("data", buffer_len.into()).map(drop);
    }
    if !retry {
        let len = fields.u32("data_len")?;
        fields.buffer("data", len.into())?;
    }
    Ok(())
}

/// Whether data goes to the disk (SCSI Block Commands 3, SCSI Primary Commands 4).
fn is_write(operation: u8) -> bool {
    const WRITE: [u8; 4] = [0x0a, 0x2a, 0xaa, 0x8a];
    const WRITE_AND_VERIFY: [u8; 3] = [0x2e, 0xae, 0x8e];
    const WRITE_SAME: [u8; 2] = [0x41, 0x93];
    const PARAMETERS: [u8; 4] = [0x15, 0x55, 0x42, 0x5f]; // mode select, unmap, persistent reservation
    [&WRITE[..], &WRITE_AND_VERIFY, &WRITE_SAME, &PARAMETERS].iter().any(|group| group.contains(&operation))
}
