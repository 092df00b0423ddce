//! KVM's dirty log: a bitmap for each memory slot, with manual protection where KVM has it.

use super::bitmap::{DirtyBitmap, PAGES_PER_WORD};
use crate::error::{Error, Result, kvm};
use crate::memory::{GuestMemory, Mapping, PAGE_SIZE, set_memory_flags};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use std::sync::Arc;
use vmm_sys_util::ioctl::ioctl_with_ref;

mod ioctl {
    use kvm_bindings::{KVMIO, kvm_clear_dirty_log};

    vmm_sys_util::ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

pub(super) struct KvmLog {
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    pub(super) manual: bool,
    pub(super) initially_set: bool,
}

impl KvmLog {
    pub(super) fn new(vm: Arc<VmFd>, memory: Arc<GuestMemory>) -> Result<KvmLog> {
        let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()) as u32;
        let wanted = offered & (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        let manual = wanted & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
        if manual {
            let args = [wanted.into(), 0, 0, 0];
            let cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args, ..kvm_enable_cap::default() };
            vm.enable_cap(&cap).map_err(kvm("enable manual dirty log protection"))?;
        }
        let initially_set = manual && wanted & KVM_DIRTY_LOG_INITIALLY_SET != 0;
        Ok(KvmLog { vm, memory, manual, initially_set })
    }

    pub(super) fn start(&self) -> Result<()> {
        if let Err(error) = set_memory_flags(&self.vm, &self.memory, KVM_MEM_LOG_DIRTY_PAGES) {
            self.stop()?;
            return Err(error);
        }
        Ok(())
    }

    pub(super) fn stop(&self) -> Result<()> {
        set_memory_flags(&self.vm, &self.memory, 0)
    }

    pub(super) fn sync(&self, into: &mut DirtyBitmap) -> Result<u64> {
        let mut new = 0;
        for (slot, mapping) in self.memory.mappings().iter().enumerate() {
            let log = self.vm.get_dirty_log(slot as u32, mapping.len as usize).map_err(kvm("read the dirty log"))?;
            new += into.add(mapping.block, mapping.offset / PAGE_SIZE, &log);
        }
        Ok(new)
    }

    pub(super) fn clear(&self, block: usize, first_page: u64, pages: &[u64]) -> Result<()> {
        if !self.manual {
            return Ok(());
        }
        let end = first_page + pages.len() as u64 * PAGES_PER_WORD;
        for (slot, mapping) in self.memory.mappings().iter().enumerate().filter(|(_, m)| m.block == block) {
            let start = mapping.offset / PAGE_SIZE;
            let stop = (mapping.offset + mapping.len) / PAGE_SIZE;
            let (from, to) = (first_page.max(start), end.min(stop));
            if from < to {
                let words = &pages[((from - first_page) / PAGES_PER_WORD) as usize..];
                self.clear_slot(slot, mapping, from - start, to - from, words)?;
            }
        }
        Ok(())
    }

    /// Mappings start at multiples of 64 pages of their block, so the words fit without shifting (tested for microvm).
    fn clear_slot(&self, slot: usize, mapping: &Mapping, first: u64, count: u64, words: &[u64]) -> Result<()> {
        let mut words = words[..count.div_ceil(PAGES_PER_WORD) as usize].to_vec();
        // KVM wants whole words, but for the end of the slot.
        let slot_pages = mapping.len / PAGE_SIZE;
        let count = count.next_multiple_of(PAGES_PER_WORD).min(slot_pages - first);
        if let Some(last) = words.last_mut()
            && !count.is_multiple_of(PAGES_PER_WORD)
        {
            *last &= (1 << (count % PAGES_PER_WORD)) - 1;
        }
        if words.iter().all(|word| *word == 0) {
            return Ok(());
        }
        let request = kvm_clear_dirty_log {
            slot: slot as u32,
            num_pages: count as u32,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() },
        };
        // SAFETY: the descriptor is a VM's, and the bitmap has a bit for each of the pages.
        let result = unsafe { ioctl_with_ref(&*self.vm, ioctl::KVM_CLEAR_DIRTY_LOG(), &request) };
        if result < 0 {
            return Err(Error::Kvm { what: "clear the dirty log", cause: kvm_ioctls::Error::last() });
        }
        Ok(())
    }
}
