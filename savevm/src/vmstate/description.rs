//! The static schema of a VMSD: what a release's QEMU would write or load, whatever the values are.

/// A VMSD: the schema of a device, structure or subsection.
///
/// Made from a declaration by [`VmState::description`](super::VmState::description), or from the file that QEMU's
/// `-dump-vmstate` writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The VMSD's name.
    pub name: String,
    /// The version it writes.
    pub version: u32,
    /// The oldest version it loads.
    pub minimum_version: u32,
    /// Its fields in the wire's order, including those that only exist under a condition.
    pub fields: Vec<FieldDescription>,
    /// Its subsections in the order they are written.
    pub subsections: Vec<Description>,
}

/// A field of a [`Description`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldDescription {
    /// QEMU's name, without the `[k]` of repeated names.
    pub name: String,
    /// The first version that has the field.
    pub since: u32,
    /// True if a predicate decides whether the field exists.
    pub conditional: bool,
    /// How many elements it has.
    pub count: Count,
    /// What each element is.
    pub element: ElementDescription,
}

/// How many elements a field has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// One value.
    One,
    /// An array of fixed length.
    Fixed(u64),
    /// As another field says.
    Variable,
}

/// One element of a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ElementDescription {
    /// The name of the type as QEMU's descriptions give it, e.g. `uint32`, `struct`, `timer`; `None` where the source
    /// of the schema does not tell (`-dump-vmstate`).
    pub type_name: Option<String>,
    /// What it holds.
    pub layout: Layout,
}

/// What an element holds on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// This number of bytes.
    Bytes(u64),
    /// As many bytes as other fields or the content decide.
    Variable,
    /// The fields of another VMSD, without its version.
    Struct(Description),
    /// Any number of elements with the fields of another VMSD, and their markers.
    List(Description),
}

impl Description {
    /// Bytes of all fields without subsections; `None` if that is not fixed.
    pub fn fixed_size(&self) -> Option<u64> {
        self.fields.iter().try_fold(0u64, |sum, field| sum.checked_add(field.fixed_size()?))
    }
}

impl FieldDescription {
    /// Bytes of all elements of the field; `None` if that is not fixed.
    pub fn fixed_size(&self) -> Option<u64> {
        let count = match self.count {
            Count::One => 1,
            Count::Fixed(n) => n,
            Count::Variable => return None,
        };
        if self.conditional {
            return None;
        }
        self.element.layout.fixed_size()?.checked_mul(count)
    }
}

impl Layout {
    /// Bytes of the element; `None` if that is not fixed.
    pub fn fixed_size(&self) -> Option<u64> {
        match self {
            Layout::Bytes(n) => Some(*n),
            Layout::Struct(nested) if nested.subsections.is_empty() => nested.fixed_size(),
            Layout::Struct(_) | Layout::Variable | Layout::List(_) => None,
        }
    }
}
