//! `--drive`, `--chardev`, `--netdev` and `--device`: virtio devices in QEMU's words.

use super::options::Options;
use anyhow::{Context, bail, ensure};
use qevm_microvm::virtio::VirtioDevice;
use reference_vmm::devices::{
    Block, BlockOptions, Chardev, ChardevOptions, Net, Netdev, NetdevOptions, Rng, VirtioSerial, VirtioSlot,
};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What devices are made of: the text of the options, in the order of the command line.
#[derive(Clone, Debug, Default)]
pub(crate) struct DeviceOptions<'a> {
    pub(crate) drives: &'a [String],
    pub(crate) chardevs: &'a [String],
    pub(crate) netdevs: &'a [String],
    pub(crate) devices: Vec<&'a String>,
}

/// What the host has for devices and no device has taken yet, by its id.
struct Backends {
    drives: BTreeMap<String, BlockOptions>,
    chardevs: BTreeMap<String, ChardevOptions>,
    netdevs: BTreeMap<String, NetdevOptions>,
    /// Network cards that there are.
    cards: u8,
}

/// A device of which the command line may have more to say.
enum Device {
    Whole(VirtioSlot),
    /// A serial bus takes the ports that follow.
    Serial(VirtioSerial, bool),
}

impl DeviceOptions<'_> {
    /// The sockets that the character devices and networks listen at.
    pub(crate) fn sockets(&self) -> anyhow::Result<Vec<PathBuf>> {
        let chardevs =
            named("chardev", "backend", self.chardevs, chardev)?.into_values().filter_map(|options| match options {
                ChardevOptions::Socket { path, server: true } => Some(path),
                _ => None,
            });
        let netdevs =
            named("netdev", "type", self.netdevs, netdev)?.into_values().filter_map(|options| match options {
                NetdevOptions::Dgram { local: path, .. } | NetdevOptions::Stream { path, server: true } => Some(path),
                _ => None,
            });
        Ok(chardevs.chain(netdevs).collect())
    }

    /// Opens what the devices need.
    pub(crate) fn slots(&self) -> anyhow::Result<Vec<VirtioSlot>> {
        let mut backends = Backends {
            drives: named("drive", "file", self.drives, drive)?,
            chardevs: named("chardev", "backend", self.chardevs, chardev)?,
            netdevs: named("netdev", "type", self.netdevs, netdev)?,
            cards: 0,
        };
        let mut devices = Vec::new();
        for text in &self.devices {
            add(text, &mut backends, &mut devices).with_context(|| format!("--device {text}"))?;
        }
        let Backends { drives, chardevs, netdevs, .. } = backends;
        let unused: Vec<String> = drives.into_keys().chain(chardevs.into_keys()).chain(netdevs.into_keys()).collect();
        ensure!(unused.is_empty(), "no device uses --drive, --chardev or --netdev {}", unused.join(", "));
        Ok(devices
            .into_iter()
            .map(|device| match device {
                Device::Whole(slot) => slot,
                Device::Serial(serial, true) => VirtioSlot::serial(serial),
                Device::Serial(_, false) => VirtioSlot::kept(VirtioDevice::Serial),
            })
            .collect())
    }
}

fn add(text: &str, backends: &mut Backends, devices: &mut Vec<Device>) -> anyhow::Result<()> {
    let mut options = Options::parse(text, "driver")?;
    let driver = options.need("driver")?;
    options.take("id");
    if let "virtconsole" | "virtserialport" = driver.as_str() {
        let id = options.need("chardev")?;
        let chardev =
            backends.chardevs.remove(&id).with_context(|| format!("no --chardev with id={id} is left for it"))?;
        let name = options.take("name").unwrap_or_default();
        let bus = devices.iter_mut().rev().find_map(|device| match device {
            Device::Serial(serial, has_ports) => Some((serial, has_ports)),
            Device::Whole(_) => None,
        });
        let (serial, has_ports) = bus.context("it needs a virtio-serial-device before it")?;
        *has_ports = true;
        ensure!(serial.add(driver == "virtconsole", &name, Chardev::open(&chardev)?), "the bus has no port left");
        return options.finish();
    }
    let device: VirtioDevice = driver.parse().map_err(anyhow::Error::msg)?;
    devices.push(match device {
        VirtioDevice::Block => match options.take("drive") {
            Some(id) => {
                let drive = backends.drives.remove(&id);
                let drive = drive.with_context(|| format!("no --drive with id={id} is left for it"))?;
                let serial = options.take("serial").unwrap_or_default();
                Device::Whole(VirtioSlot::block(Block::open(BlockOptions { serial, ..drive })?))
            }
            None => Device::Whole(VirtioSlot::kept(device)),
        },
        VirtioDevice::Rng => Device::Whole(VirtioSlot::rng(Rng::open()?)),
        VirtioDevice::Serial => Device::Serial(VirtioSerial::default(), false),
        VirtioDevice::Net => match options.take("netdev") {
            Some(id) => {
                let netdev = backends.netdevs.remove(&id);
                let netdev = netdev.with_context(|| format!("no --netdev with id={id} is left for it"))?;
                let mac = options.take("mac").map(|text| mac(&text)).transpose()?;
                let number = backends.cards;
                backends.cards = number.wrapping_add(1);
                Device::Whole(VirtioSlot::net(Net::new(Netdev::open(&netdev)?, mac, number)))
            }
            None => Device::Whole(VirtioSlot::kept(device)),
        },
        without_model => Device::Whole(VirtioSlot::kept(without_model)),
    });
    options.finish()
}

fn chardev(options: &mut Options) -> anyhow::Result<ChardevOptions> {
    Ok(match options.need("backend")?.as_str() {
        "null" => ChardevOptions::Null,
        "stdio" => ChardevOptions::Stdio,
        "file" => {
            let append = options.switch("append")?.unwrap_or(false);
            ChardevOptions::File { path: options.need("path")?.into(), append }
        }
        "socket" => {
            let server = options.switch("server")?.unwrap_or(false);
            ensure!(options.switch("wait")? != Some(true), "wait=on is not supported, wait=off is");
            ChardevOptions::Socket { path: options.need("path")?.into(), server }
        }
        other => bail!("{other} is not one of null, stdio, file, socket"),
    })
}

fn netdev(options: &mut Options) -> anyhow::Result<NetdevOptions> {
    let unix = |options: &mut Options, name: &str| {
        let kind = options.need(&format!("{name}.type"))?;
        ensure!(kind == "unix", "{name}.type={kind} is not supported, {name}.type=unix is");
        Ok(options.need(&format!("{name}.path"))?.into())
    };
    Ok(match options.need("type")?.as_str() {
        "tap" => {
            for script in ["script", "downscript"] {
                ensure!(
                    options.take(script).is_none_or(|script| script == "no"),
                    "{script}= is not supported, {script}=no is"
                );
            }
            NetdevOptions::Tap { ifname: options.need("ifname")? }
        }
        "dgram" => NetdevOptions::Dgram { local: unix(options, "local")?, remote: unix(options, "remote")? },
        "stream" => {
            let server = options.switch("server")?.unwrap_or(false);
            NetdevOptions::Stream { path: unix(options, "addr")?, server }
        }
        other => bail!("{other} is not one of tap, dgram, stream"),
    })
}

/// Six bytes in hexadecimal, with colons between them.
fn mac(text: &str) -> anyhow::Result<[u8; 6]> {
    let bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>();
    bytes.ok().and_then(|bytes| bytes.try_into().ok()).with_context(|| format!("mac={text} is no address"))
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
    implied: &str,
    texts: &[String],
    make: impl Fn(&mut Options) -> anyhow::Result<T>,
) -> anyhow::Result<BTreeMap<String, T>> {
    let mut all = BTreeMap::new();
    for text in texts {
        let context = || format!("--{kind} {text}");
        let mut options = Options::parse(text, implied).with_context(context)?;
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
        let chardevs = ["null,id=c".to_string(), "null,id=e".to_string()];
        let chardevs: &[String] =
            if devices.iter().any(|device| device.starts_with("virt") && device.contains("chardev=")) {
                &chardevs
            } else {
                &[]
            };
        let slots =
            DeviceOptions { drives: &drives, chardevs, netdevs: &[], devices: devices.iter().collect() }.slots()?;
        Ok(slots.iter().map(VirtioSlot::device).collect())
    }

    #[test]
    fn networks_are_written_as_for_qemu() {
        let options = |text: &str| netdev(&mut Options::parse(text, "type").unwrap());
        assert_eq!(
            options("tap,ifname=t0,script=no,downscript=no").unwrap(),
            NetdevOptions::Tap { ifname: "t0".into() }
        );
        let dgram = "dgram,local.type=unix,local.path=/a,remote.type=unix,remote.path=/b";
        assert_eq!(options(dgram).unwrap(), NetdevOptions::Dgram { local: "/a".into(), remote: "/b".into() });
        let stream = "stream,addr.type=unix,addr.path=/a,server=on";
        assert_eq!(options(stream).unwrap(), NetdevOptions::Stream { path: "/a".into(), server: true });
        for bad in
            ["user", "tap", "tap,ifname=t0,script=/x", "dgram,local.type=inet,local.path=/a", "stream,addr.path=/a"]
        {
            assert!(options(bad).is_err(), "{bad}");
        }
        assert_eq!(mac("52:54:00:12:34:5a").unwrap(), [0x52, 0x54, 0, 0x12, 0x34, 0x5a]);
        for bad in ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:xx"] {
            assert!(mac(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_belong_to_the_bus_before_them() {
        let (bus, console, port) = ("virtio-serial-device", "virtconsole,chardev=c", "virtserialport,chardev=e,name=a");
        let found = slots(&[], &[bus, console, "virtio-rng-device", port]).unwrap();
        assert_eq!(found, [VirtioDevice::Serial, VirtioDevice::Rng]);
        for devices in
            [vec![console, bus, port], vec![bus, console], vec![bus, console, console], vec![bus, "virtconsole"]]
        {
            assert!(slots(&[], &devices).is_err(), "{devices:?}");
        }
        let options = |text: &str| chardev(&mut Options::parse(text, "backend").unwrap());
        assert_eq!(options("null").unwrap(), ChardevOptions::Null);
        assert!(matches!(options("file,path=/x,append=on").unwrap(), ChardevOptions::File { append: true, .. }));
        assert!(matches!(
            options("socket,path=/x,server=on,wait=off").unwrap(),
            ChardevOptions::Socket { server: true, .. }
        ));
        for bad in ["file", "pty", "socket,path=/x,server=on,wait=on", "socket"] {
            assert!(options(bad).is_err(), "{bad}");
        }
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
