//! The connections of a source, which may be replaced when the guest went before its memory.

use super::Engine;
use crate::MigrationError;
use crate::ram_sender::RamSender;
use qevm_wire::PageGeometry;
use std::sync::Arc;
use std::thread;

impl Engine<'_, '_> {
    /// Reads the return path in a thread of its own, if there is one.
    pub(super) fn listen(&mut self) -> Result<(), MigrationError> {
        let Some(return_path) = self.return_path.clone() else { return Ok(()) };
        let (guest, connections, urgent) = (self.guest, self.connections.clone(), self.urgent);
        let listening = move || {
            let ram = RamSender::new(guest.ram(), PageGeometry::X86);
            return_path.listen(&*connections.main, |path| urgent.serve(&ram, path));
            if return_path.answers().has_failed() {
                connections.close();
            }
        };
        let listener = thread::Builder::new().name("return-path".into()).spawn_scoped(self.scope, listening);
        let listener =
            listener.map_err(|error| MigrationError::guest("start a thread for the return path")(error.into()))?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Waits until the return path was read to its end.
    pub(super) fn stop_listening(&mut self) {
        if let Some(listener) = self.listener.take() {
            // What it has heard stays.
            let _ = listener.join();
        }
    }

    /// The connections are closed. Goes on over others, when there are some.
    pub(super) fn await_connection(&mut self, why: String) -> Result<(), MigrationError> {
        // What still comes on the old ones must not be taken for what comes on the new ones.
        self.stop_listening();
        tracing::warn!("postcopy is paused until 'migrate' with 'resume': {why}");
        let Some(connections) = self.job.next_connections(why) else { return Ok(()) };
        self.connections = Arc::new(connections);
        self.urgent.forget();
        self.job.attach(self.connections.all())?;
        if let Some(return_path) = &self.return_path {
            self.core.reconnected(&mut return_path.answers())?;
        }
        self.listen()
    }
}
