//! What is left of the state of devices when the guest is paused, for page channels: whichever is free reads the next
//! piece.

use crate::{IterativeDevice, MigrationError};
use parking_lot::Mutex;
use qevm_multifd::{DeviceState, VfioDeviceState};
use qevm_wire::{CountedString, Writer};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a device's state in one packet (QEMU 10.0 to 11.1).
const PIECE: usize = 1 << 20;

/// The devices whose state goes over page channels, from when the guest is paused.
pub(crate) struct Transfers<'g> {
    devices: Vec<(CountedString, &'g dyn IterativeDevice)>,
    begun: OnceLock<Vec<Transfer>>,
    sent: AtomicU64,
}

struct Transfer {
    /// Number of the device.
    device: usize,
    progress: Mutex<Progress>,
}

struct Progress {
    /// The number of the next piece.
    index: u32,
    /// The last piece, until it is given.
    configuration: Option<Vec<u8>>,
}

/// A piece of a device's state.
pub(super) struct Piece {
    pub(super) packet: DeviceState,
    /// In front of the content.
    pub(super) header: Vec<u8>,
    pub(super) content: Vec<u8>,
    /// It is the last.
    pub(super) last: bool,
}

impl<'g> Transfers<'g> {
    /// Of these devices, by the names of their sections.
    pub(crate) fn new(devices: Vec<(CountedString, &'g dyn IterativeDevice)>) -> Self {
        Transfers { devices, begun: OnceLock::new(), sent: AtomicU64::new(0) }
    }

    /// The guest is paused: what is left of these devices may be sent, and then their configurations.
    pub(crate) fn begin(&self, configurations: Vec<(usize, Vec<u8>)>) {
        let transfer = |(device, configuration)| {
            let progress = Mutex::new(Progress { index: 0, configuration: Some(configuration) });
            Transfer { device, progress }
        };
        let _ = self.begun.set(configurations.into_iter().map(transfer).collect());
    }

    /// How many devices send their state so.
    pub(crate) fn len(&self) -> usize {
        self.begun.get().map_or(0, Vec::len)
    }

    /// Bytes of state that were read.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// The next piece of a transfer, in this buffer; `None` after the last.
    pub(super) fn next(&self, transfer: usize, mut content: Vec<u8>) -> Result<Option<Piece>, MigrationError> {
        let Some(transfer) = self.begun.get().and_then(|begun| begun.get(transfer)) else { return Ok(None) };
        let Some((idstr, device)) = self.devices.get(transfer.device) else { return Ok(None) };
        // Who reads a piece also numbers it: the numbers are in the order of reading.
        let mut progress = transfer.progress.lock();
        if progress.configuration.is_none() {
            return Ok(None);
        }
        content.clear();
        device.read(&mut content, PIECE).map_err(MigrationError::guest("read the state of a device"))?;
        self.sent.fetch_add(content.len() as u64, Ordering::Relaxed);
        let last = content.is_empty();
        if let Some(configuration) = progress.configuration.take_if(|_| last) {
            content = configuration;
        }
        let index = progress.index;
        progress.index += 1;
        drop(progress);
        let mut header = Writer::new();
        VfioDeviceState { index, config: last }.encode(&mut header);
        let packet = DeviceState::new(idstr.clone(), 0, (VfioDeviceState::LEN + content.len()) as u32);
        Ok(Some(Piece { packet, header: header.into_bytes(), content, last }))
    }
}
