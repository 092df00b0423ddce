//! The commands, one module each.

pub mod check;
pub mod convert;
pub mod diff;
pub mod docs;
pub mod extract;
pub mod inspect;
pub mod receive;
pub mod send;
pub mod verify;

use crate::args;
use crate::failure::Stop;
use crate::progress::Progress;
use crate::report::Report;
use crate::stream::{Inputs, Observer};
use serde_json::{Map, Value};
use std::io::{self, Write};

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

    pub(crate) fn json(&mut self, object: Map<String, Value>) -> Result<(), Stop> {
        self.line(Value::Object(object))
    }

    pub(crate) fn finish(mut self) -> Result<(), Stop> {
        self.out.flush().map_err(closed)
    }
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
    json: impl FnOnce(&Report) -> Map<String, Value>,
) -> Result<Inputs, Stop> {
    let opened = Inputs::open(input);
    if let (Err(Stop::Bad(failure)), true) = (&opened, output.json) {
        let mut out = Output::new();
        out.json(json(&Report { error: Some(failure.clone()), qemu_profile: "unknown".into(), ..Report::default() }))?;
        out.finish()?;
    }
    opened
}

/// Shows how far the main channel was read.
pub(crate) struct Bar(pub(crate) Progress);

impl Observer for Bar {
    fn position(&mut self, offset: u64) {
        self.0.at(offset);
    }

    fn restarted(&mut self) {
        self.0.say("XBZRLE pages found: reading again with page contents kept");
    }
}
