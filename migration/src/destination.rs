//! The destination engine: reads a stream into a guest that has not run yet.

mod loader;

use super::{
    Channel, Doubt, Guest, Incoming, Job, LoadError, MigrationError, Status,
    channel::{Source, Target, write_all},
    handover,
    inlet::Inlet,
    multifd::{Gate, Mark, receive_pages},
    page_file,
    page_file::PageFile,
    ram_receiver::{Listed, RamReceiver},
    verdict,
};
use loader::{Loader, RamSection, Then};
use qevm_multifd::is_page_channel;
use qevm_returnpath::{Message, switchover::DestinationGate};
use qevm_savevm::{Decoder, DecoderOptions, PayloadKind, Step, mapped_ram::MappedBlock, ram::RamBlock};
use qevm_wire::{Decode, Limits, Located, Profile, WireError, Writer};
use std::{
    collections::HashSet,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};
use vm_memory::VolatileSlice;

/// What arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// The guest ran at the source, and is to run here.
    pub running: bool,
    /// Bytes of the stream.
    pub bytes: u64,
}

/// Reads a migration from `connections` into `guest`, which has not run yet, and does not start it.
///
/// The caller has claimed `job` with [`Job::begin`], and ends it with [`Job::end`] when it has started the guest or the failure is
/// dealt with. When this returns, the guest is wholly here and the source will not run it again; whether it is to run is in the result.
///
/// # Errors
/// [`MigrationError`], naming byte offset and path for a bad stream. The source has been told, if it opened a return
/// path, and the guest must not run here. With [`MigrationError::Undecided`] it is wholly here, and may run at the source.
pub fn receive(
    guest: &dyn Guest,
    connections: Incoming,
    job: &Job,
    profile: &Profile,
) -> Result<Arrival, MigrationError> {
    let start = Instant::now();
    let attached = job.attach(connections.all());
    let Incoming { main, first, offset, pages, settings, page_channels_called, misfit, file } = connections;
    let channels = settings.as_ref().map(|settings| PageChannels {
        gate: Gate::new(settings.channels),
        listed: OnceLock::new(),
        failure: Mutex::default(),
        ended: AtomicBool::new(false),
    });
    let page_channels: Vec<_> = pages.iter().map(|stream| stream.channel().clone()).collect();
    let limits = Limits { device_state: DEVICE_STATE, device_section: DEVICE_STATE, ..Limits::default() };
    let mut engine = Engine {
        channel: &*main,
        inlet: Inlet::new(&*main, &first, offset),
        decoder: Decoder::new(DecoderOptions {
            vmdesc: profile.vmdesc,
            live: true,
            offset,
            limits,
            ..DecoderOptions::default()
        }),
        loader: Loader {
            guest,
            ram: RamReceiver::default(),
            devices: Vec::new(),
            came: HashSet::new(),
            ram_section: RamSection::Awaited,
            section: None,
            answers: main.answers(),
            return_path: false,
            confirmation: false,
            mapped_ram: job.capabilities().mapped_ram,
            gate: DestinationGate::new(profile.switchover_ack.filter(|_| job.capabilities().switchover_ack)),
        },
        pages: channels.as_ref(),
        page_channels_called,
        hurried: settings.is_none() && misfit.is_some(),
        file,
        threads: if job.capabilities().multifd { job.parameters().multifd_channels } else { 1 },
        from_file: 0,
        jumped: 0,
        start: offset,
    };
    let result = thread::scope(|scope| {
        if let Some((settings, channels)) = settings.as_ref().zip(channels.as_ref()) {
            for mut stream in pages {
                let main = &*main;
                let spawned = thread::Builder::new().spawn_scoped(scope, move || {
                    let compression = settings.compression;
                    let done = receive_pages(guest, &mut stream, compression, &channels.listed, &channels.gate);
                    if let Err(error) = done
                        && !channels.ended.load(Ordering::SeqCst)
                    {
                        channels.fail(error);
                        main.stop_reading();
                    }
                });
                if let Err(error) = spawned {
                    channels.fail(MigrationError::Guest {
                        doing: "start a thread for a page channel",
                        source: error.into(),
                    });
                    main.stop_reading();
                }
            }
        }
        let result = attached.and_then(|()| engine.run(job));
        // What a page channel reported made the main channel fail.
        let result = match (result, channels.as_ref().and_then(PageChannels::failure)) {
            (Err(_), Some(cause)) => Err(cause),
            // A source one of whose channels was dropped gives up, and its main channel just ends.
            (Err(error), None) if is_cut(&error) && !engine.has_pages() => Err(misfit.unwrap_or(error)),
            (result, _) => result,
        };
        if let Err(error) = &result {
            // Whoever runs it has the disks.
            guest.hooks().inactivate();
            if !matches!(error, MigrationError::Undecided(_)) {
                engine.report(&Message::Shut { status: FAILURE });
                main.finish_writing();
                if engine.loader.return_path {
                    linger(&*main);
                }
            }
        }
        if let Some(channels) = &channels {
            channels.ended.store(true, Ordering::SeqCst);
            channels.gate.abandon("the main channel is done");
        }
        page_channels.iter().for_each(|channel| channel.close());
        result
    });
    job.update(|statistics| {
        statistics.total_time = start.elapsed();
        statistics.ram.transferred =
            engine.received() + channels.as_ref().map_or(0, |channels| channels.gate.received());
    });
    main.finish_writing();
    result
}

/// Gives the source time to read the verdict and to close: a socket that is closed while something unread arrives takes back
/// what it has said, and the source would know of a broken pipe only.
fn linger(main: &dyn Channel) {
    within(LINGER, main, || {
        let mut unread = vec![0; 64 << 10];
        while main.read(&mut [Target::bytes(&mut unread)]).is_ok_and(|count| count > 0) {}
    });
}

/// Does something that reads from `main`, which reads no more when `patience` is over.
fn within<T>(patience: Duration, main: &dyn Channel, read: impl FnOnce() -> T) -> T {
    let (done, wait) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watch = thread::Builder::new().spawn_scoped(scope, move || {
            if wait.recv_timeout(patience) == Err(mpsc::RecvTimeoutError::Timeout) {
                main.stop_reading();
            }
        });
        if watch.is_err() {
            // Without a thread that watches, nobody may wait.
            main.stop_reading();
        }
        let result = read();
        drop(done);
        result
    })
}

/// What the threads of the page channels share with that of the main channel.
struct PageChannels {
    gate: Gate,
    /// The RAM blocks, as soon as the main channel has listed them.
    listed: OnceLock<Vec<Listed>>,
    /// The first failure on a page channel.
    failure: Mutex<Option<MigrationError>>,
    /// What happens on the page channels now is a consequence, and no failure.
    ended: AtomicBool,
}

impl PageChannels {
    /// A page channel failed: nobody waits for it any more.
    fn fail(&self, error: MigrationError) {
        let reason = error.to_string();
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.gate.abandon(reason);
    }

    fn failure(&self) -> Option<MigrationError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// How long the source may take to close after it was told of a failure.
const LINGER: Duration = Duration::from_secs(1);
/// How long a source may be silent that has sent no page, and whose page channels may have been dropped.
const SILENCE: Duration = Duration::from_secs(3);
/// Bytes that the state of all devices of a machine may have; with a full console it is some hundred kilobytes.
const DEVICE_STATE: u64 = 64 << 20;
/// Status of SHUT when the guest has arrived.
const SUCCESS: u32 = 0;
/// Status of SHUT when it has not.
const FAILURE: u32 = 1;

struct Engine<'e> {
    channel: &'e dyn Channel,
    inlet: Inlet<'e>,
    decoder: Decoder,
    loader: Loader<'e>,
    pages: Option<&'e PageChannels>,
    /// A source with page channels has called, and there are none in this migration.
    page_channels_called: bool,
    /// The source may be one whose page channels were dropped, until the first page comes.
    hurried: bool,
    /// Pages may have their places in this file…
    file: Option<PageFile>,
    /// …and are read by so many threads.
    threads: u8,
    /// Bytes of pages that were read from their places.
    from_file: u64,
    /// Bytes of the file that the stream jumps over.
    jumped: u64,
    /// Where the stream begins in its file.
    start: u64,
}

impl Engine<'_> {
    fn run(&mut self, job: &Job) -> Result<Arrival, MigrationError> {
        job.advance(Status::Active)?;
        self.loader.guest.hooks().prepare();
        if self.hurried {
            // A QEMU 7.2 that has failed and has a return path waits for us to close.
            self.limit_silence(Some(SILENCE))?;
        }
        if self.inlet.fill(4)? && is_page_channel(self.inlet.bytes()) == Some(true) {
            return Err(self.place(LoadError::MultifdOff, 0).into());
        }
        self.read_stream()?;
        if self.page_channels_called && !self.has_pages() {
            // Not every release's stream tells that its pages went elsewhere.
            return Err(self.place(LoadError::MultifdOff, self.decoder.offset()).into());
        }
        if let Some(pages) = self.pages {
            pages.gate.main_end().map_err(|error| self.place(error.into(), self.decoder.offset()))?;
        }
        self.loader.check_complete().map_err(|error| self.place(error, self.decoder.offset()))?;
        let running = self.loader.guest.devices().load(&self.loader.devices).map_err(|error| {
            let error = Located::new(LoadError::Devices(error), self.decoder.offset());
            MigrationError::from(error)
        })?;
        if !job.capabilities().late_block_activate {
            // Before the verdict: if somebody else has a disk, the source can still go on.
            let activated = self.loader.guest.hooks().activate();
            activated.map_err(|error| Located::new(LoadError::Devices(error), self.decoder.offset()))?;
        }
        job.check()?;
        let verdict = Message::Shut { status: SUCCESS };
        if self.loader.confirmation {
            verdict::send(self.channel, &verdict).map_err(MigrationError::from)?;
            self.await_confirmation()?;
        } else if self.loader.return_path {
            verdict::deliver(self.channel, &verdict, verdict::PATIENCE).map_err(MigrationError::from)?;
        }
        job.handed_over()?;
        Ok(Arrival { running, bytes: self.received() })
    }

    /// Whether a page with content came on the main channel.
    fn has_pages(&self) -> bool {
        self.loader.ram.has_pages()
    }

    /// Bytes that were read: of the stream, but for what it jumps over, and of pages.
    fn received(&self) -> u64 {
        self.inlet.offset() - self.start - self.jumped + self.from_file
    }

    /// Reads the pages of the block that was listed last from their places, and goes on behind them.
    fn load_block(&mut self, block: &RamBlock) -> Result<(), MigrationError> {
        let (Some(layout), Some(file), Some(touched)) = (MappedBlock::of(block), &self.file, self.loader.ram.last())
        else {
            return Ok(());
        };
        let loaded = page_file::load(file, &layout, self.loader.guest, &block.name, &touched, self.threads);
        self.from_file += loaded.map_err(|error| error.within(format!("RAM block '{}'", block.name)))?;
        let gap = self.decoder.payload_remaining();
        self.inlet.jump(layout.end(), file)?;
        self.jumped += gap;
        self.decoder.skip_payload(gap).map_err(located)?;
        Ok(())
    }

    /// Reads to the end of the stream, with the description if there is one.
    fn read_stream(&mut self) -> Result<(), MigrationError> {
        loop {
            match self.decoder.next(self.inlet.bytes()).map_err(located)? {
                Step::Event { consumed, event } => {
                    let offset = self.inlet.offset();
                    let took = self.loader.take(&event);
                    let then = took.map_err(|error| self.place(error, offset))?;
                    self.inlet.consume(consumed);
                    match then {
                        Then::GoOn => {}
                        Then::Page(memory) => self.page(&memory)?,
                        Then::Block(block) => self.load_block(&block)?,
                        Then::Answer(message) => self.report(&message),
                        Then::Synchronise(mark) => self.synchronise(mark, offset)?,
                    }
                }
                Step::Payload { of, remaining } => {
                    // The state of a device, taken over as it comes; otherwise the description, which is skipped. Pages are moved
                    // as they are announced.
                    if self.inlet.bytes().is_empty() && !self.inlet.fill(1)? {
                        self.decoder.end_of_input();
                        continue;
                    }
                    let count = self.inlet.bytes().len().min(usize::try_from(remaining).unwrap_or(usize::MAX));
                    if let PayloadKind::DeviceData { section_id } = of
                        && let Some(header) = self.decoder.sections().get(section_id)
                    {
                        let loaded = self.loader.load_iterative(&header.idstr, &self.inlet.bytes()[..count]);
                        loaded.map_err(|error| self.place(LoadError::Devices(error), self.decoder.offset()))?;
                    }
                    self.inlet.consume(count);
                    self.decoder.skip_payload(count as u64).map_err(located)?;
                }
                Step::NeedMore { at_least } => {
                    if !self.inlet.fill(at_least)? {
                        self.decoder.end_of_input();
                    }
                }
                // A source that waits for the verdict sends nothing more, and the decoder asks for nothing more.
                Step::End => return Ok(()),
            }
        }
    }

    fn limit_silence(&self, limit: Option<Duration>) -> Result<(), MigrationError> {
        let offset = self.decoder.offset();
        self.channel.limit_silence(limit).map_err(|source| MigrationError::Receive { offset, source })
    }

    fn page(&mut self, memory: &VolatileSlice<'_>) -> Result<(), MigrationError> {
        if std::mem::take(&mut self.hurried) {
            self.limit_silence(None)?;
        }
        // With page channels there may be others who write to pages that hold nothing yet.
        let expect = || if self.pages.is_none() { self.loader.ram.expected() } else { Vec::new() };
        if !self.inlet.read_into(memory, expect)? {
            let (needed, available) = (memory.len() as u64, 0);
            let kind = qevm_savevm::ErrorKind::from(WireError::Truncated { needed, available });
            return Err(self.place(kind.into(), self.decoder.offset()).into());
        }
        self.decoder.skip_payload(memory.len() as u64).map_err(located)?;
        Ok(())
    }

    /// Waits for the page channels, where they and the main channel synchronise.
    fn synchronise(&self, mark: Mark, offset: u64) -> Result<(), MigrationError> {
        match (self.pages, mark) {
            (Some(pages), _) => {
                // The first mark comes behind the list of blocks.
                let _ = pages.listed.set(self.loader.ram.listed());
                pages.gate.main(mark).map_err(|error| self.place(error.into(), offset).into())
            }
            (None, Mark::Eos) => Ok(()),
            (None, Mark::Flush) => Err(self.place(LoadError::MultifdOff, offset).into()),
        }
    }

    /// Waits for the source to say that it will not run the guest again.
    fn await_confirmation(&mut self) -> Result<(), MigrationError> {
        let expected = handover::confirmation()?;
        let arrived = within(verdict::PATIENCE, self.channel, || self.inlet.fill(expected.len()));
        if !matches!(arrived, Ok(true)) || !self.inlet.bytes().starts_with(&expected) {
            return Err(Doubt::NotConfirmed.into());
        }
        self.inlet.consume(expected.len());
        Ok(())
    }

    /// Puts a message on the return path, if there is one.
    fn report(&self, message: &Message) {
        if !self.loader.return_path {
            return;
        }
        let mut writer = Writer::new();
        message.encode(&mut writer);
        // If the source is gone, reading will tell.
        if let Err(error) = write_all(self.channel, &mut [Source::bytes(writer.as_bytes())]) {
            tracing::debug!(%error, ?message, "the return path is broken");
        }
    }

    fn place(&self, kind: LoadError, offset: u64) -> Located<LoadError> {
        let error = Located::new(kind, offset);
        match self.decoder.current_section() {
            Some(header) => error.within(format!("section {} '{}'", header.section_id, header.idstr)),
            None => error,
        }
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

fn located(error: qevm_savevm::Error) -> Located<LoadError> {
    error.map(LoadError::from)
}
