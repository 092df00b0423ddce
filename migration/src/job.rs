//! The control side of a migration: what QMP reads and sets while an engine runs.

mod recovery;

use super::watch::Watch;
use super::{Capabilities, Channel, MigrationError, Outgoing, Parameters, Refused, Statistics, Status, Timeouts, Tls};
use parking_lot::{Condvar, Mutex, MutexGuard};
use qevm_multifd::Uuid;
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Something that watchers of a migration want to know at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The status changed; QMP's `MIGRATION`.
    Status(Status),
    /// The dirty log was read, this many times by now; QMP's `MIGRATION_PASS`.
    Pass(u64),
}

/// Settings, state and controls of a machine's migration. Shared by an engine and its watchers.
#[derive(Default)]
pub struct Job {
    state: Mutex<State>,
    changed: Condvar,
    watcher: Mutex<Option<Watcher>>,
}

type Watcher = Box<dyn Fn(Notice) + Send>;

#[derive(Default)]
struct State {
    /// What those know who wait on its connections.
    watch: Arc<Watch>,
    parameters: Parameters,
    capabilities: Capabilities,
    tls: Option<Tls>,
    uuid: Option<Uuid>,
    statistics: Statistics,
    cancel: bool,
    may_continue: bool,
    postcopy: bool,
    /// The destination has the guest, or it is going there: nothing brings it back.
    handed_over: bool,
    /// When the migration was begun.
    began: Option<Instant>,
    channels: Vec<Arc<dyn Channel>>,
    /// The operator has given the connections of a postcopy up.
    paused: bool,
    /// The connections over which a postcopy goes on that was interrupted.
    next: Option<Outgoing>,
    /// They are no longer waited for.
    given_up: bool,
    /// What the watcher has not been told yet.
    notices: VecDeque<Notice>,
}

impl Job {
    /// Whatever happens is told to `watcher`, which must not block. There is one at a time.
    pub fn watch(&self, watcher: impl Fn(Notice) + Send + 'static) {
        *self.watcher.lock() = Some(Box::new(watcher));
    }

    /// A copy of the statistics. The time of a migration under way goes on whatever its connections do.
    pub fn statistics(&self) -> Statistics {
        let state = self.lock();
        let mut statistics = state.statistics.clone();
        if statistics.status.is_running() {
            statistics.total_time = state.elapsed();
        }
        statistics
    }

    /// The status.
    pub fn status(&self) -> Status {
        self.lock().statistics.status
    }

    /// The parameters.
    pub fn parameters(&self) -> Parameters {
        self.lock().parameters.clone()
    }

    /// Sets the parameters; a migration under way follows them.
    pub fn set_parameters(&self, parameters: Parameters) {
        let mut state = self.lock();
        state.watch.set_timeouts(parameters.timeouts);
        state.parameters = parameters;
        drop(state);
        self.changed.notify_all();
    }

    /// Sets how long who waits for what, of all parameters; a migration under way follows.
    pub fn set_timeouts(&self, timeouts: Timeouts) {
        let mut state = self.lock();
        state.watch.set_timeouts(timeouts);
        state.parameters.timeouts = timeouts;
        drop(state);
        self.changed.notify_all();
    }

    /// What those have to know who wait on its connections.
    pub(crate) fn waits(&self) -> Arc<Watch> {
        self.lock().watch.clone()
    }

    /// The capabilities.
    pub fn capabilities(&self) -> Capabilities {
        self.lock().capabilities
    }

    /// Sets the capabilities.
    ///
    /// # Errors
    /// [`Refused::InProgress`] while a migration is under way.
    pub fn set_capabilities(&self, capabilities: Capabilities) -> Result<(), Refused> {
        let mut state = self.lock();
        if state.statistics.status.is_running() {
            return Err(Refused::InProgress);
        }
        state.capabilities = capabilities;
        Ok(())
    }

    /// Secures the connections that are opened from now on, or no longer does so. It is for sockets; a source needs the
    /// credentials of a client, a destination those of a server.
    pub fn set_tls(&self, tls: Option<Tls>) {
        self.lock().tls = tls;
    }

    /// How connections are secured.
    pub fn tls(&self) -> Option<Tls> {
        self.lock().tls.clone()
    }

    /// The machine's UUID, if it was given one: page channels begin with it, and so does a stream with capability
    /// `validate-uuid`. A destination with another does not take the guest.
    pub fn set_uuid(&self, uuid: Option<Uuid>) {
        self.lock().uuid = uuid;
    }

    /// The UUID.
    pub fn uuid(&self) -> Option<Uuid> {
        self.lock().uuid
    }

    /// Begins a migration: forgets the one before, and claims the job.
    ///
    /// # Errors
    /// [`Refused::InProgress`] while one is under way.
    pub fn begin(&self) -> Result<(), Refused> {
        self.begin_if(|_| Ok(()))
    }

    /// As [`begin`](Job::begin), if `legal` agrees, which is given the status. Nothing begins or ends meanwhile, so
    /// that what it finds still holds when the migration has begun; it must not use the job. If it refuses, the last
    /// migration stays what it was.
    ///
    /// # Errors
    /// [`Refused::InProgress`] while one is under way, and what `legal` says.
    pub fn begin_if(&self, legal: impl FnOnce(Status) -> Result<(), Refused>) -> Result<(), Refused> {
        let mut state = self.lock();
        if state.statistics.status.is_running() {
            return Err(Refused::InProgress);
        }
        legal(state.statistics.status)?;
        state.statistics = Statistics { status: Status::Setup, ..Statistics::default() };
        (state.cancel, state.may_continue, state.postcopy, state.handed_over) = (false, false, false, false);
        (state.paused, state.given_up, state.next) = (false, false, None);
        state.channels = Vec::new();
        state.began = Some(Instant::now());
        state.enter(Status::Setup);
        drop(state);
        self.tell();
        Ok(())
    }

    /// Cancels the migration, if one is under way. It takes effect at once, even if the channel is stuck; not any more
    /// when the destination has taken over.
    ///
    /// # Errors
    /// [`Refused::PostcopyInProgress`] when the guest goes before its memory.
    pub fn cancel(&self) -> Result<(), Refused> {
        let mut state = self.lock();
        let status = state.statistics.status;
        if status.is_postcopy() {
            return Err(Refused::PostcopyInProgress);
        }
        if state.handed_over || status == Status::Cancelling || !status.is_running() {
            return Ok(());
        }
        state.cancel = true;
        state.enter(Status::Cancelling);
        let channels = state.channels.clone();
        drop(state);
        self.changed.notify_all();
        self.tell();
        channels.iter().for_each(|channel| channel.close());
        Ok(())
    }

    /// Breaks the connections of a migration off, as if the network had done it (QMP's `yank`): it fails or, in
    /// postcopy, is paused. Without connections it does nothing.
    pub fn disconnect(&self) {
        let channels = self.lock().channels.clone();
        channels.iter().for_each(|channel| channel.close());
    }

    /// Lets a migration go on that waits before the switchover (capability `pause-before-switchover`).
    ///
    /// # Errors
    /// [`Refused::NotInState`] if it does not wait there.
    pub fn continue_switchover(&self) -> Result<(), Refused> {
        let mut state = self.lock();
        if state.statistics.status != Status::PreSwitchover {
            return Err(Refused::NotInState(state.statistics.status));
        }
        state.may_continue = true;
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Lets the guest go before its memory does (`migrate-start-postcopy`), as soon as the destination listens. Where
    /// no migration is under way any more, it has no effect, as in QEMU.
    ///
    /// # Errors
    /// [`Refused::PostcopyOff`] without capability `postcopy-ram`, [`Refused::NotStarted`] if no migration was begun.
    pub fn start_postcopy(&self) -> Result<(), Refused> {
        let mut state = self.lock();
        if !state.capabilities.postcopy_ram {
            return Err(Refused::PostcopyOff);
        }
        if state.statistics.status == Status::None {
            return Err(Refused::NotStarted);
        }
        state.postcopy = true;
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Whether the operator wants the guest to go before its memory.
    pub(crate) fn wants_postcopy(&self) -> bool {
        self.lock().postcopy
    }

    /// Waits until no migration is under way, and gives the statistics.
    pub fn wait(&self) -> Statistics {
        let mut state = self.lock();
        while state.statistics.status.is_running() {
            self.changed.wait(&mut state);
        }
        state.statistics.clone()
    }

    /// Gives the channels that [`cancel`](Job::cancel) closes.
    pub(crate) fn attach<'c>(
        &self,
        channels: impl IntoIterator<Item = &'c Arc<dyn Channel>>,
    ) -> Result<(), MigrationError> {
        let mut state = self.lock();
        state.channels = channels.into_iter().cloned().collect();
        state.check()
    }

    /// From here on it is too late to cancel: the destination has taken over.
    pub(crate) fn handed_over(&self) -> Result<(), MigrationError> {
        let mut state = self.lock();
        state.check()?;
        state.handed_over = true;
        Ok(())
    }

    pub(crate) fn check(&self) -> Result<(), MigrationError> {
        self.lock().check()
    }

    /// Waits, and returns early if cancelled or if settings change.
    pub(crate) fn sleep(&self, time: Duration) -> Result<(), MigrationError> {
        let mut state = self.lock();
        state.check()?;
        self.changed.wait_for(&mut state, time);
        state.check()
    }

    /// Whether `migrate-continue` was given; waits for it up to `patience`.
    pub(crate) fn wait_for_continue(&self, patience: Duration) -> Result<bool, MigrationError> {
        let mut state = self.lock();
        let waiting = |state: &mut State| !state.may_continue && !state.cancel;
        self.changed.wait_while_for(&mut state, waiting, patience);
        state.check()?;
        Ok(state.may_continue)
    }

    /// Changes the status, unless the migration was cancelled.
    pub(crate) fn advance(&self, status: Status) -> Result<(), MigrationError> {
        let mut state = self.lock();
        state.check()?;
        state.enter(status);
        drop(state);
        self.changed.notify_all();
        self.tell();
        Ok(())
    }

    /// Ends the migration.
    pub fn end(&self, error: Option<&MigrationError>) {
        let mut state = self.lock();
        let status = match error {
            None => Status::Completed,
            // The guest does not go on here as after a migration that was cancelled in time.
            Some(MigrationError::Unsettled { .. } | MigrationError::PostcopyBroken { .. }) => Status::Failed,
            Some(_) if state.cancel => Status::Cancelled,
            Some(_) => Status::Failed,
        };
        state.statistics.error = match status {
            Status::Failed => error.map(ToString::to_string),
            Status::Cancelled if matches!(error, Some(MigrationError::Connect { .. })) => {
                error.map(ToString::to_string)
            }
            // QEMU's words.
            Status::Cancelled if state.statistics.stopped_at.is_some() => Some("Switchover is interrupted".into()),
            _ => None,
        };
        state.statistics.status = status;
        state.statistics.total_time = state.elapsed();
        state.channels = Vec::new();
        if status == Status::Failed {
            // Clearing up is over here when the engine says that it has failed; a watcher still sees the word.
            state.notices.push_back(Notice::Status(Status::Failing));
        }
        state.notices.push_back(Notice::Status(status));
        drop(state);
        self.changed.notify_all();
        self.tell();
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Statistics)) {
        change(&mut self.lock().statistics);
    }

    pub(crate) fn notify(&self, notice: Notice) {
        self.lock().notices.push_back(notice);
        self.tell();
    }

    /// Tells the watcher what happened, in the order in which it did: what other threads have noted before, too.
    fn tell(&self) {
        let watcher = self.watcher.lock();
        loop {
            // The watcher may use the job.
            let Some(notice) = self.lock().notices.pop_front() else { return };
            if let Some(watcher) = &*watcher {
                watcher(notice);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    fn enter(&mut self, status: Status) {
        self.statistics.status = status;
        self.watch.set_status(status);
        self.notices.push_back(Notice::Status(status));
    }

    fn elapsed(&self) -> Duration {
        self.began.map_or(Duration::ZERO, |began| began.elapsed())
    }

    fn check(&self) -> Result<(), MigrationError> {
        if self.cancel { Err(MigrationError::Cancelled) } else { Ok(()) }
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("statistics", &self.lock().statistics).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn notices_come_in_the_order_of_what_happened() {
        let (job, told) = (Job::default(), Arc::new(Mutex::new(Vec::new())));
        let list = told.clone();
        job.watch(move |notice| list.lock().push(notice));
        for _ in 0..2000 {
            job.begin().unwrap();
            // An engine that sees the cancelling at once, and ends before it has been told of.
            thread::scope(|scope| {
                scope.spawn(|| {
                    while job.status() != Status::Cancelling {}
                    job.end(Some(&MigrationError::Cancelled));
                });
                job.cancel().unwrap();
            });
            let expected = [Status::Setup, Status::Cancelling, Status::Cancelled].map(Notice::Status);
            assert_eq!(std::mem::take(&mut *told.lock()), expected);
        }
    }
}
