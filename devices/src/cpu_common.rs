//! Section `cpu_common`: what every architecture's vCPU has.

use qevm_savevm::vmstate::VmState;

/// One vCPU, section `cpu_common` version 1; the instance is the cpu_index. (`docs/format/microvm-devices.md`,
/// cpu_common)
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu_common", version = 1)]
pub struct CpuCommon {
    /// 1: halted until an interrupt.
    pub halted: u32,
    /// Pending interrupt bits (`CPU_INTERRUPT_*`).
    pub interrupt_request: u32,
    /// Subsection `cpu_common/exception_index`: only under TCG.
    #[vmstate(subsection)]
    pub exception_index: Option<ExceptionIndex>,
    /// Subsection `cpu_common/crash_occurred`.
    #[vmstate(subsection)]
    pub crash_occurred: Option<CrashOccurred>,
}

/// Subsection `cpu_common/exception_index`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(
    name = "cpu_common/exception_index",
    version = 1,
    needed = |sub, ctx| ctx.accel == qevm_savevm::vmstate::Accel::Tcg && sub.exception_index != -1
)]
pub struct ExceptionIndex {
    /// The exception being delivered; -1 for none.
    pub exception_index: i32,
}

/// Subsection `cpu_common/crash_occurred`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu_common/crash_occurred", version = 1, needed = |sub, _| sub.crash_occurred)]
pub struct CrashOccurred {
    /// The guest reported a crash.
    pub crash_occurred: bool,
}
