//! What a dump says of a structure, and how well that explained a section.

use crate::vmstate;

/// How well a schema explained a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// There is one way to read the section, and the fields are from it.
    Unique,
    /// No device of the schema has this name, or none accepts the section's version.
    NotInSchema,
    /// The schema allows no way to read the section.
    Contradiction,
    /// The schema allows more than one way.
    Ambiguous,
    /// There are too many ways to try them all.
    TooManyChoices,
}

impl Verdict {
    /// What is to be said about the section, in a few words.
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Unique => "the schema explains it",
            Verdict::NotInSchema => "not in the schema",
            Verdict::Contradiction => "not as the schema says",
            Verdict::Ambiguous => "the schema allows more than one reading",
            Verdict::TooManyChoices => "the schema leaves too much open",
        }
    }
}

/// A structure that may be written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct StructSchema {
    pub(super) name: String,
    pub(super) version: u32,
    pub(super) minimum_version: u32,
    pub(super) fields: Vec<FieldSchema>,
    pub(super) subsections: Vec<StructSchema>,
}

/// A field that may be written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct FieldSchema {
    pub(super) name: String,
    /// Version of the structure from which on it is written.
    pub(super) version: u32,
    /// It depends on a condition that the schema does not tell.
    pub(super) conditional: bool,
    /// Elements, where the schema tells them.
    pub(super) count: Option<u64>,
    /// Bytes in memory, which for numbers are those on the wire; 0 if they vary.
    pub(super) size: u64,
    pub(super) nested: Option<Box<StructSchema>>,
}

impl StructSchema {
    pub(super) fn description(&self, array_lengths: bool) -> vmstate::Description {
        let element = |field: &FieldSchema| {
            let layout = match &field.nested {
                Some(nested) => vmstate::Layout::Struct(nested.description(array_lengths)),
                None if field.size == 0 => vmstate::Layout::Variable,
                None => vmstate::Layout::Bytes(field.size),
            };
            vmstate::ElementDescription { type_name: None, layout }
        };
        let field = |field: &FieldSchema| vmstate::FieldDescription {
            name: field.name.clone(),
            since: field.version,
            conditional: field.conditional,
            count: match field.count {
                Some(n) => vmstate::Count::Fixed(n),
                None if array_lengths => vmstate::Count::One,
                None => vmstate::Count::Variable,
            },
            element: element(field),
        };
        vmstate::Description {
            name: self.name.clone(),
            version: self.version,
            minimum_version: self.minimum_version,
            fields: self.fields.iter().map(field).collect(),
            subsections: self.subsections.iter().map(|s| s.description(array_lengths)).collect(),
        }
    }
}
