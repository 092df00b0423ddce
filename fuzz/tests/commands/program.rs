//! Hostile and generated streams through every command of `qevm`, as processes.

use crate::cost::{Cost, Verdicts};
use crate::generate::{Random, files, hostile, mutate, repository, stream};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use wait4::Wait4;

const GENERATED: u64 = 200;
const THREADS: usize = 2;
/// What is given to `--max-spool`.
const MAX_SPOOL: u64 = 8 << 20;
/// Nothing here takes a second. What does not end at all is found by this.
const HANGS: Duration = Duration::from_secs(120);

/// What a process cost.
#[derive(Debug)]
pub(crate) struct Run {
    /// Most bytes of memory at a time that were its own.
    pub(crate) peak: u64,
    /// Bytes that it wrote, wherever to.
    written: u64,
    /// Bytes read and written.
    pub(crate) moved: u64,
    /// System calls that read or write.
    pub(crate) calls: u64,
    /// Bytes on its standard output and error.
    printed: u64,
    /// Its exit code.
    code: Option<i32>,
}

/// Runs a program to its end.
pub(crate) fn run(command: &mut Command) -> Run {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    ended(command.spawn().expect("a program that runs"))
}

/// Waits for the end of a program, reading what it prints.
fn ended(mut child: Child) -> Run {
    let count = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let (mut pipe, mut piece, mut count) = (pipe.expect("a pipe"), vec![0; 64 << 10], 0);
            while let Ok(read @ 1..) = pipe.read(&mut piece) {
                count += read as u64;
            }
            count
        })
    };
    let out = count(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let err = count(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let pid = Pid::from_child(&child);
    let (started, options) = (Instant::now(), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG);
    while waitid(WaitId::Pid(pid), options).expect("a child").is_none() {
        if started.elapsed() > HANGS {
            child.kill().expect("a child");
            panic!("it hangs");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // It has ended, and was not waited for: the kernel still knows what it did.
    let io = std::fs::read_to_string(format!("/proc/{}/io", child.id())).expect("/proc");
    let number = |key: &str| -> u64 {
        let line = io.lines().find_map(|line| line.strip_prefix(key)).expect("a line");
        line.trim_start_matches(':').trim().parse().expect("a number")
    };
    let used = child.wait4().expect("a child");
    Run {
        peak: used.rusage.maxrss,
        written: number("wchar"),
        moved: number("rchar") + number("wchar"),
        calls: number("syscr") + number("syscw"),
        printed: out.join().expect("a reader") + err.join().expect("a reader"),
        code: used.status.code(),
    }
}

/// The ways in which `qevm` is run. `IN` is the stream, `DIR` a folder of its own.
const COMMANDS: [&[&str]; 14] = [
    &["inspect", "IN"],
    &["inspect", "--json", "--fields", "--records", "IN"],
    &["inspect", "--fields", "--ram-digest=sha256", "--max-ram=64M", "IN"],
    &["verify", "IN"],
    &["verify", "--ram-digest=sha256", "--max-ram=64M", "IN"],
    &["diff", "IN", "IN"],
    &["check", "IN", "--against", "IN"],
    &["convert", "--max-ram=4P", "IN", "--out=DIR/plain"],
    &["convert", "--format=mapped-ram", "--max-ram=1G", "IN", "--out=DIR/mapped"],
    &["extract", "IN", "--devices=DIR/devices.json"],
    &["extract", "IN", "--max-ram=1G", "--ram=DIR/ram"],
    &["extract", "IN", "--max-ram=1G", "--elf=DIR/core", "--memory=DIR/memory", "--kdump=DIR/dump"],
    &["send", "IN", "unix:DIR/nobody"],
    &["receive", "unix:DIR/socket", "--out=DIR/received"],
];

/// Runs one command on one stream and judges it.
fn judge(verdicts: &mut Verdicts, what: &str, arguments: &[&str], input: &Path, n: u64) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let place = dir.path().display().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_qevm-judged"));
    let input_name = input.display().to_string();
    command.args(arguments.iter().map(|word| word.replace("IN", &input_name).replace("DIR", &place)));
    command.arg(format!("--max-spool={MAX_SPOOL}")).env("TMPDIR", dir.path());
    let both = if arguments.iter().filter(|word| **word == "IN").count() == 2 { 2 } else { 1 };
    let run = match arguments[0] {
        "receive" => received(command, &dir.path().join("socket"), input),
        _ => run(&mut command),
    };
    let what = || format!("{} {what}", arguments.join(" "));
    if !matches!(run.code, Some(0..=2)) {
        verdicts.beyond.push(format!("{}: ended with {:?}", what(), run.code));
    }
    let output = written_files(dir.path());
    // `receive` saves what comes, and the return path.
    let temporary = run.written.saturating_sub(run.printed + output.bytes);
    if temporary > MAX_SPOOL + (64 << 10) {
        verdicts.beyond.push(format!("{}: {temporary} bytes of temporary files", what()));
    }
    if output.unfinished && arguments[0] != "receive" && run.code != Some(0) {
        verdicts.beyond.push(format!("{}: a file was left behind", what()));
    }
    let cost = Cost { peak: run.peak, calls: run.calls, allocations: 0, moved: run.moved };
    verdicts.add(what, both * n, cost);
}

struct Output {
    bytes: u64,
    unfinished: bool,
}

/// What was written into a folder, by the bytes that take room on the disk.
fn written_files(folder: &Path) -> Output {
    use std::os::unix::fs::MetadataExt;
    let mut output = Output { bytes: 0, unfinished: false };
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let entry = entry.expect("an entry");
        let metadata = entry.metadata().expect("a file");
        if metadata.is_dir() {
            let inside = written_files(&entry.path());
            output.bytes += inside.bytes;
            output.unfinished |= inside.unfinished;
        } else if metadata.is_file() {
            output.bytes += metadata.blocks() * 512;
            output.unfinished = true;
        }
    }
    output
}

/// Plays the source of a `qevm receive`.
fn received(mut command: Command, socket: &Path, input: &Path) -> Run {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).arg("--timeout=1");
    let mut child = command.spawn().expect("a program that runs");
    let started = Instant::now();
    let mut source = loop {
        match UnixStream::connect(socket) {
            Ok(source) => break source,
            Err(_) if child.try_wait().expect("a child").is_some() => return ended(child),
            Err(error) => assert!(started.elapsed() < HANGS, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    // It may stop reading at a fault.
    let _ = source.write_all(&std::fs::read(input).expect("a file"));
    let _ = source.shutdown(std::net::Shutdown::Write);
    let run = ended(child);
    drop(source);
    run
}

/// A file and its length after decompression.
fn length(path: &Path) -> u64 {
    let opened = qevm_inspect::open::open(path, None, false).unwrap_or_else(|_| panic!("{}", path.display()));
    let mut source = opened.source;
    source.skip(u64::MAX).expect("a file that can be read")
}

#[test]
fn every_command_is_worth_what_it_costs() {
    let dir = tempfile::tempdir().unwrap();
    let mut inputs: Vec<(PathBuf, u64)> = hostile().into_iter().map(|path| (path.clone(), length(&path))).collect();
    let seeds = files(&repository().join("fuzz/seeds/savevm_decoder"));
    let mut random = Random::new(99);
    for number in 0..GENERATED {
        let seed = &seeds[random.below(seeds.len() as u64) as usize].1;
        let bytes = match number % 4 {
            0 => mutate(&mut random, seed.get(2..).unwrap_or_default()),
            1 => {
                let stream = stream(&mut random);
                mutate(&mut random, &stream)
            }
            _ => stream(&mut random),
        };
        let path = dir.path().join(format!("generated-{number}"));
        std::fs::write(&path, &bytes).unwrap();
        inputs.push((path, bytes.len() as u64));
    }
    let judge_some = |thread: usize| {
        let mut verdicts = Verdicts::default();
        for (path, n) in inputs.iter().skip(thread).step_by(THREADS) {
            let name = path.file_name().unwrap().to_string_lossy();
            COMMANDS.iter().for_each(|arguments| judge(&mut verdicts, &name, arguments, path, *n));
        }
        verdicts
    };
    let mut verdicts = Verdicts::default();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || judge_some(thread))).collect();
        threads.into_iter().for_each(|thread| verdicts.merge(thread.join().expect("a judge that ends")));
    });
    verdicts.print("commands");
}

/// The judge is judged.
#[test]
fn a_program_that_takes_too_much_is_found() {
    // It has no line to print before its input ends, and so keeps all of it.
    let used = run(Command::new("sh").args(["-c", "head -c 150000000 /dev/zero | tail -n 1 > /dev/null; true"]));
    let cost = Cost { peak: used.peak, ..Cost::default() };
    assert!(cost.judge(100).expect_err("a finding").contains("bytes of memory"), "{used:?}");
    // And one that writes.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    let used =
        run(Command::new("sh").arg("-c").arg(format!("exec dd if=/dev/zero of={} bs=5000 count=1000", file.display())));
    assert!(used.written >= 5_000_000, "{used:?}");
    let used = run(&mut Command::new("true"));
    assert!(used.peak < 16 << 20 && used.written < 4096, "{used:?}");
}
