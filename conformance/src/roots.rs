//! Real QEMUs of several Debian suites, side by side and without touching the system.
//!
//! Each suite gets a *root*: a folder with the packages of `qemu-system-x86` and everything it depends on, resolved by
//! `apt-get` from that suite's own index in a private apt state and unpacked with `dpkg-deb -x`. Nothing is installed,
//! configured or run as a maintainer script. A root's QEMU is started through the root's own dynamic loader, so that no
//! chroot and no library of the host is involved.

use anyhow::{Context, Result};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{Apt, Kind};
use crate::host_cpu::{self, HostCpu};
use crate::patience::PATIENCE;
use crate::process::run;
pub use crate::suite::Suite;

/// Raised whenever the layout or the package set of a root changes, so that older roots are made again.
const ROOT_REVISION: &str = "1";
/// The same for the roots of other targets.
const TARGETS_REVISION: &str = "1.1";
pub(crate) const ROOT_STAMP: &str = ".qevm-root";
/// The suites before Debian's merged /usr keep the loader and some libraries under `/lib`.
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
const LOADER: &str = "ld-linux-x86-64.so.2";

/// An unpacked suite.
#[derive(Debug, Clone)]
pub struct Root {
    suite: Suite,
    dir: PathBuf,
    version: String,
    namespace: Option<String>,
    /// The program of the target that [`Root::qemu`] starts.
    program: String,
}

impl Root {
    /// Opens the root of `suite`, making it first when it is not there (about 30 s and 300 MB each).
    ///
    /// # Errors
    /// Anything `apt-get` or `dpkg-deb` reports, or a QEMU that does not print its version.
    pub fn install(suite: Suite) -> Result<Root> {
        Root::install_packages(suite, suite.name(), ROOT_REVISION, suite.packages(), "x86_64")
    }

    /// The same with the programs of other targets, a root of its own ([`Root::of_target`]); about 500 MB each.
    ///
    /// # Errors
    /// As [`install`](Self::install).
    pub fn install_targets(suite: Suite) -> Result<Root> {
        let folder = format!("{suite}-targets");
        Root::install_packages(suite, &folder, TARGETS_REVISION, suite.target_packages(), "aarch64")
    }

    fn install_packages(suite: Suite, folder: &str, revision: &str, packages: &[&str], target: &str) -> Result<Root> {
        let dir = cache_dir()?.join("qemu").join(folder);
        let stamp = format!("revision {revision}\n");
        if fs::read_to_string(dir.join(ROOT_STAMP)).is_ok_and(|s| s.starts_with(&stamp)) {
            return Root::open(suite, dir, target);
        }
        let lock = lock(&dir.with_extension("lock"))?;
        if !fs::read_to_string(dir.join(ROOT_STAMP)).is_ok_and(|s| s.starts_with(&stamp)) {
            unpack(suite, packages, &dir)
                .with_context(|| format!("installing QEMU of Debian {suite} into {}", dir.display()))?;
            let root = Root::open(suite, dir.clone(), target)?;
            fs::write(dir.join(ROOT_STAMP), format!("{stamp}qemu {}\n", root.version))?;
        }
        drop(lock);
        Root::open(suite, dir, target)
    }

    fn open(suite: Suite, dir: PathBuf, target: &str) -> Result<Root> {
        let program = format!("usr/bin/qemu-system-{target}");
        let mut root = Root { suite, dir, version: String::new(), namespace: None, program };
        let banner = run(root.command(&root.program).arg("--version"), PATIENCE)
            .with_context(|| format!("starting QEMU of Debian {suite} in {}", root.dir.display()))?;
        root.version = banner
            .split_whitespace()
            .skip_while(|w| *w != "version")
            .nth(1)
            .with_context(|| format!("QEMU of Debian {suite} prints no version: {banner:?}"))?
            .to_string();
        Ok(root)
    }

    /// The same, with the program of another target, for example `s390x`; its packages are in the root of
    /// [`install_targets`](Self::install_targets).
    pub fn of_target(&self, target: &str) -> Root {
        Root { program: format!("usr/bin/qemu-system-{target}"), ..self.clone() }
    }

    /// The suite this root was made of.
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// The same, with its programs started in a network namespace (by `ip netns exec`).
    pub(crate) fn inside(&self, namespace: &str) -> Root {
        Root { namespace: Some(namespace.into()), ..self.clone() }
    }

    /// The folder that holds it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// QEMU's own version number, for example `10.0.13`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The QEMU of this root (`qemu-system-x86_64`, or that of [`of_target`](Self::of_target)) with its firmware search
    /// path, ready for arguments.
    pub fn qemu(&self) -> Command {
        let mut command = self.command(&self.program);
        for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(self.dir.join(firmware));
        }
        command
    }

    /// What `-cpu` gives a guest of this QEMU the host's processor under KVM. Found out once in a process, by starting
    /// it.
    ///
    /// # Errors
    /// QEMU starts with none that is known; the error quotes every attempt.
    pub fn host_cpu(&self) -> Result<HostCpu> {
        host_cpu::of(self).with_context(|| format!("QEMU of Debian {}", self.suite))
    }

    /// `qemu-nbd` of this root.
    pub fn qemu_nbd(&self) -> Command {
        self.command("usr/bin/qemu-nbd")
    }

    /// `qemu-img` of this root.
    pub fn qemu_img(&self) -> Command {
        self.command("usr/bin/qemu-img")
    }

    /// A program of this root, run by the root's own dynamic loader with the root's libraries alone.
    fn command(&self, name: &str) -> Command {
        let mut command = match &self.namespace {
            None => program(&self.dir, name),
            Some(namespace) => {
                let program = program(&self.dir, name);
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace]).arg(program.get_program()).args(program.get_args());
                command
            }
        };
        command.env("QEMU_MODULE_DIR", self.dir.join(LIBRARIES[0]).join("qemu"));
        command.env_remove("LD_LIBRARY_PATH").env_remove("LD_PRELOAD");
        command
    }
}

/// A program among unpacked packages, run by the dynamic loader that is there with the libraries that are there.
pub(crate) fn program(dir: &Path, name: &str) -> Command {
    let libraries = LIBRARIES.map(|l| dir.join(l));
    let loader = libraries.iter().map(|l| l.join(LOADER)).find(|l| l.exists());
    let mut path = OsString::from(libraries[0].join("pulseaudio"));
    for library in &libraries {
        path.push(":");
        path.push(library);
    }
    let mut command = Command::new(loader.unwrap_or_else(|| libraries[0].join(LOADER)));
    command.arg("--library-path").arg(path).arg(dir.join(name));
    command.env_remove("LD_LIBRARY_PATH").env_remove("LD_PRELOAD");
    command
}

/// Where everything that can be made again is kept: `$QEVM_CACHE`, by default `$HOME/.cache/qevm`.
///
/// # Errors
/// Neither variable is set.
pub fn cache_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("QEVM_CACHE") {
        return Ok(PathBuf::from(dir));
    }
    let home = std::env::var_os("HOME").context("neither QEVM_CACHE nor HOME is set: no place for the QEMU roots")?;
    Ok(PathBuf::from(home).join(".cache/qevm"))
}

/// An exclusive lock that two concurrent set-ups take in turn; released when dropped.
pub(crate) fn lock(path: &Path) -> Result<fs::File> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let file = fs::File::create(path).with_context(|| format!("creating {}", path.display()))?;
    file.lock().with_context(|| format!("locking {}", path.display()))?;
    Ok(file)
}

/// Makes `dir` of packages and all that they depend on.
///
/// # Errors
/// What `apt-get` or `dpkg-deb` report.
pub(crate) fn unpack(suite: Suite, packages: &[&str], dir: &Path) -> Result<()> {
    let fresh = dir.with_extension("new");
    if fresh.exists() {
        fs::remove_dir_all(&fresh)?;
    }
    let state = fresh.join("apt");
    let apt = Apt::new(&state, suite, Kind::Binary)?;
    for package in apt.download(packages)? {
        run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&fresh), PATIENCE)?;
    }
    fs::remove_dir_all(&state)?;
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    fs::rename(&fresh, dir)?;
    Ok(())
}
