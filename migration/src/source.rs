//! The source engine: threads, sockets and the guest around [`SourceCore`], which decides.

mod backlogs;
mod perform;
mod recovery;
mod setup;

use super::channel::{WriteSlice, write_all};
use super::core::source::{Action, Sent, SourceCore, Wake};
use super::differences::Differences;
use super::multifd::{Counts, Queue, Settings, Transfers, save_pages, send_pages};
use super::page_file::Saving;
use super::ram_sender::RamSender;
use super::return_path::ReturnPath;
use super::snapshot::Snapshot;
use super::urgent::Urgent;
use super::{DirtyLog, Guest, IterativeDevice, Job, MigrationError, Notice, Outgoing};
use backlogs::Backlogs;
use qevm_wire::{PageGeometry, Profile};
use setup::{Setup, return_path};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

/// Migrates `guest` over `connections`, and returns when it runs at the destination with all of its memory, or goes on
/// here.
///
/// A guest that went before its memory is there whatever becomes of the connections. When they are lost, this waits for
/// other ones ([`Job::recover`]), or for the word that none will come ([`Job::give_up_recovery`]).
///
/// The caller has claimed `job` with [`Job::begin`]; its capabilities and parameters apply. `profile` decides the bytes
/// of the stream and must suit the destination's release.
///
/// # Errors
/// [`MigrationError`]. The guest is as it was before: running if it ran, and no log of dirty pages is kept. Only with
/// [`MigrationError::Unsettled`] it stays paused, because it may run at the destination, and with
/// [`MigrationError::PostcopyBroken`], because it went there before its memory.
pub fn migrate(guest: &dyn Guest, connections: &Outgoing, job: &Job, profile: &Profile) -> Result<(), MigrationError> {
    let start = Instant::now();
    let connections = &connections.clone().watched(job).inspect_err(|error| job.end(Some(error)))?;
    let (capabilities, parameters) = (job.capabilities(), job.parameters());
    if let Err(bad) = capabilities.suit(profile.qemu) {
        let error = bad.into();
        job.end(Some(&error));
        return Err(error);
    }
    let setup = match Setup::new(guest, connections, job, &parameters, profile) {
        Ok(setup) => setup,
        Err(error) => {
            job.end(Some(&error));
            connections.all().for_each(|channel| channel.finish_writing());
            return Err(error);
        }
    };
    let pages = setup.page_channels();
    let snapshot = capabilities.background_snapshot.then(Snapshot::default);
    let return_path = return_path(capabilities, connections.reader, profile);
    let options = setup.options(guest, job, connections.reader, &parameters, profile);
    let Setup { saving, settings, iterative, differences, .. } = setup;
    if let Some(differences) = &differences {
        job.update(|statistics| statistics.xbzrle = Some(differences.statistics()));
    }
    let urgent = Urgent::default();
    thread::scope(|scope| {
        if let Some((settings, pages)) = settings.as_ref().zip(pages.as_ref()) {
            start_page_threads(scope, guest, connections, saving.as_ref(), settings, pages);
        }
        if let Some(snapshot) = &snapshot {
            scope.spawn(|| snapshot.serve(&guest.ram()));
        }
        let mut engine = Engine {
            guest,
            scope,
            connections: Arc::new(connections.clone()),
            job,
            profile,
            return_path,
            listener: None,
            pages: pages.as_ref(),
            saving: saving.as_ref(),
            snapshot: snapshot.as_ref(),
            devices: iterative,
            ram: RamSender::new(guest.ram(), PageGeometry::X86),
            differences,
            log: None,
            core: SourceCore::new(options, parameters),
            urgent: &urgent,
            backlogs: Backlogs::default(),
            releases: true,
            start,
        };
        if let Err(error) = engine.listen().and_then(|()| job.attach(connections.all())) {
            engine.fail(error);
        }
        let result = engine.run();
        if let Some(pages) = &pages {
            pages.queue.end();
        }
        if let Some(snapshot) = &snapshot {
            snapshot.end();
        }
        engine.finish(result)
    })
}

/// How often it is looked whether a deadline has changed.
const PARAMETERS_POLL: Duration = Duration::from_millis(500);

/// Starts a thread for each page channel, or those that write pages to their places in a file.
fn start_page_threads<'s, 'e>(
    scope: &'s Scope<'s, 'e>,
    guest: &'e dyn Guest,
    connections: &'e Outgoing,
    saving: Option<&'e Saving>,
    settings: &'e Settings,
    pages: &'e PageChannels<'e>,
) {
    if let Some(saving) = saving {
        (0..settings.channels).for_each(|_| drop(scope.spawn(|| save_pages(guest, saving, &pages.queue))));
    }
    for (number, channel) in (0..=u8::MAX).zip(&connections.pages) {
        scope.spawn(move || {
            let PageChannels { queue, transfers, packets, .. } = pages;
            send_pages(guest, &**channel, number, settings, queue, transfers, packets);
        });
    }
}

/// The page channels of a migration.
struct PageChannels<'e> {
    queue: Queue,
    /// The state of devices that goes beside the pages.
    transfers: Transfers<'e>,
    /// Zero pages are looked for here, and travel on the main channel.
    legacy: bool,
    /// Packets sent on all channels.
    packets: AtomicU64,
}

/// What the core's actions are done with.
struct Engine<'s, 'e> {
    guest: &'e dyn Guest,
    /// Where threads run that need guest memory.
    scope: &'s Scope<'s, 'e>,
    connections: Arc<Outgoing>,
    job: &'e Job,
    profile: &'e Profile,
    return_path: Option<Arc<ReturnPath>>,
    /// Reads the return path.
    listener: Option<ScopedJoinHandle<'s, ()>>,
    /// Where pages go that do not go on the main channel.
    pages: Option<&'e PageChannels<'e>>,
    /// The pages have places in a file.
    saving: Option<&'e Saving>,
    /// Pages are sent as they were.
    snapshot: Option<&'e Snapshot>,
    devices: Vec<&'e dyn IterativeDevice>,
    ram: RamSender<'e>,
    /// Pages may go as differences.
    differences: Option<Differences>,
    log: Option<Box<dyn DirtyLog + 'e>>,
    core: SourceCore,
    /// The preempt channel.
    urgent: &'e Urgent,
    /// What is on its way, as it was last looked at.
    backlogs: Backlogs,
    /// Memory can be given back to the host.
    releases: bool,
    start: Instant,
}

impl Engine<'_, '_> {
    /// Does what the core says, to the end.
    fn run(&mut self) -> Result<(), MigrationError> {
        loop {
            match self.next_action() {
                Action::End(result) => return result,
                action => {
                    if let Err(error) = self.perform(action) {
                        self.fail(error);
                    }
                }
            }
        }
    }

    /// Tells the core what has changed, and what it says to do next; waits for the return path are done already.
    fn next_action(&mut self) -> Action {
        loop {
            if self.job.check().is_err() {
                self.core.cancel();
            }
            if self.job.wants_postcopy()
                && let Err(refused) = self.core.start_postcopy()
            {
                tracing::debug!("no postcopy: {refused}");
            }
            let parameters = self.job.parameters();
            self.core.set_patience(parameters.timeouts.switchover());
            self.core.set_parameters(parameters);
            let now = self.start.elapsed();
            let Some(return_path) = &self.return_path else {
                let action = self.core.poll(now, None);
                self.report();
                return action;
            };
            // Nothing can come between the decision to wait and the wait: the lock is held.
            let mut answers = return_path.answers();
            let action = self.core.poll(now, Some(&mut answers));
            self.job.update(|statistics| self.core.report(statistics));
            let Action::Wait { until, wake: Wake::Answers } = action else { return action };
            // What the operator sets meanwhile counts, too.
            let time = until.map_or(PARAMETERS_POLL, |until| until.saturating_sub(now).min(PARAMETERS_POLL));
            return_path.wait(answers, Some(time));
        }
    }

    fn report(&mut self) {
        self.job.update(|statistics| self.core.report(statistics));
    }

    fn fail(&mut self, error: MigrationError) {
        self.core.failed(error, self.start.elapsed(), self.return_path.is_some());
    }

    /// Sends what the stream holds.
    fn flush(&mut self, doing: &'static str) -> Result<(), MigrationError> {
        let stream = self.core.stream();
        let bytes = stream.bytes().len() as u64;
        write_all(&*self.connections.main, &mut [WriteSlice::bytes(stream.bytes())])
            .map_err(|source| MigrationError::Send { doing, source })?;
        stream.clear();
        self.core.sent(Sent { bytes, ..Sent::default() });
        Ok(())
    }

    fn finish(&mut self, result: Result<(), MigrationError>) -> Result<(), MigrationError> {
        self.devices.iter().for_each(|device| device.end());
        let unheard = self.return_path.as_ref().is_some_and(|path| !path.answers().heard());
        let tls = self.job.tls().is_some();
        let result = result.map_err(|error| if unheard { error.unheard(tls) } else { error });
        self.job.end(result.as_ref().err());
        // The return path is read to its end: the destination closes when it has taken over, or is not waited for any
        // longer.
        let patience = self.job.parameters().timeouts.switchover();
        self.connections.all().for_each(|channel| drop(channel.limit_silence(patience)));
        self.connections.all().for_each(|channel| channel.finish_writing());
        self.stop_listening();
        result
    }
}

/// Time since boot of `CLOCK_MONOTONIC`, which processes of one host share.
pub fn monotonic_now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}
