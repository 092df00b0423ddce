//! Subsections of `cpu` for register files that XSAVE manages, and the MSRs next to them.

use super::msr::single;
use qevm_savevm::vmstate::{Table, VmState};

single! {
    /// PKRU
    Pkru: "cpu/pkru", "env.pkru", u32, unless 0;
    /// `IA32_PKRS`
    Pkrs: "cpu/pkrs", "env.pkrs", u32, unless 0;
    /// `IA32_PL0_SSP`
    Pl0Ssp: "cpu/msr_pl0_ssp", "env.pl0_ssp", u64, unless 0;
    /// R16 to R31.
    Apx: "cpu/apx", "env.regs", [u64; 16];
}

/// Subsection `cpu/fpop_ip_dp`: the last x87 instruction; sent when any of it is not 0.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/fpop_ip_dp", version = 1, needed = |sub, _| *sub != FpopIpDp::default())]
pub struct FpopIpDp {
    /// Its opcode.
    #[vmstate(name = "env.fpop")]
    pub fpop: u16,
    /// Its address.
    #[vmstate(name = "env.fpip")]
    pub fpip: u64,
    /// Its operand's address.
    #[vmstate(name = "env.fpdp")]
    pub fpdp: u64,
}

/// Subsection `cpu/mpx`: memory protection extensions; sent when any of it is not 0.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/mpx", version = 1, needed = |sub, _| *sub != Mpx::default())]
pub struct Mpx {
    /// BND0 to BND3.
    #[vmstate(name = "env.bnd_regs")]
    pub bnd_regs: [BndReg; 4],
    /// BNDCFGU
    #[vmstate(name = "env.bndcs_regs.cfgu")]
    pub cfgu: u64,
    /// BNDSTATUS
    #[vmstate(name = "env.bndcs_regs.sts")]
    pub sts: u64,
    /// `IA32_BNDCFGS`
    #[vmstate(name = "env.msr_bndcfgs")]
    pub bndcfgs: u64,
}

/// A bound register, structure `bnd_regs`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "bnd_regs", version = 1)]
pub struct BndReg {
    /// Lower bound.
    pub lb: u64,
    /// Upper bound.
    pub ub: u64,
}

/// Subsection `cpu/avx512`; sent when any of it is not 0.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/avx512", version = 1, needed = |sub, _| *sub != Avx512::default())]
pub struct Avx512 {
    /// K0 to K7.
    #[vmstate(name = "env.opmask_regs")]
    pub opmask_regs: [u64; 8],
    /// The upper halves of ZMM0 to ZMM15.
    #[vmstate(name = "env.xmm_regs")]
    pub zmmh_regs: [ZmmhReg; 16],
    /// ZMM16 to ZMM31.
    #[vmstate(name = "env.xmm_regs")]
    pub hi16_zmm_regs: [Hi16ZmmReg; 16],
}

/// Bits 256 to 511 of a vector register, structure `zmmh_reg`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "zmmh_reg", version = 1)]
pub struct ZmmhReg {
    /// Bits 256 to 319.
    #[vmstate(name = "_q_ZMMReg[4]")]
    pub q4: u64,
    /// Bits 320 to 383.
    #[vmstate(name = "_q_ZMMReg[5]")]
    pub q5: u64,
    /// Bits 384 to 447.
    #[vmstate(name = "_q_ZMMReg[6]")]
    pub q6: u64,
    /// Bits 448 to 511.
    #[vmstate(name = "_q_ZMMReg[7]")]
    pub q7: u64,
}

/// A whole vector register, structure `hi16_zmm_reg`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "hi16_zmm_reg", version = 1)]
pub struct Hi16ZmmReg {
    /// Bits 0 to 63.
    #[vmstate(name = "_q_ZMMReg[0]")]
    pub q0: u64,
    /// Bits 64 to 127.
    #[vmstate(name = "_q_ZMMReg[1]")]
    pub q1: u64,
    /// Bits 128 to 191.
    #[vmstate(name = "_q_ZMMReg[2]")]
    pub q2: u64,
    /// Bits 192 to 255.
    #[vmstate(name = "_q_ZMMReg[3]")]
    pub q3: u64,
    /// Bits 256 to 319.
    #[vmstate(name = "_q_ZMMReg[4]")]
    pub q4: u64,
    /// Bits 320 to 383.
    #[vmstate(name = "_q_ZMMReg[5]")]
    pub q5: u64,
    /// Bits 384 to 447.
    #[vmstate(name = "_q_ZMMReg[6]")]
    pub q6: u64,
    /// Bits 448 to 511.
    #[vmstate(name = "_q_ZMMReg[7]")]
    pub q7: u64,
}

/// Subsection `cpu/msr_xfd`: extended feature disable.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/msr_xfd", version = 1)]
pub struct Xfd {
    /// `IA32_XFD`
    #[vmstate(name = "env.msr_xfd")]
    pub xfd: u64,
    /// `IA32_XFD_ERR`
    #[vmstate(name = "env.msr_xfd_err")]
    pub xfd_err: u64,
}

/// Subsection `cpu/intel_amx_xtile`: AMX tiles.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/intel_amx_xtile", version = 1)]
pub struct AmxXtile {
    /// TILECFG
    #[vmstate(name = "env.xtilecfg")]
    pub xtilecfg: Table<u8, 64>,
    /// TILEDATA
    #[vmstate(name = "env.xtiledata")]
    pub xtiledata: Table<u8, 8192>,
}

/// Subsection `cpu/cet`: control-flow enforcement.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/cet", version = 1)]
pub struct Cet {
    /// `IA32_U_CET`
    #[vmstate(name = "env.u_cet")]
    pub u_cet: u64,
    /// `IA32_S_CET`
    #[vmstate(name = "env.s_cet")]
    pub s_cet: u64,
    /// The CPU model has shadow stacks.
    #[vmstate(subsection)]
    pub shstk: Option<CetShstk>,
}

/// Subsection `cpu/cet_shstk` of `cpu/cet`: shadow stacks.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/cet_shstk", version = 1)]
pub struct CetShstk {
    /// `IA32_PL1_SSP`
    #[vmstate(name = "env.pl1_ssp")]
    pub pl1_ssp: u64,
    /// `IA32_PL2_SSP`
    #[vmstate(name = "env.pl2_ssp")]
    pub pl2_ssp: u64,
    /// `IA32_PL3_SSP`
    #[vmstate(name = "env.pl3_ssp")]
    pub pl3_ssp: u64,
    /// `IA32_INT_SSP_TAB`
    #[vmstate(name = "env.int_ssp_table")]
    pub int_ssp_table: u64,
    /// SSP
    #[vmstate(name = "env.guest_ssp")]
    pub guest_ssp: u64,
}
