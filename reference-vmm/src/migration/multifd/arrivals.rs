//! Connections in whatever order they come.
//!
//! A source opens the main channel and the page channels at the same time, and nobody promises which arrives first, or which
//! first says something. Each connection is known by its first bytes.

use super::{PageStream, Settings};
use crate::migration::{
    Channel, Incoming, Listener, LoadError, MigrationError, Socket, channel::Target, socket::wait_readable,
};
use qevm_multifd::{ChannelSet, Init, Uuid, is_page_channel, layout::INIT_LEN};
use qevm_wire::Located;
use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

/// How long to wait for the channels that are missing when some have arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Patience(pub(crate) Duration);

impl Default for Patience {
    /// A source opens all of its channels at once; ten seconds without a new one mean that it has no more.
    fn default() -> Self {
        Patience(Duration::from_secs(10))
    }
}

/// A connection that has not said enough to be known.
struct Stranger {
    socket: Arc<Socket>,
    said: Vec<u8>,
}

/// Bytes that tell a page channel from a main channel.
const MAGIC_LEN: usize = 4;

/// Waits for the main channel and all page channels. For the first connection it waits for ever.
///
/// # Errors
/// [`MigrationError::MissingChannels`] if some do not come; [`MigrationError::Load`] for a connection that is no part of such a
/// migration, or of one with more channels.
pub(crate) fn gather(
    listener: &Listener,
    settings: &Settings,
    Patience(patience): Patience,
) -> Result<Incoming, MigrationError> {
    let mut set = ChannelSet::new(settings.channels, Some(Uuid::default()));
    let (mut main, mut pages, mut strangers) = (None, Vec::new(), Vec::<Stranger>::new());
    let mut deadline = None;
    while main.is_none() || !set.is_complete() {
        let left = deadline.map(|deadline: Instant| deadline.saturating_duration_since(Instant::now()));
        let sockets = strangers.iter().map(|stranger| stranger.socket.fd());
        let ready = wait_readable([listener.fd()].into_iter().chain(sockets), left)
            .map_err(|source| MigrationError::Listen { address: listener.address().clone(), source })?;
        let Some((&calling, speaking)) = ready.split_first() else {
            let missing = set.missing().collect();
            return Err(MigrationError::MissingChannels { main: main.is_none(), missing, patience });
        };
        deadline = Some(Instant::now() + patience);
        // From behind, so that the others keep their places.
        for index in speaking.iter().enumerate().filter(|(_, ready)| **ready).map(|(index, _)| index).rev() {
            match strangers[index].hear() {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    // Somebody else than a source may have knocked; if it was a source, its channel will be missed.
                    tracing::debug!(%error, "a connection ended before it said what it is");
                    strangers.swap_remove(index);
                    continue;
                }
            }
            let Stranger { socket, said } = strangers.swap_remove(index);
            match said.first_chunk::<INIT_LEN>() {
                Some(first) if is_page_channel(first) == Some(true) => {
                    let stream = PageStream::new(socket, first, settings.decoder())?;
                    set.arrived(&Init::new(Uuid::default(), stream.number())).map_err(super::stream::load_error)?;
                    pages.push(stream);
                }
                _ if main.is_some() => {
                    let what = "a second connection that is no page channel (capability 'postcopy-preempt'?)";
                    return Err(Located::new(LoadError::Unsupported(what.into()), 0).into());
                }
                _ => main = Some((socket as Arc<dyn Channel>, said)),
            }
        }
        if calling {
            strangers.push(Stranger { socket: Arc::new(listener.accept_socket()?), said: Vec::new() });
        }
    }
    // All have come, as the loop's condition says.
    let Some((main, first)) = main else { return Err(MigrationError::ChannelsEnded) };
    pages.sort_by_key(PageStream::number);
    Ok(Incoming { main, first, offset: 0, pages, settings: Some(settings.clone()), file: None })
}

impl Stranger {
    /// Takes in what has come, without waiting for more, and says whether the connection is known now.
    fn hear(&mut self) -> io::Result<bool> {
        let wanted = match is_page_channel(&self.said) {
            Some(true) => INIT_LEN,
            _ => MAGIC_LEN,
        };
        let mut bytes = [0; INIT_LEN];
        let count = match self.socket.read(&mut [Target::bytes(&mut bytes[..wanted - self.said.len()])]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => read?,
        };
        self.said.extend_from_slice(&bytes[..count]);
        Ok(match is_page_channel(&self.said) {
            Some(true) => self.said.len() == INIT_LEN,
            Some(false) => true,
            None => false,
        })
    }
}
