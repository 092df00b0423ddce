//! The guest that comes.

use super::{Event, Exit, RunState, Vmm, Watch};
use parking_lot::MutexGuard;
use qevm_migration::{
    Address, Announcement, Arrival, BlockTimes, Endpoint, Incoming, Listener, MigrationError, Recovery, Refused, Rest,
    RestoreProgress, check_transport, receive,
};
use std::sync::Arc;
use std::thread;

/// Where an incoming migration comes from.
enum IncomingEndpoint {
    Socket(Listener),
    Open(Box<Incoming>),
}

impl Vmm {
    /// Listens for an incoming migration, or takes it from a command, descriptor or file, which goes on in a thread of
    /// its own.
    ///
    /// If it fails, the monitor [ends](Exit::IncomingFailed) when `exit_on_error` says so; otherwise it goes on waiting
    /// to be told where a guest comes from. In either case it stays, with the guest paused, if the guest has arrived
    /// and may run at the source.
    ///
    /// # Errors
    /// [`MigrationError::Listen`]; [`MigrationError::Tls`] for credentials that are not there;
    /// [`MigrationError::Capability`] for capabilities that do not go with the transport; and what [`Incoming::open`]
    /// says. Another address may be tried then.
    pub fn listen(self: &Arc<Self>, address: &Address, exit_on_error: bool) -> Result<(), MigrationError> {
        self.secure(&self.outgoing, Endpoint::Server)?;
        check_transport(address, &self.outgoing)?;
        self.check_devices()?;
        let endpoint = if address.is_socket() {
            IncomingEndpoint::Socket(Listener::bind(address)?)
        } else {
            IncomingEndpoint::Open(Box::new(Incoming::open(address, self.outgoing(), &mut *self.descriptors())?))
        };
        // Refused only while one is under way, which then has its own.
        let _ = self.incoming.set_capabilities(self.outgoing.capabilities());
        self.incoming.set_parameters(self.settings_of_arrival());
        self.incoming.set_tls(self.outgoing.tls());
        // A query finds an incoming migration from now on.
        let _ = self.incoming.begin();
        self.lock().listening = Some(match &endpoint {
            IncomingEndpoint::Socket(listener) => listener.address().clone(),
            IncomingEndpoint::Open(_) => address.clone(),
        });
        if let (IncomingEndpoint::Socket(_), Some(address)) = (&endpoint, self.listening()) {
            tracing::info!("waiting for a guest at {address}");
        }
        self.let_predecessor_go_on();
        let vmm = self.clone();
        thread::spawn(move || {
            let connections = match endpoint {
                IncomingEndpoint::Socket(listener) => Incoming::accept(&listener, &vmm.incoming, &vmm.profile()),
                IncomingEndpoint::Open(connections) => Ok(*connections),
            };
            match connections.and_then(|connections| receive(&*vmm, connections, &vmm.incoming, &vmm.profile())) {
                Ok(arrival) => vmm.arrived(arrival, exit_on_error),
                Err(error) => vmm.did_not_arrive(&error, exit_on_error),
            }
        });
        Ok(())
    }

    /// Whether an incoming migration was asked for at the start.
    pub fn expects_guest(&self) -> bool {
        self.lock().incoming
    }

    /// Whether an incoming migration was asked for that has not begun to listen, or has failed since.
    pub fn may_listen(&self) -> bool {
        let state = self.lock();
        state.incoming && state.listening.is_none()
    }

    fn arrived(self: &Arc<Self>, arrival: Arrival, exit_on_error: bool) {
        let reason = arrival.rest.is_some().then(|| {
            let from = self.listening().map_or_else(String::new, |address| format!(" from {address}"));
            format!("guest memory is still being loaded{from}")
        });
        reason.iter().for_each(|reason| self.block_migration(reason));
        // A client that sees the guest run sees how much of it is still to come.
        arrival.rest.iter().for_each(|rest| self.watch_rest(rest));
        let autostart = self.lock().autostart;
        let started = if arrival.running && autostart { self.start().map(|()| true) } else { Ok(false) };
        if let Err(error) = &started {
            // It has left the source, so that it must not be lost here.
            tracing::error!("the guest has arrived and cannot be started ({error}): fix the cause, then issue 'cont'");
        }
        if !started.unwrap_or(false) {
            self.lock().run_state = RunState::Paused;
        }
        self.announce(Announcement::of(&self.incoming.parameters()), "");
        let rest = if arrival.rest.is_some() { "; its memory is still being loaded" } else { "" };
        tracing::info!("the guest has arrived, and is {}{rest}", self.run_state().as_str());
        if let Err(error) = arrival.rest.map_or(Ok(()), |rest| self.load_rest(rest)) {
            // Still blocked: what is here is not all of the guest.
            return self.lost(&error, exit_on_error);
        }
        reason.iter().for_each(|reason| self.unblock_migration(reason));
        // As a QEMU: the guest runs when this is said.
        self.incoming.end(None);
    }

    /// Loads what the file still has, or waits until the guest has touched all of it, or until the source has sent all.
    fn load_rest(&self, rest: Rest) -> Result<(), MigrationError> {
        match rest {
            Rest::InFile(rest) => {
                let ahead = self.lock().load_ahead;
                if ahead { rest.load() } else { rest.serve() }
            }
            Rest::AtSource(rest) => rest.load(&self.incoming),
        }
    }

    fn watch_rest(&self, rest: &Rest) {
        let watch: Watch = match rest {
            Rest::InFile(rest) => Box::new(rest.watch()),
            Rest::AtSource(rest) => {
                *self.lock_recovery() = Some(rest.recovery());
                let block_times = Box::new(rest.watch_block_times());
                *self.block_times.lock() = Some(block_times);
                Box::new(rest.watch())
            }
        };
        *self.rest.lock() = Some(watch);
    }

    /// Gives up the connection over which guest memory comes (`migrate-pause`).
    ///
    /// # Errors
    /// [`Refused::NotInPostcopy`].
    pub fn pause_postcopy(&self) -> Result<(), Refused> {
        self.lock_recovery().as_ref().ok_or(Refused::NotInPostcopy)?.pause()
    }

    /// Takes the rest of guest memory from the next source that connects to `address`, a socket (`migrate-recover`).
    ///
    /// # Errors
    /// [`MigrationError::Refused`] unless a postcopy is paused; [`MigrationError::Listen`].
    pub fn recover_postcopy(&self, address: &Address) -> Result<(), MigrationError> {
        let recovery = self.lock_recovery().clone().filter(Recovery::is_paused);
        let recovery = recovery.ok_or(Refused::PostcopyNotPaused)?;
        let listener = Listener::bind(address)?;
        let listening = listener.address().clone();
        recovery.accept(listener, self.incoming.tls())?;
        self.lock().listening = Some(listening);
        Ok(())
    }

    fn lock_recovery(&self) -> MutexGuard<'_, Option<Recovery>> {
        self.recovery.lock()
    }

    /// How far the loading of guest memory is, if it goes on while the guest runs.
    pub fn restore_progress(&self) -> Option<RestoreProgress> {
        self.rest.lock().as_ref().map(|progress| progress())
    }

    /// How long the guest has waited for its memory, with capability `postcopy-blocktime`, if it came before it.
    pub fn block_times(&self) -> Option<BlockTimes> {
        self.block_times.lock().as_ref()?()
    }

    /// Whether memory of a guest that runs already is loaded before it is touched, too. It is, unless this says
    /// otherwise.
    pub fn set_load_ahead(&self, ahead: bool) {
        self.lock().load_ahead = ahead;
    }

    /// The guest runs, or was to run, and a part of its memory cannot be had.
    fn lost(&self, error: &MigrationError, exit_on_error: bool) {
        self.machine.lose_memory(error.to_string());
        tracing::error!("the guest is stopped for good, because its memory cannot be loaded: {error}");
        self.emit(Event::now("STOP", None));
        self.incoming.end(Some(error));
        if exit_on_error {
            self.end(Exit::IncomingFailed(format!("load of migration failed: {error}")));
        }
    }

    fn did_not_arrive(&self, error: &MigrationError, exit_on_error: bool) {
        if matches!(error, MigrationError::Undecided(_)) {
            // It may be nowhere else, so that it must not be lost here; nor may it run here if it does elsewhere.
            tracing::error!("{error}");
            self.lock().run_state = RunState::Paused;
            return self.incoming.end(Some(error));
        }
        if exit_on_error {
            self.incoming.end(Some(error));
            return self.end(Exit::IncomingFailed(format!("load of migration failed: {error}")));
        }
        tracing::warn!("load of migration failed: {error}");
        self.machine.vfio().forget();
        let mut state = self.lock();
        (state.listening, state.loaded, state.tried) = (None, false, true);
        drop(state);
        // When this is said, another try is free.
        self.incoming.end(Some(error));
    }
}
