//! `--drive` and `--device`: virtio devices in QEMU's words.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};
use reference_vmm::devices::{Block, BlockOptions, VirtioDevice, VirtioSlot};

use super::options::Options;

/// What devices are made of: the text of the options, in the order of the command line.
#[derive(Clone, Debug, Default)]
pub(crate) struct DeviceOptions<'a> {
    pub(crate) drives: &'a [String],
    pub(crate) devices: &'a [String],
}

impl DeviceOptions<'_> {
    /// Opens what the devices need.
    pub(crate) fn slots(&self) -> anyhow::Result<Vec<VirtioSlot>> {
        let mut drives = named("drive", self.drives, drive)?;
        let mut slots = Vec::new();
        for text in self.devices {
            let slot = slot(text, &mut drives).with_context(|| format!("--device {text}"))?;
            slots.push(slot);
        }
        ensure!(drives.is_empty(), "--drive: no device uses {}", drives.into_keys().collect::<Vec<_>>().join(", "));
        Ok(slots)
    }
}

fn slot(text: &str, drives: &mut BTreeMap<String, BlockOptions>) -> anyhow::Result<VirtioSlot> {
    let mut options = Options::parse(text, "driver")?;
    let device: VirtioDevice = options.need("driver")?.parse().map_err(anyhow::Error::msg)?;
    let slot = match device {
        VirtioDevice::Block => match options.take("drive") {
            Some(id) => {
                let drive = drives.remove(&id).with_context(|| format!("no --drive with id={id} is left for it"))?;
                let serial = options.take("serial").unwrap_or_default();
                VirtioSlot::block(Block::open(BlockOptions { serial, ..drive })?)
            }
            None => VirtioSlot::kept(device),
        },
        _ => VirtioSlot::kept(device),
    };
    options.take("id");
    options.finish()?;
    Ok(slot)
}

fn drive(options: &mut Options) -> anyhow::Result<BlockOptions> {
    for (name, only) in [("if", "none"), ("format", "raw")] {
        if let Some(other) = options.take(name).filter(|value| value != only) {
            bail!("{name}={other} is not supported, {name}={only} is");
        }
    }
    let file = options.need("file")?.into();
    let readonly = options.switch("readonly")?.unwrap_or(false);
    Ok(BlockOptions { file, readonly, serial: String::new() })
}

/// Each option of a kind by its `id`.
fn named<T>(
    kind: &str,
    texts: &[String],
    make: impl Fn(&mut Options) -> anyhow::Result<T>,
) -> anyhow::Result<BTreeMap<String, T>> {
    let mut all = BTreeMap::new();
    for text in texts {
        let context = || format!("--{kind} {text}");
        let mut options = Options::parse(text, "file").with_context(context)?;
        let id = options.need("id").with_context(context)?;
        let made = make(&mut options).with_context(context)?;
        options.finish().with_context(context)?;
        ensure!(all.insert(id.clone(), made).is_none(), "--{kind}: two have id={id}");
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(drives: &[&str], devices: &[&str]) -> anyhow::Result<Vec<VirtioDevice>> {
        let owned = |list: &[&str]| list.iter().map(|text| text.to_string()).collect::<Vec<_>>();
        let (drives, devices) = (owned(drives), owned(devices));
        let slots = DeviceOptions { drives: &drives, devices: &devices }.slots()?;
        Ok(slots.iter().map(VirtioSlot::device).collect())
    }

    #[test]
    fn drives_and_devices_belong_together() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1024).unwrap();
        let drive = format!("if=none,id=d,format=raw,file={}", file.path().display());
        let device = "virtio-blk-device,drive=d,serial=abc";
        assert_eq!(slots(&[&drive], &[device, "virtio-net-device"]).unwrap(), [VirtioDevice::Block, VirtioDevice::Net]);
        assert_eq!(slots(&[], &["virtio-blk-device"]).unwrap(), [VirtioDevice::Block]);
        for (drives, devices) in [
            (vec![], vec![device]),
            (vec![drive.as_str()], vec![]),
            (vec![drive.as_str()], vec![device, device]),
            (vec![drive.as_str(), drive.as_str()], vec![device]),
            (vec!["id=d,format=raw"], vec![device]),
            (vec!["id=d,format=qcow2,file=/dev/null"], vec![device]),
            (vec!["id=d,file=/nonexistent/file"], vec![device]),
            (vec![drive.as_str()], vec!["virtio-blk-device,drive=d,colour=red"]),
            (vec![], vec!["virtio-blk-pci"]),
        ] {
            assert!(slots(&drives, &devices).is_err(), "{drives:?} {devices:?}");
        }
        file.as_file().set_len(1000).unwrap();
        assert!(slots(&[&drive], &[device]).is_err());
    }
}
