//! `reference-vmm run`.

use super::event_log::EventLog;
use super::machine::MachineArguments;
use super::options::pairs;
use super::signals::{self, Signals};
use crate::{log, private};
use anyhow::{Context, bail};
use qevm_migration::cpr::Predecessor;
use qevm_migration::{Address, BadAddress, Listener, Timeouts};
use qevm_wire::Located;
use reference_vmm::descriptors::Descriptors;
use reference_vmm::machine::Machine;
use reference_vmm::qmp::Server;
use reference_vmm::vmm::{Actions, Exit, Vmm};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

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
  reference-vmm run --incoming nbd+unix:///?socket=/run/guest.pages --no-load-ahead
      start a guest at once from what qevm serve gives, and load only the pages that it touches
  reference-vmm run --qmp unix:/tmp/qmp.sock
      control the guest by QMP; {\"execute\": \"migrate\", \"arguments\": {\"uri\": \"tcp:127.0.0.1:4444\"}} sends it there

A guest that resets itself starts anew. SIGTERM, SIGINT and SIGHUP end the monitor in order; the second of them does so at once.

Needs /dev/kvm. Ends with 0 when the guest switched itself off, QMP said quit, a signal came, or --seconds have passed, and
with 1 when it could not go on or could not be received; the reason is the last line on standard error.")]
pub(crate) struct Run {
    #[command(flatten)]
    machine: MachineArguments,
    /// Stop after that many seconds
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Wait for a guest from there: tcp:HOST:PORT[,to=PORT][,ipv4=on|off][,ipv6=on|off], unix:PATH, a channel as a JSON
    /// object as QMP has it, exec:COMMAND, fd:NUMBER, file:PATH[,offset=N], a page server
    /// (nbd+unix:///[EXPORT]?socket=PATH or nbd://HOST[:PORT]/[EXPORT], which turns capabilities mapped-ram and
    /// postcopy-ram on), or defer until QMP's migrate-incoming
    ///
    /// A channel of type cpr, before or after, takes over the memory of a guest that comes by mode cpr-transfer: a
    /// process of this host passes it there when it is told to migrate, before QMP is served here.
    #[arg(long, value_name = "ADDRESS")]
    incoming: Vec<Incoming>,
    /// With capabilities mapped-ram and postcopy-ram, memory stays in the file, or at the page server, until the guest
    /// touches it: nothing is loaded ahead
    #[arg(long)]
    no_load_ahead: bool,
    /// Serve QMP at unix:PATH
    #[arg(long, value_name = "unix:PATH", value_parser = parse_qmp)]
    qmp: Option<PathBuf>,
    /// Append what happens to the guest and its migrations to a file, one line of JSON each: QMP's events, all of them,
    /// with what query-migrate says
    #[arg(long, value_name = "FILE")]
    event_log: Option<PathBuf>,
    /// Do not start the guest; QMP's cont does
    #[arg(long, short = 'S')]
    paused: bool,
    /// End when the guest resets itself or is reset, instead of starting it anew: --action reboot=shutdown
    #[arg(long)]
    no_reboot: bool,
    /// Keep the guest, paused, when it switches itself off, instead of ending: --action shutdown=pause
    #[arg(long)]
    no_shutdown: bool,
    /// What to do when the guest stops: reboot=reset|shutdown, shutdown=poweroff|pause, and panic= and watchdog= with
    /// QEMU's actions, which no device of this machine needs
    #[arg(long, value_name = "EVENT=ACTION,…", value_parser = parse_actions)]
    action: Vec<Vec<(String, String)>>,
}

#[derive(Clone)]
enum Incoming {
    Defer,
    From(Address),
    /// Where a predecessor passes the guest's memory.
    Memory(Address),
}

impl FromStr for Incoming {
    type Err = String;

    fn from_str(text: &str) -> Result<Incoming, String> {
        match text {
            "defer" => Ok(Incoming::Defer),
            json if json.starts_with('{') => {
                let (cpr, address) = reference_vmm::qmp::channel(json).map_err(|failure| failure.to_string())?;
                Ok(if cpr { Incoming::Memory(address) } else { Incoming::From(address) })
            }
            _ => text.parse().map(Incoming::From).map_err(|error: Located<BadAddress>| error.to_string()),
        }
    }
}

impl Run {
    pub(crate) fn execute(self, mut inherited: Descriptors) -> anyhow::Result<ExitCode> {
        private::keep_out_of_dumps().context("cannot keep the guest's memory out of core dumps")?;
        survive_full_files();
        let signals = signals::take()?;
        let actions = self.actions()?;
        let incoming = self.incoming.iter().rfind(|from| !matches!(from, Incoming::Memory(_)));
        let mut signals = signals;
        let mut predecessor = match self.predecessor(&mut signals)? {
            Ok(predecessor) => predecessor,
            Err(ended) => {
                log::say(&ended);
                return Ok(ExitCode::SUCCESS);
            }
        };
        if predecessor.is_some() && incoming.is_none() {
            bail!("--incoming has a channel of type cpr alone: say where the guest comes from, or defer");
        }
        let passed = predecessor.as_mut().map(|predecessor| {
            predecessor.take().into_iter().map(|passed| (passed.name, File::from(passed.descriptor))).collect()
        });
        let machine = Machine::new(self.machine.config(incoming.is_some(), passed, &mut inherited)?)?;
        let sockets = self.machine.sockets()?;
        let vmm = Vmm::new(machine, self.machine.profile(), incoming.is_some());
        predecessor.into_iter().for_each(|predecessor| vmm.come_after(predecessor));
        let _event_log = match &self.event_log {
            Some(path) => Some(
                EventLog::start(path, &vmm)
                    .with_context(|| format!("cannot write the event log {}", path.display()))?,
            ),
            None => None,
        };
        signals::attend(signals, vmm.clone());
        vmm.set_actions(actions);
        vmm.set_load_ahead(!self.no_load_ahead);
        *vmm.descriptors() = inherited;
        for (text, properties) in self.machine.objects()? {
            vmm.objects().add(properties).with_context(|| format!("--object {text}"))?;
        }
        if self.paused {
            vmm.stop();
        } else {
            vmm.machine().can_run()?;
        }
        match incoming {
            Some(Incoming::From(address)) => {
                if matches!(address, Address::Nbd { .. }) {
                    // Nothing else is expected of a page server: every page at its place, and loaded when it is needed.
                    let on = [("mapped-ram", true), ("postcopy-ram", true)];
                    vmm.set_capabilities(on).map_err(anyhow::Error::from_boxed)?;
                }
                vmm.listen(address, true)?;
            }
            Some(_) => {}
            None if self.paused => vmm.machine().activate()?,
            None => vmm.cont().map_err(anyhow::Error::from_boxed)?,
        }
        let server = match &self.qmp {
            Some(path) => Some(
                Server::start(path, vmm.clone()).with_context(|| format!("cannot serve QMP at {}", path.display()))?,
            ),
            None => None,
        };
        let exit = vmm.wait(self.seconds.map_or(Duration::MAX, Duration::from_secs));
        leave(&vmm);
        drop(server);
        let incoming = match vmm.listening() {
            Some(Address::Unix(path)) => Some(path),
            _ => None,
        };
        for path in sockets.into_iter().chain(incoming) {
            // Others may have removed it already.
            let _ = std::fs::remove_file(path);
        }
        let (code, reason) = match exit {
            None | Some(Exit::Quit) => return Ok(ExitCode::SUCCESS),
            Some(Exit::Signal { number, sender }) => (ExitCode::SUCCESS, signals::message(number, sender.as_ref())),
            Some(Exit::ShutDown { stop: None, .. }) => return Ok(ExitCode::SUCCESS),
            Some(Exit::ShutDown { stop: Some(stop), .. }) => (ExitCode::SUCCESS, stop.to_string()),
            Some(Exit::GuestStopped(stop)) => (ExitCode::FAILURE, stop.to_string()),
            Some(Exit::ResetFailed(reason)) => (ExitCode::FAILURE, format!("the guest could not be reset: {reason}")),
            Some(Exit::IncomingFailed(reason)) => (ExitCode::FAILURE, reason),
        };
        log::say(&reason);
        Ok(code)
    }

    /// Waits for the process that passes a guest's memory, if one is expected; or says which signal ends that.
    fn predecessor(&self, signals: &mut Signals) -> anyhow::Result<Result<Option<Predecessor>, String>> {
        let address = self.incoming.iter().rev().find_map(|from| match from {
            Incoming::Memory(address) => Some(address),
            _ => None,
        });
        let Some(address) = address else { return Ok(Ok(None)) };
        let listener = Listener::bind(address)?;
        tracing::info!("waiting for a guest's memory at {address}");
        let (signals, ended) = (RefCell::new(signals), Cell::new(None));
        let wanted = || {
            ended.set(ended.take().or_else(|| signals.borrow_mut().pending().next().map(|origin| origin.signal)));
            ended.get().is_none()
        };
        let came = Predecessor::wait(&listener, &Timeouts::default(), &wanted);
        match ended.get() {
            Some(signal) => Ok(Err(signals::message(signal, None))),
            None => Ok(Ok(Some(came?))),
        }
    }

    fn actions(&self) -> anyhow::Result<Actions> {
        let mut actions = Actions::default();
        if self.no_reboot {
            actions = actions.with("reboot", "shutdown")?;
        }
        if self.no_shutdown {
            actions = actions.with("shutdown", "pause")?;
        }
        for (event, action) in self.action.iter().flatten() {
            actions = actions.with(event, action).with_context(|| format!("--action {event}={action}"))?;
        }
        Ok(actions)
    }
}

/// How long the end waits for a guest that does not stop, or that has gone before its memory and gets none of it.
const LEAVING: Duration = Duration::from_secs(2);

/// Stops guest and migration for the end.
fn leave(vmm: &Arc<Vmm>) {
    let (done, wait) = mpsc::channel();
    let leaving = vmm.clone();
    thread::spawn(move || {
        leaving.leave();
        let _ = done.send(());
    });
    let mut before = None;
    while wait.recv_timeout(LEAVING).is_err() {
        let migration = vmm.outgoing().statistics();
        if !migration.status.is_postcopy() {
            return tracing::warn!("the guest does not stop; it ends with the monitor");
        }
        // A second signal ends the wait.
        if before.replace(migration.ram.transferred) == Some(migration.ram.transferred) {
            return tracing::error!("{} bytes of guest memory do not get to the destination", migration.ram.remaining);
        }
    }
}

/// QEMU's `-action`: `EVENT=ACTION[,EVENT=ACTION…]`.
fn parse_actions(text: &str) -> Result<Vec<(String, String)>, String> {
    let actions = pairs(text, None).map_err(|error| error.to_string())?;
    for (event, action) in &actions {
        Actions::default().with(event, action).map_err(|error| error.to_string())?;
    }
    Ok(actions)
}

/// Makes a file that has reached its limit (`ulimit -f`) an error of the migration, instead of the end of the guest.
fn survive_full_files() {
    // SAFETY: to ignore a signal needs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// `unix:PATH`, with the options that QEMU wants after it.
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

    /// The texts are QEMU 11.1's.
    #[test]
    fn actions_are_written_as_for_qemu() {
        let pair = |event: &str, action: &str| (event.to_owned(), action.to_owned());
        let parsed = parse_actions("reboot=shutdown,panic=exit-failure");
        assert_eq!(parsed, Ok(vec![pair("reboot", "shutdown"), pair("panic", "exit-failure")]));
        let refused = |text: &str| parse_actions(text).unwrap_err();
        assert_eq!(refused("reboot=x"), "Parameter 'reboot' does not accept value 'x'");
        assert_eq!(refused("foo=bar"), "Invalid parameter 'foo'");
        assert_eq!(refused("reboot"), "'reboot' at byte 0 is no NAME=VALUE");
    }

    #[test]
    fn qmp_sockets_are_written_as_for_qemu() {
        assert_eq!(parse_qmp("unix:/tmp/q,server=on,wait=off"), Ok("/tmp/q".into()));
        assert_eq!(parse_qmp("unix:/tmp/q"), Ok("/tmp/q".into()));
        for bad in ["tcp:a:1", "unix:", "unix:/tmp/q,server=off"] {
            assert!(parse_qmp(bad).is_err(), "{bad}");
        }
    }
}
