//! Subsections of `cpu` for the MSRs of paravirtual interfaces: KVM's, Hyper-V's, Xen's.

use super::msr::single;
use qevm_savevm::vmstate::VmState;

single! {
    /// `MSR_KVM_ASYNC_PF_EN`
    AsyncPfMsr: "cpu/async_pf_msr", "env.async_pf_en_msr", u64, unless 0;
    /// `MSR_KVM_ASYNC_PF_INT`
    AsyncPfIntMsr: "cpu/async_pf_int_msr", "env.async_pf_int_msr", u64, unless 0;
    /// `MSR_KVM_PV_EOI_EN`
    AsyncPvEoiMsr: "cpu/async_pv_eoi_msr", "env.pv_eoi_en_msr", u64, unless 0;
    /// `MSR_KVM_STEAL_TIME`
    StealTimeMsr: "cpu/steal_time_msr", "env.steal_time_msr", u64, unless 0;
    /// `MSR_KVM_POLL_CONTROL`; 1 is the default under KVM, TCG has 0 and so always sends it.
    PollControlMsr: "cpu/poll_control_msr", "env.poll_control_msr", u64, unless 1;
    /// `HV_X64_MSR_APIC_ASSIST_PAGE`
    HypervVapic: "cpu/msr_hyperv_vapic", "env.msr_hv_vapic", u64, unless 0;
    /// `HV_X64_MSR_REFERENCE_TSC`
    HypervTime: "cpu/msr_hyperv_time", "env.msr_hv_tsc", u64, unless 0;
    /// `HV_X64_MSR_VP_RUNTIME`, with `hv-runtime`
    HypervRuntime: "cpu/msr_hyperv_runtime", "env.msr_hv_runtime", u64, unless 0;
}

/// Subsection `cpu/msr_hyperv_hypercall`; sent when any of it is not 0.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/msr_hyperv_hypercall", version = 1, needed = |sub, _| *sub != HypervHypercall::default())]
pub struct HypervHypercall {
    /// `HV_X64_MSR_GUEST_OS_ID`
    #[vmstate(name = "env.msr_hv_guest_os_id")]
    pub guest_os_id: u64,
    /// `HV_X64_MSR_HYPERCALL`
    #[vmstate(name = "env.msr_hv_hypercall")]
    pub hypercall: u64,
}

/// Subsection `cpu/msr_hyperv_crash`; sent when any of it is not 0.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/msr_hyperv_crash", version = 1, needed = |sub, _| *sub != HypervCrash::default())]
pub struct HypervCrash {
    /// `HV_X64_MSR_CRASH_P0` to `P4`
    #[vmstate(name = "env.msr_hv_crash_params")]
    pub crash_params: [u64; 5],
}

/// Subsection `cpu/msr_hyperv_synic`; sent when any of it is not 0.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/msr_hyperv_synic", version = 1, needed = |sub, _| *sub != HypervSynic::default())]
pub struct HypervSynic {
    /// `HV_X64_MSR_SCONTROL`
    #[vmstate(name = "env.msr_hv_synic_control")]
    pub control: u64,
    /// `HV_X64_MSR_SIEFP`
    #[vmstate(name = "env.msr_hv_synic_evt_page")]
    pub evt_page: u64,
    /// `HV_X64_MSR_SIMP`
    #[vmstate(name = "env.msr_hv_synic_msg_page")]
    pub msg_page: u64,
    /// `HV_X64_MSR_SINT0` to `SINT15`
    #[vmstate(name = "env.msr_hv_synic_sint")]
    pub sint: [u64; 16],
}

/// Subsection `cpu/msr_hyperv_stimer`; sent when any of it is not 0.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/msr_hyperv_stimer", version = 1, needed = |sub, _| *sub != HypervStimer::default())]
pub struct HypervStimer {
    /// `HV_X64_MSR_STIMERx_CONFIG`
    #[vmstate(name = "env.msr_hv_stimer_config")]
    pub config: [u64; 4],
    /// `HV_X64_MSR_STIMERx_COUNT`
    #[vmstate(name = "env.msr_hv_stimer_count")]
    pub count: [u64; 4],
}

/// Subsection `cpu/msr_hyperv_reenlightenment`; sent when any of it is not 0.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(
    name = "cpu/msr_hyperv_reenlightenment",
    version = 1,
    needed = |sub, _| *sub != HypervReenlightenment::default()
)]
pub struct HypervReenlightenment {
    /// `HV_X64_MSR_REENLIGHTENMENT_CONTROL`
    #[vmstate(name = "env.msr_hv_reenlightenment_control")]
    pub control: u64,
    /// `HV_X64_MSR_TSC_EMULATION_CONTROL`
    #[vmstate(name = "env.msr_hv_tsc_emulation_control")]
    pub tsc_emulation_control: u64,
    /// `HV_X64_MSR_TSC_EMULATION_STATUS`
    #[vmstate(name = "env.msr_hv_tsc_emulation_status")]
    pub tsc_emulation_status: u64,
}

/// Subsection `cpu/xen_vcpu`: sent when QEMU emulates Xen.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/xen_vcpu", version = 1)]
pub struct XenVcpu {
    /// Guest-physical address of `vcpu_info`.
    #[vmstate(name = "env.xen_vcpu_info_gpa")]
    pub info_gpa: u64,
    /// Its default address.
    #[vmstate(name = "env.xen_vcpu_info_default_gpa")]
    pub info_default_gpa: u64,
    /// Guest-physical address of the time information.
    #[vmstate(name = "env.xen_vcpu_time_info_gpa")]
    pub time_info_gpa: u64,
    /// Guest-physical address of the run state.
    #[vmstate(name = "env.xen_vcpu_runstate_gpa")]
    pub runstate_gpa: u64,
    /// Upcall vector.
    #[vmstate(name = "env.xen_vcpu_callback_vector")]
    pub callback_vector: u8,
    /// Event channel ports of the virtual interrupts.
    #[vmstate(name = "env.xen_virq")]
    pub virq: [u16; 24],
    /// When the single-shot timer fires, ns.
    #[vmstate(name = "env.xen_singleshot_timer_ns")]
    pub singleshot_timer_ns: u64,
    /// Period of the periodic timer, ns.
    #[vmstate(name = "env.xen_periodic_timer_period")]
    pub periodic_timer_period: u64,
}
