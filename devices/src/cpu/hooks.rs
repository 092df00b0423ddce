//! What QEMU does to a vCPU's state before it is sent and after it was loaded (`docs/format/microvm-devices.md`, cpu).

use super::Cpu;
use qevm_savevm::vmstate::{Accel, Context, VmStateError};

/// CR0.PE: protected mode.
const CR0_PE: u64 = 1;
/// The DPL in a segment's flags.
const SEGMENT_DPL: u32 = 3 << 13;
/// The index of CS in `segs`.
const CS: usize = 1;
/// Hidden flag: a nested guest runs.
const HF_GUEST: u32 = 1 << 21;

const DEBUG_EXCEPTION: i32 = 1;
const PAGE_FAULT: i32 = 14;
/// DR6: the breakpoint bits, and the bit that reads 1 outside of transactions.
const DR6_TRAPS: u64 = 0xf;
const DR6_RTM: u64 = 1 << 16;

pub(super) fn exception_info_is_needed(cpu: &Cpu) -> bool {
    cpu.exception_info.as_ref().is_some_and(|info| info.pending != 0) && cpu.hflags & HF_GUEST != 0
}

pub(super) fn pre_save(cpu: &mut Cpu, _: &Context) -> Result<(), VmStateError> {
    if cpu.cr0 & CR0_PE == 0 && cpu.segs[CS].flags & SEGMENT_DPL != 0 {
        // Real mode has no privilege levels; what a hypervisor leaves in the hidden parts must not travel.
        cpu.segs.iter_mut().for_each(|segment| segment.flags &= !SEGMENT_DPL);
    }
    if cpu.hflags & HF_GUEST == 0 {
        deliver_pending_exception(cpu);
    }
    Ok(())
}

/// Outside of a nested guest no hypervisor can intercept a pending exception: it becomes an injected one, and its
/// payload goes where the guest's handler looks for it.
fn deliver_pending_exception(cpu: &mut Cpu) {
    let Some(info) = cpu.exception_info.as_mut().filter(|info| info.pending != 0) else { return };
    info.pending = 0;
    info.injected = 1;
    if std::mem::take(&mut info.has_payload) == 0 {
        return;
    }
    match cpu.exception_nr {
        DEBUG_EXCEPTION => {
            cpu.dr[6] = ((cpu.dr[6] & !DR6_TRAPS) | DR6_RTM | info.payload) ^ (info.payload & DR6_RTM);
        }
        PAGE_FAULT => cpu.cr2 = info.payload,
        _ => {}
    }
}

pub(super) fn post_load(cpu: &mut Cpu, _: u32, ctx: &Context) -> Result<(), VmStateError> {
    if cpu.fpregs_format != 0 {
        let found = cpu.fpregs_format.into();
        return Err(VmStateError::Refused { what: "format of the x87 registers", found, expected: "0" });
    }
    if ctx.accel == Accel::Kvm && cpu.hflags & HF_GUEST != 0 && cpu.nested_state.is_none() {
        let (what, expected) = ("hidden flags", "no nested guest, since there is no cpu/nested_state");
        return Err(VmStateError::Refused { what, found: cpu.hflags.into(), expected });
    }
    Ok(())
}

impl Cpu {
    /// The vector of the exception that is being injected: one that neither `cpu/exception_info` calls pending nor
    /// has no vector. Older sources have no other way to say it.
    pub fn injected_exception(&self) -> Option<u8> {
        let pending = self.exception_info.as_ref().is_some_and(|info| info.pending != 0 && info.injected == 0);
        u8::try_from(self.exception_nr).ok().filter(|_| !pending)
    }
}
