//! Between KVM and the plain values of [`state`](qevm_microvm::state). Nothing else reads or sets KVM's state.

mod chips;
mod mce;
mod vcpu;

pub(super) use mce::set_up as set_up_mce;
pub(super) use vcpu::{enter, saved_msrs};

use super::Machine;
use super::vcpu::Vcpu;
use crate::devices::Rtc;
use crate::error::{Error, Result};
use kvm_bindings::KVM_MP_STATE_RUNNABLE;
use qevm_microvm::state::{ClockState, GedState, MachineState, Msr, OpaqueState, PitState};

/// The paravirtual clock, the PIT and the TSCs, which KVM lets run on while the vCPUs are paused. As with a QEMU clock
/// and PIT stop for the guest: they are read when it stops, and set when it goes on. Only a migration that stops a
/// guest lets its clock [`catch_up`]. The TSCs of a guest that migrates do as well, so that it does not see TSC and
/// clock part by the time that it was paused.
#[derive(Clone, Debug)]
pub(super) struct FrozenClocks {
    clock: ClockState,
    pit: PitState,
    /// One for each vCPU.
    tscs: Vec<Msr>,
    /// A guest was loaded since it stopped: its TSCs have to be set.
    loaded: bool,
}

/// Reads what runs on. The machine has just been paused.
pub(super) fn hold(machine: &Machine) -> Result<()> {
    let held = read_held(machine)?;
    *machine.held.lock() = Some(held);
    Ok(())
}

/// Has the paravirtual clock of a guest that was stopped by its migration count what has passed since, as QEMU does, so
/// that its wall clock is not late by the downtime. The machine is about to be saved.
pub(super) fn catch_up(machine: &Machine) -> Result<()> {
    match &mut *machine.held.lock() {
        Some(held) if !held.loaded => held.clock = chips::save_clock(&machine.vm)?,
        _ => (),
    }
    Ok(())
}

/// Lets what was held go on from where it was. The machine is about to run.
pub(super) fn release(machine: &Machine) -> Result<()> {
    let Some(held) = machine.held.lock().take() else { return Ok(()) };
    // One in the monitor counts in virtual time, which stops by itself.
    if machine.devices.split.is_none() {
        chips::load_pit(&machine.vm, &held.pit, machine.clock.lock().now())?;
    }
    if held.loaded {
        for (index, (vcpu, tsc)) in machine.vcpus.iter().zip(&held.tscs).enumerate() {
            vcpu::set_tsc(&vcpu.fd.lock(), index == 0, *tsc)?;
        }
    }
    chips::load_clock(&machine.vm, &held.clock)
}

fn read_held(machine: &Machine) -> Result<FrozenClocks> {
    let clock = chips::save_clock(&machine.vm)?;
    let tscs = machine.vcpus.iter().map(|vcpu| vcpu::tsc(&vcpu.fd.lock())).collect::<Result<_>>()?;
    let pit = match &machine.devices.split {
        Some(chips) => chips.save_pit(),
        None => chips::save_pit(&machine.vm, machine.clock.lock().now())?,
    };
    Ok(FrozenClocks { clock, pit, tscs, loaded: false })
}

/// RSP in the order of [`Registers`](qevm_microvm::state::Registers).
const RSP: usize = 4;

/// The machine is paused.
pub(super) fn save(machine: &Machine) -> Result<MachineState> {
    let held = machine.held.lock().clone();
    let FrozenClocks { clock, pit, tscs, .. } = held.map_or_else(|| read_held(machine), Ok)?;
    let save_vcpu = |(vcpu, tsc): (&Vcpu, Msr)| {
        let mut state = vcpu::save(&machine.vm, &vcpu.fd.lock(), &machine.saved_msrs)?;
        state.msrs.iter_mut().filter(|msr| msr.index == tsc.index).for_each(|msr| *msr = tsc);
        if let Some(vector) = vcpu.undelivered((state.regs.rip, state.regs.gpr[RSP]))
            && !state.events.interrupt_injected
        {
            // The 8259s count it as being served: without it the destination would wait for its end for ever.
            (state.events.interrupt_injected, state.events.interrupt_nr) = (true, vector);
            state.mp_state = KVM_MP_STATE_RUNNABLE;
        }
        Ok(state)
    };
    let vcpus = machine.vcpus.iter().zip(tscs).map(save_vcpu).collect::<Result<_>>()?;
    let (pics, ioapic) = match &machine.devices.split {
        Some(chips) => chips.save_irqchip(),
        None => chips::save_irqchip(&machine.vm)?,
    };
    Ok(MachineState {
        vcpus,
        pics,
        ioapic,
        ioapic2: machine.devices.ioapic2.lock().save(),
        pit,
        clock,
        virtual_clock: machine.clock.lock().now(),
        split_irqchip: machine.devices.split.is_some(),
        serial: machine.devices.serial.lock().save(),
        rtc: machine.devices.rtc.as_ref().map(|rtc| rtc.with(Rtc::save)),
        fw_cfg: machine.devices.fw_cfg.lock().save(),
        ged: GedState { sel: machine.devices.ged.lock().selector },
        pci: machine.devices.pci.as_ref().map(|bus| bus.lock().save()),
        virtio: machine.virtio.clone(),
        virtio_states: machine.devices.virtio.0.iter().map(|d| d.as_ref().map(|d| d.lock().save())).collect(),
        opaque: machine.opaque.lock().clone(),
    })
}

/// The machine is paused.
pub(super) fn load(machine: &Machine, state: &MachineState) -> Result<()> {
    if state.vcpus.len() != machine.vcpus.len() {
        return Err(Error::State(format!(
            "it has {} vCPUs, the machine has {}",
            state.vcpus.len(),
            machine.vcpus.len()
        )));
    }
    machine.clock.lock().set(state.virtual_clock);
    match &machine.devices.split {
        Some(chips) => chips.load(&state.pics, &state.ioapic, &state.pit),
        None => chips::load_irqchip(&machine.vm, &state.pics, &state.ioapic)?,
    }
    for (index, (vcpu, state)) in machine.vcpus.iter().zip(&state.vcpus).enumerate() {
        vcpu::load(&vcpu.fd.lock(), index == 0, state)?;
    }
    // Now, so that KVM's refusal is the load's failure; and once more when the machine goes on, so that they are
    // stopped until then. After the TSCs, for KVM derives the guest's clock from both.
    let tscs = state.vcpus.iter().map(vcpu::tsc_of).collect();
    let held = FrozenClocks { clock: state.clock.clone(), pit: state.pit.clone(), tscs, loaded: true };
    chips::load_clock(&machine.vm, &held.clock)?;
    *machine.held.lock() = Some(held);
    for (device, state) in machine.devices.virtio.0.iter().zip(&state.virtio_states) {
        if let Some((device, state)) = device.as_ref().zip(state.as_ref()) {
            device.lock().load(state)?;
        }
    }
    machine.devices.serial.lock().load(&state.serial);
    machine.devices.ioapic2.lock().load(&state.ioapic2);
    if let Some((bus, state)) = machine.devices.pci.as_ref().zip(state.pci.as_ref()) {
        bus.lock().load(state)?;
    }
    if let Some((rtc, state)) = machine.devices.rtc.as_ref().zip(state.rtc.as_ref()) {
        rtc.with(|rtc, now| rtc.load(state, now));
    }
    machine.devices.fw_cfg.lock().load(&state.fw_cfg);
    machine.devices.ged.lock().selector = state.ged.sel;
    *machine.opaque.lock() = state.opaque.clone();
    Ok(())
}

/// Makes everything but the time what it was in `fresh`, the state of this machine when it was made. The machine is
/// paused.
pub(super) fn reset(machine: &Machine, fresh: &MachineState) -> Result<()> {
    // Devices first, so that none holds an interrupt line when the controllers are reset.
    machine.devices.virtio.0.iter().flatten().for_each(|device| device.lock().switch_on());
    machine.devices.rtc.iter().for_each(|rtc| rtc.with(|rtc, _| rtc.reset()));
    machine.vcpus.iter().for_each(Vcpu::forget_interrupts);
    let held = machine.held.lock().clone();
    let FrozenClocks { clock, .. } = held.map_or_else(|| read_held(machine), Ok)?;
    let virtual_clock = machine.clock.lock().now();
    let mut pit = fresh.pit.clone();
    // Its counters start now.
    let passed = virtual_clock - fresh.virtual_clock;
    pit.channels.iter_mut().for_each(|channel| channel.count_load_time += passed);
    if machine.devices.split.is_none() {
        // KVM's goes on while the vCPUs are paused, and would interrupt by controllers that have been reset already.
        chips::load_pit(&machine.vm, &pit, virtual_clock)?;
    }
    let virtio_states = vec![None; fresh.virtio_states.len()];
    let state = MachineState {
        clock,
        pit,
        virtual_clock,
        rtc: None,
        virtio_states,
        opaque: OpaqueState::default(),
        ..fresh.clone()
    };
    load(machine, &state)
}
