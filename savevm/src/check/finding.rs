//! What a comparison comes to.

use std::fmt;

/// One difference between a stream and its destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What differs.
    pub subject: Subject,
    /// What the stream has.
    pub found: String,
    /// What the destination has.
    pub expected: String,
    /// What loading will come to.
    pub outcome: Outcome,
    /// The usual cause and what to do, where one is known.
    pub cause: Option<&'static str>,
}

/// What a finding is about.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Subject {
    /// The configuration section, or that there is one.
    Configuration,
    /// The machine type.
    MachineType,
    /// The target page size.
    PageSize,
    /// A capability, by its QEMU name.
    Capability(&'static str),
    /// The guest's UUID.
    Uuid,
    /// A RAM block, by its name.
    RamBlock(String),
    /// A section.
    Section {
        /// Its name.
        idstr: String,
        /// Its instance.
        instance_id: u32,
    },
    /// Fields or subsections of a section.
    Fields {
        /// The section's name.
        idstr: String,
        /// The section's instance.
        instance_id: u32,
        /// Path of the structure inside the section; empty for the section itself.
        path: String,
    },
    /// A command, by its name.
    Command(&'static str),
    /// The footers of sections.
    Footers,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Configuration => f.write_str("configuration"),
            Subject::MachineType => f.write_str("machine type"),
            Subject::PageSize => f.write_str("target page size"),
            Subject::Capability(name) => write!(f, "capability {name}"),
            Subject::Uuid => f.write_str("UUID"),
            Subject::RamBlock(name) => write!(f, "RAM block '{name}'"),
            Subject::Section { idstr, instance_id } => write!(f, "section '{idstr}' {instance_id}"),
            Subject::Fields { idstr, instance_id, path } if path.is_empty() => {
                write!(f, "fields of section '{idstr}' {instance_id}")
            }
            Subject::Fields { idstr, instance_id, path } => write!(f, "'{path}' of section '{idstr}' {instance_id}"),
            Subject::Command(name) => write!(f, "command {name}"),
            Subject::Footers => f.write_str("footers of sections"),
        }
    }
}

/// What loading comes to because of a difference. The worst is the greatest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// QEMU accepts it.
    Loads,
    /// It depends on what neither stream nor description tell.
    MayFail,
    /// QEMU refuses the stream.
    Fails,
}

impl Outcome {
    /// The word for it in messages and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Loads => "loads",
            Outcome::MayFail => "may fail",
            Outcome::Fails => "fails",
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { subject, found, expected, outcome, cause } = self;
        write!(f, "{}: {subject}: the stream has {found}, the destination {expected}", outcome.as_str())?;
        cause.map_or(Ok(()), |cause| write!(f, " ({cause})"))
    }
}
