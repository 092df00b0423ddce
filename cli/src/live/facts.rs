//! What is known of one side.

use serde_json::Value;
use std::collections::BTreeMap;

/// Properties by name: numbers, strings and booleans.
pub(super) type Properties = BTreeMap<String, Value>;

/// What is known of one side. What is not known is not compared.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Facts {
    /// QEMU's version, e.g. `11.1.3`.
    pub release: Option<String>,
    /// The target, e.g. `x86_64`.
    pub arch: Option<String>,
    /// `kvm`, or something else.
    pub accelerator: Option<String>,
    /// The machine type.
    pub machine: Option<String>,
    /// Properties of the machine.
    pub machine_properties: Properties,
    /// The guest's UUID.
    pub uuid: Option<String>,
    /// Processors.
    pub cpu: Option<Cpu>,
    /// Bytes of memory, without DIMMs.
    pub memory: Option<u64>,
    /// Devices that are no processors, by where they are.
    pub devices: Option<BTreeMap<String, Device>>,
    /// Of devices, only those are told that were asked for and have a place on a PCI bus.
    pub only_placed: bool,
    /// Used length of each RAM block in bytes.
    pub ram: Option<BTreeMap<String, u64>>,
    /// Migration capabilities.
    pub capabilities: Option<BTreeMap<String, bool>>,
    /// Migration parameters.
    pub parameters: Option<Properties>,
}

/// Processors.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cpu {
    /// The type of the first, e.g. `EPYC-x86_64-cpu`; empty if it is not known.
    pub model: String,
    /// How many there are.
    pub count: u64,
    /// How many there can be.
    pub max: Option<u64>,
    /// Flags and other properties of the first.
    pub properties: Properties,
}

/// A device.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Device {
    /// Its type, e.g. `virtio-net-pci`; empty if only its place is known.
    pub kind: String,
    /// Its place tells of the section it has in a stream: it is on a PCI bus.
    pub pci: bool,
    /// It is part of the machine: no option asks for it.
    pub built_in: bool,
    /// Its properties.
    pub properties: Properties,
}

impl Facts {
    /// What both sides tell of, and what is therefore compared.
    pub fn common(&self, other: &Facts) -> Vec<&'static str> {
        let both = [
            ("release", self.release.is_some() && other.release.is_some()),
            ("target", self.arch.is_some() && other.arch.is_some()),
            ("machine type", self.machine.is_some() && other.machine.is_some()),
            ("machine properties", !self.machine_properties.is_empty() && !other.machine_properties.is_empty()),
            ("processors", self.cpu.is_some() && other.cpu.is_some()),
            ("memory", self.memory.is_some() && other.memory.is_some()),
            ("devices", self.devices.is_some() && other.devices.is_some()),
            ("RAM blocks", self.ram.is_some() && other.ram.is_some()),
            ("capabilities", self.capabilities.is_some() && other.capabilities.is_some()),
            ("parameters", self.parameters.is_some() && other.parameters.is_some()),
        ];
        both.into_iter().filter(|(_, known)| *known).map(|(what, _)| what).collect()
    }
}
