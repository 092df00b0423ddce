//! The commands, one module each.

pub mod convert;
pub mod diff;
pub mod extract;
pub mod inspect;
pub mod receive;
pub mod send;
pub mod verify;

use crate::failure::Stop;
use crate::progress::Progress;
use crate::stream::Observer;
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
