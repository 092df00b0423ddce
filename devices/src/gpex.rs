//! The sections that `-M microvm,pcie=on` adds: the generic PCI Express host bridge, its host and its bus.

use super::pci::PciDevice;
use qevm_savevm::vmstate::{Context, VmState, VmStateError};

/// Interrupt lines of a bus: INTA to INTD.
const LINES: usize = 4;

/// Section `0000:00:00.0/gpex_root` version 1: the host bridge as a device on its own bus, which is a PCI device with
/// 256 bytes of configuration space.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "gpex_root", version = 1)]
pub struct GpexRoot {
    /// The PCI device.
    #[vmstate(name = "parent_obj")]
    pub pci: PciDevice,
}

/// Section `PCIHost` version 1; sent since 7.2 at the latest.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "PCIHost", version = 1)]
pub struct PciHost {
    /// The register at port 0xcf8, which microvm does not have.
    pub config_reg: u32,
}

/// Section `PCIBUS` version 1.
#[derive(VmState, Debug, Clone, PartialEq, Eq)]
#[vmstate(name = "PCIBUS", version = 1, post_load = PciBus::check_lines)]
pub struct PciBus {
    /// Interrupt lines of the bus, which both sides must agree in: 4.
    #[vmstate(type = "int32 equal")]
    pub nirq: i32,
    /// For each line, how many devices hold it up.
    pub irq_count: [i32; LINES],
}

impl PciBus {
    fn check_lines(&mut self, _: u32, _: &Context) -> Result<(), VmStateError> {
        match self.nirq == LINES as i32 {
            true => Ok(()),
            false => Err(VmStateError::Refused {
                what: "number of interrupt lines of the PCI bus",
                found: (self.nirq as u32).into(),
                expected: "4",
            }),
        }
    }
}

impl Default for PciBus {
    fn default() -> Self {
        PciBus { nirq: LINES as i32, irq_count: [0; LINES] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qevm_savevm::vmstate;
    use qevm_wire::QemuVersion;

    #[test]
    fn a_bus_with_other_lines_is_refused() {
        let ctx = Context::new(QemuVersion::new(11, 1), "microvm");
        let bytes = vmstate::encode(&PciBus { nirq: 5, ..PciBus::default() }, &ctx).unwrap();
        let error = vmstate::load::<PciBus>(&mut qevm_savevm::Reader::new(&bytes), 1, &ctx).unwrap_err();
        assert!(
            matches!(error.kind, qevm_savevm::ErrorKind::VmState(VmStateError::Refused { found: 5, .. })),
            "{error}"
        );
    }
}
