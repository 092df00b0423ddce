//! The connections of one migration: the main channel, and the page channels if capability `multifd` is on.

use super::{
    Address, Channel, Job, Listener, LoadError, MigrationError, Socket,
    multifd::{PageStream, Patience, Settings, gather},
};
use qevm_wire::{Located, Profile};
use std::sync::Arc;

/// The connections of a source.
#[derive(Debug, Clone)]
pub struct Outgoing {
    pub(crate) main: Arc<dyn Channel>,
    pub(crate) pages: Vec<Arc<dyn Channel>>,
}

impl Outgoing {
    /// Connects to a destination, with as many page channels as `job` has settings for.
    ///
    /// # Errors
    /// [`MigrationError::Connect`] with the system's reason.
    pub fn connect(address: &Address, job: &Job) -> Result<Self, MigrationError> {
        let main = Socket::connect(address)?;
        let channels = if job.capabilities().multifd { job.parameters().multifd_channels } else { 0 };
        let pages = (0..channels).map(|_| Socket::connect(address)).collect::<Result<_, _>>()?;
        Ok(Outgoing { main, pages })
    }

    /// Ends all connections at once.
    pub(crate) fn close(&self) {
        self.all().for_each(|channel| channel.close());
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<dyn Channel>> {
        std::iter::once(&self.main).chain(&self.pages)
    }
}

impl From<Arc<dyn Channel>> for Outgoing {
    /// A main channel alone.
    fn from(main: Arc<dyn Channel>) -> Self {
        Outgoing { main, pages: Vec::new() }
    }
}

/// The connections of a destination.
#[derive(Debug)]
pub struct Incoming {
    pub(crate) main: Arc<dyn Channel>,
    /// What was read from the main channel already.
    pub(crate) first: Vec<u8>,
    pub(crate) pages: Vec<PageStream>,
    pub(crate) settings: Option<Settings>,
}

impl Incoming {
    /// Waits for a source, and for all of its page channels if `job` has capability `multifd`.
    ///
    /// # Errors
    /// [`MigrationError::Listen`] with the system's reason. With `multifd` also [`MigrationError::MissingChannels`] when no
    /// further channel has come for ten seconds, and [`MigrationError::Load`] for a connection that does not belong here.
    pub fn accept(listener: &Listener, job: &Job, profile: &Profile) -> Result<Self, MigrationError> {
        match Settings::of(job.capabilities(), &job.parameters(), profile) {
            Some(settings) => gather(listener, &settings, Patience::default()),
            None => {
                let socket = listener.accept_socket()?;
                // A source has opened all of its page channels when it says the first word. Without them its stream has
                // no pages, and not every release's stream tells.
                if listener.has_more_callers(&socket)? {
                    return Err(Located::new(LoadError::MultifdOff, 0).into());
                }
                let main: Arc<dyn Channel> = Arc::new(socket);
                Ok(main.into())
            }
        }
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<dyn Channel>> {
        std::iter::once(&self.main).chain(self.pages.iter().map(PageStream::channel))
    }
}

impl From<Arc<dyn Channel>> for Incoming {
    /// A main channel alone.
    fn from(main: Arc<dyn Channel>) -> Self {
        Incoming { main, first: Vec::new(), pages: Vec::new(), settings: None }
    }
}
