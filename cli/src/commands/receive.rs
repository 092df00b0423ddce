//! `qevm receive`: be the destination of a real QEMU's `migrate`.
//!
//! | module | what |
//! |---|---|
//! | `connections` | the thread that takes connections and reads all but the main channel |
//! | `gate`, `caller` | who a connection is, by its first bytes; strangers cost a descriptor, for some seconds |
//! | `channel` | a page channel, saved and followed packet by packet, so that a source set up in another way is refused while its guest can still go on |
//! | `main_channel` | the main channel, saved, decoded on the fly and answered: PONG for PING, SHUT at the end |
//! | `ledger` | whether everything has arrived |
//! | `files` | where it is saved |
//!
//! SHUT 0, which makes the source give up its guest, is only said when all channels have delivered what the main
//! channel announced and the files are on the disk, under their names. What arrived is then read from them, as `qevm
//! inspect` does.

mod caller;
mod channel;
mod connections;
mod dropped;
mod files;
mod gate;
mod ledger;
mod main_channel;

use super::{Bar, Output, inspect};
use crate::args;
use crate::failure::Stop;
use crate::progress::Progress;
use crate::socket::{Address, Listener};
use connections::{Connections, SessionEvent};
use files::Files;
use gate::Gate;
use ledger::Ledger;
use main_channel::{Ended, Handover, MainChannel};
use qevm_inspect::failure::{Failure, printable};
use qevm_inspect::ram::{Keep, RamDigest};
use qevm_inspect::report::Members;
use qevm_inspect::stream::{Analysis, Layouts, Settings, analyze};
use serde::Serialize;
use std::io::{self, Write};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

/// Runs the command.
///
/// # Errors
/// [`Stop::Usage`] if the address or the output files cannot be used, [`Stop::Bad`] if the migration did not arrive
/// whole; then nothing is kept, unless that was asked for. After the source was told that its guest has arrived there
/// is no error any more.
pub fn run(receive: &args::Receive) -> Result<(), Stop> {
    let address = Address::parse(&receive.address)?;
    let tls = receive.tls.sessions()?;
    let files = Arc::new(Files::new(receive)?);
    let listener = Listener::bind(&address)
        .map_err(|error| Stop::Usage(format!("{}: cannot listen: {error}", receive.address)))?;
    let listens = listener.address();
    let ledger = Arc::new(Ledger::new(listens.clone(), receive.multifd_channels));
    let (sender, events) = mpsc::channel();
    let patience = receive.timeout.map(Duration::from_secs);
    let connections = Connections {
        listener: Some(listener),
        tls,
        gate: Gate::new(),
        files: Arc::clone(&files),
        ledger: Arc::clone(&ledger),
        compression: receive.multifd_compression,
        patience,
        events: sender,
        main: None,
        channels: Vec::new(),
        full_until: None,
        failing: None,
    };
    let thread = thread::Builder::new()
        .spawn(move || connections.run())
        .map_err(|error| Stop::Usage(format!("{}: cannot start a thread: {error}", receive.address)))?;
    eprintln!("listening; on the source: migrate {listens}");
    let (socket, first) = match events.recv() {
        Ok(SessionEvent::Main(socket, first)) => (socket, first),
        Ok(SessionEvent::Failed(failure)) => {
            // It says last what it has dropped.
            let _ = thread.join();
            return Err(failure.into());
        }
        Err(error) => return Err(Failure::mismatch(&listens, 0, "", error.to_string()).into()),
    };
    let switchover_ack = receive.switchover_ack;
    let spool = receive.bounds.spool();
    let main = MainChannel { socket, first, files: Arc::clone(&files), switchover_ack, spool, patience, ledger };
    let ended = main.receive();
    // If it had panicked, channels would be missing, and that is an error already.
    let _ = thread.join();
    report(receive, &files, ended)
}

/// The object of `verify`, where the files are, and what the source was told.
#[derive(Serialize)]
struct Received<'a> {
    #[serde(flatten)]
    report: Members<'a>,
    files: &'a [String],
    handover: &'static str,
}

/// Says what arrived.
fn report(receive: &args::Receive, files: &Files, ended: Ended) -> Result<(), Stop> {
    let Ended { failure, handover, answered } = ended;
    let mut analysis = read(receive, files, answered);
    let arrived = failure.is_none();
    // What went wrong on the wire explains what is wrong with the file, and not the other way round.
    analysis.failure = failure.or(analysis.failure);
    let (saved, kept) = match (arrived, receive.keep_partial) {
        (true, _) => (files.all(answered).iter().map(|output| output.path().to_owned()).collect(), String::new()),
        (false, false) => (Vec::new(), "; nothing was kept (--keep-partial keeps what came)".to_owned()),
        (false, true) => match files.keep_partial(answered) {
            Ok(partial) => (partial, "; what came is partial and was kept".to_owned()),
            Err(failure) => (Vec::new(), format!("; what came could not be kept: {failure}")),
        },
    };
    let saved: Vec<String> = saved.iter().map(|path| path.display().to_string()).collect();
    let printed = print(receive, &mut analysis, handover, &saved);
    match (analysis.failure, handover) {
        (None, Handover::Unasked) => printed,
        (Some(failure), Handover::Refused | Handover::Unasked) => {
            Err(Stop::Bad(Failure { message: format!("{}{kept}", failure.message), ..failure }))
        }
        (failure, _) => {
            // The guest is here and nowhere else, whatever else there is to say.
            if let Some(failure) = failure {
                warn(&format!("the guest has arrived, but what was saved has a fault: {failure}"));
            }
            if handover == Handover::Doubtful {
                warn(&format!(
                    "the source reset the connection and may not have heard that its guest has arrived: make sure that it \
                     does not run there before it is started from {}",
                    receive.out.display()
                ));
            }
            if let Err(Stop::Usage(message)) = printed {
                warn(&message);
            }
            Ok(())
        }
    }
}

/// Says something, if there is a reader.
fn warn(line: &str) {
    let _ = writeln!(io::stderr(), "qevm: {}", printable(line));
}

fn read(receive: &args::Receive, files: &Files, answered: bool) -> Analysis {
    let mut inputs = match files.inputs(answered) {
        Ok(inputs) => inputs,
        Err(failure) => return Analysis { failure: Some(failure), ..Analysis::default() },
    };
    let mut bar = Bar(Progress::new("reading what was saved", inputs.main.source.total()));
    let settings = Settings {
        keep: Keep::Digests,
        reencode: true,
        complete: true,
        strict: true,
        live: false,
        layouts: Layouts::default(),
        spool: receive.bounds.spool(),
        max_ram: u64::MAX,
    };
    analyze(&mut inputs, &settings, &mut bar)
}

fn print(receive: &args::Receive, analysis: &mut Analysis, handover: Handover, saved: &[String]) -> Result<(), Stop> {
    let report = analysis.report(RamDigest::Crc32);
    let mut out = Output::new();
    match receive.output.json {
        true => {
            out.json(&Received { report: report.members(true), files: saved, handover: handover.as_str() })?;
        }
        false => {
            inspect::print(&mut out, analysis, &report, false)?;
            out.line("")?;
            if !saved.is_empty() {
                out.line(format!("saved to {}", saved.join(", ")))?;
            }
            out.line(handover)?;
        }
    }
    out.finish()
}
