//! The page channels of a destination: the threads that read them, and what they share with that of the main channel.

use crate::multifd::{Gate, PageStream, Settings, States, receive_pages};
use crate::ram_receiver::Listed;
use crate::{Channel, Guest, IterativeDevice, MigrationError};
use parking_lot::Mutex;
use qevm_wire::CountedString;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Scope};

/// What the threads share.
pub(super) struct PageChannels {
    settings: Settings,
    pub(super) gate: Gate,
    pub(super) states: States,
    /// The devices whose state comes here.
    devices: Vec<CountedString>,
    /// The RAM blocks, as soon as the main channel has listed them.
    pub(super) listed: OnceLock<Vec<Listed>>,
    /// The first failure on a page channel.
    failure: Mutex<Option<MigrationError>>,
    /// What happens on the page channels now is a consequence, and no failure.
    ended: AtomicBool,
}

impl PageChannels {
    /// Page channels by these settings, over which these devices send their state.
    pub(super) fn new(settings: Settings, devices: Vec<CountedString>) -> Self {
        PageChannels {
            gate: Gate::new(settings.channels),
            states: States::new(devices.iter().cloned(), settings.channels),
            settings,
            devices,
            listed: OnceLock::new(),
            failure: Mutex::default(),
            ended: AtomicBool::new(false),
        }
    }

    /// Reads the channels, and loads devices, each on a thread of its own. If one fails, the main channel is read no
    /// more.
    pub(super) fn start<'s, 'e>(
        &'s self,
        scope: &'s Scope<'s, 'e>,
        guest: &'s dyn Guest,
        main: &'s dyn Channel,
        pages: Vec<PageStream>,
    ) {
        let run = |doing, work: Box<dyn FnOnce() -> Result<(), MigrationError> + Send + 's>| {
            let spawned = thread::Builder::new().spawn_scoped(scope, move || {
                if let Err(error) = work()
                    && !self.ended.load(Ordering::SeqCst)
                {
                    self.fail(error, main);
                }
            });
            if let Err(error) = spawned {
                self.fail(MigrationError::Guest { doing, source: error.into() }, main);
            }
        };
        for mut stream in pages {
            let read = move || {
                let PageChannels { settings, listed, gate, states, .. } = self;
                receive_pages(guest, &mut stream, settings.compression, listed, gate, states)
            };
            run("start a thread for a page channel", Box::new(read));
        }
        for (number, idstr) in self.devices.iter().enumerate() {
            let load = move || match find(guest, idstr) {
                Some(device) => self.states.load(number, device),
                None => Ok(()),
            };
            run("start a thread for a device", Box::new(load));
        }
    }

    /// No channel waits for another any more, and what fails now is a consequence.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.abandon("the main channel is done");
    }

    /// Why a page channel has failed first.
    pub(super) fn failure(&self) -> Option<MigrationError> {
        self.failure.lock().take()
    }

    /// A page channel failed: it is no longer waited for.
    fn fail(&self, error: MigrationError, main: &dyn Channel) {
        let reason = error.to_string();
        self.failure.lock().get_or_insert(error);
        self.abandon(&reason);
        main.stop_reading();
    }

    fn abandon(&self, reason: &str) {
        self.gate.abandon(reason);
        self.states.abandon(reason);
    }
}

/// The device whose state comes in sections of this name, piece by piece.
pub(super) fn find<'g>(guest: &'g dyn Guest, idstr: &CountedString) -> Option<&'g dyn IterativeDevice> {
    guest.devices().iterative().into_iter().find(|device| *idstr == *device.idstr())
}
