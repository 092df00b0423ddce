//! The registers of processors other than x86's, as the notes of an ELF core.
//!
//! Which target a guest is of is in the fields of its section `cpu`. The layouts are those of Linux's `elf_prstatus`
//! and register sets of each processor; which notes there are, and in which order, is as QMP `dump-guest-memory` has it
//! (QEMU 7.2 to 11.1).

mod arm;
pub(super) mod machine;
mod parts;
mod ppc;
mod riscv;
mod s390x;

pub use parts::CpuNotes;

use parts::Fields;
use qevm_savevm::vmdesc::Node;

/// The notes of a CPU, whose fields these are; `number` counts CPUs from 1. `None` if it is of no target that is known
/// here, or of x86.
///
/// The error names the field that is not there.
pub(super) fn notes(cpu: &Node, number: u32) -> Option<Result<CpuNotes, String>> {
    let has = |name: &str| cpu.child(name).is_some();
    let fields = Fields(cpu);
    Some(if has("env.psw.addr") {
        s390x::notes(fields, number)
    } else if has("env.spr") && has("env.nip") {
        ppc::notes(fields, number)
    } else if has("env.misa_mxl") {
        riscv::notes(fields, number)
    } else if has("env.xregs") || has("env.regs") && has("cpsr") {
        arm::notes(fields, number)
    } else {
        return None;
    })
}
