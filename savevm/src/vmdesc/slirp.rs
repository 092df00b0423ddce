//! Old-style sections: handlers that write bytes without a description.

use super::fields::Fields;
use super::s390x;
use crate::Error;

/// Addresses that slirp's DHCP server hands out.
const BOOTP_CLIENTS: u64 = 16;

/// Reads an old-style section of `size` bytes.
pub(super) fn section(fields: &mut Fields<'_, '_>, idstr: &str, size: u64) -> Result<(), Error> {
    let known = fields.attempt(|fields| {
        fields.bounded(size, "section", |fields| match idstr {
            "slirp" => state(fields),
            "s390-skeys" => s390x::storage_keys(fields),
            "todclock" => s390x::clock(fields),
            _ => Err(fields.unexpected("size of an unknown section", size, 0)),
        })
    });
    if !known {
        fields.opaque("data", "buffer", size)?;
    }
    Ok(())
}

/// State of the user-mode network stack without a connection that `guestfwd` opened: 131 bytes in QEMU 5.2 to 11.1.
fn state(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    match fields.u8("sockets.end")? {
        0 => {}
        found => return Err(fields.unexpected("end of the sockets", found.into(), 0)),
    }
    fields.u16("ip_id")?;
    for client in 0..BOOTP_CLIENTS {
        fields.structure(format!("bootp_clients[{client}]"), "struct", "bootp_client", 0, |fields| {
            fields.u16("allocated")?;
            fields.buffer("macaddr", 6).map(drop)
        })?;
    }
    Ok(())
}
