//! The gate at the source.

use super::{SwitchoverAckFlow, SwitchoverError};
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// Holds the switchover back at the source until the acks are there.
///
/// ```
/// use qevm_returnpath::switchover::{SourceGate, SwitchoverAckFlow};
///
/// let mut gate = SourceGate::new(Some(SwitchoverAckFlow::Counted));
/// assert!(gate.is_open()); // no device wants an ack so far
/// gate.request("0000:00:02.0/vfio")?;
/// assert_eq!(gate.waiting().unwrap().to_string(), "0 of 1 switchover acks came (asked for by 0000:00:02.0/vfio)");
/// gate.ack()?;
/// assert!(gate.is_open());
/// assert!(gate.ack().is_err()); // one too many
/// # Ok::<(), qevm_returnpath::SwitchoverError>(())
/// ```
#[derive(Debug, Clone)]
pub struct SourceGate {
    flow: Option<SwitchoverAckFlow>,
    /// How many acks each device asked for.
    requests: BTreeMap<String, u64>,
    requested: u64,
    received: u64,
    stopped: bool,
}

/// What a closed gate waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AckWait {
    /// Acks that came.
    pub received: u64,
    /// Acks that are needed.
    pub expected: u64,
    /// The devices that asked for them. Empty in the legacy flow, where only the destination knows.
    pub devices: Vec<String>,
}

impl SourceGate {
    /// A gate for this flow; `None` if the capability is off, and the gate always open.
    pub fn new(flow: Option<SwitchoverAckFlow>) -> Self {
        let requested = u64::from(flow == Some(SwitchoverAckFlow::Legacy));
        SourceGate { flow, requests: BTreeMap::new(), requested, received: 0, stopped: false }
    }

    /// A device wants one more ack. Without effect in the legacy flow and with the capability off.
    ///
    /// # Errors
    /// [`SwitchoverError::RequestAfterStop`] if the guest is stopped; the migration fails then.
    pub fn request(&mut self, device: &str) -> Result<(), SwitchoverError> {
        if self.flow != Some(SwitchoverAckFlow::Counted) {
            return Ok(());
        }
        if self.stopped {
            return Err(SwitchoverError::RequestAfterStop { device: device.into() });
        }
        *self.requests.entry(device.into()).or_default() += 1;
        self.requested += 1;
        Ok(())
    }

    /// An ack came.
    ///
    /// # Errors
    /// [`SwitchoverError::Off`], [`SwitchoverError::BeforeRequest`] and [`SwitchoverError::TooMany`]; the migration
    /// fails then.
    pub fn ack(&mut self) -> Result<(), SwitchoverError> {
        let (received, expected) = (self.received + 1, self.requested);
        match self.flow {
            None => Err(SwitchoverError::Off),
            Some(_) if expected == 0 => Err(SwitchoverError::BeforeRequest),
            Some(_) if received > expected => Err(SwitchoverError::TooMany { received, expected }),
            Some(_) => {
                self.received = received;
                Ok(())
            }
        }
    }

    /// The guest was stopped: by the user, or for the switchover. The gate no longer holds anything back.
    pub fn guest_stopped(&mut self) {
        self.stopped = true;
    }

    /// The guest runs again; the gate is what it was before.
    pub fn guest_running(&mut self) {
        self.stopped = false;
    }

    /// True if the switchover may happen.
    pub fn is_open(&self) -> bool {
        self.stopped || self.received >= self.requested
    }

    /// What the gate waits for; `None` if it is open.
    pub fn waiting(&self) -> Option<AckWait> {
        (!self.is_open()).then(|| AckWait {
            received: self.received,
            expected: self.requested,
            devices: self.requests.keys().cloned().collect(),
        })
    }

    /// The return path is over.
    ///
    /// # Errors
    /// [`SwitchoverError::Missing`] if the gate is closed, and now will be for ever.
    pub fn ended(&self) -> Result<(), SwitchoverError> {
        self.waiting().map_or(Ok(()), |waiting| Err(SwitchoverError::Missing { waiting }))
    }

    /// The caller has waited long enough.
    ///
    /// # Errors
    /// [`SwitchoverError::TimedOut`] if the gate is closed.
    pub fn timed_out(&self) -> Result<(), SwitchoverError> {
        self.waiting().map_or(Ok(()), |waiting| Err(SwitchoverError::TimedOut { waiting }))
    }
}

impl fmt::Display for AckWait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} switchover acks came", self.received, self.expected)?;
        if self.devices.is_empty() {
            return f.write_str(" (the destination counts its devices)");
        }
        write!(f, " (asked for by {})", self.devices.join(", "))
    }
}
