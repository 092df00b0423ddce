//! The commands, one module each.

pub mod check;
pub mod convert;
pub mod diff;
pub mod docs;
pub mod extract;
pub mod inspect;
pub mod receive;
pub mod send;
pub mod serve;
pub mod verify;

use crate::args::{self, StreamForm};
use crate::failure::Stop;
use crate::progress::Progress;
use qevm_inspect::report::Report;
use qevm_inspect::rewrite::SavedGuest;
use qevm_inspect::stream::{Inputs, Observer};
use serde::Serialize;
use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// An object was printed.
static PRINTED_JSON: AtomicBool = AtomicBool::new(false);

/// True if an object was printed, in part at least.
pub(crate) fn printed_json() -> bool {
    PRINTED_JSON.load(Ordering::Relaxed)
}

/// Standard output that ends the command quietly when its reader has gone (`qevm inspect … | head`).
pub(crate) struct Output {
    out: io::BufWriter<io::StdoutLock<'static>>,
}

impl Output {
    pub(crate) fn new() -> Self {
        Output { out: io::BufWriter::new(io::stdout().lock()) }
    }

    pub(crate) fn print(&mut self, text: impl std::fmt::Display) -> Result<(), Stop> {
        write!(self.out, "{text}").map_err(closed)
    }

    pub(crate) fn line(&mut self, text: impl std::fmt::Display) -> Result<(), Stop> {
        writeln!(self.out, "{text}").map_err(closed)
    }

    /// Writes an object on a line of its own, without building it first.
    pub(crate) fn json(&mut self, object: &impl Serialize) -> Result<(), Stop> {
        PRINTED_JSON.store(true, Ordering::Relaxed);
        serde_json::to_writer(&mut self.out, object).map_err(|error| closed(error.into()))?;
        self.line("")
    }

    /// As [`json`](Output::json), with a list as last member whose elements `elements` writes.
    pub(crate) fn json_with_list(
        &mut self,
        object: &impl Serialize,
        member: &str,
        elements: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), Stop> {
        PRINTED_JSON.store(true, Ordering::Relaxed);
        let mut text = serde_json::to_vec(object).map_err(|error| closed(error.into()))?;
        text.pop();
        self.out.write_all(&text).map_err(closed)?;
        self.print(format_args!(",\"{member}\":["))?;
        self.copy(elements)?;
        self.line("]}")
    }

    /// Writes what `content` writes.
    pub(crate) fn copy(&mut self, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Stop> {
        content(&mut self.out).map_err(closed)
    }

    pub(crate) fn finish(mut self) -> Result<(), Stop> {
        self.out.flush().map_err(closed)
    }
}

/// Characters in a line of the terminal that standard output is; no bound where it is none.
pub(crate) fn line_width() -> usize {
    let size = rustix::termios::tcgetwinsize(io::stdout());
    size.ok().map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0).unwrap_or(usize::MAX)
}

fn closed(error: io::Error) -> Stop {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Stop::OutputClosed,
        _ => Stop::Usage(format!("standard output cannot be written: {error}")),
    }
}

/// Opens the files; if a container is damaged, that is reported as a damaged stream is.
pub(crate) fn open(
    input: &args::Input,
    output: args::Output,
    print: impl FnOnce(&Report, &mut Output) -> Result<(), Stop>,
) -> Result<Inputs, Stop> {
    let opened = input.open();
    if let (Err(Stop::Bad(failure)), true) = (&opened, output.json) {
        let mut out = Output::new();
        let report = Report { error: Some(failure.clone()), qemu_profile: "unknown".into(), ..Report::default() };
        print(&report, &mut out)?;
        out.finish()?;
    }
    opened
}

/// Reads a guest that is to be written again, in this form to this file of this name, if that is known.
pub(crate) fn read_saved(
    inputs: &mut Inputs,
    bounds: &args::Bounds,
    to: Option<(StreamForm, &File, &str)>,
) -> Result<SavedGuest, Stop> {
    let mut bar = Progress::new("reading", inputs.main.source.total());
    let (bounds, mut position) = (bounds.of_command(), |at| bar.at(at));
    Ok(match to {
        Some((StreamForm::MappedRam, file, name)) => {
            SavedGuest::read_to_mapped(inputs, &bounds, (file, name), &mut position)?
        }
        Some((StreamForm::Plain, file, name)) => {
            SavedGuest::read_to_plain(inputs, &bounds, (file, name), &mut position)?
        }
        None => SavedGuest::read(inputs, &bounds, &mut position)?,
    })
}

/// Shows how far the main channel was read.
pub(crate) struct Bar(pub(crate) Progress);

impl Observer for Bar {
    fn position(&mut self, offset: u64) {
        self.0.at(offset);
    }

    fn restarted(&mut self) {
        self.0.say("XBZRLE pages or COLO checkpoints found: reading again");
    }
}
