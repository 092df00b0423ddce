//! The processor time of monitors.

use anyhow::{Context, Result};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Processor time of a process so far, all threads that it has or had.
///
/// # Errors
/// There is no such process.
pub(crate) fn of(pid: u32) -> Result<Duration> {
    // `/proc/PID/stat` counts in hundredths of a second, which is too coarse for what is compared here.
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))
        .with_context(|| format!("the processor time of process {pid}"))?;
    Ok(clock.now()?.into())
}

/// The same without the threads of its vCPUs.
///
/// # Errors
/// There is no such process.
pub(crate) fn without_vcpus(pid: u32) -> Result<Duration> {
    let mut time = of(pid)?;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        // A thread that ended meanwhile was no vCPU.
        let Ok(name) = fs::read_to_string(thread.join("comm")) else { continue };
        if is_vcpu(&name) {
            time = time.saturating_sub(time_of(&thread.join("schedstat"))?);
        }
    }
    Ok(time)
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
    use crate::patience::PATIENCE;
    use std::time::Instant;

    #[test]
    fn vcpus_are_known_by_their_names() {
        let names = ["CPU 0/KVM\n", "vcpu0\n", "mig/src/main\n", "reference-vmm\n"];
        assert_eq!(names.map(is_vcpu), [true, true, false, false]);
    }

    #[test]
    fn this_process_uses_time() {
        let before = without_vcpus(std::process::id()).unwrap();
        let start = Instant::now();
        while without_vcpus(std::process::id()).unwrap() <= before {
            assert!(start.elapsed() < PATIENCE);
        }
    }

    #[test]
    fn there_must_be_a_process() {
        assert!(of(u32::MAX).is_err());
    }
}
