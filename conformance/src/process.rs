//! Child processes with a deadline and errors that quote what the child said.

use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Runs `command` to its end and gives its standard output.
///
/// # Errors
/// It cannot start, is still running after `limit` (it is killed then), or exits with another status than 0. The error
/// names the command line and quotes the last lines of its standard error.
pub fn run(command: &mut Command, limit: Duration) -> Result<String> {
    let output = run_any(command, limit)?;
    if !output.success {
        bail!("{} failed ({}): {}", line(command), output.status, last_lines(&output.stderr, &output.stdout));
    }
    Ok(output.stdout)
}

/// What a finished child left behind.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Exit status 0.
    pub success: bool,
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
    /// The status in words.
    pub status: String,
    /// Standard output, lossily decoded.
    pub stdout: String,
    /// Standard error, lossily decoded.
    pub stderr: String,
}

/// Like [`run`], with every exit status accepted.
///
/// # Errors
/// The child cannot start, or is still running after `limit`.
pub fn run_any(command: &mut Command, limit: Duration) -> Result<Finished> {
    finish(command.stdin(Stdio::null()), limit)
}

/// Like [`run_any`], with `input` on the child's standard input: less than a pipe holds (64 KiB).
///
/// # Errors
/// As [`run_any`].
pub(crate) fn run_fed(command: &mut Command, input: &str, limit: Duration) -> Result<Finished> {
    let (reader, mut writer) = std::io::pipe()?;
    writer.write_all(input.as_bytes())?;
    drop(writer);
    finish(command.stdin(reader), limit)
}

fn finish(command: &mut Command, limit: Duration) -> Result<Finished> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {}", line(command)))?;
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            let (out, err) = (joined(stdout), joined(stderr));
            bail!("{} did not end within {} s: {}", line(command), limit.as_secs(), last_lines(&err, &out));
        }
        thread::sleep(Duration::from_millis(5));
    };
    Ok(Finished {
        success: status.success(),
        code: status.code(),
        status: status.to_string(),
        stdout: joined(stdout),
        stderr: joined(stderr),
    })
}

type Drain = Option<thread::JoinHandle<Vec<u8>>>;

fn drain<R: Read + Send + 'static>(pipe: Option<R>) -> Drain {
    pipe.map(|mut pipe| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was read before a broken pipe is still worth quoting.
            let _ = pipe.read_to_end(&mut bytes);
            bytes
        })
    })
}

fn joined(drain: Drain) -> String {
    let bytes = drain.and_then(|d| d.join().ok()).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The command line as a person would type it.
pub fn line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|a| a.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

fn last_lines(stderr: &str, stdout: &str) -> String {
    let text = if stderr.trim().is_empty() { stdout } else { stderr };
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    match lines.len() {
        0 => "it printed nothing".into(),
        n => lines[n.saturating_sub(8)..].join("; "),
    }
}
