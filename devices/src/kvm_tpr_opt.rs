//! Section `kvm-tpr-opt`: the TPR access optimisation for old 32-bit guests (device `kvmvapic`).

use qevm_savevm::vmstate::{Unused, VmState};

/// The optimisation's state, section `kvm-tpr-opt` version 1. (`docs/format/microvm-devices.md`, kvm-tpr-opt)
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "kvm-tpr-opt", version = 1)]
pub struct KvmTprOpt {
    /// A copy of the structure in the option ROM.
    pub rom_state: GuestRom,
    /// 0 inactive, 1 active, 2 standby: the option ROM has run and nothing is patched (the state after firmware alone).
    pub state: u32,
    /// Guest-virtual address of the TPR.
    pub real_tpr_addr: u32,
    /// Guest-virtual address of the ROM's structure.
    pub rom_state_vaddr: u32,
    /// Guest-physical address of the vAPIC page.
    pub vapic_paddr: u32,
    /// Guest-physical address of the ROM's structure.
    pub rom_state_paddr: u32,
}

/// Structure `kvmvapic-guest-rom`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "kvmvapic-guest-rom", version = 1)]
pub struct GuestRom {
    /// The signature.
    pub unused: Unused<8>,
    /// Guest-virtual address of the ROM.
    pub vaddr: u32,
    /// First fix-up.
    pub fixup_start: u32,
    /// End of the fix-ups.
    pub fixup_end: u32,
    /// Guest-virtual address of the vAPIC page.
    pub vapic_vaddr: u32,
    /// Its size in bytes.
    pub vapic_size: u32,
    /// log2 of the distance between two vCPUs' entries.
    pub vcpu_shift: u32,
    /// Guest-virtual address of the TPR.
    pub real_tpr_addr: u32,
    /// Handlers for one vCPU.
    pub up: Handlers,
    /// Handlers for several vCPUs.
    pub mp: Handlers,
}

/// Structure `kvmvapic-handlers`: entry points in the ROM.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "kvmvapic-handlers", version = 1)]
pub struct Handlers {
    /// Set the TPR.
    pub set_tpr: u32,
    /// Set it from EAX.
    pub set_tpr_eax: u32,
    /// Read it into each of the eight registers.
    pub get_tpr: [u32; 8],
    /// Read it onto the stack.
    pub get_tpr_stack: u32,
}
