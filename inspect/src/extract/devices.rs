//! Device state as JSON.

use crate::aside::Aside;
use crate::bounds::Spool;
use crate::stream::Analysis;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::vmdesc::{Node, Scalar, Value};
use serde_json::{Value as Json, json};
use std::collections::HashMap;
use std::io::{self, BufWriter, Write};

/// The device sections of a stream, in its order.
#[derive(Debug)]
pub struct Devices {
    sections: Vec<Section>,
    /// Offset of a section's content to its index.
    by_offset: HashMap<u64, usize>,
    /// The fields of sections, as JSON: they take far more room than the sections.
    aside: Aside,
    failed: Option<io::Error>,
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
    /// The fields of this many bytes lie here in what was put aside.
    Fields { size: u64, start: u64, len: u64 },
}

impl Devices {
    /// No section so far. What is put aside comes out of `room`.
    pub fn new(room: Spool) -> Self {
        Devices { sections: Vec::new(), by_offset: HashMap::new(), aside: Aside::new(room), failed: None }
    }

    /// The content of a section came.
    pub(super) fn body(&mut self, header: &SectionHeader, offset: u64, body: &[u8]) {
        let content = Content::Bytes(body.to_vec());
        self.by_offset.insert(offset, self.sections.len());
        self.sections.push(Section { header: header.clone(), offset, content });
    }

    /// Its fields are known.
    pub(super) fn fields(&mut self, fields: &Node) {
        let Some(index) = self.by_offset.get(&fields.offset) else { return };
        let start = self.aside.len();
        let written = {
            let mut out = BufWriter::new(&mut self.aside);
            write_fields(&mut out, fields.children(), 3).and_then(|()| out.flush())
        };
        if let Err(error) = written {
            self.failed.get_or_insert(error);
        }
        self.sections[*index].content = Content::Fields { size: fields.len, start, len: self.aside.len() - start };
    }

    /// The stream is read again.
    pub(super) fn restarted(&mut self) {
        self.sections.clear();
        self.by_offset.clear();
        if let Err(error) = self.aside.clear() {
            self.failed.get_or_insert(error);
        }
    }

    /// How many sections there are.
    pub fn count(&self) -> usize {
        self.sections.len()
    }

    /// Writes all sections as one object, a line for each field.
    ///
    /// A section has `idstr`, `instance_id`, `version_id`, `offset` (of its content), `size`, and `fields`; or, if
    /// nothing is known of it, `opaque` with its bytes in hexadecimal. A field has `name`, `type`, `offset`, `size` and
    /// one of `value` (see [`write_value`]), `opaque` (bytes whose layout is not known) and `fields` (a structure,
    /// subsection or list).
    ///
    /// # Errors
    /// What the operating system says, of `out` or of a temporary file.
    pub fn write(&mut self, analysis: &Analysis, mut out: impl Write) -> io::Result<()> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let (machine, profile) = (json!(analysis.machine()), json!(crate::stream::release_guess::describe(analysis)));
        write!(out, "{{\n  \"machine\": {machine},\n  \"qemu_profile\": {profile},\n  \"sections\": [")?;
        for (number, section) in self.sections.iter().enumerate() {
            let comma = if number > 0 { "," } else { "" };
            let Section { header, offset, content } = section;
            let (idstr, instance_id) = (json!(header.idstr.to_string()), header.instance_id);
            write!(out, "{comma}\n    {{\"idstr\": {idstr}, \"instance_id\": {instance_id}, ")?;
            write!(out, "\"version_id\": {}, \"offset\": {offset}, ", header.version_id)?;
            match content {
                Content::Bytes(bytes) => {
                    write!(out, "\"size\": {}, \"opaque\": \"", bytes.len())?;
                    write_hex(&mut out, bytes)?;
                    out.write_all(b"\"}")?;
                }
                Content::Fields { size, start, len } => {
                    write!(out, "\"size\": {size}, \"fields\": ")?;
                    self.aside.copy(*start, *len, &mut out)?;
                    out.write_all(b"}")?;
                }
            }
        }
        out.write_all(b"\n  ]\n}\n")?;
        out.flush()
    }
}

/// Writes a list of fields whose elements are `depth` levels inside.
fn write_fields(out: &mut impl Write, fields: &[Node], depth: usize) -> io::Result<()> {
    if fields.is_empty() {
        return out.write_all(b"[]");
    }
    for (number, node) in fields.iter().enumerate() {
        let comma = if number > 0 { "," } else { "[" };
        let (name, type_name) = (json!(node.name), json!(node.type_name));
        write!(out, "{comma}\n{:width$}{{\"name\": {name}, \"type\": {type_name}, ", "", width = depth * 2)?;
        write!(out, "\"offset\": {}, \"size\": {}, ", node.offset, node.len)?;
        match &node.value {
            Value::Struct(structure) | Value::Subsection(structure) => {
                if !structure.vmsd_name.is_empty() {
                    let vmsd_name = json!(structure.vmsd_name);
                    write!(out, "\"vmsd_name\": {vmsd_name}, \"version\": {}, ", structure.version)?;
                }
                out.write_all(b"\"fields\": ")?;
                write_fields(out, node.children(), depth + 1)?;
            }
            Value::List(elements) => {
                out.write_all(b"\"fields\": ")?;
                write_fields(out, elements, depth + 1)?;
            }
            Value::Opaque(bytes) => {
                out.write_all(b"\"opaque\": \"")?;
                write_hex(out, bytes)?;
                out.write_all(b"\"")?;
            }
            value => {
                out.write_all(b"\"value\": ")?;
                write_value(out, value)?;
            }
        }
        out.write_all(b"}")?;
    }
    write!(out, "\n{:width$}]", "", width = (depth - 1) * 2)
}

/// Writes the value of a field without fields: a number (a double that is none as its bits, in hexadecimal), a list of
/// numbers, or bytes in hexadecimal.
///
/// # Errors
/// What `out` says.
pub fn write_value(out: &mut (impl Write + ?Sized), value: &Value) -> io::Result<()> {
    match value {
        Value::Scalar(scalar) => write!(out, "{}", number(*scalar)),
        Value::Scalars(scalars) => {
            for (index, scalar) in scalars.iter().enumerate() {
                write!(out, "{}{}", if index > 0 { "," } else { "[" }, number(scalar))?;
            }
            out.write_all(if scalars.is_empty() { b"[]" } else { b"]" })
        }
        Value::Buffer(bytes) | Value::Bitmap(bytes) | Value::Unused(bytes) | Value::Opaque(bytes) => {
            out.write_all(b"\"")?;
            write_hex(out, bytes)?;
            out.write_all(b"\"")
        }
        _ => out.write_all(b"null"),
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

/// Writes bytes as hexadecimal digits.
///
/// # Errors
/// What `out` says.
pub fn write_hex(out: &mut (impl Write + ?Sized), bytes: &[u8]) -> io::Result<()> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for piece in bytes.chunks(512) {
        let mut text = [0; 1024];
        for (byte, digits) in piece.iter().zip(text.chunks_exact_mut(2)) {
            digits.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
        }
        out.write_all(&text[..2 * piece.len()])?;
    }
    Ok(())
}
