//! A guest as a plain stream: every page on the main channel.

use super::{SavedGuest, cannot_write};
use crate::failure::{Failure, Stop};
use crate::progress::Progress;
use qevm_savevm::StreamWriter;
use qevm_savevm::command::Command;
use qevm_savevm::ram::BlockId;
use std::io::Write;

/// Bytes that are gathered before they are written.
const CHUNK: usize = 256 << 10;

/// A stream on its way into `out`.
pub struct Sink<'a, W> {
    /// What was written and not sent yet.
    pub stream: StreamWriter,
    out: &'a mut W,
    name: &'a str,
    sent: u64,
    bar: &'a mut Progress,
}

impl<W> std::fmt::Debug for Sink<'_, W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sink").field("name", &self.name).field("sent", &self.sent).finish_non_exhaustive()
    }
}

impl<W: Write> Sink<'_, W> {
    /// Sends what was gathered, if it is much or if `now`.
    fn flush(&mut self, now: bool) -> Result<(), Stop> {
        let bytes = self.stream.bytes();
        if now || bytes.len() >= CHUNK {
            self.out.write_all(bytes).map_err(|error| Failure::io(self.name, self.sent, &error))?;
            self.sent += bytes.len() as u64;
            self.stream.clear();
            self.bar.at(self.sent);
        }
        Ok(())
    }
}

impl SavedGuest {
    /// Writes the guest to `out`, which is called `name` in errors, and returns how many bytes that took. With
    /// `return_path` the destination is asked for answers, so that it says whether it could load the guest.
    ///
    /// # Errors
    /// [`Stop::Bad`] with kind `io` if `out` cannot be written.
    pub fn write_plain(
        &mut self,
        out: &mut impl Write,
        name: &str,
        return_path: bool,
        bar: &mut Progress,
    ) -> Result<u64, Stop> {
        let mut sink = Sink { stream: self.stream(), out, name, sent: 0, bar };
        sink.stream.header(self.configuration.as_ref()).map_err(cannot_write)?;
        if return_path {
            sink.stream.command(Command::OpenReturnPath).map_err(cannot_write)?;
        }
        sink.stream.section_start(&self.ram_section).map_err(cannot_write)?;
        sink.stream.ram_setup(self.blocks.iter().cloned()).map_err(cannot_write)?;
        sink.stream.eos().map_err(cannot_write)?;
        sink.stream.footer().map_err(cannot_write)?;
        for device in self.devices(true) {
            sink.stream.section_full(&device.header, &device.body).map_err(cannot_write)?;
        }
        sink.stream.section_end(self.ram_section.section_id).map_err(cannot_write)?;
        for block in 0..self.blocks.len() {
            let id = BlockId(block as u32);
            self.each_page(block, |offset, content| {
                match content {
                    Some(content) => {
                        sink.stream.page_header(id, offset).map_err(cannot_write)?;
                        sink.stream.payload(content);
                    }
                    None => sink.stream.zero_page(id, offset).map_err(cannot_write)?,
                }
                sink.flush(false)
            })?;
        }
        sink.stream.eos().map_err(cannot_write)?;
        sink.stream.footer().map_err(cannot_write)?;
        self.write_end(&mut sink.stream)?;
        sink.flush(true)?;
        sink.out.flush().map_err(|error| Failure::io(name, sink.sent, &error))?;
        Ok(sink.sent)
    }

    /// Device sections, end and description: what follows the guest's memory in every form.
    pub(super) fn write_end(&self, stream: &mut StreamWriter) -> Result<(), Stop> {
        for device in self.devices(false) {
            stream.section_full(&device.header, &device.body).map_err(cannot_write)?;
        }
        stream.eof().map_err(cannot_write)?;
        if let Some(text) = &self.description {
            stream.vmdesc(&String::from_utf8_lossy(text)).map_err(cannot_write)?;
        }
        Ok(())
    }
}
