//! The ACPI generic event device of microvm with its sleep and reset registers (addresses from `info mtree` of QEMU 11.1.3,
//! register meanings from the ACPI specification 6.5, 4.8.3.7 and 4.8.3.6).

use super::Request;

const BASE: u64 = 0xfea0_0000;
const REGISTERS: u64 = 0x200;
const SLEEP_CONTROL: u64 = REGISTERS;
const RESET: u64 = REGISTERS + 2;
const LEN: u64 = REGISTERS + 3;

const RESET_VALUE: u8 = 0x42;
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SOFT_OFF: u8 = 5;

/// Event selector and power registers.
#[derive(Debug, Default)]
pub struct Ged {
    pub(crate) selector: u32,
}

impl Ged {
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

    /// Where in the device an address lies.
    pub fn offset(gpa: u64) -> Option<u64> {
        gpa.checked_sub(BASE).filter(|offset| *offset < LEN)
    }

    /// The selector reads back; the registers read as zero. No event is ever pending.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            // Reading the selector takes the pending events.
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
        let mut ged = Ged::default();
        assert_eq!(Ged::offset(0xfea0_0202), Some(0x202));
        assert_eq!(Ged::offset(0xfea0_0203), None);
        assert_eq!(Ged::offset(0xfe9f_ffff), None);
        assert_eq!(ged.write(0x202, &[0x42]), Request::Reset);
        assert_eq!(ged.write(0x202, &[0x41]), Request::None);
        assert_eq!(ged.write(0x200, &[0x34]), Request::Shutdown);
        assert_eq!(ged.write(0x200, &[0x14]), Request::None);
    }
}
