//! A guest as a stream: every page on the main channel, or on page channels beside it.

use super::channels::Channels;
use super::iterables::Iterable;
use super::{Device, SavedGuest, cannot_write};
use crate::failure::{Error, Failure};
use crate::output_file::empty;
use crate::ram::Ordered;
use qevm_multifd::{SourceSync, SyncStep};
use qevm_savevm::StreamWriter;
use qevm_savevm::command::Command;
use qevm_savevm::configuration::Configuration;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::ram::{BlockId, RamBlock};
use qevm_wire::Profile;
use std::fs::File;
use std::io::{Seek, Write};

/// Bytes that are gathered before they are written.
const CHUNK: usize = 64 << 10;

/// Page channels and the rules by which they synchronise with the main channel.
#[derive(Debug)]
pub struct Multifd<W> {
    channels: Channels<W>,
    sync: SourceSync,
}

impl<W: Write> Multifd<W> {
    /// These channels, for a destination of this profile.
    pub fn new(channels: Channels<W>, profile: &Profile) -> Self {
        Multifd { channels, sync: SourceSync::new(profile) }
    }
}

/// Where the main channel goes, and how.
pub struct Target<'a, M> {
    /// The main channel.
    pub out: &'a mut M,
    /// What errors call it.
    pub name: &'a str,
    /// Ask for answers, so that the destination says whether it could load the guest.
    pub return_path: bool,
    /// Pages of zeroes travel as such; otherwise like all others (`zero-page-detection=none`).
    pub zero_pages: bool,
}

impl<M> std::fmt::Debug for Target<'_, M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("name", &self.name).finish_non_exhaustive()
    }
}

impl SavedGuest {
    /// Writes the guest to `target`, its pages to the page channels if there are any, and returns how many bytes that
    /// took on all of them; tells `position` how many it has been so far.
    ///
    /// # Errors
    /// [`Error::Bad`] with kind `io` if something cannot be written.
    pub fn write_stream<M: Write, C: Write>(
        &mut self,
        target: Target<'_, M>,
        multifd: Option<Multifd<C>>,
        position: &mut dyn FnMut(u64),
    ) -> Result<u64, Error> {
        let blank = vec![0; self.pages.size() as usize];
        let zero_pages = target.zero_pages;
        let mut sink = Sink { stream: self.stream(), target, sent: 0, multifd, position };
        sink.stream.header(self.configuration.as_ref()).map_err(cannot_write)?;
        if sink.target.return_path {
            sink.stream.command(Command::OpenReturnPath).map_err(cannot_write)?;
        }
        sink.stream.section_start(&self.ram_section).map_err(cannot_write)?;
        sink.stream.ram_setup(self.blocks.iter().cloned()).map_err(cannot_write)?;
        sink.steps(SourceSync::setup)?;
        sink.stream.footer().map_err(cannot_write)?;
        self.write_setup(&mut sink.stream)?;
        sink.stream.section_end(self.ram_section.section_id).map_err(cannot_write)?;
        for block in 0..self.blocks.len() {
            let name = self.blocks[block].name.clone();
            self.each_page(block, |offset, content| {
                sink.page(block, &name, offset, content.or((!zero_pages).then_some(&blank)))
            })?;
        }
        self.write_rest(sink)
    }

    /// Writes the guest to `file`, which is called `name` in errors, as a plain stream, and returns its length; tells
    /// `position` how many bytes it has been so far.
    ///
    /// # Errors
    /// [`Error::Bad`] with kind `io` if something cannot be written.
    pub fn write_plain(&mut self, file: &File, name: &str, position: &mut dyn FnMut(u64)) -> Result<u64, Error> {
        let mut out = file;
        let target = Target { out: &mut out, name, return_path: false, zero_pages: true };
        if let Some(Ordered { stream, front: written, sent }) = self.ram.streamed_to(file, name)? {
            let mut expected = self.stream();
            let guest = (self.configuration.as_ref(), &self.ram_section, &self.blocks[..]);
            front(&mut expected, guest, &self.iterables, &self.devices)?;
            if expected.bytes() == written {
                return self.write_rest(Sink { stream, target, sent, multifd: None::<Multifd<File>>, position });
            }
        }
        let failed = |error| Failure::io(name, 0, &error);
        empty(file).and_then(|()| target.out.rewind()).map_err(failed)?;
        self.write_stream(target, None::<Multifd<File>>, position)
    }

    /// Writes what comes after the pages.
    fn write_rest<M: Write, C: Write>(&self, mut sink: Sink<'_, M, C>) -> Result<u64, Error> {
        sink.steps(SourceSync::completion)?;
        sink.stream.footer().map_err(cannot_write)?;
        self.write_end(&mut sink.stream)?;
        sink.flush(true)?;
        sink.target.out.flush().map_err(|error| Failure::io(sink.target.name, sink.sent, &error))?;
        Ok(sink.total())
    }

    /// What comes between the list of RAM blocks and the end of `ram` in every form: the other iterable sections begin,
    /// and devices that precede memory.
    pub(super) fn write_setup(&self, stream: &mut StreamWriter) -> Result<(), Error> {
        write_setup(stream, &self.iterables, &self.devices)
    }

    /// Ends of iterable sections, device sections, end and description: what follows the guest's memory in every form.
    pub(super) fn write_end(&self, stream: &mut StreamWriter) -> Result<(), Error> {
        self.iterables.iter().try_for_each(|iterable| iterable.write_end(stream))?;
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

/// Writes what a plain stream has before its pages: `guest` is the configuration, the section of memory, and the
/// blocks.
pub(super) fn front(
    stream: &mut StreamWriter,
    (configuration, section, blocks): (Option<&Configuration>, &SectionHeader, &[RamBlock]),
    iterables: &[Iterable],
    devices: &[Device],
) -> Result<(), Error> {
    stream.header(configuration).map_err(cannot_write)?;
    stream.section_start(section).map_err(cannot_write)?;
    stream.ram_setup(blocks.iter().cloned()).map_err(cannot_write)?;
    stream.eos().map_err(cannot_write)?;
    stream.footer().map_err(cannot_write)?;
    write_setup(stream, iterables, devices)?;
    stream.section_end(section.section_id).map_err(cannot_write)
}

fn write_setup(stream: &mut StreamWriter, iterables: &[Iterable], devices: &[Device]) -> Result<(), Error> {
    iterables.iter().try_for_each(|iterable| iterable.write_start(stream))?;
    for device in devices.iter().filter(|device| device.early) {
        stream.section_full(&device.header, &device.body).map_err(cannot_write)?;
    }
    Ok(())
}

/// A stream on its way.
struct Sink<'a, M, C> {
    /// What was written and not sent yet.
    stream: StreamWriter,
    target: Target<'a, M>,
    sent: u64,
    multifd: Option<Multifd<C>>,
    position: &'a mut dyn FnMut(u64),
}

impl<M: Write, C: Write> Sink<'_, M, C> {
    fn page(
        &mut self,
        block: usize,
        name: &qevm_wire::CountedString,
        offset: u64,
        content: Option<&[u8]>,
    ) -> Result<(), Error> {
        if let Some(Multifd { channels, sync }) = &mut self.multifd
            && (content.is_some() || channels.takes_zero_pages())
        {
            sync.pages().map_err(|error| Error::Usage(error.to_string()))?;
            channels.page(name, offset, content)?;
            let total = self.total();
            (self.position)(total);
            return Ok(());
        }
        let id = BlockId(block as u32);
        match content {
            Some(content) => {
                self.stream.page_header(id, offset).map_err(cannot_write)?;
                self.stream.payload(content).map_err(cannot_write)?;
            }
            None => self.stream.zero_page(id, offset).map_err(cannot_write)?,
        }
        self.flush(false)
    }

    /// Ends the content of a `ram` section, with what `moment` asks of the page channels.
    fn steps(
        &mut self,
        moment: impl FnOnce(&mut SourceSync) -> Result<&'static [SyncStep], qevm_multifd::SyncError>,
    ) -> Result<(), Error> {
        let steps = match &mut self.multifd {
            None => &[SyncStep::Eos],
            Some(multifd) => moment(&mut multifd.sync).map_err(|error| Error::Usage(error.to_string()))?,
        };
        for step in steps {
            match (step, &mut self.multifd) {
                (SyncStep::SyncChannels, Some(multifd)) => multifd.channels.sync()?,
                (SyncStep::SyncChannels, None) => {}
                (SyncStep::Flush, _) => self.stream.multifd_flush().map_err(cannot_write)?,
                (SyncStep::Eos, _) => self.stream.eos().map_err(cannot_write)?,
            }
        }
        // The page channels of the destination wait until the main channel has told it to go on.
        let waiting = self.multifd.is_some();
        self.flush(waiting)
    }

    /// Sends what was gathered, if it is much or if `now`.
    fn flush(&mut self, now: bool) -> Result<(), Error> {
        let bytes = self.stream.bytes();
        if now || bytes.len() >= CHUNK {
            self.target.out.write_all(bytes).map_err(|error| Failure::io(self.target.name, self.sent, &error))?;
            self.sent += bytes.len() as u64;
            self.stream.clear();
            let total = self.total();
            (self.position)(total);
        }
        Ok(())
    }

    fn total(&self) -> u64 {
        self.sent + self.multifd.as_ref().map_or(0, |multifd| multifd.channels.sent())
    }
}
