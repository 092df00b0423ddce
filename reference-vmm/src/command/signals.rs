//! Signals that end a process: the monitor ends in order at the first of them, and at once at the second.

use anyhow::Context;
use reference_vmm::vmm::{Exit, Sender, Vmm};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::WithOrigin;
use signal_hook::low_level::emulate_default_handler;
use std::sync::Arc;
use std::thread;

/// Signals that have come, by whichever thread they are handled.
pub(super) type Signals = SignalsInfo<WithOrigin>;

/// Takes the signals from now on; they wait until they are attended to.
pub(super) fn take() -> anyhow::Result<Signals> {
    Signals::new([SIGTERM, SIGINT, SIGHUP]).context("cannot handle signals")
}

/// Ends the monitor when a signal has come, in a thread of its own.
pub(super) fn attend(mut signals: Signals, vmm: Arc<Vmm>) {
    thread::spawn(move || {
        let mut ending = false;
        for origin in signals.forever() {
            if std::mem::replace(&mut ending, true) {
                // An operator who insists does not want to wait for a guest that cannot be stopped.
                let _ = emulate_default_handler(origin.signal);
            }
            let sender = origin.process.map(|process| Sender { pid: process.pid, name: name(process.pid) });
            vmm.end(Exit::Signal { number: origin.signal, sender });
        }
    });
}

/// What QEMU says at its end, without its own name.
pub(super) fn message(number: i32, sender: Option<&Sender>) -> String {
    match sender {
        Some(Sender { pid, name }) => format!("terminating on signal {number} from pid {pid} ({name})"),
        None => format!("terminating on signal {number}"),
    }
}

/// How a process was called; empty for one that has ended and was not waited for.
fn name(pid: i32) -> String {
    match std::fs::read(format!("/proc/{pid}/cmdline")) {
        Ok(line) => String::from_utf8_lossy(line.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned(),
        Err(_) => "<unknown process>".to_owned(),
    }
}
