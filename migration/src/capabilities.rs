//! Migration capabilities, with QEMU's names (QMP reference of QEMU 11.1).

use qevm_wire::capability::{Context, Rejection, check};
use qevm_wire::{Capability, QemuVersion};

/// Every capability of QEMU 11.1 in the order of `query-migrate-capabilities`, and whether it can be turned on here.
pub const KNOWN: [(&str, bool); 21] = [
    ("xbzrle", true),
    ("rdma-pin-all", false),
    ("auto-converge", true),
    ("events", true),
    ("postcopy-ram", true),
    ("x-colo", false),
    ("release-ram", true),
    ("return-path", true),
    ("pause-before-switchover", true),
    ("multifd", true),
    ("dirty-bitmaps", false),
    ("postcopy-blocktime", true),
    ("late-block-activate", true),
    ("x-ignore-shared", true),
    ("validate-uuid", true),
    ("background-snapshot", true),
    ("zero-copy-send", true),
    ("postcopy-preempt", true),
    ("switchover-ack", true),
    ("dirty-limit", true),
    ("mapped-ram", true),
];

/// The release whose rules on combinations hold here.
pub const RULES: QemuVersion = QemuVersion::new(11, 1);

/// The capabilities that are on. All are off at first, as in QEMU.
///
/// ```
/// use qevm_migration::Capabilities;
///
/// let capabilities = Capabilities::default().with([("return-path", true)])?;
/// assert!(capabilities.return_path && !capabilities.events);
/// # Ok::<(), qevm_migration::BadCapability>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Capabilities {
    /// `auto-converge`: the guest is slowed down when it dirties memory faster than the link carries it.
    pub auto_converge: bool,
    /// `return-path`: the destination answers, and the source waits for its verdict.
    pub return_path: bool,
    /// `switchover-ack`: the source switches over only when the destination's devices have agreed; needs `return-path`.
    pub switchover_ack: bool,
    /// `multifd`: pages travel on `multifd-channels` connections of their own.
    pub multifd: bool,
    /// `pause-before-switchover`: the source waits for `migrate-continue` when the guest has stopped.
    pub pause_before_switchover: bool,
    /// `events`: QMP reports every change of status.
    pub events: bool,
    /// `dirty-limit`: vCPUs that dirty more than `vcpu-dirty-limit` are slowed down, when the guest dirties memory
    /// faster than the link carries it; needs dirty rings.
    pub dirty_limit: bool,
    /// `late-block-activate`: the destination locks the images of its disks when the guest starts, and not when it has
    /// arrived (3.0).
    pub late_block_activate: bool,
    /// `mapped-ram`: pages have fixed places in a file; needs `file:`.
    pub mapped_ram: bool,
    /// `background-snapshot`: the guest runs on while its memory and devices as of one instant are sent (6.0).
    pub background_snapshot: bool,
    /// `postcopy-ram`: the guest may go before its memory, when the operator says so (`migrate-start-postcopy`); with
    /// `mapped-ram`, a guest that comes from a file runs before its memory is loaded (11.2).
    pub postcopy_ram: bool,
    /// `postcopy-preempt`: pages that the guest waits for travel on a connection of their own, past what is on its way
    /// on the main channel (7.1); needs `postcopy-ram`.
    pub postcopy_preempt: bool,
    /// `postcopy-blocktime`: a destination counts how long the guest waits for its memory (3.0).
    pub postcopy_blocktime: bool,
    /// `validate-uuid`: the source says the guest's UUID, and a destination that has another refuses the guest (4.2).
    pub validate_uuid: bool,
    /// `release-ram`: the source of a guest that runs at the destination gives the host back what it has sent (2.9). A
    /// postcopy that breaks cannot be recovered then.
    pub release_ram: bool,
    /// `x-ignore-shared`: RAM that is a file of both ends, which map it shared, is not sent (4.0). See
    /// [`Hooks::shares`](crate::Hooks::shares).
    pub ignore_shared: bool,
    /// `zero-copy-send`: the kernel sends pages out of guest memory itself, and does not copy them before (7.1); needs
    /// `multifd` without compression and TLS, and TCP.
    pub zero_copy_send: bool,
    /// `xbzrle`: pages that were sent before travel as differences (1.2).
    pub xbzrle: bool,
}

/// A capability that cannot be set so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadCapability {
    /// No capability has that name.
    #[error("Parameter 'capability' does not accept value '{0}'")]
    Unknown(String),
    /// One of QEMU's that this monitor does not have.
    #[error("capability '{0}' is not supported here")]
    Unsupported(&'static str),
    /// One that needs answers, over something that has only one direction: a file or a pipe.
    #[error("capability '{0}' needs a transport with both directions, and this one has one")]
    OneWay(&'static str),
    /// A release takes two of them together, and its destination does not get over it.
    #[error(
        "'{}' and '{}' together need QEMU {since} or later at the other end, and this is {qemu}: turn one of them off",
        .capabilities[0],
        .capabilities[1]
    )]
    TooOld {
        /// The capabilities.
        capabilities: [&'static str; 2],
        /// The first release that does.
        since: QemuVersion,
        /// The release.
        qemu: QemuVersion,
    },
    /// QEMU refuses it, too: it does not go with another one, with a parameter or with the state of the machine.
    #[error(transparent)]
    Rejected(#[from] Rejection),
}

impl Capabilities {
    /// These capabilities with changes, which are applied as a whole or not at all.
    ///
    /// # Errors
    /// [`BadCapability`]; turning off what is not supported is no error.
    pub fn with<'a>(self, changes: impl IntoIterator<Item = (&'a str, bool)>) -> Result<Self, BadCapability> {
        self.with_in(changes, &Context::new(RULES))
    }

    /// As [`with`](Capabilities::with), where more than the capabilities decides. `before` of the context is filled in.
    ///
    /// # Errors
    /// [`BadCapability`].
    pub fn with_in<'a>(
        self,
        changes: impl IntoIterator<Item = (&'a str, bool)>,
        context: &Context,
    ) -> Result<Self, BadCapability> {
        let before: qevm_wire::Capabilities = self.on().collect();
        let (mut changed, mut all, mut unsupported) = (self, before, None);
        for (name, state) in changes {
            let unknown = || BadCapability::Unknown(name.into());
            let (name, supported) = KNOWN.into_iter().find(|(known, _)| *known == name).ok_or_else(unknown)?;
            all = all.with(name.parse::<Capability>().map_err(|_| unknown())?, state);
            match changed.slot(name) {
                Some(slot) => *slot = state,
                None if state || supported => unsupported = Some(name),
                None => {}
            }
        }
        let lazy = changed.postcopy_ram && changed.mapped_ram;
        // What QEMU refuses is refused in its words, whether it is supported here or not. Both of these together are
        // what its next release has, and each is checked with the others.
        let checked = if lazy { all.with(Capability::PostcopyRam, false) } else { all };
        check(checked, &Context { before, ..*context })?;
        if lazy {
            check(all.with(Capability::MappedRam, false), &Context { before, multi_channel: true, ..*context })?;
        }
        match unsupported {
            Some(name) => Err(BadCapability::Unsupported(name)),
            None => Ok(changed),
        }
    }

    /// Whether the other end may be of this release: before 10.1 no guest goes before its memory that had page
    /// channels, and 10.0 leaves no RAM out of a mapped-ram file.
    ///
    /// # Errors
    /// [`BadCapability::Rejected`] for what the release refuses itself, in its words; [`BadCapability::TooOld`] for
    /// what it takes and a destination of it does not get over.
    ///
    /// ```
    /// use qevm_migration::Capabilities;
    /// use qevm_wire::QemuVersion;
    ///
    /// let both = Capabilities::default().with([("postcopy-ram", true), ("multifd", true)])?;
    /// assert!(both.suit(QemuVersion::new(11, 1)).is_ok());
    /// let refused = both.suit(QemuVersion::new(10, 0)).unwrap_err();
    /// assert_eq!(refused.to_string(), "Postcopy is not yet compatible with multifd");
    /// # Ok::<(), qevm_migration::BadCapability>(())
    /// ```
    pub fn suit(self, qemu: QemuVersion) -> Result<(), BadCapability> {
        // 10.0 writes no such file, and does not find its way in one.
        if self.mapped_ram && self.ignore_shared && qemu < QemuVersion::new(11, 0) {
            let capabilities = ["mapped-ram", "x-ignore-shared"];
            return Err(BadCapability::TooOld { capabilities, since: QemuVersion::new(11, 0), qemu });
        }
        if !self.postcopy_ram || !self.multifd || self.mapped_ram {
            return Ok(());
        }
        check([Capability::PostcopyRam, Capability::Multifd].into_iter().collect(), &Context::new(qemu))?;
        // 7.2 aborts (`yank_unregister_instance: Assertion ... failed`), 5.2 waits for the page channels after every
        // section.
        match qemu < QemuVersion::new(8, 0) {
            true => {
                let capabilities = ["postcopy-ram", "multifd"];
                Err(BadCapability::TooOld { capabilities, since: QemuVersion::new(10, 1), qemu })
            }
            false => Ok(()),
        }
    }

    /// Every capability of QEMU 11.1 with its state.
    pub fn list(mut self) -> Vec<(&'static str, bool)> {
        KNOWN.into_iter().map(|(name, _)| (name, self.slot(name).is_some_and(|slot| *slot))).collect()
    }

    fn on(self) -> impl Iterator<Item = Capability> {
        self.list().into_iter().filter_map(|(name, state)| name.parse().ok().filter(|_| state))
    }

    fn slot(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "auto-converge" => Some(&mut self.auto_converge),
            "return-path" => Some(&mut self.return_path),
            "switchover-ack" => Some(&mut self.switchover_ack),
            "multifd" => Some(&mut self.multifd),
            "pause-before-switchover" => Some(&mut self.pause_before_switchover),
            "events" => Some(&mut self.events),
            "dirty-limit" => Some(&mut self.dirty_limit),
            "late-block-activate" => Some(&mut self.late_block_activate),
            "mapped-ram" => Some(&mut self.mapped_ram),
            "background-snapshot" => Some(&mut self.background_snapshot),
            "postcopy-ram" => Some(&mut self.postcopy_ram),
            "postcopy-preempt" => Some(&mut self.postcopy_preempt),
            "postcopy-blocktime" => Some(&mut self.postcopy_blocktime),
            "validate-uuid" => Some(&mut self.validate_uuid),
            "release-ram" => Some(&mut self.release_ram),
            "x-ignore-shared" => Some(&mut self.ignore_shared),
            "zero-copy-send" => Some(&mut self.zero_copy_send),
            "xbzrle" => Some(&mut self.xbzrle),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_changes_is_applied_as_a_whole() {
        let off = Capabilities::default();
        assert_eq!(
            off.with([("events", true), ("dirty-bitmaps", true)]),
            Err(BadCapability::Unsupported("dirty-bitmaps"))
        );
        assert_eq!(off.with([("no-such", false)]), Err(BadCapability::Unknown("no-such".into())));
        assert_eq!(off.with([("dirty-bitmaps", false)]), Ok(off));
    }

    #[test]
    fn whatever_is_supported_can_be_turned_on_and_is_listed_so() {
        let off = Capabilities::default();
        for (name, supported) in KNOWN {
            let needed = match name {
                "switchover-ack" => "return-path",
                "postcopy-preempt" => "postcopy-ram",
                "zero-copy-send" => "multifd",
                _ => name,
            };
            let on = off.with([(needed, true), (name, true)]);
            assert_eq!(on.is_ok(), supported, "{name}");
            if let Ok(on) = on {
                let others = on.list().into_iter().filter(|(other, _)| ![needed, name].contains(other));
                assert!(others.into_iter().all(|(_, state)| !state), "{name}");
                assert!(on.list().contains(&(name, true)), "{name}");
            }
        }
    }

    #[test]
    fn switchover_ack_needs_a_return_path() {
        let off = Capabilities::default();
        let refused = |result| matches!(result, Err(BadCapability::Rejected(Rejection::Requires { .. })));
        assert!(refused(off.with([("switchover-ack", true)])));
        let on = off.with([("switchover-ack", true), ("return-path", true)]).unwrap();
        assert!(refused(on.with([("return-path", false)])));
    }

    #[test]
    fn dirty_limit_needs_dirty_rings_and_excludes_auto_converge() {
        let off = Capabilities::default();
        let context = Context { dirty_ring: false, ..Context::new(RULES) };
        let refused = off.with_in([("dirty-limit", true)], &context).unwrap_err();
        assert!(matches!(refused, BadCapability::Rejected(_)), "{refused}");
        let both = off.with([("dirty-limit", true), ("auto-converge", true)]).unwrap_err();
        assert!(matches!(both, BadCapability::Rejected(_)), "{both}");
        let on = off.with([("dirty-limit", true)]).unwrap();
        assert!(matches!(on.with([("auto-converge", true)]), Err(BadCapability::Rejected(_))));
    }

    #[test]
    fn postcopy_ram_goes_with_mapped_ram_and_with_multifd() {
        let off = Capabilities::default();
        let postcopy = off.with([("postcopy-ram", true)]).unwrap();
        let with_channels = postcopy.with([("multifd", true)]).unwrap();
        let refused = postcopy.with([("x-ignore-shared", true)]).unwrap_err();
        assert_eq!(refused.to_string(), "Postcopy is not compatible with ignore-shared");
        let mapped = off.with([("mapped-ram", true)]).unwrap();
        let lazy = mapped.with([("postcopy-ram", true)]).unwrap();
        assert!(lazy.mapped_ram && lazy.postcopy_ram);
        assert_eq!(
            off.with([("postcopy-ram", true), ("mapped-ram", true), ("multifd", true)]).map(|on| on.multifd),
            Ok(true)
        );
        assert_eq!(lazy.with([("mapped-ram", false)]), Ok(postcopy));
        let with_threads = lazy.with([("multifd", true)]).unwrap();
        assert_eq!(with_threads.with([("mapped-ram", false)]), Ok(with_channels));
        assert_eq!(lazy.with([("postcopy-ram", false)]), Ok(mapped));
        // The rules of each hold for both.
        let refused = |on: &str| lazy.with([(on, true)]).unwrap_err().to_string();
        assert_eq!(refused("x-ignore-shared"), "Postcopy is not compatible with ignore-shared");
        assert_eq!(refused("xbzrle"), "Mapped-ram migration is incompatible with xbzrle");
    }

    #[test]
    fn a_release_that_does_not_bear_postcopy_with_page_channels_is_known() {
        let both = Capabilities::default().with([("postcopy-ram", true), ("multifd", true)]).unwrap();
        let suits = |major, minor| both.suit(QemuVersion::new(major, minor)).map_err(|refused| refused.to_string());
        assert_eq!([suits(11, 1), suits(10, 1)], [Ok(()), Ok(())]);
        assert_eq!(suits(10, 0), Err("Postcopy is not yet compatible with multifd".into()));
        for old in [(5, 2), (7, 2)] {
            assert!(suits(old.0, old.1).unwrap_err().contains("need QEMU 10.1 or later at the other end"));
        }
        let file = both.with([("mapped-ram", true)]).unwrap();
        assert_eq!(file.suit(QemuVersion::new(10, 0)), Ok(()));
        let shared = Capabilities::default().with([("mapped-ram", true), ("x-ignore-shared", true)]).unwrap();
        assert_eq!(shared.suit(QemuVersion::new(11, 1)), Ok(()));
        assert!(shared.suit(QemuVersion::new(10, 0)).is_err());
    }

    #[test]
    fn what_qemu_refuses_is_refused_in_its_words() {
        let off = Capabilities::default();
        let both = off.with([("background-snapshot", true), ("events", true), ("return-path", true)]).unwrap_err();
        assert_eq!(both.to_string(), "Background-snapshot is not compatible with return-path");
        let context = Context { incoming_started: true, ..Context::new(RULES) };
        let late = off.with_in([("multifd", true)], &context).unwrap_err();
        assert_eq!(late.to_string(), "Multifd must be set before incoming starts");
    }
}
