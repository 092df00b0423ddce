//! The state of the PCI bus.

/// A function of the bus, with the fields of QEMU's structures `PCIDevice` and `msix`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PciFunctionState {
    /// Its device number on the bus; 0 for the host bridge.
    pub slot: usize,
    /// Its configuration space: 256 or 4096 bytes.
    pub config: Vec<u8>,
    /// Whether its INTA to INTD are up, whatever its command register says.
    pub levels: [bool; 4],
    /// MSI-X table and pending bits; empty without MSI-X.
    pub msix: Vec<u8>,
}

/// The bus and its host bridge, with the fields of QEMU's sections `gpex_root`, `PCIHost` and `PCIBUS`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PciState {
    /// The host bridge.
    pub bridge: PciFunctionState,
    /// The other functions, in the order in which they were added.
    pub functions: Vec<PciFunctionState>,
    /// The register at port 0xcf8, which microvm does not have.
    pub config_reg: u32,
    /// For each interrupt line, how many devices hold it up.
    pub counts: [i32; 4],
}
