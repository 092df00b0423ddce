//! Manual pages and completion scripts, made from the command line's own description.

use super::Output;
use crate::args::{self, Cli};
use crate::failure::Stop;
use clap::CommandFactory;
use clap_complete::Shell;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

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
/// [`Stop::Usage`] if the directory cannot be made or written to.
pub fn man(man: &args::Man) -> Result<(), Stop> {
    pages(&man.dir)
}

/// Installs manual pages and completion scripts.
///
/// # Errors
/// [`Stop::Usage`] if it is not known where to, or a file cannot be written.
pub fn install(install: &args::InstallDocs) -> Result<(), Stop> {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local"));
    let prefix = install.prefix.clone().or_else(home);
    let prefix = prefix.ok_or_else(|| Stop::Usage("HOME is not set: say where to with --prefix".into()))?;
    let share = prefix.join("share");
    let mut out = Output::new();
    pages(&share.join("man/man1"))?;
    out.line(format!("{}: manual pages", share.join("man/man1").display()))?;
    for (shell, folder, file) in [
        (Shell::Bash, "bash-completion/completions", "qevm"),
        (Shell::Zsh, "zsh/site-functions", "_qevm"),
        (Shell::Fish, "fish/vendor_completions.d", "qevm.fish"),
    ] {
        let folder = share.join(folder);
        let path = folder.join(file);
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "qevm", &mut script);
        fs::create_dir_all(&folder).and_then(|()| fs::write(&path, script)).map_err(|error| cannot(&path, &error))?;
        out.line(format!("{}: completions of {shell}", path.display()))?;
    }
    out.finish()
}

fn pages(dir: &Path) -> Result<(), Stop> {
    let written = fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(Cli::command(), dir));
    written.map_err(|error| cannot(dir, &error))
}

fn cannot(path: &Path, error: &io::Error) -> Stop {
    Stop::Usage(format!("{}: cannot be written to: {error}", path.display()))
}
