//! The JSON description that follows the end of a stream.

use qevm_savevm::vmdesc::{Description, DeviceBody, DeviceDescription, FieldDescription, StructDescription, TextStyle};
use qevm_wire::{CountedString, PageGeometry, Profile, QemuVersion};

/// CONFIG before the configuration of an iterative device, and END_OF_STATE after it.
const CONFIGURATION_RECORDS: u64 = 16;

/// One FULL section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSection {
    /// The handler's name.
    pub idstr: CountedString,
    /// Tells handlers of the same name apart.
    pub instance_id: u32,
    /// Version of the content.
    pub version_id: u32,
    /// The content.
    pub body: Vec<u8>,
}

/// The state of all devices, with the JSON description that follows the end of the stream. A destination waits without
/// a limit for a description that its machine type promises; so there are no devices without one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedDevices {
    sections: Vec<DeviceSection>,
    description: String,
}

impl SavedDevices {
    /// Sections of whose content nothing is known: they are described as buffers, as QEMU describes handlers without
    /// fields.
    pub fn opaque(sections: Vec<DeviceSection>) -> Self {
        let device = |section: &DeviceSection| DeviceDescription {
            name: section.idstr.to_string(),
            instance_id: section.instance_id,
            body: DeviceBody::OldStyle { size: section.body.len() as u64 },
        };
        let mut description = Description::default();
        description.page_size = Some(PageGeometry::X86.size());
        description.devices = sections.iter().map(device).collect();
        let description = description.to_json(TextStyle::Compact);
        SavedDevices { sections, description }
    }

    /// Sections with the descriptions of their content, which `qevm_savevm::vmstate::save_described` gives, put
    /// together as the release of `profile` does for its machine type.
    ///
    /// The configuration of an [iterative device](crate::IterativeDevice) has no description of its own: QEMU describes
    /// it as a buffer, with the records around it.
    pub fn described(
        machine_type: &str,
        profile: &Profile,
        devices: Vec<(DeviceSection, Option<StructDescription>)>,
    ) -> Self {
        let style = if profile.qemu < QemuVersion::new(6, 0) { TextStyle::Spaced } else { TextStyle::Compact };
        let (mut sections, mut described) = (Vec::new(), Vec::new());
        for (section, object) in devices {
            let (name, instance_id) = (section.idstr.to_string(), section.instance_id);
            let body = match object {
                Some(object) => DeviceBody::Struct(object),
                None => DeviceBody::OldStyle { size: section.body.len() as u64 + CONFIGURATION_RECORDS },
            };
            described.push(DeviceDescription { name, instance_id, body });
            sections.push(section);
        }
        let mut description = Description::default();
        description.page_size = Some(PageGeometry::X86.size());
        description.devices = described;
        description.configuration = profile.vmdesc_configuration.then(|| configuration(machine_type));
        SavedDevices { sections, description: description.to_json(style) }
    }

    /// The sections in the order of the stream.
    pub fn sections(&self) -> &[DeviceSection] {
        &self.sections
    }

    /// The JSON description.
    pub fn description(&self) -> &str {
        &self.description
    }
}

/// How the configuration section is described: by a machine type's name and its length (10.0).
fn configuration(machine_type: &str) -> StructDescription {
    let field = |name: &str, type_name: &str, size: usize| FieldDescription {
        name: name.into(),
        type_name: type_name.into(),
        size: size as u64,
        ..FieldDescription::default()
    };
    StructDescription {
        vmsd_name: "configuration".into(),
        version: 1,
        fields: vec![field("len", "uint32", size_of::<u32>()), field("name", "buffer", machine_type.len())],
        subsections: Vec::new(),
    }
}
