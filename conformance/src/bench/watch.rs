//! What is seen of two monitors from outside: when the guest prints, and the processor time that goes by.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;

/// How often the consoles are looked at: far finer than the guest's progress lines.
const LOOK: Duration = Duration::from_micros(500);

/// Watches the consoles of both ends.
pub(super) struct Silence {
    end: Arc<AtomicBool>,
    thread: JoinHandle<(Option<Instant>, Option<Instant>)>,
}

impl Silence {
    /// Begins to watch, while the guest prints at `source` and nothing at `destination` yet.
    pub(super) fn watch(source: &Path, destination: &Path) -> Silence {
        let [source, destination]: [PathBuf; 2] = [source.into(), destination.into()];
        let end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&end);
        let thread = thread::spawn(move || {
            let (mut seen, mut last) = (size(&source), None);
            while !ended.load(Ordering::Relaxed) {
                let (now, length) = (Instant::now(), size(&source));
                if length != seen {
                    (seen, last) = (length, Some(now));
                }
                if size(&destination) > 0 {
                    return (last, Some(now));
                }
                thread::sleep(LOOK);
            }
            (last, None)
        });
        Silence { end, thread }
    }

    /// When the guest printed for the last time at the source, and for the first time at the destination.
    ///
    /// # Errors
    /// It did not print at either end within `limit`.
    pub(super) fn ends(self, limit: Duration) -> Result<(Instant, Instant)> {
        let deadline = Instant::now() + limit;
        while !self.thread.is_finished() && Instant::now() < deadline {
            thread::sleep(LOOK);
        }
        self.end.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok((Some(last), Some(first))) => Ok((last, first)),
            Ok(_) => bail!("the guest did not print at both ends"),
            Err(_) => bail!("the thread that watches the consoles has panicked"),
        }
    }
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Processor time of a process so far, in seconds, without its vCPU threads.
///
/// # Errors
/// There is no such process.
pub(super) fn processor_time(pid: u32) -> Result<f64> {
    // `/proc/PID/stat` counts in hundredths of a second, which is too coarse for what is compared here.
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))
        .with_context(|| format!("the processor time of process {pid}"))?;
    let mut time = Duration::from(clock.now()?);
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        // A thread that ended meanwhile was no vCPU.
        let Ok(name) = fs::read_to_string(thread.join("comm")) else { continue };
        if is_vcpu(&name) {
            time = time.saturating_sub(time_of(&thread.join("schedstat"))?);
        }
    }
    Ok(time.as_secs_f64())
}

/// What QEMU (with `-name debug-threads=on`) and reference-vmm call the threads of vCPUs.
fn is_vcpu(comm: &str) -> bool {
    comm.starts_with("CPU ") || comm.starts_with("vcpu")
}

/// What a thread has run for: the first field of its `schedstat`, in nanoseconds.
fn time_of(schedstat: &Path) -> Result<Duration> {
    let text = fs::read_to_string(schedstat).with_context(|| format!("reading {}", schedstat.display()))?;
    let nanos = text.split_whitespace().next().and_then(|field| field.parse().ok());
    let nanos = nanos.with_context(|| format!("{} has an unknown form: {text:?}", schedstat.display()))?;
    Ok(Duration::from_nanos(nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_are_known_by_their_names() {
        let names = ["CPU 0/KVM\n", "vcpu0\n", "mig/src/main\n", "reference-vmm\n"];
        assert_eq!(names.map(is_vcpu), [true, true, false, false]);
    }

    #[test]
    fn this_process_uses_time() {
        let before = processor_time(std::process::id()).unwrap();
        let start = Instant::now();
        while processor_time(std::process::id()).unwrap() <= before {
            assert!(start.elapsed() < Duration::from_secs(30));
        }
    }

    #[test]
    fn silence_is_between_the_last_and_the_first_word() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| folder.path().join(name));
        let silence = Silence::watch(&a, &b);
        thread::sleep(Duration::from_millis(50));
        fs::write(&a, "x").unwrap();
        thread::sleep(Duration::from_millis(100));
        fs::write(&b, "y").unwrap();
        let (last, first) = silence.ends(Duration::from_secs(10)).unwrap();
        assert!(first - last >= Duration::from_millis(50), "{:?}", first - last);
        assert!(Silence::watch(&a, Path::new("/nowhere")).ends(Duration::from_millis(20)).is_err());
    }
}
