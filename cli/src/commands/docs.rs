//! Manual pages and completion scripts, made from the command line's own description.

use super::Output;
use crate::args::{self, Cli};
use crate::failure::Stop;
use clap::CommandFactory;

/// Prints a completion script.
///
/// # Errors
/// [`Stop::Usage`] if standard output cannot be written.
pub fn completions(completions: &args::Completions) -> Result<(), Stop> {
    let mut script = Vec::new();
    clap_complete::generate(completions.shell, &mut Cli::command(), "qevm", &mut script);
    let mut out = Output::new();
    out.print(String::from_utf8_lossy(&script))?;
    out.finish()
}

/// Writes the manual pages.
///
/// # Errors
/// [`Stop::Usage`] if the directory cannot be written to.
pub fn man(man: &args::Man) -> Result<(), Stop> {
    clap_mangen::generate_to(Cli::command(), &man.dir)
        .map_err(|error| Stop::Usage(format!("{}: cannot be written to: {error}", man.dir.display())))
}
