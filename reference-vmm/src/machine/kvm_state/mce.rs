//! Machine check registers: how many banks a vCPU has is set once, before its MSRs.

use crate::error::{Error, Result};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

mod ioctl {
    use kvm_bindings::KVMIO;

    vmm_sys_util::ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);
    vmm_sys_util::ioctl_ior_nr!(KVM_X86_GET_MCE_CAP_SUPPORTED, KVMIO, 0x9d, u64);
}

/// MSR IA32_MCG_CAP: the number of banks in the low byte, and what else there is.
pub(super) const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const MCG_CTL: u32 = 0x17b;
const FIRST_BANK: u32 = 0x400;
const REGISTERS: u32 = 4;
const COUNT: u64 = 0xff;
/// The number of banks and whether there is IA32_MCG_CTL.
pub(super) const COUNT_AND_CONTROL: u64 = 0x1ff;
/// Banks that section `cpu` has room for.
const BANKS: u32 = 10;
/// As every stream of QEMU 7.2 to 11.1 has it: ten banks, a control register, recovery by software.
const LIKE_QEMU: u64 = 0x100_010a;

/// The MSRs that [`set_up`] brings.
pub(super) fn msrs() -> impl Iterator<Item = u32> {
    [MCG_CAP, MCG_STATUS, MCG_CTL].into_iter().chain(FIRST_BANK..FIRST_BANK + BANKS * REGISTERS)
}

/// Gives a new vCPU the banks that a QEMU would give it, as far as this host can.
pub(crate) fn set_up(kvm_fd: &Kvm, fd: &VcpuFd) -> Result<()> {
    if !kvm_fd.check_extension(Cap::Mce) {
        return Ok(());
    }
    let mut supported = 0;
    // SAFETY: the call writes one u64.
    if unsafe { ioctl_with_mut_ref(kvm_fd, ioctl::KVM_X86_GET_MCE_CAP_SUPPORTED(), &mut supported) } < 0 {
        return Err(failed("ask for the machine check registers"));
    }
    // The number of banks is not in there: the capability gives it.
    let most = u64::try_from(kvm_fd.check_extension_int(Cap::Mce)).unwrap_or(0);
    let banks = (LIKE_QEMU & COUNT).min(most);
    let rest: u64 = LIKE_QEMU & supported & !COUNT;
    set_capability(fd, rest | banks)
}

/// Sets IA32_MCG_CAP, which resets the banks.
pub(super) fn set_capability(fd: &VcpuFd, capability: u64) -> Result<()> {
    // SAFETY: the call reads one u64.
    match unsafe { ioctl_with_ref(fd, ioctl::KVM_X86_SETUP_MCE(), &capability) } {
        0 => Ok(()),
        _ => Err(failed("set up the machine check registers")),
    }
}

fn failed(what: &'static str) -> Error {
    Error::Kvm { what, cause: kvm_ioctls::Error::last() }
}
