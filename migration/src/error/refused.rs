//! Requests that do not fit.

use crate::Status;

/// A request that does not fit the state of the migration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// A migration is under way.
    #[error("There's a migration process in progress")]
    InProgress,
    /// The guest has not come yet.
    #[error("Guest is waiting for an incoming migration")]
    GuestExpected,
    /// The guest has gone elsewhere: what is left here is as old as its departure.
    #[error("Can't migrate the vm that was paused due to previous migration")]
    GuestHasLeft,
    /// The guest is being handed over.
    #[error("Migration is not finalized yet")]
    NotFinalized,
    /// The machine was not started to wait for a guest.
    #[error("'-incoming' was not specified on the command line")]
    NoGuestExpected,
    /// It was said already where the guest comes from.
    #[error("The incoming migration has already been started")]
    IncomingStarted,
    /// `migrate-pause`, outside of postcopy.
    #[error("migrate-pause is currently only supported during postcopy-active or postcopy-recover state")]
    NotInPostcopy,
    /// `migrate` with `resume` without a postcopy that waits for it.
    #[error("Cannot resume if there is no paused migration")]
    NoPausedMigration,
    /// `migrate` with `resume`, where memory that may have been lost on its way is no longer here.
    #[error("Postcopy recovery cannot work when release-ram capability is set")]
    MemoryReleased,
    /// `migrate-recover` without a postcopy that waits for it.
    #[error("Migrate recover can only be run when postcopy is paused.")]
    PostcopyNotPaused,
    /// `migrate-start-postcopy` without the capability.
    #[error("Enable postcopy with migrate_set_capability before the start of migration")]
    PostcopyOff,
    /// `migrate_cancel` when the guest has gone before its memory.
    #[error("Postcopy migration in progress, cannot cancel.")]
    PostcopyInProgress,
    /// `migrate-start-postcopy` without a migration.
    #[error("Postcopy must be started after migration has been started")]
    NotStarted,
    /// Something in the machine forbids it; its reason.
    #[error("{0}")]
    Blocked(String),
    /// `migrate-continue` names a state that the migration is not in.
    #[error("Migration not in expected state: {}", .0.as_str())]
    NotInState(Status),
}
