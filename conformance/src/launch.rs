//! A running real QEMU: started with a monitor, bounded in time, killed when dropped.

use crate::patience::PATIENCE;
use crate::process::line;
use crate::qmp::{Qmp, QmpError};
use crate::roots::Root;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(10);

/// A QEMU process with its monitor.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    qmp: Qmp,
    stderr: PathBuf,
    name: String,
}

impl Qemu {
    /// Starts QEMU of `root` with `arguments`, to which the monitor and `-display none` are added. `name` tells two
    /// QEMUs of one scenario apart, in errors and in the scratch folder.
    ///
    /// # Errors
    /// QEMU does not start, or exits before its monitor answers; the error quotes its standard error.
    pub fn start(root: &Root, name: &str, arguments: &[String], scratch: &Path) -> Result<Qemu> {
        let socket = scratch.join(format!("{name}.qmp"));
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).with_context(|| format!("binding {}", socket.display()))?;
        listener.set_nonblocking(true)?;
        let stderr = scratch.join(format!("{name}.stderr"));
        let mut command = root.qemu();
        command
            .args(["-name", "debug-threads=on", "-no-user-config", "-nodefaults", "-display", "none"])
            .args(arguments);
        command.args(["-chardev", &format!("socket,id=qevm-qmp,path={}", socket.display())]);
        command.args(["-mon", "chardev=qevm-qmp,mode=control"]);
        command.stdin(Stdio::null()).stdout(File::create(scratch.join(format!("{name}.stdout")))?);
        command.stderr(File::create(&stderr)?).current_dir(scratch);
        let mut child = command.spawn().with_context(|| format!("starting {}", line(&command)))?;
        let connected = wait_for_monitor(&listener, &mut child);
        let stream = match connected {
            Ok(stream) => stream,
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(e.context(format!("{} QEMU {}: {}", name, root.version(), said(&stderr))));
            }
        };
        stream.set_nonblocking(false)?;
        let mut child = Some(child);
        let qmp = Qmp::new(stream).map_err(|e| {
            if let Some(mut child) = child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
            anyhow::Error::new(e).context(format!("{name} QEMU {}: {}", root.version(), said(&stderr)))
        })?;
        let child = child.context("the monitor answered, so the child is still here")?;
        Ok(Qemu { child, qmp, stderr, name: format!("{name} (QEMU {})", root.version()) })
    }

    /// Takes over a process whose monitor `connect` reaches. `name` is how errors call it.
    ///
    /// # Errors
    /// The monitor does not answer; the error quotes the file `stderr`.
    pub(crate) fn adopt(
        mut child: Child,
        connect: impl FnOnce(&mut Child) -> std::io::Result<std::os::unix::net::UnixStream>,
        stderr: PathBuf,
        name: String,
    ) -> Result<Qemu> {
        let qmp = connect(&mut child).map_err(anyhow::Error::new).and_then(|stream| Ok(Qmp::new(stream)?));
        match qmp {
            Ok(qmp) => Ok(Qemu { child, qmp, stderr, name }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.context(format!("{name}: {}", said(&stderr))))
            }
        }
    }

    /// What it said on standard error if it has ended by now or does so within a moment.
    pub(crate) fn last_words(&mut self) -> Option<String> {
        let deadline = Instant::now() + Duration::from_millis(500);
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                return None;
            }
            thread::sleep(POLL);
        }
        Some(format!("{}: {}", self.name, said(&self.stderr)))
    }

    /// What it has said on standard error.
    pub(crate) fn said(&self) -> String {
        said(&self.stderr)
    }

    /// Whether the process, which has closed its monitor, comes to its end.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                return Ok(false);
            }
            thread::sleep(POLL);
        }
        Ok(true)
    }

    /// Drops the events that came and were not asked for.
    pub(crate) fn forget_events(&mut self) {
        self.qmp.forget_events();
    }

    /// Goes on as another client of the monitor, which gets its turn when this one has gone.
    ///
    /// # Errors
    /// It is heard before that, or not at all.
    pub(crate) fn change_client(&mut self, waiting: std::os::unix::net::UnixStream) -> Result<()> {
        waiting.set_read_timeout(Some(Duration::from_millis(500)))?;
        let mut byte = [0];
        let early = nix::sys::socket::recv(waiting.as_raw_fd(), &mut byte, nix::sys::socket::MsgFlags::MSG_PEEK);
        anyhow::ensure!(early == Err(nix::errno::Errno::EAGAIN), "two clients at once: {early:?}");
        self.qmp.hang_up()?;
        self.qmp = Qmp::new(waiting)?;
        Ok(())
    }

    /// Waits for an event, dropping others.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<crate::qmp::Event> {
        let event = self.qmp.wait_event(name, limit);
        self.explain(event)
    }

    /// Waits for the next event, whatever it is.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn next_event(&mut self, limit: Duration) -> Result<crate::qmp::Event> {
        let event = self.qmp.next_event(limit);
        self.explain(event)
    }

    /// Executes a QMP command.
    ///
    /// # Errors
    /// See [`QmpError`]; QEMU's standard error is added to it when QEMU has gone.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let reply = self.qmp.execute(command, arguments);
        self.explain(reply)
    }

    /// Names a descriptor for `fd:NAME`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn name_descriptor(&mut self, name: &str, descriptor: &impl AsRawFd) -> Result<()> {
        let named = self.qmp.name_descriptor(name, descriptor);
        self.explain(named)
    }

    /// Executes a human monitor command and gives its output.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn human(&mut self, command: &str) -> Result<String> {
        let reply = self.qmp.human(command);
        self.explain(reply)
    }

    fn explain<T>(&mut self, reply: Result<T, QmpError>) -> Result<T> {
        reply.map_err(|e| {
            let gone = matches!(e, QmpError::Closed { .. });
            let error = anyhow::Error::new(e);
            match gone {
                true => error.context(format!("{}: {}", self.name, said(&self.stderr))),
                false => error.context(self.name.clone()),
            }
        })
    }

    /// Switches the named migration capabilities on, all in one command as QEMU checks the set as a whole.
    ///
    /// # Errors
    /// QEMU does not know one, or refuses the combination.
    pub fn set_capabilities(&mut self, names: &[&str]) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let list: Vec<Value> = names.iter().map(|n| json!({ "capability": n, "state": true })).collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": list })).map(|_| ())
    }

    /// Sets migration parameters from an object; an empty object or null sets none.
    ///
    /// # Errors
    /// QEMU refuses a value.
    pub fn set_parameters(&mut self, parameters: &Value) -> Result<()> {
        if parameters.as_object().is_none_or(serde_json::Map::is_empty) {
            return Ok(());
        }
        self.execute("migrate-set-parameters", parameters.clone()).map(|_| ())
    }

    /// `query-migrate`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn migration(&mut self) -> Result<Value> {
        self.execute("query-migrate", Value::Null)
    }

    /// Waits until a migration from or to here has failed, or the monitor has ended for that.
    ///
    /// # Errors
    /// `limit` passes.
    pub(crate) fn wait_migration_end(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            match self.migration() {
                Ok(migration) if migration["status"] == "failed" => return Ok(()),
                Err(_) if self.last_words().is_some() => return Ok(()),
                state if Instant::now() > deadline => bail!("{}: not ended: {state:?}", self.name),
                _ => thread::sleep(POLL),
            }
        }
    }

    /// Waits until `reached` holds for `query-migrate`'s answer and gives that answer.
    ///
    /// # Errors
    /// The migration fails or is cancelled first, or `limit` passes.
    pub fn wait_migration(&mut self, limit: Duration, mut reached: impl FnMut(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let state = self.migration()?;
            if reached(&state) {
                return Ok(state);
            }
            let status = state["status"].as_str().unwrap_or("none");
            if matches!(status, "failed" | "cancelled") {
                let reason = state["error-desc"].as_str().unwrap_or("no reason given");
                bail!("{}: migration {status}: {reason}: {}", self.name, said(&self.stderr));
            }
            if Instant::now() > deadline {
                let (name, seconds) = (&self.name, limit.as_secs());
                bail!("{name}: migration still {status} after {seconds} s: {state}: {}", said(&self.stderr));
            }
            thread::sleep(POLL);
        }
    }

    /// The last lines of its standard error.
    pub fn complaints(&self) -> String {
        said(&self.stderr)
    }

    /// The process id, by which the oracle reads guest memory.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGTERM.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn terminate(&self) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid())?);
        Ok(nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?)
    }

    /// Waits for the end of the process: the events until then, and its exit code.
    ///
    /// # Errors
    /// It does not end within `limit`.
    pub(crate) fn wait_for_end(&mut self, limit: Duration) -> Result<(Vec<crate::qmp::Event>, Option<i32>)> {
        let mut events = Vec::new();
        loop {
            match self.qmp.next_event(limit) {
                Ok(event) => events.push(event),
                Err(QmpError::Closed { .. }) => break,
                Err(error) => return Err(error.into()),
            }
        }
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok((events, status.code()));
            }
            if Instant::now() > deadline {
                bail!("{} does not end", self.name);
            }
            thread::sleep(POLL);
        }
    }

    /// Asks QEMU to quit and waits for it, killing it when it does not.
    pub fn quit(mut self) {
        let _ = self.qmp.execute("quit", Value::Null);
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(POLL);
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for_monitor(listener: &UnixListener, child: &mut Child) -> Result<std::os::unix::net::UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((stream, _)) => return Ok(stream),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e.into()),
        }
        if let Some(status) = child.try_wait()? {
            bail!("exited before its monitor was up ({status})");
        }
        if Instant::now() > deadline {
            bail!("no monitor within {} s", PATIENCE.as_secs());
        }
        thread::sleep(POLL);
    }
}

/// The last lines of a QEMU's standard error, for errors.
fn said(stderr: &Path) -> String {
    let text = fs::read(stderr).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    match lines.len() {
        0 => "it printed nothing".into(),
        n => lines[n.saturating_sub(6)..].join("; "),
    }
}
