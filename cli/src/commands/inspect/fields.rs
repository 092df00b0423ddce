//! The fields of device sections: as an indented tree for people, as a flat list for machines.

use crate::progress::Progress;
use qevm_inspect::aside::Aside;
use qevm_inspect::extract::devices::{write_hex, write_value};
use qevm_inspect::failure::printable;
use qevm_inspect::stream::Observer;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::vmdesc::{Node, Value};
use serde_json::json;
use std::io::{self, BufWriter, Write};

/// Bytes of a buffer that are shown to people.
const SHOWN_BYTES: usize = 32;
/// Numbers of an array that are shown to people.
const SHOWN_NUMBERS: usize = 16;

/// Which sections are taken apart.
#[derive(Debug)]
pub(super) enum Choice {
    /// None.
    None,
    /// Those whose name contains one of these texts; all if there is none.
    Named(Vec<String>),
}

/// Writes the chosen sections' fields down as they come, and shows progress.
#[derive(Debug)]
pub(super) struct Gather {
    pub(super) choice: Choice,
    /// Only fields whose path contains this.
    pub(super) filter: Option<String>,
    /// A flat list, and not a tree.
    pub(super) json: bool,
    pub(super) aside: Aside,
    pub(super) failed: Option<io::Error>,
    pub(super) progress: Progress,
}

impl Observer for Gather {
    fn position(&mut self, offset: u64) {
        self.progress.at(offset);
    }

    fn restarted(&mut self) {
        self.failed = self.aside.clear().err();
        self.progress.say("XBZRLE pages or COLO checkpoints found: reading again");
    }

    fn fields(&mut self, header: &SectionHeader, fields: &Node) {
        if self.chooses(header)
            && self.failed.is_none()
            && let Err(error) = self.write(header, fields)
        {
            self.failed = Some(error);
        }
    }

    fn configuration_of(&mut self, header: &SectionHeader, fields: &Node) {
        self.fields(header, fields);
    }
}

impl Gather {
    fn chooses(&self, header: &SectionHeader) -> bool {
        match &self.choice {
            Choice::None => false,
            Choice::Named(names) => {
                let idstr = header.idstr.to_string();
                names.is_empty() || names.iter().any(|name| idstr.contains(name.as_str()))
            }
        }
    }

    fn write(&mut self, header: &SectionHeader, fields: &Node) -> io::Result<()> {
        let filter = self.filter.as_deref();
        let first = self.aside.is_empty();
        let mut out = BufWriter::new(&mut self.aside);
        match self.json {
            true => list(&mut out, header, fields, filter, first)?,
            false => {
                let heading =
                    format!("\n{} instance {}, version {}\n", header.idstr, header.instance_id, header.version_id);
                let mut tree = Tree { out: &mut out, filter, path: String::new(), pending: vec![heading] };
                fields.children().iter().try_for_each(|child| tree.node(child, 1))?;
            }
        }
        out.flush()
    }

    /// Writes what was gathered to `out`.
    pub(super) fn copy(&mut self, out: &mut (impl Write + ?Sized)) -> io::Result<()> {
        self.aside.copy(0, self.aside.len(), out)
    }
}

/// Writes all leaves as elements of a list.
fn list(
    out: &mut impl Write,
    header: &SectionHeader,
    fields: &Node,
    filter: Option<&str>,
    mut first: bool,
) -> io::Result<()> {
    let (idstr, instance_id) = (json!(header.idstr.to_string()), header.instance_id);
    let mut result = Ok(());
    for child in fields.children() {
        child.leaves(&mut |path, leaf| {
            if result.is_err() || filter.is_some_and(|filter| !path.contains(filter)) {
                return;
            }
            let comma = if std::mem::take(&mut first) { "" } else { "," };
            let (path, type_name, offset, size) = (json!(path), json!(leaf.type_name), leaf.offset, leaf.len);
            result = write!(out, "{comma}{{\"idstr\":{idstr},\"instance_id\":{instance_id},\"path\":{path},")
                .and_then(|()| write!(out, "\"type\":{type_name},\"offset\":{offset},\"size\":{size},\"value\":"))
                .and_then(|()| write_value(out, &leaf.value))
                .and_then(|()| out.write_all(b"}"));
        });
    }
    result
}

/// A tree on its way to people.
struct Tree<'t, W> {
    out: &'t mut W,
    filter: Option<&'t str>,
    path: String,
    /// Lines that are written if a field is inside.
    pending: Vec<String>,
}

impl<W: Write> Tree<'_, W> {
    /// Writes a node and what is in it; nothing if no leaf's path contains the filter.
    fn node(&mut self, node: &Node, depth: usize) -> io::Result<()> {
        let before = self.path.len();
        if depth > 1 {
            self.path.push('.');
        }
        self.path.push_str(&node.name);
        let (indent, name) = ("  ".repeat(depth), printable(&node.name));
        match &node.value {
            Value::Struct(_) | Value::Subsection(_) | Value::List(_) => {
                let pending = self.pending.len();
                self.pending
                    .push(format!("{indent}{name}  ({}, {} bytes at {})\n", node.type_name, node.len, node.offset));
                if self.filter.is_none() {
                    self.flush()?;
                }
                node.children().iter().try_for_each(|child| self.node(child, depth + 1))?;
                self.pending.truncate(pending);
            }
            value => {
                if self.filter.is_none_or(|filter| self.path.contains(filter)) {
                    self.flush()?;
                    let value = value_text(value);
                    writeln!(self.out, "{indent}{name} = {value}  ({}, at {})", node.type_name, node.offset)?;
                }
            }
        }
        self.path.truncate(before);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.pending.drain(..).try_for_each(|line| self.out.write_all(line.as_bytes()))
    }
}

fn value_text(value: &Value) -> String {
    match value {
        Value::Scalar(scalar) => scalar.to_string(),
        Value::Scalars(scalars) => {
            let shown: Vec<String> = scalars.iter().take(SHOWN_NUMBERS).map(|scalar| scalar.to_string()).collect();
            let more =
                if scalars.len() > SHOWN_NUMBERS { format!(", … {} in all", scalars.len()) } else { String::new() };
            format!("[{}{more}]", shown.join(", "))
        }
        Value::Buffer(bytes) | Value::Bitmap(bytes) => hex_text(bytes),
        Value::Unused(bytes) => format!("{} unused bytes", bytes.len()),
        Value::Opaque(bytes) => format!("layout unknown: {}", hex_text(bytes)),
        _ => String::new(),
    }
}

fn hex_text(bytes: &[u8]) -> String {
    let more = if bytes.len() > SHOWN_BYTES { format!("… {} bytes in all", bytes.len()) } else { String::new() };
    if bytes.len() > 1 && bytes.iter().all(|byte| *byte == 0) {
        return format!("{} zero bytes", bytes.len());
    }
    let mut shown = Vec::new();
    // Nothing can go wrong in memory.
    let _ = write_hex(&mut shown, &bytes[..bytes.len().min(SHOWN_BYTES)]);
    format!("{}{more}", String::from_utf8_lossy(&shown))
}
