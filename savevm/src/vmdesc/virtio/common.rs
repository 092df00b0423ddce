//! What all virtio devices have: status, features, configuration space and queues.

use super::Fields;
use super::transport::Transport;
use crate::Error;

/// Queues a virtio device can have; subsections list all of them (all QEMU releases).
pub(super) const QUEUES_MAX: u32 = 1024;

/// What later parts depend on.
pub(super) struct Common<'a> {
    /// The low 32 feature bits that the guest accepted.
    pub(super) guest_features: u32,
    /// The device's configuration space as the guest sees it.
    pub(super) config: &'a [u8],
    pub(super) queues: u32,
}

/// Reads status, features, configuration space and queues.
pub(super) fn common<'a>(
    fields: &mut Fields<'_, 'a>,
    transport: Transport,
    vectors: bool,
) -> Result<Common<'a>, Error> {
    fields.u8("status")?;
    fields.u8("isr")?;
    fields.u16("queue_sel")?;
    let guest_features = fields.u32("guest_features")?;
    let config_len = fields.u32("config_len")?;
    let config = fields.buffer("config", config_len.into())?;
    let queues = fields.u32("queues")?;
    if queues > QUEUES_MAX {
        return Err(fields.unexpected("number of virtio queues", queues.into(), QUEUES_MAX.into()));
    }
    for queue in 0..queues {
        fields.structure(format!("vq[{queue}]"), "struct", "virtqueue", 0, |fields| {
            fields.u32("num")?;
            if transport.has_queue_align() {
                fields.u32("align")?;
            }
            fields.u64("desc")?;
            fields.u16("last_avail_idx")?;
            if vectors {
                fields.u16("vector")?;
            }
            Ok(())
        })?;
    }
    Ok(Common { guest_features, config, queues })
}
