//! What cannot be written again.

use crate::failure::{Error, Failure};

pub(super) fn unsupported(file: &str, offset: u64, path: &str, message: &str) -> Error {
    let path = if path.is_empty() { String::new() } else { format!("section '{path}'") };
    let (file, message) = (file.to_owned(), message.to_owned());
    Failure { file, kind: "unsupported", offset, path, message }.into()
}

/// Mistakes of this module, not of a peer: what it writes does not fit the format.
pub(super) fn cannot_write(error: qevm_savevm::Error) -> Error {
    Failure::located("output", error).into()
}
