//! Subsections of `cpu` for the processor's own MSRs and events.

use qevm_savevm::vmstate::{Table, VmState};

/// Declares subsections of one value. `unless` is the value that QEMU does not send.
macro_rules! single {
    ($($(#[$doc:meta])* $type:ident: $name:literal, $field:literal, $value:ty $(, unless $default:literal)?;)*) => {$(
        $(#[$doc])*
        #[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
        #[vmstate(name = $name, version = 1 $(, needed = |sub, _| sub.value != $default)?)]
        pub struct $type {
            /// The value.
            #[vmstate(name = $field)]
            pub value: $value,
        }
    )*};
}
pub(super) use single;

single! {
    /// Error code of the exception pending or being injected (since 11.0).
    ErrorCode: "cpu/error_code", "env.error_code", i32;
    /// `IA32_TSC_ADJUST`
    TscAdjust: "cpu/msr_tsc_adjust", "env.tsc_adjust", u64, unless 0;
    /// `IA32_TSC_DEADLINE`
    TscDeadline: "cpu/msr_tscdeadline", "env.tsc_deadline", u64, unless 0;
    /// `IA32_MISC_ENABLE`; 1 (fast strings) is the default.
    MiscEnable: "cpu/msr_ia32_misc_enable", "env.msr_ia32_misc_enable", u64, unless 1;
    /// `IA32_FEATURE_CONTROL`
    FeatureControl: "cpu/msr_ia32_feature_control", "env.msr_ia32_feature_control", u64, unless 0;
    /// `IA32_XSS`
    Xss: "cpu/xss", "env.xss", u64, unless 0;
    /// `IA32_UMWAIT_CONTROL`
    Umwait: "cpu/umwait", "env.umwait", u32, unless 0;
    /// TSC frequency in kHz.
    TscKhz: "cpu/tsc_khz", "env.tsc_khz", i64, unless 0;
    /// `MSR_SMI_COUNT`
    SmiCount: "cpu/msr_smi_count", "env.msr_smi_count", u64, unless 0;
    /// `IA32_SPEC_CTRL`
    SpecCtrl: "cpu/spec_ctrl", "env.spec_ctrl", u64, unless 0;
    /// `MSR_AMD64_TSC_RATIO`
    AmdTscScale: "cpu/amd_tsc_scale_msr", "env.amd_tsc_scale_msr", u64;
    /// `IA32_MCG_EXT_CTL`
    McgExtCtl: "cpu/mcg_ext_ctl", "env.mcg_ext_ctl", u64, unless 0;
    /// `MSR_VIRT_SSBD`
    VirtSsbd: "cpu/virt_ssbd", "env.virt_ssbd", u64, unless 0;
    /// `IA32_TSX_CTRL`
    TsxCtrl: "cpu/msr_tsx_ctrl", "env.tsx_ctrl", u32;
    /// `IA32_SGXLEPUBKEYHASH0` to `3`
    IntelSgx: "cpu/intel_sgx", "env.msr_ia32_sgxlepubkeyhash", [u64; 4];
    /// PAE page directory pointers, if they are not those in memory.
    Pdptrs: "cpu/pdptrs", "env.pdptrs", [u64; 4];
    /// `MSR_K7_HWCR`
    Hwcr: "cpu/msr_hwcr", "env.msr_hwcr", u64, unless 0;
    /// 1: a triple fault is pending.
    TripleFault: "cpu/triple_fault", "env.triple_fault_pending", u8, unless 0;
}

/// Subsection `cpu/msr_architectural_pmu`: performance monitoring; sent when any of it is not 0.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/msr_architectural_pmu", version = 1, needed = |pmu, _| *pmu != ArchitecturalPmu::default())]
pub struct ArchitecturalPmu {
    /// `IA32_FIXED_CTR_CTRL`
    #[vmstate(name = "env.msr_fixed_ctr_ctrl")]
    pub fixed_ctr_ctrl: u64,
    /// `IA32_PERF_GLOBAL_CTRL`
    #[vmstate(name = "env.msr_global_ctrl")]
    pub global_ctrl: u64,
    /// `IA32_PERF_GLOBAL_STATUS`
    #[vmstate(name = "env.msr_global_status")]
    pub global_status: u64,
    /// `IA32_PERF_GLOBAL_OVF_CTRL`
    #[vmstate(name = "env.msr_global_ovf_ctrl")]
    pub global_ovf_ctrl: u64,
    /// Fixed counters.
    #[vmstate(name = "env.msr_fixed_counters")]
    pub fixed_counters: [u64; 3],
    /// General-purpose counters.
    #[vmstate(name = "env.msr_gp_counters")]
    pub gp_counters: [u64; 18],
    /// Their event selects.
    #[vmstate(name = "env.msr_gp_evtsel")]
    pub gp_evtsel: [u64; 18],
}

/// Subsection `cpu/intel_pt`: processor trace; sent when any of it is not 0.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/intel_pt", version = 1, needed = |pt, _| *pt != IntelPt::default())]
pub struct IntelPt {
    /// `IA32_RTIT_CTL`
    #[vmstate(name = "env.msr_rtit_ctrl")]
    pub ctrl: u64,
    /// `IA32_RTIT_STATUS`
    #[vmstate(name = "env.msr_rtit_status")]
    pub status: u64,
    /// `IA32_RTIT_OUTPUT_BASE`
    #[vmstate(name = "env.msr_rtit_output_base")]
    pub output_base: u64,
    /// `IA32_RTIT_OUTPUT_MASK_PTRS`
    #[vmstate(name = "env.msr_rtit_output_mask")]
    pub output_mask: u64,
    /// `IA32_RTIT_CR3_MATCH`
    #[vmstate(name = "env.msr_rtit_cr3_match")]
    pub cr3_match: u64,
    /// `IA32_RTIT_ADDR0_A` to `ADDR3_B`
    #[vmstate(name = "env.msr_rtit_addrs")]
    pub addrs: [u64; 8],
}

/// Subsection `cpu/fred`: flexible return and event delivery.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/fred", version = 1)]
pub struct Fred {
    /// `IA32_FRED_RSP0`
    #[vmstate(name = "env.fred_rsp0")]
    pub rsp0: u64,
    /// `IA32_FRED_RSP1`
    #[vmstate(name = "env.fred_rsp1")]
    pub rsp1: u64,
    /// `IA32_FRED_RSP2`
    #[vmstate(name = "env.fred_rsp2")]
    pub rsp2: u64,
    /// `IA32_FRED_RSP3`
    #[vmstate(name = "env.fred_rsp3")]
    pub rsp3: u64,
    /// `IA32_FRED_STKLVLS`
    #[vmstate(name = "env.fred_stklvls")]
    pub stklvls: u64,
    /// `IA32_FRED_SSP1`
    #[vmstate(name = "env.fred_ssp1")]
    pub ssp1: u64,
    /// `IA32_FRED_SSP2`
    #[vmstate(name = "env.fred_ssp2")]
    pub ssp2: u64,
    /// `IA32_FRED_SSP3`
    #[vmstate(name = "env.fred_ssp3")]
    pub ssp3: u64,
    /// `IA32_FRED_CONFIG`
    #[vmstate(name = "env.fred_config")]
    pub config: u64,
}

/// Subsection `cpu/arch_lbr`: last branch records.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/arch_lbr", version = 1)]
pub struct ArchLbr {
    /// `IA32_LBR_CTL`
    #[vmstate(name = "env.msr_lbr_ctl")]
    pub ctl: u64,
    /// `IA32_LBR_DEPTH`
    #[vmstate(name = "env.msr_lbr_depth")]
    pub depth: u64,
    /// The records.
    #[vmstate(name = "env.lbr_records", since = 1)]
    pub records: Table<LbrRecord, 32>,
}

/// A last branch record, structure `lbr_records_var`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "lbr_records_var", version = 1)]
pub struct LbrRecord {
    /// `IA32_LBR_x_FROM_IP`
    pub from: u64,
    /// `IA32_LBR_x_TO_IP`
    pub to: u64,
    /// `IA32_LBR_x_INFO`
    pub info: u64,
}
