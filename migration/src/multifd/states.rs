//! The state of devices that comes over page channels: the order of the core between threads.

use crate::core::{DeviceStateError, DeviceStates, NextPiece};
use crate::{IterativeDevice, LoadError, MigrationError};
use parking_lot::{Condvar, Mutex, MutexGuard};
use qevm_multifd::{DeviceState, VfioDeviceState};
use qevm_wire::{CountedString, Located};
use std::time::Instant;

/// Buffers that are kept.
const SPARE: usize = 8;

/// Takes pieces of devices' state from the threads of the page channels, and gives them in order to a thread for each
/// device.
#[derive(Debug)]
pub(crate) struct States {
    /// Pieces with the headers that are in front of them.
    order: Mutex<DeviceStates<Vec<u8>>>,
    /// Buffers of pieces that were loaded, for others: fresh memory costs more than what is copied into it.
    spare: Mutex<Vec<Vec<u8>>>,
    changed: Condvar,
    start: Instant,
}

impl States {
    /// For devices whose state comes over this many page channels.
    pub(crate) fn new(devices: impl IntoIterator<Item = CountedString>, channels: u8) -> Self {
        let order = Mutex::new(DeviceStates::new(devices, channels));
        States { order, spare: Mutex::default(), changed: Condvar::new(), start: Instant::now() }
    }

    /// A buffer for the content of a packet, which holds anything.
    pub(super) fn spare(&self) -> Vec<u8> {
        self.buffers().pop().unwrap_or_default()
    }

    /// Takes the content of a packet, when there is room for it.
    pub(super) fn put(&self, packet: &DeviceState, mut content: Vec<u8>) -> Result<(), LoadError> {
        let header = VfioDeviceState::decode(&content).map_err(|error| LoadError::Multifd(error.kind))?;
        let mut order = self.lock();
        let device = order.device(&packet.idstr, packet.instance_id)?;
        while let Some(back) = order.put(device, header, content, packet.payload_len.into())? {
            content = back;
            self.changed.wait(&mut order);
        }
        drop(order);
        self.changed.notify_all();
        Ok(())
    }

    /// The main channel met SWITCHOVER_START.
    pub(crate) fn switchover(&self) {
        self.lock().switchover();
        self.changed.notify_all();
    }

    /// Loads the state of a device as it comes, until it is complete or a thread has given up.
    pub(crate) fn load(&self, number: usize, device: &dyn IterativeDevice) -> Result<(), MigrationError> {
        loop {
            let mut order = self.lock();
            let piece = loop {
                match order.next(number) {
                    Ok(NextPiece::Load(piece)) => break piece,
                    Ok(NextPiece::Wait) => self.changed.wait(&mut order),
                    // Who has given up has said why.
                    Ok(NextPiece::Over) | Err(_) => {
                        drop(order);
                        self.changed.notify_all();
                        return Ok(());
                    }
                }
            };
            drop(order);
            // There is room for another.
            self.changed.notify_all();
            let state = piece.get(VfioDeviceState::LEN..).unwrap_or_default();
            device.load(state).map_err(|error| Located::new(LoadError::Devices(error), 0))?;
            let mut spare = self.buffers();
            if spare.len() < SPARE {
                spare.push(piece);
            }
            drop(spare);
            self.lock().loaded(number);
            self.changed.notify_all();
        }
    }

    /// Waits until all devices have their state, and gives their configurations. `received` is how many bytes have come
    /// so far.
    pub(crate) fn finish(&self, received: impl Fn() -> u64) -> Result<Vec<(CountedString, Vec<u8>)>, DeviceStateError> {
        let mut order = self.lock();
        loop {
            let now = self.start.elapsed();
            let Some(until) = order.main_waits(received(), now)? else {
                let mut configurations = order.configurations();
                configurations.iter_mut().for_each(|(_, content)| drop(content.drain(..VfioDeviceState::LEN)));
                return Ok(configurations);
            };
            self.changed.wait_for(&mut order, until.saturating_sub(now));
        }
    }

    /// A page channel was closed at the end of a packet.
    pub(super) fn channel_end(&self) {
        self.lock().channel_end();
        self.changed.notify_all();
    }

    /// Lets all threads that wait give up, for this reason.
    pub(crate) fn abandon(&self, reason: impl Into<String>) {
        self.lock().abandon(reason);
        self.changed.notify_all();
    }

    fn buffers(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.spare.lock()
    }

    fn lock(&self) -> MutexGuard<'_, DeviceStates<Vec<u8>>> {
        self.order.lock()
    }
}
