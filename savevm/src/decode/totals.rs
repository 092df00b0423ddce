//! What a stream costs in all.

use qevm_wire::{Limits, WireError};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts over all connections and packages of one stream: the decoders of it share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Totals {
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    sections: AtomicU64,
    device_state: AtomicU64,
    packages: AtomicU64,
}

impl Totals {
    /// The same counts, which from now on are others.
    pub(super) fn detached(&self) -> Self {
        let copy = |count: &AtomicU64| AtomicU64::new(count.load(Ordering::Relaxed));
        let Counts { sections, device_state, packages } = &*self.counts;
        let counts = Counts { sections: copy(sections), device_state: copy(device_state), packages: copy(packages) };
        Totals { counts: Arc::new(counts) }
    }

    /// A section opens.
    pub(super) fn section(&self, limits: &Limits) -> Result<(), WireError> {
        add(&self.counts.sections, 1, "section count", limits.sections)
    }

    /// The content of a device section is over, after `len` bytes.
    pub(super) fn device_state(&self, len: u64, limits: &Limits) -> Result<(), WireError> {
        add(&self.counts.device_state, len, "length of all device sections", limits.device_state)
    }

    /// A package of `len` bytes starts.
    pub(super) fn package(&self, len: u64, limits: &Limits) -> Result<(), WireError> {
        add(&self.counts.packages, len, "length of all packages", limits.packages)
    }
}

/// Adds to a count, unless that takes it above its limit.
fn add(count: &AtomicU64, more: u64, what: &'static str, limit: u64) -> Result<(), WireError> {
    let found = count.load(Ordering::Relaxed).saturating_add(more);
    if found > limit {
        return Err(WireError::LimitExceeded { what, found, limit });
    }
    count.store(found, Ordering::Relaxed);
    Ok(())
}
