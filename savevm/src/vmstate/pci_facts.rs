//! What the wire does not tell of a PCI device.

/// Bytes of configuration space of a PCI device, and of a PCI Express device.
const CONFIG_SIZE: usize = 256;
const EXPRESS_CONFIG_SIZE: usize = 4096;
/// Bytes of a PCI device's state besides its configuration space.
const VERSION_ID_SIZE: usize = 4;
const IRQ_STATE_SIZE: usize = 16;

/// See [`Context::pci`](super::Context::pci).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PciFacts {
    /// It is a PCI Express device: 4096 bytes of configuration space instead of 256.
    pub express: bool,
    /// MSI-X vectors; 0 without MSI-X.
    pub msix_vectors: u16,
}

/// Offsets in the configuration space and capability ids (PCI 3.0, 6.1 and 6.8.2).
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITIES_POINTER: usize = 0x34;
const CAPABILITY_MSIX: u8 = 0x11;
/// A list of capabilities has at most as many as fit.
const MAX_CAPABILITIES: usize = CONFIG_SIZE / 4;

impl PciFacts {
    /// Bytes of the MSI-X state (QEMU's type `msix state`): 16 for each vector, then a bit for each.
    pub fn msix_state_size(&self) -> usize {
        usize::from(self.msix_vectors) * 16 + usize::from(self.msix_vectors).div_ceil(8)
    }

    /// The facts under which `payload` can begin with a `PCIDevice` and then the MSI-X state; `None` if its
    /// configuration space cannot be read.
    ///
    /// `exact` tells that nothing follows them, which is what decides between PCI and PCI Express; otherwise a device
    /// counts as PCI Express when it has that much state at all.
    pub fn from_payload(payload: &[u8], exact: bool) -> Option<PciFacts> {
        let config = payload.get(VERSION_ID_SIZE..VERSION_ID_SIZE + CONFIG_SIZE)?;
        let msix_vectors = msix_vectors(config);
        let msix = PciFacts { express: false, msix_vectors }.msix_state_size();
        let size = |config_size| VERSION_ID_SIZE + config_size + IRQ_STATE_SIZE + msix;
        let fits =
            |config_size| if exact { payload.len() == size(config_size) } else { payload.len() >= size(config_size) };
        let express = fits(EXPRESS_CONFIG_SIZE);
        (express || fits(CONFIG_SIZE)).then_some(PciFacts { express, msix_vectors })
    }
}

/// The size of the MSI-X table that the capability list tells; 0 without MSI-X.
fn msix_vectors(config: &[u8]) -> u16 {
    if config[STATUS] & STATUS_CAPABILITIES == 0 {
        return 0;
    }
    let mut offset = usize::from(config[CAPABILITIES_POINTER] & !3);
    for _ in 0..MAX_CAPABILITIES {
        match config.get(offset..offset + 4) {
            Some([CAPABILITY_MSIX, _, low, high]) if offset != 0 => {
                return (u16::from_le_bytes([*low, *high]) & 0x7ff) + 1;
            }
            Some([_, next, ..]) if offset != 0 => offset = usize::from(next & !3),
            _ => return 0,
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn any_configuration_space_is_survived(payload in prop::collection::vec(any::<u8>(), 0..600), exact: bool) {
            if let Some(facts) = PciFacts::from_payload(&payload, exact) {
                prop_assert!(facts.msix_vectors <= 2048);
            }
        }
    }
}
