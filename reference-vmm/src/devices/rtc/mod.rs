//! The real-time clock with its CMOS memory (Motorola MC146818 data sheet), with the state that QEMU's section
//! `mc146818rtc` carries.
//!
//! The device itself is a function of the host's time: [`Rtc::catch_up`] brings its flags to a given moment, and
//! [`Rtc::next_event`] says when something will happen on its own. [`ticker`] makes a thread of these two.

mod calendar;
pub(crate) mod ticker;

use calendar::{Registers, registers_of, seconds_from};
use qevm_microvm::state::RtcState;

const SECONDS: u8 = 0;
const SECONDS_ALARM: usize = 1;
const MINUTES_ALARM: usize = 3;
const HOURS_ALARM: usize = 5;
const YEAR: u8 = 9;
const A: usize = 0x0a;
const B: usize = 0x0b;
const C: usize = 0x0c;
const D: usize = 0x0d;
/// The century, where PCs keep it.
const CENTURY: usize = 0x32;

const A_UPDATE: u8 = 1 << 7;
const A_DIVIDER: u8 = 0x70;
/// The divider runs from a 32.768 kHz crystal.
const A_DIVIDER_ON: u8 = 0x20;
const A_RATE: u8 = 0x0f;
const B_SET: u8 = 1 << 7;
const B_SQUARE_WAVE: u8 = 1 << 3;
const FLAG_PERIODIC: u8 = 1 << 6;
const FLAG_ALARM: u8 = 1 << 5;
const FLAG_UPDATE: u8 = 1 << 4;
const C_IRQ: u8 = 1 << 7;
const D_VALID: u8 = 1 << 7;
/// Alarm registers from here on match any value.
const ALARM_ANY: u8 = 0xc0;

const NANOSECONDS: i128 = 1_000_000_000;
const CRYSTAL: i128 = 32_768;
/// How long before a second begins the update is announced.
const UPDATE_TIME: i128 = 244_000;

/// The device.
pub struct Rtc {
    state: RtcState,
    /// Up to when the flags of register C are right, ns of the host's time.
    caught_up: i128,
    interrupt: Box<dyn FnMut(bool) + Send>,
    level: bool,
}

impl Rtc {
    /// A clock that shows the host's time, `now` in ns since 1970, in a machine with `ram` bytes of memory. `interrupt`
    /// is told each change of the interrupt line.
    pub fn new(now: i128, ram: u64, interrupt: Box<dyn FnMut(bool) + Send>) -> Rtc {
        let mut state =
            RtcState { base_rtc: (now / NANOSECONDS) as u64, last_update: now as u64, ..RtcState::default() };
        state.offset = (now % NANOSECONDS) as i64;
        state.cmos[A] = A_DIVIDER_ON | 6;
        state.cmos[B] = calendar::B_24_HOURS;
        state.cmos[D] = D_VALID;
        sizes(&mut state.cmos, ram);
        Rtc { state, caught_up: now, interrupt, level: false }
    }

    /// A read of the data port at time `now`. The index port cannot be read.
    pub fn read(&mut self, now: i128) -> u8 {
        self.catch_up(now);
        let index = usize::from(self.state.cmos_index);
        match index {
            0..=9 | CENTURY => {
                self.show(now);
                self.state.cmos[index]
            }
            A => {
                let to_second = NANOSECONDS - self.guest_time(now).rem_euclid(NANOSECONDS);
                let updating = self.ticks() && to_second <= UPDATE_TIME;
                self.state.cmos[A] & !A_UPDATE | if updating { A_UPDATE } else { 0 }
            }
            C => {
                let flags = std::mem::take(&mut self.state.cmos[C]);
                self.update_line();
                flags
            }
            _ => self.state.cmos[index],
        }
    }

    /// A write to the index port.
    pub fn select(&mut self, index: u8) {
        self.state.cmos_index = index & 0x7f;
    }

    /// A write to the data port at time `now`.
    pub fn write(&mut self, value: u8, now: i128) {
        self.catch_up(now);
        let index = self.state.cmos_index;
        match usize::from(index) {
            SECONDS_ALARM | MINUTES_ALARM | HOURS_ALARM => self.state.cmos[usize::from(index)] = value,
            0..=9 | CENTURY => {
                self.show(now);
                self.state.cmos[usize::from(index)] = value;
                if self.ticks() {
                    self.set_time(now);
                }
            }
            A => {
                self.show(now);
                self.state.cmos[A] = value & !A_UPDATE;
            }
            B => {
                self.show(now);
                let was_set = self.state.cmos[B] & B_SET != 0;
                // While it is set the time is stopped and no update ends.
                self.state.cmos[B] = if value & B_SET != 0 { value & !FLAG_UPDATE } else { value };
                if was_set && value & B_SET == 0 {
                    self.set_time(now);
                }
            }
            C | D => {}
            other => self.state.cmos[other] = value,
        }
        self.update_line();
    }

    /// Raises the flags of everything that has happened up to `now`.
    pub fn catch_up(&mut self, now: i128) {
        let from = self.caught_up;
        if now <= from {
            return;
        }
        self.caught_up = now;
        if let Some(period) = self.period() {
            let beats = |time: i128| (time * CRYSTAL / NANOSECONDS).div_euclid(period);
            if beats(now) > beats(from) {
                self.state.cmos[C] |= FLAG_PERIODIC;
            }
        }
        if self.ticks() {
            let second = |time| self.guest_time(time).div_euclid(NANOSECONDS);
            let (before, after) = (second(from), second(now));
            if after > before {
                self.state.cmos[C] |= FLAG_UPDATE;
            }
            if self.next_alarm(before).is_some_and(|alarm| alarm <= after) {
                self.state.cmos[C] |= FLAG_ALARM;
            }
        }
        self.update_line();
    }

    /// When an interrupt that the guest has enabled is due next, ns of the host's time.
    pub fn next_event(&self) -> Option<i128> {
        let (enabled, now) = (self.state.cmos[B], self.caught_up);
        let periodic = self.period().filter(|_| enabled & FLAG_PERIODIC != 0).map(|period| {
            let beat = (now * CRYSTAL / NANOSECONDS).div_euclid(period) + 1;
            // Rounded up: at that moment the beat has come.
            (beat * period * NANOSECONDS + CRYSTAL - 1).div_euclid(CRYSTAL)
        });
        let second = self.guest_time(now).div_euclid(NANOSECONDS);
        let at = |second: i128| now + second * NANOSECONDS - self.guest_time(now);
        let update = (enabled & FLAG_UPDATE != 0 && self.ticks()).then(|| at(second + 1));
        let alarm = self.next_alarm(second).filter(|_| enabled & FLAG_ALARM != 0 && self.ticks()).map(at);
        [periodic, update, alarm].into_iter().flatten().min()
    }

    /// Registers, memory and time.
    pub fn save(&mut self, now: i128) -> RtcState {
        self.catch_up(now);
        self.show(now);
        let mut state = self.state.clone();
        let enabled = |flag| state.cmos[B] & flag != 0;
        state.period = self.period().filter(|_| enabled(FLAG_PERIODIC)).unwrap_or(0) as u32;
        state.next_periodic = self.next_periodic(now);
        let second = self.guest_time(now).div_euclid(NANOSECONDS);
        let at = |second: i128| (now + second * NANOSECONDS - self.guest_time(now)) as u64;
        state.next_update = self.ticks().then(|| at(second + 1));
        state.next_alarm = self.next_alarm(second).map_or(0, at);
        state
    }

    /// Takes over registers, memory and time; `now` as in [`Rtc::read`].
    pub fn load(&mut self, state: &RtcState, now: i128) {
        self.state = state.clone();
        self.caught_up = now;
        self.level = false;
        self.update_line();
    }

    /// The machine is reset: interrupts are off and none is pending, time and memory stay (data sheet, "RESET").
    pub fn reset(&mut self) {
        self.state.cmos[B] &= !(FLAG_PERIODIC | FLAG_ALARM | FLAG_UPDATE | B_SQUARE_WAVE);
        self.state.cmos[C] = 0;
        self.update_line();
    }

    fn next_periodic(&self, now: i128) -> Option<u64> {
        let period = self.period().filter(|_| self.state.cmos[B] & FLAG_PERIODIC != 0)?;
        let beat = (now * CRYSTAL / NANOSECONDS).div_euclid(period) + 1;
        Some((beat * period * NANOSECONDS).div_euclid(CRYSTAL) as u64)
    }

    /// Whether the time goes on.
    fn ticks(&self) -> bool {
        self.state.cmos[B] & B_SET == 0 && self.state.cmos[A] & A_DIVIDER == A_DIVIDER_ON
    }

    /// Ticks of the crystal from one periodic interrupt to the next.
    fn period(&self) -> Option<i128> {
        let rate = self.state.cmos[A] & A_RATE;
        match rate {
            _ if self.state.cmos[A] & A_DIVIDER != A_DIVIDER_ON => None,
            0 => None,
            // Two rates that the data sheet gives the periods of 8 and 9.
            1 | 2 => Some(1 << (rate + 6)),
            _ => Some(1 << (rate - 1)),
        }
    }

    /// The guest's time in ns since 1970.
    fn guest_time(&self, now: i128) -> i128 {
        let RtcState { base_rtc, last_update, offset, .. } = self.state;
        i128::from(base_rtc) * NANOSECONDS + now - i128::from(last_update) + i128::from(offset)
    }

    /// Brings the registers of the time to what it is, unless it is stopped.
    fn show(&mut self, now: i128) {
        if self.ticks() {
            let seconds = self.guest_time(now).div_euclid(NANOSECONDS);
            let Registers { fields, century } = registers_of(seconds as i64, self.state.cmos[B]);
            for (register, value) in [0, 2, 4, 6, 7, 8, 9].into_iter().zip(fields) {
                debug_assert!((SECONDS..=YEAR).contains(&register));
                self.state.cmos[usize::from(register)] = value;
            }
            self.state.cmos[CENTURY] = century;
        }
    }

    /// Takes the time from the registers.
    fn set_time(&mut self, now: i128) {
        let cmos = &self.state.cmos;
        let fields = [0, 2, 4, 6, 7, 8, 9].map(|register: usize| cmos[register]);
        let registers = Registers { fields, century: cmos[CENTURY] };
        self.state.base_rtc = seconds_from(&registers, cmos[B]).max(0) as u64;
        self.state.last_update = now as u64;
        self.state.offset = 0;
    }

    /// The first second after `second` that the alarm matches, within a day.
    fn next_alarm(&self, second: i128) -> Option<i128> {
        let wanted = [SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM].map(|register| self.state.cmos[register]);
        let b = self.state.cmos[B];
        let matches = |time: i128| {
            let [s, m, h, ..] = registers_of(time as i64, b).fields;
            wanted.iter().zip([s, m, h]).all(|(wanted, is)| *wanted >= ALARM_ANY || *wanted == is)
        };
        // At most a day of seconds, minute by minute where seconds cannot match.
        let day = 24 * 60 * 60;
        let step = if wanted[0] >= ALARM_ANY { 1 } else { 60 };
        let first = (second + 1..=second + step)
            .find(|time| step == 1 || registers_of(*time as i64, b).fields[0] == wanted[0])?;
        (0..=day / step).map(|n| first + n * step).find(|time| matches(*time))
    }

    fn update_line(&mut self) {
        let enabled = FLAG_PERIODIC | FLAG_ALARM | FLAG_UPDATE;
        let [b, c] = [self.state.cmos[B], self.state.cmos[C] & enabled];
        let level = b & c != 0;
        self.state.cmos[C] = c | if level { C_IRQ } else { 0 };
        if level != self.level {
            self.level = level;
            (self.interrupt)(level);
        }
    }
}

/// The sizes of memory where a PC's firmware looks for them.
fn sizes(cmos: &mut [u8; 128], ram: u64) {
    const BASE_KIB: u16 = 640;
    let mut put = |at: usize, value: u64| cmos[at..at + 2].copy_from_slice(&(value.min(0xffff) as u16).to_le_bytes());
    let low = ram.min(crate::memory::LOW_RAM_MAX);
    put(0x15, BASE_KIB.into());
    let extended = (low.saturating_sub(1 << 20) >> 10).min(0xffff);
    put(0x17, extended);
    put(0x30, extended);
    put(0x34, low.saturating_sub(16 << 20) >> 16);
    let high = ram.saturating_sub(crate::memory::LOW_RAM_MAX) >> 16;
    cmos[0x5b..0x5e].copy_from_slice(&high.to_le_bytes()[..3]);
}

#[cfg(test)]
mod tests;
