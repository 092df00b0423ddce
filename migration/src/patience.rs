//! How long connections have to say what they are.

use crate::watch::Watch;
use std::sync::Arc;
use std::time::Duration;

/// A time that no migration lives to see the end of.
pub(crate) const NO_END: Duration = Duration::from_secs(100 * 365 * 86_400);

/// How long is waited for what. `None` is as long as `x-handshake-timeout` says at the time: it may change during
/// the wait.
#[derive(Debug, Clone, Default)]
pub(crate) struct Patience {
    /// For a connection to say what it is.
    pub(crate) silence: Option<Duration>,
    /// For another channel of a source, when some have arrived.
    pub(crate) channels: Option<Duration>,
    /// Who watches over the channels of a source.
    pub(crate) watch: Arc<Watch>,
}

impl Patience {
    /// A source says what a connection is as soon as it is connected, and its main channel as soon as its page channels
    /// are. It opens all of its channels at once; so long without a new one means that it has no more.
    pub(crate) fn of(watch: Arc<Watch>) -> Self {
        Patience { watch, ..Patience::default() }
    }

    pub(crate) fn silence(&self) -> Duration {
        self.silence.unwrap_or_else(|| self.handshake())
    }

    pub(crate) fn channels(&self) -> Duration {
        self.channels.unwrap_or_else(|| self.handshake())
    }

    fn handshake(&self) -> Duration {
        self.watch.timeouts().handshake().unwrap_or(NO_END)
    }
}
