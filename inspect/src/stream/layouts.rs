//! How device sections are read that no description tells about.

use super::analysis::Analysis;
use super::release_guess;
use crate::failure::{Error, Failure};
use qevm_devices::DeviceState;
use qevm_savevm::framing::{Content, SectionHeader};
use qevm_savevm::vmdesc::{Catalogue, DeviceBody, DeviceDescription, Found, Node, Schema, Verdict, vfio_configuration};
use qevm_savevm::vmstate::Context;
use qevm_wire::{Limits, QemuVersion};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

/// The old-style section whose layout is known.
const SLIRP: &str = "slirp";

/// What there is besides a stream's own description.
#[derive(Debug, Clone, Default)]
pub struct Layouts {
    /// What the caller gave.
    pub schema: Option<Arc<Schema>>,
    /// The stream's own description is not to be used.
    pub no_description: bool,
}

/// What was found in the content of a section.
#[derive(Debug, Clone, Default)]
pub(super) struct Read {
    /// Bytes that belong to no named field.
    pub(super) opaque: u64,
    /// The fields, if the section is described.
    pub(super) fields: Option<Node>,
    /// What could not be understood, without being a fault of the stream.
    pub(super) note: Option<String>,
}

impl Read {
    pub(super) fn opaque(body: &[u8]) -> Self {
        Read { opaque: body.len() as u64, ..Read::default() }
    }

    /// The configuration of a VFIO device, which no description tells about: it counts the records around it as well.
    pub(super) fn vfio(header: &SectionHeader, offset: u64, body: &[u8]) -> Self {
        match vfio_configuration(body, offset, &Limits::default()) {
            Ok(fields) => Read { fields: Some(fields), ..Read::default() },
            Err(error) => {
                let path = format!("section {} '{}'", header.section_id, header.idstr);
                Read { note: Some(format!("shown raw: {}", error.within(path))), ..Read::opaque(body) }
            }
        }
    }
}

impl Layouts {
    /// With the schema in a file, if there is one: what `qemu-system-x86_64 -M TYPE -dump-vmstate FILE` writes.
    /// `no_description`: the stream's own description is not to be used.
    ///
    /// # Errors
    /// [`Error::Usage`] if the file cannot be read, [`Error::Bad`] if it is no schema.
    pub fn open(schema: Option<&Path>, no_description: bool) -> Result<Self, Error> {
        let Some(path) = schema else { return Ok(Layouts { schema: None, no_description }) };
        let name = path.display().to_string();
        let limits = Limits::default();
        let mut text = Vec::new();
        // One byte more, so that what is too long is seen to be.
        let read = File::open(path).and_then(|file| file.take(limits.schema + 1).read_to_end(&mut text));
        read.map_err(|error| Error::Usage(format!("{name}: {error}")))?;
        let schema = Schema::parse(&text, &limits).map_err(|error| Failure::located(&name, error))?;
        Ok(Layouts { schema: Some(Arc::new(schema)), no_description })
    }

    /// Reads the content of a section that no description tells about: by the schema if there is one, by the layouts
    /// that QEMU's releases have described, by the declared devices. Nothing is guessed: a layout must be the only one
    /// that explains the content to its last byte.
    pub(super) fn read(&self, header: &SectionHeader, offset: u64, body: &[u8], analysis: &Analysis) -> Read {
        let limits = &Limits::default();
        if header.content() == Content::Vfio {
            return Read::vfio(header, offset, body);
        }
        if header.content() != Content::Opaque {
            return Read::opaque(body);
        }
        let mut best: Option<Node> = None;
        let mut reasons = Vec::new();
        let mut better = |node: Node| {
            if encodes_to(&node, body) && best.as_ref().is_none_or(|best| node.opaque_bytes() < best.opaque_bytes()) {
                best = Some(node);
            }
            best.as_ref().is_some_and(|best| best.opaque_bytes() == 0)
        };
        let mut done = false;
        if let Some(schema) = &self.schema {
            match schema.decode(&header.idstr, header.version_id, body, offset, limits) {
                Ok((node, Verdict::Unique)) => done = better(node),
                Ok((_, verdict)) => reasons.push(format!("schema: {}", verdict.as_str())),
                Err(error) => reasons.push(format!("schema: {error}")),
            }
        }
        let releases = release_guess::likely_releases(analysis);
        if !done {
            match known_layout(header, body, &releases) {
                Ok(device) => done = device.decode(body, offset, limits).is_ok_and(&mut better),
                Err(reason) => reasons.push(reason.to_owned()),
            }
        }
        if !done {
            let machine = analysis.machine().unwrap_or_default();
            let declared = declared_layouts(header, body, &machine, &releases);
            declared.filter_map(|device| device.decode(body, offset, limits).ok()).any(better);
        }
        let opaque = best.as_ref().map_or(body.len() as u64, Node::opaque_bytes);
        let note = (opaque > 0).then(|| {
            let reasons = if reasons.is_empty() { "part of its layout is unknown".into() } else { reasons.join("; ") };
            format!(
                "section {} '{}' at byte {offset}: {opaque} of {} bytes opaque, as no description tells its fields ({reasons})",
                header.section_id,
                header.idstr,
                body.len()
            )
        });
        Read { opaque, fields: best, note }
    }
}

fn encodes_to(node: &Node, body: &[u8]) -> bool {
    let mut written = Vec::with_capacity(body.len());
    node.encode(&mut written).is_ok() && written == body
}

/// The layout that other streams of QEMU have described.
fn known_layout(
    header: &SectionHeader,
    body: &[u8],
    releases: &[QemuVersion],
) -> Result<DeviceDescription, &'static str> {
    let (version, instance) = (header.version_id, header.instance_id);
    if header.idstr == SLIRP {
        let size = body.len() as u64;
        return Ok(DeviceDescription {
            name: SLIRP.into(),
            instance_id: instance,
            body: DeviceBody::OldStyle { size },
        });
    }
    match Catalogue::embedded().describe(&header.idstr, instance, version, body, releases) {
        Found::One(device) => Ok(device),
        Found::Unknown => Err("no layout of this name and version is known"),
        Found::Ambiguous => Err("more than one known layout fits"),
        _ => Err("no known layout fits"),
    }
}

/// The declared device's layout, for each release that may have written it.
fn declared_layouts(
    header: &SectionHeader,
    body: &[u8],
    machine: &str,
    releases: &[QemuVersion],
) -> impl Iterator<Item = DeviceDescription> {
    let (idstr, version) = (header.idstr.to_string(), header.version_id);
    releases.iter().filter_map(move |release| {
        let context = Context::new(*release, machine);
        let state = DeviceState::decode(&idstr, version, body, &context)?.ok()?;
        let (written, description) = state.encode_described(version, &context).ok()?;
        let (name, instance_id) = (idstr.clone(), header.instance_id);
        (written == body).then_some(DeviceDescription { name, instance_id, body: DeviceBody::Struct(description) })
    })
}
