//! What both sides of a migration have agreed on about its page channels.

use crate::{Capabilities, Parameters};
use qevm_multifd::{ChannelOptions, Compression, EncoderOptions, PacketLayout, Uuid};
use qevm_wire::profile::ZeroPageDetection;
use qevm_wire::{Limits, PageGeometry, Profile};

/// How page channels are used in one migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// How many there are, 1 to 255.
    pub(crate) channels: u8,
    /// Method of all payloads.
    pub(crate) compression: Compression,
    /// Level of the method, where it has one.
    pub(crate) level: Option<i32>,
    /// Who looks for zero pages.
    pub(crate) zero_pages: ZeroPageDetection,
    /// What the release at the other end reads.
    pub(crate) layout: PacketLayout,
    /// Devices may send their state beside the pages.
    pub(crate) device_state: bool,
    /// Pages are sent in place.
    pub(crate) zero_copy: bool,
    /// Channels have sent their first packet when they are connected.
    pub(crate) greeted: bool,
    /// The machine's UUID, as the first packet of each channel says it whether `validate-uuid` is on or not; zero
    /// without `--uuid`.
    pub(crate) uuid: Uuid,
}

/// Bytes of a piece of a device's state that are taken: four times those of QEMU 10.0 to 11.1.
const DEVICE_STATE: u64 = 4 << 20;

impl Settings {
    /// The settings of a migration, `None` if it has no page channels.
    pub(crate) fn of(capabilities: Capabilities, parameters: &Parameters, profile: &Profile) -> Option<Self> {
        let level = match parameters.multifd_compression {
            Compression::Zlib => Some(i32::from(parameters.multifd_zlib_level)),
            Compression::Zstd => Some(i32::from(parameters.multifd_zstd_level)),
            _ => None,
        };
        let layout = PacketLayout::of(profile);
        let zero_pages = match parameters.zero_page_detection {
            // Releases before 9.0 have no room for zero pages in their packets.
            ZeroPageDetection::Multifd if layout == PacketLayout::Pages => ZeroPageDetection::Legacy,
            mode => mode,
        };
        capabilities.multifd.then_some(Settings {
            channels: parameters.multifd_channels,
            compression: parameters.multifd_compression,
            level,
            zero_pages,
            layout,
            // As QEMU's x-migration-multifd-transfer=auto.
            device_state: profile.multifd_device_state
                && profile.switchover_start
                && parameters.multifd_compression == Compression::None
                && !capabilities.mapped_ram,
            zero_copy: capabilities.zero_copy_send && parameters.multifd_compression == Compression::None,
            greeted: false,
            uuid: Uuid::default(),
        })
    }

    /// How packets are written.
    pub(crate) fn encoder(&self) -> EncoderOptions {
        EncoderOptions { layout: self.layout, pages: PageGeometry::X86, compression: self.compression }
    }

    /// How packets are read.
    pub(crate) fn decoder(&self) -> ChannelOptions {
        ChannelOptions {
            channels: Some(self.channels),
            uuid: Some(self.uuid),
            compression: Some(self.compression),
            device_state: self.device_state,
            limits: Limits { device_state_packet: DEVICE_STATE, ..Limits::default() },
            ..ChannelOptions::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qevm_wire::QemuVersion;

    #[test]
    fn methods_have_their_levels() {
        let capabilities = Capabilities { multifd: true, ..Capabilities::default() };
        let level = |compression| {
            let parameters = Parameters {
                multifd_compression: compression,
                multifd_zlib_level: 7,
                multifd_zstd_level: 15,
                ..Parameters::default()
            };
            Settings::of(capabilities, &parameters, &Profile::new(QemuVersion::NEWEST, "microvm")).unwrap().level
        };
        let levels = [Compression::None, Compression::Zlib, Compression::Zstd].map(level);
        assert_eq!(levels, [None, Some(7), Some(15)]);
    }
}
