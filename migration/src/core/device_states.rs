//! The state of devices that comes over page channels, where its pieces may overtake each other.

use qevm_multifd::VfioDeviceState;
use qevm_savevm::vfio::flag;
use qevm_wire::{Blame, CountedString, Fault};
use std::collections::BTreeMap;
use std::time::Duration;

/// Bytes that may wait for pieces before them: a few for each channel (a QEMU 10.0 to 11.1 sends pieces of 1 MiB).
const ROOM: u64 = 64 << 20;
/// …and for each channel the one that it had in hand when the channels synchronised.
const PIECE: u64 = 1 << 20;
/// What a piece takes beside its bytes: many small ones are not for free.
const OVERHEAD: u64 = 256;
/// Longest time in which nothing arrives and nothing is loaded while the main channel waits for a device's state.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is wrong with the state of a device beside the pages, or with its configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceStateError {
    /// State for a device that gets none over page channels.
    #[error(
        "state of device '{idstr}' {instance_id} came over a page channel, where none is expected for it: the devices and their \
         x-migration-multifd-transfer must be the same on both sides"
    )]
    Unexpected {
        /// The section's name.
        idstr: CountedString,
        /// Its instance.
        instance_id: u32,
    },
    /// The configuration came on the main channel, though the state comes over page channels.
    #[error(
        "the configuration of device '{idstr}' came on the main channel, and is expected over a page channel: \
         x-migration-multifd-transfer must be the same on both sides"
    )]
    OnMain {
        /// The section's name.
        idstr: CountedString,
    },
    /// The FULL section has no configuration, though the state is to come on the main channel.
    #[error(
        "the section of device '{idstr}' is empty, and its configuration is expected in it: x-migration-multifd-transfer must be the \
         same on both sides"
    )]
    NotOnMain {
        /// The section's name.
        idstr: CountedString,
    },
    /// A piece that has come before.
    #[error("piece {index} of the state of device '{idstr}' came twice")]
    Again {
        /// The section's name.
        idstr: CountedString,
        /// The piece.
        index: u32,
    },
    /// A piece after the configuration, which is the last.
    #[error(
        "piece {index} of the state of device '{idstr}' came, but the configuration, which is the last, is piece {last}"
    )]
    AfterLast {
        /// The section's name.
        idstr: CountedString,
        /// The piece.
        index: u32,
        /// The configuration.
        last: u32,
    },
    /// The configuration is not framed as one.
    #[error("the configuration of device '{idstr}' has {what}")]
    Configuration {
        /// The section's name.
        idstr: CountedString,
        /// What is wrong.
        what: &'static str,
    },
    /// A piece has not come, and nothing more comes.
    #[error("piece {index} of the state of device '{idstr}' has not come")]
    Missing {
        /// The section's name.
        idstr: CountedString,
        /// The piece.
        index: u32,
    },
    /// Devices send their state over page channels after SWITCHOVER_START.
    #[error("the stream ends without SWITCHOVER_START, after which the state of device '{idstr}' may be loaded")]
    NoSwitchover {
        /// The section's name.
        idstr: CountedString,
    },
    /// A reader has given up, for a reason that was reported.
    #[error("a reader has given up: {reason}")]
    Abandoned {
        /// Why.
        reason: String,
    },
}

impl Blame for DeviceStateError {
    fn fault(&self) -> Fault {
        match self {
            DeviceStateError::Unexpected { .. }
            | DeviceStateError::OnMain { .. }
            | DeviceStateError::NotOnMain { .. } => Fault::Mismatch,
            DeviceStateError::Missing { .. } | DeviceStateError::Abandoned { .. } => Fault::Truncated,
            _ => Fault::Malformed,
        }
    }
}

/// Puts the pieces of devices' state in order. Readers on several threads share it under a lock, and wake each other
/// after each call.
///
/// `C` is what the driver keeps of a piece, for example its bytes. How many may wait is limited: a piece for which
/// there is no room holds its channel up. Data are loaded after SWITCHOVER_START only, because the state that came on
/// the main channel comes before them.
#[derive(Debug)]
pub struct DeviceStates<C> {
    devices: Vec<Device<C>>,
    room: u64,
    /// Bytes that wait.
    waiting: u64,
    switchover: bool,
    /// Page channels that are open.
    channels: u8,
    /// Pieces that were loaded.
    loaded: u64,
    wait: Option<Wait>,
    abandoned: Option<String>,
}

#[derive(Debug)]
struct Device<C> {
    idstr: CountedString,
    /// The piece that is next.
    next: u32,
    /// The configuration's number, when it is known.
    last: Option<u32>,
    pieces: BTreeMap<u32, (C, u64)>,
    /// The piece before the next one is being loaded.
    loading: bool,
    configuration: Option<C>,
}

/// The main channel waits.
#[derive(Debug, Clone, Copy)]
struct Wait {
    until: Duration,
    /// Bytes that were received and pieces that were loaded by then.
    progress: (u64, u64),
}

/// What is next for a device.
#[derive(Debug, PartialEq, Eq)]
pub enum NextPiece<C> {
    /// Load this, and say when that is [done](DeviceStates::loaded).
    Load(C),
    /// It has not come, or may not be loaded yet.
    Wait,
    /// Everything is loaded but the configuration, which is kept.
    Over,
}

impl<C> DeviceStates<C> {
    /// For the devices that get their state over this many page channels; their instance is 0.
    pub fn new(devices: impl IntoIterator<Item = CountedString>, channels: u8) -> Self {
        let device =
            |idstr| Device { idstr, next: 0, last: None, pieces: BTreeMap::new(), loading: false, configuration: None };
        DeviceStates {
            devices: devices.into_iter().map(device).collect(),
            room: ROOM + u64::from(channels) * PIECE,
            waiting: 0,
            switchover: false,
            channels,
            loaded: 0,
            wait: None,
            abandoned: None,
        }
    }

    /// The number of the device that a packet is for.
    ///
    /// # Errors
    /// [`DeviceStateError::Unexpected`].
    pub fn device(&self, idstr: &CountedString, instance_id: u32) -> Result<usize, DeviceStateError> {
        let place = self.devices.iter().position(|device| device.idstr == *idstr && instance_id == 0);
        place.ok_or_else(|| DeviceStateError::Unexpected { idstr: idstr.clone(), instance_id })
    }

    /// A piece of `len` bytes came for a device. It is given back if there is no room for it; when something has been
    /// loaded there may be.
    ///
    /// # Errors
    /// It has come before, or comes after the last; a reader has given up.
    pub fn put(
        &mut self,
        device: usize,
        header: VfioDeviceState,
        content: C,
        len: u64,
    ) -> Result<Option<C>, DeviceStateError> {
        self.healthy()?;
        let VfioDeviceState { index, config } = header;
        let Some(device) = self.devices.get_mut(device) else { return Ok(None) };
        let idstr = || device.idstr.clone();
        if index < device.next || device.pieces.contains_key(&index) {
            return Err(DeviceStateError::Again { idstr: idstr(), index });
        }
        // Where the end is, if this is known: by an earlier piece, or by this one.
        let after = |index, last| Err(DeviceStateError::AfterLast { idstr: idstr(), index, last });
        match device.last {
            Some(last) if index > last => return after(index, last),
            Some(last) if config => return after(last, index),
            _ => {}
        }
        if let Some((beyond, _)) = device.pieces.last_key_value().filter(|(beyond, _)| config && **beyond > index) {
            return after(*beyond, index);
        }
        let cost = len + OVERHEAD;
        // Whatever waits waits for the piece whose turn it is.
        if self.waiting + cost > self.room && index != device.next {
            return Ok(Some(content));
        }
        self.waiting += cost;
        device.last = device.last.or(config.then_some(index));
        device.pieces.insert(index, (content, cost));
        Ok(None)
    }

    /// The main channel met SWITCHOVER_START: what it brought of the devices' state was loaded.
    pub fn switchover(&mut self) {
        self.switchover = true;
    }

    /// What to do for a device.
    ///
    /// # Errors
    /// A reader has given up.
    pub fn next(&mut self, device: usize) -> Result<NextPiece<C>, DeviceStateError> {
        self.healthy()?;
        let Some(device) = self.devices.get_mut(device) else { return Ok(NextPiece::Over) };
        if device.configuration.is_some() {
            return Ok(NextPiece::Over);
        }
        if !self.switchover || device.loading {
            return Ok(NextPiece::Wait);
        }
        let Some((content, cost)) = device.pieces.remove(&device.next) else { return Ok(NextPiece::Wait) };
        self.waiting -= cost;
        if device.last == Some(device.next) {
            device.configuration = Some(content);
            return Ok(NextPiece::Over);
        }
        device.next += 1;
        device.loading = true;
        Ok(NextPiece::Load(content))
    }

    /// The device has the piece that was to be loaded.
    pub fn loaded(&mut self, device: usize) {
        self.loaded += 1;
        if let Some(device) = self.devices.get_mut(device) {
            device.loading = false;
        }
    }

    /// The stream on the main channel is over: until when that waits for the state of the devices, if it does.
    /// `received` is how many bytes have come over page channels; each of them gives it more time.
    ///
    /// # Errors
    /// What has not come; a reader has given up.
    pub fn main_waits(&mut self, received: u64, now: Duration) -> Result<Option<Duration>, DeviceStateError> {
        self.healthy()?;
        let Some(device) = self.devices.iter().find(|device| device.configuration.is_none()) else { return Ok(None) };
        let (idstr, index) = (device.idstr.clone(), device.next);
        if !self.switchover {
            return Err(DeviceStateError::NoSwitchover { idstr });
        }
        let is_here = device.loading || device.pieces.contains_key(&index);
        let progress = (received, self.loaded);
        let wait = self.wait.get_or_insert(Wait { until: now + PATIENCE, progress });
        if is_here || wait.progress != progress {
            *wait = Wait { until: now + PATIENCE, progress };
        } else if self.channels == 0 || now >= wait.until {
            return Err(DeviceStateError::Missing { idstr, index });
        }
        Ok(Some(wait.until))
    }

    /// A page channel was closed at the end of a packet.
    pub fn channel_end(&mut self) {
        self.channels = self.channels.saturating_sub(1);
    }

    /// The configurations, when all has come: the device's section and the last piece.
    pub fn configurations(&mut self) -> Vec<(CountedString, C)> {
        let configuration = |device: &mut Device<C>| Some((device.idstr.clone(), device.configuration.take()?));
        self.devices.iter_mut().filter_map(configuration).collect()
    }

    /// A reader has given up for this reason: all that wait do so, too.
    pub fn abandon(&mut self, reason: impl Into<String>) {
        self.abandoned.get_or_insert(reason.into());
    }

    fn healthy(&self) -> Result<(), DeviceStateError> {
        match &self.abandoned {
            Some(reason) => Err(DeviceStateError::Abandoned { reason: reason.clone() }),
            None => Ok(()),
        }
    }
}

/// The vmstate in a configuration that came over a page channel, where it is framed as in the FULL section.
///
/// # Errors
/// [`DeviceStateError::Configuration`].
pub(super) fn configuration<'a>(idstr: &CountedString, piece: &'a [u8]) -> Result<&'a [u8], DeviceStateError> {
    let fail = |what| Err(DeviceStateError::Configuration { idstr: idstr.clone(), what });
    let Some(rest) = piece.strip_prefix(&flag::DEV_CONFIG_STATE.to_be_bytes()) else {
        return fail("no DEV_CONFIG_STATE in front");
    };
    match rest.strip_suffix(&flag::END_OF_STATE.to_be_bytes()) {
        Some(vmstate) => Ok(vmstate),
        None => fail("no END_OF_STATE at its end"),
    }
}

#[cfg(test)]
mod tests;
