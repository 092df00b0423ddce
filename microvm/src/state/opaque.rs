//! What a peer sent that this machine has no use for.

use qevm_devices::DeviceState;
use std::collections::BTreeMap;

/// The device sections that a machine was loaded from, by name and instance.
///
/// Whatever they hold that the machine does not model goes back as it came: the sizes of ACPI tables, machine check
/// banks, the TPR optimisation, and so on. What the machine does model is taken from the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpaqueState {
    sections: BTreeMap<(String, u32), DeviceState>,
    /// The guest has run here since.
    stale: bool,
}

impl OpaqueState {
    /// The section, if the source sent it.
    pub fn find(&self, idstr: &str, instance_id: u32) -> Option<&DeviceState> {
        // A lookup by a borrowed pair needs an owned key; there are two dozen sections at most.
        self.sections.get(&(idstr.to_owned(), instance_id))
    }

    /// Keeps a section, in the place of an older one.
    pub fn keep(&mut self, idstr: &str, instance_id: u32, device: DeviceState) {
        self.sections.insert((idstr.to_owned(), instance_id), device);
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        *self = OpaqueState::default();
    }

    /// The guest runs: what the machine models is only in the machine from now on.
    pub fn mark_stale(&mut self) {
        self.stale = true;
    }

    /// Whether the guest has not run since it came.
    pub fn is_current(&self) -> bool {
        !self.sections.is_empty() && !self.stale
    }
}
