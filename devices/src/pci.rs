//! What every PCI device has (structures `PCIDevice` and `msix`), and the state of VFIO devices built on it.
//!
//! The wire does not say whether a device is PCI Express nor how many MSI-X vectors it has: those are
//! [`PciFacts`](qevm_savevm::vmstate::PciFacts) of the [`Context`], which a destination knows and
//! [`PciFacts::from_payload`](qevm_savevm::vmstate::PciFacts::from_payload) recovers from the configuration space in
//! the state itself.

use qevm_savevm::Error;
use qevm_savevm::vmstate::{
    Buffer, Context, Element, ElementDescription, Layout, Loader, Saver, VarBuffer, VmState, VmStateError,
};

/// Bytes of configuration space of a PCI device, and of a PCI Express device.
const CONFIG_SIZE: usize = 256;
const EXPRESS_CONFIG_SIZE: usize = 4096;

/// Structure `PCIDevice` version 2. (`docs/format/vfio.md`)
#[derive(VmState, Debug, Clone, PartialEq, Eq)]
#[vmstate(name = "PCIDevice", version = 2, minimum_version = 1, post_load = PciDevice::check_version_id)]
pub struct PciDevice {
    /// Always 2; QEMU accepts what is not above its own. Big-endian, whatever the type's name says.
    #[vmstate(type = "int32 le")]
    pub version_id: i32,
    /// Configuration space of a PCI device.
    #[vmstate(name = "config", type = "pci config", exists = !ctx.pci.express)]
    pub config: Option<Buffer<CONFIG_SIZE>>,
    /// Configuration space of a PCI Express device.
    #[vmstate(name = "config", type = "pci config", exists = ctx.pci.express)]
    pub express_config: Option<Box<Buffer<EXPRESS_CONFIG_SIZE>>>,
    /// Levels of INTA to INTD, each 0 or 1.
    #[vmstate(since = 2)]
    pub irq_state: PciIrqState,
}

impl PciDevice {
    /// The `version_id` that QEMU writes.
    pub const VERSION_ID: i32 = 2;

    /// The configuration space.
    pub fn config_space(&self) -> &[u8] {
        match (&self.config, &self.express_config) {
            (Some(config), _) => &config.0,
            (None, Some(config)) => &config.0,
            (None, None) => &[],
        }
    }

    fn check_version_id(&mut self, _: u32, _: &Context) -> Result<(), VmStateError> {
        if (0..=Self::VERSION_ID).contains(&self.version_id) {
            return Ok(());
        }
        let found = self.version_id as u32;
        Err(VmStateError::Refused { what: "PCI device version_id", found: found.into(), expected: "0 to 2" })
    }
}

impl Default for PciDevice {
    fn default() -> Self {
        let irq_state = PciIrqState::default();
        let (config, express_config) = (Some(Buffer::default()), None);
        PciDevice { version_id: Self::VERSION_ID, config, express_config, irq_state }
    }
}

/// The levels of a device's four interrupt lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PciIrqState(pub [u32; 4]);

impl Element for PciIrqState {
    const TYPE: &'static str = "pci irq state";
    fn put(&self, out: &mut Saver<'_>) -> Result<(), Error> {
        for level in self.0 {
            out.writer().be32(level);
        }
        Ok(())
    }
    fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
        let mut levels = [0; 4];
        for level in &mut levels {
            *level = input.reader().be32()?;
        }
        Ok(PciIrqState(levels))
    }
    fn describe(_: &Context) -> ElementDescription {
        ElementDescription { type_name: Some(Self::TYPE.into()), layout: Layout::Bytes(16) }
    }
}
qevm_savevm::element_is_field!([] PciIrqState);

/// Structure `msix`: the MSI-X table and the pending bits.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "msix", version = 0)]
pub struct Msix {
    /// 16 bytes for each vector, then a pending bit for each; nothing without MSI-X.
    #[vmstate(type = "msix state", len = ctx.pci.msix_state_size())]
    pub msix: VarBuffer,
}

/// VMSD `VFIOPCIDevice` version 1: what a VFIO device's section has after its CONFIG flag, without any header.
///
/// Its subsection with the state of a boot display (`VFIODisplay`) is not declared. (`docs/format/vfio.md`)
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "VFIOPCIDevice", version = 1)]
pub struct VfioPciDevice {
    /// The PCI device.
    #[vmstate(name = "parent_obj")]
    pub pci: PciDevice,
    /// Its MSI-X state, if it has MSI-X.
    #[vmstate(name = "parent_obj", exists = ctx.pci.msix_vectors > 0)]
    pub msix: Option<Msix>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use qevm_savevm::vmdesc::{Description, DeviceBody, DeviceDescription, TextStyle};
    use qevm_savevm::vmstate::{self, PciFacts};
    use qevm_wire::QemuVersion;

    fn context(pci: PciFacts) -> Context {
        let mut ctx = Context::new(QemuVersion::new(11, 1), "microvm");
        ctx.pci = pci;
        ctx
    }

    /// The beginning of the section that QEMU 11.1 wrote for `-device nvme` (PCI Express, 65 MSI-X vectors), and the
    /// descriptions of its first two fields.
    #[test]
    fn a_real_device_is_recovered_with_its_facts() {
        let payload = include_bytes!("../tests/data/pci/11.1-nvme.bin");
        let facts = PciFacts::from_payload(payload, true).unwrap();
        assert_eq!(facts, PciFacts { express: true, msix_vectors: 65 });
        let ctx = context(facts);
        let device: VfioPciDevice = vmstate::decode(payload, 1, &ctx).unwrap();
        assert_eq!(device.pci.config_space()[..2], [0x36, 0x1b]); // Red Hat's vendor id
        let (bytes, described) = vmstate::encode_described(&device, 1, &ctx).unwrap();
        assert_eq!(bytes, payload);
        let mut whole = Description::default();
        let (name, body) = (String::new(), DeviceBody::Struct(described));
        whole.devices.push(DeviceDescription { name, instance_id: 0, body });
        let ours: serde_json::Value = serde_json::from_str(&whole.to_json(TextStyle::Compact)).unwrap();
        let qemu: serde_json::Value = serde_json::from_str(include_str!("../tests/data/pci/11.1-nvme.json")).unwrap();
        assert_eq!(ours["devices"][0]["fields"], qemu);
    }

    #[test]
    fn a_newer_device_is_refused() {
        let ctx = context(PciFacts::default());
        let device = PciDevice { version_id: 3, ..PciDevice::default() };
        let bytes = vmstate::encode(&device, &ctx).unwrap();
        let error = vmstate::load::<PciDevice>(&mut qevm_savevm::Reader::new(&bytes), 2, &ctx).unwrap_err();
        assert!(
            matches!(error.kind, qevm_savevm::ErrorKind::VmState(VmStateError::Refused { found: 3, .. })),
            "{error}"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn a_vfio_device_survives_its_own_bytes(config: [u8; 32], vectors in 0u16..64, express: bool, irq: [bool; 4]) {
            let ctx = context(PciFacts { express, msix_vectors: vectors });
            let mut space = [0; EXPRESS_CONFIG_SIZE];
            space[..32].copy_from_slice(&config);
            let device = VfioPciDevice {
                pci: PciDevice {
                    config: (!express).then(|| Buffer(*space.first_chunk().unwrap())),
                    express_config: express.then(|| Box::new(Buffer(space))),
                    irq_state: PciIrqState(irq.map(u32::from)),
                    ..PciDevice::default()
                },
                msix: (vectors > 0).then(|| Msix { msix: VarBuffer(vec![0xa5; ctx.pci.msix_state_size()]) }),
            };
            let bytes = vmstate::encode(&device, &ctx).unwrap();
            prop_assert_eq!(vmstate::decode::<VfioPciDevice>(&bytes, 1, &ctx).unwrap(), device);
        }
    }
}
