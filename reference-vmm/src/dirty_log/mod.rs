//! Which pages changed: what KVM tells of the guest's writes, and the monitor's own writes, by RAM block and page.
//!
//! The order that loses no page:
//!
//! 1. [`DirtyLog::enable`]; every page counts as dirty ([`DirtyBitmap::all`]).
//! 2. For each piece of a block about to be sent: [`DirtyBitmap::take`] the pages, [`DirtyLog::clear`] them, then read
//!    and send them. A page the guest writes after the clear is reported again by the next sync.
//! 3. [`DirtyLog::sync`] adds what has changed; repeat from 2.
//! 4. Pause the machine, sync once more, send the rest. Or give up: [`DirtyLog::disable`].
//!
//! KVM tells in one of two ways, chosen when the machine is built:
//!
//! * **The log** (`kvm_log`): a bitmap for each memory slot. Without a `clear` between two syncs a page stays reported
//!   and further writes to it cost nothing. On a kernel without `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` (Linux before 5.1)
//!   the sync itself clears, and `clear` does nothing.
//! * **Rings** (`rings`; QEMU's `-accel kvm,dirty-ring-size=N`): each vCPU lists the pages it writes to, and leaves the
//!   guest when its ring is full. A sync costs what was written and not what there is, and tells who wrote; the sync
//!   clears.

mod bitmap;
mod kvm_log;
mod reaper;
mod ring;
mod rings;

use kvm_ioctls::{VcpuFd, VmFd};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;

pub use bitmap::{DirtyBitmap, PAGES_PER_WORD};
pub(crate) use reaper::Reaper;

use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use kvm_log::KvmLog;
use rings::RingLog;

/// The dirty log of a machine.
pub struct DirtyLog {
    memory: Arc<GuestMemory>,
    method: Method,
    /// Held during every operation, so that a sync sees no half-done switch.
    enabled: Mutex<bool>,
}

/// How KVM tells.
enum Method {
    Log(KvmLog),
    Rings(RingLog),
}

impl DirtyLog {
    /// With rings of `ring_size` entries, or with KVM's log if that is 0. No vCPU may be there yet.
    pub(crate) fn new(vm: Arc<VmFd>, memory: Arc<GuestMemory>, ring_size: u32) -> Result<DirtyLog> {
        let method = match ring_size {
            0 => Method::Log(KvmLog::new(vm, memory.clone())?),
            size => Method::Rings(RingLog::new(vm, memory.clone(), size)?),
        };
        Ok(DirtyLog { memory, method, enabled: Mutex::new(false) })
    }

    /// A vCPU was created, the next by number.
    pub(crate) fn attach(&self, vcpu: &VcpuFd) -> Result<()> {
        match &self.method {
            Method::Log(_) => Ok(()),
            Method::Rings(rings) => rings.attach(vcpu),
        }
    }

    /// Whether pages are cleared by range, and not by the sync itself.
    pub fn manual_protect(&self) -> bool {
        matches!(&self.method, Method::Log(log) if log.manual)
    }

    /// Whether the first sync reports every page, which spares KVM the work of protecting all at once.
    pub fn initially_all_set(&self) -> bool {
        matches!(&self.method, Method::Log(log) if log.initially_set)
    }

    /// Entries of each vCPU's dirty ring; 0 without rings.
    pub fn ring_size(&self) -> u32 {
        match &self.method {
            Method::Log(_) => 0,
            Method::Rings(rings) => rings.size(),
        }
    }

    /// Whether writes are being logged.
    pub fn is_enabled(&self) -> bool {
        *self.enabled.lock()
    }

    /// Starts to log. Pages written from now on are reported; earlier ones may be.
    ///
    /// # Errors
    /// [`Error::Kvm`] when KVM refuses; nothing is logged then.
    pub fn enable(&self) -> Result<()> {
        let mut enabled = self.enabled.lock();
        if *enabled {
            return Ok(());
        }
        for block in self.memory.blocks() {
            block.take_vmm_writes();
        }
        match &self.method {
            Method::Log(log) => log.start()?,
            Method::Rings(rings) => rings.start()?,
        }
        *enabled = true;
        Ok(())
    }

    /// Stops to log; what was not synced is forgotten.
    ///
    /// # Errors
    /// [`Error::Kvm`] when KVM refuses.
    pub fn disable(&self) -> Result<()> {
        let mut enabled = self.enabled.lock();
        match &self.method {
            Method::Log(log) => log.stop()?,
            Method::Rings(rings) => rings.stop()?,
        }
        *enabled = false;
        Ok(())
    }

    /// Adds the pages written since they were last cleared. Returns how many of them the bitmap did not have yet. Of a
    /// machine that runs, writes of the last moment may come with the next sync; of one that is paused, none is
    /// missing.
    ///
    /// # Errors
    /// [`Error::Config`] when nothing is logged, [`Error::Kvm`] when KVM does not tell.
    pub fn sync(&self, into: &mut DirtyBitmap) -> Result<u64> {
        let enabled = self.enabled.lock();
        if !*enabled {
            return Err(Error::Config("the dirty log is not enabled".to_owned()));
        }
        let mut new = 0;
        for (index, block) in self.memory.blocks().iter().enumerate() {
            new += into.add(index, 0, &block.take_vmm_writes());
        }
        new += match &self.method {
            Method::Log(log) => log.sync(into)?,
            Method::Rings(rings) => rings.sync(into)?,
        };
        Ok(new)
    }

    /// Arms logging again for pages a sync has reported, those whose bits are set in `pages`, 64 to a word, of which
    /// the first is `first_page` of the block. To be called before their bytes are read.
    ///
    /// # Errors
    /// [`Error::Config`] when `first_page` is not a multiple of 64 or there is no such block, [`Error::Kvm`] when KVM
    /// refuses.
    pub fn clear(&self, block: usize, first_page: u64, pages: &[u64]) -> Result<()> {
        let enabled = self.enabled.lock();
        if !first_page.is_multiple_of(PAGES_PER_WORD) || block >= self.memory.blocks().len() {
            return Err(Error::Config(format!(
                "dirty pages cannot be cleared from page {first_page} of block {block}"
            )));
        }
        match &self.method {
            Method::Log(log) if *enabled => log.clear(block, first_page, pages),
            // The sync has done it.
            Method::Log(_) | Method::Rings(_) => Ok(()),
        }
    }

    /// A vCPU has left the guest because its ring is full. Called by its thread, which enters the guest again
    /// afterwards.
    pub(crate) fn ring_full(&self, vcpu: usize) -> Result<()> {
        match &self.method {
            Method::Log(_) => Ok(()),
            Method::Rings(rings) => rings.full(vcpu),
        }
    }

    /// Harvests all rings ahead of the next sync, if anything is logged.
    pub(crate) fn reap(&self) -> Result<()> {
        match &self.method {
            Method::Log(_) => Ok(()),
            Method::Rings(rings) => rings.reap(),
        }
    }

    /// Pages that a vCPU has written to since the machine was built, as [`Watch::written`] counts them; it costs the
    /// guest nothing, as nothing is harvested. 0 without rings.
    pub(crate) fn written(&self, vcpu: usize) -> u64 {
        match &self.method {
            Method::Log(_) => 0,
            Method::Rings(rings) => rings.written_by(vcpu),
        }
    }

    /// How many pages each vCPU writes to in `time`, which it takes.
    ///
    /// # Errors
    /// Those of [`watch`](DirtyLog::watch).
    pub fn written_in(&self, time: Duration) -> Result<Vec<u64>> {
        let watch = self.watch()?;
        let before = watch.written()?;
        std::thread::sleep(time);
        Ok(watch.written()?.iter().zip(before).map(|(now, before)| now - before).collect())
    }

    /// Counts what each vCPU writes to until the result is dropped, beside a migration or without one.
    ///
    /// # Errors
    /// [`Error::Config`] without rings, [`Error::Kvm`] when KVM refuses.
    pub fn watch(&self) -> Result<Watch<'_>> {
        match &self.method {
            Method::Log(_) => Err(Error::Config("only dirty rings tell which vCPU writes".to_owned())),
            Method::Rings(rings) => rings.watch().map(|()| Watch(rings)),
        }
    }
}

/// Writes of each vCPU are being counted.
pub struct Watch<'l>(&'l RingLog);

impl Watch<'_> {
    /// Pages that each vCPU has written to since the machine was built, as long as they were counted; a page that it
    /// goes on writing to counts once each time it was protected again.
    ///
    /// # Errors
    /// [`Error::Kvm`] when KVM does not tell.
    pub fn written(&self) -> Result<Vec<u64>> {
        self.0.written()
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.unwatch() {
            tracing::error!(%error, "the dirty rings cannot be stopped: the guest runs slower than it could");
        }
    }
}
