//! The recorded streams, and the program run on them.

use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The bytes of a recorded stream of `inspect/tests/streams`.
pub(crate) fn stream(name: &str) -> Vec<u8> {
    let path = path(&format!("{name}.zst"));
    let file = std::fs::File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    zstd::decode_all(file).expect("a whole zstd file")
}

/// The path of a file in `inspect/tests/streams`.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../inspect/tests/streams").join(name)
}

/// `bytes` as a file in `dir`.
pub(crate) fn file(dir: &tempfile::TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).expect("a writable temporary directory");
    path
}

/// What the program did.
pub(crate) struct Ran {
    /// Its exit code; panics count as none.
    pub(crate) code: Option<i32>,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
}

impl Ran {
    /// The last line of standard output as JSON.
    pub(crate) fn json(&self) -> Value {
        let last = self.stdout.lines().last().unwrap_or_else(|| panic!("nothing printed; stderr: {}", self.stderr));
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {last}"))
    }
}

/// Runs the program with nothing on standard input.
pub(crate) fn qevm<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Ran {
    ran(command(arguments).stdin(Stdio::null()).output().expect("the program runs"))
}

/// Runs the program with `input` on standard input.
pub(crate) fn qevm_reading<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>, input: &[u8]) -> Ran {
    let mut child = command(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut stdin = child.stdin.take().expect("a pipe");
    let input = input.to_vec();
    // The program may stop reading at a fault.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().expect("it ends");
    writer.join().expect("the writer ends");
    ran(output)
}

/// Runs the program in a shell that has done `first`, e.g. `umask 0`.
pub(crate) fn qevm_after<A: AsRef<std::ffi::OsStr>>(first: &str, arguments: impl IntoIterator<Item = A>) -> Ran {
    ran(command_after(first, arguments).stdin(Stdio::null()).output().expect("the shell runs"))
}

/// The program while it runs.
pub(crate) struct Background(Child);

impl Background {
    /// Starts it with nothing on standard input.
    pub(crate) fn start<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Self {
        let mut command = command(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Background(command.spawn().expect("the program runs"))
    }

    /// Starts it with an [`input`](Self::input) that is still to be written.
    pub(crate) fn start_with_input<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Self {
        let mut command = command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Background(command.spawn().expect("the program runs"))
    }

    /// Its standard input, once.
    pub(crate) fn input(&mut self) -> std::process::ChildStdin {
        self.0.stdin.take().expect("it is a pipe")
    }

    /// Starts it in a shell that has done `first`.
    pub(crate) fn start_after<A: AsRef<std::ffi::OsStr>>(first: &str, arguments: impl IntoIterator<Item = A>) -> Self {
        let mut command = command_after(first, arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Background(command.spawn().expect("the shell runs"))
    }

    /// The number of its process.
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// Kills it, so that it can tidy up nothing.
    pub(crate) fn kill(mut self) {
        self.0.kill().expect("a child");
        self.0.wait().expect("a child");
    }

    /// Waits for its end, which must come within `limit`. It prints less than a pipe holds.
    pub(crate) fn end(mut self, limit: Duration) -> Ran {
        let started = Instant::now();
        while self.0.try_wait().expect("a child").is_none() {
            if started.elapsed() > limit {
                self.0.kill().expect("a child");
                panic!("it hangs: {}", ran(self.0.wait_with_output().expect("it ends")).stderr);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        ran(self.0.wait_with_output().expect("it ends"))
    }
}

fn command<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qevm"));
    command.args(arguments);
    command
}

fn command_after<A: AsRef<std::ffi::OsStr>>(first: &str, arguments: impl IntoIterator<Item = A>) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("{first}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_qevm")]).args(arguments);
    shell
}

fn ran(output: Output) -> Ran {
    Ran {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}
