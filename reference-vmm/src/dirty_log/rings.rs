//! The dirty rings of all vCPUs of a machine.
//!
//! Pages are noted and protected again in one step under one lock, so that a page is at any moment writable and in a
//! ring, or noted, or protected. What KVM itself writes for a guest (clock, local APIC), it writes on behalf of a vCPU,
//! into its ring.

use super::bitmap::{DirtyBitmap, PAGES_PER_WORD};
use super::ring::{Entry, Ring, Written};
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, PAGE_SIZE, set_memory_flags};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, KVM_MEM_LOG_DIRTY_PAGES, KVMIO,
    kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use parking_lot::{Mutex, MutexGuard};
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vmm_sys_util::ioctl::ioctl;

vmm_sys_util::ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// What QEMU suggests at least.
const SUGGESTED_MINIMUM: u32 = 1024;

pub(super) struct RingLog {
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    /// Entries of each ring.
    size: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Of each vCPU.
    rings: Vec<Ring<Mapped>>,
    /// What was harvested since the last sync, during a sync.
    found: Option<DirtyBitmap>,
    /// Those who want to know how much each vCPU writes, and not what.
    watchers: usize,
}

impl State {
    fn is_logging(&self) -> bool {
        self.found.is_some() || self.watchers > 0
    }
}

impl RingLog {
    /// Before any vCPU is created. Manual protection stays off: with pages that start unprotected a ring would miss
    /// writes.
    pub(super) fn new(vm: Arc<VmFd>, memory: Arc<GuestMemory>, size: u32) -> Result<RingLog> {
        if !size.is_power_of_two() {
            return Err(Error::Config("dirty-ring-size must be a power of two.".to_owned()));
        }
        let offered = |cap: u32| (vm.check_extension_raw(cap.into()).max(0) as usize / size_of::<Entry>()) as u32;
        let caps = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        let (cap, maximum) = caps
            .into_iter()
            .map(|cap| (cap, offered(cap)))
            .find(|(_, maximum)| *maximum > 0)
            .ok_or(Error::KvmCapability { capability: "KVM_CAP_DIRTY_LOG_RING" })?;
        if size > maximum {
            return Err(Error::Config(format!(
                "KVM dirty ring size {size} too big (maximum is {maximum}).  Please use a smaller value."
            )));
        }
        let args = [u64::from(size) * size_of::<Entry>() as u64, 0, 0, 0];
        vm.enable_cap(&kvm_enable_cap { cap, args, ..kvm_enable_cap::default() }).map_err(|cause| {
            Error::Config(format!(
                "Enabling of KVM dirty ring failed: {}. Suggested minimum value is {SUGGESTED_MINIMUM}.",
                std::io::Error::from(cause)
            ))
        })?;
        Ok(RingLog { vm, memory, size, state: Mutex::default() })
    }

    /// Takes in the ring of the next vCPU.
    pub(super) fn attach(&self, vcpu: &VcpuFd) -> Result<()> {
        let entries = Mapped::new(vcpu, self.size as usize)?;
        self.state.lock().rings.push(Ring::new(entries));
        Ok(())
    }

    pub(super) fn size(&self) -> u32 {
        self.size
    }

    /// Begins to note pages.
    pub(super) fn start(&self) -> Result<()> {
        let mut state = self.state.lock();
        self.log(&state)?;
        state.found = Some(DirtyBitmap::none(&self.memory));
        Ok(())
    }

    /// Forgets what was not synced.
    pub(super) fn stop(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.found = None;
        self.end_log(&mut state)
    }

    /// Begins to count without noting pages.
    pub(super) fn watch(&self) -> Result<()> {
        let mut state = self.state.lock();
        self.log(&state)?;
        state.watchers += 1;
        Ok(())
    }

    pub(super) fn unwatch(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.watchers = state.watchers.saturating_sub(1);
        self.end_log(&mut state)
    }

    pub(super) fn sync(&self, into: &mut DirtyBitmap) -> Result<u64> {
        let mut state = self.state.lock();
        self.harvest(&mut state, None)?;
        let Some(found) = &mut state.found else { return Ok(0) };
        let mut new = 0;
        for block in 0..self.memory.blocks().len() {
            new += into.add(block, 0, &found.take(block, 0, usize::MAX >> 1));
        }
        Ok(new)
    }

    /// The ring of a vCPU is full: it is harvested, and those of the others are left to fill.
    pub(super) fn full(&self, vcpu: usize) -> Result<()> {
        self.harvest(&mut self.state.lock(), Some(vcpu))
    }

    /// Harvests all rings, so that vCPUs need not leave the guest for it. Where a measurement counts, it is left to
    /// that.
    pub(super) fn reap(&self) -> Result<()> {
        let mut state = self.state.lock();
        if state.is_logging() && state.watchers == 0 { self.harvest(&mut state, None) } else { Ok(()) }
    }

    /// Pages that each vCPU has written to so far.
    pub(super) fn written(&self) -> Result<Vec<u64>> {
        let mut state = self.state.lock();
        self.harvest(&mut state, None)?;
        Ok(state.rings.iter().map(Ring::harvested).collect())
    }

    /// Pages that a vCPU has written to so far, those in its ring included, which stay there.
    pub(super) fn written_by(&self, vcpu: usize) -> u64 {
        self.state.lock().rings.get(vcpu).map_or(0, |ring| ring.harvested() + u64::from(ring.filled()))
    }

    fn log(&self, state: &MutexGuard<'_, State>) -> Result<()> {
        if state.is_logging() {
            return Ok(());
        }
        if let Err(error) = set_memory_flags(&self.vm, &self.memory, KVM_MEM_LOG_DIRTY_PAGES) {
            set_memory_flags(&self.vm, &self.memory, 0)?;
            return Err(error);
        }
        Ok(())
    }

    fn end_log(&self, state: &mut State) -> Result<()> {
        if state.is_logging() {
            return Ok(());
        }
        set_memory_flags(&self.vm, &self.memory, 0)?;
        // Nothing comes any more; what is left would be news to the next log.
        self.harvest(state, None)
    }

    /// Notes the pages in the rings, or in that of one vCPU, and then has them protected again.
    fn harvest(&self, state: &mut State, only: Option<usize>) -> Result<()> {
        let State { rings, found, .. } = state;
        let mut harvested = 0;
        for (_, ring) in rings.iter_mut().enumerate().filter(|(vcpu, _)| only.is_none_or(|only| only == *vcpu)) {
            harvested += ring.harvest(|written| match (self.slot_to_block(written), &mut *found) {
                (Some((block, page)), Some(found)) => {
                    found.add(block, page & !(PAGES_PER_WORD - 1), &[1 << (page % PAGES_PER_WORD)]);
                }
                (Some(_), None) => {}
                (None, _) => tracing::error!(?written, "KVM's dirty ring names a page that there is not"),
            });
        }
        if harvested > 0 { self.reset() } else { Ok(()) }
    }

    /// Block and page, if there is such a page.
    fn slot_to_block(&self, Written { slot, page }: Written) -> Option<(usize, u64)> {
        let mapping = self.memory.mappings().get(slot as usize)?;
        (page < mapping.len / PAGE_SIZE).then(|| (mapping.block, mapping.offset / PAGE_SIZE + page))
    }

    fn reset(&self) -> Result<()> {
        loop {
            // SAFETY: the descriptor is a VM's, and the call has no argument.
            if unsafe { ioctl(&*self.vm, KVM_RESET_DIRTY_RINGS()) } >= 0 {
                return Ok(());
            }
            let cause = kvm_ioctls::Error::last();
            // Since Linux 6.16 a signal interrupts it, and the rest is left for another call.
            if cause.errno() != libc::EINTR {
                return Err(Error::Kvm { what: "reset the dirty rings", cause });
            }
        }
    }
}

/// A ring that is shared with KVM.
#[derive(Debug)]
struct Mapped {
    entries: *const Entry,
    len: usize,
}

// SAFETY: the memory stays mapped as long as the value lives, and its entries are atomics.
unsafe impl Send for Mapped {}

impl Mapped {
    fn new(vcpu: &VcpuFd, len: usize) -> Result<Mapped> {
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as i64;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let bytes = len * size_of::<Entry>();
        // SAFETY: a new mapping at an address that the kernel chooses; it is unmapped once, when the value goes.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, vcpu.as_raw_fd(), offset) };
        if start == libc::MAP_FAILED {
            return Err(Error::Host { what: "map the dirty ring of a vCPU", cause: std::io::Error::last_os_error() });
        }
        Ok(Mapped { entries: start.cast_const().cast(), len })
    }
}

impl Deref for Mapped {
    type Target = [Entry];

    fn deref(&self) -> &[Entry] {
        // SAFETY: this many entries are mapped, page-aligned, as long as the value lives; KVM changes them, and they
        // are atomics.
        unsafe { std::slice::from_raw_parts(self.entries, self.len) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the range that was mapped, to which no reference is left. A failure leaves it mapped.
        unsafe { libc::munmap(self.entries.cast_mut().cast(), self.len * size_of::<Entry>()) };
    }
}
