//! The JSON description that follows the end of a stream.

use crate::{DeviceSection, SavedDevices};
use qevm_savevm::vmdesc::{Description, DeviceBody, DeviceDescription, FieldDescription, StructDescription, TextStyle};
use qevm_wire::{PageGeometry, Profile, QemuVersion};

impl SavedDevices {
    /// Sections with the descriptions of their content, which `qevm_savevm::vmstate::encode_described` gives, put together
    /// as the release of `profile` does for its machine type.
    pub fn described(machine_type: &str, profile: &Profile, devices: Vec<(DeviceSection, StructDescription)>) -> Self {
        let style = if profile.qemu < QemuVersion::new(6, 0) { TextStyle::Spaced } else { TextStyle::Compact };
        let (mut sections, mut described) = (Vec::new(), Vec::new());
        for (section, object) in devices {
            let (name, instance_id) = (section.idstr.to_string(), section.instance_id);
            described.push(DeviceDescription { name, instance_id, body: DeviceBody::Struct(object) });
            sections.push(section);
        }
        let mut description = Description::default();
        description.page_size = Some(PageGeometry::X86.size());
        description.devices = described;
        description.configuration = profile.vmdesc_configuration.then(|| configuration(machine_type));
        SavedDevices { sections, vmdesc: Some(description.to_json(style)) }
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
