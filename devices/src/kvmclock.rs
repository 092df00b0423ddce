//! Section `kvmclock`: the paravirtual clock, only under KVM.

use qevm_savevm::vmstate::VmState;

/// KVM's clock, section `kvmclock` version 1. (`docs/format/microvm-devices.md`, kvmclock)
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "kvmclock", version = 1)]
pub struct KvmClock {
    /// The guest's `system_time`, ns.
    pub clock: u64,
    /// Subsection `kvmclock/clock_is_reliable`; always sent by 11.1, by older releases where the machine type allows
    /// (microvm does). Absent means: not reliable.
    #[vmstate(subsection)]
    pub clock_is_reliable: Option<ClockIsReliable>,
}

/// Subsection `kvmclock/clock_is_reliable`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "kvmclock/clock_is_reliable", version = 1)]
pub struct ClockIsReliable {
    /// True if `clock` came from KVM while the guest's time was stable, rather than from the guest's memory.
    pub clock_is_reliable: bool,
}
