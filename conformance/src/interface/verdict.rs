//! What is said of a name in the schema.

/// What becomes of a capability, a value of a parameter, or a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It does what it does in QEMU, as a test shows: `FILE::FUNCTION` of this repository.
    Works(&'static str),
    /// It can be set and read back, and nothing here reads it.
    Stored(&'static str),
    /// It is refused for a reason, with a text.
    Refused {
        /// Why reference-vmm does not have it.
        why: &'static str,
        /// The error that the client gets.
        text: &'static str,
    },
    /// There is nothing it could do here.
    NotApplicable(&'static str),
}

/// A name of the schema. That of a value of a parameter is `PARAMETER=VALUE`; that of a group of commands ends in `*`.
pub type Row = (&'static str, Verdict);
