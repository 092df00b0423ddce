//! RISC-V.

use super::machine::EM_RISCV;
use super::parts::{CpuNotes, Fields, NARROW, Status, WIDE};
use crate::extract::elf_core::Format;

/// `env.misa_mxl` of a processor of 32 bits.
const MXL_RV32: u64 = 1;

pub(super) fn notes(cpu: Fields<'_>, number: u32) -> Result<CpuNotes, String> {
    let narrow = cpu.word("env.misa_mxl")? == MXL_RV32;
    let format = Format { machine: EM_RISCV, big_endian: false, narrow };
    // PC takes the place of x0, which is always 0.
    let mut general = cpu.words::<32>("env.gpr")?;
    general[0] = cpu.word("env.pc")?;
    let mut registers = Vec::new();
    format.addresses(&mut registers, general);
    let status =
        Status { format, places: if narrow { NARROW } else { WIDE }, len: if narrow { 204 } else { 376 }, number };
    Ok(CpuNotes { format, notes: vec![status.note(&registers)], left_out: None })
}
