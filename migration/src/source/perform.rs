//! What each action of the core means for threads, sockets, files and the guest.

use super::{Action, Counts, Engine, Notice, Sent, Wake, WriteSlice, monotonic_now, write_all};
use crate::core::source::{Batch, BlockRange};
use crate::page_file::Saving;
use crate::pending::DeviceSize;
use crate::{Channel, ChannelName, GuestError, MigrationError, PAGE_SIZE, Silence, ram_sender, urgent};
use qevm_savevm::event::Event;
use qevm_savevm::mapped_ram::MappedBlock;
use qevm_savevm::ram::{MappedRamHeader, RamBlock, RamRecord};
use qevm_wire::PageGeometry;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

impl Engine<'_, '_> {
    /// Does one thing, and tells the core what came of it.
    pub(super) fn perform(&mut self, action: Action) -> Result<(), MigrationError> {
        match action {
            Action::StartLog => self.start_log()?,
            Action::ReadLog => self.read_log()?,
            Action::Reset(ranges) => self.reset(ranges)?,
            Action::StopLog => {
                self.log = None;
                self.end_snapshot();
            }
            Action::PrepareSnapshot => {
                self.guest.hooks().prepare();
                if let Some(snapshot) = self.snapshot {
                    snapshot.prepare(self.guest.hooks().protected_pages())?;
                }
            }
            Action::Protect => self.snapshot.map_or(Ok(()), |snapshot| snapshot.protect(self.ram.views()))?,
            Action::Unprotect => {
                self.send_copies(&[])?;
                self.end_snapshot();
            }
            Action::BeginDevice(device) => self.begin_device(device)?,
            Action::AskDevices { exact } => self.ask_devices(exact)?,
            Action::ReadDevice { device, limit } => self.read_device(device, limit)?,
            Action::TransferDevices(configurations) => {
                if let Some(pages) = self.pages {
                    pages.transfers.begin(configurations);
                    pages.queue.begin_transfers(pages.transfers.len());
                }
            }
            Action::FinishTransfers => {
                if let Some(pages) = self.pages {
                    pages.queue.finish_transfers()?;
                    self.core.devices_transferred(pages.transfers.sent());
                    self.count_pages();
                }
            }
            Action::PlaceBlocks(blocks) => {
                if let Some(saving) = self.saving {
                    self.write_mapped_ram_headers(saving, blocks)?;
                }
            }
            Action::Send { doing } => self.flush(doing)?,
            Action::Pages(batch) if self.snapshot.is_some() => self.send_copies(&batch.runs)?,
            Action::Pages(batch) => self.send_pages(batch)?,
            Action::OpenPreempt => {
                self.connections.open_preempt(self.job)?;
                self.job.attach(self.connections.all())?;
            }
            Action::ServeRequests => self.urgent.begin(self.preempt()?, self.core.stream().preempt_writer()),
            Action::UrgentPages(batch) => self.core.sent(self.urgent.send(&self.ram, &batch)?),
            Action::Release(ranges) => self.release(ranges),
            Action::EndPreempt => self.core.sent(self.urgent.end(&self.ram)?),
            Action::LeaveChannels => self.pages = None,
            Action::SyncChannels => {
                if let Some(pages) = self.pages {
                    pages.queue.synchronise()?;
                    self.count_pages();
                }
            }
            Action::FinishFile => {
                let bytes = self.saving.map_or(Ok(0), Saving::finish)?;
                self.core.sent(Sent { bytes, ..Sent::default() });
            }
            Action::MeasureBacklog { all } => self.measure_backlog(all)?,
            Action::Pause => self.pause()?,
            Action::Throttle(per_cent) => {
                self.guest.hooks().throttle(per_cent).map_err(MigrationError::guest("slow the vCPUs down"))?;
            }
            Action::LimitDirtyRate { mib_per_second, period } => {
                let limited = self.guest.hooks().limit_dirty_rate(Some(mib_per_second), period);
                limited.map_err(MigrationError::guest("limit the dirty rate of the vCPUs"))?;
            }
            Action::Unthrottle { throttled, limited } => self.unthrottle(throttled, limited),
            Action::Pass(pass) => self.job.notify(Notice::Pass(pass)),
            Action::Status(status) => self.job.advance(status)?,
            Action::SaveDevices { running } => {
                let saved = self.guest.devices().save(self.profile, running);
                self.core.devices_saved(saved.map_err(MigrationError::guest("save the state of the devices"))?);
            }
            Action::Inactivate => self.guest.hooks().inactivate(),
            Action::SendEnd => self.send_end()?,
            Action::Settle => self.core.settled(self.connections.main.settle()),
            Action::Commit => self.core.committed(self.job.handed_over()),
            Action::Confirm(bytes) => {
                self.core.confirmed(write_all(&*self.connections.main, &mut [WriteSlice::bytes(&bytes)]));
            }
            Action::Wait { until, wake } => self.wait(until, wake),
            Action::Close => self.connections.close(),
            Action::AwaitConnection { why } => self.await_connection(why)?,
            Action::Resume => self.core.resumed(self.guest.resume()),
            Action::StayStopped => self.guest.hooks().stay_stopped(),
            Action::Activate => self.core.resumed(self.guest.hooks().activate()),
            Action::LeaveGuest => self.guest.hooks().handed_over(),
            // The loop that runs the machine stops here.
            Action::End(result) => return result,
        }
        Ok(())
    }

    fn start_log(&mut self) -> Result<(), MigrationError> {
        self.guest.hooks().prepare();
        let log = self.guest.start_dirty_log().map_err(MigrationError::guest("start the dirty log"))?;
        self.log = Some(log);
        Ok(())
    }

    fn read_log(&mut self) -> Result<(), MigrationError> {
        let Some(log) = &mut self.log else { return Ok(()) };
        let core = &mut self.core;
        let read = log.read(&mut |block, word_number, word| core.found(block, word_number, word));
        read.map_err(MigrationError::guest("read the dirty log"))
    }

    fn reset(&mut self, ranges: Vec<BlockRange>) -> Result<(), MigrationError> {
        let Some(log) = &mut self.log else { return Ok(()) };
        for BlockRange { block, pages } in ranges {
            log.reset(block, pages).map_err(MigrationError::guest("reset the dirty log"))?;
        }
        Ok(())
    }

    fn begin_device(&mut self, device: usize) -> Result<(), MigrationError> {
        let begun = self.devices.get(device).map_or(Ok(()), |device| device.begin());
        begun.map_err(MigrationError::guest("prepare a device for migration"))
    }

    fn ask_devices(&mut self, exact: bool) -> Result<(), MigrationError> {
        let sizes = self.device_sizes(exact);
        let sizes = sizes.map_err(MigrationError::guest("ask a device for the size of its state"))?;
        self.core.device_sizes(sizes);
        Ok(())
    }

    fn device_sizes(&self, exact: bool) -> Result<Vec<DeviceSize>, GuestError> {
        let size = |device: &&dyn crate::IterativeDevice| {
            let exact = exact.then(|| device.exact()).transpose()?;
            Ok(DeviceSize { estimate: device.estimate(), initial: device.initial(), exact })
        };
        self.devices.iter().map(size).collect()
    }

    fn read_device(&mut self, device: usize, limit: usize) -> Result<(), MigrationError> {
        let mut state = Vec::new();
        let read = self.devices.get(device).map_or(Ok(()), |device| device.read(&mut state, limit));
        read.map_err(MigrationError::guest("read the state of a device"))?;
        self.core.device_state(&state)
    }

    /// Sends pages on the connection, to the file or by the page channels.
    fn send_pages(&mut self, batch: Batch) -> Result<(), MigrationError> {
        self.reset(batch.resets.clone())?;
        let differences = self.differences.as_mut().zip(batch.differences);
        let stream = self.core.stream();
        let sent = match (self.pages, self.saving, differences) {
            (None, Some(saving), _) => self.ram.save(saving, &batch)?,
            (None, None, None) => self.ram.send(&*self.connections.main, stream, &batch)?,
            (None, None, Some((differences, pass))) => {
                differences.resize(self.job.parameters().xbzrle_cache_size);
                let now = self.start.elapsed();
                let sent = differences.send(&self.ram, &*self.connections.main, stream, (&batch, pass), now)?;
                let told = differences.statistics();
                self.job.update(|statistics| statistics.xbzrle = Some(told));
                sent
            }
            (Some(pages), ..) => self.ram.hand_over(&pages.queue, stream, &batch, pages.legacy)?,
        };
        self.core.sent(sent);
        self.count_pages();
        Ok(())
    }

    fn measure_backlog(&mut self, all: bool) -> Result<(), MigrationError> {
        let channels = self.connections.all().take(if all { usize::MAX } else { 1 });
        let backlogs = channels.map(|channel| channel.backlog()).collect::<io::Result<Vec<_>>>();
        let failed = |source| MigrationError::Send { doing: "what is on the way already", source };
        let backlogs = backlogs.map_err(failed)?;
        if all {
            self.moves(&backlogs).map_err(failed)?;
        }
        self.core.backlog(backlogs.iter().sum());
        Ok(())
    }

    /// Fails if what is on its way on a connection has not moved for as long as a connection may be silent.
    fn moves(&mut self, backlogs: &[u64]) -> io::Result<()> {
        let limit = self.job.parameters().timeouts.idle();
        match self.backlogs.look(self.start.elapsed(), backlogs) {
            Some((number, waited)) if limit.is_some_and(|limit| waited >= limit) => {
                let channel = match number.checked_sub(1).map(u8::try_from) {
                    None => ChannelName::Main,
                    Some(Ok(page)) if usize::from(page) < self.connections.pages.len() => ChannelName::Page(page),
                    Some(_) => ChannelName::Preempt,
                };
                let status = self.job.status();
                Err(Silence::on_the_way(channel, limit, status))
            }
            _ => Ok(()),
        }
    }

    fn pause(&mut self) -> Result<(), MigrationError> {
        let stopped_at = monotonic_now();
        let was_running = self.guest.pause().map_err(MigrationError::guest("stop the guest"))?;
        self.core.paused(was_running);
        self.job.update(|statistics| statistics.stopped_at = Some(stopped_at));
        Ok(())
    }

    fn end_snapshot(&self) {
        if let Some(snapshot) = self.snapshot {
            snapshot.end();
        }
    }

    /// Sends pages as they were: these, and those that were written to.
    fn send_copies(&mut self, runs: &[BlockRange]) -> Result<(), MigrationError> {
        let Some(snapshot) = self.snapshot else { return Ok(()) };
        for BlockRange { block, pages } in runs {
            snapshot.copy(self.ram.views(), *block, pages)?;
        }
        for copied in snapshot.take()? {
            let sent = match self.saving {
                Some(saving) => saving.save_copy(copied.block, copied.offset, &copied.bytes)?,
                None => ram_sender::send_copy(&*self.connections.main, self.core.stream(), &copied)?,
            };
            self.core.sent(sent);
        }
        Ok(())
    }

    fn preempt(&self) -> Result<Arc<dyn Channel>, MigrationError> {
        self.connections.preempt().cloned().ok_or_else(urgent::missing)
    }

    /// Gives memory that the destination has back to the host.
    fn release(&mut self, ranges: Vec<BlockRange>) {
        let bytes = |pages: Range<u64>| pages.start * PAGE_SIZE..pages.end * PAGE_SIZE;
        for BlockRange { block, pages } in ranges.into_iter().filter(|_| self.releases) {
            if let Err(error) = self.guest.hooks().release(block, bytes(pages)) {
                // Nothing else depends on it.
                tracing::warn!("memory of the guest that has gone stays here until it is wholly there: {error}");
                self.releases = false;
                return;
            }
        }
    }

    /// Tells the core what the page channels have counted.
    fn count_pages(&mut self) {
        if let Some(pages) = self.pages {
            let Counts { bytes, normal, zero, copied } = pages.queue.take_counts();
            self.core.synchronised_by_copies(copied);
            self.core.sent_by_channels(bytes);
            self.core.sent(Sent { bytes, normal, zero, ..Sent::default() });
        }
    }

    /// Waits for the operator. (For the return path is waited where its lock is held.)
    fn wait(&mut self, until: Option<Duration>, wake: Wake) {
        let time = until.map_or(Duration::MAX, |until| until.saturating_sub(self.start.elapsed()));
        match wake {
            // The core is told of a cancellation before it is polled again.
            Wake::Continue => {
                if let Ok(true) = self.job.wait_for_continue(time) {
                    self.core.let_switch_over();
                }
            }
            Wake::Operator | Wake::Answers => drop(self.job.sleep(time)),
        }
    }

    fn unthrottle(&self, throttled: bool, limited: bool) {
        if throttled && let Err(error) = self.guest.hooks().throttle(0) {
            tracing::error!("the vCPUs stay slow: {error}");
        }
        if limited && let Err(error) = self.guest.hooks().limit_dirty_rate(None, Duration::from_secs(1)) {
            tracing::error!("the vCPUs stay slow: {error}");
        }
    }

    /// Sends what the stream holds, its end. An error says that nothing has got out; the core is told whether all has.
    fn send_end(&mut self) -> Result<(), MigrationError> {
        let failed = |source| MigrationError::Send { doing: "the end of the stream", source };
        let stream = self.core.stream();
        let channel = &*self.connections.main;
        let first = loop {
            match channel.write(&[WriteSlice::bytes(stream.bytes())]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                written => break written.map_err(failed)?,
            }
        };
        let rest = write_all(channel, &mut [WriteSlice::bytes(&stream.bytes()[first..])]);
        let bytes = stream.bytes().len() as u64;
        stream.clear();
        self.core.sent(Sent { bytes, ..Sent::default() });
        self.core.end_sent(rest.map_err(failed), self.start.elapsed());
        // A QEMU gives its verdict when the sessions of page channels have ended.
        self.connections.pages.iter().for_each(|channel| channel.say_end());
        Ok(())
    }

    /// Lists the blocks with the places of their pages. The stream goes on after each block's pages.
    fn write_mapped_ram_headers(&mut self, saving: &Saving, blocks: Vec<RamBlock>) -> Result<(), MigrationError> {
        let failed = |source: io::Error| MigrationError::Send { doing: "the list of RAM blocks", source };
        let total = blocks.iter().map(|block| block.used_length).sum();
        self.core.stream().event(&Event::Ram(RamRecord::MemSize { total }))?;
        let mut layouts = Vec::with_capacity(blocks.len());
        for mut block in blocks {
            let here = saving.file.position().map_err(failed)? + self.core.stream().bytes().len() as u64;
            if self.core.leaves_out(layouts.len()) {
                let header = MappedRamHeader::absent(PAGE_SIZE);
                block.mapped_ram = Some(header);
                self.core.stream().event(&Event::Ram(RamRecord::Block(block)))?;
                layouts.push(MappedBlock { header, used_length: 0 });
                continue;
            }
            let layout = MappedBlock::place_record(here, &block, PageGeometry::X86)
                .ok_or_else(|| failed(io::Error::from_raw_os_error(libc::EFBIG)))?;
            block.mapped_ram = Some(layout.header);
            self.core.stream().event(&Event::Ram(RamRecord::Block(block)))?;
            self.flush("the list of RAM blocks")?;
            saving.file.seek(layout.end()).map_err(failed)?;
            layouts.push(layout);
        }
        saving.lay_out(layouts);
        Ok(())
    }
}
