//! A machine that runs the payload guest, and what it prints.

use parking_lot::{Condvar, Mutex};
use reference_vmm::machine::{Machine, MachineConfig};
use reference_vmm::payload::{FW_CFG_NAME, Progress};
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Ends a test that hangs. Tests judge progress and never the speed of a machine, so this is far above what anything
/// takes on a slow and busy one.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

pub(crate) struct Guest {
    pub(crate) machine: Machine,
    pub(crate) console: Console,
}

impl Guest {
    /// A paused machine with the payload and this configuration of it.
    pub(crate) fn new(memory: u64, cpus: usize, payload: &str) -> Guest {
        Guest::configured(memory, cpus, payload, |_| ())
    }

    /// The same with the interrupt controllers in the monitor, or in the kernel.
    pub(crate) fn with(memory: u64, cpus: usize, payload: &str, split_irqchip: bool) -> Guest {
        Guest::configured(memory, cpus, payload, |config| config.split_irqchip = split_irqchip)
    }

    /// The same with dirty rings of this many entries.
    pub(crate) fn with_rings(memory: u64, cpus: usize, payload: &str, dirty_ring_size: u32) -> Guest {
        Guest::configured(memory, cpus, payload, |config| config.dirty_ring_size = dirty_ring_size)
    }

    /// The same with a change of the machine.
    pub(crate) fn configured(
        memory: u64,
        cpus: usize,
        payload: &str,
        change: impl FnOnce(&mut MachineConfig),
    ) -> Guest {
        let console = Console::default();
        let mut config = MachineConfig {
            memory,
            cpus,
            fw_cfg: [(FW_CFG_NAME.to_owned(), payload.as_bytes().to_vec())].into(),
            dirty_ring_size: dirty_ring_size(),
            serial: Box::new(console.clone()),
            ..MachineConfig::default()
        };
        change(&mut config);
        Guest { machine: Machine::new(config).unwrap(), console }
    }

    /// The same, running, its first progress line printed.
    pub(crate) fn boot(memory: u64, cpus: usize, payload: &str) -> Guest {
        let guest = Guest::new(memory, cpus, payload);
        guest.machine.resume().unwrap();
        guest.wait_until(|_| true);
        guest
    }

    /// Waits for a progress line that was printed from now on and satisfies `wanted`.
    pub(crate) fn wait_until(&self, wanted: impl Fn(&Progress) -> bool) -> Progress {
        let from = self.console.lines().len();
        self.console.wait_for("progress", |lines| {
            lines.get(from..)?.iter().filter_map(|line| Progress::parse(line)).find(|progress| wanted(progress))
        })
    }

    /// The last completed pass of each vCPU, from the guest's own blocks (layout.S).
    pub(crate) fn passes(&self) -> Vec<u64> {
        let pass = |vcpu: usize| {
            let mut bytes = [0; 8];
            self.machine.memory().read(0x5008 + 0x200 * vcpu as u64, &mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        (0..self.machine.cpus()).map(pass).collect()
    }

    /// Waits until every vCPU has gone over all its hot pages.
    pub(crate) fn wait_for_passes(&self) {
        let before = self.passes();
        // The pass that a vCPU is in may be almost over.
        let done = || self.passes().iter().zip(&before).all(|(now, before)| *now >= before + 2);
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < PATIENCE, "the guest hangs: {}", self.console.text());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets the guest check all its pages, and asserts that it found nothing wrong.
    pub(crate) fn assert_healthy(&self) {
        let before = self.wait_until(|_| true);
        self.wait_for_passes();
        // The round that is under way may have begun before the moment that is to be judged.
        let cpus = self.machine.cpus() as u64;
        let after = self.wait_until(|p| p.rounds > before.rounds + cpus && p.ticks > before.ticks);
        assert_eq!((after.stale, after.tsc_back), (0, 0), "{}", self.console.text());
        assert!(after.ms > before.ms && after.written > before.written);
        for bad in ["trap", "stale-page", "error"] {
            assert!(!self.console.text().contains(bad), "{}", self.console.text());
        }
    }
}

/// `QEVM_DIRTY_RING_SIZE`: with it the tests are about dirty rings. `make lab` sets it, for a paravirtual KVM may lose
/// pages with rings.
pub(crate) fn dirty_ring_size() -> u32 {
    let size = std::env::var("QEVM_DIRTY_RING_SIZE").ok();
    size.map_or(0, |size| size.parse().expect("QEVM_DIRTY_RING_SIZE is a number"))
}

/// What the serial port printed.
#[derive(Clone, Default)]
pub(crate) struct Console(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Console {
    /// What was printed, as far as a reader of a failed test wants to see it.
    pub(crate) fn text(&self) -> String {
        shortened(&self.0.0.lock())
    }

    /// Everything that was printed.
    pub(crate) fn raw(&self) -> Vec<u8> {
        self.0.0.lock().clone()
    }

    /// The complete lines.
    pub(crate) fn lines(&self) -> Vec<String> {
        complete(&self.0.0.lock())
    }

    /// Waits until `find` finds something in the complete lines.
    pub(crate) fn wait_for<T>(&self, what: &str, find: impl Fn(&[String]) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut bytes = self.0.0.lock();
        loop {
            if let Some(found) = find(&complete(&bytes)) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no {what} within {PATIENCE:?}: {}", shortened(&bytes));
            self.0.1.wait_for(&mut bytes, left);
        }
    }

    pub(crate) fn wait_for_line(&self, start: &str) -> String {
        self.wait_for(start, |lines| lines.iter().find(|line| line.starts_with(start)).cloned())
    }
}

fn shortened(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<_> = text.lines().collect();
    let telling = |line: &&&str| !line.starts_with("qevm-payload pass=");
    let (head, tail) = lines.split_at(lines.len().saturating_sub(8));
    let head = head.iter().take(3).chain(head.iter().skip(3).filter(telling));
    head.chain(&["…"]).chain(tail).fold(String::new(), |text, line| text + "\n" + line)
}

fn complete(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')).map(str::to_owned).collect()
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.0.lock().extend(bytes);
        if bytes.contains(&b'\n') {
            self.0.1.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
