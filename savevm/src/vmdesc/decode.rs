//! Device sections decoded with their description.

use super::context::Context;
use super::fields::{Fields, Input};
use super::tree::{Name, Node, Struct, Value};
use super::value::NULL_POINTER;
use super::{DeviceBody, DeviceDescription, FieldDescription, ScalarKind, StructDescription, VmdescError};
use super::{composite, slirp};
use crate::Error;
use qevm_wire::{Limits, Located, Within};

impl DeviceDescription {
    /// Decodes the section's body: all bytes between the section header and its footer, the first of which is at
    /// stream offset `offset`.
    ///
    /// # Errors
    /// [`VmdescError`] where the bytes contradict the description, with the path of fields;
    /// [`WireError::Truncated`](qevm_wire::WireError::Truncated) if the body is too short for it;
    /// [`WireError::LimitExceeded`](qevm_wire::WireError::LimitExceeded) if the section has more than
    /// [`Limits::elements`] fields, if they take more memory than [`Limits::fields`] allows, or if far more of them
    /// have no bytes than it has bytes.
    ///
    /// An array whose elements have no bytes is one node, a list without elements.
    ///
    /// ```
    /// use qevm_savevm::vmdesc::Description;
    /// use qevm_wire::Limits;
    ///
    /// let json = br#"{"devices": [{"name": "i8259", "instance_id": 0, "vmsd_name": "i8259", "version": 1,
    ///     "fields": [{"name": "irr", "type": "uint8", "size": 1}],
    ///     "subsections": [{"vmsd_name": "i8259/ltim", "version": 1, "fields": [{"name": "ltim", "type": "uint8", "size": 1}]}]}]}"#;
    /// let limits = Limits::default();
    /// let device = &Description::parse(json, &limits)?.devices[0];
    /// let body = b"\x04\x05\x0ai8259/ltim\0\0\0\x01\x07";
    /// let state = device.decode(body, 100, &limits)?;
    /// let ltim = state.find("i8259/ltim.ltim").unwrap();
    /// assert_eq!((ltim.offset, ltim.scalar().unwrap().as_u64()), (117, 7));
    /// let mut bytes = Vec::new();
    /// state.encode(&mut bytes).unwrap();
    /// assert_eq!(bytes, body);
    /// # Ok::<(), qevm_savevm::Error>(())
    /// ```
    pub fn decode(&self, body: &[u8], offset: u64, limits: &Limits) -> Result<Node, Error> {
        let (found, expected) = (body.len() as u64, self.wire_size());
        if found != expected {
            return Err(Located::new(VmdescError::SectionSize { found, expected }.into(), offset));
        }
        let mut input = Input::new(body, offset, limits);
        let mut fields = Fields::new(&mut input);
        let name = self.name.clone();
        let value = match &self.body {
            DeviceBody::Struct(description) => {
                let context = Context { idstr: &self.name, device: &description.vmsd_name };
                structure(&mut fields, description, &context)?;
                let members = std::mem::take(&mut fields.members);
                let vmsd_name = description.vmsd_name.clone().into();
                Value::Struct(Struct { vmsd_name, version: description.version, members })
            }
            DeviceBody::OldStyle { .. } => {
                slirp::section(&mut fields, &name, found)?;
                let members = std::mem::take(&mut fields.members);
                Value::Struct(Struct { vmsd_name: name.clone().into(), version: 0, members })
            }
        };
        Ok(Node { name: name.into(), type_name: "section".into(), offset, len: found, value })
    }
}

/// Reads the fields and subsections of a structure.
fn structure(fields: &mut Fields<'_, '_>, description: &StructDescription, context: &Context<'_>) -> Result<(), Error> {
    let mut names = ElementNames::default();
    for (position, field) in description.fields.iter().enumerate() {
        let next = description.fields.get(position + 1);
        let name = names.name(field, next);
        elements(fields, field, name, context)?;
    }
    for subsection in &description.subsections {
        fields
            .subsection(&subsection.vmsd_name, subsection.version, |fields| structure(fields, subsection, context))?;
    }
    Ok(())
}

/// Reads all elements of a field.
fn elements(
    fields: &mut Fields<'_, '_>,
    field: &FieldDescription,
    name: String,
    context: &Context<'_>,
) -> Result<(), Error> {
    let Some(count) = field.array_len else {
        return element(fields, field, name, context);
    };
    if field.size == 0 && field.nested.iter().all(StructDescription::is_empty) {
        // No element says anything, however many there are.
        let type_name = field.type_name.clone();
        return fields.leaf(name, type_name, 0, |_| Value::List(Vec::new())).map(drop);
    }
    match ScalarKind::of_type(&field.type_name) {
        Some(kind) if field.size == kind.width() as u64 => fields.scalars(name, field.type_name.clone(), kind, count),
        _ => (0..count).try_for_each(|index| element(fields, field, format!("{name}[{index}]"), context)),
    }
}

/// Reads one element of a field.
fn element(
    fields: &mut Fields<'_, '_>,
    field: &FieldDescription,
    name: String,
    context: &Context<'_>,
) -> Result<(), Error> {
    let (size, type_name) = (field.size, || Name::from(field.type_name.clone()));
    if size == 0 {
        fields.input.count_empty(1)?;
    }
    // Up to 7.2, an entry for a NULL pointer looks like that of an element, but for its size.
    let null = size == 1 && fields.input.reader.peek() == Some(NULL_POINTER);
    match (field.type_name.as_str(), field.nested.as_slice()) {
        ("struct", nested) if null && nested.iter().all(StructDescription::is_empty) => {
            fields.scalar(name, type_name(), ScalarKind::PointerMarker).map(drop)
        }
        ("qtailq" | "qlist", nested) => {
            sized(fields, field, |fields| fields.list(name, type_name(), |fields| list(fields, nested, context)))
        }
        ("gtree", nested) => {
            sized(fields, field, |fields| fields.list(name, type_name(), |fields| tree(fields, nested, context)))
        }
        (_, [nested]) => sized(fields, field, |fields| {
            fields.structure(name, type_name(), nested.vmsd_name.clone(), nested.version, |fields| {
                structure(fields, nested, context)
            })
        }),
        (known, _) => match ScalarKind::of_type(known) {
            Some(kind) if size == kind.width() as u64 => fields.scalar(name, type_name(), kind).map(drop),
            Some(_) if null => fields.scalar(name, type_name(), ScalarKind::PointerMarker).map(drop),
            _ => composite::field(fields, &name, known, size, context),
        },
    }
}

/// Reads what must take as many bytes as the description says.
fn sized<'a>(
    fields: &mut Fields<'_, 'a>,
    field: &FieldDescription,
    content: impl FnOnce(&mut Fields<'_, 'a>) -> Result<(), Error>,
) -> Result<(), Error> {
    let start = fields.offset();
    content(fields)?;
    let found = fields.offset() - start;
    if found != field.size {
        let vmsd_name = field.nested.first().map_or_else(String::new, |n| n.vmsd_name.clone());
        let kind = VmdescError::StructSize { vmsd_name, content: found, declared: field.size };
        return Err(Located::new(kind.into(), start)).within(|| field.name.escape_debug().to_string());
    }
    Ok(())
}

/// Reads a list: the description repeats the element's structure for each element.
fn list(fields: &mut Fields<'_, '_>, nested: &[StructDescription], context: &Context<'_>) -> Result<(), Error> {
    for (index, description) in (0..).zip(nested) {
        if !fields.element_marker(index)? {
            let kind = VmdescError::List { what: "number of elements", found: index, expected: nested.len() as u64 };
            return Err(fields.input.reader.fail(kind));
        }
        fields.structure(
            format!("[{index}]"),
            "struct",
            description.vmsd_name.clone(),
            description.version,
            |fields| structure(fields, description, context),
        )?;
    }
    end_of_list(fields, nested.len() as u64)
}

/// Reads a tree: a count, then for each node a marker, its key (64 bits, or a structure of its own) and its value.
fn tree(fields: &mut Fields<'_, '_>, nested: &[StructDescription], context: &Context<'_>) -> Result<(), Error> {
    let offset = fields.offset();
    let count = u64::from(fields.u32("count")?);
    let structs = nested.len() as u64;
    let keyed = structs == 2 * count;
    if !keyed && structs != count {
        let kind = VmdescError::List { what: "number of tree nodes", found: count, expected: structs };
        return Err(Located::new(kind.into(), offset));
    }
    for (index, descriptions) in (0..count).zip(nested.chunks(if keyed { 2 } else { 1 })) {
        if !fields.element_marker(index)? {
            let kind = VmdescError::List { what: "number of elements", found: index, expected: count };
            return Err(fields.input.reader.fail(kind));
        }
        if !keyed {
            fields.u64(format!("[{index}].key"))?;
        }
        let parts: &[_] = if keyed { &["key", "value"] } else { &["value"] };
        for (part, description) in parts.iter().zip(descriptions) {
            let (vmsd_name, version) = (description.vmsd_name.clone(), description.version);
            fields.structure(format!("[{index}].{part}"), "struct", vmsd_name, version, |fields| {
                structure(fields, description, context)
            })?;
        }
    }
    end_of_list(fields, count)
}

fn end_of_list(fields: &mut Fields<'_, '_>, count: u64) -> Result<(), Error> {
    let offset = fields.offset();
    if fields.element_marker(count)? {
        let kind = VmdescError::List { what: "marker after the last element", found: 1, expected: 0 };
        return Err(Located::new(kind.into(), offset));
    }
    Ok(())
}

/// Gives the entries of one array different names.
///
/// Entries with the same name, one after the other, are the elements of an array. QEMU up to 7.2 numbers all of them,
/// 10.0 all but the last, 11.1 none; from 11.0 a marker can precede each element under the element's name.
#[derive(Default)]
struct ElementNames<'d> {
    current: Option<&'d str>,
    next_index: u64,
    marked: bool,
}

impl<'d> ElementNames<'d> {
    fn name(&mut self, field: &'d FieldDescription, next: Option<&FieldDescription>) -> String {
        let continues = self.current == Some(&field.name);
        let marker = matches!(field.type_name.as_str(), "ptr-marker" | "ptr_marker");
        let in_array = continues || marker || field.index.is_some() || next.is_some_and(|n| n.name == field.name);
        if !in_array {
            self.current = None;
            return field.name.clone();
        }
        if !continues {
            *self = ElementNames { current: Some(&field.name), ..ElementNames::default() };
        }
        // A marker and what it announces are one element.
        let index = match field.index {
            Some(index) => index,
            None if self.marked && !marker => self.next_index.saturating_sub(1),
            None => self.next_index,
        };
        self.next_index = index.saturating_add(1);
        self.marked = marker;
        if marker { format!("{}[{index}].present", field.name) } else { format!("{}[{index}]", field.name) }
    }
}

#[cfg(test)]
mod tests;
