//! `virtio-serial-device` with its ports, `virtconsole` and `virtserialport` (virtio 1.2, 5.3).

use super::chain::Chain;
use super::model::{Access, Model};
use super::queue::{ANY_LAYOUT, EVENT_IDX, INDIRECT_DESC, NOTIFY_ON_EMPTY, RingError};
use crate::devices::chardev::Chardev;
use qevm_microvm::state::{VirtioDeviceState, VirtioPortState};
use qevm_microvm::virtio::MAX_PORTS;
use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// Device number.
const ID: u32 = 3;
/// What is offered (HostFeatures of 7.2.22, 10.0.13, 11.1.3).
const FEATURES: u64 = MULTIPORT | EMERG_WRITE | NOTIFY_ON_EMPTY | ANY_LAYOUT | INDIRECT_DESC | EVENT_IDX;
/// `VIRTIO_CONSOLE_F_MULTIPORT`
const MULTIPORT: u64 = 1 << 1;
/// `VIRTIO_CONSOLE_F_EMERG_WRITE`
const EMERG_WRITE: u64 = 1 << 2;
/// QueueNumMax of 11.1.3, and `virtio/ringsize` of 7.2.22: a port's queues, and the two of the control port.
const QUEUE: u32 = 128;
const CONTROL_QUEUE: u32 = 32;

const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
/// Offset of `emerg_wr` in the configuration space.
const EMERGENCY_WRITE: usize = 8;
/// Bytes that go out in one step, so that a long buffer holds nothing up.
const STEP: u64 = 1 << 20;
/// Most bytes of one input.
const INPUT: u64 = 4096;

/// Control messages.
mod control {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const PORT_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const CONSOLE_PORT: u16 = 4;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
    /// Port, event, value.
    pub(super) const LEN: usize = 8;
}

/// A port.
#[derive(Debug)]
struct SerialPort {
    id: u32,
    console: bool,
    name: String,
    chardev: Chardev,
    guest_connected: bool,
    /// The guest was told that the port is connected.
    host_connected: bool,
    /// What the guest sends and was not taken completely, and how many bytes were.
    pending: Option<(Chain, u64)>,
}

impl SerialPort {
    fn receive_queue(&self) -> usize {
        if self.id == 0 { 0 } else { 2 + 2 * self.id as usize }
    }

    fn transmit_queue(&self) -> usize {
        self.receive_queue() + 1
    }

    /// Writes out what the guest sends, as far as it is taken, [`STEP`] bytes at most.
    fn flush(&mut self, access: &mut Access<'_>) -> Result<(), RingError> {
        let (queue, mut left) = (self.transmit_queue(), STEP);
        while left > 0 {
            let (chain, done) = match self.pending.take() {
                Some(pending) => pending,
                None => match access.pop(queue)? {
                    Some(chain) => (chain, 0),
                    None => return Ok(()),
                },
            };
            let mut bytes = [0; INPUT as usize];
            let len = if self.chardev.is_connected() { chain.read(access.memory, done, &mut bytes)? } else { 0 };
            if len == 0 {
                access.push(queue, chain.head, 0)?;
                continue;
            }
            match self.chardev.write(&bytes[..len]) {
                Ok(written) => {
                    left = left.saturating_sub(written as u64);
                    self.pending = Some((chain, done + written as u64));
                }
                Err(error) => {
                    self.pending = Some((chain, done));
                    if error.kind() == io::ErrorKind::WouldBlock {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// The buffer for input, if the guest wants any.
    fn room(&self, access: &Access<'_>) -> Result<Option<Chain>, RingError> {
        if self.guest_connected { access.peek(self.receive_queue()) } else { Ok(None) }
    }

    /// Gives the guest what has come, one buffer of it.
    fn receive(&mut self, access: &mut Access<'_>) -> Result<(), RingError> {
        let Some(chain) = self.room(access)? else { return Ok(()) };
        let mut bytes = [0; INPUT as usize];
        let room = chain.writable_len().min(INPUT) as usize;
        let len = self.chardev.read(&mut bytes[..room]);
        if len == 0 {
            return Ok(());
        }
        let queue = self.receive_queue();
        if let Some(chain) = access.pop(queue)? {
            let written = chain.write(access.memory, 0, &bytes[..len])?;
            access.push(queue, chain.head, written as u32)?;
        }
        Ok(())
    }
}

/// The device.
#[derive(Debug, Default)]
pub struct Serial {
    ports: Vec<SerialPort>,
}

impl Serial {
    /// Adds a console or a port; consoles have numbers from 0 and ports from 1 on, as QEMU gives them. The name is told
    /// to the guest if it is not empty. False if there is no number left.
    pub fn add(&mut self, console: bool, name: &str, chardev: Chardev) -> bool {
        let first = if console { 0 } else { 1 };
        let Some(id) = (first..MAX_PORTS).find(|id| self.ports.iter().all(|port| port.id != *id)) else { return false };
        let host_connected = chardev.is_connected();
        let (guest_connected, pending) = (false, None);
        self.ports.push(SerialPort {
            id,
            console,
            name: name.into(),
            chardev,
            guest_connected,
            host_connected,
            pending,
        });
        true
    }

    /// Tells the guest something, if it has a buffer for it: as QEMU does, it is not told later.
    fn tell(&self, access: &mut Access<'_>, port: u32, event: u16, value: u16, more: &[u8]) -> Result<(), RingError> {
        if access.features & MULTIPORT == 0 {
            return Ok(());
        }
        let Some(chain) = access.pop_for_reply(CONTROL_RECEIVE)? else { return Ok(()) };
        let message = [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes(), more].concat();
        let written = chain.write(access.memory, 0, &message)?;
        access.push(CONTROL_RECEIVE, chain.head, written as u32)
    }

    fn control(&mut self, access: &mut Access<'_>, message: [u8; control::LEN]) -> Result<(), RingError> {
        let [a, b, c, d, e, f, g, h] = message;
        let (id, event, value) =
            (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        if event == control::DEVICE_READY {
            if value == 0 {
                tracing::warn!("the guest's driver of virtio-serial has failed");
                return Ok(());
            }
            return self.ports.iter().try_for_each(|port| self.tell(access, port.id, control::PORT_ADD, 1, &[]));
        }
        let Some(at) = self.ports.iter().position(|port| port.id == id) else {
            tracing::warn!(id, event, "the guest speaks of a port of virtio-serial that is not there");
            return Ok(());
        };
        match event {
            control::PORT_READY if value != 0 => {
                let port = &self.ports[at];
                if port.console {
                    self.tell(access, id, control::CONSOLE_PORT, 1, &[])?;
                }
                if !port.name.is_empty() {
                    self.tell(access, id, control::PORT_NAME, 1, port.name.as_bytes())?;
                }
                if port.host_connected {
                    self.tell(access, id, control::PORT_OPEN, 1, &[])?;
                }
                Ok(())
            }
            control::PORT_OPEN => {
                self.ports[at].guest_connected = value != 0;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Tells the guest of listeners that came and went.
    fn tell_listeners(&mut self, access: &mut Access<'_>) -> Result<(), RingError> {
        for at in 0..self.ports.len() {
            let (id, now) = (self.ports[at].id, self.ports[at].chardev.is_connected());
            if now != self.ports[at].host_connected {
                self.ports[at].host_connected = now;
                self.tell(access, id, control::PORT_OPEN, now.into(), &[])?;
            }
        }
        Ok(())
    }

    /// A driver without ports of its own does not say that it has opened the first one.
    fn open_first(&mut self, access: &Access<'_>) {
        if access.features & MULTIPORT == 0
            && let Some(port) = self.ports.iter_mut().find(|port| port.id == 0)
        {
            port.guest_connected = true;
        }
    }
}

impl Model for Serial {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queues(&self) -> Vec<u32> {
        let mut queues = vec![QUEUE; 2 + 2 * MAX_PORTS as usize];
        queues[CONTROL_RECEIVE..=CONTROL_TRANSMIT].fill(CONTROL_QUEUE);
        queues
    }

    fn config(&self) -> Vec<u8> {
        // Columns and rows, of which QEMU says nothing; the number of ports; the register for emergencies.
        [&[0; 4], &MAX_PORTS.to_le_bytes()[..], &[0; 4]].concat()
    }

    fn write_config(&mut self, offset: usize, data: &[u8], _features: u64) {
        if offset == EMERGENCY_WRITE
            && let Some(byte) = data.first()
            && let Some(port) = self.ports.iter_mut().find(|port| port.console)
        {
            // There is no one to tell if it is not taken.
            let _ = port.chardev.write(&[*byte]);
        }
    }

    fn process(&mut self, queue: usize, access: &mut Access<'_>) -> Result<(), RingError> {
        self.open_first(access);
        match queue {
            CONTROL_TRANSMIT => {
                while let Some(chain) = access.pop(queue)? {
                    let mut message = [0; control::LEN];
                    if chain.read(access.memory, 0, &mut message)? == control::LEN {
                        self.control(access, message)?;
                    }
                    access.push(queue, chain.head, 0)?;
                }
                Ok(())
            }
            _ => match self.ports.iter_mut().find(|port| port.transmit_queue() == queue) {
                Some(port) => port.flush(access),
                None => Ok(()),
            },
        }
    }

    fn resume(&mut self, access: &mut Access<'_>) -> Result<(), RingError> {
        self.open_first(access);
        self.tell_listeners(access)
    }

    fn pause(&mut self) {
        // What is written is there when the guest has stopped, but no device is waited for for long.
        let deadline = Instant::now() + Duration::from_millis(150);
        let patience = || deadline.saturating_duration_since(Instant::now());
        self.ports.iter().for_each(|port| port.chardev.flush(patience()));
    }

    fn interest(&mut self, access: &mut Access<'_>) -> Result<Vec<(RawFd, i16)>, RingError> {
        let mut interest = Vec::new();
        for port in &self.ports {
            let input_wanted = port.room(access)?.is_some_and(|chain| chain.writable_len() > 0);
            interest.extend(port.chardev.interest(input_wanted, port.pending.is_some()));
        }
        Ok(interest)
    }

    fn pump(&mut self, ready: &[(RawFd, i16)], access: &mut Access<'_>) -> Result<(), RingError> {
        for port in &mut self.ports {
            if port.chardev.may_read(ready) {
                port.receive(access)?;
            }
            port.chardev.settle(ready);
            port.flush(access)?;
        }
        self.tell_listeners(access)
    }

    fn reset(&mut self) {
        for port in &mut self.ports {
            (port.guest_connected, port.pending) = (false, None);
        }
    }

    fn save(&self) -> VirtioDeviceState {
        let port = |port: &SerialPort| VirtioPortState {
            id: port.id,
            guest_connected: port.guest_connected,
            host_connected: port.host_connected,
            pending: port.pending.as_ref().map(|(chain, done)| (chain.save(), *done)),
        };
        VirtioDeviceState::Serial(self.ports.iter().map(port).collect())
    }

    fn load(&mut self, state: &VirtioDeviceState) -> Result<(), String> {
        let VirtioDeviceState::Serial(ports) = state else { return Err("it is no serial bus".into()) };
        let numbers = |ids: &mut dyn Iterator<Item = u32>| {
            let mut ids: Vec<u32> = ids.collect();
            ids.sort_unstable();
            ids
        };
        let (theirs, own) =
            (numbers(&mut ports.iter().map(|port| port.id)), numbers(&mut self.ports.iter().map(|port| port.id)));
        if theirs != own {
            return Err(format!(
                "the source has ports {theirs:?}, and this machine {own:?}: give it the same virtconsole and virtserialport"
            ));
        }
        for port in &mut self.ports {
            let Some(from) = ports.iter().find(|from| from.id == port.id) else { continue };
            port.guest_connected = from.guest_connected;
            port.host_connected = from.host_connected;
            port.pending = from.pending.as_ref().map(|(request, done)| (Chain::load(request), *done));
        }
        Ok(())
    }
}
