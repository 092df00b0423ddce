//! What the lab's machine needs to run a stock Linux guest: a kernel in both formats, an initial RAM disk, and a QEMU.

use crate::cpio::Archive;
use crate::linux::Linux;
use crate::patience::PATIENCE;
use crate::process::run;
use crate::roots::Root;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;
use std::process::Command;

/// What the tests of `reference-vmm/tests/kvm/linux.rs` want to know.
pub(super) const ENVIRONMENT: &str = "QEVM_MONITOR=/reference-vmm QEVM_LINUX_ELF=/guest/vmlinux \
                                      QEVM_LINUX_BZIMAGE=/guest/vmlinuz QEVM_LINUX_INITRD=/guest/initrd \
                                      QEVM_LINUX_VIRTIO_INITRD=/guest/virtio-initrd QEVM_QEMU=/qemu/run";

const INIT: &str = include_str!("../../lab/guest-init");
const INIT_VIRTIO: &str = include_str!("../../lab/guest-init-virtio");
const INIT_VFIO: &str = include_str!("../../lab/guest-init-vfio");
/// The program in a guest that uses its VFIO device, and the folder of what such a guest is started with.
pub(super) const USER: &str = "linux-guest";
const APPLETS: [&str; 9] = ["sh", "mount", "dd", "md5sum", "cp", "mv", "date", "usleep", "echo"];
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const LOADER: &str = "ld-linux-x86-64.so.2";
/// Where the QEMU of the jobs with Debian's kernel is.
pub(super) const QEMU_FOLDER: &str = "qemu";
const QEMU: &str = "usr/bin/qemu-system-x86_64";
const FOLDERS: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];
/// Firmware of microvm without ACPI and with it, what it boots kernels with, and the page of the local APIC's
/// registers.
const FIRMWARE: [&str; 5] = ["qboot.rom", "bios-microvm.bin", "pvh.bin", "linuxboot_dma.bin", "kvmvapic.bin"];

/// Where the setup header of a bzImage says that the compressed kernel is, counted from the protected-mode code, and
/// how long ("The Linux/x86 Boot Protocol").
const SETUP_SECTORS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Adds the folders `guest` and `qemu`.
pub(super) fn add(archive: &mut Archive, bzimage: &Path, busybox: &[u8], qemu: &Root) -> Result<()> {
    let bzimage = fs::read(bzimage).with_context(|| format!("reading {}", bzimage.display()))?;
    archive.folder("guest");
    archive.file("guest/vmlinux", &unpack(&bzimage)?);
    archive.file("guest/vmlinuz", &bzimage);
    archive.file("guest/initrd", &initrd(busybox));
    archive.file("guest/virtio-initrd", &virtio_initrd()?);
    add_qemu(archive, QEMU_FOLDER, qemu)
}

/// Adds what a Linux guest with a VFIO device is started with: the lab's own kernel, and an initial RAM disk with this
/// program.
pub(super) fn add_user(archive: &mut Archive, bzimage: &Path, busybox: &[u8], program: &Path) -> Result<()> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    archive.folder(USER);
    archive.file(&format!("{USER}/vmlinuz"), &read(bzimage)?);
    archive.file(&format!("{USER}/initrd"), &user_initrd(busybox, &read(program)?));
    Ok(())
}

fn user_initrd(busybox: &[u8], program: &[u8]) -> Vec<u8> {
    let mut archive = Archive::new();
    for folder in ["bin", "dev", "sys"] {
        archive.folder(folder);
    }
    archive.program("bin/busybox", busybox);
    for applet in ["sh", "mount"] {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    archive.program(USER, program);
    archive.program("init", INIT_VFIO.as_bytes());
    archive.finish()
}

/// Adds a QEMU as a folder, with a program `run` in it.
pub(super) fn add_qemu(archive: &mut Archive, folder: &str, qemu: &Root) -> Result<()> {
    archive.folder(folder);
    let root = qemu.dir();
    let mut add = |name: &str, path: &Path| -> Result<()> {
        let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        archive.program(&format!("{folder}/{name}"), &bytes);
        Ok(())
    };
    add("qemu", &root.join(QEMU))?;
    add(LOADER, &root.join(LIBRARIES).join(LOADER))?;
    for name in FIRMWARE {
        let path = FOLDERS.map(|folder| root.join(folder).join(name)).into_iter().find(|path| path.exists());
        add(name, &path.with_context(|| format!("there is no {name} in {}", root.display()))?)?;
    }
    let folders = format!("{0}:{0}/pulseaudio", root.join(LIBRARIES).display());
    let mut list = Command::new(root.join(LIBRARIES).join(LOADER));
    let listed = run(list.args(["--library-path", &folders, "--list"]).arg(root.join(QEMU)), PATIENCE)?;
    for line in listed.lines() {
        // `libz.so.1 => /path/libz.so.1 (0x00007f…)`
        let Some((name, rest)) = line.trim().split_once(" => ") else { continue };
        let path = rest.rsplit_once(" (").map_or(rest, |(path, _)| path);
        add(name, Path::new(path))?;
    }
    let start =
        format!("#!/bin/sh\nexec /{folder}/{LOADER} --library-path /{folder} /{folder}/qemu -L /{folder} \"$@\"\n");
    archive.program(&format!("{folder}/run"), start.as_bytes());
    Ok(())
}

fn initrd(busybox: &[u8]) -> Vec<u8> {
    let mut archive = Archive::new();
    for folder in ["bin", "dev", "proc", "tmp"] {
        archive.folder(folder);
    }
    archive.program("bin/busybox", busybox);
    for applet in APPLETS {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    archive.program("init", INIT.as_bytes());
    archive.finish()
}

/// The initial RAM disk of the recordings, which has the drivers, with another first process.
fn virtio_initrd() -> Result<Vec<u8>> {
    let mut initrd = fs::read(Linux::install()?.initramfs)?;
    // The kernel looks for the next archive at a multiple of four bytes.
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    let mut archive = Archive::new();
    archive.program("init", INIT_VIRTIO.as_bytes());
    initrd.extend(archive.finish());
    Ok(initrd)
}

/// The ELF file in a bzImage that is compressed with zstd, as Debian's are.
fn unpack(bzimage: &[u8]) -> Result<Vec<u8>> {
    let number =
        |at: usize| bzimage.get(at..).and_then(|rest| rest.first_chunk()).map(|bytes| u32::from_le_bytes(*bytes));
    let sectors = match bzimage.get(SETUP_SECTORS).context("the kernel has no setup header")? {
        0 => 4,
        sectors => usize::from(*sectors),
    };
    let (offset, length) =
        number(PAYLOAD_OFFSET).zip(number(PAYLOAD_LENGTH)).context("the kernel has no setup header")?;
    let start = (sectors + 1) * 512 + offset as usize;
    // After the compressed kernel there is its length.
    let payload = bzimage.get(start..).and_then(|rest| rest.get(..(length as usize).saturating_sub(4)));
    let kernel = zstd::decode_all(payload.context("the kernel's payload is not in the file")?)
        .context("the kernel is not compressed with zstd")?;
    ensure!(kernel.starts_with(b"\x7fELF"), "the kernel's payload is no ELF file");
    Ok(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_found_by_its_setup_header() {
        let packed = zstd::encode_all(&b"\x7fELF and so on"[..], 1).unwrap();
        let mut file = vec![0; 0x400 + 7];
        file[SETUP_SECTORS] = 1;
        file[PAYLOAD_OFFSET] = 7;
        file[PAYLOAD_LENGTH] = packed.len() as u8 + 4;
        file.extend([packed.clone(), vec![14, 0, 0, 0]].concat());
        assert_eq!(unpack(&file).unwrap(), b"\x7fELF and so on");
        for len in [0, 0x240, 0x24a, 0x400, file.len() - 6] {
            assert!(unpack(&file[..len]).is_err(), "{len}");
        }
        file[0x400 + 7] = 0;
        assert!(unpack(&file).is_err());
    }
}
