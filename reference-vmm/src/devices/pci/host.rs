//! The configuration space of a device of the host: BARs and interrupts are the guest's, all else is as the device has
//! it.

use super::config::{BARS, CONVENTIONAL, EXPRESS, HEADER, STATUS_INTERRUPT};
use super::{ConfigSpace, Identity, Msi, MsixLayout, PciError, msix, register};

/// There are more functions.
const MULTIFUNCTION: u8 = 1 << 7;

impl ConfigSpace {
    /// That of a device of the host, which shows `bytes` of its own, without BARs. With exactly 256 bytes it is a
    /// conventional one; any other is PCI Express, and the guest sees 4096 bytes, as with QEMU 10.0 and 11.1 (whose
    /// section of `mtty`, with 255, has 4096).
    ///
    /// # Errors
    /// [`PciError::Capability`] for an MSI or MSI-X capability that is not all there or over another one;
    /// [`PciError::Vectors`] and [`PciError::Bar`] for what they cannot say.
    ///
    /// ```
    /// use reference_vmm::devices::pci::{ConfigSpace, PciError};
    /// let mut bytes = [0; 256];
    /// bytes[0x06] = 0x10; // capabilities, the first at…
    /// bytes[0x34] = 0x40;
    /// bytes[0x40..0x44].copy_from_slice(&[0x05, 0, 0x84, 0]); // MSI: four vectors, addresses of 64 bits
    /// let config = ConfigSpace::of_device(&bytes)?;
    /// assert_eq!(config.bytes().len(), 256);
    /// assert!(config.msi().is_some() && config.msix_layout().is_none());
    /// # Ok::<(), PciError>(())
    /// ```
    pub fn of_device(bytes: &[u8]) -> Result<ConfigSpace, PciError> {
        let mut config = ConfigSpace::new(&Identity::default(), bytes.len() != CONVENTIONAL);
        let len = bytes.len().min(EXPRESS);
        config.bytes[..len].copy_from_slice(&bytes[..len]);
        config.bytes[register::BARS..register::BARS + 4 * BARS].fill(0);
        config.bytes[register::ROM..register::ROM + 4].fill(0);
        config.bytes[register::INTERRUPT_LINE] = 0;
        config.bytes[register::HEADER_TYPE] &= !MULTIFUNCTION;
        // What a device keeps there is its own affair.
        config.writable[HEADER..].fill(0xff);
        let capabilities: Vec<_> = config.capabilities().collect();
        for (at, id) in capabilities {
            match id {
                Msi::ID if config.msi.is_none() => {
                    let msi = Msi::of(at, config.u16(at + 2))?;
                    config.emulate(at, id, &msi.body())?;
                    msi.writable().iter().for_each(|(at, mask)| config.writable[*at] = *mask);
                    config.msi = Some(msi);
                }
                msix::ID if config.msix.is_none() => {
                    let layout = config.layout_at(at).ok_or(PciError::Capability { at, id })??;
                    config.emulate(at, id, &layout.body())?;
                    config.writable[at + 3] = msix::CONTROL_WRITABLE;
                    config.msix = Some(at);
                }
                _ => {}
            }
        }
        Ok(config)
    }

    /// Puts a capability where it is, as it is after power-on, with nothing in it that the guest can write.
    fn emulate(&mut self, at: usize, id: u8, body: &[u8]) -> Result<(), PciError> {
        let range = at..at + 2 + body.len();
        let taken = self.capabilities.iter().any(|other| other.start < range.end && range.start < other.end);
        if range.end > CONVENTIONAL || taken {
            return Err(PciError::Capability { at, id });
        }
        self.bytes[at + 2..range.end].copy_from_slice(body);
        self.writable[range.clone()].fill(0);
        self.capabilities.push(range);
        Ok(())
    }

    fn layout_at(&self, at: usize) -> Option<Result<MsixLayout, PciError>> {
        self.bytes[..CONVENTIONAL].get(at..).and_then(|rest| rest.first_chunk()).map(MsixLayout::of)
    }

    /// Where its MSI-X capability says that the table is; `None` without one.
    pub fn msix_layout(&self) -> Option<MsixLayout> {
        self.layout_at(self.msix?)?.ok()
    }

    /// What the guest sees in this byte is the bus's, and not the device's.
    fn is_emulated(&self, at: usize) -> bool {
        at < HEADER || self.capabilities.iter().any(|range| range.contains(&at))
    }

    /// What the device shows from `offset` on. Of what is emulated, only the level of its pin is taken.
    pub fn show(&mut self, offset: usize, bytes: &[u8]) {
        for (at, byte) in (offset..).zip(bytes) {
            if at == register::STATUS {
                self.set_interrupt_status(u16::from(*byte) & STATUS_INTERRUPT != 0);
            }
            if !self.is_emulated(at)
                && let Some(shown) = self.bytes.get_mut(at)
            {
                *shown = *byte;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::pci::{BarKind, MsixControl};

    /// Such as `testdev` of the lab: INTA, MSI with four vectors at 0x40, MSI-X with four at 0x60, of which BAR 2 has
    /// the table.
    fn testdev() -> Vec<u8> {
        let mut bytes = vec![0; 256];
        bytes[..8].copy_from_slice(&[0x57, 0x7e, 0x01, 0x00, 0, 0, 0x10, 0]);
        bytes[0x0b] = 0xff;
        bytes[0x0e] = 0x80;
        bytes[0x10] = 0x08;
        bytes[0x34] = 0x40;
        bytes[0x3c..0x3e].copy_from_slice(&[11, 1]);
        bytes[0x40..0x50].copy_from_slice(&[0x05, 0x60, 0x85, 0, 0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0x41, 0, 0x77, 0x78]);
        bytes[0x60..0x6c].copy_from_slice(&[0x11, 0, 3, 0xc0, 2, 0, 0, 0, 2, 8, 0, 0]);
        bytes
    }

    #[test]
    fn interrupts_and_bars_are_the_guests() {
        let mut config = ConfigSpace::of_device(&testdev()).unwrap();
        assert_eq!((config.u32(0), config.u16(0x2c), config.bytes().len()), (0x0001_7e57, 0, 256));
        // As after power-on, whatever the device was used for before.
        assert_eq!((config.u32(0x10), config.bytes()[0x0e], config.bytes()[0x3c]), (0, 0, 0));
        assert_eq!(config.u16(0x42), 0x84);
        assert_eq!((config.u32(0x44), config.u16(0x4c), config.bytes()[0x4e]), (0, 0, 0x77));
        assert_eq!(config.msix_control(), Some(MsixControl::default()));
        let layout = config.msix_layout().unwrap();
        assert_eq!((layout.vectors(), layout.table(), layout.pending()), (4, (2, 0), (2, 0x800)));
        let capabilities: Vec<_> = config.capabilities().collect();
        assert_eq!(capabilities, [(0x40, 0x05), (0x60, 0x11)]);
        config.add_bar(0, BarKind::Memory32 { prefetchable: true }, 4096).unwrap();
        assert_eq!(config.u32(0x10), 8);
        let changes = config.write(0x40, &0x0081_0000_u32.to_le_bytes());
        assert!(changes.msi);
        let (msi, bytes) = config.msi().unwrap();
        assert!(msi.is_enabled(bytes) && msi.used(bytes) == 1);
        // The number of vectors that there are cannot be written, nor the capability's identifier.
        assert_eq!(config.u32(0x40), 0x0085_6005);
    }

    #[test]
    fn what_the_device_shows_is_seen_but_for_what_is_emulated() {
        let mut config = ConfigSpace::of_device(&testdev()).unwrap();
        config.show(0x4c, &[0x99, 0x99, 0x12, 0x34]);
        assert_eq!(config.u32(0x4c), 0x3412_0000);
        config.show(0x04, &[0xff, 0xff, 0x18, 0]);
        assert_eq!((config.command(), config.u16(0x06)), (0, 0x18), "the level of its pin is the device's");
        config.show(0x04, &[0xff, 0xff, 0x10, 0]);
        assert_eq!(config.u16(0x06), 0x10);
        config.show(0xfe, &[1, 2, 3, 4]);
        assert_eq!((&config.bytes()[0xfe..], config.u32(0x100)), (&[1, 2][..], u32::MAX));
        // Such a state is the same device's for a load.
        let saved = config.bytes().to_vec();
        ConfigSpace::of_device(&testdev()).unwrap().load(&saved).unwrap();
        let mut other = saved;
        other[0x42] = 0x86;
        let error = ConfigSpace::of_device(&testdev()).unwrap().load(&other).unwrap_err();
        assert!(matches!(error, PciError::ReadOnly { at: 0x42, .. }), "{error}");
    }

    /// Linux's `mtty` has 255 bytes (savevm/tests/data/vfio).
    #[test]
    fn a_short_or_strange_space_is_taken_or_refused() {
        let config = ConfigSpace::of_device(&testdev()[..0x40]).unwrap();
        assert!(config.msi().is_none() && config.bytes().len() == 4096);
        assert_eq!(ConfigSpace::of_device(&[0; 255]).unwrap().bytes().len(), 4096);
        assert!(ConfigSpace::of_device(&[]).unwrap().msix_layout().is_none());
        assert_eq!(ConfigSpace::of_device(&[0; 8192]).unwrap().bytes().len(), 4096);
        let with = |at: usize, bytes: &[u8]| {
            let mut device = testdev();
            device[at..at + bytes.len()].copy_from_slice(bytes);
            ConfigSpace::of_device(&device).map(drop)
        };
        assert_eq!(with(0x42, &[0x8e]), Err(PciError::Vectors(128)));
        assert_eq!(with(0x64, &[6]), Err(PciError::Bar { index: 6, size: 0 }));
        // At the end, and over each other.
        assert_eq!(with(0x34, &[0xfc]), Ok(()));
        let mut device = testdev();
        device[0x34] = 0xf8;
        device[0xf8..0xfc].copy_from_slice(&[0x05, 0, 0x80, 0]);
        assert_eq!(ConfigSpace::of_device(&device).map(drop), Err(PciError::Capability { at: 0xf8, id: 0x05 }));
        device[0xf8] = 0x11;
        assert_eq!(ConfigSpace::of_device(&device).map(drop), Err(PciError::Capability { at: 0xf8, id: 0x11 }));
        device = testdev();
        device[0x41] = 0x48;
        device[0x48..0x4c].copy_from_slice(&[0x11, 0, 0, 0]);
        assert_eq!(ConfigSpace::of_device(&device).map(drop), Err(PciError::Capability { at: 0x48, id: 0x11 }));
    }
}
