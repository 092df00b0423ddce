//! The description itself: what the JSON says, with duplicate keys kept in order.

use super::VmdescError;
use super::json::Json;
use crate::{Error, framing};
use qevm_wire::{Limits, Located, WireError, Within};

/// Bytes of a subsection's own header besides its name: marker, name length, version (all QEMU releases).
pub(super) const SUBSECTION_HEADER: u64 = 1 + 1 + 4;

/// The JSON description that QEMU writes after the end of a stream.
///
/// It lists the device sections (FULL) in stream order with what the *source* wrote: conditional fields that were not
/// written are absent, so it is a description of this one stream and no schema. Iterable sections (`ram`, …) are not in
/// it. Facts: streams of QEMU 5.2, 7.2, 10.0 and 11.1.
///
/// ```
/// use qevm_savevm::vmdesc::Description;
/// use qevm_wire::Limits;
///
/// let json = br#"{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2,
///     "fields": [{"name": "cpu_ticks_offset", "type": "int64", "size": 8},
///                {"name": "unused", "type": "unused_buffer", "size": 8},
///                {"name": "cpu_clock_offset", "type": "int64", "size": 8}]}]}"#;
/// let description = Description::parse(json, &Limits::default())?;
/// assert_eq!(description.devices[0].wire_size(), 24);
/// # Ok::<(), qevm_savevm::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Description {
    /// The configuration section (QEMU 10.0 and later).
    pub configuration: Option<StructDescription>,
    /// Target page size in bytes.
    pub page_size: Option<u64>,
    /// The device sections in stream order.
    pub devices: Vec<DeviceDescription>,
}

/// One device section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceDescription {
    /// The section's idstr, e.g. `0000:00:03.0/e1000e`.
    pub name: String,
    /// The section's instance id.
    pub instance_id: u32,
    /// What it contains.
    pub body: DeviceBody,
}

/// What a device section contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceBody {
    /// Fields and subsections.
    Struct(StructDescription),
    /// An old-style handler (`slirp`, …): its length in bytes, no fields.
    OldStyle {
        /// Bytes of the section's body.
        size: u64,
    },
}

/// A structure: a device, a subsection, or a structure inside a field.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StructDescription {
    /// Name of the VMSD; of a subsection, the name on the wire.
    pub vmsd_name: String,
    /// Version the source wrote.
    pub version: u32,
    /// The fields that were written, in order. Names repeat.
    pub fields: Vec<FieldDescription>,
    /// The subsections that were written, in order.
    pub subsections: Vec<StructDescription>,
}

/// One entry of a structure's fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldDescription {
    /// Name; not unique, and may contain dots and brackets of its own.
    pub name: String,
    /// QEMU's name of the type, e.g. `uint32`, `struct`, `pci config`.
    pub type_name: String,
    /// Bytes of one element on the wire, nested content included.
    pub size: u64,
    /// How many elements of this size follow each other.
    pub array_len: Option<u64>,
    /// Which element of an array this is, where each element has an entry of its own.
    pub index: Option<u64>,
    /// Nested structures: one for `struct`, `tmp` and `vstruct`; one (or key and value) for each element of a list
    /// or tree.
    pub nested: Vec<StructDescription>,
}

impl Description {
    /// Parses the text; offsets of errors count from its start.
    ///
    /// # Errors
    /// [`VmdescError::Json`], [`VmdescError::MissingKey`]; [`WireError::LimitExceeded`] for text longer than
    /// [`Limits::vmdesc`], more devices than [`Limits::sections`], a device longer than [`Limits::device_section`] or
    /// deeper nesting than [`Limits::depth`].
    pub fn parse(json: &[u8], limits: &Limits) -> Result<Self, Error> {
        Self::parse_at(json, 0, limits)
    }

    /// Parses text that starts at stream offset `offset`, from which offsets of errors then count.
    ///
    /// # Errors
    /// As [`Description::parse`].
    pub fn parse_at(json: &[u8], offset: u64, limits: &Limits) -> Result<Self, Error> {
        limit("length of the description", json.len() as u64, limits.vmdesc, offset)?;
        let mut json = Json::new(json, offset, limits.depth);
        let mut description = Description::default();
        let mut devices = false;
        json.object(|json, key| match key {
            "page_size" => json.unsigned().map(|size| description.page_size = Some(size)),
            "configuration" => {
                let mut parts = StructParts::default();
                let start = json.offset();
                json.object(|json, key| parts.pair(json, key)).within(|| "configuration")?;
                description.configuration = Some(parts.one("configuration", start)?);
                Ok(())
            }
            "devices" => {
                devices = true;
                json.array(|json| {
                    let count = description.devices.len() as u64 + 1;
                    limit("number of described sections", count, limits.sections, json.offset())?;
                    description.devices.push(device(json, limits)?);
                    Ok(())
                })
            }
            _ => json.skip(),
        })
        .within(|| "description")?;
        json.end().within(|| "description")?;
        if !devices {
            return Err(missing("description", "devices", offset));
        }
        Ok(description)
    }

    /// Where the text of the description starts in the last bytes of a whole stream; `None` if they hold none.
    ///
    /// This is for readers that can seek: with the description at hand before the device sections, the end of each is
    /// known. `tail` should be as long as a description may be, [`Limits::vmdesc`] at most; QEMU's take some 10 KiB to
    /// some 100 KiB.
    ///
    /// ```
    /// use qevm_savevm::vmdesc::Description;
    ///
    /// assert_eq!(Description::find_at_end(b"...\0\x06\0\0\0\x02{}"), Some(9));
    /// assert_eq!(Description::find_at_end(b"...\0"), None);
    /// ```
    pub fn find_at_end(tail: &[u8]) -> Option<usize> {
        const HEADER: usize = 6;
        let ends_stream = |window: &[u8], at: usize| match *window {
            [framing::EOF, framing::VMDESCRIPTION, a, b, c, d, b'{'] => {
                u32::from_be_bytes([a, b, c, d]) as usize == tail.len() - (at + HEADER)
            }
            _ => false,
        };
        let mut windows = tail.windows(HEADER + 1).enumerate();
        windows.find(|(at, window)| ends_stream(window, *at)).map(|(at, _)| at + HEADER)
    }

    /// The first description of the section with this name and instance.
    pub fn device(&self, idstr: &[u8], instance_id: u32) -> Option<&DeviceDescription> {
        self.devices.iter().find(|d| d.name.as_bytes() == idstr && d.instance_id == instance_id)
    }
}

impl DeviceDescription {
    /// Bytes of the section's body: everything between the section header and its footer.
    pub fn wire_size(&self) -> u64 {
        match &self.body {
            DeviceBody::Struct(structure) => structure.wire_size(),
            DeviceBody::OldStyle { size } => *size,
        }
    }

    /// Version of the section; `None` for an old-style one.
    pub fn version(&self) -> Option<u32> {
        match &self.body {
            DeviceBody::Struct(structure) => Some(structure.version),
            DeviceBody::OldStyle { .. } => None,
        }
    }
}

impl StructDescription {
    /// Nothing was written of it.
    pub(super) fn is_empty(&self) -> bool {
        self.fields.is_empty() && self.subsections.is_empty()
    }

    /// Bytes of all fields and subsections. (A subsection's own header is not in it; see the parent's size.)
    pub fn wire_size(&self) -> u64 {
        let fields = self.fields.iter().map(FieldDescription::wire_size);
        let header = |s: &Self| (s.vmsd_name.len() as u64).saturating_add(SUBSECTION_HEADER);
        let subsections = self.subsections.iter().map(|s| header(s).saturating_add(s.wire_size()));
        fields.chain(subsections).fold(0, u64::saturating_add)
    }
}

impl FieldDescription {
    /// Bytes of all elements.
    pub fn wire_size(&self) -> u64 {
        self.size.saturating_mul(self.array_len.unwrap_or(1))
    }
}

fn device(json: &mut Json<'_>, limits: &Limits) -> Result<DeviceDescription, Error> {
    let start = json.offset();
    let (mut name, mut instance_id, mut size, mut loose_fields) = (None, None, None, false);
    let mut parts = StructParts::default();
    json.object(|json, key| match key {
        "name" => json.string().map(|s| name = Some(s)),
        "instance_id" => json.unsigned32("instance_id").map(|id| instance_id = Some(id)),
        "size" => json.unsigned().map(|s| size = Some(s)),
        // The one field of an old-style section says nothing that its size does not.
        "fields" if parts.structs.is_empty() => {
            loose_fields = true;
            json.skip()
        }
        _ => parts.pair(json, key),
    })
    .within(|| name.as_ref().map_or_else(|| "device".to_owned(), |name| format!("device '{}'", name.escape_debug())))?;
    let name = name.ok_or_else(|| missing("device", "name", start))?;
    let instance_id = instance_id.ok_or_else(|| missing("device", "instance_id", start))?;
    let body = match size {
        Some(size) if parts.structs.is_empty() => DeviceBody::OldStyle { size },
        _ if loose_fields => return Err(missing("device", "vmsd_name", start)),
        _ => DeviceBody::Struct(parts.one("device", start)?),
    };
    let device = DeviceDescription { name, instance_id, body };
    limit("length of a described section", device.wire_size(), limits.device_section, start)?;
    Ok(device)
}

/// Structures as they appear as pairs of some object: each `vmsd_name` starts the next.
#[derive(Default)]
struct StructParts {
    structs: Vec<StructDescription>,
    versions: usize,
}

impl StructParts {
    fn pair(&mut self, json: &mut Json<'_>, key: &str) -> Result<(), Error> {
        let start = json.offset();
        if key == "vmsd_name" {
            let vmsd_name = json.string()?;
            self.structs.push(StructDescription { vmsd_name, ..StructDescription::default() });
            return Ok(());
        }
        if !matches!(key, "version" | "fields" | "subsections") {
            return json.skip();
        }
        let Some(structure) = self.structs.last_mut() else {
            return Err(missing("structure", "vmsd_name", start));
        };
        match key {
            "version" => {
                structure.version = json.unsigned32("version")?;
                self.versions += 1;
                Ok(())
            }
            "fields" => json.array(|json| {
                structure.fields.push(field(json)?);
                Ok(())
            }),
            _ => json.array(|json| {
                let start = json.offset();
                let mut parts = StructParts::default();
                json.object(|json, key| parts.pair(json, key))?;
                structure.subsections.push(parts.one("subsection", start)?);
                Ok(())
            }),
        }
    }

    fn all(self, object: &'static str, start: u64) -> Result<Vec<StructDescription>, Error> {
        if self.versions < self.structs.len() {
            return Err(missing(object, "version", start));
        }
        Ok(self.structs)
    }

    fn one(self, object: &'static str, start: u64) -> Result<StructDescription, Error> {
        self.all(object, start)?.pop().ok_or_else(|| missing(object, "vmsd_name", start))
    }
}

fn field(json: &mut Json<'_>) -> Result<FieldDescription, Error> {
    let start = json.offset();
    let mut field = FieldDescription::default();
    let (mut name, mut type_name, mut size) = (None, None, None);
    let mut parts = StructParts::default();
    json.object(|json, key| match key {
        "name" => json.string().map(|s| name = Some(s)),
        "type" => json.string().map(|s| type_name = Some(s)),
        "size" => json.unsigned().map(|s| size = Some(s)),
        "array_len" => json.unsigned().map(|n| field.array_len = Some(n)),
        "index" => json.unsigned().map(|n| field.index = Some(n)),
        "struct" => json.object(|json, key| parts.pair(json, key)),
        _ => parts.pair(json, key),
    })
    .within(|| name.as_ref().map_or_else(|| "field".to_owned(), |name| name.escape_debug().to_string()))?;
    field.name = name.ok_or_else(|| missing("field", "name", start))?;
    field.type_name = type_name.ok_or_else(|| missing("field", "type", start))?;
    field.size = size.ok_or_else(|| missing("field", "size", start))?;
    field.nested = parts.all("field", start)?;
    Ok(field)
}

fn missing(object: &'static str, key: &'static str, offset: u64) -> Error {
    Located::new(VmdescError::MissingKey { object, key }.into(), offset)
}

fn limit(what: &'static str, found: u64, limit: u64, offset: u64) -> Result<(), Error> {
    if found > limit {
        return Err(Located::new(WireError::LimitExceeded { what, found, limit }.into(), offset));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
