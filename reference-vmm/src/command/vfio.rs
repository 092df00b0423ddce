//! `--device vfio-pci`: devices of the host's in QEMU's words.

use super::options::Options;
use anyhow::{Context, bail, ensure};
use reference_vmm::devices::pci::MOST_DEVICES;
use reference_vmm::vfio::{HostDevice, MultifdTransfer, VfioBacking, VfioSlot};
use std::collections::BTreeSet;
use std::path::PathBuf;

const DRIVER: &str = "vfio-pci";
/// Functions of a device, of which only the first is supported.
const FUNCTIONS: usize = 8;

/// Whether a `--device` is one of these.
pub(crate) fn is_vfio(text: &str) -> bool {
    Options::parse(text, "driver").is_ok_and(|mut options| options.take("driver").is_some_and(|name| name == DRIVER))
}

/// The devices of these options, in the order of the command line; they may be attached to `iommufds`.
///
/// # Errors
/// The texts are those of QEMU 11.1 where it has any, with the argument before them.
pub(crate) fn slots(texts: &[&String], iommufds: &BTreeSet<&str>) -> anyhow::Result<Vec<VfioSlot>> {
    let mut slots: Vec<VfioSlot> = Vec::new();
    for text in texts {
        let context = || format!("--device {text}");
        let slot = slot(text, iommufds).with_context(context)?;
        let taken = slot.id.is_some() && slots.iter().any(|other| other.id == slot.id);
        ensure!(!taken, "--device {text}: Duplicate ID '{}' for device", slot.id.unwrap_or_default());
        slots.push(slot);
    }
    Ok(slots)
}

fn slot(text: &str, iommufds: &BTreeSet<&str>) -> anyhow::Result<VfioSlot> {
    let mut options = Options::parse(text, "driver")?;
    options.take("driver");
    let id = options.take("id");
    ensure!(options.take("host").is_none(), "host= is not supported, sysfsdev=/sys/bus/pci/devices/ADDRESS is");
    let sysfsdev: PathBuf = options
        .take("sysfsdev")
        .context(
            "No provided host device: use -device vfio-pci,sysfsdev=PATH_TO_DEVICE (reference-vmm does not take host=)",
        )?
        .into();
    let iommufd = options.take("iommufd");
    if let Some(id) = iommufd.as_deref().filter(|id| !iommufds.contains(id)) {
        bail!("Device '{id}' not found: there is no --object iommufd,id={id}");
    }
    let addr = options.take("addr").map(|addr| address(&addr)).transpose()?;
    let migration = on_off_auto(&mut options, "enable-migration")?;
    let multifd_transfer = match on_off_auto(&mut options, "x-migration-multifd-transfer")? {
        None => MultifdTransfer::Auto,
        Some(true) => MultifdTransfer::On,
        Some(false) => MultifdTransfer::Off,
    };
    let events = options.switch("migration-events")?.unwrap_or(false);
    if let Some(name) = options.unused().next() {
        bail!("Property '{DRIVER}.{name}' not found");
    }
    let backing = VfioBacking::Host(HostDevice { sysfsdev, iommufd, migration });
    Ok(VfioSlot { id, addr, backing, multifd_transfer, events })
}

/// `DEVICE[.FUNCTION]`, in hexadecimal.
fn address(text: &str) -> anyhow::Result<usize> {
    let (device, function) = text.split_once('.').unwrap_or((text, "0"));
    let number = |text: &str, most: usize| {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        let is_number = digits.starts_with(|first: char| first.is_ascii_hexdigit());
        usize::from_str_radix(digits, 16).ok().filter(|number| is_number && *number < most)
    };
    let place = number(device, MOST_DEVICES).zip(number(function, FUNCTIONS));
    let (device, function) = place.with_context(|| {
        let most = MOST_DEVICES - 1;
        format!("Property '{DRIVER}.addr' doesn't take value '{text}': wanted 1 to {most:x} in hexadecimal, or with .0")
    })?;
    ensure!(function == 0, "addr={text}: only function 0 is supported");
    Ok(device)
}

/// `None` for `auto`, which is what it is without the option, too.
fn on_off_auto(options: &mut Options, name: &str) -> anyhow::Result<Option<bool>> {
    match options.take(name).as_deref() {
        None | Some("auto") => Ok(None),
        Some("on") => Ok(Some(true)),
        Some("off") => Ok(Some(false)),
        Some(other) => bail!("Parameter '{name}' does not accept value '{other}'"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(texts: &[&str]) -> anyhow::Result<Vec<VfioSlot>> {
        let texts: Vec<String> = texts.iter().map(|text| text.to_string()).collect();
        slots(&texts.iter().collect::<Vec<_>>(), &BTreeSet::from(["fd0"]))
    }

    #[test]
    fn devices_are_written_as_for_qemu() {
        let slots = parsed(&[
            "vfio-pci,sysfsdev=/sys/x",
            "driver=vfio-pci,sysfsdev=/sys/y,id=vf0,iommufd=fd0,addr=0x1f.0,x-migration-multifd-transfer=off,\
             enable-migration=on,migration-events=on",
        ])
        .unwrap();
        let host = |slot: &VfioSlot| match &slot.backing {
            VfioBacking::Host(device) => device.clone(),
            VfioBacking::Model { .. } => panic!("a model"),
        };
        assert_eq!(host(&slots[0]), HostDevice { sysfsdev: "/sys/x".into(), iommufd: None, migration: None });
        assert_eq!((&slots[0].id, slots[0].multifd_transfer, slots[0].events), (&None, MultifdTransfer::Auto, false));
        assert_eq!(slots.iter().map(|slot| slot.addr).collect::<Vec<_>>(), [None, Some(31)]);
        let iommufd = Some("fd0".to_owned());
        assert_eq!(host(&slots[1]), HostDevice { sysfsdev: "/sys/y".into(), iommufd, migration: Some(true) });
        let second = (slots[1].id.as_deref(), slots[1].multifd_transfer, slots[1].events);
        assert_eq!(second, (Some("vf0"), MultifdTransfer::Off, true));
        assert!(is_vfio("vfio-pci,sysfsdev=/x") && is_vfio("sysfsdev=/x,driver=vfio-pci"));
        assert!(!is_vfio("virtio-rng-device") && !is_vfio("vfio-pci-nohotplug,sysfsdev=/x"));
    }

    #[test]
    fn what_is_wrong_is_said_in_qemus_words() {
        for (text, why) in [
            ("vfio-pci", "No provided host device"),
            ("vfio-pci,host=00:02.0", "host= is not supported, sysfsdev="),
            ("vfio-pci,sysfsdev=/x,colour=red", "Property 'vfio-pci.colour' not found"),
            ("vfio-pci,sysfsdev=/x,iommufd=fd1", "Device 'fd1' not found"),
            ("vfio-pci,sysfsdev=/x,enable-migration=maybe", "'enable-migration' does not accept value 'maybe'"),
            ("vfio-pci,sysfsdev=/x,migration-events=maybe", "Parameter 'migration-events' expects 'on' or 'off'"),
            ("vfio-pci,sysfsdev=/x,addr=20", "Property 'vfio-pci.addr' doesn't take value '20'"),
            ("vfio-pci,sysfsdev=/x,addr=", "Property 'vfio-pci.addr' doesn't take value ''"),
            ("vfio-pci,sysfsdev=/x,addr=+1", "Property 'vfio-pci.addr' doesn't take value '+1'"),
            ("vfio-pci,sysfsdev=/x,addr=1.8", "doesn't take value '1.8': wanted 1 to 1f"),
            ("vfio-pci,sysfsdev=/x,addr=2.0.0", "doesn't take value '2.0.0'"),
            ("vfio-pci,sysfsdev=/x,addr=1.1", "addr=1.1: only function 0 is supported"),
        ] {
            let error = format!("{:#}", parsed(&[text]).err().unwrap());
            assert!(error.starts_with(&format!("--device {text}: ")) && error.contains(why), "{error}");
        }
        let one = "vfio-pci,sysfsdev=/x,id=vf0";
        let error = parsed(&[one, one]).err().unwrap().to_string();
        assert_eq!(error, format!("--device {one}: Duplicate ID 'vf0' for device"));
    }
}
