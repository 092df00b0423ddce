//! Interrupt controllers, PIT and paravirtual clock.

use crate::error::{Result, kvm};
use crate::machine::clock::monotonic;
use kvm_bindings::{
    KVM_CLOCK_TSC_STABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_ioapic_state, kvm_irqchip, kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use qevm_microvm::state::{ClockState, IoapicState, PicState, PitChannelState, PitState};

pub(super) fn save_irqchip(vm: &VmFd) -> Result<([PicState; 2], IoapicState)> {
    let chip = |chip_id| -> Result<kvm_irqchip> {
        let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
        vm.get_irqchip(&mut chip).map_err(kvm("read an interrupt controller"))?;
        Ok(chip)
    };
    let pic = |chip_id| {
        // SAFETY: KVM has filled in the union's member for this chip, which has no invalid values.
        chip(chip_id).map(|chip: kvm_irqchip| pic_state(unsafe { &chip.chip.pic }))
    };
    let ioapic = chip(KVM_IRQCHIP_IOAPIC)?;
    // SAFETY: as above.
    let ioapic = ioapic_state(unsafe { &ioapic.chip.ioapic });
    Ok(([pic(KVM_IRQCHIP_PIC_MASTER)?, pic(KVM_IRQCHIP_PIC_SLAVE)?], ioapic))
}

pub(super) fn load_irqchip(vm: &VmFd, pics: &[PicState; 2], ioapic: &IoapicState) -> Result<()> {
    let set = |chip: kvm_irqchip| vm.set_irqchip(&chip).map_err(kvm("set an interrupt controller"));
    for (chip_id, pic) in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE].into_iter().zip(pics) {
        let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
        chip.chip.pic = kvm_pic(pic);
        set(chip)?;
    }
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..kvm_irqchip::default() };
    chip.chip.ioapic = kvm_ioapic(ioapic);
    set(chip)
}

/// KVM counts from the host's monotonic clock, the saved state from the machine's virtual clock.
pub(super) fn save_pit(vm: &VmFd, virtual_clock: i64) -> Result<PitState> {
    let pit = vm.get_pit2().map_err(kvm("read the PIT"))?;
    let to_virtual = virtual_clock - monotonic();
    Ok(PitState { channels: pit.channels.map(|channel| channel_state(&channel, to_virtual)), flags: pit.flags })
}

pub(super) fn load_pit(vm: &VmFd, state: &PitState, virtual_clock: i64) -> Result<()> {
    let to_host = monotonic() - virtual_clock;
    let mut pit = kvm_pit_state2 { flags: state.flags, ..kvm_pit_state2::default() };
    for (into, from) in pit.channels.iter_mut().zip(&state.channels) {
        *into = kvm_channel(from, to_host);
    }
    vm.set_pit2(&pit).map_err(kvm("set the PIT"))
}

pub(super) fn save_clock(vm: &VmFd) -> Result<ClockState> {
    let data = vm.get_clock().map_err(kvm("read the paravirtual clock"))?;
    Ok(ClockState { clock: data.clock, reliable: data.flags & KVM_CLOCK_TSC_STABLE != 0 })
}

pub(super) fn load_clock(vm: &VmFd, state: &ClockState) -> Result<()> {
    let data = kvm_clock_data { clock: state.clock, ..kvm_clock_data::default() };
    vm.set_clock(&data).map_err(kvm("set the paravirtual clock"))
}

fn pic_state(pic: &kvm_pic_state) -> PicState {
    PicState {
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
        elcr: pic.elcr,
        elcr_mask: pic.elcr_mask,
        single_mode: 0,
    }
}

fn kvm_pic(pic: &PicState) -> kvm_pic_state {
    kvm_pic_state {
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
        elcr: pic.elcr,
        elcr_mask: pic.elcr_mask,
    }
}

fn ioapic_state(ioapic: &kvm_ioapic_state) -> IoapicState {
    IoapicState {
        base_address: ioapic.base_address,
        id: ioapic.id as u8,
        ioregsel: ioapic.ioregsel as u8,
        irr: ioapic.irr,
        // SAFETY: both members of the union are 64 bits without invalid values.
        redirtbl: ioapic.redirtbl.map(|entry| unsafe { entry.bits }),
    }
}

fn kvm_ioapic(ioapic: &IoapicState) -> kvm_ioapic_state {
    let mut state = kvm_ioapic_state {
        base_address: ioapic.base_address,
        id: ioapic.id.into(),
        ioregsel: ioapic.ioregsel.into(),
        irr: ioapic.irr,
        ..kvm_ioapic_state::default()
    };
    for (into, from) in state.redirtbl.iter_mut().zip(ioapic.redirtbl) {
        into.bits = from;
    }
    state
}

fn channel_state(channel: &kvm_pit_channel_state, to_virtual: i64) -> PitChannelState {
    PitChannelState {
        count: channel.count,
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
        count_load_time: channel.count_load_time.wrapping_add(to_virtual),
    }
}

fn kvm_channel(channel: &PitChannelState, to_host: i64) -> kvm_pit_channel_state {
    kvm_pit_channel_state {
        count: channel.count,
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
        count_load_time: channel.count_load_time.wrapping_add(to_host),
    }
}
