//! The UUID of a virtual machine.

use core::fmt;

/// The UUID of a virtual machine as page channels carry it: 16 bytes, all zero where the machine has none.
///
/// ```
/// let uuid = qevm_multifd::Uuid(*b"0123456789abcdef");
/// assert_eq!(uuid.to_string(), "30313233-3435-3637-3839-616263646566");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            let dash = if matches!(i, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
