//! What was found, as the object that `--json` prints.

use crate::failure::Failure;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

/// The result of `qevm verify` (and the core of that of `qevm inspect`).
///
/// ```
/// let value = serde_json::to_value(qevm_inspect::report::Report::default()).unwrap();
/// let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
/// assert_eq!(
///     keys,
///     ["ok", "bytes", "opaque_bytes", "device_bytes", "reencoded_identical", "qemu_profile", "sections", "ram", "error"]
/// );
/// ```
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Bytes accounted for, over all files: from the start of the stream (`--offset`) to the end, or to the fault.
    pub bytes: u64,
    /// Bytes of device sections that belong to no named field.
    pub opaque_bytes: u64,
    /// Bytes of VFIO devices' own data, on the main channel and on page channels: no fields, and not counted as opaque.
    pub device_bytes: u64,
    /// Everything that was decoded gave the same bytes when it was encoded again.
    pub reencoded_identical: bool,
    /// Best guess of the writer: see [`crate::stream::release_guess`].
    pub qemu_profile: String,
    /// One entry for each section (START or FULL), in stream order.
    pub sections: Vec<SectionReport>,
    /// The RAM blocks, in the order of the stream's list.
    pub ram: Vec<RamReport>,
    /// Why the stream is bad, if it is.
    pub error: Option<Failure>,
}

/// One section of the main channel.
#[derive(Debug, Clone, Serialize)]
pub struct SectionReport {
    /// The handler's name.
    pub idstr: String,
    /// Tells handlers of the same name apart.
    pub instance_id: u32,
    /// Version of its content.
    pub version_id: u32,
    /// Offset in the file of the type byte of START or FULL.
    pub offset: u64,
    /// Bytes from type byte to footer; of an iterable section the sum over START, PARTs and END.
    pub size: u64,
}

/// One RAM block.
#[derive(Debug, Clone)]
pub struct RamReport {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub used_length: u64,
    /// Pages that the stream gave a content.
    pub pages: u64,
    /// Those that are all zeroes in the end.
    pub zero_pages: u64,
    /// Name (`crc32`, `sha256`) and value of the digest over the used length; `None` if page contents were skipped or
    /// not given.
    pub digest: Option<(&'static str, String)>,
}

impl Report {
    /// The members of the object, in the contract's order; `reencoded`: with what re-encoding gave.
    pub fn members(&self, reencoded: bool) -> Members<'_> {
        Members {
            ok: self.error.is_none(),
            bytes: self.bytes,
            opaque_bytes: self.opaque_bytes,
            device_bytes: self.device_bytes,
            reencoded_identical: reencoded.then_some(self.reencoded_identical),
            qemu_profile: &self.qemu_profile,
            sections: &self.sections,
            ram: self.ram.iter().map(RamReport::to_json).collect(),
            error: self.error.as_ref().map(error_json),
        }
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.members(true).serialize(serializer)
    }
}

/// A report as it is printed, so that others can add members of their own.
#[derive(Debug, Serialize)]
pub struct Members<'a> {
    ok: bool,
    bytes: u64,
    opaque_bytes: u64,
    device_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    reencoded_identical: Option<bool>,
    qemu_profile: &'a str,
    sections: &'a [SectionReport],
    ram: Vec<Value>,
    error: Option<Value>,
}

impl RamReport {
    fn to_json(&self) -> Value {
        let mut value = json!({
            "name": self.name,
            "used_length": self.used_length,
            "pages": self.pages,
            "zero_pages": self.zero_pages,
        });
        if let (Some((kind, digest)), Some(object)) = (&self.digest, value.as_object_mut()) {
            object.insert((*kind).into(), digest.clone().into());
        }
        value
    }
}

/// The `error` member.
pub fn error_json(failure: &Failure) -> Value {
    json!({
        "kind": failure.kind,
        "offset": failure.offset,
        "path": failure.path,
        "message": failure.message,
    })
}
