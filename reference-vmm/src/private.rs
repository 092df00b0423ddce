//! Guest memory is for the owner of the process alone. The sockets that lead to it are
//! [`qevm_migration::private`].

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use std::io;

/// Keeps the process's memory out of core dumps, and from other processes of its user.
///
/// # Errors
/// The system's.
pub(crate) fn keep_out_of_dumps() -> io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::dumpable_behavior;

    #[test]
    fn memory_is_kept_out_of_dumps() {
        keep_out_of_dumps().unwrap();
        assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
    }
}
