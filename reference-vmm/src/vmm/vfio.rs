//! QEMU's event VFIO_MIGRATION.

use super::{Event, Vmm};
use crate::vfio::DeviceState;
use serde_json::json;
use std::sync::Arc;

/// Emits an event for each state of a device that was asked to tell (`migration-events=on`).
pub(super) fn tell_of_states(vmm: &Arc<Vmm>) {
    for device in vmm.machine.vfio().all() {
        let (id, qom_path) = (device.id().unwrap_or_default().to_owned(), device.qom_path());
        let weak = Arc::downgrade(vmm);
        device.watch(Box::new(move |state| {
            // QEMU has no name for a device that has failed.
            if let Some(vmm) = weak.upgrade().filter(|_| state != DeviceState::Error) {
                let data = json!({ "device-id": id, "qom-path": qom_path, "device-state": state.as_str() });
                vmm.emit(Event::now("VFIO_MIGRATION", Some(data)));
            }
        }));
    }
}
