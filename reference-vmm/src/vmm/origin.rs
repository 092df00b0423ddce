//! Whose guest is in the machine's memory when it is made (mode `cpr-transfer`).

use qevm_migration::cpr::Predecessor;

/// What is known of the process that has passed the memory.
#[derive(Debug, Default)]
pub(super) enum Origin {
    /// There is none.
    #[default]
    Nobody,
    /// It waits until this machine listens.
    Waiting(Predecessor),
    /// Its guest is on its way, or will never come. It may go on there, in the same memory.
    HasGoneOn,
}
