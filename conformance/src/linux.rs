//! A Linux guest, so that devices are recorded at work and not only as firmware left them.
//!
//! Debian's kernel with a small initramfs of ours: static busybox, the drivers of the devices in the table, and a
//! script that loads them, starts network, disks and input, and says so on the serial port. Everything is downloaded by
//! package name and unpacked; nothing is installed.

use crate::apt::{Apt, Kind};
use crate::cpio::Archive;
use crate::process::run;
use crate::roots::{Suite, cache_dir, lock};
use anyhow::{Context, Result};
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Raised whenever the initramfs changes.
const REVISION: u32 = 3;
const SUITE: Suite = Suite::Trixie;
const TIMEOUT: Duration = Duration::from_secs(300);
/// What the guest prints on its first serial port when every device is in use.
pub const READY: &str = "qevm guest is ready";

/// The drivers; their dependencies are found in the modules themselves.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_scsi",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "virtio_input",
    "virtio_gpu",
    "virtio_mem",
    "virtio_iommu",
    "9p",
    "9pnet_virtio",
    "e1000",
    "e1000e",
    "igb",
    "8139cp",
    "8139too",
    "pcnet32",
    "e100",
    "vmxnet3",
    "ahci",
    "ata_piix",
    "sd_mod",
    "sr_mod",
    "nvme",
    "sym53c8xx",
    "megaraid_sas",
    "mptsas",
    "vmw_pvscsi",
    "am53c974",
    "sdhci_pci",
    "mmc_block",
    "xhci_pci",
    "ehci_pci",
    "uhci_hcd",
    "ohci_pci",
    "usbhid",
    "usb_storage",
    "uas",
    "hid_generic",
    "evdev",
    "snd_hda_intel",
    "snd_hda_codec_generic",
    "snd_intel8x0",
    "snd_ens1370",
    "bochs",
    "cirrus_qemu",
    "qxl",
    "vmwgfx",
    "i6300esb",
    "ipmi_si",
    "ipmi_devintf",
    "pcieport",
    "shpchp",
    "parport_pc",
    "rtc_cmos",
    "psmouse",
    "i8042",
    "atkbd",
    "tpm_tis",
    "tpm_crb",
];

/// Each line may fail: not every guest has every device.
const INIT: &str = "#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read module; do insmod /modules/$module.ko 2>/dev/null; done < /modules/order
for interface in /sys/class/net/*; do ip link set ${interface##*/} up 2>/dev/null; done
udhcpc -n -q -t 2 -T 1 -i eth0 -s /bin/true >/dev/null 2>&1 &
sleep 1
for disk in /dev/vd? /dev/sd? /dev/nvme?n? /dev/mmcblk? /dev/fd? /dev/sr?; do
  [ -b $disk ] && (while :; do dd if=$disk of=/dev/null bs=4k count=256 2>/dev/null || sleep 1; done) &
done
for input in /dev/input/event*; do [ -e $input ] && cat $input > /dev/null & done
for random in /dev/hwrng; do [ -e $random ] && dd if=$random of=/dev/null bs=16 count=4 2>/dev/null & done
[ -e /dev/watchdog ] && (while :; do echo . ; sleep 1; done > /dev/watchdog) &
for sound in /dev/snd/pcm*p; do [ -e $sound ] && : < $sound; done 2>/dev/null
echo hello > /dev/hvc0 2>/dev/null
sleep 1
dmesg | tail -n 200 > /dmesg.txt
echo; echo 'READY'
while :; do head -c 65536 /dev/urandom > /tmp/noise; sleep 1; done
";

/// The files that `-kernel` and `-initrd` take.
#[derive(Debug, Clone)]
pub struct Linux {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The compressed initramfs.
    pub initramfs: PathBuf,
}

impl Linux {
    /// Opens the guest in the cache, making it first when it is not there (about 110 MB of downloads).
    ///
    /// # Errors
    /// What `apt-get`, `dpkg-deb` or `xz` report, or a package of an unexpected shape.
    pub fn install() -> Result<Linux> {
        let dir = cache_dir()?.join("linux").join(format!("revision-{REVISION}"));
        let linux = Linux { kernel: dir.join("vmlinuz"), initramfs: dir.join("initramfs.cpio.gz") };
        let lock = lock(&dir.with_extension("lock"))?;
        if !linux.initramfs.exists() {
            let fresh = dir.with_extension("new");
            if fresh.exists() {
                fs::remove_dir_all(&fresh)?;
            }
            fs::create_dir_all(&fresh)?;
            make(&fresh).context("making the Linux guest")?;
            fs::rename(&fresh, &dir)?;
        }
        drop(lock);
        Ok(linux)
    }
}

fn make(dir: &Path) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("linux-").tempdir_in(dir)?;
    let apt = Apt::new(&scratch.path().join("apt"), SUITE, Kind::Binary)?;
    let packages = unpack_packages(&apt, &scratch.path().join("root"))?;
    let kernel = packages.kernel()?;
    let modules = Modules::unpack(packages.root(), MODULES)?;

    let mut archive = Archive::new();
    for folder in ["bin", "dev", "proc", "sys", "tmp", "modules"] {
        archive.folder(folder);
    }
    archive.program("bin/busybox", &packages.busybox()?);
    for applet in
        ["sh", "mount", "insmod", "ip", "udhcpc", "sleep", "dd", "cat", "echo", "head", "dmesg", "tail", "true"]
    {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    archive.program("init", INIT.replace("READY", READY).as_bytes());
    let mut order = String::new();
    for (name, bytes) in &modules.ordered {
        archive.file(&format!("modules/{name}.ko"), bytes);
        order.push_str(&format!("{name}\n"));
    }
    archive.file("modules/order", order.as_bytes());
    let initramfs = scratch.path().join("initramfs.cpio");
    fs::write(&initramfs, archive.finish())?;
    run(Command::new("gzip").arg("-1").arg(&initramfs), TIMEOUT)?;
    fs::rename(kernel, dir.join("vmlinuz"))?;
    fs::rename(initramfs.with_extension("cpio.gz"), dir.join("initramfs.cpio.gz"))?;
    Ok(())
}

/// The kernel's package and busybox, unpacked.
pub(crate) struct Packages(PathBuf);

/// Downloads the kernel and busybox, and unpacks them in `root`.
pub(crate) fn unpack_packages(apt: &Apt, root: &Path) -> Result<Packages> {
    for package in apt.download(&["linux-image-amd64", "busybox-static"])? {
        let name = package.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("linux-image-6") || name.starts_with("busybox-static") {
            run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(root), TIMEOUT)?;
        }
    }
    Ok(Packages(root.to_path_buf()))
}

impl Packages {
    /// Where they are.
    pub(crate) fn root(&self) -> &Path {
        &self.0
    }

    /// The kernel image.
    pub(crate) fn kernel(&self) -> Result<PathBuf> {
        kernel(&self.0)
    }

    /// The static busybox.
    pub(crate) fn busybox(&self) -> Result<Vec<u8>> {
        busybox(&self.0)
    }
}

/// The kernel image among unpacked packages.
pub(crate) fn kernel(root: &Path) -> Result<PathBuf> {
    let mut boot = fs::read_dir(root.join("boot"))?.filter_map(Result::ok).map(|e| e.path());
    boot.find(|p| p.to_string_lossy().contains("vmlinuz-")).context("the package has no kernel")
}

/// The static busybox among unpacked packages.
pub(crate) fn busybox(root: &Path) -> Result<Vec<u8>> {
    let busybox = ["usr/bin/busybox", "bin/busybox"].map(|p| root.join(p)).into_iter().find(|p| p.exists());
    Ok(fs::read(busybox.context("the package has no busybox")?)?)
}

/// Modules in an order in which each comes after those it needs.
pub(crate) struct Modules {
    files: HashMap<String, PathBuf>,
    done: BTreeSet<String>,
    ordered: Vec<(String, Vec<u8>)>,
}

impl Modules {
    /// Those of the kernel's package in `root` with these names, and what they need.
    pub(crate) fn unpack(root: &Path, wanted: &[&str]) -> Result<Modules> {
        let mut modules = Modules { files: HashMap::new(), done: BTreeSet::new(), ordered: Vec::new() };
        let tree = ["usr/lib/modules", "lib/modules"].map(|p| root.join(p)).into_iter().find(|p| p.exists());
        modules.index(&tree.context("the package has no modules")?)?;
        for name in wanted {
            modules.add(name)?;
        }
        Ok(modules)
    }

    /// Name and content, in order.
    pub(crate) fn ordered(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.ordered.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
    }

    fn index(&mut self, folder: &Path) -> Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() {
                self.index(&entry.path())?;
            } else if let Some(name) = name.strip_suffix(".ko.xz") {
                self.files.insert(name.replace('-', "_"), entry.path());
            }
        }
        Ok(())
    }

    /// Adds a module after what it depends on; one that is built into the kernel, or unknown to it, is left out.
    fn add(&mut self, name: &str) -> Result<()> {
        let name = name.replace('-', "_");
        let Some(file) = self.files.get(&name).cloned() else { return Ok(()) };
        if !self.done.insert(name.clone()) {
            return Ok(());
        }
        run(Command::new("xz").arg("--decompress").arg("--keep").arg(&file), TIMEOUT)?;
        let bytes = fs::read(file.with_extension(""))?;
        for needed in depends(&bytes) {
            self.add(&needed)?;
        }
        self.ordered.push((name, bytes));
        Ok(())
    }
}

/// The `depends=` entry of a module's information section.
fn depends(module: &[u8]) -> Vec<String> {
    const ENTRY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(ENTRY.len()).position(|w| w == ENTRY) else { return Vec::new() };
    let rest = &module[at + ENTRY.len()..];
    let end = rest.iter().position(|b| *b == 0).unwrap_or(rest.len());
    let names = String::from_utf8_lossy(&rest[..end]).into_owned();
    names.split(',').filter(|n| !n.is_empty()).map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_the_module() {
        assert_eq!(depends(b"junk\0license=GPL\0depends=virtio,virtio_ring\0name=x\0"), ["virtio", "virtio_ring"]);
        assert!(depends(b"junk\0depends=\0name=x").is_empty());
        assert!(depends(b"nothing").is_empty());
    }
}
