//! The two 8259A interrupt controllers (Intel 8259A data sheet) with the edge/level registers of the EISA
//! specification.

use qevm_microvm::state::PicState;
use std::ops::{Deref, DerefMut};

/// Port of the command register and, one above, of the data register, for each chip.
const PORTS: [u16; 2] = [0x20, 0xa0];
/// Edge/level register of each chip.
const EDGE_LEVEL: [u16; 2] = [0x4d0, 0x4d1];
/// Lines that may be level-triggered: not those of timer, keyboard and cascade, nor those of clock and coprocessor.
const MAY_BE_LEVEL: [u8; 2] = [0xf8, 0xde];
/// The master's line that the slave drives.
const CASCADE: u8 = 2;
/// The line whose vector a request that went away in time gets.
const SPURIOUS: u8 = 7;

const ICW1: u8 = 1 << 4;
const ICW1_NEEDS_ICW4: u8 = 1 << 0;
const ICW1_SINGLE: u8 = 1 << 1;
const OCW3: u8 = 1 << 3;
const OCW3_SELECT_ISR: u8 = 1 << 0;
const OCW3_SELECT: u8 = 1 << 1;
const OCW3_POLL: u8 = 1 << 2;
const OCW3_SPECIAL_MASK: u8 = 1 << 5;
const OCW3_SET_SPECIAL_MASK: u8 = 1 << 6;
const ICW4_AUTO_EOI: u8 = 1 << 1;
const ICW4_FULLY_NESTED: u8 = 1 << 4;

/// What the next write to the data register means (`init_state`).
const MASK: u8 = 0;
const ICW2: u8 = 1;
const ICW3: u8 = 2;
const ICW4: u8 = 3;

/// Both chips.
pub(crate) struct Pics {
    chips: [Pic; 2],
    output: Box<dyn FnMut(bool) + Send>,
    asserted: bool,
}

impl Pics {
    /// After reset. `output` is told each change of the line to the processor.
    pub(crate) fn new(output: Box<dyn FnMut(bool) + Send>) -> Pics {
        let chip = |elcr_mask| Pic(PicState { elcr_mask, ..PicState::default() });
        Pics { chips: MAY_BE_LEVEL.map(chip), output, asserted: false }
    }

    /// Sets them up as a PC's firmware does, with vectors 0x08 and 0x70, and masks every line. After reset they would
    /// let the PIT, which ticks from the start, interrupt with vector 0: a divide error to a kernel that is entered
    /// without firmware and has no use for these chips.
    pub(crate) fn set_up(&mut self) {
        for (base, vectors, cascade) in [(0x20, 0x08, 4), (0xa0, 0x70, 2)] {
            let bytes = [(base, 0x11), (base + 1, vectors), (base + 1, cascade), (base + 1, 0x01), (base + 1, 0xff)];
            for (port, value) in bytes {
                self.write(port, value);
            }
        }
    }

    /// A device raises or lowers line 0 to 15.
    pub(crate) fn set_line(&mut self, line: u8, level: bool) {
        if let Some(chip) = self.chips.get_mut(usize::from(line / 8)) {
            chip.set_line(line % 8, level);
        }
        self.update();
    }

    /// The processor takes the interrupt: its vector.
    pub(crate) fn acknowledge(&mut self) -> u8 {
        let [master, slave] = &mut self.chips;
        let vector = match master.request(true) {
            None => master.irq_base + SPURIOUS,
            Some(CASCADE) => {
                let line = slave.request(false);
                line.into_iter().for_each(|line| slave.acknowledge(line));
                master.acknowledge(CASCADE);
                // The slave takes its request back for a moment, so that another one is an edge.
                master.set_line(CASCADE, false);
                slave.irq_base + line.unwrap_or(SPURIOUS)
            }
            Some(line) => {
                master.acknowledge(line);
                master.irq_base + line
            }
        };
        self.update();
        vector
    }

    /// A read of one of their ports. `None`: it is not theirs.
    pub(crate) fn read(&mut self, port: u16) -> Option<u8> {
        let value = match place(port)? {
            Place::Command(chip) if self.chips[chip].poll != 0 => {
                self.chips[chip].poll = 0;
                let line = self.chips[chip].request(chip == 0);
                line.into_iter().for_each(|line| self.chips[chip].acknowledge(line));
                line.map_or(0, |line| 0x80 | line)
            }
            Place::Command(chip) if self.chips[chip].read_reg_select != 0 => self.chips[chip].isr,
            Place::Command(chip) => self.chips[chip].irr,
            Place::Data(chip) => self.chips[chip].imr,
            Place::EdgeLevel(chip) => self.chips[chip].elcr,
        };
        self.update();
        Some(value)
    }

    /// A write to one of their ports. False: it is not theirs.
    pub(crate) fn write(&mut self, port: u16, value: u8) -> bool {
        match place(port) {
            None => return false,
            Some(Place::Command(chip)) => self.chips[chip].command(value),
            Some(Place::Data(chip)) => self.chips[chip].data(value),
            Some(Place::EdgeLevel(chip)) => self.chips[chip].elcr = value & self.chips[chip].elcr_mask,
        }
        self.update();
        true
    }

    pub(crate) fn save(&self) -> [PicState; 2] {
        self.chips.each_ref().map(|chip| chip.0.clone())
    }

    pub(crate) fn load(&mut self, state: &[PicState; 2]) {
        self.chips = state.clone().map(Pic);
        for (chip, elcr_mask) in self.chips.iter_mut().zip(MAY_BE_LEVEL) {
            chip.elcr_mask = elcr_mask;
        }
        self.update();
    }

    fn update(&mut self) {
        let [master, slave] = &mut self.chips;
        master.set_line(CASCADE, slave.request(false).is_some());
        let asserted = master.request(true).is_some();
        if asserted != self.asserted {
            self.asserted = asserted;
            (self.output)(asserted);
        }
    }
}

enum Place {
    Command(usize),
    Data(usize),
    EdgeLevel(usize),
}

fn place(port: u16) -> Option<Place> {
    (0..2).find_map(|chip| match port {
        port if port == PORTS[chip] => Some(Place::Command(chip)),
        port if port == PORTS[chip] + 1 => Some(Place::Data(chip)),
        port if port == EDGE_LEVEL[chip] => Some(Place::EdgeLevel(chip)),
        _ => None,
    })
}

/// One chip.
struct Pic(PicState);

impl Deref for Pic {
    type Target = PicState;
    fn deref(&self) -> &PicState {
        &self.0
    }
}

impl DerefMut for Pic {
    fn deref_mut(&mut self) -> &mut PicState {
        &mut self.0
    }
}

impl Pic {
    fn set_line(&mut self, line: u8, level: bool) {
        let bit = 1 << line;
        let level_triggered = self.elcr & bit != 0;
        if level {
            if level_triggered || self.last_irr & bit == 0 {
                self.irr |= bit;
            }
            self.last_irr |= bit;
        } else {
            if level_triggered {
                self.irr &= !bit;
            }
            self.last_irr &= !bit;
        }
    }

    /// The line of highest priority in a set of lines, and how many are before it.
    fn highest(&self, lines: u8) -> Option<(u8, u8)> {
        (0..8).map(|before| (before, (before + self.priority_add) & 7)).find(|(_, line)| lines & 1 << line != 0)
    }

    /// The line that interrupts now.
    fn request(&self, master: bool) -> Option<u8> {
        let (before, line) = self.highest(self.irr & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask != 0 {
            in_service &= !self.imr;
        }
        // The slave may interrupt its own handler.
        if self.special_fully_nested_mode != 0 && master {
            in_service &= !(1 << CASCADE);
        }
        self.highest(in_service).is_none_or(|(in_service, _)| before < in_service).then_some(line)
    }

    fn acknowledge(&mut self, line: u8) {
        let bit = 1 << line;
        if self.auto_eoi == 0 {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi != 0 {
            self.priority_add = (line + 1) & 7;
        }
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
    }

    fn command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            let (elcr, elcr_mask, irq_base) = (self.elcr, self.elcr_mask, self.irq_base);
            self.0 = PicState {
                elcr,
                elcr_mask,
                irq_base,
                irr: self.irr & elcr,
                init_state: ICW2,
                init4: value & ICW1_NEEDS_ICW4,
                single_mode: value & ICW1_SINGLE,
                ..PicState::default()
            };
        } else if value & OCW3 != 0 {
            if value & OCW3_POLL != 0 {
                self.poll = 1;
            }
            if value & OCW3_SELECT != 0 {
                self.read_reg_select = value & OCW3_SELECT_ISR;
            }
            if value & OCW3_SET_SPECIAL_MASK != 0 {
                self.special_mask = u8::from(value & OCW3_SPECIAL_MASK != 0);
            }
        } else {
            self.end_or_rotate(value >> 5, value & 7);
        }
    }

    /// OCW2: its upper three bits, and the line it names.
    fn end_or_rotate(&mut self, what: u8, named: u8) {
        let served = self.highest(self.isr).map(|(_, line)| line);
        let (end, rotate) = match what {
            0b000 | 0b100 => {
                self.rotate_on_auto_eoi = what >> 2;
                return;
            }
            0b001 => (served, None),
            0b101 => (served, served),
            0b011 => (Some(named), None),
            0b111 => (Some(named), Some(named)),
            0b110 => (None, Some(named)),
            _ => return,
        };
        end.into_iter().for_each(|line| self.isr &= !(1 << line));
        rotate.into_iter().for_each(|line| self.priority_add = (line + 1) & 7);
    }

    fn data(&mut self, value: u8) {
        let after_icw3 = if self.init4 != 0 { ICW4 } else { MASK };
        self.init_state = match self.init_state {
            ICW2 => {
                self.irq_base = value & 0xf8;
                if self.single_mode != 0 { after_icw3 } else { ICW3 }
            }
            ICW3 => after_icw3,
            ICW4 => {
                self.special_fully_nested_mode = u8::from(value & ICW4_FULLY_NESTED != 0);
                self.auto_eoi = u8::from(value & ICW4_AUTO_EOI != 0);
                MASK
            }
            _ => {
                self.imr = value;
                MASK
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Set up, and everything allowed.
    fn pics() -> (Pics, Arc<AtomicBool>) {
        let (mut pics, line) = after_reset();
        pics.set_up();
        [0x21, 0xa1].into_iter().for_each(|port| assert!(pics.write(port, 0)));
        (pics, line)
    }

    fn after_reset() -> (Pics, Arc<AtomicBool>) {
        let line = Arc::new(AtomicBool::new(false));
        let seen = line.clone();
        (Pics::new(Box::new(move |level| seen.store(level, Ordering::SeqCst))), line)
    }

    #[test]
    fn firmware_leaves_them_silent() {
        let (mut pics, line) = after_reset();
        pics.set_line(0, true);
        assert!(line.load(Ordering::SeqCst), "after reset nothing is masked");
        pics.set_up();
        for number in 0..16 {
            pics.set_line(number, false);
            pics.set_line(number, true);
        }
        assert!(!line.load(Ordering::SeqCst));
        pics.write(0xa1, 0);
        pics.write(0x21, 0xfb);
        assert_eq!((line.load(Ordering::SeqCst), pics.acknowledge()), (true, 0x70));
    }

    #[test]
    fn an_edge_interrupts_once_and_lower_lines_wait() {
        let (mut pics, line) = pics();
        pics.set_line(4, true);
        pics.set_line(4, true);
        assert!(line.load(Ordering::SeqCst));
        assert_eq!(pics.acknowledge(), 0x0c);
        assert!(!line.load(Ordering::SeqCst));
        pics.set_line(5, true);
        assert!(!line.load(Ordering::SeqCst), "line 4 is in service");
        pics.set_line(1, true);
        assert_eq!(pics.acknowledge(), 0x09);
        pics.write(0x20, 0x20);
        pics.write(0x20, 0x20);
        assert_eq!(pics.acknowledge(), 0x0d);
        pics.write(0x20, 0x65);
        assert!(!line.load(Ordering::SeqCst));
        pics.set_line(4, false);
        pics.set_line(4, true);
        assert!(line.load(Ordering::SeqCst), "the next edge");
    }

    #[test]
    fn the_slave_interrupts_through_the_master() {
        let (mut pics, line) = pics();
        pics.set_line(8, true);
        assert!(line.load(Ordering::SeqCst));
        assert_eq!(pics.acknowledge(), 0x70);
        pics.write(0x20, 0x0b);
        assert_eq!(pics.read(0x20), Some(1 << 2), "in service at the master");
        pics.write(0xa0, 0x0b);
        assert_eq!(pics.read(0xa0), Some(1));
        assert_eq!(pics.read(0x22), None);
    }

    #[test]
    fn masks_levels_and_spurious_interrupts() {
        let (mut pics, line) = pics();
        pics.write(0x21, 0xff);
        pics.set_line(3, true);
        assert!(!line.load(Ordering::SeqCst));
        pics.write(0x21, 0x00);
        assert!(line.load(Ordering::SeqCst));
        pics.write(0x21, 0xff);
        assert_eq!(pics.acknowledge(), 0x0f, "it went away: line 7's vector");
        pics.write(0x21, 0x00);
        assert_eq!(pics.acknowledge(), 0x0b);
        pics.write(0x20, 0x20);
        pics.set_line(3, false);
        assert!(pics.write(0x4d0, 0xff));
        assert_eq!(pics.read(0x4d0), Some(0xf8));
        pics.set_line(5, true);
        assert_eq!(pics.acknowledge(), 0x0d);
        pics.write(0x20, 0x20);
        assert!(line.load(Ordering::SeqCst), "the level still asks");
        pics.set_line(5, false);
        assert!(!line.load(Ordering::SeqCst));
    }

    #[test]
    fn requests_go_along() {
        let (mut pics, _) = pics();
        pics.set_line(4, true);
        let (mut other, line) = self::pics();
        other.load(&pics.save());
        assert!(line.load(Ordering::SeqCst));
        assert_eq!(other.acknowledge(), 0x0c);
    }
}
