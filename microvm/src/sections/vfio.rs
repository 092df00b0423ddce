//! The configuration of VFIO devices: what their FULL section has between CONFIG and END_OF_STATE.

use crate::state::PciFunctionState;
use qevm_devices::pci::{Msix, PciDevice, PciIrqState, VfioPciDevice};
use qevm_savevm::Reader;
use qevm_savevm::vmstate::{self, Buffer, Context, PciFacts, VarBuffer};

/// Version of the section.
pub(super) const VERSION: u32 = 1;
/// Bytes of a vector in the MSI-X table, and vectors to a byte of the pending bits.
const VECTOR: usize = 16;
const PENDING: usize = 8;
/// Bytes of a configuration space without the extended one.
const CONVENTIONAL: usize = 256;

/// The section of the device of this number on the bus.
pub fn idstr(device: usize) -> String {
    format!("0000:00:{device:02x}.0/vfio")
}

/// The number of the device of a section.
pub(super) fn device_of(idstr: &str) -> Option<usize> {
    let number = idstr.strip_prefix("0000:00:")?.strip_suffix(".0/vfio").filter(|number| number.len() == 2)?;
    usize::from_str_radix(number, 16).ok()
}

/// What the wire does not tell of a function: whether it is PCI Express, and how many vectors it has.
fn facts(state: &PciFunctionState, ctx: &Context) -> Context {
    // 16 bytes and a bit for each.
    let vectors = state.msix.len() * PENDING / (VECTOR * PENDING + 1);
    let mut ctx = ctx.clone();
    ctx.pci = PciFacts { express: state.config.len() > CONVENTIONAL, msix_vectors: vectors as u16 };
    ctx
}

/// The bytes of a function's state.
pub(super) fn save(state: &PciFunctionState, ctx: &Context) -> Result<Vec<u8>, String> {
    let irq_state = PciIrqState(state.levels.map(u32::from));
    let mut pci = PciDevice { config: None, express_config: None, irq_state, ..PciDevice::default() };
    let too_short = "its configuration space is too short";
    if state.config.len() > CONVENTIONAL {
        pci.express_config = Some(Box::new(Buffer(*state.config.first_chunk().ok_or(too_short)?)));
    } else {
        pci.config = Some(Buffer(*state.config.first_chunk().ok_or(too_short)?));
    }
    let msix = (!state.msix.is_empty()).then(|| Msix { msix: VarBuffer(state.msix.clone()) });
    vmstate::encode(&VfioPciDevice { pci, msix }, &facts(state, ctx)).map_err(|error| error.to_string())
}

/// The state of a function like `here`.
pub(super) fn load(
    body: &[u8],
    version: u32,
    here: &PciFunctionState,
    ctx: &Context,
) -> Result<PciFunctionState, qevm_savevm::Error> {
    let mut reader = Reader::new(body);
    let loaded: VfioPciDevice = vmstate::load(&mut reader, version, &facts(here, ctx))?;
    reader.expect_end("the section's content")?;
    Ok(PciFunctionState {
        slot: here.slot,
        config: loaded.pci.config_space().to_vec(),
        levels: loaded.pci.irq_state.0.map(|level| level != 0),
        msix: loaded.msix.map(|msix| msix.msix.0).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use qevm_wire::QemuVersion;

    fn context() -> Context {
        Context::new(QemuVersion::NEWEST, "microvm")
    }

    /// The FULL has 4,132 bytes with CONFIG and END_OF_STATE, 8 bytes each (`docs/format/vfio.md`).
    #[test]
    fn the_configuration_is_as_long_as_qemus() {
        let levels = [true, false, false, false];
        let state = PciFunctionState { slot: 5, config: vec![0x5a; 4096], levels, msix: vec![] };
        let body = save(&state, &context()).unwrap();
        assert_eq!(body.len() + 16, 4132);
        assert_eq!(body[..4], [0, 0, 0, 2]);
        assert_eq!(body[4100..4108], [0, 0, 0, 1, 0, 0, 0, 0]);
        assert_eq!(load(&body, 1, &state, &context()).unwrap(), state);
        assert!(load(&body[..4000], 1, &state, &context()).is_err());
        assert!(load(&body, 2, &state, &context()).is_err());
    }

    /// (`docs/format/vfio.md`)
    #[test]
    fn a_table_of_vectors_is_behind_it() {
        for vectors in [1, 7, 8, 9, 65, 2048_usize] {
            let msix = vec![0xc3; vectors * 16 + vectors.div_ceil(8)];
            let state = PciFunctionState { config: vec![0x5a; 4096], msix, ..PciFunctionState::default() };
            let body = save(&state, &context()).unwrap();
            assert_eq!(body.len(), 4116 + vectors * 16 + vectors.div_ceil(8));
            assert_eq!(load(&body, 1, &state, &context()).unwrap(), state, "{vectors}");
        }
    }

    /// As QEMU 11.1 sends `testdev` of the lab, which has 256 bytes and four vectors: 341 bytes.
    #[test]
    fn a_conventional_device_has_a_short_configuration_space() {
        let msix = vec![0xc3; 4 * 16 + 1];
        let state = PciFunctionState { config: vec![0x5a; 256], msix, ..PciFunctionState::default() };
        let body = save(&state, &context()).unwrap();
        assert_eq!(body.len(), 341);
        assert_eq!(load(&body, 1, &state, &context()).unwrap(), state);
        let express = PciFunctionState { config: vec![0x5a; 4096], ..state };
        assert!(load(&body, 1, &express, &context()).is_err());
    }

    #[test]
    fn sections_are_named_by_their_place_on_the_bus() {
        assert_eq!(idstr(1), "0000:00:01.0/vfio");
        assert_eq!(idstr(31), "0000:00:1f.0/vfio");
        assert_eq!(device_of("0000:00:1f.0/vfio"), Some(31));
        for other in ["0000:00:01.0/gpex_root", "0000:01:01.0/vfio", "0000:00:1.0/vfio", "0000:00:+1.0/vfio", "vfio"] {
            assert_eq!(device_of(other).filter(|number| idstr(*number) == other), None, "{other}");
        }
    }
}
