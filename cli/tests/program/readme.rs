//! The lines of the README, run as they stand there: but for where guests come from, and addresses that others may have
//! taken.

use crate::receive::LIMIT;
use crate::sample::stream;
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The lines of the section on reading a stream, without their comments.
fn lines() -> Vec<String> {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
    let section = readme.split("## Reading a stream").nth(1).expect("a section");
    let block = section.split("```sh\n").nth(1).expect("a block").split("```").next().expect("its end");
    block.lines().map(|line| line.split('#').next().unwrap_or_default().trim().to_owned()).collect()
}

/// A shell that runs `line` in `dir`, with the program under the name that users call.
fn shell(dir: &Path, line: &str) -> Child {
    let program = Path::new(env!("CARGO_BIN_EXE_qevm")).parent().expect("a folder");
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("sh");
    // What ends the shell ends the program.
    command.args(["-c", &format!("exec {line}")]).current_dir(dir).env("PATH", path);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("a shell")
}

fn end(mut child: Child) -> (Option<i32>, String) {
    let started = Instant::now();
    let mut errors = child.stderr.take().expect("a pipe");
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        errors.read_to_string(&mut text).map(|_| text).unwrap_or_default()
    });
    while child.try_wait().expect("a child").is_none() {
        if started.elapsed() > LIMIT {
            child.kill().expect("a child");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    (child.wait().expect("a child").code(), reading.join().expect("text"))
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn the_lines_of_the_readme_work() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (name, of) in
        [("guest", "5.2-plain"), ("a", "7.2-return-path"), ("b", "7.2-return-path"), ("postcopy", "7.2-postcopy")]
    {
        std::fs::write(dir.path().join(format!("{name}.qevm")), stream(of)).unwrap();
    }
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../devices/tests/data/dump-vmstate/7.2.json.gz");
    let schema = Command::new("gzip").arg("-dc").arg(packed).output().expect("gzip is part of every Debian");
    std::fs::write(dir.path().join("q35.json"), schema.stdout).unwrap();

    let (port, pages) = (free_port(), dir.path().join("guest.pages"));
    let (mut receiver, mut ran) = (None, 0);
    for line in lines() {
        let line = line
            .replace("tcp:0.0.0.0:4444", &format!("tcp:0.0.0.0:{port}"))
            .replace("tcp:host:4444", &format!("tcp:localhost:{port}"))
            .replace("/run/guest.pages", &pages.display().to_string());
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["cargo", "install", "--path", folder] => {
                // Building it all once more takes minutes: the package has to be there, with the program that the
                // others call.
                let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder).join("Cargo.toml");
                assert!(std::fs::read_to_string(manifest).unwrap().contains("[[bin]]\nname = \"qevm\""), "{line}");
            }
            // It waits for a source, which a later line is.
            ["qevm", "receive", ..] => receiver = Some((line.clone(), shell(elsewhere.path(), &line))),
            ["qevm", "send", ..] => {
                let (receive, child) = receiver.take().expect("a destination before its source");
                let started = Instant::now();
                loop {
                    let (code, errors) = end(shell(dir.path(), &line));
                    if code == Some(0) {
                        break;
                    }
                    // The destination listens in its own time.
                    assert!(errors.contains("cannot connect") && started.elapsed() < LIMIT, "{line}: {errors}");
                }
                let (code, errors) = end(child);
                assert_eq!(code, Some(0), "{receive}: {errors}");
            }
            ["qevm", "serve", ..] => {
                let (mut server, started) = (shell(dir.path(), &line), Instant::now());
                while UnixStream::connect(&pages).is_err() {
                    assert!(server.try_wait().unwrap().is_none() && started.elapsed() < LIMIT, "{line}");
                    std::thread::sleep(Duration::from_millis(5));
                }
                server.kill().unwrap();
                server.wait().unwrap();
            }
            _ => {
                let (code, errors) = end(shell(dir.path(), &line));
                assert_eq!(code, Some(0), "{line}: {errors}");
            }
        }
        ran += 1;
    }
    assert!(ran >= 12 && receiver.is_none(), "{ran} lines");
}
