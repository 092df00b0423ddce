//! The UUID of a virtual machine.

use core::fmt;
use core::str::FromStr;

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

/// A text that is no UUID. QEMU's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("failed to parse UUID string: wrong format")]
pub struct BadUuid;

impl FromStr for Uuid {
    type Err = BadUuid;

    /// As QEMU's `-uuid` takes it: 32 hexadecimal digits with dashes after the eighth, twelfth, sixteenth and
    /// twentieth.
    ///
    /// ```
    /// use qevm_multifd::Uuid;
    ///
    /// let uuid: Uuid = "12345678-1234-1234-1234-123456789ABC".parse()?;
    /// assert_eq!(uuid.to_string(), "12345678-1234-1234-1234-123456789abc");
    /// assert!("{12345678-1234-1234-1234-123456789abc}".parse::<Uuid>().is_err());
    /// # Ok::<(), qevm_multifd::BadUuid>(())
    /// ```
    fn from_str(text: &str) -> Result<Self, BadUuid> {
        const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];
        let mut groups = text.split('-');
        if !GROUPS.iter().all(|len| groups.next().is_some_and(|group| group.len() == *len)) || groups.next().is_some() {
            return Err(BadUuid);
        }
        let mut digits = text.chars().filter(|digit| *digit != '-').map(|digit| digit.to_digit(16));
        let mut uuid = [0; 16];
        for byte in &mut uuid {
            let mut digit = || digits.next().flatten().ok_or(BadUuid);
            *byte = (digit()? << 4 | digit()?) as u8;
        }
        Ok(Uuid(uuid))
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
