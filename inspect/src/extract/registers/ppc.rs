//! PowerPC, of 64 and of 32 bits.

use super::machine::{EM_PPC, EM_PPC64};
use super::parts::{CpuNotes, Fields, NT_FPREGSET, Status, WIDE};
use crate::extract::elf_core::{Format, Note};

const NT_PPC_VMX: u32 = 0x100;
const NT_PPC_SPE: u32 = 0x101;
const NT_PPC_VSX: u32 = 0x102;
/// Numbers of special-purpose registers (Power ISA).
const XER: usize = 1;
const LR: usize = 8;
const CTR: usize = 9;
const LPCR: usize = 318;
/// LPCR: interrupts are taken in little-endian mode, as kernels of that byte order have it.
const LPCR_ILE: u64 = 1 << 25;
const SPE_LEN: usize = 140;

pub(super) fn notes(cpu: Fields<'_>, number: u32) -> Result<CpuNotes, String> {
    let special = cpu.words::<1024>("env.spr")?;
    // The program for 32 bits. QEMU puts its registers where those of 64 bits start.
    let narrow = cpu.is_narrow("env.gpr");
    let machine = if narrow { EM_PPC } else { EM_PPC64 };
    let format = Format { machine, big_endian: narrow || special[LPCR] & LPCR_ILE == 0, narrow };
    let mut registers = Vec::new();
    format.addresses(&mut registers, cpu.words::<32>("env.gpr")?);
    let condition = cpu.words::<8>("env.crf")?.iter().fold(0, |all, field| all << 4 | field & 0xf);
    // NIP, MSR, the argument of a system call, CTR, LR, XER, CR.
    let (pc, state) = (cpu.word("env.nip")?, cpu.word("env.msr")?);
    for register in [pc, state, 0, special[CTR], special[LR], special[XER], condition] {
        format.address(&mut registers, register);
    }
    let status = Status { format, places: WIDE, len: if narrow { 328 } else { 504 }, number };
    let mut notes = vec![status.note(&registers)];
    let mut add = |kind, content| notes.push(Note { owner: "CORE", kind, content });

    let mut floating = Vec::new();
    for register in 0..32 {
        format.long(&mut floating, cpu.word(&format!("cpu/fpu.env.vsr[{register}]"))?);
    }
    format.address(&mut floating, cpu.word("cpu/fpu.env.fpscr")?);
    add(NT_FPREGSET, floating);

    // Subsections come of processors that have these registers; the notes, of all.
    let (mut vectors, mut scalars) = (Vec::new(), Vec::new());
    for register in 0..32 {
        let half = |half: &str| match cpu.has("cpu/altivec") {
            true => cpu.word(&format!("cpu/altivec.env.vsr[{register}].{half}")),
            false => Ok(0),
        };
        quadword(format, &mut vectors, half("high")?, half("low")?);
        let second = match cpu.has("cpu/vsx") {
            true => cpu.word(&format!("cpu/vsx.env.vsr[{register}]"))?,
            false => 0,
        };
        format.long(&mut scalars, second);
    }
    let control = if cpu.has("cpu/altivec") { cpu.word("cpu/altivec.vscr")? } else { 0 };
    format.words(&mut vectors, [0, 0, 0, control as u32]);
    // QEMU does not tell VRSAVE.
    vectors.resize(544, 0);
    add(NT_PPC_VMX, vectors);
    add(NT_PPC_VSX, scalars);
    add(NT_PPC_SPE, vec![0; SPE_LEN]);
    Ok(CpuNotes { format, notes, left_out: None })
}

fn quadword(format: Format, out: &mut Vec<u8>, high: u64, low: u64) {
    let halves = if format.big_endian { [high, low] } else { [low, high] };
    format.longs(out, halves);
}
