//! The sections of everything that is not a vCPU.

use super::{SectionKind, msr};
use crate::state::{
    ClockState, FwCfgState, IoapicState, MachineState, PicState, PitChannelState, PitState, RtcState, SerialState,
};
use qevm_devices::DeviceState;
use qevm_devices::acpi_ged::{AcpiGed, GedState, Memhp};
use qevm_devices::fw_cfg::{FwCfg, FwCfgDma};
use qevm_devices::i8254::{I8254, PitChannel};
use qevm_devices::i8259::I8259;
use qevm_devices::ioapic::IoApic;
use qevm_devices::kvm_tpr_opt::KvmTprOpt;
use qevm_devices::kvmclock::{ClockIsReliable, KvmClock};
use qevm_devices::mc146818rtc::Mc146818Rtc;
use qevm_devices::serial::{Fifo16, IsaSerial, RecvFifo, ThrIpending, Uart};
use qevm_devices::timer::CpuTimers;
use qevm_savevm::vmstate::{Accel, Buffer, Timer};

/// Frequency of the PIT in Hz.
const PIT_FREQUENCY: i128 = 1_193_182;
const NANOSECONDS: i128 = 1_000_000_000;
/// KVM's flag for a PIT whose interrupt the HPET has taken over, and QEMU's `irq_disabled`.
const PIT_IRQ_DISABLED: u32 = 1;

/// The section as it came, to start from; else its default.
macro_rules! base {
    ($state:ident, $variant:ident, $instance_id:expr) => {
        match $state.opaque.find(SectionKind::$variant.idstr(), $instance_id) {
            Some(DeviceState::$variant(base)) => base.clone(),
            _ => Default::default(),
        }
    };
}

pub(super) fn timer(state: &MachineState, accel: Accel) -> DeviceState {
    let base: CpuTimers = base!(state, Timer, 0);
    // Ticks of the TSC that passed while the guest ran; a guest under TCG reads them as its TSC.
    let ran = i128::from(state.virtual_clock.saturating_sub(base.cpu_clock_offset));
    let khz = state.vcpus.first().map_or(0, |vcpu| i128::from(vcpu.tsc_khz));
    let ticks = i64::try_from(ran * khz / 1_000_000).unwrap_or(0).saturating_add(base.cpu_ticks_offset);
    let tsc = state.vcpus.first().map_or(0, |vcpu| msr::tsc(&vcpu.msrs) as i64);
    DeviceState::Timer(CpuTimers {
        cpu_ticks_offset: if accel == Accel::Tcg { tsc } else { ticks },
        cpu_clock_offset: state.virtual_clock,
        // Instructions are not counted under KVM.
        icount: None,
        ..base
    })
}

pub(super) fn fw_cfg(state: &MachineState) -> DeviceState {
    let FwCfgState { cur_entry, cur_offset, dma_addr } = state.fw_cfg;
    let base: FwCfg = base!(state, FwCfg, 0);
    DeviceState::FwCfg(FwCfg { cur_entry, cur_offset, dma: Some(FwCfgDma { dma_addr }), ..base })
}

pub(super) fn kvm_tpr_opt(state: &MachineState) -> DeviceState {
    DeviceState::KvmTprOpt(base!(state, KvmTprOpt, 0))
}

/// The guest's code may have been patched to ask the optimisation for its TPR, which only 32-bit guests under firmware
/// with QEMU's option ROM have done to them.
pub(super) fn expect_inactive(from: &KvmTprOpt) -> Result<(), String> {
    const ACTIVE: u32 = 1;
    match from.state {
        ACTIVE => Err("the guest's code is patched for QEMU's TPR optimisation, which this machine lacks (-global \
                       apic-common.vapic=off at the source)"
            .into()),
        _ => Ok(()),
    }
}

pub(super) fn load_fw_cfg(from: &FwCfg, into: &mut FwCfgState) {
    let cur_offset = from.cur_offset_v1.map_or(from.cur_offset, u32::from);
    let dma_addr = from.dma.as_ref().map_or(0, |dma| dma.dma_addr);
    *into = FwCfgState { cur_entry: from.cur_entry, cur_offset, dma_addr };
}

pub(super) fn ioapic(ioapic: &IoapicState) -> DeviceState {
    DeviceState::IoApic(IoApic {
        id: ioapic.id,
        ioregsel: ioapic.ioregsel,
        irr: ioapic.irr,
        ioredtbl: ioapic.redirtbl,
        ..IoApic::default()
    })
}

pub(super) fn load_ioapic(from: &IoApic, into: &mut IoapicState) {
    let base_address = into.base_address;
    let IoApic { id, ioregsel, irr, ioredtbl, .. } = *from;
    *into = IoapicState { base_address, id, ioregsel, irr, redirtbl: ioredtbl };
}

pub(super) fn kvmclock(state: &MachineState) -> DeviceState {
    // Releases from 7.2 to 11.1 were seen to send the subsection on microvm.
    let clock_is_reliable = Some(ClockIsReliable { clock_is_reliable: state.clock.reliable });
    DeviceState::KvmClock(KvmClock { clock: state.clock.clock, clock_is_reliable })
}

pub(super) fn load_kvmclock(from: &KvmClock, into: &mut ClockState) {
    let reliable = from.clock_is_reliable.as_ref().is_some_and(|sub| sub.clock_is_reliable);
    *into = ClockState { clock: from.clock, reliable };
}

pub(super) fn ged(state: &MachineState) -> DeviceState {
    let ged_state = GedState { sel: state.ged.sel };
    let base: AcpiGed = base!(state, AcpiGed, 0);
    DeviceState::AcpiGed(AcpiGed { ged_state, memhp: base.memhp.clone().or_else(|| Some(Memhp::default())), ..base })
}

pub(super) fn pic(state: &MachineState, instance_id: u32) -> DeviceState {
    let pic = &state.pics[instance_id as usize];
    let base: I8259 = base!(state, I8259, instance_id);
    DeviceState::I8259(I8259 {
        last_irr: pic.last_irr,
        irr: pic.irr,
        imr: pic.imr,
        isr: pic.isr,
        priority_add: pic.priority_add,
        irq_base: pic.irq_base,
        read_reg_select: pic.read_reg_select,
        poll: pic.poll,
        special_mask: pic.special_mask,
        init_state: pic.init_state,
        auto_eoi: pic.auto_eoi,
        rotate_on_auto_eoi: pic.rotate_on_auto_eoi,
        special_fully_nested_mode: pic.special_fully_nested_mode,
        init4: pic.init4,
        single_mode: if state.split_irqchip { pic.single_mode } else { base.single_mode },
        elcr: pic.elcr,
        ..base
    })
}

pub(super) fn load_pic(from: &I8259, into: &mut PicState) {
    *into = PicState {
        last_irr: from.last_irr,
        irr: from.irr,
        imr: from.imr,
        isr: from.isr,
        priority_add: from.priority_add,
        irq_base: from.irq_base,
        read_reg_select: from.read_reg_select,
        poll: from.poll,
        special_mask: from.special_mask,
        init_state: from.init_state,
        auto_eoi: from.auto_eoi,
        rotate_on_auto_eoi: from.rotate_on_auto_eoi,
        special_fully_nested_mode: from.special_fully_nested_mode,
        init4: from.init4,
        single_mode: from.single_mode,
        elcr: from.elcr,
        // Which lines may be level-triggered is the machine's.
        elcr_mask: into.elcr_mask,
    };
}

pub(super) fn pit(state: &MachineState) -> DeviceState {
    let channel = |i: usize| {
        let channel = &state.pit.channels[i];
        PitChannel {
            count: channel.count as i32,
            latched_count: channel.latched_count,
            count_latched: channel.count_latched,
            status_latched: channel.status_latched,
            status: channel.status,
            read_state: channel.read_state,
            write_state: channel.write_state,
            write_latch: channel.write_latch,
            rw_mode: channel.rw_mode,
            mode: channel.mode,
            bcd: channel.bcd,
            gate: channel.gate,
            count_load_time: channel.count_load_time,
            next_transition_time: if i == 0 { next_transition(channel, state) } else { 0 },
        }
    };
    let channels = [0, 1, 2].map(channel);
    DeviceState::I8254(I8254 {
        irq_disabled: state.pit.flags & PIT_IRQ_DISABLED,
        next_transition_time: channels[0].next_transition_time,
        channels,
    })
}

/// When the output of a channel in a periodic mode changes next; −1 for the others, whose timer QEMU does not need
/// where the PIT is in the kernel. Where it is not, a count that has not run out yet is waited for as well.
fn next_transition(channel: &PitChannelState, state: &MachineState) -> i64 {
    const TERMINAL_COUNT: u8 = 0;
    const RATE_GENERATOR: u8 = 2;
    const SQUARE_WAVE: u8 = 3;
    let count = i128::from(channel.count);
    let now = state.virtual_clock;
    let ticks = i128::from(now - channel.count_load_time) * PIT_FREQUENCY / NANOSECONDS;
    let (period, half) = (ticks.checked_div(count).unwrap_or(0) * count, (count + 1) / 2);
    let next = match channel.mode {
        _ if count == 0 => return -1,
        RATE_GENERATOR => period + count,
        SQUARE_WAVE if ticks - period < half => period + half,
        SQUARE_WAVE => period + count,
        TERMINAL_COUNT if state.split_irqchip && ticks < count => count,
        _ => return -1,
    };
    let time = i128::from(channel.count_load_time) + next * NANOSECONDS / PIT_FREQUENCY;
    (time as i64).max(now + 1)
}

pub(super) fn load_pit(from: &I8254, into: &mut PitState) -> Result<(), String> {
    for (i, (into, from)) in into.channels.iter_mut().zip(&from.channels).enumerate() {
        let count = u32::try_from(from.count).map_err(|_| format!("channel {i} has a count of {}", from.count))?;
        *into = PitChannelState {
            count,
            latched_count: from.latched_count,
            count_latched: from.count_latched,
            status_latched: from.status_latched,
            status: from.status,
            read_state: from.read_state,
            write_state: from.write_state,
            write_latch: from.write_latch,
            rw_mode: from.rw_mode,
            mode: from.mode,
            bcd: from.bcd,
            gate: from.gate,
            count_load_time: from.count_load_time,
        };
    }
    into.flags = into.flags & !PIT_IRQ_DISABLED | from.irq_disabled & PIT_IRQ_DISABLED;
    Ok(())
}

pub(super) fn rtc(rtc: &RtcState, state: &MachineState) -> DeviceState {
    const CRYSTAL: u128 = 32_768;
    let base: Mc146818Rtc = base!(state, Mc146818Rtc, 0);
    let armed = |time: Option<u64>| time.map_or(Timer::NOT_ARMED, |time| Timer(time as i64));
    let ticks = |time: u64| (u128::from(time) * CRYSTAL).div_ceil(NANOSECONDS as u128) as i64;
    DeviceState::Mc146818Rtc(Mc146818Rtc {
        cmos_data: Buffer(rtc.cmos),
        cmos_index: rtc.cmos_index,
        periodic_timer: armed(rtc.next_periodic),
        next_periodic_time: rtc.next_periodic.map_or(0, ticks),
        period: rtc.period,
        base_rtc: rtc.base_rtc,
        last_update: rtc.last_update,
        offset: rtc.offset,
        update_timer: armed(rtc.next_update),
        next_alarm_time: rtc.next_alarm,
        ..base
    })
}

pub(super) fn load_rtc(from: &Mc146818Rtc) -> RtcState {
    RtcState {
        cmos: *from.cmos_data,
        cmos_index: from.cmos_index & 0x7f,
        base_rtc: from.base_rtc,
        last_update: from.last_update,
        offset: from.offset,
        ..RtcState::default()
    }
}

pub(super) fn serial(serial: &SerialState) -> DeviceState {
    let mut fifo = Fifo16 { num: serial.recv_fifo.len().min(16) as u32, ..Fifo16::default() };
    fifo.data.iter_mut().zip(&serial.recv_fifo).for_each(|(into, byte)| *into = *byte);
    DeviceState::Serial(IsaSerial {
        state: Uart {
            divider: serial.divider,
            rbr: serial.rbr,
            ier: serial.ier,
            iir: serial.iir,
            lcr: serial.lcr,
            mcr: serial.mcr,
            lsr: serial.lsr,
            msr: serial.msr,
            scr: serial.scr,
            fcr: serial.fcr,
            thr_ipending: Some(ThrIpending { thr_ipending: serial.thr_ipending.into() }),
            recv_fifo: Some(RecvFifo { recv_fifo: fifo }),
            ..Uart::default()
        },
    })
}

pub(super) fn load_serial(from: &Uart, into: &mut SerialState) {
    const LSR_THR_EMPTY: u8 = 1 << 5;
    const FCR_ENABLE: u8 = 1;
    // First the byte in the shift register, then the one in the holding register or those in the FIFO.
    let shifted = from.tsr.as_ref().map(|sub| sub.tsr);
    let held = from.tsr.as_ref().filter(|_| from.fcr & FCR_ENABLE == 0 && from.lsr & LSR_THR_EMPTY == 0);
    let waiting = from.xmit_fifo.iter().flat_map(|sub| sub.xmit_fifo.bytes());
    let unsent = shifted.into_iter().chain(held.map(|sub| sub.thr)).chain(waiting).collect();
    *into = SerialState {
        divider: from.divider,
        rbr: from.rbr,
        ier: from.ier,
        iir: from.iir,
        lcr: from.lcr,
        mcr: from.mcr,
        lsr: from.lsr,
        msr: from.msr,
        scr: from.scr,
        fcr: from.fcr,
        thr_ipending: from.transmit_interrupt_pending(),
        recv_fifo: from.recv_fifo.as_ref().map_or_else(Vec::new, |sub| sub.recv_fifo.bytes().collect()),
        unsent,
    };
}
