//! Migration capabilities, with QEMU's names (QMP reference of QEMU 11.1).

/// Every capability of QEMU 11.1 in the order of `query-migrate-capabilities`, and whether it can be turned on here.
pub const KNOWN: [(&str, bool); 21] = [
    ("xbzrle", false),
    ("rdma-pin-all", false),
    ("auto-converge", false),
    ("events", true),
    ("postcopy-ram", false),
    ("x-colo", false),
    ("release-ram", false),
    ("return-path", true),
    ("pause-before-switchover", true),
    ("multifd", false),
    ("dirty-bitmaps", false),
    ("postcopy-blocktime", false),
    ("late-block-activate", false),
    ("x-ignore-shared", false),
    ("validate-uuid", false),
    ("background-snapshot", false),
    ("zero-copy-send", false),
    ("postcopy-preempt", false),
    ("switchover-ack", true),
    ("dirty-limit", false),
    ("mapped-ram", false),
];

/// The capabilities that are on. All are off at first, as in QEMU.
///
/// ```
/// use reference_vmm::migration::Capabilities;
///
/// let capabilities = Capabilities::default().with([("return-path", true)])?;
/// assert!(capabilities.return_path && !capabilities.events);
/// # Ok::<(), reference_vmm::migration::BadCapability>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Capabilities {
    /// `return-path`: the destination answers, and the source waits for its verdict.
    pub return_path: bool,
    /// `switchover-ack`: the source switches over only when the destination's devices have agreed; needs `return-path`.
    pub switchover_ack: bool,
    /// `pause-before-switchover`: the source waits for `migrate-continue` when the guest has stopped.
    pub pause_before_switchover: bool,
    /// `events`: QMP reports every change of status.
    pub events: bool,
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
    /// One that makes no sense without another.
    #[error("Capability '{capability}' requires capability '{needs}'")]
    Requires {
        /// What was to be on.
        capability: &'static str,
        /// What is off.
        needs: &'static str,
    },
}

impl Capabilities {
    /// These capabilities with changes, which are applied as a whole or not at all.
    ///
    /// # Errors
    /// [`BadCapability`]; turning off what is not supported is no error.
    pub fn with<'a>(self, changes: impl IntoIterator<Item = (&'a str, bool)>) -> Result<Self, BadCapability> {
        let mut changed = self;
        for (name, state) in changes {
            let (name, supported) = KNOWN
                .into_iter()
                .find(|(known, _)| *known == name)
                .ok_or_else(|| BadCapability::Unknown(name.into()))?;
            match changed.slot(name) {
                Some(slot) => *slot = state,
                None if state || supported => return Err(BadCapability::Unsupported(name)),
                None => {}
            }
        }
        if changed.switchover_ack && !changed.return_path {
            return Err(BadCapability::Requires { capability: "switchover-ack", needs: "return-path" });
        }
        Ok(changed)
    }

    /// Every capability of QEMU 11.1 with its state.
    pub fn list(mut self) -> Vec<(&'static str, bool)> {
        KNOWN.into_iter().map(|(name, _)| (name, self.slot(name).is_some_and(|slot| *slot))).collect()
    }

    fn slot(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "return-path" => Some(&mut self.return_path),
            "switchover-ack" => Some(&mut self.switchover_ack),
            "pause-before-switchover" => Some(&mut self.pause_before_switchover),
            "events" => Some(&mut self.events),
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
        assert_eq!(off.with([("events", true), ("multifd", true)]), Err(BadCapability::Unsupported("multifd")));
        assert_eq!(off.with([("no-such", false)]), Err(BadCapability::Unknown("no-such".into())));
        assert_eq!(off.with([("multifd", false)]), Ok(off));
    }

    #[test]
    fn whatever_is_supported_can_be_turned_on_and_is_listed_so() {
        let return_path = Capabilities { return_path: true, ..Capabilities::default() };
        for (name, supported) in KNOWN {
            let on = return_path.with([(name, true)]);
            assert_eq!(on.is_ok(), supported, "{name}");
            if let Ok(on) = on {
                let others = on.list().into_iter().filter(|(other, _)| !["return-path", name].contains(other));
                assert!(others.into_iter().all(|(_, state)| !state), "{name}");
                assert!(on.list().contains(&(name, true)), "{name}");
            }
        }
    }

    #[test]
    fn switchover_ack_needs_a_return_path() {
        let off = Capabilities::default();
        let refused = Err(BadCapability::Requires { capability: "switchover-ack", needs: "return-path" });
        assert_eq!(off.with([("switchover-ack", true)]), refused);
        let on = off.with([("switchover-ack", true), ("return-path", true)]).unwrap();
        assert_eq!(on.with([("return-path", false)]), refused);
    }
}
