//! One of the monitors: a real QEMU or reference-vmm.

use super::env::{Env, Load, Stop};
use super::monitor::Monitor;
use super::virtio_load;
use crate::exec;
use crate::launch::Qemu;
use crate::patience::PATIENCE;
use crate::roots::{Root, Suite};
use crate::scenario::Accel;
use anyhow::{Context, Result, bail, ensure};
use reference_vmm::payload::{FW_CFG_NAME, IMAGE, Progress};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

pub(super) const POLL: Duration = Duration::from_millis(5);
/// Where the properties of a memory backend mean the folder of the journey.
const IN_SCRATCH: &str = "{scratch}";
/// A monitor with the guest in it, or waiting for it.
#[derive(Debug)]
pub struct Endpoint {
    monitor: Qemu,
    console: PathBuf,
    stop: Stop,
}

/// Where the monitor of that name is passed a guest's memory.
pub(super) fn cpr_socket(scratch: &Path, name: &str) -> PathBuf {
    scratch.join(format!("{name}.cpr"))
}

/// That as a channel.
pub(super) fn cpr_channel(scratch: &Path, name: &str) -> Value {
    let path = cpr_socket(scratch, name);
    json!({ "channel-type": "cpr", "addr": { "transport": "socket", "type": "unix", "path": path } })
}

impl Endpoint {
    /// Starts a monitor that boots the guest, or, with `incoming`, waits until it is told where the guest comes from.
    pub(super) fn start(
        stop: Stop,
        root: Option<&Root>,
        env: &Env<'_>,
        load: &Load,
        name: &str,
        incoming: bool,
        rtc: bool,
    ) -> Result<Endpoint> {
        let Env { program, scratch, .. } = *env;
        let console = scratch.join(format!("{name}.console"));
        let _ = fs::remove_file(&console);
        let mut arguments = vec!["-m".to_string(), format!("{}M", load.memory)];
        let mut more = |list: &[&str]| arguments.extend(list.iter().map(|a| a.to_string()));
        let (cpus, serial) = (load.cpus.to_string(), format!("file:{}", console.display()));
        let pci = if load.pcie { " pci=1" } else { "" };
        let item =
            format!("name={FW_CFG_NAME},string={}{}{pci}", load.payload, virtio_load::configuration(&load.virtio));
        let virtio = virtio_load::arguments(&load.virtio, scratch, name)?;
        more(&virtio.iter().map(String::as_str).collect::<Vec<_>>());
        if incoming && load.passes_memory {
            more(&["--incoming", &cpr_channel(scratch, name).to_string()]);
        }
        if incoming {
            more(&["--incoming", "defer"]);
        }
        more(&["--serial", &serial, "--smp", &cpus]);
        // Under TCG there is a real-time clock by default and under KVM there is none: what is on the way of both has
        // one.
        let mut options = String::from(if rtc { ",rtc=on" } else { "" });
        if load.split_irqchip {
            options.push_str(",kernel-irqchip=split");
        }
        if load.pcie {
            options.push_str(",pcie=on");
        }
        if load.passes_memory {
            options.push_str(",aux-ram-share=on");
        }
        if let Some(backend) = load.memory_backend {
            options.push_str(",memory-backend=mem");
            let backend = backend.replace(IN_SCRATCH, &scratch.display().to_string());
            more(&["--object", &format!("{backend},id=mem,size={}M", load.memory)]);
        }
        let monitor = match (stop, root) {
            (Stop::Qemu(_, accel), Some(root)) => {
                let firmware = scratch.join("payload.bin");
                fs::write(&firmware, IMAGE).with_context(|| format!("writing {}", firmware.display()))?;
                more(&["-bios", &firmware.display().to_string(), "-fw_cfg", &item]);
                match accel {
                    Accel::Kvm => {
                        more(&["-M", &format!("microvm,accel=kvm{options}"), "-cpu", root.host_cpu()?.model()]);
                    }
                    Accel::Tcg => more(&["-M", &format!("microvm,accel=tcg{options}"), "-cpu", "max"]),
                }
                if incoming && load.mem_prealloc {
                    // The name that QEMU gives the RAM of a machine without a backend.
                    let backend =
                        "memory-backend-ram,id=microvm.ram,x-use-canonical-path-for-ramblock-id=off,prealloc=on";
                    more(&[
                        "-object",
                        &format!("{backend},size={}M", load.memory),
                        "-machine",
                        "memory-backend=microvm.ram",
                    ]);
                }
                more(env.more);
                Qemu::start(root, name, &arguments, scratch)?
            }
            (Stop::Qemu(..), None) => bail!("the root of {stop} is not here"),
            (Stop::Reference, _) => {
                more(&["--fw-cfg", &item, "--machine", &format!("microvm{options}")]);
                if incoming && load.mem_prealloc {
                    more(&["--mem-prealloc"]);
                }
                more(env.more);
                start_reference(program, name, &arguments, scratch)?
            }
        };
        Ok(Endpoint { monitor, console, stop })
    }

    /// Its QMP connection and process.
    pub fn monitor(&mut self) -> &mut Qemu {
        &mut self.monitor
    }

    /// The file of what the guest prints here.
    pub(crate) fn console(&self) -> &Path {
        &self.console
    }

    /// Who it is.
    pub fn stop(&self) -> Stop {
        self.stop
    }

    /// Tells reference-vmm which release it is dealing with; a QEMU is told nothing.
    ///
    /// # Errors
    /// The monitor refuses it.
    pub fn meets(&mut self, other: Stop) -> Result<()> {
        if let (Stop::Reference, Stop::Qemu(suite, accel)) = (self.stop, other) {
            let accel = if accel == Accel::Kvm { "kvm" } else { "tcg" };
            self.monitor.execute("x-set-peer", json!({ "qemu": suite.series(), "accel": accel }))?;
        }
        // 7.2 does not know the command that sources of 10.0 and later put before the last section; its users turn it
        // off.
        ensure!(
            !matches!((self.stop, other), (Stop::Qemu(Suite::Trixie | Suite::Sid, _), Stop::Qemu(Suite::Bookworm, _))),
            "a hop from a newer QEMU to 7.2 is not reference-vmm's business"
        );
        Ok(())
    }

    /// The address of a file that a guest goes to. 7.2 has no `file:`.
    pub(super) fn writes_file(&self, path: &Path) -> String {
        match self.stop {
            Stop::Qemu(Suite::Bookworm, _) => exec::uri(path),
            _ => format!("file:{}", path.display()),
        }
    }

    /// The address of a file that a guest comes from.
    pub(super) fn reads_file(&self, path: &Path) -> String {
        match self.stop {
            Stop::Qemu(Suite::Bookworm, _) => format!("exec:cat {}", path.display()),
            _ => format!("file:{}", path.display()),
        }
    }

    /// What the guest has printed here.
    pub(crate) fn text(&self) -> Result<Vec<u8>> {
        match fs::read(&self.console) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            read => read.with_context(|| format!("reading {}", self.console.display())),
        }
    }

    /// Waits for a status that `query-status` has to tell in the end.
    pub(super) fn wait_status(&mut self, wanted: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.monitor.execute("query-status", Value::Null)?;
            if status["status"] == wanted {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{} says {status}, not {wanted}", self.stop);
            thread::sleep(POLL);
        }
    }

    /// The last whole progress line.
    pub(crate) fn progress(&self) -> Result<Option<Progress>> {
        let text = self.text()?;
        let text = String::from_utf8_lossy(&text);
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        Ok(whole.lines().rev().find_map(Progress::parse))
    }

    /// Waits for a whole progress line for which `wanted` holds.
    pub(super) fn wait_progress(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Progress) -> bool,
    ) -> Result<Progress> {
        self.wait_text(what, limit, |whole| whole.lines().filter_map(Progress::parse).find(&wanted))
    }

    /// Waits until `find` finds something in the whole lines that the guest has printed here.
    pub(super) fn wait_text<T>(&mut self, what: &str, limit: Duration, find: impl Fn(&str) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            let text = self.text()?;
            let text = String::from_utf8_lossy(&text);
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some(found) = find(whole) {
                return Ok(found);
            }
            if Instant::now() > deadline {
                let status = self.monitor.execute("query-status", Value::Null)?;
                let last = text.lines().next_back().unwrap_or("nothing");
                bail!("the guest at {} did not {what}; {status}; last it printed: {last}", self.stop);
            }
            thread::sleep(POLL);
        }
    }

    /// Ends the monitor and gives everything that the guest printed here.
    pub(crate) fn end(self) -> Result<Vec<u8>> {
        let Endpoint { monitor, console, .. } = self;
        monitor.quit();
        fs::read(&console).with_context(|| format!("reading {}", console.display()))
    }
}

/// A process that ends with this.
#[derive(Debug)]
pub(super) struct Running(Child);

impl Running {
    pub(super) fn new(child: Child) -> Running {
        Running(child)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts reference-vmm for another program to talk to, at the socket that is given back as soon as it is there.
pub(super) fn start_reference_process(
    program: &Monitor,
    name: &str,
    arguments: &[String],
    scratch: &Path,
) -> Result<(Running, PathBuf)> {
    let (child, socket, _) = spawn_reference(program, name, arguments, scratch)?;
    Ok((Running(child), socket))
}

fn spawn_reference(
    program: &Monitor,
    name: &str,
    arguments: &[String],
    scratch: &Path,
) -> Result<(Child, PathBuf, PathBuf)> {
    let file = |suffix: &str| scratch.join(format!("{name}.{suffix}"));
    let (socket, stderr) = (file("qmp"), file("stderr"));
    let _ = fs::remove_file(&socket);
    let mut command = Command::new(&program.program);
    command.args(&program.leading).arg("run").args(arguments).arg("--qmp").arg(format!("unix:{}", socket.display()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&stderr)?);
    let child = command.spawn().with_context(|| format!("starting {}", program.program.display()))?;
    Ok((child, socket, stderr))
}

/// Starts reference-vmm and connects to its QMP socket. `name` is that of its files in `scratch`.
///
/// # Errors
/// It does not start, or does not answer.
pub fn reference(program: &Monitor, name: &str, arguments: &[&str], scratch: &Path) -> Result<Qemu> {
    let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    start_reference(program, name, &arguments, scratch)
}

pub(super) fn start_reference(program: &Monitor, name: &str, arguments: &[String], scratch: &Path) -> Result<Qemu> {
    let (child, socket, stderr) = spawn_reference(program, name, arguments, scratch)?;
    let connect = |child: &mut Child| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(&socket) {
                Err(error) if Instant::now() > deadline || child.try_wait()?.is_some() => return Err(error),
                Err(_) => thread::sleep(POLL),
                stream => return stream,
            }
        }
    };
    Qemu::adopt(child, connect, stderr, format!("{name} (reference-vmm)"))
}
