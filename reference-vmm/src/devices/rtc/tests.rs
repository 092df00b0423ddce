use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const S: i128 = NANOSECONDS;
/// 21 November 2026, 23:59:54 UTC.
const NOW: i128 = 1_795_305_594 * S + S / 4;

fn rtc() -> (Rtc, Arc<AtomicU32>) {
    let raised = Arc::new(AtomicU32::new(0));
    let count = raised.clone();
    let interrupt = move |level| {
        if level {
            count.fetch_add(1, Ordering::Relaxed);
        }
    };
    (Rtc::new(NOW, 128 << 20, Box::new(interrupt)), raised)
}

fn read(rtc: &mut Rtc, register: u8, now: i128) -> u8 {
    rtc.select(register);
    rtc.read(now)
}

fn write(rtc: &mut Rtc, register: u8, value: u8, now: i128) {
    rtc.select(register);
    rtc.write(value, now);
}

#[test]
fn it_shows_the_host_time_and_goes_on() {
    let (mut rtc, _) = rtc();
    let shown = |rtc: &mut Rtc, now| [4, 2, 0].map(|register| read(rtc, register, now));
    assert_eq!(shown(&mut rtc, NOW), [0x23, 0x59, 0x54]);
    assert_eq!(shown(&mut rtc, NOW + 6 * S), [0x00, 0x00, 0x00]);
    assert_eq!([7, 8, 9, 0x32].map(|register| read(&mut rtc, register, NOW)), [0x21, 0x11, 0x26, 0x20]);
    assert_eq!(read(&mut rtc, 0x0d, NOW), 0x80);
    assert_eq!([0x34, 0x35].map(|register| read(&mut rtc, register, NOW)), [0x00, 0x07], "112 MiB beyond 16");
}

#[test]
fn the_guest_sets_the_time() {
    let (mut rtc, _) = rtc();
    write(&mut rtc, 0x0b, 0x82, NOW);
    for (register, value) in [(0, 0x30), (2, 0x15), (4, 0x03), (7, 0x01), (8, 0x02), (9, 0x99), (0x32, 0x19)] {
        write(&mut rtc, register, value, NOW);
    }
    assert_eq!(read(&mut rtc, 0, NOW + 10 * S), 0x30, "it is stopped");
    write(&mut rtc, 0x0b, 0x02, NOW + 10 * S);
    assert_eq!([4, 2, 0, 9].map(|register| read(&mut rtc, register, NOW + 41 * S)), [0x03, 0x16, 0x01, 0x99]);
}

#[test]
fn the_update_is_announced() {
    let (mut rtc, _) = rtc();
    let second = NOW + S * 3 / 4;
    assert_eq!(read(&mut rtc, 0x0a, second - 300_000), 0x26);
    assert_eq!(read(&mut rtc, 0x0a, second - 100_000), 0xa6);
    assert_eq!(read(&mut rtc, 0x0a, second), 0x26);
}

#[test]
fn periodic_interrupts_come_at_their_rate_and_wait_for_register_c() {
    let (mut rtc, raised) = rtc();
    // Rate 6: 1024 Hz.
    write(&mut rtc, 0x0b, 0x42, NOW);
    let mut now = NOW;
    for n in 1..=100 {
        let due = rtc.next_event().unwrap();
        assert!(due > now && due <= now + S / 1024 + 1, "{n}");
        rtc.catch_up(due - 1);
        assert_eq!(raised.load(Ordering::Relaxed), n - 1);
        rtc.catch_up(due);
        assert_eq!(raised.load(Ordering::Relaxed), n);
        assert_eq!(read(&mut rtc, 0x0c, due), 0xc0);
        assert_eq!(read(&mut rtc, 0x0c, due), 0);
        now = due;
    }
}

#[test]
fn alarm_and_update_interrupt() {
    let (mut rtc, raised) = rtc();
    write(&mut rtc, 1, 0x02, NOW);
    write(&mut rtc, 3, 0x00, NOW);
    write(&mut rtc, 5, 0xff, NOW);
    write(&mut rtc, 0x0b, 0x22, NOW);
    // 00:00:02, 7.75 s from now.
    assert_eq!(rtc.next_event(), Some(NOW + S * 31 / 4));
    rtc.catch_up(NOW + S * 31 / 4);
    assert_eq!(raised.load(Ordering::Relaxed), 1);
    assert_eq!(read(&mut rtc, 0x0c, NOW + S * 31 / 4), 0xf0, "all flags rise, enabled or not");
    write(&mut rtc, 0x0b, 0x12, NOW + 8 * S);
    assert_eq!(rtc.next_event(), Some(NOW + S * 35 / 4));
}

#[test]
fn a_saved_clock_goes_on_elsewhere() {
    let (mut here, _) = rtc();
    write(&mut here, 0x0b, 0x52, NOW);
    here.select(0x0c);
    let state = here.save(NOW + S);
    assert_eq!((state.cmos_index, state.period), (0x0c, 32));
    assert_eq!(state.next_update, Some((NOW + S * 7 / 4) as u64));
    let (mut there, raised) = rtc();
    there.load(&state, NOW + 2 * S);
    assert_eq!(read(&mut there, 0, NOW + 2 * S), 0x56);
    assert!(there.next_event().is_some_and(|due| due <= NOW + 2 * S + S / 1024 + 1));
    assert_eq!(raised.load(Ordering::Relaxed), 1, "a flag that was up raises the line");
}

#[test]
fn a_reset_takes_interrupts_and_leaves_the_time() {
    let (mut rtc, raised) = rtc();
    write(&mut rtc, 0x0b, 0x82, NOW);
    write(&mut rtc, 4, 0x03, NOW);
    write(&mut rtc, 0x60, 0x77, NOW);
    write(&mut rtc, 0x0b, 0x7a, NOW);
    rtc.catch_up(NOW + 2 * S);
    assert!(raised.load(Ordering::Relaxed) > 0);
    rtc.reset();
    assert_eq!((read(&mut rtc, 0x0b, NOW + 2 * S), read(&mut rtc, 0x0c, NOW + 2 * S)), (0x02, 0));
    assert_eq!(rtc.next_event(), None);
    assert_eq!([4, 0x60].map(|register| read(&mut rtc, register, NOW + 2 * S)), [0x03, 0x77]);
}
