//! What differs between two guests: configuration, RAM blocks, pages, device sections, fields.
//!
//! The fields of both guests are held until they are compared, as long as they take little memory beside the streams.

use crate::failure::Failure;
use crate::ram::GuestRam;
use crate::stream::{Analysis, Observer};
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::vmdesc::{Node, Value};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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

/// What was found, as far as it is worth showing.
#[derive(Debug, Default)]
pub struct Differences {
    /// The first ones.
    pub list: Vec<Difference>,
    /// How many more there are.
    pub omitted: u64,
    wanted: Wanted,
    text: usize,
}

/// Which differences are asked for.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Only those whose place contains this.
    pub place: Option<String>,
    /// The contents of memory count.
    pub pages: bool,
}

impl Differences {
    /// Text of differences that is kept: the paths of nested fields can be many times as long as the fields.
    const MOST_TEXT: usize = 8 << 20;

    fn push(&mut self, difference: Difference) {
        let wanted = self.wanted.place.as_ref().is_none_or(|place| difference.place.contains(place.as_str()));
        if !wanted || (difference.kind == "pages" && !self.wanted.pages) {
            return;
        }
        if self.text > Self::MOST_TEXT {
            self.omitted += 1;
            return;
        }
        let values = [&difference.first, &difference.second].into_iter().flatten().map(String::len);
        self.text += size_of::<Difference>() + difference.place.len() + values.sum::<usize>();
        self.list.push(difference);
    }
}

/// The device sections of one guest, by name and instance.
#[derive(Debug, Default)]
pub struct Devices {
    sections: BTreeMap<(String, u32), Device>,
    /// Bytes of the main channel that were read.
    position: u64,
    /// Memory that the fields take.
    held: u64,
}

impl Devices {
    /// Memory for fields beyond twice the stream's length. Real guests take far less: their memory is in the stream,
    /// too.
    const ROOM: u64 = 12 << 20;
}

#[derive(Debug)]
struct Device {
    version_id: u32,
    body: Vec<u8>,
    fields: Option<Node>,
}

impl Observer for Devices {
    fn position(&mut self, offset: u64) {
        self.position = self.position.max(offset);
    }

    fn restarted(&mut self) {
        *self = Devices::default();
    }

    fn body(&mut self, header: &SectionHeader, _offset: u64, body: &[u8]) {
        let device = Device { version_id: header.version_id, body: body.to_vec(), fields: None };
        self.sections.insert(key(header), device);
    }

    fn configuration_of(&mut self, header: &SectionHeader, fields: &Node) {
        let mut body = Vec::new();
        // What has names that are too long for the wire did not come from there.
        let _ = fields.encode(&mut body);
        self.body(header, fields.offset, &body);
        self.fields(header, fields);
    }

    fn fields(&mut self, header: &SectionHeader, fields: &Node) {
        let memory = fields.memory();
        if self.held + memory > Self::ROOM + 2 * self.position {
            return;
        }
        if let Some(device) = self.sections.get_mut(&key(header)) {
            self.held += memory;
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
pub fn differences(first: &mut Guest, second: &mut Guest, wanted: Wanted) -> Result<Differences, Failure> {
    let mut found = Differences { wanted, ..Differences::default() };
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

fn memory(ours: &mut GuestRam, theirs: &mut GuestRam, found: &mut Differences) -> Result<(), Failure> {
    let length = |block: &crate::ram::Block| format!("{:#x} bytes", block.used_length);
    let named = |ram: &GuestRam| -> HashMap<String, usize> {
        ram.blocks().iter().enumerate().rev().map(|(index, block)| (block.name.clone(), index)).collect()
    };
    let (our_names, their_names) = (named(ours), named(theirs));
    for index in 0..ours.blocks().len() {
        let block = ours.blocks()[index].clone();
        let Some(&other) = their_names.get(&block.name) else {
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
        if !our_names.contains_key(&block.name) {
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

fn devices(first: &Devices, second: &Devices, found: &mut Differences) {
    let keys: BTreeSet<_> = first.sections.keys().chain(second.sections.keys()).collect();
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

fn contents(place: &str, ours: &Device, theirs: &Device, found: &mut Differences) {
    if ours.body == theirs.body {
        return;
    }
    let (Some(our_fields), Some(their_fields)) = (&ours.fields, &theirs.fields) else {
        let length = |device: &Device| {
            Some(format!("{} bytes without known fields, or with too many to compare", device.body.len()))
        };
        found.push(Difference {
            kind: "section",
            place: place.to_owned(),
            first: length(ours),
            second: length(theirs),
        });
        return;
    };
    let mut path = format!("{place} › ");
    nodes(our_fields.children(), their_fields.children(), &mut path, found);
}

/// Compares the nodes of one structure. Of nodes with one name the first is compared with the first, and so on.
fn nodes(ours: &[Node], theirs: &[Node], path: &mut String, found: &mut Differences) {
    let mut theirs_by_name = HashMap::new();
    let numbered = |number: &mut HashMap<_, u32>, node: &'_ Node| {
        let number = number.entry(node.name.to_string()).or_default();
        *number += 1;
        (node.name.to_string(), *number)
    };
    let mut count = HashMap::new();
    for node in theirs {
        theirs_by_name.insert(numbered(&mut count, node), node);
    }
    count.clear();
    for node in ours {
        let key = numbered(&mut count, node);
        let other = theirs_by_name.remove(&key);
        inside(&key, path, |path| match other {
            Some(other) if is_leaf(node) && is_leaf(other) => {
                if node.value != other.value {
                    field(path, Some(node), Some(other), found);
                }
            }
            Some(other) if !is_leaf(node) && !is_leaf(other) => {
                nodes(node.children(), other.children(), path, found);
            }
            other => {
                alone(node, path, found, true);
                other.into_iter().for_each(|other| alone(other, path, found, false));
            }
        });
    }
    count.clear();
    for node in theirs {
        let key = numbered(&mut count, node);
        if theirs_by_name.contains_key(&key) {
            inside(&key, path, |path| alone(node, path, found, false));
        }
    }
}

/// Reports the fields of a node that only one guest has.
fn alone(node: &Node, path: &mut String, found: &mut Differences, ours: bool) {
    if is_leaf(node) {
        return if ours { field(path, Some(node), None, found) } else { field(path, None, Some(node), found) };
    }
    for child in node.children() {
        inside(&(child.name.to_string(), 1), path, |path| alone(child, path, found, ours));
    }
}

fn field(path: &str, first: Option<&Node>, second: Option<&Node>, found: &mut Differences) {
    let show = |node: Option<&Node>| node.map(|node| show(&node.value));
    found.push(Difference { kind: "field", place: path.to_owned(), first: show(first), second: show(second) });
}

/// Calls `visit` with the path to a node of this name, of which it may be the second or a later one.
fn inside((name, number): &(String, u32), path: &mut String, visit: impl FnOnce(&mut String)) {
    let before = path.len();
    if !path.ends_with(' ') {
        path.push('.');
    }
    path.push_str(name);
    if *number > 1 {
        path.push_str(&format!(" #{number}"));
    }
    visit(path);
    path.truncate(before);
}

fn is_leaf(node: &Node) -> bool {
    !matches!(node.value, Value::Struct(_) | Value::Subsection(_) | Value::List(_))
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

    fn all() -> Wanted {
        Wanted { place: None, pages: true }
    }

    fn guest(version_id: u32, members: Vec<Node>, pages: &[u64]) -> Guest {
        let mut ram = GuestRam::new(4096, Keep::Digests, Spool::unlimited()).unwrap();
        let block = ram.add_block("pc.ram".into(), 1 << 30);
        pages.iter().for_each(|page| ram.put(block, page * 4096, &[7; 4096]).unwrap());
        let body = members.iter().map(|m| m.scalar().unwrap().as_u64() as u8).collect();
        let value = Value::Struct(Struct { vmsd_name: "toy".into(), version: 1, members });
        let fields = Node { name: "toy".into(), type_name: "struct".into(), offset: 0, len: 1, value };
        let device = Device { version_id, body, fields: Some(fields) };
        let sections = BTreeMap::from([(("toy".into(), 0), device)]);
        let devices = Devices { sections, ..Devices::default() };
        Guest { analysis: Analysis { ram: Some(ram), ..Analysis::default() }, devices }
    }

    #[test]
    fn equal_guests_have_no_differences() {
        let make = || guest(1, vec![field("a", 1), field("b", 2)], &[3, 4, 900]);
        assert_eq!(differences(&mut make(), &mut make(), all()).unwrap().list, []);
    }

    #[test]
    fn each_difference_is_found_where_it_is() {
        let mut first = guest(1, vec![field("a", 1), field("b", 2)], &[3, 4, 900]);
        let mut second = guest(2, vec![field("a", 9), field("c", 2)], &[3, 5, 900]);
        let found = differences(&mut first, &mut second, all()).unwrap().list;
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
