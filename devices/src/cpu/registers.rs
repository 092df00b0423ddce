//! The structures of the `cpu` section's fields.

use qevm_savevm::vmstate::{Tmp, VmState};

/// An x87 register, structure `fpreg`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "fpreg", version = 0)]
pub struct FpReg {
    /// The 80-bit value.
    pub tmp: Tmp<FpRegValue>,
}

/// An 80-bit floating point value, structure `fpreg_tmp`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "fpreg_tmp", version = 0)]
pub struct FpRegValue {
    /// Bits 0 to 63; where MMX registers live.
    #[vmstate(name = "tmp_mant")]
    pub mantissa: u64,
    /// Bits 64 to 79: sign and exponent.
    #[vmstate(name = "tmp_exp")]
    pub exponent: u16,
}

impl FpReg {
    /// The register with this mantissa, and sign and exponent.
    pub fn new(mantissa: u64, exponent: u16) -> Self {
        FpReg { tmp: Tmp(FpRegValue { mantissa, exponent }) }
    }
}

/// A segment register with its hidden part, structure `segment`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "segment", version = 1)]
pub struct Segment {
    /// Selector.
    pub selector: u32,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// The descriptor's second word without base and limit: type in bits 8 to 11, S 12, DPL 13 and 14, P 15, AVL 20,
    /// L 21, D/B 22, G 23.
    pub flags: u32,
}

/// Bits 0 to 127 of a vector register, structure `xmm_reg`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "xmm_reg", version = 1)]
pub struct XmmReg {
    /// Bits 0 to 63.
    #[vmstate(name = "_q_ZMMReg[0]")]
    pub q0: u64,
    /// Bits 64 to 127.
    #[vmstate(name = "_q_ZMMReg[1]")]
    pub q1: u64,
}

/// Bits 128 to 255 of a vector register, structure `ymmh_reg`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "ymmh_reg", version = 1)]
pub struct YmmhReg {
    /// Bits 128 to 191.
    #[vmstate(name = "_q_ZMMReg[2]")]
    pub q2: u64,
    /// Bits 192 to 255.
    #[vmstate(name = "_q_ZMMReg[3]")]
    pub q3: u64,
}

/// A variable-range MTRR, structure `mtrr_var`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "mtrr_var", version = 1)]
pub struct MtrrVar {
    /// `IA32_MTRR_PHYSBASE`
    pub base: u64,
    /// `IA32_MTRR_PHYSMASK`
    pub mask: u64,
}
