//! The deterministic core of the engines: state machines without I/O, threads and clocks.
//!
//! A machine takes what arrived, what the guest reported and what time it is, and says what to do next. A driver
//! does that: [`migrate`](crate::migrate) and [`receive`](crate::receive) with threads and blocking sockets,
//! the example `async_vmm` with tokio, a simulator with virtual time in a single thread.
//!
//! Time is a [`Duration`](std::time::Duration) since the start of the migration, and never goes back.
//!
//! | module | what |
//! |---|---|
//! | [`source`] | the source: what goes out, when the guest is paused, and who has it in the end |
//! | `answers` | what the destination has said to the source, and what follows from it |
//! | `sweep` | which pages are sent in which order, and which wait |
//! | [`destination`] | what is done with the main channel at the destination |
//! | `page_channel` | what is done with a page channel there |
//! | `synchronisation` | which of those waits for which |
//! | `device_states` | in which order pieces of devices' state from page channels are loaded |
//!
//! # The destination
//!
//! [`Destination`](destination::Destination) reads the main channel, [`PageChannel`] a page channel, and
//! [`Synchronisation`] says which of them waits for which. [`DeviceStates`] puts the pieces in order that devices send
//! over page channels. They hold no bytes of the stream and touch no memory: payload goes from the socket to where it
//! belongs without them.

mod answers;
pub mod destination;
mod device_states;
mod page_channel;
pub mod source;
mod sweep;
mod synchronisation;

use sweep::Sweep;

pub use device_states::{DeviceStateError, DeviceStates, NextPiece};
pub use page_channel::{PageAction, PageChannel, PageTurn};
pub use synchronisation::{Mark, Synchronisation};

use crate::{IterativeDevice, MigrationError};
use qevm_wire::CountedString;

/// What an end of a migration has to know of an iterative device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceOptions {
    /// The name of its section. The instance is 0.
    pub idstr: CountedString,
    /// Its name in messages and statistics.
    pub name: String,
    /// It takes part in capability `switchover-ack`: the destination acks when its initial data are loaded.
    pub switchover_ack: bool,
    /// What it sends when the guest is paused goes over page channels, where there are such.
    pub transfer: bool,
}

impl DeviceOptions {
    /// Those of a device with a section of this name, which is its name in messages as well, and nothing special about
    /// it.
    pub fn new(idstr: CountedString) -> Self {
        DeviceOptions { name: idstr.to_string(), idstr, switchover_ack: false, transfer: false }
    }

    /// Those of a device. `transfers` is whether devices may send their state over page channels in this migration.
    ///
    /// # Errors
    /// No section can have its name.
    pub(crate) fn of(device: &dyn IterativeDevice, transfers: bool) -> Result<Self, MigrationError> {
        let name = device.idstr();
        let idstr = CountedString::new(name).ok_or_else(|| MigrationError::Guest {
            doing: "name a device",
            source: format!("'{name}' is not 1 to 255 bytes long").into(),
        })?;
        let (switchover_ack, transfer) = (device.switchover_ack(), transfers && device.multifd_transfer());
        Ok(DeviceOptions { name: device.name().to_owned(), idstr, switchover_ack, transfer })
    }
}
