//! How fast a running guest dirties memory: QMP's `calc-dirty-rate` and `query-dirty-rate` (QMP reference of QEMU
//! 11.1).
//!
//! [`Gauge`] measures in a thread of its own and keeps the last result. Sampling looks at a few pages twice and needs
//! nothing else. Measuring by the dirty log uses the machine's one log, which a migration needs more: it ends the
//! measurement early, and what was counted until then counts.

use crate::{DirtyLog, Guest, GuestError, RamView};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::hash_map::DefaultHasher;
use std::hash::Hasher;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use vm_memory::Bytes;

/// Shortest and longest measurement.
const TIME: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(60);
/// Sampled pages per GiB.
const SAMPLE_PAGES: std::ops::RangeInclusive<u64> = 128..=16_384;
/// Sampled pages per GiB where nothing else is asked for.
pub const DEFAULT_SAMPLE_PAGES: u64 = 512;
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// How to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Mode {
    /// `page-sampling`: a few pages are compared with what they were.
    #[default]
    PageSampling,
    /// `dirty-bitmap`: the dirty log is read at the end; of a machine without dirty rings.
    DirtyBitmap,
    /// `dirty-ring`: what each vCPU lists in its dirty ring is counted (6.2).
    DirtyRing,
}

impl Mode {
    /// QEMU's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::PageSampling => "page-sampling",
            Mode::DirtyBitmap => "dirty-bitmap",
            Mode::DirtyRing => "dirty-ring",
        }
    }
}

/// State of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum State {
    /// There is no result: none was asked for, or the last one failed.
    #[default]
    Unstarted,
    /// It goes on.
    Measuring,
    /// There is a result.
    Measured,
}

impl State {
    /// QEMU's name.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Unstarted => "unstarted",
            State::Measuring => "measuring",
            State::Measured => "measured",
        }
    }
}

/// The last measurement.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// Its state.
    pub state: State,
    /// MiB per second, when it has been measured.
    pub rate: Option<u64>,
    /// MiB per second of each vCPU, where dirty rings told it.
    pub vcpus: Vec<u64>,
    /// When it began, in seconds since 1970.
    pub start_time: u64,
    /// For how long it was to go on.
    pub time: Duration,
    /// How it was measured.
    pub mode: Mode,
    /// Sampled pages per GiB; 0 where none are sampled.
    pub sample_pages: u64,
}

/// A measurement that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// Too short or too long.
    #[error("Calculation time is out of range [50ms, 60000ms].")]
    Time,
    /// Too few or too many pages.
    #[error("sample-pages is out of range[128, 16384].")]
    SamplePages,
    /// A number of pages, where none are sampled.
    #[error("sample-pages is used only in page-sampling mode")]
    NothingSampled,
    /// The machine tracks dirty pages in another way.
    #[error("mode {} is not enabled, use other method instead.", .0.as_str())]
    NotEnabled(Mode),
    /// One goes on.
    #[error("the dirty rate is already being measured.")]
    Measuring,
}

/// Measures, one at a time.
#[derive(Debug, Default)]
pub struct Gauge {
    report: Mutex<Report>,
    log: Gate,
}

impl Gauge {
    /// Claims the gauge for a measurement, which [`measure`](Gauge::measure) then makes. `dirty_rings` says how the
    /// machine tracks dirty pages.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn begin(
        &self,
        time: Duration,
        mode: Mode,
        sample_pages: Option<u64>,
        dirty_rings: bool,
    ) -> Result<(), Refused> {
        let mut report = self.lock();
        if report.state == State::Measuring {
            return Err(Refused::Measuring);
        }
        if !TIME.contains(&time) {
            return Err(Refused::Time);
        }
        let sample_pages = match (mode, sample_pages) {
            (Mode::PageSampling, pages) => pages.unwrap_or(DEFAULT_SAMPLE_PAGES),
            (Mode::DirtyBitmap | Mode::DirtyRing, None) => 0,
            (Mode::DirtyBitmap | Mode::DirtyRing, Some(_)) => return Err(Refused::NothingSampled),
        };
        if mode == Mode::PageSampling && !SAMPLE_PAGES.contains(&sample_pages) {
            return Err(Refused::SamplePages);
        }
        if mode != Mode::PageSampling && (mode == Mode::DirtyRing) != dirty_rings {
            return Err(Refused::NotEnabled(mode));
        }
        let start_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        *report = Report { state: State::Measuring, start_time, time, mode, sample_pages, ..Report::default() };
        Ok(())
    }

    /// Measures as [`begin`](Gauge::begin) was told, which takes that time. `start_log` starts the machine's dirty log;
    /// `written` says how many pages each vCPU writes to in a time, which it takes.
    pub fn measure<'g>(
        &self,
        guest: &dyn Guest,
        start_log: impl FnOnce() -> Result<Box<dyn DirtyLog + 'g>, GuestError>,
        written: impl FnOnce(Duration) -> Result<Vec<u64>, GuestError>,
    ) {
        let Report { time, mode, sample_pages, .. } = self.report();
        let mut vcpus = Vec::new();
        let measured = match mode {
            Mode::PageSampling => Ok(sample(&guest.ram(), sample_pages, time)),
            Mode::DirtyBitmap => self.count(guest, time, start_log),
            Mode::DirtyRing => written(time).map(|pages| {
                vcpus = pages.into_iter().map(|pages| rate(pages * PAGE, time)).collect();
                vcpus.iter().sum()
            }),
        };
        let mut report = self.lock();
        report.vcpus = vcpus;
        match measured {
            Ok(rate) => (report.state, report.rate) = (State::Measured, Some(rate)),
            Err(error) => {
                tracing::warn!("the dirty rate cannot be measured: {error}");
                report.state = State::Unstarted;
            }
        }
    }

    /// The last measurement.
    pub fn report(&self) -> Report {
        self.lock().clone()
    }

    /// Takes the machine's dirty log for a migration: a measurement that uses it ends.
    pub fn take_log(&self) -> LogClaim<'_> {
        self.log.take(true)
    }

    fn count<'g>(
        &self,
        guest: &dyn Guest,
        time: Duration,
        start_log: impl FnOnce() -> Result<Box<dyn DirtyLog + 'g>, GuestError>,
    ) -> Result<u64, GuestError> {
        let claim = self.log.take(false);
        let start = Instant::now();
        let mut log = start_log()?;
        // All pages may count as dirty at first.
        let mut reported = Vec::new();
        log.read(&mut |block, word, _| reported.push((block, word as u64)))?;
        let pages: Vec<u64> = guest.ram().iter().map(|block| block.memory.len() as u64 / PAGE).collect();
        for (block, word) in reported {
            log.reset(block, word * 64..((word + 1) * 64).min(pages[block]))?;
        }
        claim.wait(time.saturating_sub(start.elapsed()));
        let mut dirty = 0;
        log.read(&mut |_, _, bits| dirty += u64::from(bits.count_ones()))?;
        Ok(rate(dirty * PAGE, start.elapsed()))
    }

    fn lock(&self) -> MutexGuard<'_, Report> {
        self.report.lock()
    }
}

/// Who has the machine's dirty log.
#[derive(Debug, Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    taken: bool,
    /// Migrations that wait for it.
    waiting: usize,
}

impl Gate {
    fn take(&self, urgent: bool) -> LogClaim<'_> {
        let mut state = self.lock();
        state.waiting += usize::from(urgent);
        self.changed.notify_all();
        while state.taken {
            self.changed.wait(&mut state);
        }
        state.waiting -= usize::from(urgent);
        state.taken = true;
        LogClaim(self)
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock()
    }
}

/// The right to use the machine's dirty log.
#[derive(Debug)]
pub struct LogClaim<'g>(&'g Gate);

impl LogClaim<'_> {
    /// Waits, but not longer than until a migration wants the log.
    fn wait(&self, time: Duration) {
        let unwanted = |state: &mut GateState| state.waiting == 0;
        self.0.changed.wait_while_for(&mut self.0.lock(), unwanted, time);
    }
}

impl Drop for LogClaim<'_> {
    fn drop(&mut self) {
        self.0.lock().taken = false;
        self.0.changed.notify_all();
    }
}

/// Compares some pages before and after `time`, and reckons from these to all.
fn sample(blocks: &[RamView<'_>], pages_per_gib: u64, time: Duration) -> u64 {
    let start = Instant::now();
    let total: u64 = blocks.iter().map(|block| block.memory.len() as u64).sum();
    let count = (total * pages_per_gib).div_ceil(1 << 30).max(1);
    // Evenly spread, with a stride that is odd in pages, so that it falls into no pattern of the guest's.
    let stride = (total / PAGE / count).max(1) | 1;
    let places: Vec<u64> = (0..count).map(|i| i * stride).take_while(|page| page * PAGE < total).collect();
    let prints = || places.iter().map(|page| print(blocks, page * PAGE)).collect::<Vec<_>>();
    let before = prints();
    std::thread::sleep(time.saturating_sub(start.elapsed()));
    let elapsed = start.elapsed();
    let dirty = prints().iter().zip(&before).filter(|(after, before)| after != before).count() as u64;
    rate(dirty * total / before.len().max(1) as u64, elapsed)
}

/// A hash of the page at `offset`, counted over all blocks.
fn print(blocks: &[RamView<'_>], mut offset: u64) -> u64 {
    let mut page = [0; PAGE as usize];
    for block in blocks {
        let len = block.memory.len() as u64;
        if offset < len {
            // A page that cannot be read stays the same.
            let _ = block.memory.read_slice(&mut page, offset as usize);
            break;
        }
        offset -= len;
    }
    let mut hasher = DefaultHasher::new();
    hasher.write(&page);
    hasher.finish()
}

fn rate(bytes: u64, time: Duration) -> u64 {
    (bytes as f64 / MIB as f64 / time.as_secs_f64().max(1e-3)).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let gauge = Gauge::default();
        let second = Duration::from_secs(1);
        assert_eq!(gauge.begin(Duration::from_millis(49), Mode::PageSampling, None, false), Err(Refused::Time));
        assert_eq!(gauge.begin(Duration::from_secs(61), Mode::DirtyBitmap, None, false), Err(Refused::Time));
        assert_eq!(gauge.begin(second, Mode::PageSampling, Some(127), false), Err(Refused::SamplePages));
        assert_eq!(gauge.begin(second, Mode::PageSampling, Some(16_385), false), Err(Refused::SamplePages));
        assert_eq!(gauge.begin(second, Mode::DirtyBitmap, Some(512), false), Err(Refused::NothingSampled));
        assert_eq!(gauge.begin(second, Mode::DirtyRing, None, false), Err(Refused::NotEnabled(Mode::DirtyRing)));
        let bitmap = gauge.begin(second, Mode::DirtyBitmap, None, true);
        assert_eq!(bitmap, Err(Refused::NotEnabled(Mode::DirtyBitmap)));
        assert_eq!(gauge.report(), Report::default());
        assert_eq!(gauge.begin(second, Mode::DirtyBitmap, None, false), Ok(()));
        assert_eq!(gauge.report().state, State::Measuring);
        assert_eq!(gauge.begin(second, Mode::DirtyBitmap, None, false), Err(Refused::Measuring));
    }

    #[test]
    fn a_migration_takes_the_log_from_a_measurement() {
        let gauge = Gauge::default();
        std::thread::scope(|scope| {
            let claim = gauge.log.take(false);
            let migration = scope.spawn(|| drop(gauge.take_log()));
            let start = Instant::now();
            claim.wait(Duration::from_secs(600));
            assert!(start.elapsed() < Duration::from_secs(300));
            assert!(!migration.is_finished());
            drop(claim);
        });
        assert!(!gauge.log.lock().taken);
    }

    #[test]
    fn rates_are_per_second() {
        assert_eq!(rate(10 * MIB, Duration::from_millis(500)), 20);
        assert_eq!(rate(0, Duration::ZERO), 0);
    }
}
