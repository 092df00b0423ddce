//! Fields and subsections, by the descriptions of both sides.
//!
//! A description tells what was written under the conditions of its guest, so most differences need not be fatal: one
//! side may just have had no reason to write a subsection.

use super::models::Models;
use super::{Expectations, Finding, Outcome, Subject, Summary, cause, versions};
use crate::framing::SectionHeader;
use crate::vmdesc::{DeviceBody, DeviceDescription, FieldDescription, StructDescription};
use std::collections::{HashMap, HashSet};

pub(super) fn compare(stream: &Summary, destination: &Expectations, findings: &mut Vec<Finding>) {
    let (sent, own, sections) = (&stream.values, &destination.values, &stream.sections);
    let (Some(stream), Some(local)) = (&stream.description, &destination.description) else { return };
    let models = Models::of(destination);
    // Of two devices of one name and instance the first counts.
    let by_name: HashMap<_, _> =
        local.devices.iter().rev().map(|device| ((device.name.as_str(), device.instance_id), device)).collect();
    for device in &stream.devices {
        let Some(local) = by_name.get(&(device.name.as_str(), device.instance_id)) else { continue };
        let (name, instance_id) = (&device.name, device.instance_id);
        let numbers = sent.section(name, instance_id).zip(own.section(name, instance_id));
        let pairs = numbers.map(|(sent, own)| sent.pairs(own));
        let older = older_and_read(device, destination, sections);
        let mut comparison = Comparison { device, models: &models, pairs, older, findings };
        match (&device.body, &local.body) {
            (DeviceBody::Struct(found), DeviceBody::Struct(expected)) => comparison.structs(found, expected, ""),
            (found, expected) if found != expected => {
                let text = |body: &DeviceBody| match body {
                    DeviceBody::Struct(s) => format!("fields of '{}'", s.vmsd_name),
                    DeviceBody::OldStyle { size } => format!("{size} bytes without fields"),
                };
                comparison.report("", text(found), text(expected), Outcome::MayFail, None);
            }
            _ => {}
        }
    }
}

/// The section has an older version than the destination's, which that loads: then it has the fields of that version.
fn older_and_read(device: &DeviceDescription, destination: &Expectations, sections: &[SectionHeader]) -> bool {
    let is = |section: &&SectionHeader| {
        section.instance_id == device.instance_id && section.idstr.to_string() == device.name
    };
    let found = sections.iter().find(is);
    let local = destination.sections.iter().flatten().find(is);
    found.zip(local).is_some_and(|(found, local)| {
        found.version_id < local.version_id && versions::older(found, local.version_id, destination) == Outcome::Loads
    })
}

struct Comparison<'a, 'f> {
    device: &'a DeviceDescription,
    models: &'a Models<'a>,
    /// Numbers of the section, in the stream and as the destination has them.
    pairs: Option<HashSet<(i128, i128)>>,
    /// See [`older_and_read`].
    older: bool,
    findings: &'f mut Vec<Finding>,
}

impl Comparison<'_, '_> {
    /// Reports the first field that differs, then what differs in structures and subsections that both have.
    fn structs(&mut self, found: &StructDescription, expected: &StructDescription, path: &str) {
        let (ours, theirs) = (layout(found), layout(expected));
        let same = ours.iter().zip(&theirs).take_while(|(a, b)| a.alike(b)).count();
        if same < ours.len().max(theirs.len()) {
            let text =
                |entries: &[Entry<'_>]| entries.get(same).map_or_else(|| "no more fields".to_owned(), Entry::text);
            let length =
                |s: &StructDescription| s.fields.iter().fold(0u64, |sum, field| sum.saturating_add(field.wire_size()));
            // A destination reads bytes, and no names.
            let (outcome, cause) = match length(found) == length(expected) {
                true => (Outcome::Loads, "all fields together have the same length: releases divide it differently"),
                false if self.older => (Outcome::Loads, "the destination reads the fields of the older version"),
                false => self.shifted(&ours, &theirs, same),
            };
            self.report(path, text(&ours), text(&theirs), outcome, Some(cause));
        }
        for (ours, theirs) in ours.iter().zip(&theirs).take(same) {
            if let ([found], [expected]) = (ours.field.nested.as_slice(), theirs.field.nested.as_slice()) {
                self.structs(found, expected, &join(path, &ours.field.name));
            }
        }
        let by_name: HashMap<_, _> = expected.subsections.iter().rev().map(|s| (s.vmsd_name.as_str(), s)).collect();
        for subsection in &found.subsections {
            let path = join(path, &subsection.vmsd_name);
            match by_name.get(subsection.vmsd_name.as_str()).copied() {
                Some(local) if subsection.version > local.version => {
                    let text = |s: &StructDescription| format!("version {}", s.version);
                    self.report(&path, text(subsection), text(local), Outcome::Fails, None);
                }
                Some(local) => self.structs(subsection, local, &path),
                None => self.unwritten(subsection, &path),
            }
        }
    }

    /// The fields of the two sides take different numbers of bytes, and are no longer alike from number `same` on.
    fn shifted(&self, ours: &[Entry<'_>], theirs: &[Entry<'_>], same: usize) -> (Outcome, &'static str) {
        let (our, their) = (ours.get(same), theirs.get(same));
        // An array without elements is not in a description.
        let missing = |entry: &Entry<'_>, others: &[Entry<'_>]| {
            entry.is_array() && others.iter().skip(same).all(|other| other.field.name != entry.field.name)
        };
        match (our, their) {
            (Some(our), Some(their))
                if our.field.type_name == "virtio-gpu" && their.field.type_name == "virtio-gpu" =>
            {
                match self.pairs {
                    Some(_) => {
                        (Outcome::Loads, "resources of the guest are of any length; what must be equal is compared")
                    }
                    None => (Outcome::MayFail, "loads only with the same max_outputs="),
                }
            }
            (Some(our), Some(their)) if our.is_longer_or_shorter(their) => {
                self.length(our, our.length(), their.length())
            }
            (Some(our), Some(their)) if our.is_wider_or_narrower(their) => (
                Outcome::Fails,
                "the field has another width in the destination's release, and the section's version does not tell",
            ),
            (Some(our), _) if missing(our, theirs) => self.length(our, our.length(), 0),
            (_, Some(their)) if missing(their, ours) => self.length(their, 0, their.length()),
            (our, their) => [our, their]
                .into_iter()
                .flatten()
                .find_map(|entry| cause::of_optional_field(&self.device.name, &entry.field.name))
                .map_or((Outcome::MayFail, "a field that only one side writes shifts all after it"), |cause| {
                    (Outcome::Fails, cause)
                }),
        }
    }

    /// An array of which the two sides have different numbers of elements. Either a field of the section says how many
    /// follow, or the configuration does, and then the destination reads as many as it has itself.
    fn length(&self, array: &Entry<'_>, found: u64, expected: u64) -> (Outcome, &'static str) {
        if let Some(cause) = cause::of_configured_length(&self.device.name, &array.field.name) {
            return (Outcome::Fails, cause);
        }
        let counted = self.pairs.as_ref().map(|pairs| pairs.contains(&(found.into(), expected.into())));
        match counted {
            Some(true) => (Outcome::Loads, "the stream says how many elements follow"),
            Some(false) => (
                Outcome::Fails,
                "the configuration says how many there are: give the device the same properties on both sides",
            ),
            None => (Outcome::MayFail, "loads only if the stream says how many elements follow"),
        }
    }

    /// A subsection that the destination did not write itself.
    fn unwritten(&mut self, subsection: &StructDescription, path: &str) {
        let known = match &self.device.body {
            DeviceBody::Struct(_) if self.models.must_write(&subsection.vmsd_name) => Some(false),
            DeviceBody::Struct(body) => self.models.read(&body.vmsd_name, &subsection.vmsd_name),
            DeviceBody::OldStyle { .. } => None,
        };
        let (expected, outcome, cause) = match known {
            Some(true) => ("read, but not written", Outcome::Loads, "the destination had no reason to write it"),
            Some(false) => ("no such subsection", Outcome::Fails, "the source's QEMU or machine type is newer"),
            None => (
                "not written",
                Outcome::MayFail,
                "loads if the destination knows the subsection and just had no reason to write it",
            ),
        };
        self.report(path, "the subsection".into(), expected.into(), outcome, Some(cause));
    }

    fn report(&mut self, path: &str, found: String, expected: String, outcome: Outcome, cause: Option<&'static str>) {
        let (idstr, instance_id) = (self.device.name.clone(), self.device.instance_id);
        let subject = Subject::Fields { idstr, instance_id, path: path.to_owned() };
        self.findings.push(Finding { subject, found, expected, outcome, cause });
    }
}

/// A field, or all entries of one array, which the releases describe in different ways.
struct Entry<'d> {
    field: &'d FieldDescription,
    elements: u64,
}

impl Entry<'_> {
    fn alike(&self, other: &Self) -> bool {
        let (a, b) = (self.field, other.field);
        // Sizes of structures vary with what is inside, and so do those of types with a layout of their own.
        let same_size = a.size == b.size || !a.nested.is_empty() || a.type_name == "virtio";
        a.name == b.name && a.type_name == b.type_name && same_size && self.elements == other.elements
    }

    /// The same field, but for its number of elements or bytes.
    fn is_longer_or_shorter(&self, other: &Self) -> bool {
        let (a, b) = (self.field, other.field);
        let buffer = a.type_name == "buffer" && self.elements == other.elements;
        a.name == b.name && a.type_name == b.type_name && (self.elements != other.elements || buffer)
    }

    /// The same number, but for its width.
    fn is_wider_or_narrower(&self, other: &Self) -> bool {
        let (a, b) = (self.field, other.field);
        let number = |field: &FieldDescription| {
            ["uint", "int"].iter().any(|kind| field.type_name.starts_with(kind)) && field.nested.is_empty()
        };
        a.name == b.name && number(a) && number(b) && self.elements == other.elements && a.size != b.size
    }

    /// It has elements that are counted.
    fn is_array(&self) -> bool {
        self.elements > 1 || self.field.array_len.is_some() || self.field.name.ends_with(']')
    }

    /// How long it is: bytes of a buffer, elements of an array.
    fn length(&self) -> u64 {
        if self.field.type_name == "buffer" { self.field.wire_size() } else { self.elements }
    }

    fn text(&self) -> String {
        let FieldDescription { name, type_name, size, .. } = self.field;
        match self.elements {
            1 => format!("field '{name}' ({type_name}, {size} bytes)"),
            n => format!("field '{name}' ({type_name}, {n} × {size} bytes)"),
        }
    }
}

fn layout(structure: &StructDescription) -> Vec<Entry<'_>> {
    let mut entries: Vec<Entry<'_>> = Vec::new();
    for field in &structure.fields {
        let elements = field.array_len.unwrap_or(1);
        match entries.last_mut() {
            Some(last) if last.field.name == field.name && last.field.type_name == field.type_name => {
                last.elements = last.elements.saturating_add(elements);
            }
            _ => entries.push(Entry { field, elements }),
        }
    }
    entries
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}
