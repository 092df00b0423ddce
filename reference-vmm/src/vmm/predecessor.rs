//! The process that a guest comes from whose memory this machine is made of already (mode `cpr-transfer`).

use super::Vmm;
use super::origin::Origin;
use qevm_migration::cpr::Predecessor;
use qevm_migration::{Mode, Parameters};

impl Vmm {
    /// The machine's memory is that of this process's guest. It is kept waiting until the machine
    /// [listens](Self::listen); what comes then has no memory of its own.
    pub fn come_after(&self, predecessor: Predecessor) {
        *self.origin.lock() = Origin::Waiting(predecessor);
    }

    /// The parameters of an incoming migration. Only the source may write to memory that is the source's.
    pub(super) fn settings_of_arrival(&self) -> Parameters {
        let mut parameters = self.outgoing.parameters();
        parameters.mode = match *self.origin.lock() {
            // What `mode` says counts for a source.
            Origin::Nobody => Mode::Normal,
            Origin::Waiting(_) | Origin::HasGoneOn => Mode::CprTransfer,
        };
        parameters
    }

    /// This process listens where it sends the guest to.
    pub(super) fn let_predecessor_go_on(&self) {
        let mut origin = self.origin.lock();
        match std::mem::replace(&mut *origin, Origin::HasGoneOn) {
            Origin::Waiting(predecessor) => drop(predecessor),
            before => *origin = before,
        }
    }
}
