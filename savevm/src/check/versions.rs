//! How old a version of a section still loads, which is the device's choice: no stream tells it.

use super::{Expectations, Outcome};
use crate::framing::SectionHeader;
use crate::vmdesc::DeviceBody;
use qevm_wire::QemuVersion;

/// VMSD of a device, and for each release of [`RELEASES`] the oldest version that it loads, or `NONE` if it is not
/// known. From the releases' `-dump-vmstate`, but for `ipmi-bmc-sim`, which is in no dump: 11.1 loads version 1. A
/// device that is not listed has had one version in all of these releases.
const OLDEST: &[(&str, [u32; 4])] = &[
    ("esp", [3; 4]),
    ("pciespscsi", [1; 4]),
    ("sysbusespscsi", [1; 4]),
    ("hpet", [1, 1, 1, 2]),
    ("mc146818rtc", [1, 1, 1, 3]),
    ("ipmi-bmc-sim", [NONE, 1, 1, 1]),
    ("nvme", [0, 0, 0, 1]),
    ("virtio-iommu", [1, 2, 2, 2]),
];
const NONE: u32 = u32::MAX;

const RELEASES: [QemuVersion; 4] =
    [QemuVersion::new(5, 2), QemuVersion::new(7, 2), QemuVersion::new(10, 0), QemuVersion::new(11, 1)];

/// What comes of a `section` that is older than the `local` version, which the destination writes.
pub(super) fn older(section: &SectionHeader, local: u32, destination: &Expectations) -> Outcome {
    let idstr = section.idstr.to_string();
    // Of all targets' CPUs only those of x86 (version 12) load an older version (11).
    if idstr == "cpu" {
        return if (section.version_id, local) == (11, 12) { Outcome::Loads } else { Outcome::Fails };
    }
    let devices = destination.description.iter().flat_map(|description| &description.devices);
    let device =
        devices.filter(|d| d.name == idstr && d.instance_id == section.instance_id).find_map(|d| match &d.body {
            DeviceBody::Struct(body) => Some(body.vmsd_name.as_str()),
            DeviceBody::OldStyle { .. } => None,
        });
    match oldest(device.unwrap_or(&idstr), destination.qemu) {
        Some(oldest) if section.version_id < oldest => Outcome::Fails,
        Some(_) => Outcome::Loads,
        None => Outcome::MayFail,
    }
}

/// A release between two that are in the table is what both are; a newer one may load less than the newest.
fn oldest(vmsd_name: &str, qemu: Option<QemuVersion>) -> Option<u32> {
    let (_, versions) = OLDEST.iter().find(|(name, _)| *name == vmsd_name)?;
    let qemu = qemu?;
    let after = RELEASES.iter().take_while(|release| **release < qemu).count();
    let at = |index: usize| versions.get(index).copied().filter(|version| *version != NONE);
    match RELEASES.get(after) {
        Some(release) if *release == qemu => at(after),
        Some(_) => at(after.checked_sub(1)?).filter(|version| at(after) == Some(*version)),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_between_two_is_what_both_are() {
        let of = |name, major, minor| oldest(name, Some(QemuVersion::new(major, minor)));
        assert_eq!(of("mc146818rtc", 10, 0), Some(1));
        assert_eq!(of("mc146818rtc", 9, 1), Some(1));
        assert_eq!(of("mc146818rtc", 10, 2), None, "somewhere between 10.0 and 11.1 it changed");
        assert_eq!(of("mc146818rtc", 11, 1), Some(3));
        assert_eq!(of("mc146818rtc", 12, 0), None);
        assert_eq!(of("ipmi-bmc-sim", 5, 2), None);
        assert_eq!(of("nothing", 11, 1), None);
    }
}
