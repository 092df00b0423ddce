//! The machine's reset and its power button.

use super::{Machine, kvm_state};
use crate::boot;
use crate::devices::{SplitChips, lock};
use crate::error::{Error, Result};

impl Machine {
    /// Puts vCPUs, interrupt controllers and devices into the state in which they are switched on, as the reset line of a PC does.
    /// RAM keeps what it holds, except that with `load_kernel` a kernel that is entered without firmware is loaded anew; the
    /// dirty log shows those pages. The time goes on: real-time clock, virtual and paravirtual clock are not reset.
    ///
    /// The machine must be paused, and stays so. A guest that had [stopped](Machine::wait_stop) by itself can be resumed afterwards.
    ///
    /// # Errors
    /// [`Error::NotPaused`]; [`Error::Kvm`] when KVM refuses, after which the machine is of no more use; [`Error::Boot`] when
    /// the kernel has no room.
    pub fn reset(&self, load_kernel: bool) -> Result<()> {
        self.must_be_paused("reset it")?;
        let fresh = self.fresh.as_ref().ok_or_else(|| Error::Config("the machine is not complete".to_owned()))?;
        kvm_state::reset(self, fresh)?;
        if load_kernel {
            self.load_kernel()?;
        }
        self.control.forget_stop();
        Ok(())
    }

    /// Presses the ACPI power button: the guest gets an interrupt, and does what it likes.
    pub fn press_power_button(&self) {
        lock(&self.devices.ged).press_power_button();
    }

    /// Each stop of the guest by itself is told to `watcher`, on the thread of a vCPU, so that it must not block. There is one at
    /// most, the first.
    pub(crate) fn watch_stops(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.control.watch(watcher);
    }

    /// Loads a kernel that is entered without firmware, if there is one, and puts the first vCPU at its entry.
    pub(super) fn load_kernel(&self) -> Result<()> {
        let Some(kernel) = self.kernel.as_ref().filter(|kernel| !kernel.by_firmware) else { return Ok(()) };
        let entry = boot::load(&self.memory, kernel, self.cpus(), &self.virtio)?;
        kvm_state::enter(&lock(&self.vcpus[0].fd), entry)?;
        self.devices.split.iter().for_each(SplitChips::set_up);
        Ok(())
    }
}
