//! The state of a vCPU.

use super::mce;
use crate::boot::Entry;
use crate::error::{Error, Result, kvm};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT, Msrs, Xsave,
    kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use qevm_microvm::state::{
    DebugRegisters, DescriptorTable, Events, Msr, Registers, Segment, SpecialRegisters, VcpuState,
};
use std::os::raw::c_char;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_ADJUST: u32 = 0x3b;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// More than a second at any frequency.
const TSC_FAR_AWAY: u64 = 1 << 40;
const XCR0: u32 = 0;
/// Bytes of XSAVE state that every kernel knows.
const XSAVE_MIN: usize = 4096;

/// The MSRs that make up a guest's state on this host.
pub(crate) fn saved_msrs(kvm_fd: &Kvm) -> Result<Vec<u32>> {
    let list = kvm_fd.get_msr_index_list().map_err(kvm("list the MSRs"))?;
    let mut msrs = list.as_slice().to_vec();
    if kvm_fd.check_extension(Cap::TscDeadlineTimer) && !msrs.contains(&MSR_TSC_DEADLINE) {
        msrs.push(MSR_TSC_DEADLINE);
    }
    msrs.extend(mce::msrs());
    // The TSC comes first, as its adjustment must not move it; the deadline refers to it and comes last.
    msrs.sort_by_key(|msr| match *msr {
        MSR_TSC_ADJUST => (0, 0),
        MSR_TSC => (1, 0),
        MSR_TSC_DEADLINE => (3, 0),
        other => (2, other),
    });
    msrs.dedup();
    Ok(msrs)
}

/// Brings a vCPU from its reset to a kernel's entry point.
pub(crate) fn enter(fd: &VcpuFd, entry: Entry) -> Result<()> {
    let mut regs = registers(&fd.get_regs().map_err(kvm("read a vCPU's registers"))?);
    let mut sregs = special_registers(&fd.get_sregs().map_err(kvm("read a vCPU's special registers"))?);
    entry.apply(&mut regs, &mut sregs);
    fd.set_sregs(&kvm_sregs(&sregs)).map_err(kvm("set a vCPU's special registers"))?;
    fd.set_regs(&kvm_regs(&regs)).map_err(kvm("set a vCPU's registers"))
}

pub(super) fn save(vm: &VmFd, fd: &VcpuFd, msrs: &[u32]) -> Result<VcpuState> {
    // First: asking for it makes KVM take a pending INIT or SIPI.
    let mp_state = fd.get_mp_state().map_err(kvm("read a vCPU's state"))?.mp_state;
    let xcrs = fd.get_xcrs().map_err(kvm("read a vCPU's XCRs"))?;
    let used = &xcrs.xcrs[..(xcrs.nr_xcrs as usize).min(xcrs.xcrs.len())];
    Ok(VcpuState {
        regs: registers(&fd.get_regs().map_err(kvm("read a vCPU's registers"))?),
        sregs: special_registers(&fd.get_sregs().map_err(kvm("read a vCPU's special registers"))?),
        xsave: save_xsave(vm, fd)?,
        xcr0: used.iter().find(|xcr| xcr.xcr == XCR0).map_or(1, |xcr| xcr.value),
        msrs: save_msrs(fd, msrs)?,
        lapic: fd.get_lapic().map_err(kvm("read a local APIC"))?.regs.map(|byte| byte as u8).to_vec(),
        mp_state,
        events: events(&fd.get_vcpu_events().map_err(kvm("read a vCPU's events"))?),
        debug: debug_registers(&fd.get_debug_regs().map_err(kvm("read a vCPU's debug registers"))?),
        tsc_khz: fd.get_tsc_khz().unwrap_or(0),
    })
}

pub(super) fn load(fd: &VcpuFd, first: bool, state: &VcpuState) -> Result<()> {
    scale_tsc(fd, state.tsc_khz)?;
    set_mce_capability(fd, &state.msrs)?;
    if first {
        forget_tsc(fd, &state.msrs)?;
    }
    fd.set_sregs(&kvm_sregs(&state.sregs)).map_err(kvm("set a vCPU's special registers"))?;
    fd.set_regs(&kvm_regs(&state.regs)).map_err(kvm("set a vCPU's registers"))?;
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: XCR0, value: state.xcr0, ..kvm_xcr::default() };
    fd.set_xcrs(&xcrs).map_err(kvm("set a vCPU's XCRs"))?;
    load_xsave(fd, &state.xsave)?;
    // The local APIC before the MSRs: the TSC deadline needs its timer in that mode.
    fd.set_lapic(&kvm_lapic(&state.lapic)?).map_err(kvm("set a local APIC"))?;
    let settable = state.msrs.iter().filter(|msr| msr.index != mce::MCG_CAP).copied();
    load_msrs(fd, &settable.collect::<Vec<_>>())?;
    fd.set_debug_regs(&kvm_debug_registers(&state.debug)).map_err(kvm("set a vCPU's debug registers"))?;
    fd.set_mp_state(kvm_mp_state { mp_state: state.mp_state }).map_err(kvm("set a vCPU's state"))?;
    // Last: setting registers drops pending exceptions.
    fd.set_vcpu_events(&kvm_events(&state.events)).map_err(kvm("set a vCPU's events"))
}

/// IA32_MCG_CAP cannot be written. KVM on an AMD host has no bits above the number of banks and the control register,
/// and a QEMU there sends those that it asked for nevertheless; so they are not insisted on.
fn set_mce_capability(fd: &VcpuFd, msrs: &[Msr]) -> Result<()> {
    let find = |msrs: &[Msr]| msrs.iter().find(|msr| msr.index == mce::MCG_CAP).map(|msr| msr.value);
    let Some(wanted) = find(msrs) else { return Ok(()) };
    let has = || save_msrs(fd, &[mce::MCG_CAP]).map(|msrs| find(&msrs));
    if has()? == Some(wanted) {
        return Ok(());
    }
    mce::set_capability(fd, wanted)?;
    match has()?.map_or(0, |has| has & mce::COUNT_AND_CONTROL) {
        same if same == wanted & mce::COUNT_AND_CONTROL => Ok(()),
        has => Err(Error::State(format!(
            "its machine check registers are {wanted:#x} (IA32_MCG_CAP), and this host has {has:#x}"
        ))),
    }
}

/// A guest keeps its TSC frequency where the host can scale it or has the same; up to 250 ppm off counts as the same.
fn scale_tsc(fd: &VcpuFd, wanted: u32) -> Result<()> {
    let Ok(have) = fd.get_tsc_khz() else { return Ok(()) };
    if wanted == 0 || u64::from(wanted.abs_diff(have)) * 4000 <= u64::from(have) {
        return Ok(());
    }
    fd.set_tsc_khz(wanted).map_err(|_| {
        Error::State(format!("its TSC runs at {wanted} kHz, this host's at {have} kHz and cannot be scaled"))
    })
}

/// A vCPU's TSC as it is now.
pub(super) fn tsc(fd: &VcpuFd) -> Result<Msr> {
    Ok(save_msrs(fd, &[MSR_TSC])?.first().copied().unwrap_or(Msr { index: MSR_TSC, value: 0 }))
}

/// A vCPU's TSC as it was saved.
pub(super) fn tsc_of(state: &VcpuState) -> Msr {
    state.msrs.iter().find(|msr| msr.index == MSR_TSC).copied().unwrap_or(Msr { index: MSR_TSC, value: 0 })
}

/// Puts a vCPU's TSC back, and the timer that refers to it.
pub(super) fn set_tsc(fd: &VcpuFd, first: bool, tsc: Msr) -> Result<()> {
    let deadline = save_msrs(fd, &[MSR_TSC_DEADLINE])?;
    if first {
        forget_tsc(fd, &[tsc])?;
    }
    load_msrs(fd, &[tsc])?;
    load_msrs(fd, &deadline)
}

/// KVM takes a TSC within a second of the one it expects for an attempt to synchronise vCPUs, and leaves the offset
/// alone. That is right for the vCPUs after the first, whose saved values differ by the time between two reads; the
/// first must be set exactly.
fn forget_tsc(fd: &VcpuFd, msrs: &[Msr]) -> Result<()> {
    match msrs.iter().find(|msr| msr.index == MSR_TSC) {
        Some(tsc) => load_msrs(fd, &[Msr { index: MSR_TSC, value: tsc.value ^ TSC_FAR_AWAY }]),
        None => Ok(()),
    }
}

fn save_xsave(vm: &VmFd, fd: &VcpuFd) -> Result<Vec<u8>> {
    let size = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    let words: Vec<u32> = if size > XSAVE_MIN {
        let mut xsave = xsave_area(size)?;
        // SAFETY: the area has the size that KVM_CAP_XSAVE2 demands for this VM.
        unsafe { fd.get_xsave2(&mut xsave) }.map_err(kvm("read a vCPU's extended state"))?;
        let extra = xsave.as_slice();
        xsave.as_fam_struct_ref().xsave.region.iter().chain(extra).copied().collect()
    } else {
        fd.get_xsave().map_err(kvm("read a vCPU's extended state"))?.region.to_vec()
    };
    Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
}

fn load_xsave(fd: &VcpuFd, bytes: &[u8]) -> Result<()> {
    // The kernel reads as many bytes as this VM's features need, whatever the saved state had.
    let mut xsave = xsave_area(bytes.len().max(1 << 14))?;
    let (words, rest) = bytes.as_chunks::<4>();
    if bytes.len() < XSAVE_MIN || !rest.is_empty() {
        return Err(Error::State(format!("the extended state has {} bytes", bytes.len())));
    }
    let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
    let head = size_of::<kvm_xsave>() / 4;
    // SAFETY: the header's words are written, not its length.
    let region = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
    region.iter_mut().take(head).zip(&mut words).for_each(|(into, word)| *into = word);
    xsave.as_mut_slice().iter_mut().zip(words).for_each(|(into, word)| *into = word);
    // SAFETY: the area is larger than any that KVM_CAP_XSAVE2 demands: AMX, the largest feature, ends at 11008 bytes.
    unsafe { fd.set_xsave2(&xsave) }.map_err(kvm("set a vCPU's extended state"))
}

fn xsave_area(bytes: usize) -> Result<Xsave> {
    let extra = bytes.saturating_sub(size_of::<kvm_xsave>()).div_ceil(4);
    Xsave::new(extra).map_err(|_| Error::State(format!("the extended state has {bytes} bytes")))
}

/// Those that this vCPU has.
fn save_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> = rest.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| Error::State("too many MSRs".to_owned()))?;
        let read = fd.get_msrs(&mut msrs).map_err(kvm("read a vCPU's MSRs"))?;
        saved.extend(msrs.as_slice()[..read].iter().map(|msr| Msr { index: msr.index, value: msr.data }));
        // KVM stops at one the vCPU does not have.
        rest = rest.get(read + 1..).unwrap_or(&[]);
    }
    Ok(saved)
}

/// An MSR that cannot be set is no loss when it already has the value (read-only ones), and an error otherwise.
fn load_msrs(fd: &VcpuFd, state: &[Msr]) -> Result<()> {
    let mut rest = state;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..kvm_msr_entry::default() })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| Error::State("too many MSRs".to_owned()))?;
        let set = fd.set_msrs(&msrs).map_err(kvm("set a vCPU's MSRs"))?;
        let Some(refused) = rest.get(set) else { break };
        let here = save_msrs(fd, &[refused.index])?;
        if here.first() != Some(refused) && refused.value != 0 {
            let Msr { index, value } = refused;
            let has = here.first().map_or("none".to_owned(), |msr| format!("{:#x}", msr.value));
            return Err(Error::State(format!(
                "this host does not take the value {value:#x} for MSR {index:#x}, and has {has}"
            )));
        }
        rest = &rest[set + 1..];
    }
    Ok(())
}

fn kvm_lapic(bytes: &[u8]) -> Result<kvm_lapic_state> {
    let mut lapic = kvm_lapic_state::default();
    if bytes.len() != lapic.regs.len() {
        return Err(Error::State(format!("a local APIC's page has {} bytes, wanted 1024", bytes.len())));
    }
    lapic.regs.iter_mut().zip(bytes).for_each(|(into, byte)| *into = *byte as c_char);
    Ok(lapic)
}

fn registers(regs: &kvm_regs) -> Registers {
    Registers {
        gpr: [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9, regs.r10,
            regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        rip: regs.rip,
        rflags: regs.rflags,
    }
}

fn kvm_regs(regs: &Registers) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = regs.gpr;
    let (rip, rflags) = (regs.rip, regs.rflags);
    kvm_regs { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn segment(segment: &kvm_segment) -> Segment {
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        kind: segment.type_,
        present: segment.present != 0,
        dpl: segment.dpl,
        db: segment.db != 0,
        s: segment.s != 0,
        l: segment.l != 0,
        g: segment.g != 0,
        avl: segment.avl != 0,
        unusable: segment.unusable != 0,
    }
}

fn kvm_segment(segment: &Segment) -> kvm_segment {
    kvm_segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        type_: segment.kind,
        present: segment.present.into(),
        dpl: segment.dpl,
        db: segment.db.into(),
        s: segment.s.into(),
        l: segment.l.into(),
        g: segment.g.into(),
        avl: segment.avl.into(),
        unusable: segment.unusable.into(),
        padding: 0,
    }
}

fn special_registers(sregs: &kvm_sregs) -> SpecialRegisters {
    let table = |table: &kvm_dtable| DescriptorTable { base: table.base, limit: table.limit };
    SpecialRegisters {
        segs: [sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs].map(|seg| segment(&seg)),
        ldt: segment(&sregs.ldt),
        tr: segment(&sregs.tr),
        gdt: table(&sregs.gdt),
        idt: table(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        interrupt_bitmap: sregs.interrupt_bitmap,
    }
}

fn kvm_sregs(sregs: &SpecialRegisters) -> kvm_sregs {
    let table = |table: &DescriptorTable| kvm_dtable { base: table.base, limit: table.limit, ..kvm_dtable::default() };
    let [es, cs, ss, ds, fs, gs] = sregs.segs.map(|seg| kvm_segment(&seg));
    kvm_sregs {
        es,
        cs,
        ss,
        ds,
        fs,
        gs,
        ldt: kvm_segment(&sregs.ldt),
        tr: kvm_segment(&sregs.tr),
        gdt: table(&sregs.gdt),
        idt: table(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        interrupt_bitmap: sregs.interrupt_bitmap,
    }
}

fn events(events: &kvm_vcpu_events) -> Events {
    let has = |flag| events.flags & flag != 0;
    Events {
        exception_injected: events.exception.injected != 0,
        exception_pending: events.exception.pending != 0,
        exception_nr: events.exception.nr,
        exception_error_code: (events.exception.has_error_code != 0).then_some(events.exception.error_code),
        exception_payload: (events.exception_has_payload != 0).then_some(events.exception_payload),
        interrupt_injected: events.interrupt.injected != 0,
        interrupt_nr: events.interrupt.nr,
        interrupt_soft: events.interrupt.soft != 0,
        interrupt_shadow: if has(KVM_VCPUEVENT_VALID_SHADOW) { events.interrupt.shadow } else { 0 },
        nmi_injected: events.nmi.injected != 0,
        nmi_pending: events.nmi.pending != 0,
        nmi_masked: events.nmi.masked != 0,
        sipi_vector: events.sipi_vector,
        smi_smm: events.smi.smm != 0,
        smi_pending: events.smi.pending != 0,
        smi_inside_nmi: events.smi.smm_inside_nmi != 0,
        smi_latched_init: events.smi.latched_init != 0,
        triple_fault_pending: has(KVM_VCPUEVENT_VALID_TRIPLE_FAULT) && events.triple_fault.pending != 0,
    }
}

fn kvm_events(events: &Events) -> kvm_vcpu_events {
    let mut out = kvm_vcpu_events {
        sipi_vector: events.sipi_vector,
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_SHADOW,
        ..kvm_vcpu_events::default()
    };
    out.exception.injected = events.exception_injected.into();
    out.exception.pending = events.exception_pending.into();
    out.exception.nr = events.exception_nr;
    out.exception.has_error_code = events.exception_error_code.is_some().into();
    out.exception.error_code = events.exception_error_code.unwrap_or(0);
    if let Some(payload) = events.exception_payload {
        out.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
        out.exception_has_payload = 1;
        out.exception_payload = payload;
    }
    out.interrupt.injected = events.interrupt_injected.into();
    out.interrupt.nr = events.interrupt_nr;
    out.interrupt.soft = events.interrupt_soft.into();
    out.interrupt.shadow = events.interrupt_shadow;
    out.nmi.injected = events.nmi_injected.into();
    out.nmi.pending = events.nmi_pending.into();
    out.nmi.masked = events.nmi_masked.into();
    // A host without SMM refuses the flag, so it is set only where there is something to say.
    if events.smi_smm || events.smi_pending || events.smi_inside_nmi || events.smi_latched_init {
        out.flags |= KVM_VCPUEVENT_VALID_SMM;
        out.smi.smm = events.smi_smm.into();
        out.smi.pending = events.smi_pending.into();
        out.smi.smm_inside_nmi = events.smi_inside_nmi.into();
        out.smi.latched_init = events.smi_latched_init.into();
    }
    if events.triple_fault_pending {
        out.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        out.triple_fault.pending = 1;
    }
    out
}

fn debug_registers(regs: &kvm_debugregs) -> DebugRegisters {
    DebugRegisters { db: regs.db, dr6: regs.dr6, dr7: regs.dr7 }
}

fn kvm_debug_registers(regs: &DebugRegisters) -> kvm_debugregs {
    kvm_debugregs { db: regs.db, dr6: regs.dr6, dr7: regs.dr7, ..kvm_debugregs::default() }
}
