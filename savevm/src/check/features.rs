//! Names of virtio's feature bits (virtio 1.2, chapters 5 and 6), as QEMU's properties have them where there is one.

/// Of every device.
const COMMON: &[(u32, &str)] = &[
    (24, "notify_on_empty"),
    (27, "any_layout"),
    (28, "indirect_desc"),
    (29, "event_idx"),
    (30, "bad_feature"),
    (32, "version_1"),
    (33, "iommu_platform"),
    (34, "packed"),
    (35, "in_order"),
    (36, "order_platform"),
    (37, "sr_iov"),
    (38, "notification_data"),
    (39, "notif_config_data"),
    (40, "queue_reset"),
    (41, "admin_vq"),
];
const NET: &[(u32, &str)] = &[
    (0, "csum"),
    (1, "guest_csum"),
    (2, "ctrl_guest_offloads"),
    (3, "host_mtu"),
    (5, "mac"),
    (6, "gso"),
    (7, "guest_tso4"),
    (8, "guest_tso6"),
    (9, "guest_ecn"),
    (10, "guest_ufo"),
    (11, "host_tso4"),
    (12, "host_tso6"),
    (13, "host_ecn"),
    (14, "host_ufo"),
    (15, "mrg_rxbuf"),
    (16, "status"),
    (17, "ctrl_vq"),
    (18, "ctrl_rx"),
    (19, "ctrl_vlan"),
    (20, "ctrl_rx_extra"),
    (21, "guest_announce"),
    (22, "mq"),
    (23, "ctrl_mac_addr"),
    (54, "guest_uso4"),
    (55, "guest_uso6"),
    (56, "host_uso"),
    (57, "hash"),
    (59, "guest_hdrlen"),
    (60, "rss"),
    (61, "guest_rsc_ext"),
    (62, "standby"),
    (63, "speed_duplex"),
];
const BLOCK: &[(u32, &str)] = &[
    (0, "barrier"),
    (1, "size_max"),
    (2, "seg_max"),
    (4, "geometry"),
    (5, "ro"),
    (6, "blk_size"),
    (7, "scsi"),
    (9, "flush"),
    (10, "topology"),
    (11, "config-wce"),
    (12, "mq"),
    (13, "discard"),
    (14, "write-zeroes"),
    (15, "lifetime"),
    (16, "secure_erase"),
    (17, "zoned"),
];
const SCSI: &[(u32, &str)] = &[(0, "inout"), (1, "hotplug"), (2, "param_change"), (3, "t10_pi")];
const CONSOLE: &[(u32, &str)] = &[(0, "size"), (1, "multiport"), (2, "emergency-write")];
const BALLOON: &[(u32, &str)] = &[
    (0, "must_tell_host"),
    (1, "stats_vq"),
    (2, "deflate-on-oom"),
    (3, "free-page-hint"),
    (4, "page-poison"),
    (5, "free-page-reporting"),
];
const GPU: &[(u32, &str)] = &[(0, "virgl"), (1, "edid"), (2, "resource_uuid"), (3, "blob"), (4, "context_init")];
const MEM: &[(u32, &str)] = &[(0, "acpi_pxm"), (1, "unplugged-inaccessible"), (2, "persistent_suspend")];
const IOMMU: &[(u32, &str)] = &[
    (0, "input_range"),
    (1, "domain_range"),
    (2, "map_unmap"),
    (3, "bypass"),
    (4, "probe"),
    (5, "mmio"),
    (6, "bypass_config"),
];

/// The features whose bits are set in `mask`, of the device whose section is called `idstr`.
///
/// ```
/// assert_eq!(qevm_savevm::check::virtio_features("0000:00:02.0/virtio-blk", 1 << 13 | 1 << 32), "discard, version_1");
/// ```
pub fn virtio_features(idstr: &str, mask: u64) -> String {
    let device = idstr.rsplit('/').next().unwrap_or(idstr);
    let own = match device {
        "virtio-net" => NET,
        "virtio-blk" | "vhost-user-blk" => BLOCK,
        "virtio-scsi" => SCSI,
        "virtio-console" => CONSOLE,
        "virtio-balloon" => BALLOON,
        "virtio-gpu" => GPU,
        "virtio-mem" => MEM,
        "virtio-iommu" => IOMMU,
        _ => &[],
    };
    let name = |bit: u32| {
        let found = own.iter().chain(COMMON).find(|(of, _)| *of == bit);
        found.map_or_else(|| format!("feature {bit}"), |(_, name)| (*name).to_owned())
    };
    let names: Vec<String> = (0..64).filter(|bit| mask >> bit & 1 != 0).map(name).collect();
    names.join(", ")
}
