//! A small QMP client over a UNIX socket: greeting, capabilities, commands, events, and a deadline on everything.

use crate::patience::PATIENCE;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Why a QMP exchange failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// QEMU understood the command and refused it.
    #[error("QEMU refuses {command}: {description}")]
    Refused {
        /// The command that was refused.
        command: String,
        /// QEMU's `class`.
        class: String,
        /// QEMU's `desc`.
        description: String,
    },
    /// The monitor's connection ended: QEMU exited or crashed.
    #[error("QEMU closed its monitor during {command}")]
    Closed {
        /// The command under way.
        command: String,
    },
    /// No answer in time.
    #[error("QEMU did not answer {command} within {seconds} s")]
    Timeout {
        /// The command under way.
        command: String,
        /// The limit.
        seconds: u64,
    },
    /// Something that is not QMP.
    #[error("the monitor said something that is not QMP during {command}: {found}")]
    Malformed {
        /// The command under way.
        command: String,
        /// What was received.
        found: String,
    },
    /// The socket failed.
    #[error("the monitor's socket failed during {command}: {source}")]
    Io {
        /// The command under way.
        command: String,
        /// The cause.
        source: std::io::Error,
    },
}

/// An asynchronous event.
#[derive(Debug, Clone)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// Its data, or null.
    pub data: Value,
    /// When it happened, by the host's wall clock since 1970.
    pub time: Option<Duration>,
}

/// A monitor in command mode.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    buffer: Vec<u8>,
    events: VecDeque<Event>,
}

impl Qmp {
    /// Reads the greeting and leaves capabilities negotiation.
    ///
    /// # Errors
    /// The peer is silent, or is not a QMP server.
    pub fn new(stream: UnixStream) -> Result<Qmp, QmpError> {
        let mut qmp = Qmp { stream, buffer: Vec::new(), events: VecDeque::new() };
        let greeting = qmp.message("the greeting", Instant::now() + PATIENCE)?;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::Malformed { command: "the greeting".into(), found: greeting.to_string() });
        }
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Executes a command and gives its return value. `arguments` is an object, or null for none.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let mut bytes = request.to_string().into_bytes();
        bytes.push(b'\n');
        self.stream.write_all(&bytes).map_err(|source| broken(command, source))?;
        self.reply(command)
    }

    /// Names a descriptor for `fd:NAME` (`getfd`), which is sent along.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn name_descriptor(&mut self, name: &str, descriptor: &impl AsRawFd) -> Result<(), QmpError> {
        let command = "getfd";
        let request = json!({ "execute": command, "arguments": { "fdname": name } }).to_string();
        let sent = self.stream.send_with_fd(request.as_bytes(), descriptor.as_raw_fd());
        sent.map_err(|error| broken(command, error.into()))?;
        self.reply(command).map(drop)
    }

    fn reply(&mut self, command: &str) -> Result<Value, QmpError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut message = self.message(command, deadline)?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                let text = |member: &str| error[member].as_str().unwrap_or_default().to_string();
                let (class, description) = (text("class"), text("desc"));
                return Err(QmpError::Refused { command: command.into(), class, description });
            }
            self.keep_event(command, message)?;
        }
    }

    /// Executes a command of the human monitor and gives what it prints. It reports failures as text.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub fn human(&mut self, line: &str) -> Result<String, QmpError> {
        let reply = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(reply.as_str().unwrap_or_default().to_string())
    }

    /// Waits for the next event called `name`, dropping others.
    ///
    /// # Errors
    /// [`QmpError::Timeout`] when it does not come within `limit`.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Event, QmpError> {
        let deadline = Instant::now() + limit;
        loop {
            while let Some(event) = self.events.pop_front() {
                if event.name == name {
                    return Ok(event);
                }
            }
            let message = self.message(name, deadline)?;
            self.keep_event(name, message)?;
        }
    }

    /// Waits for the next event, whatever it is.
    ///
    /// # Errors
    /// [`QmpError::Timeout`] when none comes within `limit`.
    pub fn next_event(&mut self, limit: Duration) -> Result<Event, QmpError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let message = self.message("events", deadline)?;
            self.keep_event("events", message)?;
        }
    }

    /// Ends the connection.
    pub(crate) fn hang_up(&self) -> std::io::Result<()> {
        self.stream.shutdown(std::net::Shutdown::Both)
    }

    /// Drops the events that came and were not asked for.
    pub(crate) fn forget_events(&mut self) {
        self.events.clear();
    }

    fn keep_event(&mut self, command: &str, message: Value) -> Result<(), QmpError> {
        match message["event"].as_str() {
            Some(name) => {
                let stamp = |unit| message["timestamp"][unit].as_u64();
                let time = stamp("seconds").zip(stamp("microseconds"));
                let time = time.map(|(s, us)| Duration::from_secs(s) + Duration::from_micros(us));
                self.events.push_back(Event { name: name.into(), data: message["data"].clone(), time });
                Ok(())
            }
            None => Err(QmpError::Malformed { command: command.into(), found: message.to_string() }),
        }
    }

    /// The next line of the monitor, decoded.
    fn message(&mut self, command: &str, deadline: Instant) -> Result<Value, QmpError> {
        let started = Instant::now();
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(|_| QmpError::Malformed {
                    command: command.into(),
                    found: String::from_utf8_lossy(&line).trim().into(),
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let seconds = deadline.saturating_duration_since(started).as_secs();
                return Err(QmpError::Timeout { command: command.into(), seconds });
            }
            self.stream.set_read_timeout(Some(left)).map_err(|source| broken(command, source))?;
            let mut chunk = [0; 8192];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(QmpError::Closed { command: command.into() }),
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
                Err(source) => return Err(broken(command, source)),
            }
        }
    }
}

fn broken(command: &str, source: std::io::Error) -> QmpError {
    match source.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => QmpError::Closed { command: command.into() },
        _ => QmpError::Io { command: command.into(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// A monitor that plays a fixed script whatever it is asked, and hangs up when it hears `stop`.
    fn scripted(lines: &[&str]) -> UnixStream {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let script = lines.concat();
        thread::spawn(move || {
            theirs.write_all(script.as_bytes()).unwrap();
            let mut heard = Vec::new();
            let mut chunk = [0; 256];
            while !heard.windows(6).any(|w| w == b"\"stop\"") {
                match theirs.read(&mut chunk) {
                    Ok(n) if n > 0 => heard.extend_from_slice(&chunk[..n]),
                    _ => break,
                }
            }
        });
        ours
    }

    #[test]
    fn events_before_a_reply_are_kept_for_later() {
        let mut qmp = Qmp::new(scripted(&[
            "{\"QMP\": {}}\n",
            "{\"return\": {}}\n",
            "{\"event\": \"STOP\", \"data\": {\"a\": 1}}\n{\"return\": {\"running\"",
            ": false}}\n",
        ]))
        .unwrap();
        assert_eq!(qmp.execute("query-status", Value::Null).unwrap(), json!({"running": false}));
        assert_eq!(qmp.wait_event("STOP", PATIENCE).unwrap().data, json!({"a": 1}));
    }

    #[test]
    fn failures_are_told_apart() {
        let greeting = "{\"QMP\": {}}\n{\"return\": {}}\n";
        let mut qmp = Qmp::new(scripted(&[greeting, "{\"error\": {\"desc\": \"no such device\"}}\n"])).unwrap();
        let refused = qmp.execute("device_del", Value::Null);
        assert!(matches!(refused, Err(QmpError::Refused { description, .. }) if description == "no such device"));
        assert!(matches!(qmp.execute("stop", Value::Null), Err(QmpError::Closed { .. })));

        let mut qmp = Qmp::new(scripted(&[greeting, "HTTP/1.1 200 OK\n"])).unwrap();
        assert!(matches!(qmp.execute("cont", Value::Null), Err(QmpError::Malformed { .. })));
        assert!(matches!(Qmp::new(scripted(&["{\"return\": {}}\n"])), Err(QmpError::Malformed { .. })));
    }

    #[test]
    fn a_silent_monitor_is_a_timeout() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"{\"QMP\": {}}\n{\"return\": {}}\n").unwrap();
        let mut qmp = Qmp::new(ours).unwrap();
        assert!(matches!(qmp.wait_event("STOP", Duration::from_millis(50)), Err(QmpError::Timeout { .. })));
    }
}
