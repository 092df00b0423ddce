//! `qevm receive`: what can be said of a source.

use super::{Bounds, Output, ServerTls};
use clap::Args;
use qevm_multifd::Compression;
use std::path::PathBuf;

/// `qevm receive`.
#[derive(Debug, Args)]
#[command(after_help = RECEIVE_EXIT_CODES, after_long_help = RECEIVE_OUTCOMES)]
pub struct Receive {
    /// Where to listen: `tcp:HOST:PORT` or `unix:PATH`.
    #[arg(value_name = "ADDRESS")]
    pub address: String,
    /// Save the main channel here; further channels go to FILE.channel-N, the return path to FILE.return-path. Only
    /// their owner can read these files, which appear when the migration has arrived.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// How many multifd channels the source opens (its `multifd-channels`), 0 without multifd; another number is
    /// refused before the guest stops. Without it, channels are recognised as they come.
    #[arg(long, value_name = "N")]
    pub multifd_channels: Option<u8>,
    /// The source's `multifd-compression`; another method is refused. Without it, the channels' packets tell.
    #[arg(long, value_name = "METHOD")]
    pub multifd_compression: Option<Compression>,
    /// Acknowledge the switchover. For sources with capability `switchover-ack` of QEMU 8.1 to 11.0 or with a machine
    /// type up to 11.0; newer ones wait for no acknowledgement where no device asks for one.
    #[arg(long)]
    pub switchover_ack: bool,
    /// Give up when nothing of a migration comes for this many seconds: no main channel, no byte, or not all page
    /// channels. Without it a silent source is waited for, and page channels, or what is missing on them, for 30
    /// seconds. Connections that are no migration, or say nothing for 5 seconds, are dropped with a line that names
    /// what came, and do not count.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub tls: ServerTls,
    /// Keep what came of a migration that did not arrive whole, in files whose names end in `.partial`.
    #[arg(long)]
    pub keep_partial: bool,
    /// Replace output files that exist. A symbolic link is replaced itself, and not what it points to.
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub bounds: Bounds,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub output: Output,
}

const RECEIVE_EXIT_CODES: &str = "Exit codes: 0 the guest has arrived; 1 it has not; 2 wrong usage.";

const RECEIVE_OUTCOMES: &str = "\
Exit codes, if the source opened a return path (capability `return-path`):
  0  the source was told that its guest has arrived (SHUT 0) and has given it up: the guest is in FILE and nowhere else,
     on the disk before the source heard it. If the connection was reset right then, a line says that the source may
     not have heard it; look there before you start the guest.
  1  it was not told so: the guest is still the source's, and nothing is kept (but see --keep-partial).
  2  wrong usage: nothing was received.

Without a return path the source is told nothing. It gives up its guest when it has sent everything, which need not have
arrived. Code 0 then means that everything came, 1 that it did not, and in both cases the source says itself (QMP
query-migrate, query-status) whether its guest is still there. With --json the member `handover` is `confirmed` (0),
`doubtful` (0, reset), `refused` (1) or `unasked` (no return path).";
