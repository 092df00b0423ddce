//! What the vCPUs say about themselves: all that KVM supports, with the topology of this machine.

use crate::error::{Error, Result, kvm};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHE: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const ECX_VMX: u32 = 1 << 5;
const ECX_SVM: u32 = 1 << 2;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const TOPOLOGY_THREAD: u32 = 1 << 8;
const TOPOLOGY_CORE: u32 = 2 << 8;

/// What KVM can offer a guest on this host.
pub(crate) fn supported(kvm_fd: &Kvm) -> Result<CpuId> {
    let mut cpuid = kvm_fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("list the supported CPUID"))?;
    if kvm_fd.check_extension(Cap::TscDeadlineTimer) {
        for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == LEAF_FEATURES) {
            entry.ecx |= ECX_TSC_DEADLINE;
        }
    }
    Ok(cpuid)
}

/// Bits of a guest's physical addresses, as its processor tells them.
pub(crate) fn physical_bits(cpuid: &CpuId) -> u8 {
    // What a processor has that does not tell (Intel SDM volume 3, "MAXPHYADDR").
    const UNTOLD: u8 = 36;
    let sizes = cpuid.as_slice().iter().find(|entry| entry.function == LEAF_AMD_SIZES);
    sizes.map_or(UNTOLD, |entry| entry.eax as u8)
}

/// The same for vCPU number `index` of `cpus`: each is a core of one package, and its number is its APIC id.
pub(crate) fn for_vcpu(supported: &CpuId, index: usize, cpus: usize) -> Result<CpuId> {
    let (id, count) = (index as u32, cpus as u32);
    let id_bits = count.next_power_of_two().trailing_zeros();
    let topology = |entry: &kvm_cpuid_entry2| matches!(entry.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2);
    let mut entries: Vec<_> = supported.as_slice().iter().filter(|entry| !topology(entry)).copied().collect();
    for entry in &mut entries {
        match entry.function {
            LEAF_FEATURES => {
                entry.ebx = entry.ebx & 0xffff | count << 16 | id << 24;
                // The state of guests of the guest is not saved, so the guest is not told that it could have any.
                entry.ecx = (entry.ecx | ECX_HYPERVISOR) & !ECX_VMX;
                entry.edx = if cpus > 1 { entry.edx | EDX_HTT } else { entry.edx & !EDX_HTT };
            }
            LEAF_AMD_FEATURES => entry.ecx &= !ECX_SVM,
            // Bits 31-26: cores in the package less one; 25-14: threads that share the cache less one.
            LEAF_CACHE => entry.eax = entry.eax & 0x3fff | (count - 1) << 26,
            LEAF_AMD_SIZES => entry.ecx = entry.ecx & !0xffff | id_bits << 12 | (count - 1),
            LEAF_AMD_TOPOLOGY => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    for (level, kind, shift, here) in [(0, TOPOLOGY_THREAD, 0, 1), (1, TOPOLOGY_CORE, id_bits, count)] {
        entries.push(kvm_cpuid_entry2 {
            function: LEAF_TOPOLOGY,
            index: level,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: here,
            ecx: kind | level,
            edx: id,
            ..kvm_cpuid_entry2::default()
        });
    }
    CpuId::from_entries(&entries).map_err(|_| Error::KvmCapability { capability: "room for all CPUID entries" })
}
