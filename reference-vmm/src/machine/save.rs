//! The state of a paused machine, saved and loaded.

use super::{Machine, SETTLE, kvm_state};
use crate::devices::Transport;
use crate::error::{Error, Result};
use qevm_microvm::state::MachineState;
use std::time::Instant;

impl Machine {
    /// Everything but the RAM.
    ///
    /// # Errors
    /// [`Error::NotPaused`]; [`Error::Kvm`] when KVM does not tell; [`Error::DiskHangs`] when a disk does not finish
    /// what is under way.
    pub fn save_state(&self) -> Result<MachineState> {
        self.must_be_paused("save its state")?;
        let settled = self.devices.virtio.settle(Instant::now() + SETTLE);
        settled.map_err(|device| Error::DiskHangs { device, seconds: SETTLE.as_secs() })?;
        kvm_state::save(self)
    }

    /// The guest ran until a migration stopped it: its paravirtual clock does not miss what has passed since.
    pub(super) fn catch_up_clock(&self) -> Result<()> {
        self.must_be_paused("set its clock")?;
        kvm_state::catch_up(self)
    }

    /// The state in which the machine was made, without a kernel.
    pub(crate) fn fresh_state(&self) -> Result<MachineState> {
        self.fresh.clone().map_or_else(|| self.save_state(), Ok)
    }

    /// Makes this machine continue where the saved one stopped. The RAM must be, or become, that of the saved one
    /// before [`Machine::resume`]. When it fails the machine is of no more use.
    ///
    /// # Errors
    /// [`Error::NotPaused`]; [`Error::State`] when the state is of another machine; [`Error::Kvm`] when KVM refuses it.
    pub fn load_state(&self, state: &MachineState) -> Result<()> {
        self.must_be_paused("load a state")?;
        kvm_state::load(self, state)
    }

    /// Whether the queues of virtio devices fit what the RAM says about them; to be asked when both have been loaded.
    ///
    /// # Errors
    /// [`Error::State`] naming a queue that does not.
    pub fn check_virtio(&self) -> Result<()> {
        self.devices.virtio.each(Transport::check)
    }
}
