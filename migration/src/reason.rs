//! The system's words for what failed.

use std::io;

/// The system's words without their number, as QEMU gives them.
pub(crate) fn reason(source: &io::Error) -> String {
    let text = source.to_string();
    text.split_once(" (os error").map_or(text.as_str(), |(words, _)| words).into()
}
