//! The recorded tails of real streams: device sections, end of stream, description.

use qevm_savevm::vmstate::{Accel, Context};
use qevm_wire::{QemuVersion, Reader, WireError};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

/// `QEMU_VM_SECTION_FULL`, `_EOF`, `_VMDESCRIPTION`, `_FOOTER`.
const FULL: u8 = 0x04;
const EOF: u8 = 0x00;
const VMDESCRIPTION: u8 = 0x06;
const FOOTER: u8 = 0x7e;
/// Bytes from EOF to the text of the description.
const DESCRIPTION_HEADER: usize = 6;

/// The end of one recorded stream.
pub(crate) struct Tail {
    /// File name without suffix, e.g. `10.0-tcg-smp`.
    pub(crate) name: String,
    /// The release and accelerator that wrote it.
    pub(crate) ctx: Context,
    /// The text of the description.
    pub(crate) description: Vec<u8>,
    /// The device sections in stream order.
    pub(crate) sections: Vec<Section>,
}

/// A device section with QEMU's description of it.
pub(crate) struct Section {
    pub(crate) idstr: String,
    pub(crate) instance_id: u32,
    pub(crate) version: u32,
    pub(crate) payload: Vec<u8>,
    pub(crate) description: serde_json::Value,
}

/// All recorded tails.
pub(crate) fn tails() -> Vec<Tail> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/microvm");
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 24, "recorded streams are missing");
    files.iter().map(|path| Tail::open(path)).collect()
}

impl Tail {
    fn open(path: &Path) -> Tail {
        let name = path.file_name().unwrap().to_str().unwrap().strip_suffix(".gz").unwrap().to_owned();
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(File::open(path).unwrap()).read_to_end(&mut bytes).unwrap();
        let release: QemuVersion = name.split('-').next().unwrap().parse().unwrap();
        let accel = if name.contains("-kvm") { Accel::Kvm } else { Accel::Tcg };
        let ctx = Context::new(release, "microvm").with_accel(accel);
        let (end, _) = description(&bytes);
        let sections = sections(&bytes);
        Tail { name, ctx, description: bytes[end + DESCRIPTION_HEADER..].to_vec(), sections }
    }
}

fn sections(bytes: &[u8]) -> Vec<Section> {
    let (end, json) = description(bytes);
    let described = json["devices"].as_array().unwrap();
    let mut reader: Reader<'_, WireError> = Reader::new(&bytes[..end]);
    let mut sections = Vec::new();
    for description in described {
        assert_eq!(reader.u8().unwrap(), FULL);
        let section_id = reader.be32().unwrap();
        let idstr = reader.counted_string("idstr").unwrap().to_string();
        let (instance_id, version) = (reader.be32().unwrap(), reader.be32().unwrap());
        let footer = [&[FOOTER][..], &section_id.to_be_bytes()].concat();
        let length = payload_length(description, reader.rest(), &footer);
        let payload = reader.take(length as u64).unwrap().to_vec();
        assert_eq!(reader.take(footer.len() as u64).unwrap(), footer);
        assert_eq!(
            (description["name"].as_str(), description["instance_id"].as_u64()),
            (Some(&*idstr), Some(instance_id.into()))
        );
        sections.push(Section { idstr, instance_id, version, payload, description: description.clone() });
    }
    assert!(reader.is_empty(), "sections that nothing describes");
    sections
}

/// Where the sections end, and the description after them.
fn description(bytes: &[u8]) -> (usize, serde_json::Value) {
    let end = (0..bytes.len() - DESCRIPTION_HEADER)
        .rev()
        .find(|&i| {
            let length = u32::from_be_bytes(bytes[i + 2..i + 6].try_into().unwrap()) as usize;
            bytes[i..i + 2] == [EOF, VMDESCRIPTION] && i + DESCRIPTION_HEADER + length == bytes.len()
        })
        .expect("a description at the end");
    (end, serde_json::from_slice(&bytes[end + DESCRIPTION_HEADER..]).unwrap())
}

/// The length of a section by QEMU's own description: sizes of the fields, and subsections with their headers.
fn payload_length(description: &serde_json::Value, rest: &[u8], footer: &[u8]) -> usize {
    let fields = description["fields"].as_array().unwrap();
    let size = |field: &serde_json::Value| field["size"].as_u64().unwrap() * field["array_len"].as_u64().unwrap_or(1);
    let fields: u64 = fields.iter().map(size).sum();
    let no_subsections = Vec::new();
    let subsections = description["subsections"].as_array().unwrap_or(&no_subsections);
    let headers: usize = subsections.iter().map(|s| 1 + 1 + s["vmsd_name"].as_str().unwrap().len() + 4).sum();
    let contents: usize = subsections.iter().map(|s| payload_length(s, &[], &[])).sum();
    let length = fields as usize + headers + contents;
    assert!(rest.is_empty() || rest[length..].starts_with(footer), "the description does not lead to the footer");
    length
}
