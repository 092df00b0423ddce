//! Which MSR is which field of the `cpu` section.

use crate::state::Msr;
use qevm_devices::cpu::{Cpu, extended, msr, paravirt};
use std::collections::HashMap;
use std::sync::LazyLock;

/// The MSRs with fields of their own (Intel SDM volume 4; KVM's are in the kernel's `kvm/x86/msr` document).
fn fields(cpu: &mut Cpu) -> Vec<(u32, &mut u64)> {
    const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
    const MTRR_VAR: u32 = 0x200;
    let mut fields = vec![
        (TSC, &mut cpu.tsc),
        (0x175, &mut cpu.sysenter_esp),
        (0x176, &mut cpu.sysenter_eip),
        (0xc000_0081, &mut cpu.star),
        (0xc000_0082, &mut cpu.lstar),
        (0xc000_0083, &mut cpu.cstar),
        (0xc000_0084, &mut cpu.fmask),
        (0xc000_0102, &mut cpu.kernelgsbase),
        (0xc000_0103, &mut cpu.tsc_aux),
        (0x277, &mut cpu.pat),
        (0x2ff, &mut cpu.mtrr_deftype),
        (0xc001_0117, &mut cpu.vm_hsave),
        // MSR_KVM_SYSTEM_TIME_NEW and MSR_KVM_WALL_CLOCK_NEW: the same registers as the old numbers.
        (0x4b56_4d01, &mut cpu.system_time_msr),
        (0x4b56_4d00, &mut cpu.wall_clock_msr),
    ];
    fields.extend([(0x179, &mut cpu.mcg_cap), (0x17a, &mut cpu.mcg_status), (0x17b, &mut cpu.mcg_ctl)]);
    fields.extend((0x400..).zip(cpu.mce_banks.iter_mut()));
    fields.extend(MTRR_FIXED.into_iter().zip(&mut cpu.mtrr_fixed));
    for (i, pair) in (0..).zip(&mut cpu.mtrr_var) {
        fields.push((MTRR_VAR + 2 * i, &mut pair.base));
        fields.push((MTRR_VAR + 2 * i + 1, &mut pair.mask));
    }
    fields
}

/// Bits of a physical address beyond those of the processor, up to the architecture's 52. A QEMU under KVM keeps them
/// set in the masks of the variable MTRRs (every stream of 7.2 to 11.1 shows it), so that a mask fits processors with
/// more bits.
static BEYOND_ADDRESS_BITS: LazyLock<u64> = LazyLock::new(|| {
    const LEAF_SIZES: u32 = 0x8000_0008;
    const MAX_BITS: u32 = 52;
    let bits = (raw_cpuid::native_cpuid::cpuid_count(LEAF_SIZES, 0).eax & 0xff).min(MAX_BITS);
    (1 << MAX_BITS) - (1 << bits)
});

const TSC: u32 = 0x10;
const TSC_ADJUST: u32 = 0x3b;
const TSC_DEADLINE: u32 = 0x6e0;
const SYSENTER_CS: u32 = 0x174;
const BNDCFGS: u32 = 0xd90;
const TSX_CTRL: u32 = 0x122;
const XFD: u32 = 0x1c4;
const XFD_ERR: u32 = 0x1c5;
const U_CET: u32 = 0x6a0;
const S_CET: u32 = 0x6a2;
const PL1_SSP: u32 = 0x6a5;
const PL2_SSP: u32 = 0x6a6;
const PL3_SSP: u32 = 0x6a7;
const INT_SSP_TABLE: u32 = 0x6a8;

macro_rules! subsections {
    ($($index:literal => $field:ident: $module:ident::$type:ident;)*) => {
        /// Fills the subsections of a single MSR; those that QEMU would not send are left out when saving.
        fn save_subsections(msrs: &HashMap<u32, u64>, cpu: &mut Cpu) {
            // A vCPU without the MSR cannot have changed what came with the guest.
            $(if let Some(value) = msrs.get(&$index) {
                cpu.$field = Some($module::$type { value: *value as _ });
            })*
        }
        /// The MSRs of the subsections that are there.
        fn load_subsections(cpu: &Cpu, msrs: &mut Vec<Msr>) {
            $(msrs.extend(cpu.$field.as_ref().map(|sub| Msr { index: $index, value: sub.value as u64 }));)*
        }
    };
}

subsections! {
    0x4b56_4d02 => async_pf_msr: paravirt::AsyncPfMsr;
    0x4b56_4d06 => async_pf_int_msr: paravirt::AsyncPfIntMsr;
    0x4b56_4d04 => async_pv_eoi_msr: paravirt::AsyncPvEoiMsr;
    0x4b56_4d03 => steal_time_msr: paravirt::StealTimeMsr;
    0x4b56_4d05 => poll_control_msr: paravirt::PollControlMsr;
    0x3b => msr_tsc_adjust: msr::TscAdjust;
    0x6e0 => msr_tscdeadline: msr::TscDeadline;
    0x1a0 => msr_ia32_misc_enable: msr::MiscEnable;
    0x3a => msr_ia32_feature_control: msr::FeatureControl;
    0xda0 => xss: msr::Xss;
    0xe1 => umwait: msr::Umwait;
    0x34 => msr_smi_count: msr::SmiCount;
    0x6e1 => pkrs: extended::Pkrs;
    0x48 => spec_ctrl: msr::SpecCtrl;
    0xc001_011f => virt_ssbd: msr::VirtSsbd;
    0xc001_0015 => msr_hwcr: msr::Hwcr;
    0x6a4 => msr_pl0_ssp: extended::Pl0Ssp;
}

/// The performance counters that can be there, in the order of the subsection.
fn counters(pmu: &mut msr::ArchitecturalPmu) -> Vec<(u32, &mut u64)> {
    let mut fields = vec![
        (0x38d, &mut pmu.fixed_ctr_ctrl),
        (0x38f, &mut pmu.global_ctrl),
        (0x38e, &mut pmu.global_status),
        (0x390, &mut pmu.global_ovf_ctrl),
    ];
    // The subsection has room for more than the architecture numbers; after these there are MSRs of other kinds.
    const COUNTERS: usize = 8;
    fields.extend((0x309..).zip(&mut pmu.fixed_counters));
    fields.extend((0xc1..).zip(pmu.gp_counters.iter_mut().take(COUNTERS)));
    fields.extend((0x186..).zip(pmu.gp_evtsel.iter_mut().take(COUNTERS)));
    fields
}

/// Sets the TSC in a list of MSRs that has it.
pub(super) fn set_tsc(list: &mut [Msr], value: u64) {
    list.iter_mut().filter(|msr| msr.index == TSC).for_each(|msr| msr.value = value);
}

/// The TSC in a list of MSRs.
pub(super) fn tsc(list: &[Msr]) -> u64 {
    list.iter().find(|msr| msr.index == TSC).map_or(0, |msr| msr.value)
}

pub(super) fn save(list: &[Msr], cpu: &mut Cpu) {
    let msrs: HashMap<u32, u64> = list.iter().map(|msr| (msr.index, msr.value)).collect();
    let get = |index: u32| msrs.get(&index).copied().unwrap_or(0);
    fields(cpu).into_iter().for_each(|(index, field)| *field = msrs.get(&index).copied().unwrap_or(*field));
    cpu.mtrr_var.iter_mut().for_each(|pair| pair.mask |= *BEYOND_ADDRESS_BITS);
    cpu.sysenter_cs = get(SYSENTER_CS) as u32;
    save_subsections(&msrs, cpu);
    let mut pmu = cpu.msr_architectural_pmu.take().unwrap_or_default();
    counters(&mut pmu).into_iter().for_each(|(index, field)| *field = msrs.get(&index).copied().unwrap_or(*field));
    cpu.msr_architectural_pmu = Some(pmu);
    if let Some(mpx) = &mut cpu.mpx {
        mpx.bndcfgs = get(BNDCFGS);
    }
    // QEMU sends these for processors that have them, whatever they hold. A peer without them could not take them, so
    // they are sent if they hold something or came with the guest.
    let value = get(TSX_CTRL) as u32;
    cpu.msr_tsx_ctrl = (value != 0 || cpu.msr_tsx_ctrl.is_some()).then_some(msr::TsxCtrl { value });
    let xfd = extended::Xfd { xfd: get(XFD), xfd_err: get(XFD_ERR) };
    cpu.msr_xfd = (xfd.xfd | xfd.xfd_err != 0 || cpu.msr_xfd.is_some()).then_some(xfd);
    let shadow_stacks = [PL1_SSP, PL2_SSP, PL3_SSP, INT_SSP_TABLE];
    let came = cpu.cet.take();
    let shstk_came = came.as_ref().and_then(|cet| cet.shstk.as_ref());
    let shstk =
        (shstk_came.is_some() || shadow_stacks.iter().any(|index| get(*index) != 0)).then(|| extended::CetShstk {
            pl1_ssp: get(PL1_SSP),
            pl2_ssp: get(PL2_SSP),
            pl3_ssp: get(PL3_SSP),
            int_ssp_table: get(INT_SSP_TABLE),
            guest_ssp: shstk_came.map_or(0, |sub| sub.guest_ssp),
        });
    let control = came.is_some() || get(U_CET) | get(S_CET) != 0;
    cpu.cet = (control || shstk.is_some()).then(|| extended::Cet { u_cet: get(U_CET), s_cet: get(S_CET), shstk });
}

/// What the section says about MSRs replaces what `list` says; the order is the one in which they can be set.
pub(super) fn load(cpu: &Cpu, list: &mut Vec<Msr>) {
    let mut said = Vec::new();
    let mut cpu = cpu.clone();
    cpu.mtrr_var.iter_mut().for_each(|pair| pair.mask &= !*BEYOND_ADDRESS_BITS);
    let cpu = &cpu;
    fields(&mut cpu.clone()).into_iter().for_each(|(index, field)| said.push(Msr { index, value: *field }));
    said.push(Msr { index: SYSENTER_CS, value: cpu.sysenter_cs.into() });
    load_subsections(cpu, &mut said);
    if let Some(pmu) = &cpu.msr_architectural_pmu {
        counters(&mut pmu.clone()).into_iter().for_each(|(index, field)| said.push(Msr { index, value: *field }));
    }
    said.extend(cpu.mpx.as_ref().map(|mpx| Msr { index: BNDCFGS, value: mpx.bndcfgs }));
    said.extend(cpu.msr_tsx_ctrl.as_ref().map(|sub| Msr { index: TSX_CTRL, value: sub.value.into() }));
    if let Some(sub) = &cpu.msr_xfd {
        said.extend([Msr { index: XFD, value: sub.xfd }, Msr { index: XFD_ERR, value: sub.xfd_err }]);
    }
    if let Some(cet) = &cpu.cet {
        said.extend([Msr { index: U_CET, value: cet.u_cet }, Msr { index: S_CET, value: cet.s_cet }]);
        if let Some(sub) = &cet.shstk {
            let values = [sub.pl1_ssp, sub.pl2_ssp, sub.pl3_ssp, sub.int_ssp_table];
            let indices = [PL1_SSP, PL2_SSP, PL3_SSP, INT_SSP_TABLE];
            said.extend(indices.into_iter().zip(values).map(|(index, value)| Msr { index, value }));
        }
    }
    list.retain(|old| said.iter().all(|new| new.index != old.index));
    list.extend(said);
    // The TSC comes first, as its adjustment must not move it; the deadline refers to it and comes last.
    list.sort_by_key(|msr| match msr.index {
        TSC_ADJUST => (0, 0),
        TSC => (1, 0),
        TSC_DEADLINE => (3, 0),
        other => (2, other),
    });
}
