//! `qevm receive`: be the destination of a real QEMU's `migrate`.
//!
//! Every connection is saved by a thread of its own. The main channel is decoded on the fly, because the source expects
//! answers: PONG for PING, SHUT at the end. Page channels are followed packet by packet, so that a source set up in
//! another way is refused while its guest can still go on; SHUT 0, which makes the source give up its guest, is only
//! said when all channels have delivered what the main channel announced. What arrived is then read from the saved
//! files, as `qevm inspect` does.

mod channel;
mod ledger;
mod session;

use super::{Bar, Output, inspect};
use crate::args::{self, RamDigest};
use crate::failure::{Failure, Stop};
use crate::progress::Progress;
use crate::ram::Keep;
use crate::report::Members;
use crate::socket::{Address, Listener};
use crate::stream::{Inputs, Layouts, Settings, analyze};
use serde::Serialize;
use session::{Session, Taken};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Runs the command.
///
/// # Errors
/// [`Stop::Usage`] if the address or the output file cannot be used, [`Stop::Bad`] if the migration did not arrive whole;
/// what did arrive stays in the files.
pub fn run(receive: &args::Receive) -> Result<(), Stop> {
    let address = Address::parse(&receive.address)?;
    let files = Files::new(receive)?;
    let listener = Listener::bind(&address)
        .map_err(|error| Stop::Usage(format!("{}: cannot listen: {error}", receive.address)))?;
    eprintln!("listening; on the source: migrate {}", listener.address());
    let session = Session {
        listener,
        files: &files,
        multifd_channels: receive.multifd_channels,
        multifd_compression: receive.multifd_compression,
        switchover_ack: receive.switchover_ack,
        spool: receive.bounds.spool(),
        patience: receive.timeout.map(Duration::from_secs),
    };
    let taken = session.run()?;
    report(receive, &files, taken)
}

/// The object of `verify`, and where the files are.
#[derive(Serialize)]
struct Received<'a> {
    #[serde(flatten)]
    report: Members<'a>,
    files: &'a [String],
}

/// Says what arrived.
fn report(receive: &args::Receive, files: &Files, taken: Taken) -> Result<(), Stop> {
    let input = args::Input {
        main: receive.out.clone(),
        offset: 0,
        snapshot: None,
        channels: taken.channels.clone(),
        recovery: Vec::new(),
        return_path: taken.return_path.clone().into_iter().collect(),
    };
    let mut inputs = Inputs::open(&input)?;
    let mut bar = Bar(Progress::new("reading what was saved", inputs.main.source.total()));
    let settings = Settings {
        keep: Keep::Digests,
        reencode: true,
        complete: true,
        live: false,
        layouts: Layouts::default(),
        spool: receive.bounds.spool(),
        max_ram: u64::MAX,
    };
    let mut analysis = analyze(&mut inputs, &settings, &mut bar);
    // What went wrong on the wire explains what is wrong with the file, and not the other way round.
    analysis.failure = taken.failure.or(analysis.failure);
    let report = analysis.report(RamDigest::Crc32);
    drop(bar);
    let mut out = Output::new();
    let saved = std::iter::once(&receive.out).chain(&taken.channels).chain(&taken.return_path);
    let saved: Vec<String> = saved.map(|path| path.display().to_string()).collect();
    match receive.output.json {
        true => {
            out.json(&Received { report: report.members(true), files: &saved })?;
        }
        false => {
            inspect::print(&mut out, &analysis, &report, false)?;
            out.line(format!("\nsaved to {}", saved.join(", ")))?;
        }
    }
    out.finish()?;
    match report.error {
        None => Ok(()),
        Some(failure) => {
            let note = format!("{}; {} is partial and was kept", failure.message, files.main.display());
            Err(Stop::Bad(Failure { message: note, ..failure }))
        }
    }
}

/// Where things are saved.
#[derive(Debug)]
struct Files {
    main: PathBuf,
    force: bool,
}

impl Files {
    fn new(receive: &args::Receive) -> Result<Self, Stop> {
        let files = Files { main: receive.out.clone(), force: receive.force };
        if !files.force && files.main.exists() {
            return Err(Stop::Usage(format!("{}: exists; --force overwrites it", files.main.display())));
        }
        // A migration is worth hours: that it cannot be saved must show before it starts.
        files
            .create(&files.main)
            .map_err(|error| Stop::Usage(format!("{}: cannot be written: {error}", files.main.display())))?;
        Ok(files)
    }

    fn create(&self, path: &Path) -> std::io::Result<std::fs::File> {
        std::fs::File::create(path)
    }

    fn channel(&self, number: usize) -> PathBuf {
        self.beside(&format!(".channel-{number}"))
    }

    fn return_path(&self) -> PathBuf {
        self.beside(".return-path")
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.main.clone().into_os_string();
        name.push(suffix);
        name.into()
    }
}
