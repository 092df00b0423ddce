//! The destination engine: reads a stream into a guest that has not run yet.

mod arrival;
mod leave;
mod page_channels;

use super::channel::{WriteSlice, write_all};
use super::core::destination::{Action, Destination, DestinationOptions, SectionUse, Turn};
use super::core::{DeviceOptions, Mark};
use super::lazy::{LazyRestore, Setup};
use super::multifd::Settings;
use super::page_file::{self, PageFile};
use super::patience::NO_END;
use super::postcopy::{Listening, Preempt, start};
use super::ram_receiver::{LeftOut, RamReceiver};
use super::stream_reader::StreamReader;
use super::{
    Channel, Guest, GuestError, Incoming, Job, LoadError, MigrationError, MissingPages, Mode, Status, verdict,
};
pub use arrival::{Arrival, Rest};
pub(crate) use leave::{leave, within};
use page_channels::{PageChannels, find};
use qevm_returnpath::Message;
use qevm_savevm::mapped_ram::MappedBlock;
use qevm_savevm::ram::{PageAt, RamBlock};
use qevm_wire::{CountedString, Located, Profile, WireError};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Reads a migration from `connections` into `guest`, which has not run yet, and does not start it.
///
/// The caller has claimed `job` with [`Job::begin`], and ends it with [`Job::end`] when it has started the guest or the
/// failure is dealt with. When this returns, the guest is wholly here, but for [memory that has not
/// come](Arrival::rest), and the source will not run it again; whether it is to run is in the result.
///
/// # Errors
/// [`MigrationError`], naming byte offset and path for a bad stream. The source has been told, if it opened a return
/// path, and the guest must not run here. With [`MigrationError::Undecided`] it is wholly here, and may run at the
/// source.
pub fn receive(
    guest: &dyn Guest,
    connections: Incoming,
    job: &Job,
    profile: &Profile,
) -> Result<Arrival, MigrationError> {
    let start = Instant::now();
    let connections = connections.watched(job)?;
    let attached = job.attach(connections.all());
    let Incoming { main, first, offset, pages, settings, page_channels_called, misfit, preempt, file, .. } =
        connections;
    let devices = devices(guest, settings.as_ref())?;
    let channels = settings.map(|settings| {
        let transfers = devices.iter().filter(|device| device.transfer).map(|device| device.idstr.clone());
        PageChannels::new(settings, transfers.collect())
    });
    let page_channels: Vec<_> = pages.iter().map(|stream| stream.channel().clone()).collect();
    let capabilities = job.capabilities();
    let left = match job.parameters().mode {
        Mode::CprTransfer => LeftOut::All,
        _ if capabilities.ignore_shared => LeftOut::Shared,
        _ => LeftOut::Nothing,
    };
    // Where the memory is here, and the source's as well, no page of it can be missing.
    let postcopy = capabilities.postcopy_ram && !capabilities.mapped_ram && left != LeftOut::All;
    let preempt = preempt.filter(|_| postcopy).map(Preempt::start).transpose()?;
    let options = DestinationOptions {
        machine_type: guest.machine_type().into(),
        uuid: job.uuid().map(|uuid| uuid.0),
        ram: guest.ram().iter().map(|view| view.name.into()).collect(),
        offset,
        vmdesc: profile.vmdesc,
        answers: main.answers(),
        mapped_ram: capabilities.mapped_ram,
        ignore_shared: capabilities.ignore_shared,
        devices,
        switchover_ack: profile.switchover_ack.filter(|_| capabilities.switchover_ack),
        page_channels: channels.is_some(),
        page_channels_called,
        // A QEMU 7.2 that has failed and has a return path waits for us to close.
        hurried: channels.is_none() && misfit.is_some(),
        // Of files that are loaded so the core knows nothing.
        postcopy,
        page_sizes: if postcopy { page_sizes(guest) } else { 0 },
        background_snapshot: capabilities.background_snapshot,
        late_block_activate: capabilities.late_block_activate,
        silence: None,
        handover: Some(job.waits().timeouts().handover().unwrap_or(NO_END)),
    };
    let mut engine = Engine {
        guest,
        channel: &main,
        reader: StreamReader::new(&*main, &first, offset),
        core: Destination::new(options),
        ram: RamReceiver::new(postcopy, left),
        listening: None,
        preempt,
        pages: channels.as_ref(),
        limited: false,
        block_times: capabilities.postcopy_blocktime,
        file,
        threads: if capabilities.multifd { job.parameters().multifd_channels } else { 1 },
        from_file: 0,
        jumped: 0,
        lazy: capabilities.mapped_ram && capabilities.postcopy_ram,
        left: None,
        rest: None,
        offset,
        start,
    };
    let result = thread::scope(|scope| {
        if let Some(channels) = &channels {
            channels.start(scope, guest, &*main, pages);
        }
        let result = attached.and_then(|()| engine.run(job));
        // What a page channel reported made the main channel fail.
        let result = match (result, channels.as_ref().and_then(PageChannels::failure)) {
            (Err(_), Some(cause)) => Err(cause),
            // A source one of whose channels was dropped gives up, and its main channel just ends.
            (Err(error), None) if is_cut(&error) && !engine.core.has_pages() => Err(misfit.unwrap_or(error)),
            (result, _) => result,
        };
        if let Err(error) = &result {
            // The side that runs it has the disks.
            guest.hooks().inactivate();
            let Engine { core, channel, start, .. } = &mut engine;
            leave(core, &***channel, *start, error, |message| send(&***channel, message));
        }
        if let Some(channels) = &channels {
            channels.end();
        }
        match result {
            // A source of postcopy uses them no more, and does not expect them to be closed.
            Ok(None) => page_channels.iter().for_each(|channel| channel.stop_reading()),
            _ => page_channels.iter().for_each(|channel| channel.close()),
        }
        result
    });
    let bytes = engine.received() + channels.as_ref().map_or(0, |channels| channels.gate.received());
    let result = match result {
        Ok(Some(arrival)) => Ok(arrival),
        Ok(None) => engine.postcopy(job),
        Err(error) => Err(error),
    };
    job.update(|statistics| {
        statistics.total_time = start.elapsed();
        statistics.ram.transferred = bytes;
    });
    if !result.as_ref().is_ok_and(|arrival| matches!(arrival.rest, Some(Rest::AtSource(_)))) {
        main.finish_writing();
    }
    result
}

/// What the core has to know of the guest's iterative devices.
fn devices(guest: &dyn Guest, settings: Option<&Settings>) -> Result<Vec<DeviceOptions>, MigrationError> {
    let transfers = settings.is_some_and(|settings| settings.device_state);
    guest.devices().iterative().into_iter().map(|device| DeviceOptions::of(device, transfers)).collect()
}

/// The page sizes of the host under the RAM of a guest, one bit each; 0 if they are unknown, for then it does not come
/// to postcopy.
fn page_sizes(guest: &dyn Guest) -> u64 {
    let of_all = |pages: Box<dyn MissingPages>| {
        (0..guest.ram().len()).try_fold(0, |sizes, block| Ok(sizes | pages.unit(block)?))
    };
    guest.hooks().missing_pages().and_then(of_all).unwrap_or(0)
}

/// Blocks of this many bytes stay in the file, if any do: those with firmware and tables are there at once.
const LEFT_IN_FILE: u64 = 2 << 20;
const ON_DEMAND: &str = "load guest memory while the guest runs (capability 'postcopy-ram')";

/// Carries out what the core says.
struct Engine<'e> {
    guest: &'e dyn Guest,
    channel: &'e Arc<dyn Channel>,
    reader: StreamReader<'e>,
    core: Destination,
    ram: RamReceiver<'e>,
    /// Memory that is missing until it comes (postcopy).
    listening: Option<Listening>,
    /// Takes the connection in over which pages come that are waited for.
    preempt: Option<Preempt>,
    pages: Option<&'e PageChannels>,
    /// Reads of the main channel fail when nothing comes for some time.
    limited: bool,
    /// It is counted how long the guest waits for its memory.
    block_times: bool,
    /// Pages may have their places in this file…
    file: Option<PageFile>,
    /// …and are read by this many threads.
    threads: u8,
    /// Bytes of pages that were read from their places.
    from_file: u64,
    /// Bytes of the file that the stream jumps over.
    jumped: u64,
    /// Large blocks stay in the file until they are touched.
    lazy: bool,
    left: Option<Setup>,
    rest: Option<LazyRestore>,
    /// Where the stream begins in its file.
    offset: u64,
    /// Time 0 of the core.
    start: Instant,
}

impl Engine<'_> {
    /// Reads until the guest is here. `None` if its devices are, and are to be loaded before its memory has come.
    fn run(&mut self, job: &Job) -> Result<Option<Arrival>, MigrationError> {
        job.advance(Status::Active)?;
        self.guest.hooks().prepare();
        loop {
            let Turn { consumed, action } = self.core.next(self.reader.bytes())?;
            match action {
                Action::Difference { page, data } => {
                    let applied = self.ram.came(page.block).and_then(|()| self.ram.apply_difference(&page, data));
                    applied.map_err(|error| self.core.refuse(error))?;
                    self.consume(consumed);
                }
                Action::LoadPiece { idstr, state } => {
                    let loaded = self.load_piece(&idstr, state);
                    loaded.map_err(|error| self.core.refuse(LoadError::Devices(error)))?;
                    self.consume(consumed);
                }
                Action::Page { page, remaining } => {
                    self.consume(consumed);
                    self.ram.came(page.block).map_err(|error| self.core.refuse(error))?;
                    self.page(&page, remaining)?;
                }
                Action::Continue => self.consume(consumed),
                Action::Zero(page) => {
                    self.consume(consumed);
                    self.ram.came(page.block).map_err(|error| self.core.refuse(error))?;
                    self.ram.clear_page(&page);
                }
                Action::ForgetBlocks => {
                    self.consume(consumed);
                    self.ram.clear();
                }
                Action::Send(message) => {
                    self.consume(consumed);
                    send(&**self.channel, &message);
                }
                Action::Read { at_least, until } => self.read(at_least, until)?,
                Action::Block(block) => {
                    let added = self.ram.add_block(self.guest, &block);
                    added.map_err(|error| self.core.refuse(error))?;
                    self.core.block_fits();
                }
                Action::MappedBlock { block, gap } => self.load_block(&block, gap)?,
                Action::Section { idstr, instance_id, usage } => self.section(&idstr, instance_id, usage)?,
                Action::Synchronise(mark) => self.synchronise(mark)?,
                Action::EndOfMemory => {
                    self.core.synchronised(self.pages.map_or(Ok(()), |pages| pages.gate.main_end()))?;
                }
                Action::SwitchOver => {
                    self.consume(consumed);
                    if let Some(pages) = self.pages {
                        pages.states.switchover();
                    }
                }
                Action::DeviceStates => {
                    let finished =
                        self.pages.map_or(Ok(Vec::new()), |pages| pages.states.finish(|| pages.gate.received()));
                    self.core.device_states(finished.map_err(LoadError::from))?;
                }
                Action::Discard { block, ranges } => {
                    self.consume(consumed);
                    self.ram.discard(block, &ranges);
                }
                Action::Listen => {
                    self.consume(consumed);
                    self.listen(job)?;
                }
                Action::LoadDevices if self.listening.is_some() => {
                    self.consume(consumed);
                    return Ok(None);
                }
                Action::LoadDevices => self.load_devices()?,
                // Before the verdict: if another process has a disk, the source can still go on.
                Action::Activate => self.core.activated(self.guest.hooks().activate())?,
                Action::Tell { message, patience } => {
                    job.check()?;
                    self.tell(&message, patience)?;
                }
                Action::Complete { running } => return self.complete(job, running).map(Some),
                // These follow the devices of a postcopy, after which the threads of `postcopy` go on.
                other @ (Action::AwaitStart
                | Action::Run { .. }
                | Action::Place { .. }
                | Action::SendBitmap(_)
                | Action::Resume) => {
                    return Err(self.core.refuse(LoadError::Unsupported(format!("{other:?}"))));
                }
                // These follow a failure, after which this loop does not run.
                Action::Linger { .. } | Action::Close => return Err(MigrationError::NoVerdict),
            }
        }
    }

    /// A section begins that the core does not know by itself.
    fn section(
        &mut self,
        idstr: &CountedString,
        instance_id: u32,
        usage: Option<SectionUse>,
    ) -> Result<(), MigrationError> {
        let known = match usage {
            Some(SectionUse::Device) => self.guest.devices().has(idstr, instance_id),
            Some(SectionUse::Iterative) => find(self.guest, idstr).is_some(),
            None => false,
        };
        self.core.section(if known { Ok(()) } else { Err(self.guest.devices().advice(idstr)) })
    }

    /// The main channel waits for the page channels.
    fn synchronise(&mut self, mark: Mark) -> Result<(), MigrationError> {
        let result = match self.pages {
            Some(pages) => {
                // The first mark comes after the list of blocks.
                let _ = pages.listed.set(self.ram.listed());
                pages.gate.main(mark)
            }
            None => Ok(()),
        };
        self.core.synchronised(result)
    }

    /// Memory that has not come is missing from now on, and is asked for when the guest touches it.
    fn listen(&mut self, job: &Job) -> Result<(), MigrationError> {
        let (listed, blocks) = (self.ram.listed(), self.core.ram_blocks().clone());
        let listening = Listening::start(self.guest, &listed, self.channel.clone(), self.block_times, job.waits())?;
        self.listening = Some(listening.with_preempt(self.preempt.take(), blocks));
        job.advance(Status::PostcopyDevice)
    }

    fn load_devices(&mut self) -> Result<(), MigrationError> {
        self.ram.check_presence(self.file.is_none()).map_err(|error| self.core.refuse(error))?;
        // Devices look at memory.
        self.rest = self.left.take().map(Setup::start).transpose()?;
        let loaded = self.guest.devices().load(self.core.devices());
        if let Some(error) = self.rest.as_ref().and_then(LazyRestore::failure) {
            return Err(error);
        }
        self.core.loaded(loaded)
    }

    fn tell(&mut self, message: &Message, patience: Option<Duration>) -> Result<(), MigrationError> {
        let told = match patience {
            Some(patience) => verdict::deliver(&**self.channel, message, patience),
            None => verdict::send(&**self.channel, message),
        };
        self.core.time(self.start.elapsed());
        self.core.told(told)
    }

    /// The guest is here, but for memory that is left in its file.
    fn complete(&mut self, job: &Job, running: bool) -> Result<Arrival, MigrationError> {
        job.handed_over()?;
        if let Some(rest) = &self.rest {
            rest.start_guest()?;
            job.advance(Status::PostcopyActive)?;
        }
        let rest = self.rest.take().map(Rest::InFile);
        Ok(Arrival { running, bytes: self.received(), rest })
    }

    /// Loads the devices while the rest of memory is still to come.
    fn postcopy(self, job: &Job) -> Result<Arrival, MigrationError> {
        let bytes = self.received();
        let Engine { guest, channel, reader, core, listening, start, .. } = self;
        let Some(listening) = listening else { return Err(MigrationError::NoVerdict) };
        let first = reader.bytes().to_vec();
        let arrived =
            start::start(guest, job, start::Parts { core, listening, channel: channel.clone(), first, start, bytes });
        if arrived.is_err() {
            // The side that runs it has the disks.
            guest.hooks().inactivate();
        }
        arrived
    }

    /// Bytes that were read: of the stream, but for what it jumps over, and of pages.
    fn received(&self) -> u64 {
        self.reader.offset() - self.offset - self.jumped + self.from_file
    }

    /// Reads the pages of a block from their places, and goes on after them.
    fn load_block(&mut self, block: &RamBlock, gap: u64) -> Result<(), MigrationError> {
        let (Some(layout), Some(file), Some(touched)) = (MappedBlock::of(block), &self.file, self.ram.last()) else {
            // The core drops what is there instead.
            return self.core.placed(0);
        };
        self.ram.last_came().map_err(|error| self.core.refuse(error))?;
        let within = |error: Located<LoadError>| error.within(format!("RAM block '{}'", block.name));
        if self.lazy && block.used_length >= LEFT_IN_FILE {
            let present = page_file::present(file, &layout).map_err(within)?;
            let number = self.guest.ram().iter().position(|view| block.name == *view.name);
            let pages = || self.guest.hooks().missing_pages().map_err(MigrationError::guest(ON_DEMAND));
            if self.left.is_none() {
                self.left = Some(Setup::new(pages()?, file.clone()));
            }
            if let (Some(left), Some(number)) = (&mut self.left, number) {
                left.leave(number, block.name.clone(), layout, present)?;
            }
            self.reader.jump(layout.end(), file)?;
            self.jumped += gap;
            return self.core.placed(gap);
        }
        let loaded = page_file::load(file, &layout, self.guest, &block.name, &touched, self.threads);
        self.from_file += loaded.map_err(within)?;
        self.reader.jump(layout.end(), file)?;
        self.jumped += gap;
        self.core.placed(gap)
    }

    /// Reads on the main channel. A wait that is over is the core's to judge.
    fn read(&mut self, at_least: usize, until: Option<Duration>) -> Result<(), MigrationError> {
        let patience = until.map(|until| until.saturating_sub(self.start.elapsed()));
        let filled = match patience {
            Some(patience) if self.core.is_decided() => {
                // The guest is here: whatever goes wrong now, there is no confirmation.
                Ok(within(patience, &**self.channel, || self.reader.fill(at_least)).unwrap_or(false))
            }
            patience => {
                self.limit_silence(patience)?;
                self.reader.fill(at_least)
            }
        };
        match filled? {
            true => self.core.arrived(self.start.elapsed()),
            false => self.core.end_of_input(),
        }
        Ok(())
    }

    fn limit_silence(&mut self, limit: Option<Duration>) -> Result<(), MigrationError> {
        if limit.is_some() || self.limited {
            self.limited = limit.is_some();
            // No time at all would be no limit.
            let limit = limit.map(|limit| limit.max(Duration::from_millis(1)));
            let offset = self.core.offset();
            self.channel.limit_silence(limit).map_err(|source| MigrationError::Receive { offset, source })?;
        }
        Ok(())
    }

    fn page(&mut self, page: &PageAt, remaining: u64) -> Result<(), MigrationError> {
        self.limit_silence(None)?;
        let memory = self.ram.page(page);
        // With page channels there may be others who write to pages that hold nothing yet.
        let expect = || if self.pages.is_none() { self.ram.expected() } else { Vec::new() };
        match self.reader.read_into(&memory, expect)? {
            true => self.core.placed(remaining),
            false => {
                self.core.end_of_input();
                Ok(())
            }
        }
    }

    fn load_piece(&self, idstr: &CountedString, state: &[u8]) -> Result<(), GuestError> {
        find(self.guest, idstr).ok_or_else(|| format!("there is no device '{idstr}'"))?.load(state)
    }

    fn consume(&mut self, count: usize) {
        if count > 0 {
            self.reader.consume(count);
        }
    }
}

/// Puts a message on the return path.
fn send(channel: &dyn Channel, message: &Message) {
    // If the source is gone, reading will tell.
    if let Err(error) = write_all(channel, &mut [WriteSlice::bytes(&message.to_bytes())]) {
        tracing::debug!(%error, ?message, "the return path is broken");
    }
}

/// Whether the main channel ended before the stream did.
fn is_cut(error: &MigrationError) -> bool {
    match error {
        MigrationError::Receive { .. } => true,
        MigrationError::Load(error) => {
            matches!(&error.kind, LoadError::Stream(qevm_savevm::ErrorKind::Wire(WireError::Truncated { .. })))
        }
        _ => false,
    }
}
