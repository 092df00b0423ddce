//! Sections of s390x machines that a description only gives the length of.

use super::fields::Fields;
use crate::Error;

/// Low bits of the word before a chunk of storage keys: the last one, and keys that follow.
const EOS: u64 = 1;
const KEYS: u64 = 2;
const FLAGS: u64 = 0xfff;

/// The storage keys of a guest (`s390-skeys`): one byte for each page of 4 KiB, none if it never set one.
///
/// Facts: streams of QEMU 11.1 whose guests had set keys, or none.
pub(super) fn storage_keys(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    for chunk in 0.. {
        let word = fields.u64(format!("[{chunk}].word"))?;
        match word & FLAGS {
            EOS if word == EOS => break,
            KEYS => {
                let count = fields.u64(format!("[{chunk}].count"))?;
                fields.buffer(format!("[{chunk}].keys"), count)?;
            }
            _ => return Err(fields.unexpected("word before storage keys", word, EOS)),
        }
    }
    Ok(())
}

/// The clock of the guest (`todclock`).
pub(super) fn clock(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    fields.bool("valid")?;
    fields.u8("epoch")?;
    fields.u64("tod").map(drop)
}
