//! The source engine: precopy of a running guest, switchover, handover.

mod backlog;
mod devices;
mod ending;
mod set_up;

use super::{
    Channel, DirtyLog, Guest, Job, MigrationError, Mode, Notice, Outgoing, Status,
    channel::{Source, write_all},
    connections::Reader,
    converge::{AutoConverge, Trigger},
    multifd::{Counts, Queue, Settings, save_pages, send_pages},
    page_file::Saving,
    pending::Account,
    ram_sender::{RamSender, Sent},
    rate::RateLimiter,
    return_path::ReturnPath,
    statistics::RoundStatistics,
    switchover::{Bandwidth, Decision, Round, Switchover, expected_downtime, per_second},
};
use qevm_multifd::{SourceSync, SyncError, SyncStep};
use qevm_savevm::{Encoder, StreamWriter};
use qevm_wire::{CountedString, Located, PageGeometry, Profile, profile::ZeroPageDetection};
use std::{
    sync::atomic::AtomicU64,
    thread,
    time::{Duration, Instant},
};

/// A PART ends at the latest after this time, so that other sections get their turn (QEMU 5.2 to 11.1).
const PART_TIME: Duration = Duration::from_millis(50);
/// Looking ahead in the dirty log takes at most this part of the first sweep.
const LOOK_PART: u32 = 32;
/// Zero pages on the main channel are sent when there are so many bytes of them.
const FLUSH_AT: usize = 64 << 10;
/// The section id of `ram`; the devices' follow. QEMU's are registration numbers, and any will do.
const RAM_SECTION: u32 = 1;
/// How often the return path is looked at while the guest waits for `migrate-continue`.
const PRE_SWITCHOVER_POLL: Duration = Duration::from_millis(100);
/// How long to wait for the destination to answer and to agree to the switchover before what was dirtied meanwhile is sent.
const ACK_POLL: Duration = Duration::from_millis(100);
/// How long to wait for the destination's word on why the channel broke.
const EXPLANATION_PATIENCE: Duration = Duration::from_secs(1);

/// Migrates `guest` over `connections`, and returns when it runs at the destination, or goes on here.
///
/// The caller has claimed `job` with [`Job::begin`]; its capabilities and parameters apply. `profile` decides the bytes
/// of the stream and must suit the destination's release.
///
/// # Errors
/// [`MigrationError`]. The guest is as it was before: running if it ran, and no log of dirty pages is kept. Only with
/// [`MigrationError::Unsettled`] it stays paused, because it may run at the destination.
pub fn migrate(guest: &dyn Guest, connections: &Outgoing, job: &Job, profile: &Profile) -> Result<(), MigrationError> {
    let capabilities = job.capabilities();
    let channel = &*connections.main;
    let saving = connections.file.clone().map(|file| {
        // Without page channels of its own nobody else looks for zero pages, as on a connection.
        let holes = !capabilities.multifd || job.parameters().zero_page_detection != ZeroPageDetection::None;
        Saving::new(file, holes)
    });
    let settings = Settings::of(capabilities, &job.parameters(), profile)
        .filter(|_| !connections.pages.is_empty() || saving.is_some());
    let pages = settings.as_ref().map(|settings| PageChannels {
        queue: Queue::new(settings.channels),
        legacy: settings.zero_pages == ZeroPageDetection::Legacy && saving.is_none(),
        packets: AtomicU64::new(0),
    });
    let flow = profile.switchover_ack.filter(|_| capabilities.switchover_ack);
    // The destination answers who asks it to, whatever its own capability says.
    let answers = capabilities.return_path || connections.reader == Reader::Answers;
    let return_path = answers.then(|| ReturnPath::new(flow, capabilities.return_path));
    thread::scope(|scope| {
        if let Some(return_path) = &return_path {
            scope.spawn(|| {
                return_path.listen(channel);
                if return_path.has_failed() {
                    connections.close();
                }
            });
        }
        if let Some((settings, pages)) = settings.as_ref().zip(pages.as_ref()) {
            if let Some(saving) = &saving {
                (0..settings.channels).for_each(|_| drop(scope.spawn(|| save_pages(guest, saving, &pages.queue))));
            }
            for (number, channel) in (0..=u8::MAX).zip(&connections.pages) {
                scope.spawn(move || send_pages(guest, &**channel, number, settings, &pages.queue, &pages.packets));
            }
        }
        let mut engine =
            Engine::new(guest, connections, job, profile, return_path.as_ref(), pages.as_ref(), saving.as_ref());
        let result = job.attach(connections.all()).and_then(|()| engine.run());
        let result = result.map_err(|error| engine.explain(error)).map_err(|error| engine.back_out(error));
        if let Some(pages) = &pages {
            pages.queue.end();
        }
        engine.finish(result)
    })
}

/// The page channels of a migration.
struct PageChannels {
    queue: Queue,
    /// Zero pages are looked for here, and travel on the main channel.
    legacy: bool,
    /// Packets sent on all channels.
    packets: AtomicU64,
}

struct Engine<'e> {
    guest: &'e dyn Guest,
    connections: &'e Outgoing,
    channel: &'e dyn Channel,
    job: &'e Job,
    profile: &'e Profile,
    return_path: Option<&'e ReturnPath>,
    pages: Option<&'e PageChannels>,
    /// The pages have places in a file.
    saving: Option<&'e Saving>,
    /// When the page channels synchronise.
    sync: SourceSync,
    stream: StreamWriter,
    start: Instant,
    limiter: RateLimiter,
    bandwidth: Bandwidth,
    /// Bytes written so far.
    transferred: u64,
    /// Bytes and time up to which [`Bandwidth`] was told.
    accounted: (u64, Duration),
    passes: u64,
    converge: AutoConverge,
    trigger: Trigger,
    /// The limit of dirty rates that holds for this migration.
    limit: Option<u64>,
    devices: Account<'e>,
    stopped: Option<Stopped>,
    /// The guest's disks were left to the destination.
    inactive: bool,
    handed_over: Option<Instant>,
}

struct Stopped {
    at: Instant,
    was_running: bool,
}

impl<'e> Engine<'e> {
    fn new(
        guest: &'e dyn Guest,
        connections: &'e Outgoing,
        job: &'e Job,
        profile: &'e Profile,
        return_path: Option<&'e ReturnPath>,
        pages: Option<&'e PageChannels>,
        saving: Option<&'e Saving>,
    ) -> Self {
        Engine {
            guest,
            connections,
            channel: &*connections.main,
            job,
            profile,
            return_path,
            pages,
            saving,
            sync: SourceSync::new(profile),
            stream: StreamWriter::new(Encoder::new(PageGeometry::X86), profile.send_section_footer),
            start: Instant::now(),
            limiter: RateLimiter::new(job.parameters().max_bandwidth, Duration::ZERO),
            bandwidth: Bandwidth::default(),
            transferred: 0,
            accounted: (0, Duration::ZERO),
            passes: 0,
            converge: AutoConverge::default(),
            trigger: Trigger::default(),
            limit: None,
            devices: Account::new(guest.devices().iterative()),
            stopped: None,
            inactive: false,
            handed_over: None,
        }
    }

    fn run(&mut self) -> Result<(), MigrationError> {
        let guest = self.guest;
        if self.job.parameters().mode == Mode::CprReboot {
            self.pause()?;
        }
        self.greet()?;
        guest.hooks().prepare();
        let mut log = guest.start_dirty_log().map_err(MigrationError::guest("start the dirty log"))?;
        let mut ram = RamSender::new(guest.ram(), PageGeometry::X86);
        self.set_up(&ram)?;
        self.job.advance(Status::Active)?;
        self.read_log(&mut ram, &mut *log)?;
        self.iterate(&mut ram, &mut *log)?;
        self.stop()?;
        // Saving first: whatever that changes in guest memory is then in the log.
        let devices = self.save_devices()?;
        self.read_last(&mut ram, &mut *log)?;
        // The destination takes the disks as soon as it has everything.
        self.guest.hooks().inactivate();
        self.inactive = true;
        let description = self.send_rest(&mut ram, devices)?;
        // The log ends with this function: stopping it takes longer than all the rest of the downtime.
        self.hand_over(description.as_deref())
    }

    /// Sends rounds of dirty pages until the guest may be stopped. The log is read at the end of each.
    fn iterate(&mut self, ram: &mut RamSender<'_>, log: &mut dyn DirtyLog) -> Result<(), MigrationError> {
        let (mut switchover, mut begin) = (Switchover::default(), self.start.elapsed());
        let mut warned_of = None;
        loop {
            let (bytes_before, pages) = (self.transferred, ram.remaining_pages());
            self.sweep(ram, log)?;
            self.send_device_parts()?;
            self.drain()?;
            let sent_at = self.start.elapsed();
            self.account();
            let new_pages = self.read_log(ram, log)?;
            let end = self.start.elapsed();
            self.accounted.1 = end;

            let parameters = self.job.parameters();
            let round = Round {
                remaining: &[],
                took: end - begin,
                overhead: end - sent_at,
                bandwidth: self.bandwidth.estimate(),
                switchover_bandwidth: Some(parameters.avail_switchover_bandwidth).filter(|bandwidth| *bandwidth > 0),
                downtime_limit: parameters.downtime_limit(),
            };
            let (decision, total) = self.decide(&mut switchover, ram, &round)?;
            let rate = per_second(new_pages, round.took);
            self.job.update(|statistics| {
                statistics.ram.dirty_pages_rate = rate;
                statistics.expected_downtime = expected_downtime(total, &round).unwrap_or(parameters.downtime_limit());
                statistics.rounds.push(RoundStatistics {
                    start: begin,
                    took: round.took,
                    pages,
                    bytes: self.transferred - bytes_before,
                    dirty_rate: rate * PageGeometry::X86.size(),
                });
                statistics.stalled = match &decision {
                    Decision::Iterate { stalled: Some(stall) } => Some(stall.to_string()),
                    _ => None,
                };
            });
            begin = end;
            if matches!(decision, Decision::Iterate { .. }) {
                self.pace(ram)?;
            }
            match decision {
                Decision::Iterate { stalled: Some(stall) } if warned_of.as_ref() != Some(&stall.name) => {
                    tracing::warn!("{stall}");
                    warned_of = Some(stall.name);
                }
                Decision::Iterate { .. } => {}
                Decision::SwitchOver(reason) => match self.return_path.and_then(|heard| heard.unready(ACK_POLL)) {
                    None => {
                        tracing::debug!(?reason, remaining = total, "switchover");
                        return Ok(());
                    }
                    Some(stalled) => {
                        self.job.update(|statistics| statistics.stalled = Some(stalled));
                        self.check()?;
                        // The wait says nothing about the link.
                        self.accounted.1 = self.start.elapsed();
                    }
                },
            }
        }
    }

    /// Sends every page that is dirty now, in PART sections and within the rate limit.
    fn sweep(&mut self, ram: &mut RamSender<'_>, log: &mut dyn DirtyLog) -> Result<(), MigrationError> {
        let mut look_at = Duration::ZERO;
        while !ram.is_swept() {
            self.check()?;
            self.limiter.set_limit(self.job.parameters().max_bandwidth);
            let now = self.start.elapsed();
            if self.limiter.allowance(now) == 0 {
                self.job.sleep(self.limiter.wait(now))?;
                continue;
            }
            if let Some(bandwidth) = self.bandwidth.estimate() {
                ram.expect(bandwidth);
            }
            if self.passes == 1 && now >= look_at {
                ram.look_ahead(log)?;
                let took = self.start.elapsed() - now;
                look_at = now + took * LOOK_PART;
            }
            self.stream.section_part(RAM_SECTION)?;
            loop {
                let pages = self.limiter.allowance(self.start.elapsed()) / PageGeometry::X86.size();
                if !self.send_pages(ram, Some(&mut *log), pages)? {
                    break;
                }
                let elapsed = self.start.elapsed();
                if elapsed - now >= PART_TIME || self.limiter.allowance(elapsed) == 0 {
                    break;
                }
                self.check()?;
            }
            if ram.is_swept() {
                self.synchronise(SourceSync::round_end)?;
            }
            self.synchronise(SourceSync::section_end)?;
            self.stream.footer()?;
            self.flush("the end of a RAM section")?;
            self.account();
        }
        Ok(())
    }

    /// Sends up to `limit` pages, at most a batch; false at the end of the sweep.
    fn send_pages(
        &mut self,
        ram: &mut RamSender<'_>,
        log: Option<&mut dyn DirtyLog>,
        limit: u64,
    ) -> Result<bool, MigrationError> {
        let sent = match (self.pages, self.saving) {
            (None, Some(saving)) => ram.save(saving, log, limit)?,
            (None, None) => ram.send(self.channel, &mut self.stream, log, limit)?,
            (Some(pages), _) => {
                self.sync.pages().map_err(synchronisation)?;
                let sent = ram.hand_over(&pages.queue, &mut self.stream, log, limit, pages.legacy)?;
                if self.stream.bytes().len() >= FLUSH_AT {
                    self.flush("zero pages")?;
                }
                self.count_pages();
                sent
            }
        };
        if let Some(sent) = sent {
            self.sent(sent);
        }
        Ok(sent.is_some())
    }

    /// Takes over what the page channels have counted.
    fn count_pages(&mut self) {
        if let Some(pages) = self.pages {
            let Counts { bytes, normal, zero } = pages.queue.take_counts();
            self.sent(Sent { bytes, normal, zero });
        }
    }

    /// Synchronises the page channels with the main channel as is due at a moment; without page channels it is the end of the
    /// section.
    fn synchronise(
        &mut self,
        moment: fn(&mut SourceSync) -> Result<&'static [SyncStep], SyncError>,
    ) -> Result<(), MigrationError> {
        let steps = moment(&mut self.sync).map_err(synchronisation)?;
        for step in steps {
            match (step, self.pages) {
                (SyncStep::Eos, _) => self.stream.eos()?,
                (_, None) => {}
                (SyncStep::SyncChannels, Some(pages)) => {
                    pages.queue.synchronise()?;
                    self.count_pages();
                }
                // In a file the threads have synchronised, and nobody reads along.
                (SyncStep::Flush, Some(_)) if self.saving.is_some() => {}
                (SyncStep::Flush, Some(_)) => self.stream.multifd_flush()?,
            }
        }
        Ok(())
    }

    /// Reads the dirty log when the guest has stopped for the switchover. It is no pass, as in QEMU 11.1.
    fn read_last(&mut self, ram: &mut RamSender<'_>, log: &mut dyn DirtyLog) -> Result<u64, MigrationError> {
        let new = ram.read_log(log)?;
        let remaining = ram.remaining().map(|(_, bytes)| bytes).sum();
        self.job.update(|statistics| statistics.ram.remaining = remaining);
        Ok(new)
    }

    /// Reads the dirty log: one pass. Says how many pages were new.
    fn read_log(&mut self, ram: &mut RamSender<'_>, log: &mut dyn DirtyLog) -> Result<u64, MigrationError> {
        let new = self.read_last(ram, log)?;
        self.passes += 1;
        self.job.update(|statistics| statistics.ram.dirty_sync_count = self.passes);
        // QEMU 11.1 does not tell the first.
        if self.passes > 1 {
            self.job.notify(Notice::Pass(self.passes));
        }
        self.slow_down(new * PageGeometry::X86.size())?;
        Ok(new)
    }

    /// Slows a running guest down if it dirties too much for the link (capabilities `auto-converge` and `dirty-limit`).
    fn slow_down(&mut self, dirtied: u64) -> Result<(), MigrationError> {
        let capabilities = self.job.capabilities();
        if self.stopped.is_some() || self.passes == 1 {
            return Ok(());
        }
        let (now, parameters) = (self.start.elapsed(), self.job.parameters());
        if capabilities.auto_converge
            && let Some(per_cent) = self.converge.dirty_log_read(now, dirtied, self.transferred, &parameters)
        {
            tracing::info!(per_cent, "auto-converge slows the vCPUs down");
            self.guest.hooks().throttle(per_cent).map_err(MigrationError::guest("slow the vCPUs down"))?;
            self.job.update(|statistics| statistics.throttled = Some(per_cent));
        }
        if capabilities.dirty_limit {
            let exceeded = self.trigger.dirty_log_read(now, dirtied, self.transferred, &parameters).is_some();
            // The parameter may change while the limit holds.
            let limit = Some(parameters.vcpu_dirty_limit).filter(|limit| self.limit != Some(*limit));
            if let Some(limit) = limit.filter(|_| exceeded || self.limit.is_some()) {
                tracing::info!(limit, "dirty-limit slows the vCPUs down");
                let period = Duration::from_millis(parameters.vcpu_dirty_limit_period_ms);
                let limited = self.guest.hooks().limit_dirty_rate(Some(limit), period);
                limited.map_err(MigrationError::guest("limit the dirty rate of the vCPUs"))?;
                self.limit = Some(limit);
            }
        }
        Ok(())
    }

    fn let_run(&mut self) {
        if self.job.statistics().throttled.is_some()
            && let Err(error) = self.guest.hooks().throttle(0)
        {
            tracing::error!("the vCPUs stay slow: {error}");
        }
        if self.limit.take().is_some()
            && let Err(error) = self.guest.hooks().limit_dirty_rate(None, Duration::from_secs(1))
        {
            tracing::error!("the vCPUs stay slow: {error}");
        }
    }

    fn flush(&mut self, doing: &'static str) -> Result<(), MigrationError> {
        let bytes = self.stream.bytes().len() as u64;
        write_all(self.channel, &mut [Source::bytes(self.stream.bytes())])
            .map_err(|source| MigrationError::Send { doing, source })?;
        self.stream.clear();
        self.sent(Sent { bytes, ..Sent::default() });
        Ok(())
    }

    fn sent(&mut self, sent: Sent) {
        self.transferred += sent.bytes;
        self.limiter.sent(sent.bytes);
        self.job.update(|statistics| {
            let ram = &mut statistics.ram;
            ram.transferred = self.transferred;
            ram.normal += sent.normal;
            ram.duplicate += sent.zero;
            ram.remaining = ram.remaining.saturating_sub((sent.normal + sent.zero) * ram.page_size);
        });
    }

    /// Tells the bandwidth estimate what was sent since the last time.
    fn account(&mut self) {
        let now = self.start.elapsed();
        let (bytes, time) = (self.transferred - self.accounted.0, now.saturating_sub(self.accounted.1));
        self.accounted = (self.transferred, now);
        self.bandwidth.add(bytes, time);
        if let Some(estimate) = self.bandwidth.estimate() {
            self.job.update(|statistics| {
                statistics.ram.mbps = estimate as f64 * 8.0 / 1e6;
                statistics.ram.pages_per_second = estimate / PageGeometry::X86.size();
            });
        }
    }

    fn check(&self) -> Result<(), MigrationError> {
        self.job.check()?;
        self.return_path.map_or(Ok(()), ReturnPath::failure)
    }
}

fn synchronisation(error: SyncError) -> MigrationError {
    MigrationError::Packet(Located::new(error.into(), 0))
}

fn idstr(name: &str) -> Result<CountedString, MigrationError> {
    CountedString::new(name).ok_or_else(|| MigrationError::Guest {
        doing: "name a section or RAM block",
        source: format!("'{name}' is not 1 to 255 bytes long").into(),
    })
}

/// Time since boot of `CLOCK_MONOTONIC`, which processes of one host share.
pub fn monotonic_now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}
