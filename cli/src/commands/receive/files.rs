//! Where a migration is saved. Its files get their names when all of it has arrived, before SHUT 0 is sent.

use crate::args;
use crate::failure::Stop;
use parking_lot::Mutex;
use qevm_inspect::failure::Failure;
use qevm_inspect::output_file::{OutputFile, check_free, sync_names};
use qevm_inspect::source::Source;
use qevm_inspect::stream::{Inputs, Named};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Channels beside the main one: 255 page channels, and the second channel of postcopy.
const MAX_CHANNELS: usize = 256;

/// The files of one migration.
#[derive(Debug)]
pub(super) struct Files {
    force: bool,
    pub(super) main: Arc<OutputFile>,
    pub(super) return_path: Arc<OutputFile>,
    channels: Mutex<Vec<Arc<OutputFile>>>,
}

impl Files {
    /// Makes sure that everything can be saved: a migration is worth hours, and that it cannot must show before.
    ///
    /// # Errors
    /// [`Stop::Usage`] if one of the names is taken, or nothing can be written there.
    pub(super) fn new(receive: &args::Receive) -> Result<Self, Stop> {
        let (out, force) = (&receive.out, receive.force);
        let channels = (0..MAX_CHANNELS).map(|number| beside(out, &channel_suffix(number)));
        for path in channels {
            check_free(&path, force)?;
        }
        Ok(Files {
            force,
            main: Arc::new(OutputFile::create(out, force)?),
            return_path: Arc::new(OutputFile::create(&beside(out, RETURN_PATH), force)?),
            channels: Mutex::default(),
        })
    }

    /// A file for another channel.
    ///
    /// # Errors
    /// What the operating system says; there are too many.
    pub(super) fn channel(&self) -> io::Result<Arc<OutputFile>> {
        let mut channels = self.channels.lock();
        if channels.len() >= MAX_CHANNELS {
            return Err(io::Error::other(format!("more than {MAX_CHANNELS} channels")));
        }
        let path = beside(self.main.path(), &channel_suffix(channels.len()));
        let output = Arc::new(OutputFile::make(&path, self.force)?);
        channels.push(Arc::clone(&output));
        Ok(output)
    }

    /// The channel that was saved last did not belong to a migration.
    pub(super) fn forget(&self, output: &Arc<OutputFile>) {
        let mut channels = self.channels.lock();
        channels.retain(|channel| !Arc::ptr_eq(channel, output));
    }

    /// Everything that was saved, the main channel first and the return path last, if it was used.
    pub(super) fn all(&self, answered: bool) -> Vec<Arc<OutputFile>> {
        let channels = self.channels.lock();
        let all = std::iter::once(&self.main).chain(channels.iter());
        all.chain(answered.then_some(&self.return_path)).map(Arc::clone).collect()
    }

    /// Puts everything on the disk, under its name. If that is not possible, nothing has a name afterwards.
    ///
    /// # Errors
    /// The file that cannot be written or named, and why.
    pub(super) fn publish(&self, answered: bool) -> Result<(), Failure> {
        let all = self.all(answered);
        let failure = |output: &OutputFile, error| Failure::io(&output.path().display().to_string(), 0, &error);
        for output in &all {
            output.sync().map_err(|error| failure(output, error))?;
        }
        for (number, output) in all.iter().enumerate() {
            if let Err(error) = output.publish() {
                remove(&all[..number]);
                return Err(failure(output, error));
            }
        }
        sync_names(self.main.path()).map_err(|error| failure(&self.main, error)).inspect_err(|_| remove(&all))
    }

    /// Takes the names back.
    pub(super) fn withdraw(&self, answered: bool) {
        remove(&self.all(answered));
    }

    /// What was saved, to be read from the start.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn inputs(&self, answered: bool) -> Result<Inputs, Failure> {
        let mut named = self.all(answered).into_iter().map(|output| {
            let name = output.path().display().to_string();
            let opened = output.file().try_clone().and_then(Source::file);
            opened.map_err(|error| Failure::io(&name, 0, &error)).map(|source| Named { name, source })
        });
        let main = named.next().ok_or_else(|| Failure::mismatch("", 0, "", "there is no main channel"))??;
        let mut channels = named.collect::<Result<Vec<_>, _>>()?;
        let return_path = if answered { channels.pop().into_iter().collect() } else { Vec::new() };
        let containers = Vec::new();
        Ok(Inputs { main, offset: 0, containers, pages: None, channels, recovery: Vec::new(), return_path })
    }

    /// Gives everything a name that shows that it is not whole, and says which.
    ///
    /// # Errors
    /// The file that cannot be named, and why.
    pub(super) fn keep_partial(&self, answered: bool) -> Result<Vec<PathBuf>, Failure> {
        let all = self.all(answered);
        all.iter()
            .map(|output| {
                let path = beside(output.path(), PARTIAL);
                let kept = output.publish_as(&path);
                kept.map_err(|error| Failure::io(&path.display().to_string(), 0, &error)).map(|()| path)
            })
            .collect()
    }
}

fn remove(outputs: &[Arc<OutputFile>]) {
    for output in outputs {
        // Another process may have removed it.
        let _ = std::fs::remove_file(output.path());
    }
}

const RETURN_PATH: &str = ".return-path";
const PARTIAL: &str = ".partial";

fn channel_suffix(number: usize) -> String {
    format!(".channel-{number}")
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.to_owned().into_os_string();
    name.push(suffix);
    name.into()
}
