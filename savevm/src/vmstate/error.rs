//! What can be wrong with device state.

use qevm_wire::{Blame, CountedString, Fault, QemuVersion};

/// Errors of declared device state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VmStateError {
    /// The sender's version of a section or subsection is newer than the declaration's.
    #[error("'{name}' has version {found}, the newest known is {supported}; the source's QEMU is newer")]
    VersionTooNew {
        /// The VMSD's name.
        name: &'static str,
        /// The version on the wire.
        found: u32,
        /// The newest version the declaration reads.
        supported: u32,
    },
    /// The sender's version of a section or subsection is older than the declaration reads.
    #[error("'{name}' has version {found}, the oldest that can be read is {minimum}; the source's QEMU is too old")]
    VersionTooOld {
        /// The VMSD's name.
        name: &'static str,
        /// The version on the wire.
        found: u32,
        /// The oldest version the declaration reads.
        minimum: u32,
    },
    /// A subsection with the prefix of its parent that the parent does not have.
    #[error("'{parent}' has no subsection '{name}'; the source has a newer QEMU or a feature that is unknown here")]
    UnknownSubsection {
        /// The VMSD whose subsections were being read.
        parent: &'static str,
        /// The name on the wire.
        name: CountedString,
    },
    /// A subsection that was there already.
    #[error("subsection '{name}' comes a second time")]
    RepeatedSubsection {
        /// Its name.
        name: &'static str,
    },
    /// An encoding QEMU reads but never writes, so that it would not survive re-encoding. [`super::load`] accepts it.
    #[error("{what} is {found:#x}, which QEMU reads but never writes")]
    NotCanonical {
        /// What is encoded unusually.
        what: &'static str,
        /// The value found.
        found: u64,
    },
    /// A marker byte (of a list, a pointer) with neither of its two values.
    #[error("{what} is {found:#x}, expected {expected}")]
    BadMarker {
        /// Which marker.
        what: &'static str,
        /// The value found.
        found: u8,
        /// The legal values.
        expected: &'static str,
    },
    /// A field's own length disagrees with the count that another field gives. The caller's fault.
    #[error("field '{field}' has {found} elements where its count says {expected}")]
    LengthMismatch {
        /// The field.
        field: &'static str,
        /// Elements in the value.
        found: u64,
        /// Elements the count says.
        expected: u64,
    },
    /// A conditional field has no value although its condition holds. The caller's fault.
    #[error("field '{field}' must have a value: its condition holds")]
    FieldMissing {
        /// The field.
        field: &'static str,
    },
    /// A conditional field has a value although its condition fails, so that it would be lost. The caller's fault.
    #[error("field '{field}' has a value that would be lost: its condition does not hold")]
    FieldInExcess {
        /// The field.
        field: &'static str,
    },
    /// State that the release in the profile has no place for.
    #[error("'{name}' cannot be sent to QEMU {release}: it exists {exists}")]
    NotInRelease {
        /// The subsection.
        name: &'static str,
        /// The release in the profile.
        release: QemuVersion,
        /// When it exists, e.g. `since 11.0`.
        exists: &'static str,
    },
    /// A hook found state that contradicts itself or this machine.
    #[error("{what} is {found:#x}, expected {expected}")]
    Refused {
        /// What the hook looked at.
        what: &'static str,
        /// The value found.
        found: u64,
        /// What would have been accepted.
        expected: &'static str,
    },
}

impl Blame for VmStateError {
    fn fault(&self) -> Fault {
        match self {
            VmStateError::VersionTooNew { .. }
            | VmStateError::VersionTooOld { .. }
            | VmStateError::UnknownSubsection { .. }
            | VmStateError::NotCanonical { .. }
            | VmStateError::NotInRelease { .. } => Fault::Unsupported,
            VmStateError::Refused { .. } => Fault::Mismatch,
            VmStateError::RepeatedSubsection { .. } | VmStateError::BadMarker { .. } => Fault::Malformed,
            VmStateError::LengthMismatch { .. }
            | VmStateError::FieldMissing { .. }
            | VmStateError::FieldInExcess { .. } => Fault::Misuse,
        }
    }
}
