//! Who starts and stops the guest.

use super::{Cause, Event, Reboot, RunState, Vmm, legality};
use crate::machine::Stop;
use qevm_migration::{GuestError, monotonic_now};
use std::time::Duration;

impl Vmm {
    /// Whether the guest runs, and why not.
    pub fn run_state(&self) -> RunState {
        let state = self.lock();
        match self.machine.wait_stop(Duration::ZERO) {
            Some(Stop::Failed { .. } | Stop::MemoryLost(_)) => RunState::InternalError,
            Some(Stop::Shutdown) => RunState::Shutdown,
            Some(Stop::Reset { .. }) | None => state.run_state,
        }
    }

    /// `CLOCK_MONOTONIC` when the guest was last started.
    pub fn started_at(&self) -> Option<Duration> {
        self.lock().started_at
    }

    /// Stops the guest. Before an incoming migration has arrived, it makes the guest stay stopped then.
    pub fn stop(&self) {
        if self.lock().run_state == RunState::Inmigrate {
            self.lock().autostart = false;
        } else if self.pause_as(RunState::Paused).0 {
            tracing::debug!("stopped on request");
        }
    }

    /// Starts the guest. Before an incoming migration has arrived, it makes the guest start then.
    ///
    /// # Errors
    /// A guest that has stopped for good, that can only be kept, or that is being handed over to a destination.
    pub fn cont(&self) -> Result<(), GuestError> {
        let _transition = self.transition();
        legality::check(legality::CONT, &self.situation())?;
        if self.lock().given_away {
            return Err(
                "the guest runs in another process, in this memory (cpr-transfer): it cannot run here as well".into()
            );
        }
        self.machine.can_run()?;
        if let Some(stop @ Stop::MemoryLost(_)) = self.machine.wait_stop(Duration::ZERO) {
            return Err(stop.to_string().into());
        }
        if matches!(self.run_state(), RunState::Shutdown | RunState::InternalError) {
            return Err("Resetting the Virtual Machine is required".into());
        }
        if self.lock().run_state == RunState::Inmigrate {
            self.lock().autostart = true;
            return Ok(());
        }
        self.start_now()
    }

    pub(super) fn start(&self) -> Result<(), GuestError> {
        let _transition = self.transition();
        self.start_now()
    }

    /// For who holds the transition.
    fn start_now(&self) -> Result<(), GuestError> {
        let state = self.lock();
        // At the end of the monitor a migration that is cancelled must not start the guest once more.
        if state.run_state == RunState::Running || state.exit.is_some() {
            return Ok(());
        }
        let before = state.run_state;
        drop(state);
        let mut told = false;
        let resumed = self.machine.resume_and_tell(|| {
            let mut state = self.lock();
            state.started_at = Some(monotonic_now());
            state.run_state = RunState::Running;
            state.saved = false;
            drop(state);
            self.emit(Event::now("RESUME", None));
            told = true;
        });
        if resumed.is_err() && told {
            self.lock().run_state = before;
            self.emit(Event::now("STOP", None));
        }
        Ok(resumed?)
    }

    /// Stops the vCPUs. Says whether they ran, and why the guest cannot go on if it has stopped by itself.
    pub(super) fn pause_as(&self, run_state: RunState) -> (bool, Option<Stop>) {
        let _transition = self.transition();
        self.pause_now(run_state)
    }

    /// As [`pause_as`](Vmm::pause_as); a guest that is stopped already is being handed over from here on, too.
    pub(super) fn pause_for_migration(&self) -> (bool, Option<Stop>) {
        let _transition = self.transition();
        let before = self.lock().run_state;
        let paused = self.pause_now(RunState::FinishMigrate);
        let mut state = self.lock();
        (state.before_migration, state.run_state) = (before, RunState::FinishMigrate);
        paused
    }

    /// For who holds the transition.
    fn pause_now(&self, run_state: RunState) -> (bool, Option<Stop>) {
        self.machine.pause();
        let was_running = self.lock().run_state == RunState::Running;
        let mut stop = self.machine.wait_stop(Duration::ZERO).filter(|_| was_running);
        if matches!(stop, Some(Stop::Reset { .. })) && self.actions().reboot == Reboot::Reset {
            // It was asked for before, and must not be lost.
            self.reset_paused(Cause::GuestReset);
            stop = None;
        }
        if was_running {
            self.lock().run_state = run_state;
            self.emit(Event::now("STOP", None));
        }
        (was_running, stop)
    }
}
