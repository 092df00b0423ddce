//! Registers of processors whose type in a description is a name of their own. All are big-endian, whatever the guest
//! is.
//!
//! Facts: streams of QEMU 10.0 and 11.1 whose guests had loaded known values.

use super::fields::Fields;
use crate::Error;

/// Registers that are one number of their size.
const NUMBERS: [&str; 19] = [
    // Arm: program status, whether PSCI has the processor off, floating-point control and status, in one word or apart.
    // PowerPC: doublewords of vector-scalar registers, vector status and control. SPARC, HPPA: status words.
    "cpsr",
    "powered_off",
    "fpscr",
    "fpsr",
    "fpr",
    "vsr",
    "cpu/altivec/vscr",
    "psr",
    "fsr",
    "psw",
    // AVR, Alpha, OpenRISC, 64-bit SPARC.
    "sreg",
    "rampD",
    "rampX",
    "rampY",
    "rampZ",
    "eind",
    "fpcr",
    "sr",
    "xcc",
];

/// Reads a register that is one number, if this type is one.
pub(super) fn number(fields: &mut Fields<'_, '_>, name: &str, type_name: &str, size: u64) -> Result<bool, Error> {
    use super::ScalarKind::{U8, U32, U64};
    let kind = match size {
        1 => U8,
        4 => U32,
        8 => U64,
        _ => return Ok(false),
    };
    if !NUMBERS.contains(&type_name) {
        return Ok(false);
    }
    fields.scalar(name.to_owned(), type_name.to_owned(), kind).map(|_| true)
}

/// A vector register of PowerPC, the less significant doubleword first, as a source on x86 has it.
pub(super) fn altivec(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    fields.u64("low")?;
    fields.u64("high").map(drop)
}

/// An entry of a segment lookaside buffer of PowerPC.
pub(super) fn segment(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    fields.u64("esid")?;
    fields.u64("vsid").map(drop)
}

/// A floating-point register of MIPS, which is the lower half of a vector register.
pub(super) fn mips_float(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    fields.u64("fpr")?;
    fields.u64("upper half").map(drop)
}

/// Bytes of an entry of the TLB where virtual page numbers have 64 bits.
const TLB_ENTRY_64: u64 = 36;

/// An entry of the TLB of MIPS. Frames are told as physical addresses.
pub(super) fn mips_tlb(fields: &mut Fields<'_, '_>, size: u64) -> Result<(), Error> {
    match size {
        TLB_ENTRY_64 => fields.u64("VPN").map(drop)?,
        _ => fields.u32("VPN").map(drop)?,
    }
    fields.u32("PageMask")?;
    fields.u16("ASID")?;
    fields.u32("MMID")?;
    fields.u16("flags")?;
    fields.u64("PFN[0]")?;
    fields.u64("PFN[1]").map(drop)
}
