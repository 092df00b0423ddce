//! Which pages changed: KVM's dirty log and the monitor's own writes, by RAM block and page.
//!
//! The order that loses no page:
//!
//! 1. [`DirtyLog::enable`]; every page counts as dirty ([`DirtyBitmap::all`]).
//! 2. For each piece of a block about to be sent: [`DirtyBitmap::take`] the pages, [`DirtyLog::clear`] them, then read and send
//!    them. A page the guest writes after the clear is reported again by the next sync.
//! 3. [`DirtyLog::sync`] adds what has changed; repeat from 2.
//! 4. Pause the machine, sync once more, send the rest. Or give up: [`DirtyLog::disable`].
//!
//! Without a `clear` between two syncs a page stays reported and further writes to it cost nothing. On a kernel without
//! `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` (Linux before 5.1) the sync itself clears, and `clear` does nothing.

mod bitmap;

use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

pub use bitmap::{DirtyBitmap, PAGES_PER_WORD};

use crate::devices::lock;
use crate::error::{Error, Result, kvm};
use crate::machine::set_memory_slot;
use crate::memory::{GuestMemory, Mapping, PAGE_SIZE};

mod ioctl {
    use super::{KVMIO, kvm_clear_dirty_log};

    vmm_sys_util::ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

/// The dirty log of a machine.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    manual: bool,
    initially_set: bool,
    /// Held during every operation, so that a sync sees no half-done switch.
    enabled: Mutex<bool>,
}

impl DirtyLog {
    pub(crate) fn new(vm: Arc<VmFd>, memory: Arc<GuestMemory>) -> Result<DirtyLog> {
        let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()) as u32;
        let wanted = offered & (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        let manual = wanted & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
        if manual {
            let args = [wanted.into(), 0, 0, 0];
            let cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args, ..kvm_enable_cap::default() };
            vm.enable_cap(&cap).map_err(kvm("enable manual dirty log protection"))?;
        }
        let initially_set = manual && wanted & KVM_DIRTY_LOG_INITIALLY_SET != 0;
        Ok(DirtyLog { vm, memory, manual, initially_set, enabled: Mutex::new(false) })
    }

    /// Whether pages are cleared by range, and not by the sync itself.
    pub fn manual_protect(&self) -> bool {
        self.manual
    }

    /// Whether the first sync reports every page, which spares KVM the work of protecting all at once.
    pub fn initially_all_set(&self) -> bool {
        self.initially_set
    }

    /// Whether writes are being logged.
    pub fn is_enabled(&self) -> bool {
        *lock(&self.enabled)
    }

    /// Starts to log. Pages written from now on are reported; earlier ones may be.
    ///
    /// # Errors
    /// [`Error::Kvm`] when KVM refuses; nothing is logged then.
    pub fn enable(&self) -> Result<()> {
        let mut enabled = lock(&self.enabled);
        if *enabled {
            return Ok(());
        }
        for block in self.memory.blocks() {
            block.take_vmm_writes();
        }
        if let Err(error) = self.set_flags(KVM_MEM_LOG_DIRTY_PAGES) {
            self.set_flags(0)?;
            return Err(error);
        }
        *enabled = true;
        Ok(())
    }

    /// Stops to log; what was not synced is forgotten.
    ///
    /// # Errors
    /// [`Error::Kvm`] when KVM refuses.
    pub fn disable(&self) -> Result<()> {
        let mut enabled = lock(&self.enabled);
        self.set_flags(0)?;
        *enabled = false;
        Ok(())
    }

    /// Adds the pages written since they were last cleared. Returns how many of them the bitmap did not have yet.
    ///
    /// # Errors
    /// [`Error::Config`] when nothing is logged, [`Error::Kvm`] when KVM does not tell.
    pub fn sync(&self, into: &mut DirtyBitmap) -> Result<u64> {
        let enabled = lock(&self.enabled);
        if !*enabled {
            return Err(Error::Config("the dirty log is not enabled".to_owned()));
        }
        let mut new = 0;
        for (index, block) in self.memory.blocks().iter().enumerate() {
            new += into.add(index, 0, &block.take_vmm_writes());
        }
        for (slot, mapping) in self.memory.mappings().iter().enumerate() {
            let log = self.vm.get_dirty_log(slot as u32, mapping.len as usize).map_err(kvm("read the dirty log"))?;
            new += into.add(mapping.block, mapping.offset / PAGE_SIZE, &log);
        }
        Ok(new)
    }

    /// Arms logging again for pages a sync has reported, those whose bits are set in `pages`, 64 to a word, of which the first
    /// is `first_page` of the block. To be called before their bytes are read.
    ///
    /// # Errors
    /// [`Error::Config`] when `first_page` is not a multiple of 64 or there is no such block, [`Error::Kvm`] when KVM refuses.
    pub fn clear(&self, block: usize, first_page: u64, pages: &[u64]) -> Result<()> {
        let enabled = lock(&self.enabled);
        if !first_page.is_multiple_of(PAGES_PER_WORD) || block >= self.memory.blocks().len() {
            return Err(Error::Config(format!(
                "dirty pages cannot be cleared from page {first_page} of block {block}"
            )));
        }
        if !*enabled || !self.manual {
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

    fn set_flags(&self, flags: u32) -> Result<()> {
        (0..self.memory.mappings().len()).try_for_each(|slot| set_memory_slot(&self.vm, &self.memory, slot, flags))
    }
}
