//! Why an incoming stream cannot be loaded.

use super::GuestError;
use qevm_savevm::mapped_ram::MappedRamError;
use qevm_wire::{Blame, CountedString, Fault};
use std::io;

/// Why an incoming stream cannot be loaded, beside what its decoder reports.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The decoder's.
    #[error(transparent)]
    Stream(qevm_savevm::ErrorKind),
    /// The stream comes from another machine type.
    #[error("machine type received is '{found}' and local is '{expected}'")]
    MachineType {
        /// As received, escaped.
        found: String,
        /// This machine's.
        expected: String,
    },
    /// The source's machine has another UUID, and capability `validate-uuid` on. QEMU's words.
    #[error("UUID received is {} and local is {}", qevm_multifd::Uuid(*found), qevm_multifd::Uuid(*here))]
    Uuid {
        /// As received.
        found: [u8; 16],
        /// This machine's.
        here: [u8; 16],
    },
    /// The source has a capability on that changes what the stream holds.
    #[error("capability '{found}' is on at the source and not supported here")]
    Capability {
        /// The capability.
        found: CountedString,
    },
    /// A capability that both sides must agree on.
    #[error(
        "Capability {name} is {}, but received capability is {}: set it here as at the source, before migrate-incoming",
        if *here { "on" } else { "off" }, if *here { "off" } else { "on" }
    )]
    CapabilityDiffers {
        /// The capability.
        name: &'static str,
        /// It is on here.
        here: bool,
    },
    /// The bitmap of a mapped-ram file, or what it says of the file.
    #[error(transparent)]
    MappedRam(#[from] MappedRamError),
    /// A mapped-ram file cannot be read.
    #[error("cannot {doing}: {source}")]
    File {
        /// What was being done.
        doing: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A RAM block that this machine does not have.
    #[error(
        "unknown ramblock \"{found}\"; this machine has {expected}. Start it with the source's devices and firmware"
    )]
    UnknownRamBlock {
        /// As received.
        found: CountedString,
        /// Those that this machine has.
        expected: String,
    },
    /// A RAM block of another length.
    #[error(
        "size mismatch: {name}: {found:#x} != {expected:#x}. Start this machine with the source's memory size and firmware"
    )]
    RamBlockSize {
        /// The block.
        name: CountedString,
        /// Length received.
        found: u64,
        /// Length here.
        expected: u64,
    },
    /// A RAM block that the source has left out, and that is no file of both machines (capability `x-ignore-shared`).
    #[error(
        "RAM block '{name}' is not in the stream (capability x-ignore-shared), and no shared file here: start this machine with the source's \
         memory-backend-file, share=on"
    )]
    NotSent {
        /// The block.
        name: CountedString,
    },
    /// No page has come, as from a source in mode `cpr-transfer`, and this machine was not made of its memory.
    #[error(
        "no page of guest memory is in the stream: a source in mode 'cpr-transfer' has to pass its memory to this machine before, on a \
         channel of type 'cpr'"
    )]
    NoMemory,
    /// Pages of a RAM block that is a file of both machines, as far as this one can tell (capability
    /// `x-ignore-shared`). QEMU's words.
    #[error("block {name} should not be migrated ! It is a shared file here, and not at the source")]
    SharedSent {
        /// The block.
        name: CountedString,
    },
    /// A RAM block that the source has left out is at another place of its machine.
    #[error(
        "RAM block '{name}' is left out (capability x-ignore-shared), and at {found:#x} of the source's machine, 0x0 expected"
    )]
    SharedAddress {
        /// The block.
        name: CountedString,
        /// Where it is.
        found: u64,
    },
    /// A section for a device that this machine does not have.
    #[error("unknown section or instance '{idstr}' {instance_id}: {advice}")]
    UnknownSection {
        /// The section's name.
        idstr: CountedString,
        /// Its instance.
        instance_id: u32,
        /// What the operator may do about it; [`Devices::advice`](crate::Devices::advice).
        advice: String,
    },
    /// A section that has come before: each device, and `ram`, comes once.
    #[error("section '{idstr}' {instance_id} has come before")]
    SectionAgain {
        /// The section's name.
        idstr: CountedString,
        /// Its instance.
        instance_id: u32,
    },
    /// The stream is over, and guest memory is not complete.
    #[error("the stream ends without {missing} of section 'ram': guest memory is not complete{}", advice(missing))]
    RamIncomplete {
        /// START or END.
        missing: &'static str,
    },
    /// A RAM block of this machine that the source has not listed.
    #[error("RAM block '{name}' did not arrive; start the source with this machine's devices and firmware")]
    MissingRamBlock {
        /// The block.
        name: String,
    },
    /// An iterative device that has not come as a whole.
    #[error("device '{idstr}' came without {missing}; start the source with this machine's devices")]
    DeviceIncomplete {
        /// Its section's name.
        idstr: CountedString,
        /// The section or record.
        missing: &'static str,
    },
    /// The state of a device that comes over page channels.
    #[error(transparent)]
    DeviceState(#[from] crate::core::DeviceStateError),
    /// Target pages of another size.
    #[error("target pages of {found} bytes, {expected} expected")]
    PageSize {
        /// Bytes per page at the source.
        found: u64,
        /// Bytes per page here.
        expected: u64,
    },
    /// The RAM of the source has other pages on its host, which postcopy moves as a whole.
    #[error(
        "postcopy needs matching RAM page sizes ({found:#x} at the source, {expected:#x} here, one bit for each): back the RAM of both by \
         huge pages, or of none"
    )]
    HostPageSizes {
        /// Those of the source, one bit each.
        found: u64,
        /// Those here.
        expected: u64,
    },
    /// A block has pages of one size at the source's host and of another here.
    #[error("RAM block '{block}' has pages of {found} bytes at the source, {expected} expected")]
    HostPageSize {
        /// The block.
        block: CountedString,
        /// Bytes per page there.
        found: u64,
        /// Bytes per page here.
        expected: u64,
    },
    /// A huge page was begun in postcopy, and pages of another came before it was whole.
    #[error(
        "page {found:#x} of RAM block {block} came before the huge page at {begun:#x} of block {begun_block} was whole"
    )]
    HugePageInPieces {
        /// Number of the block that was begun, in the order of the stream.
        begun_block: usize,
        /// Where its huge page begins in it.
        begun: u64,
        /// Number of the block of the page that came.
        block: usize,
        /// Its offset.
        found: u64,
    },
    /// A page channel, or the synchronisation of page channels with the main channel.
    #[error(transparent)]
    Multifd(qevm_multifd::ErrorKind),
    /// The source uses page channels.
    #[error(
        "the source uses more than one connection: capability 'multifd' or 'postcopy-preempt' is on there and off here"
    )]
    MultifdOff,
    /// A device is to agree to the switchover, and the source does not listen.
    #[error("device '{device}' is to agree to the switchover, but the source has opened no return path")]
    AckUnheard {
        /// Its section's name.
        device: String,
    },
    /// The return path was opened twice, or a device agrees to the switchover that may not.
    #[error(transparent)]
    Switchover(#[from] qevm_returnpath::SwitchoverError),
    /// Something legal that this destination cannot handle.
    #[error("{0} is not supported here")]
    Unsupported(String),
    /// The guest refused the state of its devices.
    #[error("cannot load the state of the devices: {0}")]
    Devices(GuestError),
}

impl Blame for LoadError {
    fn fault(&self) -> Fault {
        match self {
            LoadError::Stream(kind) => kind.fault(),
            LoadError::Switchover(kind) => kind.fault(),
            LoadError::Unsupported(_) => Fault::Unsupported,
            LoadError::Multifd(kind) => kind.fault(),
            LoadError::MappedRam(kind) => kind.fault(),
            LoadError::DeviceState(kind) => kind.fault(),
            LoadError::File { .. } => Fault::Truncated,
            LoadError::SectionAgain { .. }
            | LoadError::AckUnheard { .. }
            | LoadError::HugePageInPieces { .. }
            | LoadError::RamIncomplete { .. } => Fault::Malformed,
            LoadError::CapabilityDiffers { .. }
            | LoadError::MultifdOff
            | LoadError::MachineType { .. }
            | LoadError::Uuid { .. }
            | LoadError::Capability { .. }
            | LoadError::UnknownRamBlock { .. }
            | LoadError::RamBlockSize { .. }
            | LoadError::NotSent { .. }
            | LoadError::NoMemory
            | LoadError::SharedSent { .. }
            | LoadError::SharedAddress { .. }
            | LoadError::UnknownSection { .. }
            | LoadError::MissingRamBlock { .. }
            | LoadError::DeviceIncomplete { .. }
            | LoadError::PageSize { .. }
            | LoadError::HostPageSizes { .. }
            | LoadError::HostPageSize { .. }
            | LoadError::Devices(_) => Fault::Mismatch,
        }
    }
}

impl From<qevm_savevm::ErrorKind> for LoadError {
    fn from(kind: qevm_savevm::ErrorKind) -> Self {
        LoadError::Stream(kind)
    }
}

/// What may be so without a fault.
fn advice(missing: &str) -> &'static str {
    match missing {
        "END" => " (if this is a background snapshot, turn capability 'background-snapshot' on here)",
        _ => "",
    }
}
