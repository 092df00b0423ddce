//! The ACPI generic event device of microvm with its power button, sleep and reset registers (addresses from `info
//! mtree` of QEMU 11.1.3, interrupt and event bit from the DSDT that its firmware gets, register meanings from the ACPI
//! specification 6.5, 4.8.3.7 and 4.8.3.6).

const BASE: u64 = 0xfea0_0000;
const REGISTERS: u64 = 0x200;
const SLEEP_CONTROL: u64 = REGISTERS;
const RESET: u64 = REGISTERS + 2;
const LEN: u64 = REGISTERS + 3;

/// Bit of the event selector: the power button was pressed.
const POWER_BUTTON: u32 = 1 << 1;
const RESET_VALUE: u8 = 0x42;
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SOFT_OFF: u8 = 5;

/// What the guest asked of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Nothing.
    None,
    /// To be reset.
    Reset,
    /// To be switched off.
    Shutdown,
}

/// Event selector and power registers.
pub struct Ged {
    pub(crate) selector: u32,
    interrupt: Box<dyn FnMut(bool) + Send>,
}

impl Ged {
    /// Address of the event selector, whose reading takes the pending events.
    pub(crate) const SELECTOR: u64 = BASE;
    /// The selector's bit for the power button.
    pub(crate) const POWER_BUTTON: u32 = POWER_BUTTON;
    /// Address of the register that switches off.
    pub(crate) const SLEEP_CONTROL: u64 = BASE + SLEEP_CONTROL;
    /// Address of the register that tells of waking up, which never happens.
    pub(crate) const SLEEP_STATUS: u64 = BASE + REGISTERS + 1;
    /// Address of the register that resets.
    pub(crate) const RESET: u64 = BASE + RESET;
    /// What is written there.
    pub(crate) const RESET_VALUE: u8 = RESET_VALUE;
    /// The sleep type that switches off.
    pub(crate) const SOFT_OFF: u8 = SLEEP_TYPE_SOFT_OFF;

    /// A device without a pending event. `interrupt` is an edge-triggered line.
    pub fn new(interrupt: Box<dyn FnMut(bool) + Send>) -> Ged {
        Ged { selector: 0, interrupt }
    }

    /// Tells the guest that the power button was pressed.
    pub fn press_power_button(&mut self) {
        self.selector |= POWER_BUTTON;
        (self.interrupt)(true);
        (self.interrupt)(false);
    }

    /// Where in the device an address lies.
    pub fn offset(gpa: u64) -> Option<u64> {
        gpa.checked_sub(BASE).filter(|offset| *offset < LEN)
    }

    /// The selector gives the pending events; the registers read as zero.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&std::mem::take(&mut self.selector).to_le_bytes());
        }
    }

    /// Sleep and reset.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Request {
        let value = data[0];
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_SOFT_OFF => Request::Shutdown,
            RESET if value == RESET_VALUE => Request::Reset,
            _ => Request::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_registers() {
        let mut ged = Ged::new(Box::new(|_| ()));
        assert_eq!(Ged::offset(0xfea0_0202), Some(0x202));
        assert_eq!(Ged::offset(0xfea0_0203), None);
        assert_eq!(Ged::offset(0xfe9f_ffff), None);
        assert_eq!(ged.write(0x202, &[0x42]), Request::Reset);
        assert_eq!(ged.write(0x202, &[0x41]), Request::None);
        assert_eq!(ged.write(0x200, &[0x34]), Request::Shutdown);
        assert_eq!(ged.write(0x200, &[0x14]), Request::None);
    }

    /// As read from a QEMU 11.1.3 after `system_powerdown`.
    #[test]
    fn the_power_button_is_an_edge_and_a_bit_that_is_read_once() {
        let levels = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
        let seen = levels.clone();
        let mut ged = Ged::new(Box::new(move |level| seen.lock().push(level)));
        ged.press_power_button();
        assert_eq!(*levels.lock(), [true, false]);
        let mut events = [0xff; 4];
        ged.read(0, &mut events);
        assert_eq!(events, [2, 0, 0, 0]);
        ged.read(0, &mut events);
        assert_eq!(events, [0; 4]);
    }
}
