//! The fields of a section, once the search has found which are there.

use super::super::context::Context;
use super::super::fields::Fields;
use super::super::tree::Value;
use super::super::{ScalarKind, composite};
use super::search::{leaf_len, subsection_at};
use super::structure::{FieldSchema, StructSchema};
use crate::Error;

/// Reads a structure of which `choices` tell the conditional fields, in wire order.
pub(super) fn structure(
    fields: &mut Fields<'_, '_>,
    schema: &StructSchema,
    version: u32,
    choices: &mut std::slice::Iter<'_, bool>,
    idstr: &str,
) -> Result<(), Error> {
    for field in &schema.fields {
        if field.version > version || (field.conditional && choices.next() != Some(&true)) {
            continue;
        }
        match &field.nested {
            None => leaf(fields, field, schema, idstr)?,
            Some(nested) => {
                for index in 0..field.count.unwrap_or(1) {
                    let name = match field.count {
                        None => field.name.clone(),
                        Some(_) => format!("{}[{index}]", field.name),
                    };
                    fields.structure(name, "struct", nested.name.clone(), nested.version, |fields| {
                        structure(fields, nested, nested.version, choices, idstr)
                    })?;
                }
            }
        }
    }
    while let Some((subsection, version, _)) = subsection_at(schema, fields.input.reader.rest()) {
        fields
            .subsection(&subsection.name, version, |fields| structure(fields, subsection, version, choices, idstr))?;
    }
    Ok(())
}

/// Reads a field without structure. Only its size is known: whether a number has a sign is not.
fn leaf(fields: &mut Fields<'_, '_>, field: &FieldSchema, schema: &StructSchema, idstr: &str) -> Result<(), Error> {
    let name = field.name.clone();
    let kind = match field.size {
        1 => ScalarKind::U8,
        2 => ScalarKind::U16,
        4 => ScalarKind::U32,
        8 => ScalarKind::U64,
        size => {
            let (before, whole) = (fields.input.before(), fields.input.body().len());
            let len = leaf_len(field, schema, before, whole).unwrap_or(size);
            let type_name = match (size, field.name.as_str()) {
                (0, "virtio") => "virtio",
                (0, "msix") => "msix state",
                (0, "requests") => "scsi-requests",
                _ => "buffer",
            };
            let context = Context { idstr, device: &schema.name };
            return match field.count {
                None => composite::field(fields, &name, type_name, len, &context),
                Some(count) => (0..count).try_for_each(|index| {
                    composite::field(fields, &format!("{name}[{index}]"), type_name, len, &context)
                }),
            };
        }
    };
    match field.count {
        _ if field.name == "unused" => {
            let len = field.size.saturating_mul(field.count.unwrap_or(1));
            fields.leaf(name, "unused_buffer", len, |b| Value::Unused(b.into())).map(drop)
        }
        None => fields.scalar(name, "number", kind).map(drop),
        Some(count) => fields.scalars(name, "number", kind, count),
    }
}
