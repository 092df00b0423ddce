//! The network learns where the guest is now.

use super::Vmm;
use parking_lot::Mutex;
use qevm_migration::Announcement;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;

/// Who is at it, by the name that the operator has given; a new one of the same name takes the place of the old one.
pub(super) type Announcers = Mutex<BTreeMap<String, Arc<()>>>;

impl Vmm {
    /// Announces the guest, over and over, in a thread of its own (`announce-self`).
    pub fn announce(self: &Arc<Self>, announcement: Announcement, name: &str) {
        let token = Arc::new(());
        let (wanted, weak) = (Arc::downgrade(&token), Arc::downgrade(self));
        self.announcers.lock().insert(name.into(), token);
        let announcing = move || {
            for delay in announcement.delays() {
                thread::sleep(delay);
                let Some(vmm) = weak.upgrade().filter(|_| wanted.strong_count() > 0) else { return };
                vmm.machine.announce();
            }
        };
        // Without, the guest's next frames say the same.
        if let Err(error) = thread::Builder::new().name("announce".into()).spawn(announcing) {
            tracing::warn!("the network is not told where the guest is: {error}");
        }
    }
}
