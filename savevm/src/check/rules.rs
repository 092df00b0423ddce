//! What a destination does with a number of a device section: by its type in the description, and by the device, where
//! a hook after loading compares it (observed with QEMU 7.2 to 11.1).

/// What a destination does with a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    Takes,
    /// It must be the destination's own.
    Equal,
    /// It must be from 0 up to the destination's own.
    AtMost,
    /// It is a mask of features that the guest has accepted, and the destination must offer all of them.
    Features,
}

/// Last part of a section's name, the end of the number's path in it, and what QEMU compares there.
const HOOKS: &[(&str, &str)] = &[
    ("hpet", "num_timers_save"),
    ("e1000e", "subsys"),
    ("e1000e", "subsys_ven"),
    ("virtio-mem-device-early", "addr"),
    ("virtio-mem-device-early", "region_size"),
    ("virtio-mem-device-early", "block_size"),
    ("virtio-mem-device-early", "node"),
    ("virtio-mem", "device.addr"),
    ("virtio-mem", "device.region_size"),
    ("virtio-mem", "device.block_size"),
    ("virtio-mem", "device.node"),
    ("virtio-gpu", "max_outputs"),
    ("virtio-gpu", SCANOUTS),
];

/// Path of a number that is none of the stream: how many bytes all scanouts of a display have, which neither their
/// number nor anything else in the stream tells.
pub(super) const SCANOUTS: &str = "bytes of scanouts";

impl Rule {
    /// Of the number of this type at `path` in the section `idstr`.
    pub(super) fn of(idstr: &str, path: &str, type_name: &str) -> Self {
        let device = idstr.rsplit('/').next().unwrap_or(idstr);
        let ends = |end: &str| path.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        match type_name {
            // `uint32 equal` and the like, and `int32 le`.
            name if name.ends_with(" equal") => Rule::Equal,
            name if name.ends_with(" le") => Rule::AtMost,
            _ if HOOKS.iter().any(|(of, end)| *of == device && ends(end)) => Rule::Equal,
            // Ports by their numbers, 32 to a word.
            _ if path.contains("device.ports_map[") => Rule::Equal,
            _ if ends("device.nr_active_ports") => Rule::AtMost,
            _ if ends("guest_features") => Rule::Features,
            _ => Rule::Takes,
        }
    }
}

/// What to do about numbers that must be equal.
pub(super) fn cause(idstr: &str, path: &str) -> &'static str {
    let device = idstr.rsplit('/').next().unwrap_or(idstr);
    match device {
        "hpet" => "give both sides the same number of timers (-global hpet.timers=)",
        "e1000e" => "give both sides the same subsys= and subsys_ven=",
        name if name.starts_with("virtio-mem") => {
            "give both sides the same memaddr=, block-size=, node= and size of the memory backend"
        }
        "virtio-gpu" if path == SCANOUTS => {
            "releases write the scanouts beyond the first in different ways: give both sides max_outputs=1"
        }
        "virtio-gpu" => "max_outputs= differs: give both sides the same",
        _ if path.contains("ports_map") => PORTS,
        _ => "the device is configured differently: give it the same properties on both sides",
    }
}

const PORTS: &str = "give both sides the same virtserialport and virtconsole devices, with the same nr=";

/// What to do about numbers that must not be greater.
pub(super) fn cause_of_more(path: &str) -> &'static str {
    match path.ends_with(".nr_active_ports") {
        true => PORTS,
        false => "the destination's device is older, or is configured with less",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_of_a_device_and_a_whole_name() {
        assert_eq!(Rule::of("0000:00:01.0/virtio-gpu", "virtio-gpu.max_outputs", "uint32"), Rule::Equal);
        assert_eq!(Rule::of("0000:00:01.0/virtio-gpu", "virtio-gpu.xmax_outputs", "uint32"), Rule::Takes);
        assert_eq!(Rule::of("0000:00:01.0/virtio-mem-device-early", "tmp.addr", "uint64"), Rule::Equal);
        assert_eq!(Rule::of("0000:00:01.0/virtio-mem", "virtio.vq[0].addr", "uint64"), Rule::Takes);
        assert_eq!(Rule::of("hpet", "num_timers_save", "uint8"), Rule::Equal);
        assert_eq!(Rule::of("x", "a", "int32 le"), Rule::AtMost);
        assert_eq!(Rule::of("x", "virtio.guest_features", "uint32"), Rule::Features);
    }
}
