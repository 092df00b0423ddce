//! Compares device state field by field with what `analyze-migration.py` reads.
//!
//! The script prints numbers as hexadecimal digits of their full width and buffers as hexadecimal bytes, so every value
//! gives its bytes on the wire back; those are compared, name by name.

use crate::description;
use anyhow::{Context, Result};
use qevm_savevm::vmdesc::{Description, DeviceBody, Node};
use qevm_wire::Limits;
use serde::Serialize;
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What the script makes of a `ram` section has no counterpart among the fields.
const WITHOUT_FIELDS: &str = "ram";
/// The script's name for the bytes of a section without fields.
const OLD_STYLE_DATA: &str = "data";
/// The type of what QEMU 10 writes in place of an element that is not there, and the script's word for it.
const NO_ELEMENT: &str = "nullptr";
/// Differences that are told; one cause tends to make thousands.
const TOLD: usize = 10;

/// The outcome for one stream.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Comparison {
    /// Sections compared.
    pub sections: usize,
    /// Values compared, arrays as one each.
    pub fields: usize,
    /// What differs, at most a few.
    pub differences: Vec<String>,
    /// All that differs.
    pub different: usize,
}

impl Comparison {
    fn differs(&mut self, what: String) {
        self.different += 1;
        if self.differences.len() < TOLD {
            self.differences.push(what);
        }
    }
}

/// Where a section is, as `qevm verify` tells.
#[derive(Debug, Clone)]
pub struct Place {
    /// The section's `idstr`.
    pub idstr: String,
    /// Its instance.
    pub instance_id: u32,
    /// Offset of its type byte in the file.
    pub offset: u64,
    /// Bytes from there to the end of the footer.
    pub size: u64,
}

/// Compares the fields of `stream`, whose sections are at `places`, with `theirs`, the script's output.
///
/// # Errors
/// The stream cannot be read, or has no description.
pub fn compare(stream: &Path, places: &[Place], theirs: &Value) -> Result<Comparison> {
    let json = description::at_end_of(stream)?.context("the stream has no description")?;
    let limits = Limits::default();
    let described = Description::parse(json.to_string().as_bytes(), &limits)?;
    let file = File::open(stream)?;
    let mut comparison = Comparison::default();
    for place in places {
        let mut section = vec![0; usize::try_from(place.size)?];
        file.read_exact_at(&mut section, place.offset)?;
        let id = u32::from_be_bytes([section[1], section[2], section[3], section[4]]);
        let key = format!("{} ({id})", place.idstr);
        let Some(their_section) = theirs.get(&key).filter(|_| place.idstr != WITHOUT_FIELDS) else { continue };
        // Of other iterable sections (`spapr/htab`) it reads no values.
        if their_section == "" {
            continue;
        }
        let Some(device) = described.device(place.idstr.as_bytes(), place.instance_id) else {
            comparison.differs(format!("{key} is not in the description"));
            continue;
        };
        let header = 5 + 1 + place.idstr.len() + 8;
        let body = &section[header..header + usize::try_from(device.wire_size())?];
        comparison.sections += 1;
        match device.decode(body, place.offset + header as u64, &limits) {
            // An old-style handler has no fields; both sides have its bytes.
            Ok(node) if matches!(device.body, DeviceBody::OldStyle { .. }) => {
                member(&key, &their_section[OLD_STYLE_DATA], &[&node], &mut comparison)?;
            }
            Ok(node) => object(&key, their_section, &node, &mut comparison)?,
            Err(e) => comparison.differs(format!("{key}: {e}")),
        }
    }
    Ok(comparison)
}

/// Every member of their object must be among our node's children.
fn object(path: &str, theirs: &Value, ours: &Node, comparison: &mut Comparison) -> Result<()> {
    let Some(members) = theirs.as_object() else {
        comparison.differs(format!("{path}: theirs is no structure"));
        return Ok(());
    };
    for (name, value) in members {
        let path = format!("{path}.{name}");
        // An element may be a field of its own beside the array (Arm's `env.vfp.xregs[0]`).
        let named_alone = |ours: &str| ours != name && members.contains_key(ours);
        let called = |c: &&Node| is_called(&c.name, name) && !named_alone(&c.name);
        let children: Vec<&Node> = ours.children().iter().filter(called).collect();
        if children.is_empty() {
            comparison.differs(format!("{path}: we have no such field"));
            continue;
        }
        member(&path, value, &children, comparison)?;
    }
    Ok(())
}

/// One of their values against the nodes of that name: several for an array of structures.
fn member(path: &str, theirs: &Value, ours: &[&Node], comparison: &mut Comparison) -> Result<()> {
    match theirs {
        Value::Object(_) => object(path, theirs, ours[0], comparison),
        Value::Array(elements) if elements.iter().any(Value::is_object) => array(path, elements, ours, comparison),
        _ => {
            comparison.fields += 1;
            let mut bytes = Vec::new();
            for node in ours {
                node.encode(&mut bytes)?;
            }
            match wire_bytes(theirs) {
                Some(expected) if expected == bytes => {}
                Some(expected) => comparison.differs(format!("{path}: they read {expected:02x?}, we {bytes:02x?}")),
                None => comparison.differs(format!("{path}: a value of unknown form, {theirs}")),
            }
            Ok(())
        }
    }
}

/// An array of structures. Several arrays of one name (the two buses of an IDE controller, and the drives on them) are
/// one array to the script, of which it keeps one: that must be among ours.
///
/// QEMU 11 marks each element of an array of pointers as there (0x31) or not (0x30), and QEMU 10 one that is not there.
/// The script lists these marks among the elements.
fn array(path: &str, theirs: &[Value], ours: &[&Node], comparison: &mut Comparison) -> Result<()> {
    let theirs: Vec<&Value> =
        theirs.iter().filter(|e| ["31", "30", NO_ELEMENT].iter().all(|mark| *e != mark)).collect();
    let ours: Vec<&Node> = ours.iter().copied().filter(|node| node.type_name != NO_ELEMENT).collect();
    let mut worst = None;
    if ours.len().is_multiple_of(theirs.len()) {
        for candidate in ours.chunks(theirs.len()) {
            let mut trial = Comparison::default();
            for (n, (element, node)) in theirs.iter().zip(candidate).enumerate() {
                member(&format!("{path}[{n}]"), element, &[*node], &mut trial)?;
            }
            if trial.different == 0 {
                comparison.fields += trial.fields;
                return Ok(());
            }
            worst = Some(trial);
        }
    }
    match worst {
        Some(trial) => trial.differences.into_iter().for_each(|d| comparison.differs(d)),
        None => comparison.differs(format!("{path}: they have {} elements, we {}", theirs.len(), ours.len())),
    }
    Ok(())
}

/// `name` itself, or an element `name[n]` of it.
fn is_called(ours: &str, name: &str) -> bool {
    ours.strip_prefix(name).is_some_and(|rest| rest.is_empty() || (rest.starts_with('[') && rest.ends_with(']')))
}

/// The bytes of one of their values: `true`, `0x0012`, `0xffff (-1)`, `00 12`, or a list of such.
fn wire_bytes(value: &Value) -> Option<Vec<u8>> {
    match value {
        Value::Bool(flag) => Some(vec![u8::from(*flag)]),
        Value::Array(elements) => {
            let parts: Option<Vec<Vec<u8>>> = elements.iter().map(wire_bytes).collect();
            parts.map(|p| p.concat())
        }
        Value::String(text) => match text.strip_prefix("0x") {
            Some(number) => digits(number.split(' ').next()?),
            None => digits(&text.replace(' ', "")),
        },
        _ => None,
    }
}

fn digits(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|p| u8::from_str_radix(std::str::from_utf8(p).ok().filter(|p| p.len() == 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_give_their_bytes_back() {
        assert_eq!(wire_bytes(&json!("0x00000012")), Some(vec![0, 0, 0, 0x12]));
        assert_eq!(wire_bytes(&json!("0xffffffff (-1)")), Some(vec![0xff; 4]));
        assert_eq!(wire_bytes(&json!("86 80")), Some(vec![0x86, 0x80]));
        assert_eq!(wire_bytes(&json!(["0x01", true])), Some(vec![1, 1]));
        assert_eq!(wire_bytes(&json!("0x1")), None);
        assert_eq!(wire_bytes(&json!(1.5)), None);
    }

    #[test]
    fn elements_belong_to_their_array_and_nothing_else() {
        assert!(is_called("irr", "irr") && is_called("irr[3]", "irr"));
        assert!(!is_called("irr2", "irr") && !is_called("irr.x", "irr"));
    }

    /// What the script reads of `body`, whose only section has these fields, beside what we read.
    fn compared(fields: Value, body: &[u8], theirs: Value) -> Comparison {
        let description = json!({ "devices": [{
            "name": "a", "instance_id": 0, "vmsd_name": "a", "version": 1, "fields": fields,
        }] });
        let limits = Limits::default();
        let described = Description::parse(description.to_string().as_bytes(), &limits).unwrap();
        let node = described.device(b"a", 0).unwrap().decode(body, 0, &limits).unwrap();
        let mut comparison = Comparison::default();
        object("a", &theirs, &node, &mut comparison).unwrap();
        comparison
    }

    #[test]
    fn an_element_that_is_a_field_of_its_own_is_not_the_array() {
        let fields = json!([
            { "name": "x[0]", "type": "uint8", "size": 1 },
            { "name": "x", "type": "uint8", "size": 1, "array_len": 2 },
        ]);
        let comparison = compared(fields.clone(), &[1, 2, 3], json!({ "x[0]": "0x01", "x": ["0x02", "0x03"] }));
        assert_eq!((comparison.fields, comparison.differences), (2, vec![]));
        let comparison = compared(fields, &[1, 2, 3], json!({ "x[0]": "0x02", "x": ["0x02", "0x03"] }));
        assert_eq!(comparison.different, 1);
    }
}
