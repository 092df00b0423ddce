//! Sections `cpu_common` and `cpu`.

use super::{fpu, msr};
use crate::state::{self, DescriptorTable, Events, MachineState, VcpuState};
use qevm_devices::DeviceState;
use qevm_devices::cpu::nested::{ExceptionInfo, NestedState};
use qevm_devices::cpu::registers::Segment;
use qevm_devices::cpu::{Cpu, msr as sub};
use qevm_devices::cpu_common::CpuCommon;
use qevm_savevm::vmstate::Accel;

/// Bits of a segment's flags: those of the second word of its descriptor.
mod segment {
    pub(super) const TYPE: u32 = 8;
    pub(super) const S: u32 = 12;
    pub(super) const DPL: u32 = 13;
    pub(super) const PRESENT: u32 = 15;
    pub(super) const AVL: u32 = 20;
    pub(super) const L: u32 = 21;
    pub(super) const DB: u32 = 22;
    pub(super) const G: u32 = 23;
}

/// QEMU's hidden flags, as far as a vCPU of KVM's has them.
mod hidden {
    pub(super) const INHIBIT_IRQ: u32 = 1 << 3;
    pub(super) const CS32: u32 = 1 << 4;
    pub(super) const SS32: u32 = 1 << 5;
    pub(super) const ADDSEG: u32 = 1 << 6;
    pub(super) const PE: u32 = 1 << 7;
    /// CR0.MP, EM and TS, from bits 1 to 3.
    pub(super) const CR0_SHIFT: u32 = 8;
    pub(super) const CR0_MASK: u64 = 0xe;
    pub(super) const LMA: u32 = 1 << 14;
    pub(super) const CS64: u32 = 1 << 15;
    pub(super) const SMM: u32 = 1 << 19;
    /// A guest of the guest runs.
    pub(super) const GUEST: u32 = 1 << 21;
    pub(super) const OSFXSR: u32 = 1 << 22;
    /// EFLAGS bits that are hidden flags as well: TF, IOPL, VM.
    pub(super) const EFLAGS: u64 = 1 << 8 | 3 << 12 | 1 << 17;

    /// Second word: interrupts are not blocked by SVM (GIF and VGIF), as every stream of a guest under KVM shows.
    pub(super) const GIF: u32 = 0x101;
    pub(super) const SMM_INSIDE_NMI: u32 = 1 << 1;
    pub(super) const NMI_BLOCKED: u32 = 1 << 2;
}

/// Numbers of segments in `segs`.
const ES: usize = 0;
const CS: usize = 1;
const SS: usize = 2;
const DS: usize = 3;
const CR0_PE: u64 = 1;
const CR4_OSFXSR: u64 = 1 << 9;
const EFER_LMA: u64 = 1 << 10;
const EFER_SVME: u64 = 1 << 12;
const EFLAGS_VM: u64 = 1 << 17;
pub(super) const MP_STATE_UNINITIALIZED: u32 = 1;
pub(super) const MP_STATE_HALTED: u32 = 3;
/// `interrupt_request`: an SMI is pending.
const REQUEST_SMI: u32 = 0x40;
/// A pending exception that nothing can intercept is delivered, see the section's hooks.
const NO_EXCEPTION: i32 = -1;

pub(super) fn common(vcpu: &VcpuState, accel: Accel) -> DeviceState {
    // A vCPU that waits for its start sleeps as well, under TCG by this flag.
    let starts_by_flag = accel == Accel::Tcg && vcpu.mp_state == MP_STATE_UNINITIALIZED;
    DeviceState::CpuCommon(CpuCommon {
        halted: (vcpu.mp_state == MP_STATE_HALTED || starts_by_flag).into(),
        interrupt_request: if vcpu.events.smi_pending { REQUEST_SMI } else { 0 },
        ..CpuCommon::default()
    })
}

pub(super) fn save(vcpu: &VcpuState, state: &MachineState, instance_id: u32) -> Cpu {
    let base = match state.opaque.find(super::SectionKind::Cpu.idstr(), instance_id) {
        Some(DeviceState::Cpu(base)) => base.clone(),
        _ => at_reset(),
    };
    let (regs, sregs, debug, events) = (&vcpu.regs, &vcpu.sregs, &vcpu.debug, &vcpu.events);
    let mut cpu = Cpu {
        regs: regs.gpr,
        eip: regs.rip,
        eflags: regs.rflags,
        segs: sregs.segs.map(|segment| save_segment(&segment)),
        ldt: save_segment(&sregs.ldt),
        tr: save_segment(&sregs.tr),
        gdt: save_table(sregs.gdt),
        idt: save_table(sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        efer: sregs.efer,
        dr: [debug.db[0], debug.db[1], debug.db[2], debug.db[3], debug.dr6, debug.dr7, debug.dr6, debug.dr7],
        mp_state: vcpu.mp_state,
        tsc_khz: Some(sub::TscKhz { value: vcpu.tsc_khz.into() }),
        ..base
    };
    fpu::save(&vcpu.xsave, vcpu.xcr0, &mut cpu);
    msr::save(&vcpu.msrs, &mut cpu);
    save_events(events, &mut cpu);
    cpu.hflags |= hidden_flags(&cpu);
    cpu
}

/// What this machine does not model, as a QEMU has it after a reset.
fn at_reset() -> Cpu {
    Cpu { a20_mask: -1, smbase: 0x3_0000, ..Cpu::default() }
}

fn save_events(events: &Events, cpu: &mut Cpu) {
    let exception = events.exception_injected || events.exception_pending;
    cpu.exception_nr = if exception { events.exception_nr.into() } else { NO_EXCEPTION };
    cpu.exception_info = exception.then(|| ExceptionInfo {
        pending: events.exception_pending.into(),
        injected: events.exception_injected.into(),
        has_payload: events.exception_payload.is_some().into(),
        payload: events.exception_payload.unwrap_or(0),
    });
    cpu.has_error_code = events.exception_error_code.is_some().into();
    cpu.error_code = events.exception_error_code.map(|code| sub::ErrorCode { value: code as i32 });
    cpu.interrupt_injected = if events.interrupt_injected { events.interrupt_nr.into() } else { -1 };
    cpu.soft_interrupt = events.interrupt_soft.into();
    cpu.nmi_injected = events.nmi_injected.into();
    cpu.nmi_pending = events.nmi_pending.into();
    cpu.sipi_vector = events.sipi_vector;
    cpu.triple_fault = Some(sub::TripleFault { value: events.triple_fault_pending.into() });
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    cpu.hflags = flag(events.interrupt_shadow != 0, hidden::INHIBIT_IRQ) | flag(events.smi_smm, hidden::SMM);
    cpu.hflags2 = hidden::GIF
        | flag(events.nmi_masked, hidden::NMI_BLOCKED)
        | flag(events.smi_inside_nmi, hidden::SMM_INSIDE_NMI);
}

/// The hidden flags that follow from registers.
fn hidden_flags(cpu: &Cpu) -> u32 {
    let bit = |segment: usize, bit: u32| cpu.segs[segment].flags >> bit & 1 != 0;
    let protected = cpu.cr0 & CR0_PE != 0;
    let virtual_8086 = cpu.eflags & EFLAGS_VM != 0;
    // The level of privilege is that of the stack.
    let mut flags = cpu.segs[SS].flags >> segment::DPL & 3;
    flags |= if protected { hidden::PE } else { 0 };
    flags |= ((cpu.cr0 & hidden::CR0_MASK) << hidden::CR0_SHIFT) as u32;
    flags |= (cpu.eflags & hidden::EFLAGS) as u32;
    flags |= if cpu.cr4 & CR4_OSFXSR != 0 { hidden::OSFXSR } else { 0 };
    let long = cpu.efer & EFER_LMA != 0;
    flags |= if long { hidden::LMA } else { 0 };
    if long && bit(CS, segment::L) {
        return flags | hidden::CS32 | hidden::SS32 | hidden::CS64;
    }
    flags |= if bit(CS, segment::DB) { hidden::CS32 } else { 0 };
    flags |= if bit(SS, segment::DB) { hidden::SS32 } else { 0 };
    let based = [DS, ES, SS].iter().any(|segment| cpu.segs[*segment].base != 0);
    if !protected || virtual_8086 || flags & hidden::CS32 == 0 || based {
        flags |= hidden::ADDSEG;
    }
    flags
}

/// Brings a vCPU to what the section says; what it does not say stays as it is.
pub(super) fn load(cpu: &Cpu, vcpu: &mut VcpuState) -> Result<(), String> {
    if cpu.hflags & hidden::GUEST != 0 {
        return Err("a guest of the guest runs, which this machine does not support".into());
    }
    let vmxon = |nested: &NestedState| nested.state.0.as_ref().is_some_and(|state| state.vmx.is_some());
    if cpu.nested_state.as_ref().is_some_and(vmxon) {
        return Err("the guest has executed VMXON, and this machine does not support guests of the guest".into());
    }
    if cpu.efer & EFER_SVME != 0 {
        return Err("the guest has switched AMD's virtualisation on (EFER.SVME), and this machine does not support \
                    guests of the guest (start the source with -cpu host,-svm)"
            .into());
    }
    if cpu.msr_hyperv_hypercall.as_ref().is_some_and(|sub| sub.guest_os_id != 0) {
        return Err("the guest uses Hyper-V enlightenments, which this machine lacks (start the source without hv-* \
                    in -cpu)"
            .into());
    }
    if cpu.interrupt_injected > u8::MAX.into() || cpu.exception_nr > u8::MAX.into() {
        return Err(format!("vector {} or {}", cpu.interrupt_injected, cpu.exception_nr));
    }
    vcpu.regs = state::Registers { gpr: cpu.regs, rip: cpu.eip, rflags: cpu.eflags };
    let sregs = &mut vcpu.sregs;
    sregs.segs = cpu.segs.map(|segment| load_segment(&segment));
    (sregs.ldt, sregs.tr) = (load_segment(&cpu.ldt), load_segment(&cpu.tr));
    (sregs.gdt, sregs.idt) = (load_table(&cpu.gdt), load_table(&cpu.idt));
    (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4) = (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4);
    sregs.efer = cpu.efer;
    sregs.interrupt_bitmap = [0; 4];
    vcpu.debug =
        state::DebugRegisters { db: [cpu.dr[0], cpu.dr[1], cpu.dr[2], cpu.dr[3]], dr6: cpu.dr[6], dr7: cpu.dr[7] };
    vcpu.mp_state = cpu.mp_state;
    if let Some(frequency) = &cpu.tsc_khz {
        vcpu.tsc_khz = u32::try_from(frequency.value).map_err(|_| format!("a TSC of {} kHz", frequency.value))?;
    }
    vcpu.xcr0 = cpu.xcr0;
    fpu::load(cpu, &mut vcpu.xsave);
    msr::load(cpu, &mut vcpu.msrs);
    vcpu.events = load_events(cpu);
    Ok(())
}

fn load_events(cpu: &Cpu) -> Events {
    let info = cpu.exception_info.clone().unwrap_or_default();
    let exception = cpu.exception_nr != NO_EXCEPTION && cpu.exception_nr >= 0;
    let pending = exception && info.pending != 0 && info.injected == 0;
    let error_code = cpu.error_code.as_ref().map_or(0, |code| code.value as u32);
    Events {
        exception_injected: exception && !pending,
        exception_pending: pending,
        exception_nr: if exception { cpu.exception_nr as u8 } else { 0 },
        exception_error_code: (exception && cpu.has_error_code != 0).then_some(error_code),
        exception_payload: (pending && info.has_payload != 0).then_some(info.payload),
        interrupt_injected: cpu.interrupt_injected >= 0,
        interrupt_nr: cpu.interrupt_injected.max(0) as u8,
        interrupt_soft: cpu.soft_interrupt != 0,
        interrupt_shadow: (cpu.hflags & hidden::INHIBIT_IRQ != 0).into(),
        nmi_injected: cpu.nmi_injected != 0,
        nmi_pending: cpu.nmi_pending != 0,
        nmi_masked: cpu.hflags2 & hidden::NMI_BLOCKED != 0,
        sipi_vector: cpu.sipi_vector,
        smi_smm: cpu.hflags & hidden::SMM != 0,
        smi_pending: false,
        smi_inside_nmi: cpu.hflags2 & hidden::SMM_INSIDE_NMI != 0,
        smi_latched_init: false,
        triple_fault_pending: cpu.triple_fault.as_ref().is_some_and(|fault| fault.value != 0),
    }
}

fn save_segment(from: &state::Segment) -> Segment {
    let bit = |set: bool, bit: u32| u32::from(set) << bit;
    let flags = u32::from(from.kind) << segment::TYPE
        | bit(from.s, segment::S)
        | u32::from(from.dpl) << segment::DPL
        | bit(from.present, segment::PRESENT)
        | bit(from.avl, segment::AVL)
        | bit(from.l, segment::L)
        | bit(from.db, segment::DB)
        | bit(from.g, segment::G);
    Segment {
        selector: from.selector.into(),
        base: from.base,
        limit: from.limit,
        flags: if from.unusable { 0 } else { flags },
    }
}

fn load_segment(from: &Segment) -> state::Segment {
    let bit = |bit: u32| from.flags >> bit & 1 != 0;
    let present = bit(segment::PRESENT);
    state::Segment {
        selector: from.selector as u16,
        base: from.base,
        limit: from.limit,
        kind: (from.flags >> segment::TYPE & 0xf) as u8,
        present,
        dpl: (from.flags >> segment::DPL & 3) as u8,
        db: bit(segment::DB),
        s: bit(segment::S),
        l: bit(segment::L),
        g: bit(segment::G),
        avl: bit(segment::AVL),
        unusable: !present,
    }
}

fn save_table(table: DescriptorTable) -> Segment {
    Segment { base: table.base, limit: table.limit.into(), ..Segment::default() }
}

fn load_table(table: &Segment) -> DescriptorTable {
    DescriptorTable { base: table.base, limit: table.limit as u16 }
}
