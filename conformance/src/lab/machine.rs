//! The emulated machine: its kernels, its initial RAM disk, and one boot of it.

use super::boot::Boot;
use super::job::{Job, Programs};
use super::kernel::Kernel;
use super::{guest, peer};
use crate::apt::{Apt, Kind};
use crate::cpio::Archive;
use crate::linux::{Modules, unpack_packages};
use crate::process::run_any;
use crate::roots::{Root, Suite, cache_dir, lock};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Raised whenever what is taken from Debian's packages changes.
const REVISION: u32 = 1;
const SUITE: Suite = Suite::Trixie;
const INIT: &str = include_str!("../../lab/init");
/// `ccp` and `irqbypass` come along.
const MODULES: &[&str] = &["kvm_amd"];
const APPLETS: [&str; 12] =
    ["sh", "mount", "insmod", "ip", "mkdir", "poweroff", "echo", "cat", "true", "sleep", "stat", "rm"];
/// Ends a hang. All jobs take about ten minutes on two processors that do nothing else.
const TIMEOUT: Duration = Duration::from_secs(7200);
/// What `init` prints last.
const DONE: &str = "\nlab: done\n";
/// What it prints instead when the kernel's clock is much too fast.
const WRONG_CLOCK: &str = "\nlab: the clock is wrong";
/// Boots until it is right.
const BOOTS: u32 = 4;
/// The file in the machine's folder with what one boot prints.
pub(super) const CONSOLE: &str = "console.txt";
const MEMORY_MIB: u32 = 2560;
/// `no_timer_check`: on a busy host the emulated timer may be late, which the kernel would take for a broken machine.
/// `oops=panic`: a fault in the kernel, or in the module `testdev`, ends the run.
const COMMAND_LINE: &str =
    "console=ttyS0 quiet oops=panic panic=-1 mitigations=off no_timer_check tsc=reliable random.trust_cpu=on";

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

/// A kernel with the modules that it is given, and busybox.
struct Machine {
    kernel: PathBuf,
    modules: Vec<(String, Vec<u8>)>,
    busybox: Vec<u8>,
}

/// Boots a machine with these jobs, whose files are in the folder `own`, and gives what it printed. What jobs leave in
/// its folder `/share` is in the folder `share` of `scratch`.
///
/// # Errors
/// The packages cannot be fetched, or the machine does not start or does not come to its end.
pub(super) fn boot(boot: Boot, programs: &Programs, jobs: &[&Job], own: &Path, scratch: &Path) -> Result<String> {
    let mut machine = Machine::debian()?;
    if boot != Boot::Debian {
        let kernel = Kernel::install(&programs.workspace)?;
        let module = fs::read(&kernel.module).with_context(|| format!("reading {}", kernel.module.display()))?;
        machine = Machine { kernel: kernel.image, modules: vec![("testdev".into(), module)], busybox: machine.busybox };
    }
    let (initramfs, share) = (own.join("initramfs.cpio"), scratch.join("share"));
    fs::create_dir_all(own)?;
    fs::create_dir_all(&share)?;
    let root = Root::install(Suite::Sid)?;
    fs::write(&initramfs, machine.initramfs(boot, programs, jobs)?)?;
    let serial = own.join(CONSOLE);
    // What an earlier one printed is not this one's.
    let _ = fs::remove_file(&serial);
    let mut booted = 1;
    while let Some(wrong) = once(boot, &machine, &root, &initramfs, &share, &serial)? {
        ensure!(booted < BOOTS, "{wrong}, in {BOOTS} boots");
        println!("{wrong}: booting again");
        booted += 1;
    }
    Ok(said(&serial))
}

fn said(serial: &Path) -> String {
    String::from_utf8_lossy(&fs::read(serial).unwrap_or_default()).replace('\r', "")
}

/// One boot; tells if its clock was wrong.
fn once(
    boot: Boot,
    machine: &Machine,
    root: &Root,
    initramfs: &Path,
    share: &Path,
    serial: &Path,
) -> Result<Option<String>> {
    let mut qemu = root.qemu();
    qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-M", "q35"]);
    qemu.args(boot.processor()).args(["-m", &MEMORY_MIB.to_string()]);
    if boot == Boot::Counted {
        qemu.args(["-icount", "shift=1,sleep=off"]);
    }
    qemu.arg("-kernel").arg(&machine.kernel).arg("-initrd").arg(initramfs);
    qemu.args(["-append", COMMAND_LINE]);
    qemu.arg("-serial").arg(format!("file:{}", serial.display()));
    qemu.arg("-fsdev").arg(format!("local,id=share,path={},security_model=none", share.display()));
    qemu.args(["-device", "virtio-9p-pci,fsdev=share,mount_tag=share"]);
    let ended = run_any(&mut qemu, TIMEOUT);
    let said = said(serial);
    let ended = ended.with_context(|| format!("the lab's machine printed: {}", tail(&said)))?;
    if let Some((_, wrong)) = said.split_once(WRONG_CLOCK) {
        return Ok(Some(format!("{}{}", &WRONG_CLOCK[1..], wrong.lines().next().unwrap_or_default())));
    }
    ensure!(
        ended.success && said.contains(DONE),
        "the lab's machine ended early: {} {}",
        ended.stderr.trim(),
        tail(&said)
    );
    Ok(None)
}

impl Machine {
    fn debian() -> Result<Machine> {
        let dir = cache_dir()?.join("lab").join(format!("revision-{REVISION}"));
        let lock = lock(&dir.with_extension("lock"))?;
        if !dir.exists() {
            let fresh = dir.with_extension("new");
            if fresh.exists() {
                fs::remove_dir_all(&fresh)?;
            }
            fs::create_dir_all(fresh.join("modules"))?;
            make(&fresh).context("fetching the lab's kernel")?;
            fs::rename(&fresh, &dir)?;
        }
        drop(lock);
        let order = fs::read_to_string(dir.join("order"))?;
        let module = |name: &str| Ok((name.to_owned(), fs::read(dir.join("modules").join(name))?));
        let modules = order.lines().map(module).collect::<Result<_>>()?;
        Ok(Machine { kernel: dir.join("vmlinuz"), modules, busybox: fs::read(dir.join("busybox"))? })
    }

    fn initramfs(&self, boot: Boot, programs: &Programs, jobs: &[&Job]) -> Result<Vec<u8>> {
        let mut archive = Archive::new();
        for folder in ["bin", "dev", "proc", "sys", "tmp", "modules", "plans", "share"] {
            archive.folder(folder);
        }
        archive.program("bin/busybox", &self.busybox);
        for applet in APPLETS {
            archive.link(&format!("bin/{applet}"), "busybox");
        }
        archive.program("init", INIT.as_bytes());
        if boot == Boot::Vfio {
            // The one kernel with the host's folder and a clock that is the host's.
            archive.file("clock", b"");
        }
        let mut order = String::new();
        for (name, bytes) in &self.modules {
            archive.file(&format!("modules/{name}.ko"), bytes);
            order.push_str(&format!("{name}\n"));
        }
        archive.file("modules/order", order.as_bytes());
        let commands: String = jobs.iter().map(|job| format!("{} {}\n", job.name, job.command)).collect();
        archive.file("jobs", commands.as_bytes());
        let all = [
            ("reference-vmm", &programs.monitor),
            ("kvm-tests", &programs.tests),
            ("driver", &programs.driver),
            (peer::PROGRAM, &programs.conformance),
        ];
        for (name, program) in all {
            if let Some(path) = program {
                archive.program(name, &fs::read(path).with_context(|| format!("reading {}", path.display()))?);
            }
        }
        if boot == Boot::Debian {
            let qemu = Root::install(Suite::Sid)?;
            guest::add(&mut archive, &self.kernel, &self.busybox, &qemu)?;
            peer::add_root(&mut archive, guest::QEMU_FOLDER, &qemu)?;
        } else {
            archive.file("payload.bin", reference_vmm::payload::IMAGE);
            for suite in [Suite::Trixie, Suite::Sid] {
                guest::add_qemu(&mut archive, &format!("qemu-{}", suite.series()), &Root::install(suite)?)?;
            }
            if let Some(program) = &programs.linux_guest {
                guest::add_user(&mut archive, &self.kernel, &self.busybox, program)?;
            }
            for job in jobs {
                archive.file(&format!("plans/{}", job.name), job.plan.as_deref().unwrap_or_default().as_bytes());
            }
        }
        Ok(archive.finish())
    }
}

fn make(dir: &Path) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("lab-").tempdir_in(dir)?;
    let apt = Apt::new(&scratch.path().join("apt"), SUITE, Kind::Binary)?;
    let packages = unpack_packages(&apt, &scratch.path().join("root"))?;
    let modules = Modules::unpack(packages.root(), MODULES)?;
    let mut order = String::new();
    for (name, bytes) in modules.ordered() {
        fs::write(dir.join("modules").join(name), bytes)?;
        order.push_str(&format!("{name}\n"));
    }
    ensure!(order.contains("kvm_amd"), "the kernel's package has no kvm_amd");
    fs::write(dir.join("order"), order)?;
    fs::write(dir.join("busybox"), packages.busybox()?)?;
    fs::rename(packages.kernel()?, dir.join("vmlinuz"))?;
    Ok(())
}
