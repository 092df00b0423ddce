//! What a transport carries in a migration.

use super::Transport;
use crate::devices::virtio::queue::{MAX_QUEUE, Queue};
use crate::error::{Error, Result};
use qevm_microvm::state::VirtioState;

impl Transport {
    /// Registers, queues and device.
    pub(crate) fn save(&self) -> VirtioState {
        VirtioState {
            host_features_sel: self.host_features_sel,
            guest_features_sel: self.guest_features_sel,
            guest_page_shift: self.guest_page_shift,
            status: self.status,
            isr: self.isr,
            queue_sel: self.queue_sel,
            guest_features: self.guest_features,
            config: self.config.clone(),
            queues: self.queues.iter().map(Queue::save).collect(),
            default_nums: self.queues.iter().map(Queue::default_num).collect(),
            started: self.started,
            broken: self.broken,
            device: self.model.save(),
        }
    }

    /// Takes over what was saved.
    ///
    /// # Errors
    /// [`Error::State`] when it is of another device, or of one with other features.
    pub(crate) fn load(&mut self, state: &VirtioState) -> Result<()> {
        let id = self.model.id();
        let refused = |reason: String| Error::State(format!("virtio device {id}: {reason}"));
        let (offered, accepted) = (self.model.features(), state.guest_features);
        if accepted & !offered != 0 {
            return Err(refused(format!(
                "the guest uses features {accepted:#x}, and only {offered:#x} are offered here"
            )));
        }
        if state.queues.len() > self.queues.len() {
            return Err(refused(format!("{} queues came, and it has {}", state.queues.len(), self.queues.len())));
        }
        if let Some(queue) = state.queues.iter().find(|q| q.num > MAX_QUEUE || !q.align.is_power_of_two()) {
            return Err(refused(format!("a queue of {} entries, aligned to {}", queue.num, queue.align)));
        }
        self.model.load(&state.device).map_err(&refused)?;
        self.host_features_sel = state.host_features_sel;
        self.guest_features_sel = state.guest_features_sel;
        self.guest_page_shift = state.guest_page_shift % u32::BITS;
        self.status = state.status;
        self.isr = state.isr;
        self.queue_sel = state.queue_sel;
        self.guest_features = accepted;
        self.config.iter_mut().zip(&state.config).for_each(|(into, byte)| *into = *byte);
        self.started = state.started;
        self.broken = state.broken;
        for (queue, state) in self.queues.iter_mut().zip(&state.queues) {
            queue.load(state);
        }
        Ok(())
    }
}
