//! Comparing what was decoded and encoded again with what was read.

use crate::failure::Failure;

/// Compares what was written again with what was read of `file` from byte `at` on.
pub(super) fn compare(written: &[u8], read: &[u8], at: u64, file: &str) -> Result<(), Failure> {
    match first_difference(written, read) {
        None => Ok(()),
        Some((place, message)) => Err(failure(file, at + place, message)),
    }
}

/// The failure of `file` whose content does not encode to the same bytes.
pub(super) fn failure(file: &str, offset: u64, message: String) -> Failure {
    Failure { file: file.to_owned(), kind: "reencode", offset, path: "re-encoding".to_owned(), message }
}

/// Where what was written again differs from what was read, and how.
pub(super) fn first_difference(written: &[u8], read: &[u8]) -> Option<(u64, String)> {
    if written == read {
        return None;
    }
    let same = written.iter().zip(read).take_while(|(a, b)| a == b).count();
    let byte = |bytes: &[u8]| bytes.get(same).map_or("nothing".into(), |byte| format!("{byte:#04x}"));
    Some((same as u64, format!("written again as {}, expected {}", byte(written), byte(read))))
}
