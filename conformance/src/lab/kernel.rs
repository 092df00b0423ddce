//! The lab's own kernel and the module `testdev`, built from Debian's source and kept in the cache.

use crate::apt::{Apt, Kind};
use crate::process::run;
use crate::roots::{Suite, cache_dir, lock};
use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The suite with Linux 6.12.
const SOURCE_SUITE: Suite = Suite::Trixie;
const SOURCE: &str = "linux-source-6.12";
const ARCHIVE: &str = "usr/src/linux-source-6.12.tar.xz";
/// Their libelf is linked into a program of the host's compiler, whose C library is newer than theirs.
const TOOLS_SUITE: Suite = Suite::Bookworm;
const TOOLS: [&str; 4] = ["bc", "bison", "flex", "libelf-dev"];
const UNPACK: Duration = Duration::from_secs(600);
/// Ends a hang. It takes about 10 minutes of processor time.
const BUILD: Duration = Duration::from_secs(4 * 3600);

/// What was built.
pub(super) struct Kernel {
    /// The bzImage.
    pub(super) image: PathBuf,
    /// `testdev.ko`.
    pub(super) module: PathBuf,
}

impl Kernel {
    /// Takes them from the cache, or builds them first: the kernel when its configuration has changed, the module when
    /// its source has.
    ///
    /// # Errors
    /// The packages cannot be fetched, or a build fails; the error quotes what the compiler said.
    pub(super) fn install(workspace: &Path) -> Result<Kernel> {
        let here = workspace.join("conformance/lab").canonicalize().context("the folder of the lab")?;
        let recipe = digest(&[here.join("kernel/config"), here.join("kernel/build")])?;
        let dir = cache_dir()?.join("lab").join(format!("kernel-{recipe}"));
        let lock = lock(&dir.with_extension("lock"))?;
        if !dir.join("vmlinuz").exists() {
            println!("building the lab's kernel: about 10 minutes of processor time, once");
            fetch(&dir).context("fetching the source of the lab's kernel")?;
        }
        // Written last.
        let stamp = dir.join("testdev.stamp");
        let source = digest(&sources(&here.join("testdev"))?)?;
        if !fs::read_to_string(&stamp).is_ok_and(|built| built == source) {
            build(&dir, &here).context("building the lab's kernel")?;
            fs::write(&stamp, source)?;
        }
        drop(lock);
        Ok(Kernel { image: dir.join("vmlinuz"), module: dir.join("testdev.ko") })
    }
}

fn fetch(dir: &Path) -> Result<()> {
    for (folder, suite, packages) in [("source-package", SOURCE_SUITE, &[SOURCE][..]), ("tools", TOOLS_SUITE, &TOOLS)] {
        let state = dir.join("apt");
        fs::create_dir_all(&state)?;
        let apt = Apt::new(&state, suite, Kind::Binary)?;
        for package in apt.download(packages)? {
            let name = package.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            if folder == "tools" || name.starts_with(SOURCE) {
                run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(dir.join(folder)), UNPACK)?;
            }
        }
        fs::remove_dir_all(&state)?;
    }
    Ok(())
}

fn build(dir: &Path, here: &Path) -> Result<()> {
    let mut build = Command::new(here.join("kernel/build"));
    build.arg(dir.join("source-package").join(ARCHIVE)).arg(dir.join("tools")).arg(here).arg(dir);
    run(&mut build, BUILD).map(drop)
}

fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut files: Vec<_> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|e| e == "c" || e == "h") || file.ends_with("Makefile"));
    files.sort();
    Ok(files)
}

fn digest(files: &[PathBuf]) -> Result<String> {
    let mut hash = Sha256::new();
    for file in files {
        let bytes = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(&bytes);
    }
    Ok(hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect())
}
