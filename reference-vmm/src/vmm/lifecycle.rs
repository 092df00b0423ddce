//! Starting anew and switching off: what the guest and others ask of the machine as a whole.
//!
//! A thread of its own does it, as QEMU's main loop does, because neither a vCPU's thread nor a QMP client can wait for
//! the vCPUs.

use super::{Actions, Cause, Event, Exit, Reboot, RunState, Shutdown, Vmm};
use crate::machine::Stop;
use qevm_migration::Status;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

/// How often a reset that waits for the end of a handover looks for it.
const HANDOVER_POLL: Duration = Duration::from_millis(10);

impl Vmm {
    /// Makes the guest's stops and `system_reset` take effect, until the monitor is gone.
    pub(super) fn attend_when_asked(self: &Arc<Self>, asked: mpsc::Receiver<()>) {
        let asks = self.asks.clone();
        // What is sent while the monitor ends is not read.
        self.machine.watch_stops(move || _ = asks.send(()));
        let weak = Arc::downgrade(self);
        thread::spawn(move || {
            while asked.recv().is_ok() {
                let Some(vmm) = weak.upgrade() else { return };
                vmm.attend();
            }
        });
    }

    /// What the monitor does when the guest stops by itself.
    pub fn actions(&self) -> Actions {
        self.lock().actions
    }

    /// Sets that.
    pub fn set_actions(&self, actions: Actions) {
        self.lock().actions = actions;
    }

    /// Resets the machine soon, as by a reset button, whatever it does: a guest that runs starts anew, any other stays
    /// stopped.
    pub fn system_reset(&self) {
        self.lock().reset_wanted = true;
        let _ = self.asks.send(());
    }

    /// Presses the power button: a guest that runs may switch itself off, or not.
    pub fn system_powerdown(&self) {
        let _transition = self.transition();
        self.machine.press_power_button();
        self.emit(Event::now("POWERDOWN", None));
    }

    fn attend(&self) {
        // A guest that is switched off has been told of already.
        let news = self.lock().run_state != RunState::Shutdown;
        match self.machine.wait_stop(Duration::ZERO).filter(|_| news) {
            Some(Stop::Reset { .. }) => self.reboot(Cause::GuestReset),
            Some(Stop::Shutdown) => self.shut_down(Cause::GuestShutdown),
            Some(stop @ Stop::Failed { .. }) => self.end(Exit::GuestStopped(stop)),
            // The caller decides whether the monitor ends.
            Some(Stop::MemoryLost(_)) | None => {}
        }
        if std::mem::take(&mut self.lock().reset_wanted) {
            self.reboot(Cause::HostQmpSystemReset);
        }
    }

    fn reboot(&self, cause: Cause) {
        if self.actions().reboot == Reboot::Shutdown {
            return self.shut_down(cause);
        }
        let mut transition = self.transition();
        // The destination may have the guest already; what becomes of it here is decided first.
        while self.lock().saved && self.outgoing.status().is_running() {
            drop(transition);
            thread::sleep(HANDOVER_POLL);
            transition = self.transition();
        }
        if self.lock().given_away {
            return tracing::warn!("the guest has left and runs in this memory (cpr-transfer): it is not reset here");
        }
        let stop = self.machine.wait_stop(Duration::ZERO);
        if cause == Cause::GuestReset && !matches!(stop, Some(Stop::Reset { .. })) {
            // Done meanwhile, by the thread that stopped the guest.
            return;
        }
        self.machine.pause();
        let state = self.lock();
        let goes_on = state.run_state == RunState::Running && state.exit.is_none();
        drop(state);
        if self.reset_paused(cause)
            && goes_on
            && let Err(error) = self.machine.resume()
        {
            tracing::error!("the guest was reset and cannot go on: {error}");
            self.lock().run_state = RunState::Paused;
            self.emit(Event::now("STOP", None));
        }
    }

    /// Resets the paused machine; false if that failed, which is the end.
    pub(super) fn reset_paused(&self, cause: Cause) -> bool {
        // RAM is the source's as long as the guest has not come.
        let state = self.lock();
        let load = state.run_state != RunState::Inmigrate || state.loaded;
        drop(state);
        match self.machine.reset(load) {
            Ok(()) => {
                let mut state = self.lock();
                // A migration goes on from where it is.
                if !matches!(state.run_state, RunState::Running | RunState::FinishMigrate | RunState::Inmigrate) {
                    state.run_state = RunState::Prelaunch;
                }
                drop(state);
                self.emit(cause.event("RESET"));
                true
            }
            Err(error) => {
                self.end(Exit::ResetFailed(error.to_string()));
                false
            }
        }
    }

    fn shut_down(&self, cause: Cause) {
        let transition = self.transition();
        if self.actions().shutdown == Shutdown::Poweroff {
            drop(transition);
            let stop = self.machine.wait_stop(Duration::ZERO);
            return self.end(Exit::ShutDown { cause, stop });
        }
        self.emit(cause.event("SHUTDOWN"));
        self.machine.pause();
        let mut state = self.lock();
        let was_running = state.run_state == RunState::Running;
        state.run_state = RunState::Shutdown;
        drop(state);
        if was_running {
            self.emit(Event::now("STOP", None));
        }
    }

    /// Stops everything for the end of the monitor, and the guest does not run when this returns. A migration whose
    /// destination may have the guest already is waited for, any other is cancelled.
    pub fn leave(&self) {
        if self.outgoing.status() != Status::Device {
            // One that has gone before its memory cannot be brought back: it gets that first.
            let _ = self.outgoing.cancel();
        }
        self.outgoing.wait();
        let _transition = self.transition();
        self.machine.pause();
    }

    /// Tells of the end, if it is one that is told of.
    pub(super) fn tell_of_end(&self, exit: &Exit) {
        let cause = match exit {
            Exit::Quit => Cause::HostQmpQuit,
            Exit::Signal { .. } => Cause::HostSignal,
            Exit::ShutDown { cause, .. } => *cause,
            Exit::IncomingFailed(_) | Exit::GuestStopped(_) | Exit::ResetFailed(_) => return,
        };
        self.emit(cause.event("SHUTDOWN"));
    }
}
