//! Layouts of QEMU's device sections, recorded from its own descriptions, for streams that have none.
//!
//! A stream without a description (postcopy, a file that was cut off, `suppress-vmdesc=on`) tells nothing of its device
//! sections but name and version. What other streams of the same QEMU releases described is mostly the same: the
//! [`Catalogue`] keeps it, and [`Catalogue::describe`] looks for the one way in which a section's bytes can be read
//! with it. The result is a description like QEMU's own.
//!
//! A layout varies: conditional fields, lengths of arrays, PCI configuration spaces, optional subsections. Each form
//! that was seen is a [`Layout`] of its own, and forms of inner structures combine freely. A reading must use up the
//! section to its last byte and be the only one; otherwise there is none. Where releases give the same bytes different
//! names, those of the likeliest release are taken.
//!
//! | module | what |
//! |---|---|
//! | `learn` | from descriptions, and from `-dump-vmstate`, to layouts |
//! | `search` | from a section's bytes to its description |
//! | `text` | layouts as a text file, and back |

mod learn;
mod search;
mod text;

use super::{DeviceBody, DeviceDescription};
use qevm_wire::{CountedString, QemuVersion};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;
pub use text::BadCatalogue;

/// Layouts of device sections, from descriptions that QEMU wrote.
///
/// ```
/// use qevm_savevm::vmdesc::{Catalogue, Found};
/// use qevm_wire::{CountedString, Limits, QemuVersion};
///
/// let idstr = CountedString::new("0000:00:01.3/piix4_pm").unwrap();
/// let catalogue = Catalogue::embedded();
/// assert_eq!(catalogue.describe(&idstr, 0, 3, b"not such a section", &[QemuVersion::NEWEST]), Found::NoReading);
///
/// let idstr = CountedString::new("port92").unwrap();
/// let Found::One(device) = catalogue.describe(&idstr, 0, 1, &[2], &[QemuVersion::NEWEST]) else { panic!() };
/// let state = device.decode(&[2], 0, &Limits::default())?;
/// assert_eq!(state.find("outport").unwrap().scalar().unwrap().as_u64(), 2);
/// # Ok::<(), qevm_savevm::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Catalogue {
    /// The releases whose descriptions are in it; the bits of [`Layout::releases`] count from the first.
    releases: Vec<QemuVersion>,
    structures: BTreeMap<String, Structure>,
}

/// What a catalogue makes of a section.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Found {
    /// The one way to read it.
    One(DeviceDescription),
    /// The catalogue has no section of this name and version.
    Unknown,
    /// No layout of this name fits the bytes.
    NoReading,
    /// Several layouts fit the bytes, or too many would have to be tried.
    Ambiguous,
}

/// Everything that goes by one VMSD name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Structure {
    layouts: Vec<Layout>,
    /// Names of the subsections that can be after its fields.
    subsections: BTreeSet<String>,
}

/// One form that a structure was seen in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Layout {
    version: u32,
    /// Where it was seen.
    roles: Roles,
    /// The releases in which it was seen, as bits.
    releases: u8,
    /// It is from a schema: its types are guessed from sizes, and it counts only if nothing that was seen fits.
    inferred: bool,
    fields: Vec<FieldLayout>,
    /// A field that is zero (false) or not zero (true) in this form.
    guard: Option<(String, bool)>,
}

/// Where a structure was seen: as a section, inside a field, as a subsection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Roles {
    section: bool,
    nested: bool,
    subsection: bool,
}

/// A field of a [`Layout`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct FieldLayout {
    name: String,
    type_name: String,
    /// Bytes of one element; `None` if its content tells.
    size: Option<u64>,
    /// How many elements were seen.
    counts: BTreeSet<u64>,
    /// There may be other numbers of elements.
    any_count: bool,
    /// Before each element is a byte that tells whether it is there (QEMU 11.x).
    marked: bool,
    /// An element can be a NULL pointer, one byte.
    nullable: bool,
    /// The structures it can contain.
    nested: BTreeSet<Inner>,
}

/// A structure inside a field.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Inner {
    name: String,
    version: u32,
    /// Which of the structure's layouts.
    layout: usize,
}

impl Catalogue {
    /// The layouts that were recorded when this crate was made: see the head of `layouts.txt`.
    pub fn embedded() -> &'static Catalogue {
        static EMBEDDED: OnceLock<Catalogue> = OnceLock::new();
        // A test reads the file; should it be damaged all the same, sections stay opaque.
        EMBEDDED.get_or_init(|| include_str!("layouts.txt").parse().unwrap_or_default())
    }

    /// Describes a section of which the name, the version and all bytes are known.
    ///
    /// `releases` are the QEMU releases that may have written it, the likeliest first. They decide only where the same
    /// bytes have different names in different releases.
    pub fn describe(
        &self,
        idstr: &CountedString,
        instance_id: u32,
        version: u32,
        body: &[u8],
        releases: &[QemuVersion],
    ) -> Found {
        let found = self.readings(idstr, version, body, |end| end == body.len(), releases);
        match found {
            search::Outcome::One(description) => {
                let name = idstr.to_string();
                Found::One(DeviceDescription { name, instance_id, body: DeviceBody::Struct(description) })
            }
            search::Outcome::Unknown => Found::Unknown,
            search::Outcome::None => Found::NoReading,
            search::Outcome::Several => Found::Ambiguous,
        }
    }

    fn readings(
        &self,
        idstr: &CountedString,
        version: u32,
        body: &[u8],
        accept: impl Fn(usize) -> bool,
        releases: &[QemuVersion],
    ) -> search::Outcome {
        let bit = |release: &QemuVersion| self.releases.iter().position(|r| r == release).map_or(0, |at| 1 << at);
        let preferred: Vec<u8> = releases.iter().map(bit).filter(|bit| *bit != 0).collect();
        search::one(self, vmsd_name(idstr), version, body, &accept, &preferred)
    }
}

/// A device on a bus has the path of its place before its name.
fn vmsd_name(idstr: &CountedString) -> &str {
    idstr.as_str().and_then(|name| name.rsplit('/').next()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
