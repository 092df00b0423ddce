//! Arm, of 64 and of 32 bits.

use super::machine::{EM_AARCH64, EM_ARM};
use super::parts::{CpuNotes, Fields, NARROW, NT_FPREGSET, Status, WIDE};
use crate::extract::elf_core::{Format, Note};
use qevm_savevm::vmdesc::Value;

const NT_ARM_VFP: u32 = 0x400;
const NT_ARM_SVE: u32 = 0x405;
/// `flags` of the kernel's `user_sve_header`: the registers are SVE's.
const SVE_REGISTERS: u16 = 1;
/// Bytes of the longest vector that QEMU knows. How long those of a processor may be is not in a stream.
const MAX_VECTOR: usize = 256;
/// CPSR: the processor is in AArch32 state.
const CPSR_AARCH32: u64 = 1 << 4;
/// The subsection of both, where one word does not hold them (QEMU 10.0 and later).
const STATUS_AND_CONTROL: &str = "cpu/vfp.cpu/vfp/fpcr_fpsr";
/// The numbers of the system registers, as KVM gives them (the kernel's documentation of KVM_SET_ONE_REG).
const SYSTEM_REGISTERS: &str = "cpreg_vmstate_indexes";
const SYSTEM_VALUES: &str = "cpreg_vmstate_values";
/// Op0 3, op1 4, CRn 2, CRm 0, op2 1: a processor with SVE has it if it has EL2. Others of EL2 come with EL3, too.
const TTBR1_EL2: u64 = 0x6030_0000_0013_e101;
/// Op0 3, op1 6, CRn 1, CRm 1, op2 0: with EL3.
const SCR_EL3: u64 = 0x6030_0000_0013_f088;
/// Op0 3, CRn 1, CRm 2, op2 0, and op1 0, 4 and 6: streams have those of levels that there are not, too.
const ZCR_EL1: u64 = 0x6030_0000_0013_c090;
const ZCR_EL2: u64 = 0x6030_0000_0013_e090;
const ZCR_EL3: u64 = 0x6030_0000_0013_f090;
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
    let mut notes = vec![status, Note { owner: "CORE", kind: NT_FPREGSET, content: vectors }];
    if cpu.has("cpu/sve") {
        notes.push(Note { owner: "LINUX", kind: NT_ARM_SVE, content: scalable(cpu, format, [fpsr, fpcr])? });
    }
    let left_out = cpu.has("cpu/za").then_some("the array of SME (ZA)");
    Ok(CpuNotes { format, notes, left_out })
}

/// The registers of SVE, as the kernel's `user_sve_header` and what follows it have them.
fn scalable(cpu: Fields<'_>, format: Format, status: [u64; 2]) -> Result<Vec<u8>, String> {
    let len = vector_len(cpu)?;
    let mut bytes = Vec::new();
    format.words(&mut bytes, [scalable_len(len), scalable_len(MAX_VECTOR)].map(|len| len as u32));
    for half in [len as u16, MAX_VECTOR as u16, SVE_REGISTERS, 0] {
        format.half(&mut bytes, half);
    }
    for register in 0..32 {
        let low = cpu.words::<2>(&format!("cpu/vfp.env.vfp.zregs[{register}].d"))?;
        let high = cpu.words::<14>(&format!("cpu/sve.env.vfp.zregs[{register}].d"))?;
        format.longs(&mut bytes, low.into_iter().chain(high).take(len / 8));
    }
    // A bit for each byte of a vector; the last one is FFR.
    for register in 0..17 {
        let bits = cpu.words::<4>(&format!("cpu/sve.env.vfp.pregs[{register}].p"))?;
        let bits = bits.into_iter().flat_map(u64::to_le_bytes);
        bytes.extend(bits.take(len / 8));
    }
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    format.words(&mut bytes, status.map(|word| word as u32));
    bytes.resize(scalable_len(len), 0);
    Ok(bytes)
}

/// Bytes of the note for vectors of `len` bytes: header, 32 vectors, 17 predicates, and two words.
fn scalable_len(len: usize) -> usize {
    ((16 + 32 * len + 17 * len / 8).next_multiple_of(16) + 8).next_multiple_of(16)
}

/// The bytes of a vector at EL1: the least of what each exception level above EL0 that there is allows in its ZCR.
fn vector_len(cpu: Fields<'_>) -> Result<usize, String> {
    let register = |number: u64| system_register(cpu, number);
    let mut quads = register(ZCR_EL1)?.map_or(u64::MAX, |zcr| (zcr & 15) + 1);
    for (of_level, zcr) in [(TTBR1_EL2, ZCR_EL2), (SCR_EL3, ZCR_EL3)] {
        if let (Some(_), Some(zcr)) = (register(of_level)?, register(zcr)?) {
            quads = quads.min((zcr & 15) + 1);
        }
    }
    Ok(16 * quads.min(MAX_VECTOR as u64 / 16) as usize)
}

fn system_register(cpu: Fields<'_>, number: u64) -> Result<Option<u64>, String> {
    let array = |path: &str| match &cpu.find(path)?.value {
        Value::Scalars(numbers) => Ok(numbers.clone()),
        _ => Err(format!("field '{path}' is no array")),
    };
    let (numbers, values) = (array(SYSTEM_REGISTERS)?, array(SYSTEM_VALUES)?);
    let index = numbers.iter().position(|register| register.as_u64() == number);
    Ok(index.and_then(|index| values.at(index)).map(|value| value.as_u64()))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The lengths are those of the header of a note by QEMU 10.0 of a processor `max`.
    #[test]
    fn a_note_of_sve_is_as_long_as_qemus() {
        assert_eq!([16, MAX_VECTOR].map(scalable_len), [0x250, 0x2240]);
    }
}
