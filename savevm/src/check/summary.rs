//! What is compared: the sides of a check.

use super::Values;
use crate::command::Command;
use crate::configuration::{Configuration, ConfigurationSubsection};
use crate::event::Event;
use crate::framing::SectionHeader;
use crate::ram::{RamBlock, RamRecord};
use crate::vmdesc::{Description, Schema};
use crate::vmstate;
use qevm_wire::QemuVersion;
use std::collections::BTreeMap;

/// Capabilities that the configuration section lists and a destination compares: `x-ignore-shared` since 4.0,
/// `mapped-ram` since 9.0.
pub(super) const COMPARED_CAPABILITIES: [&str; 2] = ["x-ignore-shared", "mapped-ram"];

/// What of a stream decides whether it loads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// The configuration section.
    pub configuration: Option<Configuration>,
    /// The RAM blocks in stream order.
    pub ram: Vec<RamBlock>,
    /// The sections that START or FULL opened, in stream order.
    pub sections: Vec<SectionHeader>,
    /// SWITCHOVER_START was sent.
    pub switchover_start: bool,
    /// POSTCOPY_ADVISE was sent with page sizes, which capability `postcopy-ram` does.
    pub postcopy_ram: bool,
    /// A RAM record of the main channel waited for multifd channels.
    pub multifd: bool,
    /// Sections have footers; `None` if no section is over.
    pub footers: Option<bool>,
    /// The description. [`Summary::event`] does not set it: its text is payload.
    pub description: Option<Description>,
    /// Numbers of the device sections. [`Summary::event`] does not note them: they are payload.
    pub values: Values,
}

impl Summary {
    /// Takes note of an event of the stream or of a package in it.
    pub fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Configuration(configuration) => self.configuration = Some(configuration.clone()),
            Event::Section { header, .. } => self.sections.push(header.clone()),
            Event::Ram(RamRecord::Block(block)) => self.ram.push(block.clone()),
            Event::Ram(RamRecord::MultifdFlush) => self.multifd = true,
            Event::SectionFooter { present, .. } => self.footers = Some(*present),
            Event::Command(Command::SwitchoverStart) => self.switchover_start = true,
            Event::Command(Command::PostcopyAdvise(advise)) => self.postcopy_ram = advise.is_some(),
            _ => {}
        }
    }
}

/// What is known of a destination. `None` means not known, and is not compared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expectations {
    /// Release of the binary.
    pub qemu: Option<QemuVersion>,
    /// Machine type under its full name, e.g. `pc-q35-10.0`.
    pub machine: Option<Vec<u8>>,
    /// Target page size in bytes.
    pub page_size: Option<u64>,
    /// Which capabilities are known to be on or off, by QEMU's names. Compared are `x-ignore-shared` and `mapped-ram`,
    /// which both sides must agree on, and `postcopy-ram` and `multifd`, which a destination must be told of.
    pub capabilities: BTreeMap<String, bool>,
    /// The guest's UUID.
    pub uuid: Option<[u8; 16]>,
    /// The RAM blocks.
    pub ram: Option<Vec<RamBlock>>,
    /// The sections it would write, and so can load.
    pub sections: Option<Vec<SectionHeader>>,
    /// It writes footers after sections, and expects them.
    pub footers: Option<bool>,
    /// The description of what it would write.
    pub description: Option<Description>,
    /// Everything its device models could write.
    pub schema: Option<Schema>,
    /// The device models of its release as far as they are declared, for what no schema tells of; crate `qevm-devices`
    /// has those of `microvm` (`qevm_devices::descriptions`).
    pub models: Vec<vmstate::Description>,
    /// Numbers of the device sections that it would write. Empty if they are not known.
    pub values: Values,
}

impl From<Summary> for Expectations {
    /// A destination that wrote this stream itself.
    fn from(stream: Summary) -> Self {
        let page_size = stream.configuration.as_ref().and_then(Configuration::page_geometry).map(|p| p.size());
        let uuid = stream.configuration.iter().flat_map(|c| &c.subsections).find_map(|s| match s {
            ConfigurationSubsection::Uuid(uuid) => Some(*uuid),
            _ => None,
        });
        let mut capabilities = BTreeMap::new();
        for name in COMPARED_CAPABILITIES {
            let on = stream.configuration.as_ref().map(|c| c.has_capability(name));
            capabilities.extend(on.map(|on| (name.to_owned(), on)));
        }
        // Where a stream does not show these, the destination may still have them on.
        for (name, seen) in [("postcopy-ram", stream.postcopy_ram), ("multifd", stream.multifd)] {
            capabilities.extend(seen.then(|| (name.to_owned(), true)));
        }
        Expectations {
            qemu: None,
            page_size,
            capabilities,
            uuid,
            machine: stream.configuration.map(|c| c.machine),
            ram: Some(stream.ram),
            sections: Some(stream.sections),
            footers: stream.footers,
            description: stream.description,
            values: stream.values,
            schema: None,
            models: Vec::new(),
        }
    }
}
