//! QEMU's own `-dump-vmstate` as a stand-in for a description.
//!
//! Streams without a description (postcopy, files that were cut off, `suppress-vmdesc=on`) can be read as far as such a
//! schema carries. It differs from a description in what it leaves open:
//!
//! * it lists devices by type, so that only device models are in it: `cpu`, `timer`, `globalstate` and other parts of
//!   the machine are not;
//! * it tells which fields *may* be written and not which were;
//! * it has no types, only sizes, and no sizes for types that vary (`virtio`, `msix`, …);
//! * up to 7.2 it does not tell lengths of arrays, and in no release those of arrays that vary.
//!
//! What is left open is found by search: all ways to read the section that use up its bytes exactly. If there is just
//! one, it is taken; otherwise the section stays opaque, and [`Verdict`] says why. Facts: dumps of QEMU 5.2, 7.2, 10.0
//! and 11.1.

mod parse;
mod read;
mod search;
mod structure;

pub use structure::Verdict;

use super::fields::{Fields, Input};
use super::tree::{Node, Struct, Value};
use crate::Error;
use crate::vmstate;
use qevm_wire::{CountedString, Limits};
use std::collections::BTreeMap;
use structure::StructSchema;

/// The devices of one QEMU binary, from `qemu-system-x86_64 -M TYPE -dump-vmstate FILE`.
///
/// ```
/// use qevm_savevm::vmdesc::{Schema, Verdict};
/// use qevm_wire::{CountedString, Limits};
///
/// let dump = br#"{"vmschkmachine": {"Name": "microvm"}, "ioapic": {"Name": "ioapic", "version_id": 3,
///     "minimum_version_id": 1, "Description": {"name": "ioapic", "version_id": 3, "minimum_version_id": 1, "Fields": [
///         {"field": "id", "version_id": 0, "field_exists": false, "size": 1},
///         {"field": "ioregsel", "version_id": 0, "field_exists": false, "size": 1},
///         {"field": "ioredtbl", "version_id": 0, "field_exists": false, "num": 24, "size": 8}]}}}"#;
/// let limits = Limits::default();
/// let schema = Schema::parse(dump, &limits)?;
/// let idstr = CountedString::new("ioapic").unwrap();
/// let (state, verdict) = schema.decode(&idstr, 3, &[0; 194], 0, &limits)?;
/// assert_eq!((verdict, state.opaque_bytes()), (Verdict::Unique, 0));
/// # Ok::<(), qevm_savevm::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Schema {
    /// The machine type that the dump was made for.
    pub machine: Option<String>,
    /// Different structures of this name: some devices share the name of their VMSD.
    devices: BTreeMap<String, Vec<StructSchema>>,
    /// The dump tells lengths of arrays (QEMU 10.0 and later).
    array_lengths: bool,
}

impl Schema {
    /// Decodes the body of a section of which only name and version are known. `body` must end where the section does.
    ///
    /// The tree always encodes to `body`; unless the verdict is [`Verdict::Unique`] it is one opaque leaf.
    ///
    /// # Errors
    /// [`WireError::LimitExceeded`](qevm_wire::WireError::LimitExceeded) if the section has more than
    /// [`Limits::elements`] fields.
    pub fn decode(
        &self,
        idstr: &CountedString,
        version: u32,
        body: &[u8],
        offset: u64,
        limits: &Limits,
    ) -> Result<(Node, Verdict), Error> {
        let mut input = Input::new(body, offset, limits);
        let mut fields = Fields::new(&mut input);
        let found = self.search(idstr, version, body);
        let vmsd_name = match &found {
            Ok((schema, choices)) => {
                read::structure(&mut fields, schema, version, &mut choices.iter(), &idstr.to_string())?;
                schema.name.clone()
            }
            Err(_) => {
                fields.opaque("data", "buffer", body.len() as u64)?;
                String::new()
            }
        };
        let members = std::mem::take(&mut fields.members);
        let value = Value::Struct(Struct { vmsd_name: vmsd_name.into(), version, members });
        let (name, len) = (idstr.to_string().into(), body.len() as u64);
        let node = Node { name, type_name: "section".into(), offset, len, value };
        Ok((node, found.err().unwrap_or(Verdict::Unique)))
    }

    /// The versions of the section that devices of this name accept; `None` if the schema has no such device.
    pub fn versions(&self, idstr: &CountedString) -> Option<Vec<std::ops::RangeInclusive<u32>>> {
        let devices = self.devices.get(vmsd_name(idstr))?;
        Some(devices.iter().map(|device| device.minimum_version..=device.version).collect())
    }

    /// The schemas of all devices, for [`compare`](crate::vmstate::compare). Where an older QEMU's dump does not tell
    /// lengths of arrays, every field counts as one of variable length.
    pub fn descriptions(&self) -> Vec<vmstate::Description> {
        self.devices.values().flatten().map(|device| device.description(self.array_lengths)).collect()
    }

    /// The one structure, with the choices in it, that uses up `body`.
    fn search(&self, idstr: &CountedString, version: u32, body: &[u8]) -> Result<(&StructSchema, Vec<bool>), Verdict> {
        let candidates = self.devices.get(vmsd_name(idstr)).map(Vec::as_slice).unwrap_or_default();
        let mut verdict = Verdict::NotInSchema;
        let mut found = None;
        for schema in candidates.iter().filter(|s| (s.minimum_version..=s.version).contains(&version)) {
            match search::only_way(schema, version, body, self.array_lengths) {
                Ok(choices) if found.is_none() => found = Some((schema, choices)),
                Ok(_) => return Err(Verdict::Ambiguous),
                Err(other @ (Verdict::Ambiguous | Verdict::TooManyChoices)) => return Err(other),
                Err(other) => verdict = other,
            }
        }
        found.ok_or(verdict)
    }
}

/// A device on a bus has the path of its place before its name.
fn vmsd_name(idstr: &CountedString) -> &str {
    idstr.as_str().and_then(|name| name.rsplit('/').next()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
