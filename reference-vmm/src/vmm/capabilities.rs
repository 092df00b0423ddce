//! Which capabilities a machine can have: what QEMU and its host refuse.

use super::{RunState, Vmm};
use crate::memory::{Userfault, WriteProtection};
use qevm_migration::{BadCapability, Capabilities, GuestError, Parameters, RULES, Refused};
use qevm_multifd::compression::Compression;
use qevm_wire::Capability;
use qevm_wire::capability::{Context, Rejection, check};

/// Refuses parameters that do not go with these capabilities: pages that are compressed or encrypted are not sent in
/// place. A QEMU looks when either is set.
fn zero_copy_goes_with(capabilities: Capabilities, parameters: &Parameters) -> Result<(), BadCapability> {
    if !capabilities.zero_copy_send {
        return Ok(());
    }
    let context = Context {
        compressed: parameters.multifd_compression != Compression::None,
        tls: !parameters.tls_creds.is_empty(),
        ..Context::new(RULES)
    };
    let both = [Capability::ZeroCopySend, Capability::Multifd].into_iter().collect();
    Ok(check(both, &context)?)
}

/// Refuses to set any parameter while capability `mapped-ram` is on and these parameters, which were set before, do not
/// go with it: so do QEMU 10.0 and 11.1, whatever is set, and be it what mends that. The combination itself they refuse
/// at `migrate`.
fn mapped_ram_goes_with(capabilities: Capabilities, before: &Parameters) -> Result<(), BadCapability> {
    let in_places = before.multifd_compression == Compression::None && before.tls_creds.is_empty();
    if !capabilities.mapped_ram || in_places {
        return Ok(());
    }
    let reason = "Mapped-ram only available for non-compressed non-TLS multifd migration";
    Err(Rejection::Setting { capability: Capability::MappedRam, reason }.into())
}

impl Vmm {
    /// Switches capabilities on and off: all of them or, if one is refused, none.
    ///
    /// # Errors
    /// Those that QEMU refuses in this state, too, and those that are not supported here.
    pub fn set_capabilities<'a>(&self, changes: impl IntoIterator<Item = (&'a str, bool)>) -> Result<(), GuestError> {
        if self.outgoing.status().is_running() {
            return Err(Refused::InProgress.into());
        }
        let parameters = self.outgoing.parameters();
        let context = Context {
            // A guest that has arrived may leave as it likes.
            incoming_started: self.listening().is_some() && self.run_state() == RunState::Inmigrate,
            dirty_ring: self.machine.dirty_log().ring_size() > 0,
            ..Context::new(RULES)
        };
        let capabilities = self.outgoing.capabilities().with_in(changes, &context)?;
        if capabilities.mapped_ram && capabilities.postcopy_ram && self.run_state() != RunState::Inmigrate {
            // Together they say how a guest comes. For one that is to leave, QEMU refuses them.
            let both = [Capability::MappedRam, Capability::PostcopyRam].into_iter().collect();
            check(both, &context).map_err(BadCapability::from)?;
        }
        zero_copy_goes_with(capabilities, &parameters)?;
        if let Err(BadCapability::Rejected(rejection)) = capabilities.suit(self.profile().qemu) {
            // The release at the other end refuses them at this moment.
            return Err(BadCapability::from(rejection).into());
        }
        self.check_host(self.outgoing.capabilities(), capabilities)?;
        Ok(self.outgoing.set_capabilities(capabilities)?)
    }

    /// Sets the parameters of the next migration, or of the one under way.
    ///
    /// # Errors
    /// They do not go with the capabilities, in QEMU's words.
    pub fn set_parameters(&self, parameters: Parameters) -> Result<(), BadCapability> {
        zero_copy_goes_with(self.outgoing.capabilities(), &parameters)?;
        mapped_ram_goes_with(self.outgoing.capabilities(), &self.outgoing.parameters())?;
        // A guest that is on its way here has its settings, but for these.
        self.incoming.set_timeouts(parameters.timeouts);
        self.outgoing.set_parameters(parameters);
        Ok(())
    }

    /// Refuses what the host's kernel cannot do with this machine's memory, in the words of QEMU 11.1.
    fn check_host(&self, before: Capabilities, wanted: Capabilities) -> Result<(), Refused> {
        let blocked = |why: String| Err(Refused::Blocked(why));
        let on_disk = || self.machine.memory().blocks().iter().any(|block| block.is_on_disk());
        // At a source it does not look.
        if wanted.postcopy_ram && !before.postcopy_ram && self.run_state() == RunState::Inmigrate {
            if let Err(why) = Userfault::is_available() {
                return blocked(format!("Postcopy is not supported: Userfaultfd not available: {why}"));
            }
            if on_disk() {
                let why = "Postcopy is not supported: Host backend files need to be TMPFS or HUGETLBFS only";
                return blocked(why.into());
            }
        }
        if wanted.background_snapshot && !before.background_snapshot {
            if !WriteProtection::is_available() {
                return blocked("Background-snapshot is not supported by host kernel".into());
            }
            if on_disk() {
                return blocked("Background-snapshot is not compatible with guest memory configuration".into());
            }
        }
        Ok(())
    }
}
