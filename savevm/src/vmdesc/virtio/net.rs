//! The network device's own part (`virtio-net-device` version 11).

use super::super::ScalarKind;
use super::super::tree::SUBSECTION;
use super::Fields;
use super::common::Common;
use crate::Error;

/// VIRTIO_NET_F_CTRL_GUEST_OFFLOADS (virtio 1.2, 5.1.3).
const FEATURE_GUEST_OFFLOADS: u32 = 1 << 2;
/// One bit for each VLAN, as 32-bit words of the host.
const VLAN_WORDS: u64 = 4096 / 32;
const MAC: u64 = 6;
/// Where the configuration space has the number of queue pairs (virtio 1.2, 5.1.4), little-endian.
const CONFIG_QUEUE_PAIRS: std::ops::Range<usize> = 8..10;

/// Reads the device's part.
pub(super) fn device(fields: &mut Fields<'_, '_>, common: &Common<'_>) -> Result<(), Error> {
    fields.buffer("mac", MAC)?;
    fields.u32("vqs[0].tx_waiting")?;
    fields.u32("mergeable_rx_bufs")?;
    fields.u16("status")?;
    fields.u8("promisc")?;
    fields.u8("allmulti")?;
    let in_use = fields.u32("mac_table.in_use")?;
    fields.buffer("mac_table.macs", u64::from(in_use) * MAC)?;
    fields.scalars("vlans", "uint32 little-endian", ScalarKind::U32Le, VLAN_WORDS)?;
    fields.u32("has_vnet_hdr")?;
    for name in ["multi_overflow", "uni_overflow", "alluni", "nomulti", "nouni", "nobcast"] {
        fields.u8(format!("mac_table.{name}"))?;
    }
    fields.u8("has_ufo")?;
    // The device can have more queue pairs than its configuration space, or the guest, knows of.
    let told = common.config.get(CONFIG_QUEUE_PAIRS).and_then(|b| b.try_into().ok()).map(u16::from_le_bytes);
    let likelier = told.is_some_and(|pairs| pairs > 1);
    for queue_pairs in [likelier, !likelier] {
        if fields.attempt(|fields| queue_pairs_and_rest(fields, common, queue_pairs)) {
            return Ok(());
        }
    }
    Err(fields.unexpected("end of the network device", fields.input.reader.remaining() as u64, 0))
}

fn queue_pairs_and_rest(fields: &mut Fields<'_, '_>, common: &Common<'_>, queue_pairs: bool) -> Result<(), Error> {
    if queue_pairs {
        let max = fields.u16("max_queue_pairs")?;
        let current = fields.u16("curr_queue_pairs")?;
        if current > max || max < 2 {
            return Err(fields.unexpected("queue pairs", current.into(), max.into()));
        }
        for pair in 1..current {
            fields.u32(format!("vqs[{pair}].tx_waiting"))?;
        }
    }
    if common.guest_features & FEATURE_GUEST_OFFLOADS != 0 {
        fields.u64("curr_guest_offloads")?;
    }
    while fields.input.reader.peek() == Some(SUBSECTION) {
        let versions = [1, 2];
        if !versions.into_iter().any(|version| {
            fields.attempt(|fields| fields.subsection("virtio-net-device/rss", version, |f| rss(f, version)))
        }) {
            return Err(fields.unexpected("subsection of a network device", 0, 0));
        }
    }
    fields.input.reader.expect_end("virtio-net-device")
}

/// Receive-side scaling: version 1 up to 10.0, version 2 in 11.1.
fn rss(fields: &mut Fields<'_, '_>, version: u32) -> Result<(), Error> {
    const KEY: u64 = 40;
    fields.bool("rss_data.enabled")?;
    fields.bool("rss_data.redirect")?;
    fields.bool("rss_data.populate_hash")?;
    fields.u32("rss_data.runtime_hash_types")?;
    if version >= 2 {
        fields.u32("rss_data.supported_hash_types")?;
    }
    let entries = fields.u16("rss_data.indirections_len")?;
    fields.u16("rss_data.default_queue")?;
    fields.buffer("rss_data.key", KEY)?;
    fields.scalars("rss_data.indirections_table", "uint16", ScalarKind::U16, entries.into())
}
