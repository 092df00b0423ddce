//! `toy_vmm` without threads: the cores of `qevm-migration`, driven by tokio in one thread. Its guest is memory and a
//! task that writes to it; it takes a guest from a QEMU, runs it, and gives it back while it runs, over one connection
//! with a return path each time:
//!
//!     async_vmm none 64 11.1 unix:from.sock unix:to.sock return-path
//! With `postcopy-ram` as well, the guest may come before its memory, and goes back before it after three passes.

use qevm_migration::core::destination::{self, Destination, DestinationOptions, SectionUse, Turn};
use qevm_migration::core::source::{Action, Answers, Sent, SourceCore, SourceOptions, Wake};
use qevm_migration::{Devices, Doubt, GuestError, LoadError, MigrationError, Parameters, Registry, Statistics, Status};
use qevm_returnpath::requests::{PageFaults, RequestBlock, RequestBlocks};
use qevm_returnpath::{Decoder, Event, Message};
use qevm_savevm::ram::{BlockId, PageAt};
use qevm_wire::{AsyncDriver, CountedString, Decode, Profile, Writer};
use std::cell::{Cell, RefCell};
use std::env;
use std::fs;
use std::mem::MaybeUninit;
use std::process;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::time;

const PAGE: usize = 4096;
/// QEMU's devices that this monitor does without.
const IGNORED: &str = "apic timer fw_cfg cpu_common cpu kvm-tpr-opt";

/// The guest: one RAM block, and for each page a bit that says that it was written, and one for the last reading of
/// those.
struct Vm {
    ram: Vec<u8>,
    written: Vec<u64>,
    reported: Vec<u64>,
    running: bool,
    /// Pages that have come.
    present: Vec<bool>,
}

impl Vm {
    /// A step of the guest. As long as `busy`, it writes to 16 MiB in a row, and then to 64 KiB.
    fn step(&mut self, number: usize, busy: bool) {
        let page = number % if busy { 4096 } else { 16 };
        if self.running {
            self.ram[page * PAGE + 8..][..8].copy_from_slice(&number.to_le_bytes());
            self.written[page / 64] |= 1 << (page % 64);
        }
    }

    /// A page that comes.
    fn page(&mut self, page: &PageAt) -> &mut [u8] {
        self.present[page.offset as usize / PAGE] = true;
        &mut self.ram[page.offset as usize..][..PAGE]
    }
}

/// A monitor with its guest.
struct Monitor {
    machine: String,
    profile: Profile,
    vm: RefCell<Vm>,
    devices: Registry<'static>,
    postcopy: bool,
    /// The guest runs at the destination, and not all of its memory is there.
    gone: Cell<bool>,
    /// Pages sent since then.
    later: Cell<u64>,
    /// What is waited for in a guest that came before its memory.
    faults: RefCell<Option<PageFaults>>,
    /// Pages that came then, and those of them that came while one was waited for.
    came: Cell<(u64, u64)>,
}

/// Pages that are touched when the guest runs before they are there.
const TOUCHED: usize = 64;

impl Monitor {
    /// Takes a guest over. True if it ran.
    async fn receive(&self, mut stream: UnixStream) -> Result<bool, MigrationError> {
        let start = time::Instant::now();
        let mut core = Destination::new(DestinationOptions {
            machine_type: self.machine.clone(),
            ram: vec!["ram".into()],
            vmdesc: self.profile.vmdesc,
            answers: true,
            postcopy: self.postcopy,
            ..DestinationOptions::default()
        });
        let mut input = Vec::new();
        loop {
            match self.take_over(&mut core, &mut input, &mut stream, start).await {
                Ok(Some(running)) => return Ok(running),
                Ok(None) => {}
                Err(error) => {
                    // The source learns of it, and its guest runs on.
                    core.fail(&error);
                    if let destination::Action::Send(message) = core.next(&[])?.action {
                        let _ = stream.write_all(&encoded(&message)).await;
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Does the next thing. Says whether the guest ran when it is here.
    async fn take_over(
        &self,
        core: &mut Destination,
        input: &mut Vec<u8>,
        stream: &mut UnixStream,
        start: time::Instant,
    ) -> Result<Option<bool>, MigrationError> {
        use destination::Action;
        core.time(start.elapsed());
        let Turn { consumed, action } = core.next(input)?;
        let mut used = consumed;
        match action {
            Action::Continue | Action::ForgetBlocks => {}
            Action::Read { at_least, .. } => {
                while input.len() < at_least {
                    let offset = core.offset();
                    let read = stream.read_buf(input).await;
                    if read.map_err(|source| MigrationError::Receive { offset, source })? == 0 {
                        core.end_of_input();
                        break;
                    }
                }
            }
            Action::Block(block) if block.used_length == self.vm.borrow().ram.len() as u64 => core.block_fits(),
            Action::Block(block) => {
                let (found, expected) = (block.used_length, self.vm.borrow().ram.len() as u64);
                return Err(core.refuse(LoadError::RamBlockSize { name: block.name, found, expected }));
            }
            Action::Zero(page) => self.vm.borrow_mut().page(&page).fill(0),
            Action::Page { page, remaining } => {
                let (at, there) = (PAGE - remaining as usize, remaining.min((input.len() - used) as u64) as usize);
                self.vm.borrow_mut().page(&page)[at..at + there].copy_from_slice(&input[used..used + there]);
                used += there;
                core.placed(there as u64)?;
                if there == 0 {
                    let offset = core.offset();
                    let read = stream.read_buf(input).await;
                    if read.map_err(|source| MigrationError::Receive { offset, source })? == 0 {
                        core.end_of_input();
                    }
                }
            }
            Action::Section { idstr, instance_id, usage } => {
                let known = usage == Some(SectionUse::Device) && self.devices.has(&idstr, instance_id);
                core.section(if known { Ok(()) } else { Err("it is not in the example".into()) })?;
            }
            Action::LoadDevices => {
                let loaded = self.devices.load(core.devices());
                core.loaded(loaded)?;
            }
            Action::Activate => core.activated(Ok(()))?,
            Action::Send(message) => drop(stream.write_all(&encoded(&message)).await),
            Action::Tell { message, .. } => {
                // A source that has closed does not hear it. What was written to a UNIX socket has arrived; TCP would
                // have to be asked.
                let gone = socket2::SockRef::from(&*stream).peek(&mut [MaybeUninit::uninit()]).is_ok_and(|n| n == 0);
                let written = stream.write_all(&encoded(&message)).await;
                core.told(if gone { Err(Doubt::SourceLeft) } else { written.map_err(Doubt::NotTold) })?;
            }
            Action::Discard { ranges, .. } => {
                let vm = &mut *self.vm.borrow_mut();
                let pages = ranges.into_iter().flat_map(|range| range.step_by(PAGE));
                pages.for_each(|at| vm.present[at as usize / PAGE] = false);
            }
            Action::Listen => {
                let (name, used_length) = (CountedString::new("ram"), self.vm.borrow().ram.len() as u64);
                let block = name.map(|name| RequestBlock { name, used_length, page_size: PAGE as u64 });
                *self.faults.borrow_mut() = RequestBlocks::new(block.into_iter().collect()).ok().map(PageFaults::new);
            }
            Action::Run { running } => {
                self.vm.borrow_mut().running = running;
                // Others would learn from userfaultfd who touches what; here it is the last pages that are not there.
                let missing: Vec<_> = {
                    let vm = self.vm.borrow();
                    (0..vm.present.len()).rev().filter(|page| !vm.present[*page]).take(TOUCHED).collect()
                };
                for page in missing {
                    let fault = |faults: &mut PageFaults| faults.fault(0, (page * PAGE) as u64);
                    let message = self.faults.borrow_mut().as_mut().map(fault);
                    if let Some(Ok(Some(message))) = message {
                        drop(stream.write_all(&encoded(&message)).await);
                    }
                }
            }
            Action::Place { page, content } => {
                let vm = &mut *self.vm.borrow_mut();
                if vm.present[page.offset as usize / PAGE] {
                    return Err(core.refuse(LoadError::Unsupported("a page that is there already".into())));
                }
                vm.page(&page).copy_from_slice(content.unwrap_or(&[0; PAGE]));
                if let Some(faults) = &mut *self.faults.borrow_mut() {
                    let (all, waited) = self.came.get();
                    self.came.set((all + 1, waited + u64::from(faults.waiting() > 0)));
                    faults.received(0, page.offset);
                }
            }
            Action::Complete { running } => return Ok(Some(running)),
            other => return Err(core.refuse(LoadError::Unsupported(format!("{other:?}")))),
        }
        input.drain(..used);
        Ok(None)
    }

    /// Gives the guest away. Says after how many passes.
    async fn send(&self, stream: UnixStream, parameters: Parameters) -> Result<usize, MigrationError> {
        let (reader, mut writer) = stream.into_split();
        let (answers, news) = (RefCell::new(Answers::new(None, true)), Notify::new());
        let blocks = vec![("ram".to_owned(), self.vm.borrow().ram.len() as u64)];
        let mut options = SourceOptions::new(self.profile.clone(), &self.machine, blocks);
        options.capabilities.postcopy_ram = self.postcopy;
        let mut core = SourceCore::new(options, parameters);
        let (start, rounds) = (time::Instant::now(), RefCell::new(Statistics::default()));
        let driving = async {
            loop {
                let now = start.elapsed();
                if self.postcopy && rounds.borrow().rounds.len() >= 3 {
                    core.start_postcopy()?;
                }
                let action = core.poll(now, Some(&mut answers.borrow_mut()));
                core.report(&mut rounds.borrow_mut());
                let done = match action {
                    Action::Wait { until, wake } => {
                        // Without an operator, only the destination can end a wait early.
                        let early = async {
                            if wake == Wake::Answers { news.notified().await } else { std::future::pending().await }
                        };
                        let _ =
                            time::timeout(until.map_or(Duration::MAX, |until| until.saturating_sub(now)), early).await;
                        Ok(())
                    }
                    Action::End(result) => return result,
                    action => self.give_away(&mut core, action, &mut writer, start).await,
                };
                if let Err(error) = done {
                    core.failed(error, start.elapsed(), true);
                }
            }
        };
        let working = async {
            for number in 0.. {
                let busy = rounds.borrow().rounds.len() < 3;
                self.vm.borrow_mut().step(number, busy);
                match busy {
                    true => tokio::task::yield_now().await,
                    false => time::sleep(Duration::from_millis(1)).await,
                }
            }
        };
        let result = tokio::select! {
            result = driving => result,
            () = listen(reader, &answers, &news) => Ok(()),
            () = working => Ok(()),
        };
        result.map(|()| rounds.borrow().rounds.len())
    }

    /// Does one thing, and tells the core what came of it.
    async fn give_away(
        &self,
        core: &mut SourceCore,
        action: Action,
        writer: &mut (impl AsyncWriteExt + Unpin),
        start: time::Instant,
    ) -> Result<(), MigrationError> {
        let failed = |doing| move |source| MigrationError::Send { doing, source };
        match action {
            Action::ReadLog => {
                let vm = &mut *self.vm.borrow_mut();
                vm.reported.clone_from(&vm.written);
                vm.reported.iter().enumerate().for_each(|(number, word)| core.found(0, number, *word));
            }
            Action::Reset(ranges) => ranges.into_iter().for_each(|range| self.reset(range.pages)),
            Action::Send { doing } => {
                let bytes = core.stream().take();
                writer.write_all(&bytes).await.map_err(failed(doing))?;
                core.sent(Sent { bytes: bytes.len() as u64, ..Sent::default() });
            }
            Action::Pages(batch) => {
                batch.resets.into_iter().for_each(|range| self.reset(range.pages));
                let mut sent = Sent::default();
                for page in batch.runs.into_iter().flat_map(|run| run.pages) {
                    let content = self.vm.borrow().ram[page as usize * PAGE..][..PAGE].to_vec();
                    if content.iter().all(|byte| *byte == 0) {
                        core.stream().zero_page(BlockId(0), page * PAGE as u64)?;
                        sent.zero += 1;
                    } else {
                        core.stream().page_header(BlockId(0), page * PAGE as u64)?;
                        core.stream().payload(&content)?;
                        sent.normal += 1;
                    }
                }
                let bytes = core.stream().take();
                writer.write_all(&bytes).await.map_err(failed("pages"))?;
                if self.gone.get() {
                    self.later.set(self.later.get() + sent.normal + sent.zero);
                }
                core.sent(Sent { bytes: bytes.len() as u64, ..sent });
            }
            // A UNIX socket has no way that takes time.
            Action::MeasureBacklog { .. } => core.backlog(0),
            Action::Pause => core.paused(std::mem::take(&mut self.vm.borrow_mut().running)),
            Action::SaveDevices { running } => {
                let saved = self.devices.save(&self.profile, running);
                let guest = |source| MigrationError::Guest { doing: "save the devices", source };
                core.devices_saved(saved.map_err(guest)?);
            }
            Action::SendEnd => {
                let bytes = core.stream().take();
                // If nothing of it gets out, the guest stays.
                let first = writer.write(&bytes).await.map_err(failed("the end of the stream"))?;
                let rest = writer.write_all(&bytes[first..]).await.map_err(failed("the end of the stream"));
                core.end_sent(rest, start.elapsed());
            }
            Action::Status(Status::PostcopyDevice) => self.gone.set(true),
            Action::Commit => core.committed(Ok(())),
            Action::Confirm(bytes) => core.confirmed(writer.write_all(&bytes).await),
            Action::Resume => {
                self.vm.borrow_mut().running = true;
                core.resumed(Ok(()));
            }
            Action::Close => drop(writer.shutdown().await),
            // There are no disks, vCPUs to slow down, page channels and operators.
            _ => {}
        }
        Ok(())
    }

    fn reset(&self, pages: std::ops::Range<u64>) {
        let vm = &mut *self.vm.borrow_mut();
        for number in pages.start as usize / 64..(pages.end as usize).div_ceil(64) {
            vm.written[number] &= !std::mem::take(&mut vm.reported[number]);
        }
    }
}

/// Reads what the destination says, for ever.
async fn listen(reader: OwnedReadHalf, answers: &RefCell<Answers>, news: &Notify) {
    let mut messages = AsyncDriver::new(reader, Decoder::default());
    loop {
        let offset = messages.decoder().offset();
        let last = match messages.next().await {
            Ok(Some(Event::Message(message))) => answers.borrow_mut().message(message, offset),
            Ok(Some(_)) => false,
            Ok(None) | Err(_) => {
                answers.borrow_mut().fail(MigrationError::NoVerdict);
                true
            }
        };
        news.notify_one();
        if last {
            return std::future::pending().await;
        }
    }
}

fn encoded(message: &Message) -> Vec<u8> {
    let mut writer = Writer::new();
    message.encode(&mut writer);
    writer.into_bytes()
}

fn main() {
    if let Err(error) = run(&env::args().skip(1).collect::<Vec<_>>()) {
        eprintln!("async_vmm: {error}");
        process::exit(1);
    }
}

pub(crate) fn run(arguments: &[String]) -> Result<(), GuestError> {
    let [machine, mib, qemu, from, to, capabilities @ ..] = arguments else {
        return Err("usage: async_vmm none MIB QEMU unix:FROM unix:TO return-path [postcopy-ram]".into());
    };
    let postcopy = capabilities.iter().any(|name| name == "postcopy-ram");
    let path = |uri: &str| uri.strip_prefix("unix:").map(str::to_owned).ok_or("only unix: is here");
    let size = mib.parse::<usize>()? << 20;
    let mut devices = Registry::new(machine);
    IGNORED.split(' ').try_for_each(|name| devices.ignore(name))?;
    let words = vec![u64::MAX; size / PAGE / 64];
    let present = vec![false; size / PAGE];
    let vm = Vm { ram: vec![0; size], written: words.clone(), reported: words, running: false, present };
    let profile = Profile::new(qemu.parse()?, machine);
    let monitor = Monitor {
        machine: machine.clone(),
        profile,
        vm: vm.into(),
        devices,
        postcopy,
        gone: false.into(),
        later: 0.into(),
        faults: None.into(),
        came: (0, 0).into(),
    };
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let (stream, _) = UnixListener::bind(path(from)?)?.accept().await?;
        let running = monitor.receive(stream).await?;
        fs::write("arrived.ram", &monitor.vm.borrow().ram)?;
        println!("arrived: running {running}");
        if let (all @ 1.., waited) = monitor.came.get() {
            println!("after the guest came {all} pages, and {TOUCHED} that were touched with the first {waited}");
        }
        // This monitor runs whatever has arrived, and has 64 MiB a second for the way back.
        monitor.vm.borrow_mut().running = true;
        let stream = UnixStream::connect(path(to)?).await?;
        let mut limits = Parameters::default();
        (limits.max_bandwidth, limits.avail_switchover_bandwidth, limits.downtime_limit_ms) = (64 << 20, 64 << 20, 100);
        let passes = monitor.send(stream, limits).await?;
        fs::write("left.ram", &monitor.vm.borrow().ram)?;
        println!("left: passes {passes}, {} pages after the guest", monitor.later.get());
        Ok::<(), GuestError>(())
    })
}
