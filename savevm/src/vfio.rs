//! The sections of VFIO devices: `<device path>/vfio`, both iterable and FULL.

use qevm_wire::{Blame, Fault, Located, Reader, WireError, Writer};

/// The words that open a record.
pub mod flag {
    /// The section's content ends.
    pub const END_OF_STATE: u64 = 0xffff_ffff_ef10_0001;
    /// The device's configuration follows.
    pub const DEV_CONFIG_STATE: u64 = 0xffff_ffff_ef10_0002;
    /// Set-up, in START.
    pub const DEV_SETUP_STATE: u64 = 0xffff_ffff_ef10_0003;
    /// Device data follow.
    pub const DEV_DATA_STATE: u64 = 0xffff_ffff_ef10_0004;
    /// The initial data are complete (8.1); ends the section's content.
    pub const DEV_INIT_DATA_SENT: u64 = 0xffff_ffff_ef10_0005;
    /// The configuration that came over a page channel may be loaded now (10.1).
    pub const DEV_CONFIG_LOAD_READY: u64 = 0xffff_ffff_ef10_0006;
}

/// What makes a VFIO section unreadable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VfioError {
    /// The word is none of the known ones.
    #[error("VFIO record {found:#x}, expected 0xffffffffef100001 to 0xffffffffef100006")]
    Flag {
        /// The word found.
        found: u64,
    },
    /// A record other than END_OF_STATE after SETUP or CONFIG.
    #[error("VFIO record {found:#x} after SETUP or CONFIG, expected END_OF_STATE")]
    NotEnded {
        /// The word found.
        found: u64,
    },
}

impl Blame for VfioError {
    fn fault(&self) -> Fault {
        Fault::Malformed
    }
}

/// One record of a VFIO section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VfioRecord {
    /// The device is to get ready to receive; END_OF_STATE follows.
    Setup,
    /// `len` bytes of device data follow as payload.
    Data {
        /// Length in bytes; 0 is legal.
        len: u64,
    },
    /// The vmstate of the device's PCI configuration follows, of a length that only the device knows; then
    /// END_OF_STATE.
    Config,
    /// The device has sent what it can send before it stops (capability `switchover-ack`); ends the content.
    InitDataSent,
    /// The configuration that was sent over a page channel may be loaded.
    ConfigLoadReady,
    /// The content ends.
    EndOfState,
}

/// Where in a section's content the reader is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Place {
    #[default]
    Records,
    /// Only END_OF_STATE is legal.
    Ending,
    /// The content ends here unless END_OF_STATE follows.
    MaybeEnded,
}

impl VfioRecord {
    /// Reads one record.
    pub(crate) fn decode<K: From<WireError> + From<VfioError>>(
        reader: &mut Reader<'_, K>,
        place: Place,
    ) -> Result<Self, Located<K>> {
        let at = reader.offset();
        let found = reader.be64()?;
        if place != Place::Records && found != flag::END_OF_STATE {
            return Err(Located::new(VfioError::NotEnded { found }.into(), at));
        }
        Ok(match found {
            flag::END_OF_STATE => VfioRecord::EndOfState,
            flag::DEV_CONFIG_STATE => VfioRecord::Config,
            flag::DEV_SETUP_STATE => VfioRecord::Setup,
            flag::DEV_DATA_STATE => VfioRecord::Data { len: reader.be64()? },
            flag::DEV_INIT_DATA_SENT => VfioRecord::InitDataSent,
            flag::DEV_CONFIG_LOAD_READY => VfioRecord::ConfigLoadReady,
            _ => return Err(Located::new(VfioError::Flag { found }.into(), at)),
        })
    }

    /// Writes one record, without its payload.
    pub(crate) fn encode(&self, writer: &mut Writer) {
        match self {
            VfioRecord::EndOfState => writer.be64(flag::END_OF_STATE),
            VfioRecord::Config => writer.be64(flag::DEV_CONFIG_STATE),
            VfioRecord::Setup => writer.be64(flag::DEV_SETUP_STATE),
            VfioRecord::Data { len } => writer.be64(flag::DEV_DATA_STATE).be64(*len),
            VfioRecord::InitDataSent => writer.be64(flag::DEV_INIT_DATA_SENT),
            VfioRecord::ConfigLoadReady => writer.be64(flag::DEV_CONFIG_LOAD_READY),
        };
    }
}
