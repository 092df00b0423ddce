//! The 8254 timer (Intel 82C54 data sheet) on the machine's virtual clock.

use crate::devices::ticker::Timed;
use qevm_microvm::state::{PitChannelState, PitState};
use std::ops::{Deref, DerefMut};

/// Hz.
const FREQUENCY: i128 = 1_193_182;
const NANOSECONDS: i128 = 1_000_000_000;
/// Port of channel 0.
const PORT: u16 = 0x40;
const CONTROL: u8 = 3;
/// `flags`: the interrupt of channel 0 goes elsewhere.
const IRQ_DISABLED: u32 = 1;
const FULL_COUNT: u32 = 0x1_0000;

const ONE_SHOT: u8 = 1;
const RATE_GENERATOR: u8 = 2;
const SQUARE_WAVE: u8 = 3;
const SOFTWARE_STROBE: u8 = 4;
const HARDWARE_STROBE: u8 = 5;

/// How a channel is read and written (bits 4 and 5 of the control word, and states of a word's two bytes).
const LOW: u8 = 1;
const HIGH: u8 = 2;
const WORD: u8 = 3;
const WORD_SECOND: u8 = 4;

const OUTPUT_BIT: u8 = 1 << 7;

/// The device.
pub(crate) struct Pit {
    channels: [Channel; 3],
    flags: u32,
    interrupt: Box<dyn FnMut(bool) + Send>,
    /// Output of channel 0 as the interrupt controllers know it.
    level: bool,
    /// Edges of channel 0 up to here were told.
    told: i64,
}

impl Pit {
    /// After reset. `interrupt` is told what channel 0 puts out.
    pub(crate) fn new(interrupt: Box<dyn FnMut(bool) + Send>) -> Pit {
        let channel = |gate| {
            Channel(PitChannelState { mode: SQUARE_WAVE, gate, count: FULL_COUNT, ..PitChannelState::default() })
        };
        Pit { channels: [channel(1), channel(1), channel(0)], flags: 0, interrupt, level: true, told: 0 }
    }

    /// A read of port 0x40 to 0x43. `None`: the port is not the device's.
    pub(crate) fn read(&mut self, port: u16, now: i64) -> Option<u8> {
        let channel = usize::from(port.checked_sub(PORT).filter(|register| *register <= u16::from(CONTROL))?);
        Some(self.channels.get_mut(channel).map_or(0, |channel| channel.read(now)))
    }

    /// A write to port 0x40 to 0x43. False: the port is not the device's.
    pub(crate) fn write(&mut self, port: u16, value: u8, now: i64) -> bool {
        match port.checked_sub(PORT) {
            Some(register) if register < u16::from(CONTROL) => {
                if self.channels[usize::from(register)].write(value, now) && register == 0 {
                    self.told = now;
                    self.set(self.channels[0].output(now));
                }
            }
            Some(register) if register == u16::from(CONTROL) => self.control(value, now),
            _ => return false,
        }
        true
    }

    pub(crate) fn save(&self) -> PitState {
        PitState { channels: self.channels.each_ref().map(|channel| channel.0.clone()), flags: self.flags }
    }

    pub(crate) fn load(&mut self, state: &PitState, now: i64) {
        self.channels = state.channels.clone().map(Channel);
        self.flags = state.flags;
        self.told = now;
        self.level = false;
        self.set(self.channels[0].output(now));
    }

    fn control(&mut self, value: u8, now: i64) {
        let selected = usize::from(value >> 6);
        let Some(channel) = self.channels.get_mut(selected) else {
            // Read back: bit 5 clear latches counts, bit 4 clear the status, of the channels in bits 1 to 3.
            for (i, channel) in self.channels.iter_mut().enumerate().filter(|(i, _)| value >> 1 & 1 << i != 0) {
                if value & 1 << 5 == 0 {
                    channel.latch_count(now);
                }
                if value & 1 << 4 == 0 && channel.status_latched == 0 {
                    let output = if channel.output(now) { OUTPUT_BIT } else { 0 };
                    channel.status = output | channel.rw_mode << 4 | channel.mode << 1 | channel.bcd;
                    channel.status_latched = 1;
                }
                tracing::trace!(channel = i, "PIT read back");
            }
            return;
        };
        let access = value >> 4 & 3;
        if access == 0 {
            channel.latch_count(now);
            return;
        }
        let mode = value >> 1 & 7;
        channel.rw_mode = access;
        channel.read_state = access;
        channel.write_state = access;
        // Modes 6 and 7 are 2 and 3.
        channel.mode = if mode > HARDWARE_STROBE { mode - 4 } else { mode };
        channel.bcd = value & 1;
        if selected == 0 {
            // No count yet: modes 0 starts low, all others high.
            self.set(self.channels[0].mode != 0);
        }
    }

    fn set(&mut self, level: bool) {
        if level != self.level && self.flags & IRQ_DISABLED == 0 {
            (self.interrupt)(level);
        }
        self.level = level;
    }
}

impl Timed for Pit {
    fn next_event(&self) -> Option<i128> {
        self.channels[0].next_rise(self.told).map(i128::from)
    }

    fn catch_up(&mut self, now: i128) {
        // However many rises were missed, the controllers can only remember one.
        self.set(false);
        self.set(true);
        self.told = now as i64;
    }
}

/// One of its three channels.
struct Channel(PitChannelState);

impl Deref for Channel {
    type Target = PitChannelState;
    fn deref(&self) -> &PitChannelState {
        &self.0
    }
}

impl DerefMut for Channel {
    fn deref_mut(&mut self) -> &mut PitChannelState {
        &mut self.0
    }
}

impl Channel {
    /// Ticks since the count was loaded.
    fn ticks(&self, now: i64) -> i128 {
        i128::from(now.saturating_sub(self.count_load_time)).max(0) * FREQUENCY / NANOSECONDS
    }

    /// Never 0.
    fn period(&self) -> i128 {
        if self.count == 0 { FULL_COUNT.into() } else { self.count.into() }
    }

    fn count_now(&self, now: i64) -> u16 {
        let (ticks, period) = (self.ticks(now), self.period());
        let count = match self.mode {
            RATE_GENERATOR => period - ticks % period,
            // It counts down by two, twice in each period.
            SQUARE_WAVE => period - 2 * ticks % period,
            _ => (period - ticks) & 0xffff,
        };
        count as u16
    }

    fn output(&self, now: i64) -> bool {
        let (ticks, period) = (self.ticks(now), self.period());
        match self.mode {
            0 => ticks >= period,
            ONE_SHOT => ticks < period,
            RATE_GENERATOR => ticks % period != period - 1,
            SQUARE_WAVE => ticks % period < (period + 1) / 2,
            _ => ticks != period,
        }
    }

    /// When the output rises next after `after`, in ns of the virtual clock.
    fn next_rise(&self, after: i64) -> Option<i64> {
        let (ticks, period) = (self.ticks(after), self.period());
        let rise = match self.mode {
            RATE_GENERATOR | SQUARE_WAVE => (ticks / period + 1) * period,
            0 | ONE_SHOT if ticks < period => period,
            SOFTWARE_STROBE | HARDWARE_STROBE if ticks <= period => period + 1,
            _ => return None,
        };
        let time = i128::from(self.count_load_time) + (rise * NANOSECONDS).div_euclid(FREQUENCY) + 1;
        i64::try_from(time).ok()
    }

    fn latch_count(&mut self, now: i64) {
        if self.count_latched == 0 {
            self.latched_count = self.count_now(now);
            self.count_latched = self.rw_mode;
        }
    }

    fn read(&mut self, now: i64) -> u8 {
        if self.status_latched != 0 {
            self.status_latched = 0;
            return self.status;
        }
        let [low, high] = self.latched_count.to_le_bytes();
        match self.count_latched {
            LOW => {
                self.count_latched = 0;
                return low;
            }
            HIGH => {
                self.count_latched = 0;
                return high;
            }
            WORD => {
                self.count_latched = HIGH;
                return low;
            }
            _ => {}
        }
        let [low, high] = self.count_now(now).to_le_bytes();
        match self.read_state {
            HIGH => high,
            WORD => {
                self.read_state = WORD_SECOND;
                low
            }
            WORD_SECOND => {
                self.read_state = WORD;
                high
            }
            _ => low,
        }
    }

    /// True when the count is complete and starts.
    fn write(&mut self, value: u8, now: i64) -> bool {
        let count = match self.write_state {
            HIGH => u16::from(value) << 8,
            WORD => {
                self.write_latch = value;
                self.write_state = WORD_SECOND;
                return false;
            }
            WORD_SECOND => {
                self.write_state = WORD;
                u16::from_le_bytes([self.write_latch, value])
            }
            _ => value.into(),
        };
        self.count = if count == 0 { FULL_COUNT } else { count.into() };
        self.count_load_time = now;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    const MS: i64 = 1_000_000;

    fn pit() -> (Pit, Receiver<bool>) {
        let (levels, line) = channel();
        (Pit::new(Box::new(move |level| levels.send(level).unwrap())), line)
    }

    fn program(pit: &mut Pit, control: u8, count: u16, now: i64) {
        pit.write(0x43, control, now);
        count.to_le_bytes().into_iter().for_each(|byte| assert!(pit.write(0x40, byte, now)));
    }

    fn count(pit: &mut Pit, now: i64) -> u16 {
        pit.write(0x43, 0x00, now);
        u16::from_le_bytes([pit.read(0x40, now).unwrap(), pit.read(0x40, now).unwrap()])
    }

    #[test]
    fn counts_down_at_its_frequency() {
        let (mut pit, _line) = pit();
        program(&mut pit, 0x30, 0xffff, 5 * MS);
        assert_eq!(count(&mut pit, 5 * MS), 0xffff);
        // 20 ms are 23863.64 ticks.
        assert_eq!(0xffff - count(&mut pit, 25 * MS), 23863);
        program(&mut pit, 0x34, 1000, 0);
        assert_eq!(count(&mut pit, 10 * MS), 1000 - 931, "11931 ticks in rounds of 1000");
        assert_eq!(pit.read(0x44, 0), None);
        assert!(!pit.write(0x3f, 0, 0));
    }

    #[test]
    fn periodic_modes_rise_once_a_period() {
        for control in [0x34, 0x36] {
            let (mut pit, line) = pit();
            // 1193.182 ticks are a millisecond.
            program(&mut pit, control, 11932, 0);
            let mut now = 0;
            for period in 1..=5i64 {
                now = pit.next_event().unwrap();
                assert!((now - i128::from(period * 10 * MS)).abs() < 20_000, "{now}");
                pit.catch_up(now);
            }
            assert_eq!(line.try_iter().filter(|level| *level).count(), 5);
            assert!(pit.next_event().unwrap() > now);
        }
    }

    #[test]
    fn a_one_time_count_rises_once() {
        let (mut pit, line) = pit();
        program(&mut pit, 0x30, 11932, 0);
        assert_eq!(line.try_iter().collect::<Vec<_>>(), [false]);
        let event = pit.next_event().unwrap();
        pit.catch_up(event);
        assert_eq!(line.try_iter().last(), Some(true));
        assert_eq!(pit.next_event(), None);
    }

    #[test]
    fn status_and_count_are_read_back() {
        let (mut pit, _line) = pit();
        program(&mut pit, 0x34, 1000, 0);
        pit.write(0x43, 0xc2, MS / 10);
        assert_eq!(pit.read(0x40, MS), Some(0x80 | 0x34));
        let latched = u16::from_le_bytes([pit.read(0x40, MS).unwrap(), pit.read(0x40, MS).unwrap()]);
        assert_eq!(latched, 1000 - 119);
    }

    #[test]
    fn a_state_goes_on_elsewhere() {
        let (mut pit, _line) = pit();
        program(&mut pit, 0x34, 11932, 3 * MS);
        let (mut other, _line) = self::pit();
        other.load(&pit.save(), 8 * MS);
        assert_eq!(other.next_event(), pit.next_event());
        assert_eq!(count(&mut other, 9 * MS), count(&mut pit, 9 * MS));
    }
}
