//! Section `cpu`: the architectural state of an x86 vCPU.
//!
//! [`Cpu`] is the section; [`registers`] has the structures of its fields. Its subsections are in [`paravirt`] (KVM's,
//! Hyper-V's and Xen's MSRs), [`msr`] (the processor's own MSRs and events), [`extended`] (register files that XSAVE
//! manages) and [`nested`] (virtualisation inside the guest).

pub mod extended;
mod hooks;
pub mod msr;
pub mod nested;
pub mod paravirt;
pub mod registers;

use qevm_savevm::vmstate::{Table, VmState};
use registers::{FpReg, MtrrVar, Segment, XmmReg, YmmhReg};

/// A vCPU, section `cpu` version 12; the instance is the cpu_index. Version 11 ends after `wall_clock_msr`.
///
/// 1817 bytes and subsections, the same fields from 5.2 to 11.1. (`docs/format/microvm-devices.md`, cpu)
///
/// ```
/// use qevm_devices::cpu::{Cpu, extended::Pkru};
/// use qevm_savevm::vmstate::{self, Context};
/// use qevm_wire::QemuVersion;
///
/// let ctx = Context::new(QemuVersion::new(11, 1), "microvm");
/// // A monitor fills in every subsection that it has a value for; `save` drops those that QEMU would not send.
/// let mut cpu = Cpu { pkru: Some(Pkru { value: 0 }), ..Cpu::default() };
/// let (version, payload) = vmstate::save(&mut cpu, &ctx)?;
/// assert_eq!((version, payload.len(), cpu.pkru), (12, 1817, None));
/// # Ok::<(), qevm_savevm::Error>(())
/// ```
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu", version = 12, minimum_version = 11, pre_save = hooks::pre_save, post_load = hooks::post_load)]
pub struct Cpu {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8 … R15.
    #[vmstate(name = "env.regs")]
    pub regs: [u64; 16],
    /// RIP.
    #[vmstate(name = "env.eip")]
    pub eip: u64,
    /// RFLAGS.
    #[vmstate(name = "env.eflags")]
    pub eflags: u64,
    /// QEMU's hidden flags: CPL, operating mode and the like, derived from the other registers.
    #[vmstate(name = "env.hflags")]
    pub hflags: u32,
    /// x87 control word.
    #[vmstate(name = "env.fpuc")]
    pub fpuc: u16,
    /// x87 status word, with the top of stack in bits 11 to 13.
    #[vmstate(name = "env.fpus_vmstate")]
    pub fpus: u16,
    /// x87 tags: bit i is set when register i is valid.
    #[vmstate(name = "env.fptag_vmstate")]
    pub fptag: u16,
    /// Always 0; QEMU refuses anything else.
    #[vmstate(name = "env.fpregs_format_vmstate")]
    pub fpregs_format: u16,
    /// The x87 registers.
    #[vmstate(name = "env.fpregs")]
    pub fpregs: [FpReg; 8],
    /// ES CS SS DS FS GS.
    #[vmstate(name = "env.segs")]
    pub segs: [Segment; 6],
    /// LDTR.
    #[vmstate(name = "env.ldt")]
    pub ldt: Segment,
    /// TR.
    #[vmstate(name = "env.tr")]
    pub tr: Segment,
    /// GDTR: base and limit.
    #[vmstate(name = "env.gdt")]
    pub gdt: Segment,
    /// IDTR: base and limit.
    #[vmstate(name = "env.idt")]
    pub idt: Segment,
    /// `IA32_SYSENTER_CS`
    #[vmstate(name = "env.sysenter_cs")]
    pub sysenter_cs: u32,
    /// `IA32_SYSENTER_ESP`
    #[vmstate(name = "env.sysenter_esp")]
    pub sysenter_esp: u64,
    /// `IA32_SYSENTER_EIP`
    #[vmstate(name = "env.sysenter_eip")]
    pub sysenter_eip: u64,
    /// CR0
    #[vmstate(name = "env.cr[0]")]
    pub cr0: u64,
    /// CR2
    #[vmstate(name = "env.cr[2]")]
    pub cr2: u64,
    /// CR3
    #[vmstate(name = "env.cr[3]")]
    pub cr3: u64,
    /// CR4
    #[vmstate(name = "env.cr[4]")]
    pub cr4: u64,
    /// Debug registers DR0 to DR7.
    #[vmstate(name = "env.dr")]
    pub dr: [u64; 8],
    /// All ones, or without bit 20 when the A20 gate is closed.
    #[vmstate(name = "env.a20_mask")]
    pub a20_mask: i32,
    /// MXCSR
    #[vmstate(name = "env.mxcsr")]
    pub mxcsr: u32,
    /// XMM0 to XMM15.
    #[vmstate(name = "env.xmm_regs")]
    pub xmm_regs: [XmmReg; 16],
    /// `IA32_EFER`
    #[vmstate(name = "env.efer")]
    pub efer: u64,
    /// `IA32_STAR`
    #[vmstate(name = "env.star")]
    pub star: u64,
    /// `IA32_LSTAR`
    #[vmstate(name = "env.lstar")]
    pub lstar: u64,
    /// `IA32_CSTAR`
    #[vmstate(name = "env.cstar")]
    pub cstar: u64,
    /// `IA32_FMASK`
    #[vmstate(name = "env.fmask")]
    pub fmask: u64,
    /// `IA32_KERNEL_GS_BASE`
    #[vmstate(name = "env.kernelgsbase")]
    pub kernelgsbase: u64,
    /// `IA32_SMBASE`
    #[vmstate(name = "env.smbase")]
    pub smbase: u32,
    /// `IA32_PAT`
    #[vmstate(name = "env.pat")]
    pub pat: u64,
    /// More hidden flags: global interrupt flag, SVM and the like.
    #[vmstate(name = "env.hflags2")]
    pub hflags2: u32,
    /// `VM_HSAVE_PA`
    #[vmstate(name = "env.vm_hsave")]
    pub vm_hsave: u64,
    /// Guest-physical address of the VMCB that TCG runs.
    #[vmstate(name = "env.vm_vmcb")]
    pub vm_vmcb: u64,
    /// TSC offset of TCG's SVM guest.
    #[vmstate(name = "env.tsc_offset")]
    pub tsc_offset: u64,
    /// Intercepts of TCG's SVM guest.
    #[vmstate(name = "env.intercept")]
    pub intercept: u64,
    /// CR read intercepts.
    #[vmstate(name = "env.intercept_cr_read")]
    pub intercept_cr_read: u16,
    /// CR write intercepts.
    #[vmstate(name = "env.intercept_cr_write")]
    pub intercept_cr_write: u16,
    /// DR read intercepts.
    #[vmstate(name = "env.intercept_dr_read")]
    pub intercept_dr_read: u16,
    /// DR write intercepts.
    #[vmstate(name = "env.intercept_dr_write")]
    pub intercept_dr_write: u16,
    /// Exception intercepts.
    #[vmstate(name = "env.intercept_exceptions")]
    pub intercept_exceptions: u32,
    /// Virtual TPR of TCG's SVM guest.
    #[vmstate(name = "env.v_tpr")]
    pub v_tpr: u8,
    /// Fixed-range MTRRs.
    #[vmstate(name = "env.mtrr_fixed")]
    pub mtrr_fixed: [u64; 11],
    /// `IA32_MTRR_DEF_TYPE`
    #[vmstate(name = "env.mtrr_deftype")]
    pub mtrr_deftype: u64,
    /// Variable-range MTRRs.
    #[vmstate(name = "env.mtrr_var", since = 8)]
    pub mtrr_var: [MtrrVar; 8],
    /// Vector of the external interrupt being injected; -1 for none.
    #[vmstate(name = "env.interrupt_injected")]
    pub interrupt_injected: i32,
    /// `KVM_MP_STATE_*`
    #[vmstate(name = "env.mp_state")]
    pub mp_state: u32,
    /// `IA32_TIME_STAMP_COUNTER`
    #[vmstate(name = "env.tsc")]
    pub tsc: u64,
    /// Vector of the exception pending or being injected; -1 for none.
    #[vmstate(name = "env.exception_nr")]
    pub exception_nr: i32,
    /// The interrupt being injected is a software one.
    #[vmstate(name = "env.soft_interrupt")]
    pub soft_interrupt: u8,
    /// An NMI is being injected.
    #[vmstate(name = "env.nmi_injected")]
    pub nmi_injected: u8,
    /// An NMI is pending.
    #[vmstate(name = "env.nmi_pending")]
    pub nmi_pending: u8,
    /// The exception has an error code.
    #[vmstate(name = "env.has_error_code")]
    pub has_error_code: u8,
    /// Vector of the start-up IPI.
    #[vmstate(name = "env.sipi_vector")]
    pub sipi_vector: u32,
    /// `IA32_MCG_CAP`
    #[vmstate(name = "env.mcg_cap")]
    pub mcg_cap: u64,
    /// `IA32_MCG_STATUS`
    #[vmstate(name = "env.mcg_status")]
    pub mcg_status: u64,
    /// `IA32_MCG_CTL`
    #[vmstate(name = "env.mcg_ctl")]
    pub mcg_ctl: u64,
    /// Ten machine check banks of CTL, STATUS, ADDR, MISC.
    #[vmstate(name = "env.mce_banks")]
    pub mce_banks: Table<u64, 40>,
    /// `IA32_TSC_AUX`
    #[vmstate(name = "env.tsc_aux")]
    pub tsc_aux: u64,
    /// `MSR_KVM_SYSTEM_TIME_NEW`
    #[vmstate(name = "env.system_time_msr")]
    pub system_time_msr: u64,
    /// `MSR_KVM_WALL_CLOCK_NEW`
    #[vmstate(name = "env.wall_clock_msr")]
    pub wall_clock_msr: u64,
    /// XCR0
    #[vmstate(name = "env.xcr0", since = 12)]
    pub xcr0: u64,
    /// XSTATE_BV: which XSAVE components hold state.
    #[vmstate(name = "env.xstate_bv", since = 12)]
    pub xstate_bv: u64,
    /// The upper halves of YMM0 to YMM15.
    #[vmstate(name = "env.xmm_regs", since = 12)]
    pub ymmh_regs: [YmmhReg; 16],

    /// Sent while an exception is pending in a nested guest.
    #[vmstate(subsection, needed = |cpu, _| hooks::exception_info_is_needed(cpu))]
    pub exception_info: Option<nested::ExceptionInfo>,
    /// Sent when the exception has an error code; seen in 11.1, not in 10.0.
    #[vmstate(subsection, since_release = "11.0", needed = |cpu, _| cpu.exception_nr != -1 && cpu.has_error_code != 0)]
    pub error_code: Option<msr::ErrorCode>,
    /// KVM asynchronous page faults.
    #[vmstate(subsection)]
    pub async_pf_msr: Option<paravirt::AsyncPfMsr>,
    /// KVM asynchronous page faults by interrupt.
    #[vmstate(subsection)]
    pub async_pf_int_msr: Option<paravirt::AsyncPfIntMsr>,
    /// KVM paravirtual end of interrupt.
    #[vmstate(subsection)]
    pub async_pv_eoi_msr: Option<paravirt::AsyncPvEoiMsr>,
    /// KVM steal time.
    #[vmstate(subsection)]
    pub steal_time_msr: Option<paravirt::StealTimeMsr>,
    /// KVM halt polling control.
    #[vmstate(subsection)]
    pub poll_control_msr: Option<paravirt::PollControlMsr>,
    /// x87 last instruction.
    #[vmstate(subsection)]
    pub fpop_ip_dp: Option<extended::FpopIpDp>,
    /// `IA32_TSC_ADJUST`
    #[vmstate(subsection)]
    pub msr_tsc_adjust: Option<msr::TscAdjust>,
    /// `IA32_TSC_DEADLINE`
    #[vmstate(subsection)]
    pub msr_tscdeadline: Option<msr::TscDeadline>,
    /// `IA32_MISC_ENABLE`
    #[vmstate(subsection)]
    pub msr_ia32_misc_enable: Option<msr::MiscEnable>,
    /// `IA32_FEATURE_CONTROL`
    #[vmstate(subsection)]
    pub msr_ia32_feature_control: Option<msr::FeatureControl>,
    /// Performance monitoring.
    #[vmstate(subsection)]
    pub msr_architectural_pmu: Option<msr::ArchitecturalPmu>,
    /// Memory protection extensions.
    #[vmstate(subsection)]
    pub mpx: Option<extended::Mpx>,
    /// Hyper-V guest OS id and hypercall page.
    #[vmstate(subsection)]
    pub msr_hyperv_hypercall: Option<paravirt::HypervHypercall>,
    /// Hyper-V vAPIC page.
    #[vmstate(subsection)]
    pub msr_hyperv_vapic: Option<paravirt::HypervVapic>,
    /// Hyper-V reference TSC page.
    #[vmstate(subsection)]
    pub msr_hyperv_time: Option<paravirt::HypervTime>,
    /// Hyper-V crash parameters.
    #[vmstate(subsection)]
    pub msr_hyperv_crash: Option<paravirt::HypervCrash>,
    /// Hyper-V run time.
    #[vmstate(subsection)]
    pub msr_hyperv_runtime: Option<paravirt::HypervRuntime>,
    /// Hyper-V synthetic interrupt controller.
    #[vmstate(subsection)]
    pub msr_hyperv_synic: Option<paravirt::HypervSynic>,
    /// Hyper-V synthetic timers.
    #[vmstate(subsection)]
    pub msr_hyperv_stimer: Option<paravirt::HypervStimer>,
    /// Hyper-V reenlightenment.
    #[vmstate(subsection)]
    pub msr_hyperv_reenlightenment: Option<paravirt::HypervReenlightenment>,
    /// AVX-512 registers.
    #[vmstate(subsection)]
    pub avx512: Option<extended::Avx512>,
    /// `IA32_XSS`
    #[vmstate(subsection)]
    pub xss: Option<msr::Xss>,
    /// `IA32_UMWAIT_CONTROL`
    #[vmstate(subsection)]
    pub umwait: Option<msr::Umwait>,
    /// TSC frequency.
    #[vmstate(subsection)]
    pub tsc_khz: Option<msr::TscKhz>,
    /// `MSR_SMI_COUNT`
    #[vmstate(subsection)]
    pub msr_smi_count: Option<msr::SmiCount>,
    /// PKRU
    #[vmstate(subsection)]
    pub pkru: Option<extended::Pkru>,
    /// `IA32_PKRS`; seen in 7.2, not in 5.2.
    #[vmstate(subsection, since_release = "6.0")]
    pub pkrs: Option<extended::Pkrs>,
    /// `IA32_SPEC_CTRL`
    #[vmstate(subsection)]
    pub spec_ctrl: Option<msr::SpecCtrl>,
    /// TSC ratio of SVM; seen in 7.2, not in 5.2. The CPU model must have `tsc-scale`.
    #[vmstate(subsection, since_release = "6.0")]
    pub amd_tsc_scale_msr: Option<msr::AmdTscScale>,
    /// `IA32_MCG_EXT_CTL`
    #[vmstate(subsection)]
    pub mcg_ext_ctl: Option<msr::McgExtCtl>,
    /// Processor trace.
    #[vmstate(subsection)]
    pub intel_pt: Option<msr::IntelPt>,
    /// `VIRT_SSBD`
    #[vmstate(subsection)]
    pub virt_ssbd: Option<msr::VirtSsbd>,
    /// Nested paging of TCG's SVM guest ("svn" is QEMU's spelling).
    #[vmstate(subsection)]
    pub svn_npt: Option<nested::SvnNpt>,
    /// TCG's SVM guest; seen in 7.2, not in 5.2.
    #[vmstate(subsection, since_release = "6.0")]
    pub svm_guest: Option<nested::SvmGuest>,
    /// KVM's nested state.
    #[vmstate(subsection)]
    pub nested_state: Option<nested::NestedState>,
    /// Xen emulation; seen in 10.0, not in 7.2.
    #[vmstate(subsection, since_release = "8.0")]
    pub xen_vcpu: Option<paravirt::XenVcpu>,
    /// `IA32_TSX_CTRL`, if the CPU model has it.
    #[vmstate(subsection)]
    pub msr_tsx_ctrl: Option<msr::TsxCtrl>,
    /// SGX launch control, if the CPU model has it; seen in 7.2, not in 5.2.
    #[vmstate(subsection, since_release = "6.0")]
    pub intel_sgx: Option<msr::IntelSgx>,
    /// PAE page directory pointers; seen in 7.2, not in 5.2.
    #[vmstate(subsection, since_release = "6.0")]
    pub pdptrs: Option<msr::Pdptrs>,
    /// `IA32_XFD`, if the CPU model has it; seen in 7.2, not in 5.2.
    #[vmstate(subsection, since_release = "6.0")]
    pub msr_xfd: Option<extended::Xfd>,
    /// `MSR_HWCR`; seen in 10.0, not in 7.2.
    #[vmstate(subsection, since_release = "8.0")]
    pub msr_hwcr: Option<msr::Hwcr>,
    /// Flexible return and event delivery, if the CPU model has it; seen in 10.0, not in 7.2.
    #[vmstate(subsection, since_release = "9.0")]
    pub fred: Option<msr::Fred>,
    /// AMX tiles, if the CPU model has them; seen in 7.2, not in 5.2.
    #[vmstate(subsection, since_release = "6.0")]
    pub intel_amx_xtile: Option<extended::AmxXtile>,
    /// Last branch records, if the CPU model has them; seen in 7.2, not in 5.2.
    #[vmstate(subsection, since_release = "6.0")]
    pub arch_lbr: Option<msr::ArchLbr>,
    /// A triple fault is pending; seen in 7.2, not in 5.2.
    #[vmstate(subsection, since_release = "6.0")]
    pub triple_fault: Option<msr::TripleFault>,
    /// `IA32_PL0_SSP`; seen in 11.1, not in 10.0.
    #[vmstate(subsection, since_release = "11.0")]
    pub msr_pl0_ssp: Option<extended::Pl0Ssp>,
    /// Control-flow enforcement, if the CPU model has it; seen in 11.1, not in 10.0.
    #[vmstate(subsection, since_release = "11.0")]
    pub cet: Option<extended::Cet>,
    /// R16 to R31, if the CPU model has APX; seen in 11.1, not in 10.0.
    #[vmstate(subsection, since_release = "11.0")]
    pub apx: Option<extended::Apx>,
}
