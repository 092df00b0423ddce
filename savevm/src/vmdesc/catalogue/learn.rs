//! From descriptions to layouts.

use super::{Catalogue, FieldLayout, Inner, Layout, Roles, Structure};
use crate::vmdesc::{Description, DeviceBody, FieldDescription, StructDescription};
use crate::vmstate;
use qevm_wire::QemuVersion;
use std::collections::BTreeSet;

/// Types whose content tells how long it is.
const SELF_DELIMITING: [&str; 6] = ["virtio", "virtio-gpu", "scsi-requests", "msix state", "qtailq", "qlist"];

/// Conditions of fields that a description does not tell: structure, the field that decides, the field that depends on
/// it. Facts: the values in streams of QEMU 5.2 to 11.1.
const CONDITIONS: [(&str, &str, &str); 1] = [("ide_drive", "identify_set", "identify_data")];

impl Catalogue {
    /// Adds what a description that `release` wrote shows.
    pub fn learn(&mut self, description: &Description, release: QemuVersion) {
        let releases = self.bit(release);
        for device in &description.devices {
            if let DeviceBody::Struct(structure) = &device.body {
                self.structure(structure, Roles { section: true, ..Roles::default() }, releases);
            }
        }
    }

    /// Adds what the schema of `release` (from `-dump-vmstate`) has beyond descriptions: subsections and devices that
    /// were not seen, and which arrays vary. Only structures whose layout the schema tells to the last byte are added.
    pub fn learn_schema(&mut self, schema: &[vmstate::Description], release: QemuVersion) {
        let releases = self.bit(release);
        let was_seen = |structure: &Structure| structure.layouts.iter().any(|layout| !layout.inferred);
        let seen = self.structures.iter().filter(|(_, structure)| was_seen(structure));
        let seen: BTreeSet<String> = seen.map(|(name, _)| name.clone()).collect();
        for device in schema {
            let roles = Roles { section: true, ..Roles::default() };
            if seen.contains(&device.name) {
                self.extend(device, releases, &seen);
            } else if self.can_infer(device) {
                self.infer(device, roles, releases);
            }
        }
    }

    fn bit(&mut self, release: QemuVersion) -> u8 {
        let at = self.releases.iter().position(|known| *known == release).unwrap_or_else(|| {
            self.releases.push(release);
            self.releases.len() - 1
        });
        1u8.checked_shl(at as u32).unwrap_or_default()
    }

    /// Adds a structure and says which of its layouts it is.
    fn structure(&mut self, structure: &StructDescription, roles: Roles, releases: u8) -> usize {
        let fields = groups(&structure.fields).map(|group| self.field(group, releases)).collect();
        let guard = CONDITIONS.iter().find(|(name, _, _)| *name == structure.vmsd_name).map(|(_, decides, depends)| {
            ((*decides).to_owned(), structure.fields.iter().any(|field| field.name == *depends))
        });
        let layout = Layout { version: structure.version, roles, releases, inferred: false, fields, guard };
        let number = self.add(&structure.vmsd_name, layout);
        for subsection in &structure.subsections {
            let name = subsection.vmsd_name.clone();
            self.structures.entry(structure.vmsd_name.clone()).or_default().subsections.insert(name);
            self.structure(subsection, Roles { subsection: true, ..Roles::default() }, releases);
        }
        number
    }

    /// The layout of an array or a single field.
    fn field(&mut self, group: &[FieldDescription], releases: u8) -> FieldLayout {
        let null = |f: &FieldDescription| {
            f.type_name == "nullptr"
                || (f.size == 1 && !f.nested.is_empty() && f.nested.iter().all(|n| n.wire_size() == 0))
        };
        let (markers, elements): (Vec<_>, Vec<_>) = group.iter().partition(|f| is_marker(f));
        let present: Vec<_> = elements.iter().filter(|f| !null(f)).collect();
        let first = present.first().map_or(&group[0], |first| first);
        let marked = !markers.is_empty();
        let count = match first.array_len {
            Some(count) if group.len() == 1 => count,
            _ if marked => markers.len() as u64,
            _ => group.len() as u64,
        };
        let content_tells = !first.nested.is_empty() || SELF_DELIMITING.contains(&first.type_name.as_str());
        let mut inner = |nested: &StructDescription| {
            let layout = self.structure(nested, Roles { nested: true, ..Roles::default() }, releases);
            Inner { name: nested.vmsd_name.clone(), version: nested.version, layout }
        };
        let nested = present.iter().flat_map(|f| &f.nested).map(&mut inner).collect();
        FieldLayout {
            name: first.name.clone(),
            type_name: first.type_name.clone(),
            size: (!content_tells).then_some(first.size),
            counts: [count].into(),
            any_count: false,
            marked,
            nullable: present.len() < elements.len(),
            nested,
        }
    }

    /// Adds a layout, or to a layout that differs in nothing but lengths of arrays and forms of inner structures.
    fn add(&mut self, name: &str, layout: Layout) -> usize {
        let layouts = &mut self.structures.entry(name.to_owned()).or_default().layouts;
        let number = layouts.iter().position(|known| known.is_alike(&layout)).unwrap_or(layouts.len());
        let Some(known) = layouts.get_mut(number) else {
            layouts.push(layout);
            return number;
        };
        known.releases |= layout.releases;
        known.roles = known.roles.or(layout.roles);
        for (known, field) in known.fields.iter_mut().zip(layout.fields) {
            known.counts.extend(field.counts);
            known.any_count |= known.counts.len() > 1;
            known.nested.extend(field.nested);
            known.nullable |= field.nullable;
        }
        number
    }

    /// Takes from a schema what was not seen of a structure that was.
    fn extend(&mut self, schema: &vmstate::Description, releases: u8, seen: &BTreeSet<String>) {
        if let Some(structure) = self.structures.get_mut(&schema.name) {
            let varies = |name: &str| {
                let field = schema.fields.iter().find(|field| field.name == name);
                field.is_some_and(|f| f.count == vmstate::Count::One)
            };
            for field in structure.layouts.iter_mut().flat_map(|layout| &mut layout.fields) {
                let several = field.counts.iter().any(|count| *count > 1);
                // An array of which the schema tells no length.
                field.any_count |= several && varies(field.name.split('[').next().unwrap_or_default());
            }
        }
        for field in &schema.fields {
            if let vmstate::Layout::Struct(nested) = &field.element.layout {
                self.extend(nested, releases, seen);
            }
        }
        for subsection in &schema.subsections {
            if seen.contains(&subsection.name) {
                self.extend(subsection, releases, seen);
            } else if self.can_infer(subsection) && seen.contains(&schema.name) {
                self.infer(subsection, Roles { subsection: true, ..Roles::default() }, releases);
                let structure = self.structures.entry(schema.name.clone()).or_default();
                structure.subsections.insert(subsection.name.clone());
            }
        }
    }

    fn is_known(&self, schema: &vmstate::Description) -> bool {
        let structure = self.structures.get(&schema.name);
        let same = |l: &Layout| l.version == schema.version && l.roles.nested && !l.inferred;
        structure.is_some_and(|structure| structure.layouts.iter().any(same))
    }

    /// All forms of a structure that fields can contain.
    fn forms(&self, schema: &vmstate::Description) -> BTreeSet<Inner> {
        let layouts = self.structures.get(&schema.name).map(|s| s.layouts.as_slice()).unwrap_or_default();
        let layouts = layouts.iter().enumerate().filter(|(_, l)| l.version == schema.version && l.roles.nested);
        let (name, version) = (&schema.name, schema.version);
        layouts.map(|(layout, _)| Inner { name: name.clone(), version, layout }).collect()
    }

    /// True if the schema tells the layout of all fields that are not known from descriptions.
    fn can_infer(&self, schema: &vmstate::Description) -> bool {
        let element = |layout: &vmstate::Layout| match layout {
            vmstate::Layout::Bytes(_) => true,
            vmstate::Layout::Struct(nested) => self.is_known(nested) || self.can_infer(nested),
            vmstate::Layout::Variable | vmstate::Layout::List(_) => false,
        };
        let field = |field: &vmstate::FieldDescription| {
            field.since <= schema.version
                && !field.conditional
                && field.count != vmstate::Count::Variable
                && element(&field.element.layout)
        };
        schema.fields.iter().all(field) && schema.subsections.iter().all(|s| self.can_infer(s))
    }

    fn infer(&mut self, schema: &vmstate::Description, roles: Roles, releases: u8) {
        let mut fields = Vec::new();
        for field in &schema.fields {
            let count = if let vmstate::Count::Fixed(count) = field.count { count } else { 1 };
            let mut layout = FieldLayout { name: field.name.clone(), counts: [count].into(), ..FieldLayout::default() };
            match &field.element.layout {
                vmstate::Layout::Struct(nested) => {
                    if !self.is_known(nested) {
                        self.infer(nested, Roles { nested: true, ..Roles::default() }, releases);
                    }
                    layout.type_name = "struct".into();
                    layout.nested = self.forms(nested);
                }
                vmstate::Layout::Bytes(size) => {
                    let unsigned = match size {
                        _ if field.name == "unused" => "unused_buffer",
                        1 => "uint8",
                        2 => "uint16",
                        4 => "uint32",
                        8 => "uint64",
                        _ => "buffer",
                    };
                    layout.type_name = unsigned.into();
                    layout.size = Some(*size);
                }
                vmstate::Layout::Variable | vmstate::Layout::List(_) => return,
            }
            fields.push(layout);
        }
        self.add(
            &schema.name,
            Layout { version: schema.version, roles, releases, inferred: true, fields, guard: None },
        );
        for subsection in &schema.subsections {
            self.infer(subsection, Roles { subsection: true, ..Roles::default() }, releases);
            let structure = self.structures.entry(schema.name.clone()).or_default();
            structure.subsections.insert(subsection.name.clone());
        }
    }
}

impl Roles {
    fn or(self, other: Self) -> Self {
        Roles {
            section: self.section || other.section,
            nested: self.nested || other.nested,
            subsection: self.subsection || other.subsection,
        }
    }
}

impl Layout {
    fn is_alike(&self, other: &Self) -> bool {
        let names = |field: &FieldLayout| -> BTreeSet<(String, u32)> {
            field.nested.iter().map(|inner| (inner.name.clone(), inner.version)).collect()
        };
        let same = |(a, b): (&FieldLayout, &FieldLayout)| {
            (&a.name, &a.type_name, a.size, a.marked) == (&b.name, &b.type_name, b.size, b.marked)
                && (names(a) == names(b) || a.nested.is_empty() || b.nested.is_empty())
        };
        (self.version, self.inferred, &self.guard) == (other.version, other.inferred, &other.guard)
            && self.fields.len() == other.fields.len()
            && self.fields.iter().zip(&other.fields).all(same)
    }
}

fn is_marker(field: &FieldDescription) -> bool {
    matches!(field.type_name.as_str(), "ptr-marker" | "ptr_marker")
}

fn is_list(field: &FieldDescription) -> bool {
    matches!(field.type_name.as_str(), "qtailq" | "qlist" | "gtree")
}

/// The entries of each array together: entries of structures or markers of one name that follow each other.
fn groups(fields: &[FieldDescription]) -> impl Iterator<Item = &[FieldDescription]> {
    let element = |f: &FieldDescription| !is_list(f) && (!f.nested.is_empty() || is_marker(f) || f.index.is_some());
    fields.chunk_by(move |a, b| a.name == b.name && (element(a) || is_marker(a)) && (element(b) || a.index.is_some()))
}
