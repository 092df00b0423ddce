//! Section `apic`: the page of registers of an in-kernel local APIC.

use crate::state::VcpuState;
use qevm_devices::DeviceState;
use qevm_devices::apic::{Apic, ApicSipi};
use qevm_savevm::vmstate::Accel;

/// Register numbers: offset in the page divided by 16 (Intel SDM, "Local APIC Register Address Map").
mod register {
    pub(super) const ID: usize = 0x02;
    pub(super) const TPR: usize = 0x08;
    pub(super) const ARB: usize = 0x09;
    pub(super) const LDR: usize = 0x0d;
    pub(super) const DFR: usize = 0x0e;
    pub(super) const SVR: usize = 0x0f;
    pub(super) const ISR: usize = 0x10;
    pub(super) const TMR: usize = 0x18;
    pub(super) const IRR: usize = 0x20;
    pub(super) const ESR: usize = 0x28;
    pub(super) const ICR: usize = 0x30;
    pub(super) const LVT_TIMER: usize = 0x32;
    pub(super) const TIMER_INITIAL: usize = 0x38;
    pub(super) const TIMER_CURRENT: usize = 0x39;
    pub(super) const TIMER_DIVIDE: usize = 0x3e;
}

/// QEMU keeps 32 bits of the base, which is below 4 GiB on every machine here.
const BASE_MASK: u64 = 0xffff_ffff;

/// The timer counts once in 2^shift ns: KVM's bus runs at 1 GHz.
fn shift(divide: u32) -> u32 {
    let encoded = divide & 3 | divide >> 1 & 4;
    (encoded + 1) & 7
}

pub(super) fn save(vcpu: &VcpuState, virtual_clock: i64, accel: Accel) -> DeviceState {
    let get = |index: usize| word(&vcpu.lapic, index);
    let bits = |first: usize| std::array::from_fn(|i| get(first + i));
    let (initial, current) = (get(register::TIMER_INITIAL), get(register::TIMER_CURRENT));
    let divide = get(register::TIMER_DIVIDE);
    let shift = shift(divide);
    // When the count began that has come to `current` by now.
    let gone = i64::from(initial.saturating_sub(current)) << shift;
    let load_time = virtual_clock.saturating_sub(gone);
    let waits = vcpu.mp_state == super::cpu::MP_STATE_UNINITIALIZED;
    let next_time = (current > 0).then(|| virtual_clock + (i64::from(current) << shift));
    DeviceState::Apic(Apic {
        apicbase: (vcpu.sregs.apic_base & BASE_MASK) as u32,
        id: (get(register::ID) >> 24) as u8,
        arb_id: get(register::ARB) as u8,
        tpr: get(register::TPR) as u8,
        spurious_vec: get(register::SVR),
        log_dest: (get(register::LDR) >> 24) as u8,
        dest_mode: (get(register::DFR) >> 28) as u8,
        isr: bits(register::ISR),
        tmr: bits(register::TMR),
        irr: bits(register::IRR),
        lvt: std::array::from_fn(|i| get(register::LVT_TIMER + i)),
        esr: get(register::ESR),
        icr: [get(register::ICR), get(register::ICR + 1)],
        divide_conf: divide,
        count_shift: shift as i32,
        initial_count: initial,
        initial_count_load_time: load_time,
        next_time: next_time.unwrap_or(0),
        timer_expiry: next_time.unwrap_or(-1),
        // Only TCG keeps it here; KVM says it in the state of the vCPU.
        sipi: (accel == Accel::Tcg && waits).then_some(ApicSipi { sipi_vector: 0, wait_for_sipi: 1 }),
    })
}

pub(super) fn load(apic: &Apic, vcpu: &mut VcpuState, virtual_clock: i64) {
    vcpu.sregs.apic_base = vcpu.sregs.apic_base & !BASE_MASK | u64::from(apic.apicbase);
    vcpu.sregs.cr8 = u64::from(apic.tpr >> 4);
    let page = &mut vcpu.lapic;
    let mut set = |index: usize, value: u32| {
        if let Some(bytes) = page.get_mut(index * 16..index * 16 + 4) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    };
    set(register::ID, u32::from(apic.id) << 24);
    set(register::TPR, apic.tpr.into());
    set(register::ARB, apic.arb_id.into());
    set(register::LDR, u32::from(apic.log_dest) << 24);
    // The low bits of the destination format read as ones.
    set(register::DFR, u32::from(apic.dest_mode) << 28 | 0x0fff_ffff);
    set(register::SVR, apic.spurious_vec);
    for i in 0..8 {
        set(register::ISR + i, apic.isr[i]);
        set(register::TMR + i, apic.tmr[i]);
        set(register::IRR + i, apic.irr[i]);
    }
    (0..6).for_each(|i| set(register::LVT_TIMER + i, apic.lvt[i]));
    set(register::ESR, apic.esr);
    set(register::ICR, apic.icr[0]);
    set(register::ICR + 1, apic.icr[1]);
    set(register::TIMER_INITIAL, apic.initial_count);
    set(register::TIMER_DIVIDE, apic.divide_conf);
    let gone = virtual_clock.saturating_sub(apic.initial_count_load_time).max(0) as u64 >> shift(apic.divide_conf);
    set(register::TIMER_CURRENT, u64::from(apic.initial_count).saturating_sub(gone) as u32);
}

fn word(page: &[u8], index: usize) -> u32 {
    let bytes = page.get(index * 16..).and_then(|rest| rest.first_chunk());
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}
