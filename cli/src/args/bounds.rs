//! `--max-spool` and `--max-ram`.

use super::size::parse_size;
use clap::Args;
use qevm_inspect::bounds::Spool;

/// Default of both bounds, as it is written on the command line.
pub(crate) const DEFAULT: &str = "128G";

/// The bounds that the command line sets.
#[derive(Debug, Clone, Args)]
pub struct Bounds {
    /// Put at most this much into temporary files (in TMPDIR): page contents, where a command needs them, and the rest
    /// of a stream that comes through a pipe. Bytes, or a number with K, M, G or T; more is an error of kind `limit`.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = DEFAULT)]
    pub max_spool: u64,
    /// Refuse guests with more memory than this where every byte of it has to be produced, whether it came or not: a
    /// SHA-256 of RAM, extracted memory, a converted or sent guest. Bytes, or a number with K, M, G or T; more is an
    /// error of kind `limit`.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = DEFAULT)]
    pub max_ram: u64,
}

impl Bounds {
    /// The bounds of one command.
    pub(crate) fn of_command(&self) -> qevm_inspect::bounds::Bounds {
        qevm_inspect::bounds::Bounds::new(self.max_spool, self.max_ram)
    }

    /// The room for temporary files that one command has.
    pub(crate) fn spool(&self) -> Spool {
        self.of_command().spool()
    }
}
