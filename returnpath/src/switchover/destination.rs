//! The gate at the destination.

use super::{SwitchoverAckFlow, SwitchoverError};
use alloc::collections::BTreeMap;
use alloc::string::String;

/// Says when the destination sends [`Message::SwitchoverAck`](crate::Message::SwitchoverAck).
///
/// ```
/// use qevm_returnpath::switchover::{Ack, DestinationGate, SwitchoverAckFlow};
///
/// let mut gate = DestinationGate::new(Some(SwitchoverAckFlow::Legacy));
/// gate.announce("vfio 0")?;
/// gate.announce("vfio 1")?;
/// assert_eq!(gate.return_path_opened()?, Ack::Hold);
/// assert_eq!(gate.agree("vfio 1")?, Ack::Hold);
/// assert_eq!(gate.agree("vfio 0")?, Ack::Send); // the last one
/// # Ok::<(), qevm_returnpath::SwitchoverError>(())
/// ```
#[derive(Debug, Clone)]
pub struct DestinationGate {
    flow: Option<SwitchoverAckFlow>,
    /// The devices that want to be asked, and whether they have agreed.
    devices: BTreeMap<String, bool>,
    opened: bool,
}

/// Whether to send an ack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[must_use]
pub enum Ack {
    /// Send one, now.
    Send,
    /// Send none.
    Hold,
}

impl DestinationGate {
    /// A gate for this flow; `None` if the capability is off, and no ack is ever sent.
    pub fn new(flow: Option<SwitchoverAckFlow>) -> Self {
        DestinationGate { flow, devices: BTreeMap::new(), opened: false }
    }

    /// A device wants to be asked. In the legacy flow before the return path is opened, so that it is counted.
    ///
    /// # Errors
    /// [`SwitchoverError::Order`] if it is too late.
    pub fn announce(&mut self, device: &str) -> Result<(), SwitchoverError> {
        if self.opened && self.flow == Some(SwitchoverAckFlow::Legacy) {
            return Err(SwitchoverError::Order {
                what: "announcement of a device",
                place: "comes after the return path was opened",
            });
        }
        self.devices.entry(device.into()).or_insert(false);
        Ok(())
    }

    /// `MIG_CMD_OPEN_RETURN_PATH` was met. The ack that may be due goes out before any other message.
    ///
    /// # Errors
    /// [`SwitchoverError::OpenedTwice`] if it was met before.
    pub fn return_path_opened(&mut self) -> Result<Ack, SwitchoverError> {
        if core::mem::replace(&mut self.opened, true) {
            return Err(SwitchoverError::OpenedTwice);
        }
        Ok(match self.flow {
            Some(SwitchoverAckFlow::Legacy) if self.devices.is_empty() => Ack::Send,
            _ => Ack::Hold,
        })
    }

    /// A device agrees to the switchover: a VFIO device each time it met `INIT_DATA_SENT`.
    ///
    /// # Errors
    /// [`SwitchoverError::UnknownDevice`]; [`SwitchoverError::Repeated`] in the legacy flow, where each agrees once;
    /// [`SwitchoverError::NoReturnPath`] before that is open. All of them are the peer's fault, whose stream tells a
    /// device to agree.
    pub fn agree(&mut self, device: &str) -> Result<Ack, SwitchoverError> {
        let Some(flow) = self.flow else { return Ok(Ack::Hold) };
        if !self.opened {
            return Err(SwitchoverError::NoReturnPath { device: device.into() });
        }
        let Some(agreed) = self.devices.get_mut(device) else {
            return Err(SwitchoverError::UnknownDevice { device: device.into() });
        };
        match (core::mem::replace(agreed, true), flow) {
            (_, SwitchoverAckFlow::Counted) => Ok(Ack::Send),
            (true, _) => Err(SwitchoverError::Repeated { device: device.into() }),
            (false, _) if self.waiting().next().is_none() => Ok(Ack::Send),
            (false, _) => Ok(Ack::Hold),
        }
    }

    /// The devices that have not agreed so far.
    pub fn waiting(&self) -> impl Iterator<Item = &str> {
        self.devices.iter().filter(|(_, agreed)| !**agreed).map(|(device, _)| device.as_str())
    }
}
