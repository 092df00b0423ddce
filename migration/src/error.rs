//! Why a migration failed.

use super::{Address, BadCapability, Doubt, GuestError, ReturnPathError, Status};
use qevm_savevm::mapped_ram::MappedRamError;
use qevm_wire::{Blame, CountedString, Fault, Located};
use std::{io, path::PathBuf, time::Duration};

/// Why a migration failed. On the source the guest goes on in every case but [`Unsettled`](MigrationError::Unsettled).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrationError {
    /// The destination cannot be reached.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// Where to.
        address: Address,
        /// The system's reason.
        source: io::Error,
    },
    /// No source can be waited for.
    #[error("cannot listen at {address}: {source}")]
    Listen {
        /// Where.
        address: Address,
        /// The system's reason.
        source: io::Error,
    },
    /// The destination has loaded the initial data of all devices, and has not agreed to the switchover as often as it should have.
    #[error(
        "the destination has loaded the initial data of all devices, and only {waiting}, {flow}: tell the destination's release (qemu=)"
    )]
    SwitchoverAcks {
        /// What came.
        waiting: String,
        /// How they are counted here.
        flow: &'static str,
    },
    /// The migration cannot begin now.
    #[error(transparent)]
    Refused(#[from] super::Refused),
    /// The connections cannot be secured as the operator wants: the monitor's or the credentials' reason.
    #[error("{0}")]
    Tls(GuestError),
    /// The destination has ended the TLS session before it answered anything, as one does that does not want this side. TLS has no way to
    /// say why then.
    #[error(
        "{reason}: the destination has ended the TLS session before it answered anything; it may not allow this side's certificate, or want \
         one (its 'tls-authz' and 'verify-peer'): its own log says why"
    )]
    SessionEnded {
        /// What failed.
        reason: GuestError,
    },
    /// The capabilities do not go with the transport.
    #[error(transparent)]
    Capability(#[from] BadCapability),
    /// The file that the guest is to go to cannot be made.
    #[error("Could not create '{path}': {}", reason(source))]
    Create {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// What the guest is to come from, or a descriptor or command that it is to go to, cannot be used.
    #[error("Could not open '{}': {}", opened(address), reason(source))]
    Open {
        /// Where.
        address: Address,
        /// The system's reason.
        source: io::Error,
    },
    /// There is no such descriptor.
    #[error("{0}")]
    Descriptor(GuestError),
    /// Something failed when the destination had been sent everything: whether the guest runs there is not known, and it stays paused
    /// here.
    #[error(
        "{reason}; the destination has everything, so the guest may run there, and stays paused here: see whether it runs at the \
         destination, and say 'cont' here only if it does not"
    )]
    Unsettled {
        /// What failed.
        reason: GuestError,
    },
    /// The channel broke while sending.
    #[error("cannot send {doing}: {source}")]
    Send {
        /// What was being sent.
        doing: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The channel broke while receiving.
    #[error("cannot receive after byte {offset}: {source}")]
    Receive {
        /// Bytes received so far.
        offset: u64,
        /// The system's reason.
        source: io::Error,
    },
    /// The destination reported that it failed.
    #[error("the destination reported failure (SHUT {status}); its own log says why")]
    PeerFailed {
        /// The status, not 0.
        status: u32,
    },
    /// The return path ended before the destination gave its verdict.
    #[error("the destination closed the return path without a verdict")]
    NoVerdict,
    /// The destination owes an answer for too long.
    #[error(
        "the destination has not answered for {} s on the return path of the main channel in status '{}' ({parameter}): {missing}",
        waited.as_secs_f64(), status.as_str()
    )]
    Unanswered {
        /// What has not come.
        missing: String,
        /// How long it was waited for.
        waited: Duration,
        /// What the migration is at.
        status: Status,
        /// The parameter that has the limit.
        parameter: &'static str,
    },
    /// The return path broke.
    #[error("cannot read the return path: {0}")]
    ReturnPath(io::Error),
    /// The destination sent something on the return path that is none of its messages, or not now.
    #[error("return path: {0}")]
    ReturnPathMessage(#[from] Located<ReturnPathError>),
    /// What arrived cannot be loaded.
    #[error(transparent)]
    Load(#[from] Located<LoadError>),
    /// The guest has arrived, and it is not certain that the source leaves it to this destination: it stays paused here, and whoever
    /// can look at the source has to decide.
    #[error(
        "{0}; the guest is here and paused: if it runs at the source, say 'quit' here; only if it is certain that it does not run \
         there and never will, say 'cont' here"
    )]
    Undecided(#[from] Doubt),
    /// The connection broke while the guest was at the destination and part of its memory at the source.
    #[error(
        "postcopy broke off ({reason}): the guest is at the destination, or lost if that has ended, and some of its memory is still at the \
         source"
    )]
    PostcopyBroken {
        /// What failed.
        reason: GuestError,
    },
    /// A part of the guest reported an error.
    #[error("cannot {doing}: {source}")]
    Guest {
        /// What was being done.
        doing: &'static str,
        /// The part's own error.
        source: GuestError,
    },
    /// The engine built a record that the format has no room for.
    #[error("cannot encode the stream: {0}")]
    Encode(#[from] qevm_savevm::Error),
    /// A packet of a page channel cannot be written.
    #[error("cannot encode a packet: {0}")]
    Packet(#[from] qevm_multifd::Error),
    /// A compression method cannot be used as asked for.
    #[error("multifd-compression: {0}")]
    Compression(#[from] qevm_multifd::CompressionError),
    /// Some channels of the source have not come.
    #[error(
        "no further connection came for {} s, but {} missing: the source must have capability 'multifd' on and the same \
         'multifd-channels'",
        patience.as_secs(), missing_channels(*main, missing)
    )]
    MissingChannels {
        /// The main channel is missing.
        main: bool,
        /// The numbers of the page channels that are missing.
        missing: Vec<u8>,
        /// How long nothing came.
        patience: Duration,
    },
    /// The page channels have ended already, for a reason that was reported.
    #[error("the page channels have ended")]
    ChannelsEnded,
    /// `migrate_cancel`.
    #[error("cancelled")]
    Cancelled,
}

impl MigrationError {
    pub(crate) fn guest(doing: &'static str) -> impl FnOnce(GuestError) -> Self {
        move |source| MigrationError::Guest { doing, source }
    }

    /// Whether the channel broke because of its TLS session.
    pub(crate) fn is_of_tls(&self) -> bool {
        let (MigrationError::Send { source, .. } | MigrationError::ReturnPath(source)) = self else { return false };
        source.get_ref().is_some_and(|inner| inner.is::<crate::TlsError>())
    }

    /// This error of a source in a TLS session, in which the destination has said nothing.
    pub(crate) fn unheard(self) -> Self {
        match self {
            MigrationError::Send { .. } | MigrationError::NoVerdict | MigrationError::ReturnPath(_) => {
                MigrationError::SessionEnded { reason: self.into() }
            }
            other => other,
        }
    }
}

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
    /// A section for a device that this machine does not have.
    #[error("unknown section or instance '{idstr}' {instance_id}: {advice}")]
    UnknownSection {
        /// The section's name.
        idstr: CountedString,
        /// Its instance.
        instance_id: u32,
        /// What the operator may do about it; [`Devices::advice`](super::Devices::advice).
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

/// A file is called by its path, as by QEMU.
fn opened(address: &Address) -> String {
    match address {
        Address::File { path, .. } => path.display().to_string(),
        other => other.to_string(),
    }
}

/// The system's words without their number, as QEMU gives them.
pub(crate) fn reason(source: &io::Error) -> String {
    let text = source.to_string();
    text.split_once(" (os error").map_or(text.as_str(), |(words, _)| words).into()
}

fn missing_channels(main: bool, pages: &[u8]) -> String {
    let main = main.then(|| "the main channel".to_owned());
    let pages = pages.iter().map(|number| format!("page channel {number}"));
    let names: Vec<_> = main.into_iter().chain(pages).collect();
    format!("{} {}", names.join(", "), if names.len() == 1 { "is" } else { "are" })
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
