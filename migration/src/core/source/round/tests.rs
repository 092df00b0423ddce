//! A device that alone is in the way of the switchover, in virtual time.

use super::super::*;
use crate::core::DeviceOptions;
use qevm_wire::{Profile, QemuVersion};

const PAGES: u64 = 4096;
/// What the guest writes to, and how much of it in a millisecond: in a pause almost as much as the device has.
const HOT: u64 = 300;
const WRITTEN: u64 = 3;
const BYTES_PER_MICROSECOND: u64 = 200;
const SHRINK: Duration = Duration::from_millis(5000);

/// What was seen until the guest was paused.
struct Seen {
    paused: Duration,
    questions: u64,
    readings: u64,
}

/// The device has 1 GiB to send when the guest has stopped, and 1 MiB from the shrink on; each question takes `asking`.
fn wait_for_shrink(shrink: Duration, asking: Duration) -> Seen {
    let options = SourceOptions {
        devices: vec![DeviceOptions::new(CountedString::new("0000:00:04.0/vfio").unwrap())],
        ..SourceOptions::new(
            Profile::new(QemuVersion::NEWEST, "microvm"),
            "microvm",
            vec![("microvm.ram".into(), PAGES * 4096)],
        )
    };
    let mut core = SourceCore::new(options, Parameters { max_bandwidth: 0, ..Parameters::default() });
    let (mut now, mut read_at) = (Duration::ZERO, Duration::ZERO);
    let (mut questions, mut readings) = (0, 0);
    loop {
        assert!(now < 2 * shrink, "it is not noticed");
        now += Duration::from_micros(50);
        match core.poll(now, None) {
            Action::Pause => return Seen { paused: now, questions, readings },
            Action::End(result) => panic!("{result:?}"),
            Action::ReadLog => {
                let written = if readings == 0 { PAGES } else { HOT.min(WRITTEN * (now - read_at).as_millis() as u64) };
                for word in 0..written.div_ceil(64) {
                    core.found(0, word as usize, u64::MAX >> (64 - (written - word * 64).min(64)));
                }
                (read_at, readings) = (now, readings + 1);
            }
            Action::AskDevices { exact } => {
                if exact {
                    questions += 1;
                    now += asking;
                }
                let size = if now < shrink { 1 << 30 } else { 1 << 20 };
                let exact = exact.then_some(Pending { precopy: 0, stopcopy: size });
                core.device_sizes(vec![DeviceSize { exact, ..DeviceSize::default() }]);
            }
            Action::Send { .. } => send(&mut core, &mut now, 0),
            Action::Pages(batch) => {
                let pages = batch.runs.iter().map(|run| run.pages.end - run.pages.start).sum();
                send(&mut core, &mut now, pages);
            }
            Action::MeasureBacklog { .. } => core.backlog(0),
            Action::Wait { until, .. } => now = now.max(until.expect("it waits for ever")),
            _ => {}
        }
    }
}

fn send(core: &mut SourceCore, now: &mut Duration, pages: u64) {
    let bytes = core.stream().take().len() as u64 + pages * 4096;
    *now += Duration::from_micros(bytes / BYTES_PER_MICROSECOND);
    core.sent(Sent { bytes, normal: pages, zero: 0, ..Sent::default() });
}

#[test]
fn a_device_that_shrinks_is_let_go_within_a_second_and_asked_seldom_until_then() {
    for asking in [Duration::ZERO, Duration::from_millis(100)] {
        // At any moment between two questions.
        for later in (0..700).step_by(35) {
            let shrink = SHRINK + Duration::from_millis(later);
            let Seen { paused, questions, readings } = wait_for_shrink(shrink, asking);
            let late = paused.saturating_sub(shrink);
            assert!(paused >= shrink && late <= Duration::from_millis(950), "{late:?} after {shrink:?}");
            let seconds = paused.as_secs_f64();
            assert!(questions as f64 <= 20.0 * seconds, "{questions} questions in {paused:?}");
            assert!(readings as f64 <= 20.0 * seconds, "{readings} readings of the log in {paused:?}");
        }
    }
}
