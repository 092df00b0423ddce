//! Fields and subsections, by the descriptions of both sides.
//!
//! A description tells what was written under the conditions of its guest, so most differences need not be fatal: one
//! side may just have had no reason to write a subsection.

use super::{Expectations, Finding, Outcome, Subject, Summary};
use crate::vmdesc::{DeviceBody, DeviceDescription, FieldDescription, StructDescription};

pub(super) fn compare(stream: &Summary, destination: &Expectations, findings: &mut Vec<Finding>) {
    let (Some(stream), Some(local)) = (&stream.description, &destination.description) else { return };
    for device in &stream.devices {
        let Some(local) = local.device(device.name.as_bytes(), device.instance_id) else { continue };
        let mut comparison = Comparison { device, findings };
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

struct Comparison<'a, 'f> {
    device: &'a DeviceDescription,
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
            let cause =
                Some("a field that only one side writes shifts all behind it, unless its array just has more elements");
            self.report(path, text(&ours), text(&theirs), Outcome::MayFail, cause);
        }
        for (ours, theirs) in ours.iter().zip(&theirs).take(same) {
            if let ([found], [expected]) = (ours.field.nested.as_slice(), theirs.field.nested.as_slice()) {
                self.structs(found, expected, &join(path, &ours.field.name));
            }
        }
        for subsection in &found.subsections {
            let path = join(path, &subsection.vmsd_name);
            match expected.subsections.iter().find(|s| s.vmsd_name == subsection.vmsd_name) {
                Some(local) if subsection.version > local.version => {
                    let text = |s: &StructDescription| format!("version {}", s.version);
                    self.report(&path, text(subsection), text(local), Outcome::Fails, None);
                }
                Some(local) => self.structs(subsection, local, &path),
                None => {
                    let cause =
                        Some("loads if the destination knows the subsection and just had no reason to write it");
                    self.report(&path, "the subsection".into(), "not written".into(), Outcome::MayFail, cause);
                }
            }
        }
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
