//! `qevm receive` as a child process that says where it listens.

use super::setup::Transport;
use crate::patience::PATIENCE;
use crate::subject::Subject;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStderr, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// A running `qevm receive`.
pub(crate) struct Receiver {
    child: Child,
    /// What the source's `migrate` takes.
    pub(crate) uri: String,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
}

/// How it ended.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) code: Option<i32>,
    /// The object that it printed; null if there is none.
    pub(crate) report: Value,
    /// Standard error, without the first line.
    pub(crate) said: String,
}

impl Receiver {
    /// Starts it and waits until it listens. What it receives is `main.qevm` in `folder`.
    pub(crate) fn start(
        subject: &Subject,
        folder: &Path,
        transport: Transport,
        options: &[String],
    ) -> Result<Receiver> {
        let address = match transport {
            Transport::Tcp => "tcp:127.0.0.1:0".to_string(),
            _ => format!("unix:{}", folder.join("r").display()),
        };
        let out = folder.join("main.qevm");
        let mut command = subject.command();
        command.args(["receive", &address, "--json", "--out"]).arg(&out).args(options);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting qevm receive")?;
        let (stdout, stderr) = (child.stdout.take().context("no stdout")?, child.stderr.take().context("no stderr")?);
        let (line, stderr) = first_line(stderr);
        let stdout = thread::spawn(move || all(stdout));
        let stderr = thread::spawn(move || all(stderr));
        let mut receiver = Receiver { child, uri: String::new(), stdout: Some(stdout), stderr: Some(stderr) };
        let Some(uri) = line.trim().strip_prefix("listening; on the source: migrate ") else {
            let rest = receiver.finish(PATIENCE)?;
            bail!("qevm receive does not listen: {line}{}", rest.said);
        };
        receiver.uri = uri.into();
        Ok(receiver)
    }

    /// Waits for its end.
    pub(crate) fn finish(&mut self, limit: Duration) -> Result<Received> {
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                bail!("qevm receive did not end within {} s", limit.as_secs());
            }
            thread::sleep(Duration::from_millis(5));
        };
        let text = |handle: Option<JoinHandle<String>>| handle.and_then(|h| h.join().ok()).unwrap_or_default();
        let (out, said) = (text(self.stdout.take()), text(self.stderr.take()));
        let report = out.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or(Value::Null);
        Ok(Received { code: status.code(), report, said })
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // It has ended already, but for a row that failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn first_line(stderr: ChildStderr) -> (String, BufReader<ChildStderr>) {
    let mut reader = BufReader::new(stderr);
    let mut line = String::new();
    // An unreadable line is an empty one: then the receiver does not listen.
    let _ = reader.read_line(&mut line);
    (line, reader)
}

fn all(mut stream: impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}
