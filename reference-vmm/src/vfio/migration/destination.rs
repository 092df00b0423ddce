//! How a device takes the state of a guest that arrives.

use super::{Inner, Migration};
use crate::vfio::{DeviceState, Failure, VfioError};
use rustix::io::Errno;

impl Migration {
    /// A guest is about to arrive here: the device takes its state from now on.
    ///
    /// # Errors
    /// [`Failure::Arc`], [`Failure::NoData`].
    pub fn receive(&self) -> Result<(), VfioError> {
        let mut inner = self.lock();
        if inner.state == DeviceState::Resuming && inner.data.is_some() && !inner.stale {
            return Ok(());
        }
        if inner.state == DeviceState::Resuming || inner.state == DeviceState::Error || inner.arrived {
            // Something is left of a guest that did not arrive. One that cannot be reset begins anew by way of STOP.
            if let Err(errno) = self.reset(&mut inner) {
                tracing::debug!(device = self.name, %errno, "the device cannot be reset");
                self.step(&mut inner, DeviceState::Stop)?;
            }
        }
        (inner.done, inner.arrived, inner.stale) = (0, false, false);
        self.step(&mut inner, DeviceState::Resuming)
    }

    /// Takes a piece of the state.
    ///
    /// # Errors
    /// [`Failure::Write`]; [`Failure::Misplaced`] when the device cannot take it.
    pub fn load(&self, piece: &[u8]) -> Result<(), VfioError> {
        let mut inner = self.lock();
        let written = self.write(&mut inner, piece);
        inner.stale |= written.is_err();
        written
    }

    fn write(&self, inner: &mut Inner, mut piece: &[u8]) -> Result<(), VfioError> {
        if inner.state != DeviceState::Resuming {
            return Err(self.fails(Failure::Misplaced { state: inner.state, what: "write its state" }));
        }
        inner.arrived = true;
        while !piece.is_empty() {
            let done = inner.done;
            let Some(data) = inner.data.as_mut() else {
                return Err(self.fails(Failure::Misplaced { state: inner.state, what: "write its state" }));
            };
            match data.write(piece) {
                Ok(count) if (1..=piece.len()).contains(&count) => {
                    piece = &piece[count..];
                    inner.done = done.saturating_add(count as u64);
                }
                Ok(found) => {
                    let expected = "1 byte to all that were given";
                    return Err(self.fails(Failure::Implausible { query: "write", found: found as u64, expected }));
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.fails(Failure::Write { done, errno })),
            }
        }
        Ok(())
    }

    /// All of the state has come, and the device takes it over.
    ///
    /// # Errors
    /// [`Failure::Arc`]: it does not like the state.
    pub fn loaded(&self) -> Result<(), VfioError> {
        let mut inner = self.lock();
        let taken = self.step(&mut inner, DeviceState::Stop);
        (inner.stale, inner.arrived) = (taken.is_err(), true);
        taken
    }

    /// The guest did not arrive: the device forgets what did.
    pub fn forget(&self) {
        let mut inner = self.lock();
        inner.arrived = false;
        if inner.state == DeviceState::Running || inner.state == DeviceState::Stop && inner.done == 0 {
            return;
        }
        if let Err(errno) = self.reset(&mut inner) {
            tracing::debug!(device = self.name, %errno, "the device cannot be reset");
            inner.stale = true;
        }
    }
}
