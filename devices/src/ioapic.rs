//! Section `ioapic`: an I/O APIC, emulated or in the kernel.

use qevm_savevm::vmstate::{Unused, VmState};

/// An I/O APIC, section `ioapic` version 3. microvm has a second one (instance 1) in 7.2 and later, not in 5.2.
///
/// (`docs/format/microvm-devices.md`, ioapic)
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "ioapic", version = 3, minimum_version = 1)]
pub struct IoApic {
    /// The I/O APIC's id.
    pub id: u8,
    /// The register that the next access to IOWIN means.
    pub ioregsel: u8,
    /// Was a register base once.
    #[vmstate(since = 2)]
    pub unused: Unused<8>,
    /// Input lines that are asserted or pending.
    #[vmstate(since = 2)]
    pub irr: u32,
    /// Redirection table.
    pub ioredtbl: [u64; 24],
}
