//! Why a migration failed.

mod load;
mod refused;
mod return_path;

pub use load::LoadError;
pub use refused::Refused;
pub use return_path::ReturnPathError;

use super::reason::reason;
use super::{Address, BadCapability, Doubt, Status, TlsError};
use qevm_wire::Located;
use std::error::Error;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::time::Duration;

/// Whatever a guest's own parts report; the engine adds what it was doing.
pub type GuestError = Box<dyn Error + Send + Sync>;

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
    /// The destination has loaded the initial data of all devices, and has not agreed to the switchover as often as it
    /// should have.
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
    Refused(#[from] Refused),
    /// The connections cannot be secured as the operator wants: the monitor's or the credentials' reason.
    #[error("{0}")]
    Tls(GuestError),
    /// The destination has ended the TLS session before it answered anything, as one does that does not want this side.
    /// TLS has no way to say why then.
    #[error(
        "{reason}: the destination has ended the TLS session before it answered anything; it may not allow this side's certificate, or want \
         one (its 'tls-authz' and 'verify-peer'): its own log says why"
    )]
    SessionEnded {
        /// What failed.
        reason: GuestError,
    },
    /// The destination broke the connection with nothing answered: so does one that takes a stream for a bad handshake.
    /// It may have said so in an alert, which is lost with the connection.
    #[error(
        "{reason}, before the destination has answered anything: it may expect TLS (set 'tls-creds' at both sides, or at neither)"
    )]
    HungUp {
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
    /// Something failed when the destination had been sent everything: whether the guest runs there is not known, and
    /// it stays paused here.
    #[error(
        "{reason}; the destination has everything, so the guest may run there, and stays paused here: see whether it runs at the \
         destination, and say 'cont' here only if it does not"
    )]
    Unsettled {
        /// What failed.
        reason: GuestError,
    },
    /// Pages cannot be sent in place on this connection (capability `zero-copy-send`). QEMU's words.
    #[error("Zero copy send feature not detected in host kernel")]
    NoZeroCopy {
        /// The system's reason.
        source: io::Error,
    },
    /// The kernel keeps no more memory in place that is being sent (capability `zero-copy-send`). QEMU's words.
    #[error("Process can't lock enough memory for using MSG_ZEROCOPY: {}", reason(source))]
    LockedMemory {
        /// The system's reason.
        source: io::Error,
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
    /// The destination had everything and has closed the connection before it was told to run the guest, which it does
    /// not.
    #[error("the destination had everything, but has not waited for the confirmation: it does not run the guest")]
    NotAwaited,
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
    /// The guest has arrived, and it is not certain that the source leaves it to this destination: it stays paused
    /// here, and an operator who can look at the source has to decide.
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
        source.get_ref().is_some_and(|inner| inner.is::<TlsError>())
    }

    /// This error of a source to which the destination has said nothing, in a TLS session (`tls`) or without.
    pub(crate) fn unheard(self, tls: bool) -> Self {
        let is_broken = |error: &io::Error| matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
        match self {
            MigrationError::Send { .. } | MigrationError::NoVerdict | MigrationError::ReturnPath(_) if tls => {
                MigrationError::SessionEnded { reason: self.into() }
            }
            MigrationError::Send { source: ref error, .. } | MigrationError::ReturnPath(ref error)
                if is_broken(error) =>
            {
                MigrationError::HungUp { reason: self.into() }
            }
            other => other,
        }
    }
}

/// A file is called by its path, as by QEMU.
fn opened(address: &Address) -> String {
    match address {
        Address::File { path, .. } => path.display().to_string(),
        other => other.to_string(),
    }
}

fn missing_channels(main: bool, pages: &[u8]) -> String {
    let main = main.then(|| "the main channel".to_owned());
    let pages = pages.iter().map(|number| format!("page channel {number}"));
    let names: Vec<_> = main.into_iter().chain(pages).collect();
    format!("{} {}", names.join(", "), if names.len() == 1 { "is" } else { "are" })
}
