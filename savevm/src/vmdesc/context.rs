//! Whose field is read.

/// What the layout of composite types depends on besides their bytes.
pub(super) struct Context<'d> {
    /// The section's idstr.
    pub(super) idstr: &'d str,
    /// Name of the section's VMSD.
    pub(super) device: &'d str,
}
