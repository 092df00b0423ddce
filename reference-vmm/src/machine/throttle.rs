//! Slowing vCPUs down: each in turn runs for a while and is then paused for a while.

use super::throttle_gate::ThrottleGate;
use super::vcpu::Vcpu;
use crate::error::{Error, Result};
use parking_lot::{Condvar, Mutex};
use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long a vCPU runs between two pauses (QEMU 11.1).
const TIMESLICE: Duration = Duration::from_millis(10);
/// The most, in per cent, that a vCPU is paused (QEMU 11.1).
pub const MAX_THROTTLE: u8 = 99;

/// Slows all vCPUs of a machine down alike. At first it does not.
#[derive(Default)]
pub(crate) struct Throttle {
    gate: Arc<ThrottleGate>,
    setting: Arc<Setting>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Setting {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    per_cent: u8,
    end: bool,
}

impl Throttle {
    pub(crate) fn gate(&self) -> &Arc<ThrottleGate> {
        &self.gate
    }

    /// Pauses the vCPUs for this many per cent of their time; 0 lets them run, and more than
    /// [`MAX_THROTTLE`] is as much as that.
    pub(crate) fn set(&self, per_cent: u8, vcpus: &Arc<[Vcpu]>) -> Result<()> {
        let mut thread = self.thread.lock();
        let mut state = self.setting.state.lock();
        state.per_cent = per_cent.min(MAX_THROTTLE);
        if per_cent == 0 {
            self.gate.release();
        }
        drop(state);
        self.setting.changed.notify_all();
        if per_cent > 0 && thread.is_none() {
            let (gate, setting, vcpus) = (self.gate.clone(), self.setting.clone(), vcpus.clone());
            let handle = std::thread::Builder::new()
                .name("throttle".into())
                .spawn(move || setting.run(&gate, &vcpus))
                .map_err(|cause| Error::Host { what: "start the thread that slows vCPUs down", cause })?;
            *thread = Some(handle);
        }
        Ok(())
    }

    /// In per cent.
    pub(crate) fn per_cent(&self) -> u8 {
        self.setting.state.lock().per_cent
    }

    /// Ends its thread: afterwards no vCPU is kicked any more.
    pub(crate) fn end(&self) {
        self.setting.state.lock().end = true;
        self.setting.changed.notify_all();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that slows vCPUs down panicked");
        }
    }
}

impl Setting {
    /// Pauses the vCPUs once a period, until it is told to end.
    fn run(&self, gate: &ThrottleGate, vcpus: &[Vcpu]) {
        let mut state = self.state.lock();
        while !state.end {
            if state.per_cent == 0 {
                gate.release();
                self.changed.wait(&mut state);
                continue;
            }
            let (period, pause) = duty_cycle(state.per_cent);
            gate.request_pause(pause);
            vcpus.iter().for_each(Vcpu::kick);
            self.changed.wait_for(&mut state, period);
        }
        gate.release();
    }
}

/// From one pause to the next, and the length of a pause.
fn duty_cycle(per_cent: u8) -> (Duration, Duration) {
    let running = u32::from(100 - per_cent.min(MAX_THROTTLE));
    (TIMESLICE * 100 / running, TIMESLICE * per_cent.min(MAX_THROTTLE).into() / running)
}

impl fmt::Debug for Throttle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Throttle").field("per_cent", &self.per_cent()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_runs_a_timeslice_between_pauses() {
        for per_cent in 1..=MAX_THROTTLE {
            let (period, pause) = duty_cycle(per_cent);
            let runs = (period - pause).as_micros();
            assert!((9_999..=10_001).contains(&runs), "{per_cent}: {runs} us");
            let share = pause.as_secs_f64() / period.as_secs_f64() * 100.0;
            assert!((share - f64::from(per_cent)).abs() < 0.01, "{per_cent}: {share}");
        }
        assert_eq!(duty_cycle(100), duty_cycle(MAX_THROTTLE));
    }
}
