//! Section `timer`: the virtual clock and the TSC of stopped vCPUs.

use qevm_savevm::vmstate::{Timer, Unused, VmState};
use qevm_wire::QemuVersion;

/// The clocks, section `timer` version 2. (`docs/format/microvm-devices.md`, timer)
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "timer", version = 2, minimum_version = 1)]
pub struct CpuTimers {
    /// TSC ticks of the guest while it is stopped.
    pub cpu_ticks_offset: i64,
    /// Was a frequency once.
    pub unused: Unused<8>,
    /// The virtual clock while the guest is stopped, ns.
    #[vmstate(since = 2)]
    pub cpu_clock_offset: i64,
    /// Subsection `timer/icount`: `-icount` is on.
    #[vmstate(subsection)]
    pub icount: Option<Icount>,
}

/// Subsection `timer/icount`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "timer/icount", version = 1)]
pub struct Icount {
    /// Offset between instruction count and virtual clock, ns.
    pub qemu_icount_bias: i64,
    /// Instructions executed.
    pub qemu_icount: i64,
    /// Subsection `timer/icount/warp_timer`.
    #[vmstate(subsection)]
    pub warp_timer: Option<WarpTimer>,
    /// Subsection `timer/icount/timers`.
    #[vmstate(subsection)]
    pub timers: Option<IcountTimers>,
    /// Subsection `timer/icount/shift`.
    #[vmstate(subsection)]
    pub shift: Option<IcountShift>,
}

/// Subsection `timer/icount/warp_timer`: `-icount sleep=on`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "timer/icount/warp_timer", version = 1)]
pub struct WarpTimer {
    /// When the warp began, ns; -1 if there is none.
    pub vm_clock_warp_start: i64,
    /// When it ends.
    pub icount_warp_timer: Timer,
}

/// Subsection `timer/icount/timers`: `-icount shift=auto`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "timer/icount/timers", version = 1)]
pub struct IcountTimers {
    /// Adjustment by real time.
    pub icount_rt_timer: Timer,
    /// Adjustment by virtual time.
    pub icount_vm_timer: Timer,
}

/// Subsection `timer/icount/shift`: `-icount shift=auto`; version 1 in 5.2, version 2 seen in 7.2 and later.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(
    name = "timer/icount/shift",
    version = 2,
    minimum_version = 1,
    wire_version = |shift, _| if shift.last_delta.is_some() { 2 } else { 1 },
    release_versions = |ctx| if ctx.profile.qemu >= QemuVersion::new(6, 0) { (2, 2) } else { (1, 1) }
)]
pub struct IcountShift {
    /// 2^shift ns for an instruction.
    pub icount_time_shift: i16,
    /// The last difference between the clocks, ns (version 2).
    #[vmstate(exists = version >= 2)]
    pub last_delta: Option<i64>,
}
