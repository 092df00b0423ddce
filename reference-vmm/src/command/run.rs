//! `reference-vmm run`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use reference_vmm::descriptors::Descriptors;
use reference_vmm::machine::{Machine, Stop};
use reference_vmm::migration::Address;
use reference_vmm::qmp::Server;
use reference_vmm::vmm::{Exit, Vmm};

use super::machine::MachineArguments;

/// Run a guest until it stops, or wait for one to migrate here.
#[derive(clap::Args)]
#[command(args_override_self = true)] // as with a QEMU, the last one counts
#[command(after_long_help = "\
Examples:

  reference-vmm run
      the payload guest: rewrites 60 MiB over and over, and tells four times a second whether a page was lost

  reference-vmm run --memory 512M --smp 2 --fw-cfg name=opt/qevm/payload,string='dirty=256M rate=200M'
      two vCPUs that dirty 256 MiB at 200 MiB/s; all keys: reference-vmm payload --help

  reference-vmm run --incoming tcp:127.0.0.1:4444
      wait for a guest from another reference-vmm or a QEMU of the same memory size and firmware
  reference-vmm run --incoming file:guest.img
      go on where a guest was saved by migrate file:guest.img; with capability mapped-ram use --incoming defer and QMP
  reference-vmm run --qmp unix:/tmp/qmp.sock
      control the guest by QMP; {\"execute\": \"migrate\", \"arguments\": {\"uri\": \"tcp:127.0.0.1:4444\"}} sends it there

Needs /dev/kvm. Ends with 0 when the guest switched itself off, asked for a reset, QMP said quit, or --seconds have passed, and
with 1 when it could not go on or could not be received; the reason is the last line on standard error.")]
pub(crate) struct Run {
    #[command(flatten)]
    machine: MachineArguments,
    /// Stop after that many seconds
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Wait for a guest from there: tcp:HOST:PORT, unix:PATH, exec:COMMAND, fd:NUMBER, file:PATH[,offset=N], or defer until QMP's
    /// migrate-incoming
    #[arg(long, value_name = "ADDRESS")]
    incoming: Option<Incoming>,
    /// Serve QMP at unix:PATH
    #[arg(long, value_name = "unix:PATH", value_parser = parse_qmp)]
    qmp: Option<PathBuf>,
    /// Do not start the guest; QMP's cont does
    #[arg(long, short = 'S')]
    paused: bool,
}

#[derive(Clone)]
enum Incoming {
    Defer,
    From(Address),
}

impl FromStr for Incoming {
    type Err = String;

    fn from_str(text: &str) -> Result<Incoming, String> {
        match text {
            "defer" => Ok(Incoming::Defer),
            _ => text
                .parse()
                .map(Incoming::From)
                .map_err(|error: reference_vmm::migration::BadAddress| error.to_string()),
        }
    }
}

impl Run {
    pub(crate) fn execute(self) -> anyhow::Result<ExitCode> {
        let inherited = Descriptors::inherit().context("cannot list the inherited descriptors")?;
        survive_full_files();
        let mut config = self.machine.config()?;
        if self.incoming.is_some() {
            // As with a QEMU: the guest that comes has its own.
            config.kernel = None;
        }
        let machine = Machine::new(config)?;
        let vmm = Vmm::new(machine, self.machine.profile(), self.incoming.is_some());
        *vmm.descriptors() = inherited;
        if self.paused {
            vmm.stop();
        } else {
            vmm.machine().can_run()?;
        }
        match &self.incoming {
            Some(Incoming::From(address)) => vmm.listen(address)?,
            Some(Incoming::Defer) => {}
            None if self.paused => vmm.machine().activate()?,
            None => vmm.cont().map_err(anyhow::Error::from_boxed)?,
        }
        let _server = match &self.qmp {
            Some(path) => Some(
                Server::start(path, vmm.clone()).with_context(|| format!("cannot serve QMP at {}", path.display()))?,
            ),
            None => None,
        };
        let watched = vmm.clone();
        thread::spawn(move || {
            if let Some(stop) = watched.machine().wait_stop(Duration::MAX) {
                watched.end(Exit::GuestStopped(stop));
            }
        });
        let exit = vmm.wait(self.seconds.map_or(Duration::MAX, Duration::from_secs));
        vmm.machine().pause();
        Ok(match exit {
            None | Some(Exit::Quit) => ExitCode::SUCCESS,
            Some(Exit::IncomingFailed(reason)) => {
                eprintln!("reference-vmm: {reason}");
                ExitCode::FAILURE
            }
            Some(Exit::GuestStopped(stop)) => {
                eprintln!("reference-vmm: {stop}");
                if matches!(stop, Stop::Failed { .. }) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
            }
        })
    }
}

/// Makes a file that has reached its limit (`ulimit -f`) an error of the migration, instead of the end of the guest.
fn survive_full_files() {
    // SAFETY: to ignore a signal needs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// `unix:PATH`, with the options that QEMU wants behind it.
fn parse_qmp(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("unix:").ok_or("expected unix:PATH")?;
    let mut options = path.split(',');
    let path = options.next().filter(|path| !path.is_empty()).ok_or("expected unix:PATH")?;
    match options.find(|option| !matches!(*option, "server" | "server=on" | "wait=off" | "nowait")) {
        Some(option) => Err(format!("option '{option}' is not supported; the socket is always server=on,wait=off")),
        None => Ok(path.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qmp_sockets_are_written_as_for_qemu() {
        assert_eq!(parse_qmp("unix:/tmp/q,server=on,wait=off"), Ok("/tmp/q".into()));
        assert_eq!(parse_qmp("unix:/tmp/q"), Ok("/tmp/q".into()));
        for bad in ["tcp:a:1", "unix:", "unix:/tmp/q,server=off"] {
            assert!(parse_qmp(bad).is_err(), "{bad}");
        }
    }
}
