//! Whether the guest runs, and why not.
//!
//! ```text
//!  prelaunch ──(cont)──▶ running ◀──(cont)──▶ paused, by stop
//!  running ──(a migration is about to be finished)──▶ finish-migrate ──(the guest is handed over)──▶ postmigrate
//!  finish-migrate ──(it fails, or is cancelled)──▶ running, or what it was
//!  postmigrate ──(cont)──▶ running
//!  inmigrate ──(the guest has arrived)──▶ running, or paused
//!  running ──(the guest stops by itself)──▶ shutdown, internal-error
//!  any but running, finish-migrate, inmigrate ──(reset)──▶ prelaunch
//! ```

/// Whether the guest runs, and why not. The names are QEMU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RunState {
    /// It was not started yet.
    Prelaunch,
    /// It waits for an incoming migration.
    Inmigrate,
    /// It runs.
    Running,
    /// It was stopped on request.
    Paused,
    /// It was stopped by a migration that is about to be finished.
    FinishMigrate,
    /// It has gone elsewhere.
    Postmigrate,
    /// It has stopped by itself.
    Shutdown,
    /// A vCPU cannot go on.
    InternalError,
}

impl RunState {
    /// QEMU's name.
    pub fn as_str(self) -> &'static str {
        match self {
            RunState::Prelaunch => "prelaunch",
            RunState::Inmigrate => "inmigrate",
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::FinishMigrate => "finish-migrate",
            RunState::Postmigrate => "postmigrate",
            RunState::Shutdown => "shutdown",
            RunState::InternalError => "internal-error",
        }
    }
}
