//! Between KVM and the plain values of [`state`](crate::state). Nothing else reads or sets KVM's state.

mod chips;
mod vcpu;

pub(super) use vcpu::saved_msrs;

use super::Machine;
use crate::devices::lock;
use crate::error::{Error, Result};
use crate::state::{GedState, MachineState};

/// The machine is paused.
pub(super) fn save(machine: &Machine) -> Result<MachineState> {
    let virtual_clock = lock(&machine.clock).now();
    let clock = chips::save_clock(&machine.vm)?;
    let vcpus = machine
        .vcpus
        .iter()
        .map(|vcpu| vcpu::save(&machine.vm, &lock(&vcpu.fd), &machine.saved_msrs))
        .collect::<Result<_>>()?;
    let (pics, ioapic) = chips::save_irqchip(&machine.vm)?;
    Ok(MachineState {
        vcpus,
        pics,
        ioapic,
        pit: chips::save_pit(&machine.vm, virtual_clock)?,
        clock,
        virtual_clock,
        serial: lock(&machine.devices.serial).save(),
        fw_cfg: lock(&machine.devices.fw_cfg).save(),
        ged: GedState { sel: lock(&machine.devices.ged).selector },
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
    lock(&machine.clock).set(state.virtual_clock);
    chips::load_irqchip(&machine.vm, &state.pics, &state.ioapic)?;
    chips::load_pit(&machine.vm, &state.pit, state.virtual_clock)?;
    for (index, (vcpu, state)) in machine.vcpus.iter().zip(&state.vcpus).enumerate() {
        vcpu::load(&lock(&vcpu.fd), index == 0, state)?;
    }
    // After the TSCs: KVM derives the guest's clock from both.
    chips::load_clock(&machine.vm, &state.clock)?;
    lock(&machine.devices.serial).load(&state.serial);
    lock(&machine.devices.fw_cfg).load(&state.fw_cfg);
    lock(&machine.devices.ged).selector = state.ged.sel;
    Ok(())
}
