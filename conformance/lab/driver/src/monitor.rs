//! A running monitor.

use crate::patience::PATIENCE;
use crate::plan::{Kind, Monitor, Side};
use crate::qmp::Qmp;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(20);
/// The unit of processor times in `/proc`.
const TICK_MS: u64 = 10;

pub(crate) struct Running {
    child: Child,
    pub(crate) qmp: Qmp,
    pub(crate) side: Side,
    serial: PathBuf,
    stderr: PathBuf,
}

impl Running {
    /// Starts the monitor at this place of the trip; all but the first wait for the guest.
    pub(crate) fn start(monitor: &Monitor, stop: usize, scratch: &Path) -> Result<Running> {
        let side = if stop == 0 { Side::Source } else { Side::Destination };
        let file = |suffix: &str| scratch.join(format!("stop-{stop}.{suffix}"));
        let (socket, serial, stderr) = (file("qmp"), file("serial"), file("stderr"));
        for old in [&socket, &serial] {
            let _ = fs::remove_file(old);
        }
        let mut command = Command::new(&monitor.program);
        let mut listener = None;
        match monitor.kind {
            Kind::Qemu => {
                listener = Some(UnixListener::bind(&socket).with_context(|| format!("binding {}", socket.display()))?);
                command.args(&monitor.arguments);
                command.args(["-chardev", &format!("socket,id=lab-qmp,path={}", socket.display())]);
                command.args(["-mon", "chardev=lab-qmp,mode=control"]);
                command.args(["-serial", &format!("file:{}", serial.display())]);
                if side == Side::Destination {
                    command.args(["-incoming", "defer"]);
                }
            }
            Kind::Reference => {
                command.arg("run").args(&monitor.arguments);
                command.args(["--qmp", &format!("unix:{}", socket.display())]);
                command.args(["--serial", &format!("file:{}", serial.display())]);
                if side == Side::Destination {
                    command.args(["--incoming", "defer"]);
                }
            }
        }
        let output = File::create(&stderr)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut child = command.spawn().with_context(|| format!("starting {}", monitor.program))?;
        let connected = connect(&mut child, listener.as_ref(), &socket).and_then(|stream| Ok(Qmp::new(stream)?));
        match connected {
            Ok(qmp) => Ok(Running { child, qmp, side, serial, stderr }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.context(format!("stop {stop} does not start: {}", text(&stderr).trim())))
            }
        }
    }

    pub(crate) fn configure(&mut self, monitor: &Monitor) -> Result<()> {
        let list: Vec<_> =
            monitor.capabilities.iter().map(|(name, on)| json!({ "capability": name, "state": on })).collect();
        if !list.is_empty() {
            self.qmp.execute("migrate-set-capabilities", json!({ "capabilities": list }))?;
        }
        if monitor.parameters.as_object().is_some_and(|parameters| !parameters.is_empty()) {
            self.qmp.execute("migrate-set-parameters", monitor.parameters.clone())?;
        }
        Ok(())
    }

    /// The answer, or the error as text.
    pub(crate) fn ask(&mut self, command: &str) -> Value {
        self.qmp.execute(command, Value::Null).unwrap_or_else(|error| json!({ "error": error.to_string() }))
    }

    pub(crate) fn serial(&self) -> String {
        text(&self.serial)
    }

    pub(crate) fn stderr(&self) -> String {
        text(&self.stderr)
    }

    /// Processor time in milliseconds, without that of vCPUs.
    pub(crate) fn cpu_ms(&self) -> Option<u64> {
        let process = format!("/proc/{}", self.child.id());
        let all = ticks(&fs::read_to_string(format!("{process}/stat")).ok()?)?;
        let threads = fs::read_dir(format!("{process}/task")).ok()?;
        let stats = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("stat")).ok());
        let vcpus =
            stats.filter(|stat| stat.contains("(CPU ") || stat.contains("(vcpu")).filter_map(|stat| ticks(&stat));
        Some(all.saturating_sub(vcpus.sum()) * TICK_MS)
    }

    /// KiB of memory that it holds.
    pub(crate) fn resident_kib(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.split_whitespace().next()?.parse().ok()
    }

    pub(crate) fn ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.qmp.execute("quit", Value::Null);
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(POLL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(child: &mut Child, listener: Option<&UnixListener>, socket: &Path) -> Result<UnixStream> {
    if let Some(listener) = listener {
        listener.set_nonblocking(true)?;
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        let stream = match listener {
            Some(listener) => listener.accept().map(|(stream, _)| stream),
            None => UnixStream::connect(socket),
        };
        match stream {
            Ok(stream) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(_) if child.try_wait()?.is_some() => bail!("it exited before its monitor was up"),
            Err(error) if Instant::now() > deadline => return Err(error).context("its monitor does not come up"),
            Err(_) => thread::sleep(POLL),
        }
    }
}

/// User and system time from a `stat` of `/proc`: fields 14 and 15, of which the second is a name in parentheses that
/// may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    Some(user + fields.next()?.parse::<u64>().ok()?)
}

fn text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}
