//! How KVM shows the RAM to the guest: a memory slot for each [mapping](GuestMemory::mappings).

use super::GuestMemory;
use crate::error::{Result, kvm};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

/// Shows a mapping to the guest, or changes the flags of one that is shown. The slot is the mapping's index.
pub(crate) fn set_memory_slot(vm: &VmFd, memory: &GuestMemory, slot: usize, flags: u32) -> Result<()> {
    let mapping = memory.mappings()[slot];
    let block = &memory.blocks()[mapping.block];
    let region = kvm_userspace_memory_region {
        slot: slot as u32,
        flags,
        guest_phys_addr: mapping.gpa,
        memory_size: mapping.len,
        userspace_addr: block.host_address() as u64 + mapping.offset,
    };
    // SAFETY: the range lies within the block, which stays mapped until the last owner of `memory` is gone; the machine
    // holds `memory` together with the VM and the vCPUs, and ends the vCPU threads before it goes.
    unsafe { vm.set_user_memory_region(region) }.map_err(kvm("map guest RAM"))
}

/// Changes the flags of all slots.
pub(crate) fn set_memory_flags(vm: &VmFd, memory: &GuestMemory, flags: u32) -> Result<()> {
    (0..memory.mappings().len()).try_for_each(|slot| set_memory_slot(vm, memory, slot, flags))
}
