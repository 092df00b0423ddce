//! How a command says what it found.

use clap::Args;

/// What the exit codes of most commands mean.
pub(super) const EXIT_CODES: &str = "Exit codes: 0 all holds; 1 the stream is bad (truncated included); 2 wrong usage.";

/// How output is written.
#[derive(Debug, Clone, Copy, Args)]
pub struct Output {
    /// Print one JSON object as the last line of standard output.
    #[arg(long)]
    pub json: bool,
}
