//! The register files in an XSAVE area, which KVM hands out in the standard format.

use qevm_devices::cpu::Cpu;
use qevm_devices::cpu::extended::{AmxXtile, Avx512, BndReg, FpopIpDp, Hi16ZmmReg, Mpx, Pkru, ZmmhReg};
use qevm_devices::cpu::registers::{FpReg, XmmReg, YmmhReg};
use std::sync::LazyLock;

/// Places in the legacy area and the header (Intel SDM volume 1, "XSAVE area").
mod at {
    pub(super) const FCW: usize = 0;
    pub(super) const FSW: usize = 2;
    pub(super) const FTW: usize = 4;
    pub(super) const FOP: usize = 6;
    pub(super) const FIP: usize = 8;
    pub(super) const FDP: usize = 16;
    pub(super) const MXCSR: usize = 24;
    pub(super) const ST: usize = 32;
    pub(super) const XMM: usize = 160;
    pub(super) const XSTATE_BV: usize = 512;
    pub(super) const XCOMP_BV: usize = 520;
}

/// Numbers of the state components.
mod component {
    pub(super) const X87: u32 = 0;
    pub(super) const SSE: u32 = 1;
    pub(super) const AVX: u32 = 2;
    pub(super) const BNDREGS: u32 = 3;
    pub(super) const BNDCSR: u32 = 4;
    pub(super) const OPMASK: u32 = 5;
    pub(super) const ZMM_HI256: u32 = 6;
    pub(super) const HI16_ZMM: u32 = 7;
    pub(super) const PKRU: u32 = 9;
    pub(super) const XTILECFG: u32 = 17;
    pub(super) const XTILEDATA: u32 = 18;
    pub(super) const COUNT: usize = 19;
}

/// An XSAVE area to read from.
struct Area<'a>(&'a [u8]);

/// An XSAVE area to write to.
struct AreaMut<'a>(&'a mut [u8]);

/// Where each component is in the standard format on this processor. It is asked once: inside a virtual machine every
/// CPUID is an exit, and the guest is paused meanwhile.
static OFFSETS: LazyLock<[Option<usize>; component::COUNT]> = LazyLock::new(|| {
    const LEAF: u32 = 0xd;
    std::array::from_fn(|component| {
        let leaf = raw_cpuid::native_cpuid::cpuid_count(LEAF, component as u32);
        (leaf.eax != 0 && leaf.ebx != 0).then_some(leaf.ebx as usize)
    })
});

/// Where a component is; `None` if this processor has none.
fn offset(component: u32) -> Option<usize> {
    OFFSETS.get(component as usize).copied().flatten()
}

impl Area<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
    /// The first bytes of a component; 0 if it is not there.
    fn component<const N: usize>(&self, component: u32) -> [u8; N] {
        offset(component).map_or([0; N], |at| self.bytes(at))
    }
    /// Word `index` of a component; 0 if it is not there.
    fn word(&self, component: u32, index: usize) -> u64 {
        offset(component).map_or(0, |at| self.u64(at + 8 * index))
    }
}

impl AreaMut<'_> {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(into) = self.0.get_mut(at..at + bytes.len()) {
            into.copy_from_slice(bytes);
        }
    }
    fn words(&mut self, component: u32, index: usize, words: &[u64]) {
        if let Some(at) = offset(component) {
            words.iter().zip(index..).for_each(|(word, i)| self.put(at + 8 * i, &word.to_le_bytes()));
        }
    }
}

/// The control words after FNINIT and after a reset.
const INITIAL_FCW: u16 = 0x37f;
const INITIAL_MXCSR: u32 = 0x1f80;

/// The components that are not in their initial state: those that the section names, and those whose registers say so.
/// A source under TCG names none that its guest has not saved by XSAVE, and KVM would load the others as if they were
/// initial.
fn in_use(cpu: &Cpu) -> u64 {
    let x87 = cpu.fpuc != INITIAL_FCW
        || cpu.fpus != 0
        || cpu.fptag != 0
        || cpu.fpregs.iter().any(|register| register.tmp.mantissa != 0 || register.tmp.exponent != 0);
    let sse = cpu.mxcsr != INITIAL_MXCSR || cpu.xmm_regs.iter().any(|register| register.q0 != 0 || register.q1 != 0);
    let avx = cpu.ymmh_regs.iter().any(|register| register.q2 != 0 || register.q3 != 0);
    let used = [(component::X87, x87), (component::SSE, sse), (component::AVX, avx)];
    used.iter().filter(|(_, used)| *used).fold(cpu.xstate_bv, |bits, (component, _)| bits | 1 << component)
}

pub(super) fn save(xsave: &[u8], xcr0: u64, cpu: &mut Cpu) {
    use component::*;
    let area = Area(xsave);
    let word = |component, index| area.word(component, index);
    cpu.fpuc = area.u16(at::FCW);
    cpu.fpus = area.u16(at::FSW);
    cpu.fptag = u16::from(area.bytes::<1>(at::FTW)[0]);
    cpu.mxcsr = area.u32(at::MXCSR);
    cpu.fpop_ip_dp = Some(FpopIpDp { fpop: area.u16(at::FOP), fpip: area.u64(at::FIP), fpdp: area.u64(at::FDP) });
    cpu.fpregs = std::array::from_fn(|i| FpReg::new(area.u64(at::ST + 16 * i), area.u16(at::ST + 16 * i + 8)));
    cpu.xmm_regs =
        std::array::from_fn(|i| XmmReg { q0: area.u64(at::XMM + 16 * i), q1: area.u64(at::XMM + 16 * i + 8) });
    cpu.xcr0 = xcr0;
    cpu.xstate_bv = area.u64(at::XSTATE_BV);
    cpu.ymmh_regs = std::array::from_fn(|i| YmmhReg { q2: word(AVX, 2 * i), q3: word(AVX, 2 * i + 1) });
    cpu.mpx = Some(Mpx {
        bnd_regs: std::array::from_fn(|i| BndReg { lb: word(BNDREGS, 2 * i), ub: word(BNDREGS, 2 * i + 1) }),
        cfgu: word(BNDCSR, 0),
        sts: word(BNDCSR, 1),
        bndcfgs: 0,
    });
    let zmmh = |i: usize| -> [u64; 4] { std::array::from_fn(|q| word(ZMM_HI256, 4 * i + q)) };
    let hi16 = |i: usize| -> [u64; 8] { std::array::from_fn(|q| word(HI16_ZMM, 8 * i + q)) };
    cpu.avx512 = Some(Avx512 {
        opmask_regs: std::array::from_fn(|i| word(OPMASK, i)),
        zmmh_regs: std::array::from_fn(|i| {
            let [q4, q5, q6, q7] = zmmh(i);
            ZmmhReg { q4, q5, q6, q7 }
        }),
        hi16_zmm_regs: std::array::from_fn(|i| {
            let [q0, q1, q2, q3, q4, q5, q6, q7] = hi16(i);
            Hi16ZmmReg { q0, q1, q2, q3, q4, q5, q6, q7 }
        }),
    });
    cpu.pkru = Some(Pkru { value: word(PKRU, 0) as u32 });
    let tiles = 1 << XTILECFG | 1 << XTILEDATA;
    cpu.intel_amx_xtile = (xcr0 & tiles == tiles || cpu.intel_amx_xtile.is_some())
        .then(|| AmxXtile { xtilecfg: area.component(XTILECFG).into(), xtiledata: area.component(XTILEDATA).into() });
}

pub(super) fn load(cpu: &Cpu, xsave: &mut [u8]) {
    use component::*;
    xsave.fill(0);
    let mut area = AreaMut(xsave);
    area.put(at::FCW, &cpu.fpuc.to_le_bytes());
    area.put(at::FSW, &cpu.fpus.to_le_bytes());
    area.put(at::FTW, &[cpu.fptag as u8]);
    area.put(at::MXCSR, &cpu.mxcsr.to_le_bytes());
    if let Some(last) = &cpu.fpop_ip_dp {
        area.put(at::FOP, &last.fpop.to_le_bytes());
        area.put(at::FIP, &last.fpip.to_le_bytes());
        area.put(at::FDP, &last.fpdp.to_le_bytes());
    }
    for (i, register) in cpu.fpregs.iter().enumerate() {
        area.put(at::ST + 16 * i, &register.tmp.mantissa.to_le_bytes());
        area.put(at::ST + 16 * i + 8, &register.tmp.exponent.to_le_bytes());
    }
    for (i, XmmReg { q0, q1 }) in cpu.xmm_regs.iter().enumerate() {
        area.put(at::XMM + 16 * i, &q0.to_le_bytes());
        area.put(at::XMM + 16 * i + 8, &q1.to_le_bytes());
    }
    area.put(at::XSTATE_BV, &in_use(cpu).to_le_bytes());
    area.put(at::XCOMP_BV, &0u64.to_le_bytes());
    for (i, YmmhReg { q2, q3 }) in cpu.ymmh_regs.iter().enumerate() {
        area.words(AVX, 2 * i, &[*q2, *q3]);
    }
    if let Some(mpx) = &cpu.mpx {
        mpx.bnd_regs.iter().enumerate().for_each(|(i, bound)| area.words(BNDREGS, 2 * i, &[bound.lb, bound.ub]));
        area.words(BNDCSR, 0, &[mpx.cfgu, mpx.sts]);
    }
    if let Some(avx512) = &cpu.avx512 {
        area.words(OPMASK, 0, &avx512.opmask_regs);
        for (i, z) in avx512.zmmh_regs.iter().enumerate() {
            area.words(ZMM_HI256, 4 * i, &[z.q4, z.q5, z.q6, z.q7]);
        }
        for (i, z) in avx512.hi16_zmm_regs.iter().enumerate() {
            area.words(HI16_ZMM, 8 * i, &[z.q0, z.q1, z.q2, z.q3, z.q4, z.q5, z.q6, z.q7]);
        }
    }
    if let Some(pkru) = &cpu.pkru {
        area.words(PKRU, 0, &[pkru.value.into()]);
    }
    if let Some(tile) = &cpu.intel_amx_xtile {
        for (component, bytes) in [(XTILECFG, &tile.xtilecfg[..]), (XTILEDATA, &tile.xtiledata[..])] {
            if let Some(at) = offset(component) {
                area.put(at, bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_in_use_are_loaded_even_if_a_source_under_tcg_does_not_name_them() {
        let initial = Cpu { fpuc: INITIAL_FCW, mxcsr: INITIAL_MXCSR, ..Cpu::default() };
        assert_eq!(in_use(&initial), 0);
        let mut cpu = Cpu { xstate_bv: 1 << component::PKRU, ..initial };
        cpu.xmm_regs[3].q1 = 1;
        assert_eq!(in_use(&cpu), 1 << component::PKRU | 1 << component::SSE);
        let mut xsave = vec![0; 4096];
        load(&cpu, &mut xsave);
        assert_eq!(Area(&xsave).u64(at::XSTATE_BV), in_use(&cpu));
        cpu.fptag = 1;
        cpu.ymmh_regs[15].q2 = 1;
        assert_eq!(in_use(&cpu) & 7, 7);
    }
}
