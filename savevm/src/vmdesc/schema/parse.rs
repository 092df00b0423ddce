//! From the text of a dump to a schema.

use super::super::VmdescError;
use super::super::json::Json;
use super::Schema;
use super::structure::{FieldSchema, StructSchema};
use crate::Error;
use qevm_wire::{Limits, Located, WireError, Within};
use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

/// The entry that is no device.
const MACHINE: &str = "vmschkmachine";

impl Schema {
    /// Parses the text; offsets of errors count from its start.
    ///
    /// # Errors
    /// [`VmdescError::Json`], [`VmdescError::MissingKey`];
    /// [`WireError::LimitExceeded`](qevm_wire::WireError::LimitExceeded) for text longer than [`Limits::schema`] or
    /// deeper nesting than [`Limits::depth`].
    pub fn parse(json: &[u8], limits: &Limits) -> Result<Self, Error> {
        let (found, limit) = (json.len() as u64, limits.schema);
        if found > limit {
            let kind = WireError::LimitExceeded { what: "length of the schema", found, limit };
            return Err(Located::new(kind.into(), 0));
        }
        let mut json = Json::new(json, 0, limits.depth);
        let mut schema = Schema::default();
        let (mut seen, hasher) = (HashSet::new(), RandomState::new());
        json.object(|json, key| {
            let place = format!("device '{}'", key.escape_debug());
            if key == MACHINE {
                json.object(|json, key| match key {
                    "Name" => json.string().map(|name| schema.machine = Some(name)),
                    _ => json.skip(),
                })
            } else {
                let description = device(json, &mut schema.array_lengths).within(|| place)?;
                let same_name = schema.devices.entry(description.name.clone()).or_default();
                // What was not seen need not be looked for among all that were.
                if seen.insert(hasher.hash_one(&description)) || !same_name.contains(&description) {
                    same_name.push(description);
                }
                Ok(())
            }
        })
        .within(|| "schema")?;
        json.end().within(|| "schema")?;
        if schema.devices.is_empty() {
            return Err(missing("schema", "Description", 0));
        }
        Ok(schema)
    }
}

fn device(json: &mut Json<'_>, arrays: &mut bool) -> Result<StructSchema, Error> {
    let start = json.offset();
    let mut description = None;
    json.object(|json, key| match key {
        "Description" => structure(json, arrays).map(|s| description = Some(s)),
        _ => json.skip(),
    })?;
    description.ok_or_else(|| missing("device", "Description", start))
}

fn structure(json: &mut Json<'_>, arrays: &mut bool) -> Result<StructSchema, Error> {
    let start = json.offset();
    let (mut name, mut version) = (None, None);
    let mut structure = StructSchema::default();
    json.object(|json, key| match key {
        "name" => json.string().map(|s| name = Some(s)),
        "version_id" => json.unsigned32("version_id").map(|v| version = Some(v)),
        "minimum_version_id" => json.unsigned32("minimum_version_id").map(|v| structure.minimum_version = v),
        "Fields" => json.array(|json| {
            structure.fields.push(field(json, arrays)?);
            Ok(())
        }),
        "Subsections" => json.array(|json| {
            structure.subsections.push(self::structure(json, arrays)?);
            Ok(())
        }),
        _ => json.skip(),
    })?;
    structure.name = name.ok_or_else(|| missing("structure", "name", start))?;
    structure.version = version.ok_or_else(|| missing("structure", "version_id", start))?;
    Ok(structure)
}

fn field(json: &mut Json<'_>, arrays: &mut bool) -> Result<FieldSchema, Error> {
    let start = json.offset();
    let (mut name, mut size) = (None, None);
    let mut field = FieldSchema::default();
    json.object(|json, key| match key {
        "field" => json.string().map(|s| name = Some(s)),
        "version_id" => json.unsigned32("version_id").map(|v| field.version = v),
        "field_exists" => json.boolean().map(|b| field.conditional = b),
        "num" => json.unsigned().map(|n| field.count = Some(n)),
        "size" => json.unsigned().map(|s| size = Some(s)),
        "Description" => structure(json, arrays).map(|s| field.nested = Some(Box::new(s))),
        _ => json.skip(),
    })?;
    *arrays |= field.count.is_some();
    field.name = name.ok_or_else(|| missing("field", "field", start))?;
    field.size = size.ok_or_else(|| missing("field", "size", start))?;
    Ok(field)
}

fn missing(object: &'static str, key: &'static str, offset: u64) -> Error {
    Located::new(VmdescError::MissingKey { object, key }.into(), offset)
}
