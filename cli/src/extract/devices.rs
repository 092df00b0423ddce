//! Device state as JSON.

use crate::stream::Analysis;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::vmdesc::{Node, Scalar, Value};
use serde_json::{Value as Json, json};

/// The device sections of a stream, in its order.
#[derive(Debug, Default)]
pub struct Devices {
    sections: Vec<Section>,
}

#[derive(Debug)]
struct Section {
    header: SectionHeader,
    offset: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// Nothing is known of it, so far.
    Bytes(Vec<u8>),
    Fields(Node),
}

impl Devices {
    /// The content of a section came.
    pub(super) fn body(&mut self, header: &SectionHeader, offset: u64, body: &[u8]) {
        let content = Content::Bytes(body.to_vec());
        self.sections.push(Section { header: header.clone(), offset, content });
    }

    /// Its fields are known.
    pub(super) fn fields(&mut self, fields: &Node) {
        if let Some(section) = self.sections.iter_mut().find(|section| section.offset == fields.offset) {
            section.content = Content::Fields(fields.clone());
        }
    }

    /// How many sections there are.
    pub fn count(&self) -> usize {
        self.sections.len()
    }

    /// All sections as one object.
    ///
    /// A section has `idstr`, `instance_id`, `version_id`, `offset` (of its content), `size`, and `fields`; or, if nothing
    /// is known of it, `opaque` with its bytes in hexadecimal. A field has `name`, `type`, `offset`, `size` and one of
    /// `value` (see [`leaf_value`]), `opaque` (bytes whose layout is not known) and
    /// `fields` (a structure, subsection or list).
    pub fn to_json(&self, analysis: &Analysis) -> Json {
        json!({
            "machine": analysis.machine(),
            "qemu_profile": crate::stream::writer::describe(analysis),
            "sections": self.sections.iter().map(Section::to_json).collect::<Vec<_>>(),
        })
    }
}

impl Section {
    fn to_json(&self) -> Json {
        let mut object = json!({
            "idstr": self.header.idstr.to_string(),
            "instance_id": self.header.instance_id,
            "version_id": self.header.version_id,
            "offset": self.offset,
        });
        match &self.content {
            Content::Bytes(bytes) => {
                object["size"] = bytes.len().into();
                object["opaque"] = hex(bytes).into();
            }
            Content::Fields(node) => {
                object["size"] = node.len.into();
                object["fields"] = node.children().iter().map(field).collect();
            }
        }
        object
    }
}

fn field(node: &Node) -> Json {
    let mut object = json!({"name": node.name, "type": node.type_name, "offset": node.offset, "size": node.len});
    match &node.value {
        Value::Struct(structure) | Value::Subsection(structure) => {
            if !structure.vmsd_name.is_empty() {
                object["vmsd_name"] = structure.vmsd_name.as_ref().into();
                object["version"] = structure.version.into();
            }
            object["fields"] = node.children().iter().map(field).collect();
        }
        Value::List(elements) => object["fields"] = elements.iter().map(field).collect(),
        Value::Opaque(bytes) => object["opaque"] = hex(bytes).into(),
        value => object["value"] = leaf_value(value),
    }
    object
}

/// The value of a field without fields: a number (a double that is none as its bits, in hexadecimal), a list of numbers,
/// or bytes in hexadecimal.
pub fn leaf_value(value: &Value) -> Json {
    match value {
        Value::Scalar(scalar) => number(*scalar),
        Value::Scalars(scalars) => scalars.iter().map(number).collect(),
        Value::Buffer(bytes) | Value::Bitmap(bytes) | Value::Unused(bytes) | Value::Opaque(bytes) => hex(bytes).into(),
        _ => Json::Null,
    }
}

fn number(scalar: Scalar) -> Json {
    match (i64::try_from(scalar.as_i128()), scalar.as_f64()) {
        (_, Some(float)) if float.is_finite() => json!(float),
        // JSON has no such numbers.
        (_, Some(_)) => format!("{:#018x}", scalar.as_u64()).into(),
        (Ok(signed), None) => signed.into(),
        (Err(_), None) => scalar.as_u64().into(),
    }
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
