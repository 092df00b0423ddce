//! The `-cpu` with which a QEMU gives a guest the host's processor under KVM.
//!
//! `host` does not start everywhere: where KVM offers MSR 0x10a (`IA32_ARCH_CAPABILITIES`) and refuses the value that a
//! release wants to set, as on AMD hosts, QEMU aborts. So each QEMU is asked once what it starts with, and nothing is
//! assumed about releases or hosts.

use crate::patience::PATIENCE;
use crate::process::run_fed;
use crate::roots::Root;
use anyhow::{Result, bail};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::process::Command;

/// What is tried, best first. The last is KVM's default model, which asks the least of a host.
const CANDIDATES: [&str; 3] = ["host", "host,-arch-capabilities", "qemu64"];
/// A QEMU aborts after its monitor's greeting, when it gives the registers to KVM; one that comes to `quit` has done
/// that.
const SESSION: &str = "{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n";

/// A value for `-cpu` with which a QEMU was seen to start under KVM on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCpu {
    model: &'static str,
    refused: Vec<(&'static str, String)>,
}

impl HostCpu {
    /// The value for `-cpu`.
    pub fn model(&self) -> &'static str {
        self.model
    }
}

/// `-cpu host,-arch-capabilities (-cpu host: failed to set MSR 0x10a to 0x0; …)`.
impl fmt::Display for HostCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "-cpu {}", self.model)?;
        for (model, why) in &self.refused {
            write!(f, " (-cpu {model}: {why})")?;
        }
        Ok(())
    }
}

/// Asks the QEMU of `root`, the first time in this process, and says on standard error what it starts with.
pub(crate) fn of(root: &Root) -> Result<HostCpu> {
    static KNOWN: Mutex<BTreeMap<PathBuf, HostCpu>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock();
    if let Some(cpu) = known.get(root.dir()) {
        return Ok(cpu.clone());
    }
    let cpu = probe(|| root.qemu())?;
    eprintln!("QEMU {} under KVM on this host: {cpu}", root.version());
    known.insert(root.dir().to_path_buf(), cpu.clone());
    Ok(cpu)
}

/// The first candidate with which the QEMU that `qemu` makes comes to the end of a session in its monitor.
fn probe(qemu: impl Fn() -> Command) -> Result<HostCpu> {
    let mut refused = Vec::new();
    for model in CANDIDATES {
        let mut command = qemu();
        command.args(["-no-user-config", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]);
        command.args(["-M", "microvm,accel=kvm", "-cpu", model]);
        let ended = run_fed(&mut command, SESSION, PATIENCE)?;
        if ended.success {
            return Ok(HostCpu { model, refused });
        }
        let said: Vec<&str> = ended.stderr.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let why = if said.is_empty() { ended.status } else { said.join("; ") };
        refused.push((model, why));
    }
    let all: Vec<String> = refused.iter().map(|(model, why)| format!("-cpu {model}: {why}")).collect();
    bail!("{} starts under KVM with no -cpu of {}: {}", program(&qemu()), CANDIDATES.len(), all.join(" | "))
}

fn program(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that looks at its `-cpu`, aborts at those that match `pattern` as QEMU 10.0 does at `host` on an AMD
    /// host, after the greeting, and otherwise exits with 0 on `quit`.
    fn wrapper(pattern: &str) -> Command {
        let script = format!(
            r#"while [ "$1" != -cpu ]; do shift; done
            echo '{{"QMP": {{}}}}'
            case "$2" in {pattern})
                echo 'qemu-system-x86_64: error: failed to set MSR 0x10a to 0xc000069' >&2
                kill -ABRT $$;;
            esac
            while read -r line; do case $line in *quit*) exit 0;; esac; done
            exit 1"#
        );
        let mut command = Command::new("sh");
        command.args(["-c", &script, "qemu"]);
        command
    }

    #[test]
    fn a_qemu_that_starts_with_host_gets_host() {
        let cpu = probe(|| wrapper("none")).unwrap();
        assert_eq!((cpu.model(), cpu.to_string()), ("host", "-cpu host".to_owned()));
    }

    #[test]
    fn a_qemu_that_aborts_with_host_gets_what_it_starts_with() {
        let cpu = probe(|| wrapper("host")).unwrap();
        assert_eq!(cpu.model(), "host,-arch-capabilities");
        assert_eq!(
            cpu.to_string(),
            "-cpu host,-arch-capabilities \
             (-cpu host: qemu-system-x86_64: error: failed to set MSR 0x10a to 0xc000069)"
        );
        assert_eq!(probe(|| wrapper("host*")).unwrap().model(), "qemu64");
    }

    #[test]
    fn a_qemu_that_never_starts_is_an_error_that_quotes_every_attempt() {
        let error = probe(|| wrapper("*")).unwrap_err().to_string();
        for model in CANDIDATES {
            assert!(
                error.contains(&format!("-cpu {model}: qemu-system-x86_64: error: failed to set MSR 0x10a")),
                "{error}"
            );
        }
        let error = probe(|| Command::new("false")).unwrap_err().to_string();
        assert!(error.contains("-cpu host: exit status: 1"), "{error}");
    }
}
