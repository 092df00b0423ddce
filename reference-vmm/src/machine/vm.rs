//! KVM's virtual machine before it has vCPUs.

use super::split;
use crate::devices::pci::Window;
use crate::error::{Error, Result, kvm};
use crate::memory::{GuestMemory, SharedPages, set_memory_slot};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Where KVM keeps three pages of its own, and one before them: in the hole, as QEMU does it.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS_PAGES: usize = 0xfeff_d000;

/// Opens the KVM device, and says what to do where that fails.
///
/// # Errors
/// [`Error::KvmUnavailable`].
pub fn open_kvm(path: &Path) -> Result<Kvm> {
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| Error::Config(format!("{} is not a path", path.display())))?;
    Kvm::new_with_path(name)
        .map_err(|error| Error::KvmUnavailable { path: path.to_owned(), cause: io::Error::from(error) })
}

/// A virtual machine with its memory and interrupt controllers, and no vCPU yet.
pub(super) fn create_vm(kvm_fd: &Kvm, memory: &GuestMemory, split: bool) -> Result<VmFd> {
    for (cap, capability) in [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Pit2, "KVM_CAP_PIT2"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::Xsave, "KVM_CAP_XSAVE"),
        (Cap::Xcrs, "KVM_CAP_XCRS"),
        (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
        (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
        (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    ] {
        if !kvm_fd.check_extension(cap) {
            return Err(Error::KvmCapability { capability });
        }
    }
    let vm = kvm_fd.create_vm().map_err(kvm("create a virtual machine"))?;
    vm.set_identity_map_address(IDENTITY_MAP).map_err(kvm("place the identity map"))?;
    vm.set_tss_address(TSS_PAGES).map_err(kvm("place the TSS"))?;
    for slot in 0..memory.mappings().len() {
        set_memory_slot(&vm, memory, slot, 0)?;
    }
    if split {
        split::enable(kvm_fd, &vm)?;
    } else {
        vm.create_irq_chip().map_err(kvm("create the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
        vm.create_pit2(pit).map_err(kvm("create the PIT"))?;
    }
    if vm.check_extension_raw(kvm_bindings::KVM_CAP_X86_TRIPLE_FAULT_EVENT.into()) > 0 {
        let cap = kvm_enable_cap {
            cap: kvm_bindings::KVM_CAP_X86_TRIPLE_FAULT_EVENT,
            args: [1, 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        vm.enable_cap(&cap).map_err(kvm("enable triple fault events"))?;
    }
    Ok(vm)
}

/// The memory slots after those of the RAM, for pages of devices. They have no dirty log: what is in them is the
/// device's state.
pub(super) struct DeviceSlots {
    vm: Arc<VmFd>,
    first: u32,
    /// What each shows, and where.
    used: BTreeMap<u32, (u64, Arc<SharedPages>)>,
}

impl DeviceSlots {
    pub(super) fn new(vm: &Arc<VmFd>, memory: &GuestMemory) -> DeviceSlots {
        DeviceSlots { vm: vm.clone(), first: memory.mappings().len() as u32, used: BTreeMap::new() }
    }

    /// Shows pages, or with `len` 0 nothing.
    fn set(&self, slot: u32, gpa: u64, pages: &SharedPages, len: u64) -> Result<()> {
        let userspace_addr = pages.host_address() as u64;
        let region =
            kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr: gpa, memory_size: len, userspace_addr };
        // SAFETY: the pages are mapped as long as `used` has them, which is until the slot is empty; nothing has a
        // reference into them.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(kvm("map pages of a device"))
    }
}

impl Window for DeviceSlots {
    fn show(&mut self, gpa: u64, pages: &Arc<SharedPages>) -> Result<u32> {
        let slot = (self.first..).find(|slot| !self.used.contains_key(slot)).unwrap_or(u32::MAX);
        self.set(slot, gpa, pages, pages.len())?;
        self.used.insert(slot, (gpa, pages.clone()));
        Ok(slot)
    }

    fn hide(&mut self, slot: u32) {
        let Some((gpa, pages)) = self.used.remove(&slot) else { return };
        if let Err(error) = self.set(slot, gpa, &pages, 0) {
            // The guest may reach them still: they stay mapped.
            tracing::error!(%error, slot, "pages of a device cannot be hidden");
            self.used.insert(slot, (gpa, pages));
        }
    }
}

impl Drop for DeviceSlots {
    fn drop(&mut self) {
        for slot in self.used.keys().copied().collect::<Vec<_>>() {
            self.hide(slot);
        }
        // What could not be hidden stays for good.
        std::mem::take(&mut self.used).into_values().for_each(std::mem::forget);
    }
}
