//! Which virtio devices sit on which of microvm's transports, and what they have.

use qevm_wire::CountedString;
use std::fmt;
use std::str::FromStr;

/// Address of the first transport.
pub const BASE: u64 = 0xfeb0_0000;
/// Bytes from one transport to the next.
pub const STRIDE: u64 = 0x200;
/// `VIRTIO_NET_F_CTRL_GUEST_OFFLOADS`
pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// `VIRTIO_NET_F_MRG_RXBUF`
pub const MRG_RXBUF: u64 = 1 << 15;
/// `max_ports` of a serial bus, QEMU's default.
pub const MAX_PORTS: u32 = 31;

/// Interrupt of the first transport: the first pin of the second IOAPIC.
const FIRST_INTERRUPT: u64 = 24;
/// Transports of a microvm with two IOAPICs, and so the number of devices it can have.
pub const TRANSPORTS: usize = 24;

/// The transport of device number `position` (from 0) of the command line.
pub fn transport_of(position: usize) -> usize {
    (TRANSPORTS - 1).saturating_sub(position)
}

/// A virtio device, by the name that QEMU's `-device` has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VirtioDevice {
    /// `virtio-blk-device`
    Block,
    /// `virtio-net-device`
    Net,
    /// `virtio-rng-device`
    Rng,
    /// `virtio-serial-device`, with or without consoles and ports
    Serial,
}

/// Each device, its name on the command line and the name of its section.
const NAMES: [(VirtioDevice, &str, &str); 4] = [
    (VirtioDevice::Block, "virtio-blk-device", "virtio-blk"),
    (VirtioDevice::Net, "virtio-net-device", "virtio-net"),
    (VirtioDevice::Rng, "virtio-rng-device", "virtio-rng"),
    (VirtioDevice::Serial, "virtio-serial-device", "virtio-console"),
];

impl VirtioDevice {
    fn names(self) -> (&'static str, &'static str) {
        NAMES.iter().find(|(device, ..)| *device == self).map_or(("", ""), |(_, option, section)| (option, section))
    }

    /// How Linux is told, on its command line, of the transport of device number `position` of the command line:
    /// length, address and interrupt, which is one of the second IOAPIC's.
    ///
    /// ```
    /// use qevm_microvm::virtio::VirtioDevice;
    ///
    /// assert_eq!(VirtioDevice::kernel_parameter(0), "virtio_mmio.device=512@0xfeb02e00:47");
    /// ```
    pub fn kernel_parameter(position: usize) -> String {
        let (address, length, interrupt) = VirtioDevice::resources(position);
        format!("virtio_mmio.device={length}@{address:#x}:{interrupt}")
    }

    /// Address, length and interrupt of the transport of device number `position` of the command line.
    pub fn resources(position: usize) -> (u32, u32, u32) {
        let transport = transport_of(position) as u64;
        // All transports are below 4 GiB.
        ((BASE + transport * STRIDE) as u32, STRIDE as u32, (FIRST_INTERRUPT + transport) as u32)
    }

    /// The `idstr` of its section when it is device number `position` (from 0) of the command line, below
    /// [`TRANSPORTS`].
    ///
    /// ```
    /// use qevm_microvm::virtio::VirtioDevice;
    ///
    /// assert_eq!(VirtioDevice::Block.idstr(0), "virtio-mmio@00000000feb02e00/virtio-blk");
    /// assert_eq!(VirtioDevice::Rng.idstr(2), "virtio-mmio@00000000feb02a00/virtio-rng");
    /// ```
    pub fn idstr(self, position: usize) -> String {
        let transport = transport_of(position) as u64;
        format!("virtio-mmio@{:016x}/{}", BASE + transport * STRIDE, self.names().1)
    }
}

impl fmt::Display for VirtioDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.names().0)
    }
}

impl FromStr for VirtioDevice {
    type Err = String;

    fn from_str(text: &str) -> Result<VirtioDevice, String> {
        let found = NAMES.iter().find(|(_, option, _)| *option == text);
        found.map(|(device, ..)| *device).ok_or_else(|| {
            let known: Vec<&str> = NAMES.iter().map(|(_, option, _)| *option).collect();
            format!("'{text}' is not one of {}, without options", known.join(", "))
        })
    }
}

/// Whether `idstr` names the section of one of `devices`, in the order of the command line.
pub fn is_section_of(devices: &[VirtioDevice], idstr: &CountedString) -> bool {
    devices.iter().enumerate().any(|(position, device)| *idstr == *device.idstr(position).as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_qemus() {
        for (device, option, _) in NAMES {
            assert_eq!(option.parse(), Ok(device));
            assert_eq!(device.to_string(), option);
        }
        for bad in ["", "virtio-blk", "virtio-blk-device,drive=d", "virtio-blk-pci"] {
            assert!(bad.parse::<VirtioDevice>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sections_belong_to_a_device_at_its_place() {
        let devices = [VirtioDevice::Block, VirtioDevice::Serial];
        let has = |idstr: &str| is_section_of(&devices, &CountedString::new(idstr).unwrap());
        assert!(has("virtio-mmio@00000000feb02e00/virtio-blk"));
        assert!(has("virtio-mmio@00000000feb02c00/virtio-console"));
        assert!(!has("virtio-mmio@00000000feb02c00/virtio-blk"));
        assert!(!has("virtio-mmio@00000000feb02a00/virtio-console"));
    }
}
