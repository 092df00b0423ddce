//! s390x.

use super::machine::EM_S390;
use super::parts::{CpuNotes, Fields, NT_FPREGSET, Status, WIDE};
use crate::extract::elf_core::{Format, Note};

const FORMAT: Format = Format { machine: EM_S390, big_endian: true, narrow: false };
const NT_S390_TIMER: u32 = 0x301;
const NT_S390_TODCMP: u32 = 0x302;
const NT_S390_TODPREG: u32 = 0x303;
const NT_S390_CTRS: u32 = 0x304;
const NT_S390_PREFIX: u32 = 0x305;
const NT_S390_VXRS_LOW: u32 = 0x309;
const NT_S390_VXRS_HIGH: u32 = 0x30a;
const NT_S390_GS_CB: u32 = 0x30b;
/// The subsection of vector registers, which comes only from machine types that have them.
const VECTORS: &str = "cpu/vregs";
/// The subsection of guarded storage.
const GUARDED_STORAGE: &str = "cpu/gscb";

pub(super) fn notes(cpu: Fields<'_>, number: u32) -> Result<CpuNotes, String> {
    let mut registers = longs([cpu.word("env.psw.mask")?, cpu.word("env.psw.addr")?]);
    registers.extend(longs(cpu.words::<16>("env.regs")?));
    FORMAT.words(&mut registers, cpu.words::<16>("env.aregs")?.map(|access| access as u32));
    let status = Status { format: FORMAT, places: WIDE, len: 336, number };
    let mut notes = vec![status.note(&registers)];

    // The floating-point registers are the first halves of the vector registers 0 to 15. Control takes eight bytes.
    let mut floating = Vec::new();
    FORMAT.word(&mut floating, cpu.word("cpu/fpu.env.fpc")? as u32);
    FORMAT.word(&mut floating, 0);
    for register in 0..16 {
        FORMAT.long(&mut floating, cpu.word(&format!("cpu/fpu.env.vregs[{register}][0]"))?);
    }
    notes.push(Note { owner: "CORE", kind: NT_FPREGSET, content: floating });

    let mut add = |kind, content| notes.push(Note { owner: "LINUX", kind, content });
    let word = |value: u64| (value as u32).to_be_bytes().to_vec();
    add(NT_S390_PREFIX, word(cpu.word("env.psa")?));
    add(NT_S390_CTRS, longs(cpu.words::<16>("env.cregs")?));
    add(NT_S390_TIMER, longs([cpu.word("env.cputm")?]));
    add(NT_S390_TODCMP, longs([cpu.word("env.ckc")?]));
    add(NT_S390_TODPREG, word(cpu.word("env.todpr")?));
    // A processor without these facilities has zeroes in their place.
    let half = |register: usize, half: usize| match cpu.has(VECTORS) {
        true => cpu.word(&format!("{VECTORS}.env.vregs[{register}][{half}]")),
        false => Ok(0),
    };
    let (mut low, mut high) = (Vec::new(), Vec::new());
    for register in 0..16 {
        FORMAT.long(&mut low, half(register, 1)?);
        FORMAT.long(&mut high, half(16 + register, 0)?);
        FORMAT.long(&mut high, half(16 + register, 1)?);
    }
    add(NT_S390_VXRS_LOW, low);
    add(NT_S390_VXRS_HIGH, high);
    let guarded = match cpu.has(GUARDED_STORAGE) {
        true => cpu.words::<4>(&format!("{GUARDED_STORAGE}.env.gscb"))?,
        false => [0; 4],
    };
    add(NT_S390_GS_CB, longs(guarded));
    Ok(CpuNotes { format: FORMAT, notes, left_out: None })
}

fn longs<const N: usize>(values: [u64; N]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_be_bytes()).collect()
}
