//! The pauses of single vCPUs: what their threads look at.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Until when vCPUs pause.
pub(crate) struct Pauses {
    start: Instant,
    /// In nanoseconds from the start on, by vCPU; 0: it does not pause.
    until: Box<[AtomicU64]>,
}

/// A vCPU pauses until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pause {
    until: u64,
    /// The time that is left of it.
    pub(crate) left: Duration,
}

impl Pauses {
    pub(super) fn new(vcpus: usize) -> Pauses {
        Pauses { start: Instant::now(), until: (0..vcpus).map(|_| AtomicU64::new(0)).collect() }
    }

    /// The pause that the vCPU is to make now.
    pub(crate) fn due(&self, vcpu: usize) -> Option<Pause> {
        let until = self.until[vcpu].load(Ordering::Relaxed);
        // Most of the time there is none, and then the clock is not read.
        if until == 0 {
            return None;
        }
        let left = Duration::from_nanos(until).checked_sub(self.now())?;
        (!left.is_zero()).then_some(Pause { until, left })
    }

    /// Whether it is not that pause any more.
    pub(crate) fn has_changed(&self, vcpu: usize, pause: Pause) -> bool {
        self.until[vcpu].load(Ordering::Relaxed) != pause.until
    }

    pub(super) fn set(&self, vcpu: usize, until: Option<Duration>) {
        self.until[vcpu].store(until.map_or(0, |until| until.as_nanos() as u64), Ordering::Relaxed);
    }

    pub(super) fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use std::sync::Arc;

    use super::*;
    use crate::machine::run_control::RunControl;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Plays a vCPU's thread into a pause of an hour, and does something about it.
    fn ends_a_pause(by: impl FnOnce(&RunControl, &Pauses)) {
        let (control, pauses) = (Arc::new(RunControl::new(1)), Arc::new(Pauses::new(1)));
        pauses.set(0, Some(Duration::from_secs(3600)));
        let (tell, told) = channel();
        let vcpu = {
            let (control, pauses) = (control.clone(), pauses.clone());
            std::thread::spawn(move || {
                assert!(control.park());
                let pause = pauses.due(0).expect("an hour");
                assert!(pause.left > Duration::from_secs(3000));
                tell.send("it pauses").unwrap();
                control.wait_while_running(pause.left, || pauses.has_changed(0, pause));
                tell.send("it goes on").unwrap();
                control.park();
            })
        };
        control.resume().unwrap();
        assert_eq!(told.recv_timeout(PATIENCE), Ok("it pauses"));
        by(&control, &pauses);
        assert_eq!(told.recv_timeout(PATIENCE), Ok("it goes on"));
        control.exit();
        vcpu.join().unwrap();
    }

    #[test]
    fn stop_and_quit_do_not_wait_for_a_pause() {
        ends_a_pause(|control, _| control.pause(|| ()));
        ends_a_pause(|control, _| control.exit());
    }

    #[test]
    fn a_limit_that_is_taken_back_or_raised_ends_its_pause() {
        for until in [None, Some(Duration::from_nanos(1))] {
            ends_a_pause(|control, pauses| {
                pauses.set(0, until);
                assert_eq!(pauses.due(0), None);
                control.wake();
            });
        }
    }
}
