//! The machine's reset and its power button.

use super::{Machine, kvm_state};
use crate::boot;
use crate::devices::SplitChips;
use crate::error::{Error, Result};
use crate::memory::{BIOS, PAGE_SIZE};

impl Machine {
    /// Puts vCPUs, interrupt controllers and devices into the state in which they are switched on, as the reset line of
    /// a PC does. RAM keeps what it holds, except that with `load` the firmware, and a kernel that is entered without
    /// firmware, are loaded anew; the dirty log shows those pages. The time goes on: real-time clock, virtual and
    /// paravirtual clock are not reset.
    ///
    /// The machine must be paused, and stays so. A guest that had [stopped](Machine::wait_stop) by itself can be
    /// resumed afterwards.
    ///
    /// # Errors
    /// [`Error::NotPaused`]; [`Error::Kvm`] when KVM refuses, after which the machine is of no more use;
    /// [`Error::Boot`] when the kernel has no room.
    pub fn reset(&self, load: bool) -> Result<()> {
        self.must_be_paused("reset it")?;
        let fresh = self.fresh.as_ref().ok_or_else(|| Error::Config("the machine is not complete".to_owned()))?;
        self.vfio.reset();
        kvm_state::reset(self, fresh)?;
        if load {
            self.load_firmware()?;
            self.load_kernel()?;
        }
        self.control.forget_stop();
        Ok(())
    }

    /// Tells the network where the guest is now, over each of its cards: by a RARP frame, and by the guest if it can. A
    /// guest that is paused is not announced.
    pub fn announce(&self) {
        self.devices.virtio.0.iter().flatten().for_each(|device| device.lock().announce());
    }

    /// Presses the ACPI power button: the guest gets an interrupt, and does what it likes.
    pub fn press_power_button(&self) {
        self.devices.ged.lock().press_power_button();
    }

    /// Each stop of the guest by itself is told to `watcher`, on the thread of a vCPU, so that it must not block. There
    /// is one at most, the first.
    pub(crate) fn watch_stops(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.control.watch(watcher);
    }

    /// Writes the firmware where it is not in memory: the guest may have written there, or have come with another one.
    /// As at a QEMU, this machine's counts from a reset on.
    fn load_firmware(&self) -> Result<()> {
        let block = self.memory.block(BIOS).ok_or_else(|| Error::Config("the machine has no firmware".to_owned()))?;
        let mut there = vec![0; PAGE_SIZE as usize];
        for (offset, page) in (0..).step_by(there.len()).zip(self.bios.chunks_exact(there.len())) {
            block.read(offset, &mut there)?;
            if there != page {
                block.write(offset, page)?;
            }
        }
        Ok(())
    }

    /// Loads a kernel that is entered without firmware, if there is one, and puts the first vCPU at its entry.
    pub(super) fn load_kernel(&self) -> Result<()> {
        let Some(kernel) = self.kernel.as_ref().filter(|kernel| !kernel.by_firmware) else { return Ok(()) };
        let high_window = self.devices.pci.as_ref().map(|bus| bus.lock().high_window());
        let entry = boot::load(&self.memory, kernel, self.cpus(), &self.virtio, high_window)?;
        kvm_state::enter(&self.vcpus[0].fd.lock(), entry)?;
        self.devices.split.iter().for_each(SplitChips::set_up);
        Ok(())
    }
}
