//! `crash`, `makedumpfile`, a kernel of Debian's with its symbols, and an initramfs for it.
//!
//! The kernel is that for clouds, whose debug package is a third as large as the others'. Everything is downloaded by
//! package name and unpacked; nothing is installed.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::session::{self, Session};
use crate::apt::{Apt, Kind};
use crate::cpio::Archive;
use crate::linux::{self, Modules, READY};
use crate::patience::{LONG_PATIENCE, PATIENCE};
use crate::process::{run, run_any};
use crate::roots::{self, Suite, cache_dir, lock};

/// Raised whenever what is installed changes.
const REVISION: u32 = 2;
const SUITE: Suite = Suite::Trixie;
const KERNEL: &str = "linux-image-cloud-amd64";
const SYMBOLS: &str = "linux-image-cloud-amd64-dbg";

/// Gives QEMU's device `vmcoreinfo` the place of the kernel's note.
const MODULES: &[&str] = &["qemu_fw_cfg"];

/// One process sleeps, one is always in the kernel, and the kernel's log has a line of ours.
const INIT: &str = "#!/bin/sh
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module; done
echo MARK > /dev/kmsg
sleep 100000 &
cat /dev/zero > /dev/null &
echo; echo 'READY'
while :; do sleep 1; done
";

/// The files, all of them in the cache.
#[derive(Debug)]
pub(super) struct Tools {
    /// `crash` and `makedumpfile`, and the libraries that they need.
    root: PathBuf,
    /// The kernel as a boot loader takes it.
    pub(super) kernel: PathBuf,
    /// The same with its symbols.
    symbols: PathBuf,
    pub(super) initramfs: PathBuf,
    /// What the kernel calls itself.
    pub(super) release: String,
}

impl Tools {
    /// Opens them in the cache, making them first when they are not there (about 450 MB of downloads).
    ///
    /// # Errors
    /// What `apt-get` or `dpkg-deb` report, or a package of an unexpected shape.
    pub(super) fn install() -> Result<Tools> {
        let dir = cache_dir()?.join("crash").join(format!("revision-{REVISION}"));
        let lock = lock(&dir.with_extension("lock"))?;
        if !dir.exists() {
            let fresh = dir.with_extension("new");
            if fresh.exists() {
                fs::remove_dir_all(&fresh)?;
            }
            fs::create_dir_all(&fresh)?;
            roots::unpack(SUITE, &["crash", "makedumpfile"], &fresh.join("root")).context("unpacking crash")?;
            make_guest(&fresh).context("making the guest of crash")?;
            fs::rename(&fresh, &dir)?;
        }
        drop(lock);
        let place = |name: &str| dir.join(name);
        let release = fs::read_to_string(place("release"))?;
        let (kernel, symbols, initramfs) = (place("vmlinuz"), place("vmlinux"), place("initramfs.cpio.gz"));
        Ok(Tools { root: place("root"), kernel, symbols, initramfs, release })
    }

    /// What `crash` says to our commands about a dump.
    ///
    /// # Errors
    /// It does not open the dump.
    pub(super) fn crash(&self, dump: &Path, scratch: &Path) -> Result<Session> {
        let commands = scratch.join("commands");
        fs::write(&commands, session::commands())?;
        let mut command = roots::program(&self.root, "usr/bin/crash");
        command.args(["--no_crashrc", "--no_scroll", "-x", "-s", "-i"]).arg(&commands).arg(&self.symbols).arg(dump);
        let ran = run_any(command.env("TERM", "dumb").current_dir(scratch), LONG_PATIENCE)?;
        ensure!(ran.success, "crash ends with {} at {}: {} {}", ran.status, dump.display(), ran.stdout, ran.stderr);
        Session::read(&ran.stdout)
    }

    /// The log of the kernel in a dump, as `makedumpfile` finds it by the kernel's note alone.
    ///
    /// # Errors
    /// It does not.
    pub(super) fn log(&self, dump: &Path) -> Result<String> {
        let log = beside(dump, "log");
        self.makedumpfile(&[OsStr::new("--dump-dmesg"), dump.as_os_str(), log.as_os_str()])?;
        fs::read_to_string(&log).with_context(|| format!("reading {}", log.display()))
    }

    /// Writes a dump without the pages that `crash` does not need, as `makedumpfile` tells them apart, compressed by
    /// zlib.
    ///
    /// # Errors
    /// It cannot.
    pub(super) fn filter(&self, dump: &Path, smaller: &Path) -> Result<()> {
        let options = ["-c", "-d", "31"].map(OsStr::new);
        self.makedumpfile(&[&options[..], &[dump.as_os_str(), smaller.as_os_str()]].concat())
    }

    fn makedumpfile(&self, arguments: &[&OsStr]) -> Result<()> {
        let mut command = roots::program(&self.root, "usr/bin/makedumpfile");
        run(command.arg("-f").args(arguments), PATIENCE).map(|_| ())
    }
}

/// The path with `.extension` at its end.
pub(super) fn beside(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

fn make_guest(dir: &Path) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("guest-").tempdir_in(dir)?;
    let root = scratch.path().join("root");
    let apt = Apt::new(&scratch.path().join("apt"), SUITE, Kind::Binary)?;
    for package in apt.download(&[KERNEL, SYMBOLS, "busybox-static"])? {
        let name = package.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("linux-image-") || name.starts_with("busybox-static") {
            run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&root), LONG_PATIENCE)?;
        }
    }
    let kernel = linux::kernel(&root)?;
    let name = kernel.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let release = name.trim_start_matches("vmlinuz-").to_owned();
    let symbols = root.join("usr/lib/debug/boot").join(format!("vmlinux-{release}"));
    fs::rename(kernel, dir.join("vmlinuz"))?;
    fs::rename(symbols, dir.join("vmlinux")).context("the symbols are of another kernel")?;
    fs::write(dir.join("release"), release)?;

    let mut archive = Archive::new();
    for folder in ["bin", "dev", "modules", "proc"] {
        archive.folder(folder);
    }
    archive.program("bin/busybox", &linux::busybox(&root)?);
    for applet in ["sh", "mount", "insmod", "sleep", "cat"] {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    for (name, bytes) in Modules::unpack(&root, MODULES)?.ordered() {
        archive.file(&format!("modules/{name}.ko"), bytes);
    }
    archive.program("init", INIT.replace("MARK", session::MARK).replace("READY", READY).as_bytes());
    let initramfs = scratch.path().join("initramfs.cpio");
    fs::write(&initramfs, archive.finish())?;
    run(Command::new("gzip").arg("-1").arg(&initramfs), PATIENCE)?;
    fs::rename(initramfs.with_extension("cpio.gz"), dir.join("initramfs.cpio.gz"))?;
    Ok(())
}
