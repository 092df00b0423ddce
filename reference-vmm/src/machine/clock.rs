//! The machine's virtual clock: nanoseconds that pass only while the vCPUs run, as QEMU's section `timer` carries them.

/// Nanoseconds of the virtual clock.
#[derive(Debug, Default)]
pub(crate) struct VirtualClock {
    elapsed: i64,
    running_since: Option<i64>,
}

impl VirtualClock {
    pub(crate) fn now(&self) -> i64 {
        self.elapsed + self.running_since.map_or(0, |since| monotonic() - since)
    }

    pub(crate) fn set(&mut self, now: i64) {
        self.elapsed = now;
        self.running_since = self.running_since.map(|_| monotonic());
    }

    pub(crate) fn start(&mut self) {
        self.running_since.get_or_insert_with(monotonic);
    }

    pub(crate) fn stop(&mut self) {
        self.elapsed = self.now();
        self.running_since = None;
    }
}

/// The host's monotonic clock, ns, which KVM's PIT counts in.
pub(crate) fn monotonic() -> i64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stands_still_unless_started() {
        let mut clock = VirtualClock::default();
        assert_eq!(clock.now(), 0);
        clock.start();
        while clock.now() == 0 {}
        clock.stop();
        let stopped = clock.now();
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert_eq!(clock.now(), stopped);
        clock.set(5);
        assert_eq!(clock.now(), 5);
    }
}
