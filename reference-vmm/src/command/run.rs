//! `reference-vmm run`.

use std::process::ExitCode;
use std::time::Duration;

use reference_vmm::machine::{Machine, Stop};

use super::machine::MachineArguments;

/// Run a guest until it stops.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:

  reference-vmm run
      the payload guest: rewrites 60 MiB over and over, and tells four times a second whether a page was lost

  reference-vmm run --memory 512M --smp 2 --fw-cfg name=opt/qevm/payload,string='dirty=256M rate=200M'
      two vCPUs that dirty 256 MiB at 200 MiB/s; all keys: reference-vmm payload --help

Needs /dev/kvm. Ends with 0 when the guest switched itself off, asked for a reset, or --seconds have passed, and with 1 when
it could not go on; the reason is the last line on standard error.")]
pub(crate) struct Run {
    #[command(flatten)]
    machine: MachineArguments,
    /// Stop after that many seconds
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
}

impl Run {
    pub(crate) fn execute(self) -> anyhow::Result<ExitCode> {
        let machine = Machine::new(self.machine.config()?)?;
        machine.resume()?;
        let timeout = Duration::from_secs(self.seconds.unwrap_or(u64::MAX / 4));
        let stop = machine.wait_stop(timeout);
        machine.pause();
        Ok(match stop {
            None => ExitCode::SUCCESS,
            Some(stop) => {
                eprintln!("reference-vmm: {stop}");
                if matches!(stop, Stop::Failed { .. }) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
            }
        })
    }
}
