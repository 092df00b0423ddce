//! What differs between two guests: configuration, RAM blocks, pages, device sections, fields.

use crate::failure::Failure;
use crate::ram::GuestRam;
use crate::stream::{Analysis, Observer};
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::vmdesc::{Node, Value};
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// `configuration`, `block`, `pages`, `section` or `field`.
    pub kind: &'static str,
    /// Where it is: the name of a block, a section, or the path of a field.
    pub place: String,
    /// What the first guest has there; `None` if it has nothing.
    pub first: Option<String>,
    /// What the second guest has there; `None` if it has nothing.
    pub second: Option<String>,
}

impl Difference {
    /// As an object.
    pub fn to_json(&self) -> Json {
        json!({"kind": self.kind, "place": self.place, "first": self.first, "second": self.second})
    }
}

/// The device sections of one guest, by name and instance.
#[derive(Debug, Default)]
pub struct Devices {
    sections: BTreeMap<(String, u32), Device>,
}

#[derive(Debug)]
struct Device {
    version_id: u32,
    body: Vec<u8>,
    fields: Option<Node>,
}

impl Observer for Devices {
    fn restarted(&mut self) {
        self.sections.clear();
    }

    fn body(&mut self, header: &SectionHeader, _offset: u64, body: &[u8]) {
        let device = Device { version_id: header.version_id, body: body.to_vec(), fields: None };
        self.sections.insert(key(header), device);
    }

    fn fields(&mut self, header: &SectionHeader, fields: &Node) {
        if let Some(device) = self.sections.get_mut(&key(header)) {
            device.fields = Some(fields.clone());
        }
    }
}

/// A guest that was read: what the stream told, and its device sections.
#[derive(Debug)]
pub struct Guest {
    /// What the stream told.
    pub analysis: Analysis,
    /// Its device sections.
    pub devices: Devices,
}

/// Lists the differences between two guests, in the order of a stream.
///
/// # Errors
/// A failure of kind `io` if what is known of pages cannot be read.
pub fn differences(first: &mut Guest, second: &mut Guest) -> Result<Vec<Difference>, Failure> {
    let mut found = Vec::new();
    let machines = (first.analysis.machine(), second.analysis.machine());
    if machines.0 != machines.1 {
        found.push(Difference {
            kind: "configuration",
            place: "machine".into(),
            first: machines.0,
            second: machines.1,
        });
    }
    match (&mut first.analysis.ram, &mut second.analysis.ram) {
        (Some(ours), Some(theirs)) => memory(ours, theirs, &mut found)?,
        (None, None) => {}
        (ours, _) => {
            let (yes, no) = (Some("present".to_owned()), None);
            let (first, second) = if ours.is_some() { (yes, no) } else { (no, yes) };
            found.push(Difference { kind: "section", place: "ram".into(), first, second });
        }
    }
    devices(&first.devices, &second.devices, &mut found);
    Ok(found)
}

fn memory(ours: &mut GuestRam, theirs: &mut GuestRam, found: &mut Vec<Difference>) -> Result<(), Failure> {
    let length = |block: &crate::ram::Block| format!("{:#x} bytes", block.used_length);
    for index in 0..ours.blocks().len() {
        let block = ours.blocks()[index].clone();
        let Some(other) = theirs.blocks().iter().position(|other| other.name == block.name) else {
            let (first, second) = (Some(length(&block)), None);
            found.push(Difference { kind: "block", place: block.name, first, second });
            continue;
        };
        let other_length = theirs.blocks()[other].used_length;
        if other_length != block.used_length {
            let (first, second) = (Some(length(&block)), Some(length(&theirs.blocks()[other])));
            found.push(Difference { kind: "block", place: block.name.clone(), first, second });
        }
        let mut ranges = Ranges::default();
        let page = ours.page_size();
        ours.differences(index, theirs, other, |offset| ranges.add(offset, page))
            .map_err(|error| Failure::io("temporary file", 0, &error))?;
        if ranges.pages > 0 {
            let text = format!("{} pages: {}", ranges.pages, ranges.text());
            found.push(Difference {
                kind: "pages",
                place: block.name,
                first: Some(text),
                second: Some("other contents".into()),
            });
        }
    }
    for block in theirs.blocks() {
        if ours.blocks().iter().all(|other| other.name != block.name) {
            let (first, second) = (None, Some(length(block)));
            found.push(Difference { kind: "block", place: block.name.clone(), first, second });
        }
    }
    Ok(())
}

/// The first ranges of pages that differ, and how many there are.
#[derive(Default)]
struct Ranges {
    ranges: Vec<(u64, u64)>,
    pages: u64,
    more: bool,
}

impl Ranges {
    const SHOWN: usize = 8;

    fn add(&mut self, offset: u64, page: u64) {
        self.pages += 1;
        let room = self.ranges.len() < Self::SHOWN;
        match self.ranges.last_mut() {
            Some((_, end)) if *end == offset && !self.more => *end += page,
            _ if room => self.ranges.push((offset, offset + page)),
            _ => self.more = true,
        }
    }

    fn text(&self) -> String {
        let ranges: Vec<String> = self.ranges.iter().map(|(start, end)| format!("{start:#x}-{end:#x}")).collect();
        ranges.join(", ") + if self.more { ", …" } else { "" }
    }
}

fn devices(first: &Devices, second: &Devices, found: &mut Vec<Difference>) {
    let keys: std::collections::BTreeSet<_> = first.sections.keys().chain(second.sections.keys()).collect();
    for key in keys {
        let place = format!("{} instance {}", key.0, key.1);
        let version = |device: &Device| format!("version {}", device.version_id);
        match (first.sections.get(key), second.sections.get(key)) {
            (Some(ours), Some(theirs)) => {
                if ours.version_id != theirs.version_id {
                    let (first, second) = (Some(version(ours)), Some(version(theirs)));
                    found.push(Difference { kind: "section", place: place.clone(), first, second });
                }
                contents(&place, ours, theirs, found);
            }
            (ours, theirs) => {
                let (first, second) = (ours.map(version), theirs.map(version));
                found.push(Difference { kind: "section", place, first, second });
            }
        }
    }
}

fn contents(place: &str, ours: &Device, theirs: &Device, found: &mut Vec<Difference>) {
    if ours.body == theirs.body {
        return;
    }
    let (Some(our_fields), Some(their_fields)) = (&ours.fields, &theirs.fields) else {
        let length = |device: &Device| Some(format!("{} bytes without known fields", device.body.len()));
        found.push(Difference {
            kind: "section",
            place: place.to_owned(),
            first: length(ours),
            second: length(theirs),
        });
        return;
    };
    let (our_leaves, their_leaves) = (leaves(our_fields), leaves(their_fields));
    for (path, value) in &our_leaves {
        let other = their_leaves.get(path);
        if other != Some(value) {
            let place = format!("{place} › {path}");
            found.push(Difference { kind: "field", place, first: Some(show(value)), second: other.map(|v| show(v)) });
        }
    }
    for (path, value) in &their_leaves {
        if !our_leaves.contains_key(path) {
            let place = format!("{place} › {path}");
            found.push(Difference { kind: "field", place, first: None, second: Some(show(value)) });
        }
    }
}

/// The leaves of a section by their paths; a path that comes again gets a number.
fn leaves(fields: &Node) -> BTreeMap<String, &Value> {
    let mut leaves = BTreeMap::new();
    let root = fields.name.len() + 1;
    fields.leaves(&mut |path, leaf| {
        let path = path.get(root..).unwrap_or(path).to_owned();
        let again = (2..).map(|n| format!("{path} #{n}"));
        let free = std::iter::once(path.clone()).chain(again).find(|path| !leaves.contains_key(path));
        leaves.insert(free.unwrap_or(path), &leaf.value);
    });
    leaves
}

/// A value on one line, shortened if it is long.
fn show(value: &Value) -> String {
    const SHOWN: usize = 16;
    match value {
        Value::Scalar(scalar) => scalar.to_string(),
        Value::Scalars(scalars) => {
            let shown: Vec<String> = scalars.iter().take(SHOWN).map(|scalar| scalar.to_string()).collect();
            let more = if scalars.len() > SHOWN { " …" } else { "" };
            format!("[{}{more}]", shown.join(" "))
        }
        Value::Buffer(bytes) | Value::Unused(bytes) | Value::Bitmap(bytes) | Value::Opaque(bytes) => {
            let shown: String = bytes.iter().take(SHOWN).map(|byte| format!("{byte:02x}")).collect();
            let more = if bytes.len() > SHOWN { "…" } else { "" };
            format!("{} bytes {shown}{more}", bytes.len())
        }
        _ => "…".to_owned(),
    }
}

fn key(header: &SectionHeader) -> (String, u32) {
    (header.idstr.to_string(), header.instance_id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bounds::Spool;
    use crate::ram::Keep;
    use qevm_savevm::vmdesc::{Scalar, ScalarKind, Struct};

    fn field(name: &'static str, bits: u64) -> Node {
        let value = Value::Scalar(Scalar::new(ScalarKind::U8, bits));
        Node { name: name.into(), type_name: "uint8".into(), offset: 0, len: 1, value }
    }

    fn guest(version_id: u32, members: Vec<Node>, pages: &[u64]) -> Guest {
        let mut ram = GuestRam::new(4096, Keep::Digests, Spool::unlimited()).unwrap();
        let block = ram.add_block("pc.ram".into(), 1 << 30);
        pages.iter().for_each(|page| ram.put(block, page * 4096, &[7; 4096]).unwrap());
        let body = members.iter().map(|m| m.scalar().unwrap().as_u64() as u8).collect();
        let value = Value::Struct(Struct { vmsd_name: "toy".into(), version: 1, members });
        let fields = Node { name: "toy".into(), type_name: "struct".into(), offset: 0, len: 1, value };
        let device = Device { version_id, body, fields: Some(fields) };
        let devices = Devices { sections: BTreeMap::from([(("toy".into(), 0), device)]) };
        Guest { analysis: Analysis { ram: Some(ram), ..Analysis::default() }, devices }
    }

    #[test]
    fn equal_guests_have_no_differences() {
        let make = || guest(1, vec![field("a", 1), field("b", 2)], &[3, 4, 900]);
        assert_eq!(differences(&mut make(), &mut make()).unwrap(), []);
    }

    #[test]
    fn each_difference_is_found_where_it_is() {
        let mut first = guest(1, vec![field("a", 1), field("b", 2)], &[3, 4, 900]);
        let mut second = guest(2, vec![field("a", 9), field("c", 2)], &[3, 5, 900]);
        let found = differences(&mut first, &mut second).unwrap();
        let flat: Vec<_> =
            found.iter().map(|d| (d.kind, d.place.as_str(), d.first.as_deref(), d.second.as_deref())).collect();
        assert_eq!(
            flat,
            [
                ("pages", "pc.ram", Some("2 pages: 0x4000-0x6000"), Some("other contents")),
                ("section", "toy instance 0", Some("version 1"), Some("version 2")),
                ("field", "toy instance 0 › a", Some("0x1"), Some("0x9")),
                ("field", "toy instance 0 › b", Some("0x2"), None),
                ("field", "toy instance 0 › c", None, Some("0x2")),
            ]
        );
    }
}
