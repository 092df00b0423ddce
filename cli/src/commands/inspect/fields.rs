//! The fields of device sections: as an indented tree for people, as a flat list for machines.

use crate::extract::devices::{hex, leaf_value};
use crate::failure::printable;
use crate::progress::Progress;
use crate::stream::Observer;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::vmdesc::{Node, Value};
use serde_json::json;

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

/// Gathers the chosen sections' fields, and shows progress.
#[derive(Debug)]
pub(super) struct Gather {
    pub(super) choice: Choice,
    pub(super) sections: Vec<(SectionHeader, Node)>,
    pub(super) progress: Progress,
}

impl Observer for Gather {
    fn position(&mut self, offset: u64) {
        self.progress.at(offset);
    }

    fn restarted(&mut self) {
        self.sections.clear();
        self.progress.say("XBZRLE pages found: reading again with page contents kept");
    }

    fn fields(&mut self, header: &SectionHeader, fields: &Node) {
        if self.chooses(header) {
            self.sections.push((header.clone(), fields.clone()));
        }
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

    /// The trees as text; only fields whose path contains `filter`.
    pub(super) fn text(&self, filter: Option<&str>) -> String {
        let mut out = String::new();
        for (header, fields) in &self.sections {
            let mut tree = String::new();
            fields.children().iter().for_each(|child| lines(child, 1, &child.name, filter, &mut tree));
            if !tree.is_empty() {
                out += &format!("\n{} instance {}, version {}\n", header.idstr, header.instance_id, header.version_id);
                out += &tree;
            }
        }
        out
    }

    /// All leaves as a list.
    pub(super) fn json(&self, filter: Option<&str>) -> serde_json::Value {
        let mut list = Vec::new();
        for (header, fields) in &self.sections {
            for child in fields.children() {
                child.leaves(&mut |path, leaf| {
                    if filter.is_none_or(|filter| path.contains(filter)) {
                        list.push(json!({
                            "idstr": header.idstr.to_string(),
                            "instance_id": header.instance_id,
                            "path": path,
                            "type": leaf.type_name,
                            "offset": leaf.offset,
                            "size": leaf.len,
                            "value": leaf_value(&leaf.value),
                        }));
                    }
                });
            }
        }
        list.into()
    }
}

/// Appends a node and what is in it; nothing if no leaf's path contains `filter`.
fn lines(node: &Node, depth: usize, path: &str, filter: Option<&str>, out: &mut String) {
    let indent = "  ".repeat(depth);
    let name = printable(&node.name);
    match &node.value {
        Value::Struct(_) | Value::Subsection(_) | Value::List(_) => {
            let mut inside = String::new();
            for child in node.children() {
                lines(child, depth + 1, &format!("{path}.{}", child.name), filter, &mut inside);
            }
            if !inside.is_empty() || filter.is_none() {
                *out += &format!("{indent}{name}  ({}, {} bytes at {})\n", node.type_name, node.len, node.offset);
                *out += &inside;
            }
        }
        value => {
            if filter.is_none_or(|filter| path.contains(filter)) {
                *out += &format!("{indent}{name} = {}  ({}, at {})\n", value_text(value), node.type_name, node.offset);
            }
        }
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
    format!("{}{more}", hex(&bytes[..bytes.len().min(SHOWN_BYTES)]))
}
