//! Subsections of `cpu` for a guest that runs guests.

use super::msr::single;
use qevm_savevm::vmstate::{Pointer, Table, VmState};

single! {
    /// `int_ctl` of TCG's SVM guest.
    SvmGuest: "cpu/svm_guest", "env.int_ctl", u32, unless 0;
}

/// Subsection `cpu/exception_info`: an exception pending in a nested guest.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/exception_info", version = 1)]
pub struct ExceptionInfo {
    /// It is pending: the outer hypervisor may still intercept it.
    #[vmstate(name = "env.exception_pending")]
    pub pending: u8,
    /// It is being injected.
    #[vmstate(name = "env.exception_injected")]
    pub injected: u8,
    /// `payload` means something.
    #[vmstate(name = "env.exception_has_payload")]
    pub has_payload: u8,
    /// What CR2 (page fault) or DR6 (debug) will be.
    #[vmstate(name = "env.exception_payload")]
    pub payload: u64,
}

/// Subsection `cpu/svn_npt`: nested paging of TCG's SVM guest.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/svn_npt", version = 1)]
pub struct SvnNpt {
    /// Nested CR3.
    #[vmstate(name = "env.nested_cr3")]
    pub nested_cr3: u64,
    /// Nested paging mode.
    #[vmstate(name = "env.nested_pg_mode")]
    pub nested_pg_mode: u32,
}

/// Subsection `cpu/nested_state`: `KVM_GET_NESTED_STATE`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/nested_state", version = 1)]
pub struct NestedState {
    /// The state; QEMU's pointer to it is never NULL here.
    #[vmstate(name = "env.nested_state")]
    pub state: Pointer<KvmNestedState>,
}

/// Structure `cpu/kvm_nested_state`: `struct kvm_nested_state` of the Linux API.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/kvm_nested_state", version = 1)]
pub struct KvmNestedState {
    /// `KVM_STATE_NESTED_*`
    pub flags: u16,
    /// 0 VMX, 1 SVM.
    pub format: u16,
    /// Bytes that the state takes in the API.
    pub size: u32,
    /// Sent when `format` is VMX and VMXON was executed.
    #[vmstate(subsection, needed = |state, _| state.format == KvmNestedState::FORMAT_VMX)]
    pub vmx: Option<NestedVmx>,
    /// Sent when `format` is SVM and there is more than a header.
    #[vmstate(
        subsection,
        needed = |state, _| state.format == KvmNestedState::FORMAT_SVM && state.size > KvmNestedState::HEADER
    )]
    pub svm: Option<NestedSvm>,
}

impl KvmNestedState {
    /// `KVM_STATE_NESTED_FORMAT_VMX`
    pub const FORMAT_VMX: u16 = 0;
    /// `KVM_STATE_NESTED_FORMAT_SVM`
    pub const FORMAT_SVM: u16 = 1;
    /// Size of `struct kvm_nested_state` without data.
    pub const HEADER: u32 = 128;
}

/// Bytes of a VMCS12 or VMCB12 in the Linux API.
const VMCS12_SIZE: usize = 4096;

/// Subsection `cpu/kvm_nested_state/vmx`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/kvm_nested_state/vmx", version = 1, needed = |vmx, _| vmx.vmxon_pa != u64::MAX)]
pub struct NestedVmx {
    /// Guest-physical address of the VMXON region; all ones before VMXON.
    #[vmstate(name = "hdr.vmx.vmxon_pa")]
    pub vmxon_pa: u64,
    /// Guest-physical address of the current VMCS.
    #[vmstate(name = "hdr.vmx.vmcs12_pa")]
    pub vmcs12_pa: u64,
    /// `KVM_STATE_NESTED_SMM_*`
    #[vmstate(name = "hdr.vmx.smm.flags")]
    pub smm_flags: u16,
    /// Sent when the state's size says so.
    #[vmstate(subsection)]
    pub vmcs12: Option<Vmcs12>,
    /// Sent when the state's size says so.
    #[vmstate(subsection)]
    pub shadow_vmcs12: Option<ShadowVmcs12>,
}

/// Subsection `cpu/kvm_nested_state/vmx/vmcs12`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/kvm_nested_state/vmx/vmcs12", version = 1)]
pub struct Vmcs12 {
    /// The VMCS of the nested guest.
    #[vmstate(name = "data.vmx[0].vmcs12")]
    pub vmcs12: Table<u8, VMCS12_SIZE>,
}

/// Subsection `cpu/kvm_nested_state/vmx/shadow_vmcs12`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/kvm_nested_state/vmx/shadow_vmcs12", version = 1)]
pub struct ShadowVmcs12 {
    /// Its shadow VMCS.
    #[vmstate(name = "data.vmx[0].shadow_vmcs12")]
    pub shadow_vmcs12: Table<u8, VMCS12_SIZE>,
}

/// Subsection `cpu/kvm_nested_state/svm`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "cpu/kvm_nested_state/svm", version = 1)]
pub struct NestedSvm {
    /// Guest-physical address of the VMCB.
    #[vmstate(name = "hdr.svm.vmcb_pa")]
    pub vmcb_pa: u64,
    /// The VMCB of the nested guest.
    #[vmstate(name = "data.svm[0].vmcb12")]
    pub vmcb12: Table<u8, VMCS12_SIZE>,
}
