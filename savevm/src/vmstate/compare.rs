//! What of a source's device state a destination would refuse, without running either.
//!
//! Sources are a stream's description ([`Description::from_stream`]) or the schema of a release; destinations are the
//! schema of a release: declarations ([`VmState::description`](super::VmState::description),
//! `qevm_devices::descriptions`) or QEMU's `-dump-vmstate`
//! ([`Schema::descriptions`](crate::vmdesc::Schema::descriptions)).

use super::{Count, Description, FieldDescription, Layout};
use crate::vmdesc::StructDescription;
use std::collections::BTreeMap;
use std::fmt;

/// What happens to a destination that loads the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// It loads; worth knowing.
    Fine,
    /// It may fail, or load something else than what was meant.
    Suspicious,
    /// It fails.
    Fails,
}

/// A difference between a source's state and what a destination expects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Where: the VMSDs and fields from the section inwards.
    pub path: String,
    /// What differs, with both values.
    pub difference: Difference,
    /// What it does to the destination.
    pub severity: Severity,
}

/// What differs, with both values.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Difference {
    /// The source's version is above the destination's.
    VersionTooNew {
        /// The source's version.
        source: u32,
        /// The destination's version.
        destination: u32,
    },
    /// The source's version is below what the destination reads.
    VersionTooOld {
        /// The source's version.
        source: u32,
        /// The oldest version the destination reads.
        minimum: u32,
    },
    /// The source's version is older, and the destination reads it.
    VersionOlder {
        /// The source's version.
        source: u32,
        /// The destination's version.
        destination: u32,
    },
    /// The versions of a nested structure differ. They are not on the wire.
    NestedVersion {
        /// The source's version.
        source: u32,
        /// The destination's version.
        destination: u32,
    },
    /// The destination reads a field that the source does not write.
    FieldMissing {
        /// The field.
        field: String,
    },
    /// The source writes a field that the destination does not read.
    FieldUnknown {
        /// The field.
        field: String,
    },
    /// The types differ.
    Type {
        /// The source's type.
        source: String,
        /// The destination's type.
        destination: String,
    },
    /// An element takes other numbers of bytes.
    Size {
        /// Bytes at the source.
        source: u64,
        /// Bytes at the destination.
        destination: u64,
    },
    /// Arrays have other lengths.
    Length {
        /// Elements at the source.
        source: u64,
        /// Elements at the destination.
        destination: u64,
    },
    /// The destination does not know the subsection.
    SubsectionUnknown {
        /// The subsection.
        name: String,
    },
    /// The destination has no such VMSD.
    SectionUnknown {
        /// The VMSD.
        name: String,
    },
}

impl Difference {
    /// The usual cause.
    pub fn cause(&self) -> &'static str {
        match self {
            Difference::VersionTooNew { .. } => "the source's QEMU is newer: run a machine type that both have",
            Difference::VersionTooOld { .. } => "the source's QEMU is older than the destination supports",
            Difference::VersionOlder { .. } => "the source's QEMU or machine type is older",
            Difference::NestedVersion { .. } => "the device model changed between the releases",
            Difference::FieldMissing { .. } | Difference::FieldUnknown { .. } => {
                "the device model changed between the releases, or the device has other properties"
            }
            Difference::Type { .. } | Difference::Size { .. } => "the device model changed between the releases",
            Difference::Length { .. } => "the device has other properties, e.g. another number of queues or slots",
            Difference::SubsectionUnknown { .. } => {
                "the source uses a feature that the destination's release does not know"
            }
            Difference::SectionUnknown { .. } => "the destination has no such device",
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Difference::VersionTooNew { source, destination } => {
                write!(f, "version {source}, but the destination has {destination}")
            }
            Difference::VersionTooOld { source, minimum } => {
                write!(f, "version {source}, but the destination reads {minimum} and newer")
            }
            Difference::VersionOlder { source, destination } => {
                write!(f, "version {source}, the destination has {destination}")
            }
            Difference::NestedVersion { source, destination } => {
                write!(f, "nested version {source}, but the destination has {destination}")
            }
            Difference::FieldMissing { field } => write!(f, "field '{field}' is expected and not sent"),
            Difference::FieldUnknown { field } => write!(f, "field '{field}' is sent and not expected"),
            Difference::Type { source, destination } => {
                write!(f, "type {source}, but the destination has {destination}")
            }
            Difference::Size { source, destination } => {
                write!(f, "{source} bytes, but the destination reads {destination}")
            }
            Difference::Length { source, destination } => {
                write!(f, "{source} elements, but the destination has {destination}")
            }
            Difference::SubsectionUnknown { name } => write!(f, "subsection '{name}' is not known"),
            Difference::SectionUnknown { name } => write!(f, "section '{name}' is not known"),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.path, self.difference, self.difference.cause())
    }
}

/// What a source's description stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// State that was sent: what is in it is on the wire.
    Stream,
    /// A schema: its subsections and conditional fields may be sent.
    Schema,
}

/// Compares one VMSD of a source with those of a destination.
///
/// Several VMSDs of a destination may share a name; the one with the least severe findings counts.
///
/// ```
/// use qevm_savevm::vmstate::{Context, VmState, compare::{Severity, Source, compare}};
/// use qevm_wire::QemuVersion;
///
/// /// What release 11.0 added.
/// #[derive(VmState, Debug, Clone, Default)]
/// #[vmstate(name = "toy/mask", version = 1)]
/// struct Mask {
///     mask: u32,
/// }
///
/// #[derive(VmState, Debug, Clone, Default)]
/// #[vmstate(name = "toy", version = 1)]
/// struct Toy {
///     control: u32,
///     #[vmstate(subsection, since_release = "11.0")]
///     mask: Option<Mask>,
/// }
///
/// let of = |release| Toy::description(&Context::new(release, "microvm"));
/// let (old, new) = (of(QemuVersion::new(10, 0)), of(QemuVersion::new(11, 1)));
/// // The newer one may send the subsection, which the older one does not know.
/// let findings = compare(&new, Source::Schema, &[old.clone()]);
/// assert_eq!((findings.len(), findings[0].severity), (1, Severity::Suspicious));
/// assert!(compare(&old, Source::Schema, &[new]).is_empty());
/// ```
pub fn compare(source: &Description, kind: Source, destination: &[Description]) -> Vec<Finding> {
    let candidates = destination.iter().filter(|description| description.name == source.name);
    let best = candidates
        .map(|description| {
            let mut comparison = Comparison { kind, path: vec![source.name.clone()], findings: Vec::new() };
            comparison.versioned(source, description);
            comparison.findings
        })
        .min_by_key(|findings| (findings.iter().map(|f| f.severity).max(), findings.len()));
    best.unwrap_or_else(|| {
        let severity = if kind == Source::Stream { Severity::Fails } else { Severity::Suspicious };
        let difference = Difference::SectionUnknown { name: source.name.clone() };
        vec![Finding { path: source.name.clone(), difference, severity }]
    })
}

struct Comparison {
    kind: Source,
    path: Vec<String>,
    findings: Vec<Finding>,
}

impl Comparison {
    fn find(&mut self, severity: Severity, difference: Difference) {
        self.findings.push(Finding { path: self.path.join(" › "), difference, severity });
    }

    /// A section or subsection: its version is on the wire.
    fn versioned(&mut self, source: &Description, destination: &Description) {
        let (version, newest, minimum) = (source.version, destination.version, destination.minimum_version);
        if version > newest {
            return self.find(Severity::Fails, Difference::VersionTooNew { source: version, destination: newest });
        }
        if version < minimum {
            return self.find(Severity::Fails, Difference::VersionTooOld { source: version, minimum });
        }
        if version < newest {
            self.find(Severity::Fine, Difference::VersionOlder { source: version, destination: newest });
        }
        self.content(source, destination, version);
    }

    /// Fields and subsections. `version` is the one the destination reads by.
    fn content(&mut self, source: &Description, destination: &Description, version: u32) {
        let read = |(_, field): &(String, &FieldDescription)| field.conditional || field.since <= version;
        let written = |(_, field): &(String, &FieldDescription)| field.conditional || field.since <= source.version;
        let names = |fields| if self.kind == Source::Stream { plain_names(fields) } else { json_names(fields) };
        let sent: Vec<_> = names(&source.fields).into_iter().filter(written).collect();
        let expected: Vec<_> = json_names(&destination.fields).into_iter().filter(read).collect();
        let mut next = 0;
        for (name, field) in sent {
            match expected[next..].iter().position(|(other, _)| *other == name) {
                Some(skipped) => {
                    expected[next..next + skipped].iter().for_each(|(_, missing)| self.missing(missing));
                    self.path.push(name);
                    self.field(field, expected[next + skipped].1);
                    self.path.pop();
                    next += skipped + 1;
                }
                None => {
                    let severity = self.certain(field.conditional);
                    self.find(severity, Difference::FieldUnknown { field: name });
                }
            }
        }
        expected[next..].iter().for_each(|(_, missing)| self.missing(missing));
        for subsection in &source.subsections {
            match destination.subsections.iter().find(|other| other.name == subsection.name) {
                Some(other) => {
                    self.path.push(subsection.name.clone());
                    self.versioned(subsection, other);
                    self.path.pop();
                }
                None => {
                    let severity = self.certain(true);
                    self.find(severity, Difference::SubsectionUnknown { name: subsection.name.clone() });
                }
            }
        }
    }

    /// A field that the destination reads, if its condition holds and it has elements at all.
    fn missing(&mut self, field: &FieldDescription) {
        if !field.conditional && field.count != Count::Variable && field.fixed_size() != Some(0) {
            // A dump does not tell arrays of variable length, which may be empty, from single values.
            let told = field.element.type_name.is_some();
            let severity = if told { Severity::Fails } else { Severity::Suspicious };
            self.find(severity, Difference::FieldMissing { field: field.name.clone() });
        }
    }

    fn field(&mut self, source: &FieldDescription, destination: &FieldDescription) {
        if let (Count::Fixed(source), Count::Fixed(destination)) = (source.count, destination.count)
            && source != destination
        {
            self.find(Severity::Fails, Difference::Length { source, destination });
        }
        let types = (&source.element.type_name, &destination.element.type_name);
        match (&source.element.layout, &destination.element.layout) {
            (Layout::Struct(inner), Layout::Struct(other)) | (Layout::List(inner), Layout::List(other)) => {
                if inner.version != other.version {
                    let (source, destination) = (inner.version, other.version);
                    self.find(Severity::Suspicious, Difference::NestedVersion { source, destination });
                }
                self.content(inner, other, other.version);
            }
            (Layout::Bytes(source), Layout::Bytes(destination)) if source != destination => {
                // Where a type is not told, the size is that in memory.
                let told = types.0.is_some() && types.1.is_some();
                let severity = if told { Severity::Fails } else { Severity::Suspicious };
                self.find(severity, Difference::Size { source: *source, destination: *destination });
            }
            _ => {
                if let (Some(source), Some(destination)) = types
                    && source != destination
                {
                    let (source, destination) = (source.clone(), destination.clone());
                    self.find(Severity::Suspicious, Difference::Type { source, destination });
                }
            }
        }
    }

    /// What is in a stream is sent; what is in a schema under a condition may be.
    fn certain(&self, conditional: bool) -> Severity {
        if self.kind == Source::Stream || !conditional { Severity::Fails } else { Severity::Suspicious }
    }
}

fn plain_names(fields: &[FieldDescription]) -> Vec<(String, &FieldDescription)> {
    fields.iter().map(|field| (field.name.clone(), field)).collect()
}

/// The names as descriptions of streams have them: `[k]` tells those apart that several fields have.
fn json_names(fields: &[FieldDescription]) -> Vec<(String, &FieldDescription)> {
    let mut totals: BTreeMap<&str, usize> = BTreeMap::new();
    fields.iter().for_each(|field| *totals.entry(&field.name).or_default() += 1);
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let named = fields.iter().map(|field| {
        let k = seen.entry(&field.name).or_default();
        let name = if totals[&*field.name] > 1 { format!("{}[{k}]", field.name) } else { field.name.clone() };
        *k += 1;
        (name, field)
    });
    named.collect()
}

impl Description {
    /// The schema-like view of what a stream's description tells of one device, structure or subsection.
    ///
    /// Elements of an array that the stream describes one by one become one field.
    pub fn from_stream(structure: &StructDescription) -> Description {
        let mut fields: Vec<FieldDescription> = Vec::new();
        let mut previous_index = None;
        for field in &structure.fields {
            let next = match (fields.last_mut(), field.index, previous_index) {
                (Some(last), index, Some(previous))
                    if last.name == field.name && index.is_none_or(|i| i == previous + 1) =>
                {
                    Some((last, previous + 1))
                }
                _ => None,
            };
            match next {
                Some((last, index)) => {
                    last.count = Count::Fixed(index + 1);
                    previous_index = Some(index);
                }
                None => {
                    fields.push(FieldDescription::from_stream(field));
                    previous_index = Some(field.index.unwrap_or(0)).filter(|_| field.array_len.is_none());
                }
            }
        }
        Description {
            name: structure.vmsd_name.clone(),
            version: structure.version,
            minimum_version: structure.version,
            fields,
            subsections: structure.subsections.iter().map(Description::from_stream).collect(),
        }
    }
}

impl FieldDescription {
    fn from_stream(field: &crate::vmdesc::FieldDescription) -> FieldDescription {
        let layout = match &field.nested[..] {
            [] => Layout::Bytes(field.size),
            [one] if !matches!(&*field.type_name, "qtailq" | "qlist" | "gtree") => {
                Layout::Struct(Description::from_stream(one))
            }
            [first, ..] => Layout::List(Description::from_stream(first)),
        };
        FieldDescription {
            name: field.name.clone(),
            since: 0,
            conditional: false,
            count: field.array_len.map_or(Count::One, Count::Fixed),
            element: super::ElementDescription { type_name: Some(field.type_name.clone()), layout },
        }
    }
}

#[cfg(test)]
mod tests;
