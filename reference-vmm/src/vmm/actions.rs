//! What the monitor does when the guest resets itself or switches itself off: QEMU's `-action` and `set-action`.

/// What a reset does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Reboot {
    /// The guest starts anew.
    #[default]
    Reset,
    /// It counts as switching off.
    Shutdown,
}

/// What switching off does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Shutdown {
    /// The monitor ends.
    #[default]
    Poweroff,
    /// The guest is paused, in run state `shutdown`.
    Pause,
}

/// What the monitor does when the guest stops by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Actions {
    /// On a reset.
    pub reboot: Reboot,
    /// On switching off.
    pub shutdown: Shutdown,
}

/// The events that have an action, and the actions that QEMU 11.1 has for each. No device of this machine reports a
/// panic, and none is a watchdog, so that their actions are taken and never needed.
pub const ACTIONS: [(&str, &[&str]); 4] = [
    ("reboot", &["reset", "shutdown"]),
    ("shutdown", &["poweroff", "pause"]),
    ("panic", &["pause", "shutdown", "exit-failure", "none"]),
    ("watchdog", &["reset", "shutdown", "poweroff", "pause", "debug", "none", "inject-nmi"]),
];

/// An event or action that is not in [`ACTIONS`]. The texts are those of QEMU 11.1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnknownAction {
    /// There is no such event.
    #[error("Invalid parameter '{0}'")]
    Event(String),
    /// The event has no such action.
    #[error("Parameter '{event}' does not accept value '{action}'")]
    Action {
        /// The event.
        event: &'static str,
        /// What it does not have.
        action: String,
    },
}

impl Actions {
    /// The same with another action for one event.
    ///
    /// ```
    /// use reference_vmm::vmm::{Actions, Reboot};
    /// assert_eq!(Actions::default().with("reboot", "shutdown").unwrap().reboot, Reboot::Shutdown);
    /// let error = Actions::default().with("reboot", "pause").unwrap_err();
    /// assert_eq!(error.to_string(), "Parameter 'reboot' does not accept value 'pause'");
    /// ```
    ///
    /// # Errors
    /// [`UnknownAction`].
    pub fn with(mut self, event: &str, action: &str) -> Result<Actions, UnknownAction> {
        let known = ACTIONS.iter().find(|(known, _)| *known == event);
        let &(event, actions) = known.ok_or_else(|| UnknownAction::Event(event.to_owned()))?;
        if !actions.contains(&action) {
            return Err(UnknownAction::Action { event, action: action.to_owned() });
        }
        match (event, action) {
            ("reboot", "reset") => self.reboot = Reboot::Reset,
            ("reboot", _) => self.reboot = Reboot::Shutdown,
            ("shutdown", "poweroff") => self.shutdown = Shutdown::Poweroff,
            ("shutdown", _) => self.shutdown = Shutdown::Pause,
            _ => {}
        }
        Ok(self)
    }
}
