//! Arm, of 64 and of 32 bits.

use super::machine::{EM_AARCH64, EM_ARM};
use super::parts::{CpuNotes, Fields, NARROW, NT_FPREGSET, Status, WIDE};
use crate::extract::elf_core::{Format, Note};
use qevm_savevm::vmdesc::Value;

const NT_ARM_VFP: u32 = 0x400;
/// CPSR: the processor is in AArch32 state.
const CPSR_AARCH32: u64 = 1 << 4;
/// The subsection of both, where one word does not hold them (QEMU 10.0 and later).
const STATUS_AND_CONTROL: &str = "cpu/vfp.cpu/vfp/fpcr_fpsr";
/// The numbers of the system registers, as KVM gives them (the kernel's documentation of KVM_SET_ONE_REG).
const SYSTEM_REGISTERS: &str = "cpreg_vmstate_indexes";
/// ID_AA64PFR1_EL1 (op0 3, op1 0, CRn 0, CRm 4, op2 1), which every processor with AArch64 state has, and no other.
const ID_AA64PFR1_EL1: u64 = 0x6030_0000_0013_c021;
/// The bits of `fpscr` that are in FPSR and in FPCR: a stream has both in one word.
const FPSR: u64 = 0xf800_009f;
const FPCR: u64 = 0x07f7_9f00;

pub(super) fn notes(cpu: Fields<'_>, number: u32) -> Result<CpuNotes, String> {
    if cpu.has("cpu/m") {
        return Err("an Arm M-profile processor: no core is written of those".into());
    }
    let Value::Scalars(system) = &cpu.find(SYSTEM_REGISTERS)?.value else {
        return Err(format!("field '{SYSTEM_REGISTERS}' is no array"));
    };
    match system.iter().any(|register| register.as_u64() == ID_AA64PFR1_EL1) {
        true => long_notes(cpu, number),
        false => narrow_notes(cpu, number),
    }
}

fn long_notes(cpu: Fields<'_>, number: u32) -> Result<CpuNotes, String> {
    let format = Format { machine: EM_AARCH64, big_endian: false, narrow: false };
    let state = cpu.word("cpsr")?;
    if state & CPSR_AARCH32 != 0 {
        return Err("the processor is in AArch32 state, whose registers have no place in a core of AArch64".into());
    }
    let mut registers = Vec::new();
    // X0 to X30, then SP.
    format.longs(&mut registers, cpu.words::<32>("env.xregs")?);
    // The floating-point registers are valid.
    format.longs(&mut registers, [cpu.word("env.pc")?, state, 1]);
    let status = Status { format, places: WIDE, len: 392, number }.note(&registers);

    let mut vectors = Vec::new();
    for register in 0..32 {
        format.longs(&mut vectors, cpu.words::<2>(&format!("cpu/vfp.env.vfp.zregs[{register}].d"))?);
    }
    let (fpsr, fpcr) = match cpu.has(STATUS_AND_CONTROL) {
        true => (cpu.word(&format!("{STATUS_AND_CONTROL}.fpsr"))?, cpu.word(&format!("{STATUS_AND_CONTROL}.fpcr"))?),
        false => {
            let both = cpu.word("cpu/vfp.fpscr")?;
            (both & FPSR, both & FPCR)
        }
    };
    format.words(&mut vectors, [fpsr, fpcr, 0, 0].map(|word| word as u32));
    let notes = vec![status, Note { owner: "CORE", kind: NT_FPREGSET, content: vectors }];
    let left_out = cpu.has("cpu/sve").then_some("the SVE registers (NT_ARM_SVE)");
    Ok(CpuNotes { format, notes, left_out })
}

fn narrow_notes(cpu: Fields<'_>, number: u32) -> Result<CpuNotes, String> {
    let format = Format { machine: EM_ARM, big_endian: false, narrow: true };
    let mut registers = Vec::new();
    format.words(&mut registers, cpu.words::<16>("env.regs")?.map(|register| register as u32));
    // CPSR, the argument of a system call; the floating-point registers are valid.
    format.words(&mut registers, [cpu.word("cpsr")?, 0, 1].map(|word| word as u32));
    let mut notes = vec![Status { format, places: NARROW, len: 148, number }.note(&registers)];
    if cpu.has("cpu/vfp") {
        let mut doubles = Vec::new();
        for register in 0..16 {
            format.longs(&mut doubles, cpu.words::<2>(&format!("cpu/vfp.env.vfp.zregs[{register}].d"))?);
        }
        format.word(&mut doubles, cpu.word("cpu/vfp.fpscr")? as u32);
        notes.push(Note { owner: "LINUX", kind: NT_ARM_VFP, content: doubles });
    }
    Ok(CpuNotes { format, notes, left_out: None })
}
