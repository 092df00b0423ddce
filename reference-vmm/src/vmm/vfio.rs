//! VFIO devices of a machine that migrates: what they do not go with, and QEMU's event VFIO_MIGRATION.

use super::{Event, Vmm};
use crate::vfio::{DeviceState, MultifdTransfer, VfioDevice};
use qevm_migration::Refused;
use serde_json::json;
use std::sync::Arc;

impl Vmm {
    /// Emits an event for each state of a device that was asked to tell (`migration-events=on`).
    pub(super) fn tell_of_device_states(self: &Arc<Self>) {
        for device in self.machine.vfio().all() {
            let (id, qom_path) = (device.id().unwrap_or_default().to_owned(), device.qom_path());
            let weak = Arc::downgrade(self);
            device.watch(Box::new(move |state| {
                // QEMU has no name for a device that has failed.
                if let Some(vmm) = weak.upgrade().filter(|_| state != DeviceState::Error) {
                    let data = json!({ "device-id": id, "qom-path": qom_path, "device-state": state.as_str() });
                    vmm.emit(Event::now("VFIO_MIGRATION", Some(data)));
                }
            }));
        }
    }

    /// Refuses a migration that a VFIO device cannot be part of with these capabilities.
    ///
    /// # Errors
    /// [`Refused::Blocked`], with QEMU's words where it has any (11.1).
    pub(super) fn check_devices(&self) -> Result<(), Refused> {
        let capabilities = self.outgoing.capabilities();
        let blocked = |device: &VfioDevice, why: &str| Err(Refused::Blocked(format!("{}: {why}", device.name())));
        for device in self.machine.vfio().all() {
            if capabilities.postcopy_ram {
                return blocked(device, "VFIO migration is not supported with postcopy migration");
            }
            if capabilities.background_snapshot {
                return blocked(device, "VFIO migration is not supported with background snapshot");
            }
            if device.multifd_transfer() == MultifdTransfer::On && !capabilities.multifd {
                return blocked(device, "x-migration-multifd-transfer=on needs capability multifd, which is off");
            }
        }
        Ok(())
    }
}
