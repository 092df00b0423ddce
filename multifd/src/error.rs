//! The error kinds of this crate. Each idea has its own enum; [`ErrorKind`] is their union, and every function reports
//! it as [`Error`], with offset and path.

use crate::compression::{Compression, CompressionError};
use crate::layout;
use crate::sync::SyncError;
use qevm_wire::{Blame, CountedString, Fault, Located, WireError};

/// An error of this crate: what, at which byte of the channel, in which nested things.
pub type Error = Located<ErrorKind>;

/// The bounded reader of this crate's decoders.
pub type Reader<'a> = qevm_wire::Reader<'a, ErrorKind>;

/// What can go wrong on page channels.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A primitive could not be read or written.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The first packet of a channel, or the set of channels.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// A packet.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// The payload of a packet.
    #[error(transparent)]
    Compression(#[from] CompressionError),
    /// The synchronisation with the main channel.
    #[error(transparent)]
    Sync(#[from] SyncError),
    /// What is written here, no destination takes. The caller's fault.
    #[error("no destination takes this: {reason}")]
    Refused {
        /// What it would say.
        reason: Box<ErrorKind>,
    },
}

impl ErrorKind {
    /// What cannot be written is never the peer's fault.
    pub(crate) fn refused(self) -> Self {
        match self.fault() {
            Fault::Misuse => self,
            _ => ErrorKind::Refused { reason: Box::new(self) },
        }
    }
}

impl Blame for ErrorKind {
    fn fault(&self) -> Fault {
        match self {
            ErrorKind::Wire(kind) => kind.fault(),
            ErrorKind::Handshake(kind) => kind.fault(),
            ErrorKind::Packet(kind) => kind.fault(),
            ErrorKind::Compression(kind) => kind.fault(),
            ErrorKind::Sync(kind) => kind.fault(),
            ErrorKind::Refused { .. } => Fault::Misuse,
        }
    }

    fn needed(&self) -> Option<u64> {
        match self {
            ErrorKind::Wire(kind) => kind.needed(),
            _ => None,
        }
    }
}

/// What is wrong with the first packet of a channel, or with the set of channels.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The connection is no page channel.
    #[error("multifd magic {found:#010x}, expected {:#010x}", layout::MAGIC)]
    Magic {
        /// The word found.
        found: u32,
    },
    /// A page channel of another version.
    #[error("multifd version {found}, expected {}", layout::VERSION)]
    Version {
        /// The version found.
        found: u32,
    },
    /// A channel number that this side has no channel for.
    #[error("channel number {found}, but multifd-channels is {channels} here: it must be equal on both sides")]
    ChannelNumber {
        /// The number found, from 0.
        found: u8,
        /// How many channels there are.
        channels: u8,
    },
    /// Two connections say they are the same channel.
    #[error("a second connection for channel {channel}")]
    DuplicateChannel {
        /// The number of both, from 0.
        channel: u8,
    },
    /// The channels belong to different virtual machines.
    #[error("UUID {found} of the source's virtual machine, expected {expected}")]
    Uuid {
        /// The UUID found.
        found: crate::Uuid,
        /// The UUID of this machine.
        expected: crate::Uuid,
    },
    /// Something was to be written in a place where it cannot be. The caller's fault.
    #[error("{what} {place}")]
    Order {
        /// What was to be written.
        what: &'static str,
        /// Why not.
        place: &'static str,
    },
}

impl Blame for HandshakeError {
    fn fault(&self) -> Fault {
        match self {
            HandshakeError::Version { .. } => Fault::Unsupported,
            HandshakeError::Order { .. } => Fault::Misuse,
            HandshakeError::ChannelNumber { .. } | HandshakeError::Uuid { .. } => Fault::Mismatch,
            _ => Fault::Malformed,
        }
    }
}

/// What is wrong with a packet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PacketError {
    /// No packet starts here.
    #[error("packet magic {found:#010x}, expected {:#010x}", layout::MAGIC)]
    Magic {
        /// The word found.
        found: u32,
    },
    /// A packet of another version.
    #[error("packet version {found}, expected {}", layout::VERSION)]
    Version {
        /// The version found.
        found: u32,
    },
    /// Flags that no QEMU release up to 11.1 sets, or that exclude each other.
    #[error("packet flags {found:#x}: {what}")]
    Flags {
        /// The flags found.
        found: u32,
        /// What is wrong with them.
        what: &'static str,
    },
    /// The packet was compressed with another method than the one of this channel.
    #[error("multifd-compression is '{found}' at the source, expected '{expected}'")]
    Method {
        /// The method of the packet.
        found: Compression,
        /// The method configured here, or that of the packets before.
        expected: Compression,
    },
    /// A count of pages that the packet has no room for.
    #[error("{what} is {found}, expected at most {max}")]
    PageCount {
        /// Which count.
        what: &'static str,
        /// The count found.
        found: u64,
        /// The highest possible.
        max: u64,
    },
    /// The length of the payload does not fit the pages.
    #[error("next_packet_size is {found}, expected {expected} for {pages} normal pages")]
    PayloadLength {
        /// The length found, in bytes.
        found: u64,
        /// The only legal length, in bytes.
        expected: u64,
        /// Number of pages with data.
        pages: u32,
    },
    /// The payload that is announced cannot be empty.
    #[error("next_packet_size is 0 in a packet with data")]
    EmptyPayload,
    /// Pages of a RAM block that is not in the block list.
    #[error("RAM block '{name}', which the block list of the main channel does not have")]
    UnknownBlock {
        /// Name of the block.
        name: CountedString,
    },
    /// A page offset that is no multiple of the page size.
    #[error("offset {found:#x} of page {index} is no multiple of the page size {page_size:#x}")]
    Unaligned {
        /// The page's place in the packet, from 0.
        index: u32,
        /// The offset found, in bytes.
        found: u64,
        /// Size of a target page in bytes.
        page_size: u64,
    },
    /// A page that is not inside its RAM block.
    #[error("offset {found:#x} of page {index} is outside the block's used length {used_length:#x}")]
    Outside {
        /// The page's place in the packet, from 0.
        index: u32,
        /// The offset found, in bytes.
        found: u64,
        /// Length of the block in bytes.
        used_length: u64,
    },
    /// Device state where it is not possible.
    #[error("device state on a page channel, which needs multifd-compression 'none' and is off here")]
    DeviceStateOff,
    /// The connection was closed without the TLS bye.
    #[error("TLS session ended without a bye, expected one (multifd-clean-tls-termination=on)")]
    NoTlsBye,
    /// Zero pages were to be written into a packet that has no field for them. The caller's fault.
    #[error("{found} zero pages in a packet of QEMU before 9.0, which cannot list them")]
    NoZeroPages {
        /// Number of zero pages.
        found: usize,
    },
}

impl Blame for PacketError {
    fn fault(&self) -> Fault {
        match self {
            PacketError::Version { .. } | PacketError::Flags { .. } => Fault::Unsupported,
            PacketError::Method { .. } | PacketError::UnknownBlock { .. } | PacketError::DeviceStateOff => {
                Fault::Mismatch
            }
            PacketError::NoTlsBye => Fault::Truncated,
            PacketError::NoZeroPages { .. } => Fault::Misuse,
            _ => Fault::Malformed,
        }
    }
}
