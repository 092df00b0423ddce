//! `virtio-net-device` with one pair of queues (virtio 1.2, 5.1).
//!
//! A frame is taken from its queue when it has been sent, so that none is under way while the machine is paused.

mod filter;

use super::chain::Chain;
use super::model::{Access, Model};
use super::queue::{ANY_LAYOUT, EVENT_IDX, INDIRECT_DESC, NOTIFY_ON_EMPTY, RingError};
use crate::devices::netdev::{MAX_FRAME, MAX_HEADER, Netdev};
use filter::Filter;
use qevm_microvm::state::{VirtioDeviceState, VirtioNetState};
use qevm_microvm::virtio::{CTRL_GUEST_OFFLOADS, MRG_RXBUF};
use std::os::fd::RawFd;

/// Device number.
const ID: u32 = 1;
/// What is offered (HostFeatures of 7.2.22, 10.0.13 and 11.1.3 on `-netdev dgram`).
const FEATURES: u64 = {
    const MAC: u64 = 1 << 5;
    const GSO: u64 = 1 << 6;
    const STATUS: u64 = 1 << 16;
    const CTRL_VQ: u64 = 1 << 17;
    const CTRL_RX: u64 = 1 << 18;
    const CTRL_VLAN: u64 = 1 << 19;
    const CTRL_RX_EXTRA: u64 = 1 << 20;
    const CTRL_MAC_ADDR: u64 = 1 << 23;
    let control = CTRL_GUEST_OFFLOADS | CTRL_VQ | CTRL_RX | CTRL_VLAN | CTRL_RX_EXTRA | CTRL_MAC_ADDR;
    let device = MAC | GSO | MRG_RXBUF | STATUS | GUEST_ANNOUNCE;
    device | control | NOTIFY_ON_EMPTY | ANY_LAYOUT | INDIRECT_DESC | EVENT_IDX
};
/// CSUM, GUEST_CSUM, and GUEST_ and HOST_ TSO4, TSO6, ECN, UFO: on a backend with headers (the same on `-netdev tap`).
const OFFLOADS: u64 = 0x7f83;
/// `VIRTIO_NET_F_GUEST_ANNOUNCE`
const GUEST_ANNOUNCE: u64 = 1 << 21;
/// Bits of the features that say what the guest takes, and what the host calls them (`TUN_F_CSUM`, `_TSO4`, `_TSO6`,
/// `_TSO_ECN`, `_UFO`).
const GUEST_OFFLOADS: [(u64, u32); 5] = [(1 << 1, 1), (1 << 7, 2), (1 << 8, 4), (1 << 9, 8), (1 << 10, 16)];

/// QueueNumMax of 11.1.3, and `virtio/ringsize` of 7.2.22: receive, transmit, control.
const QUEUES: [u32; 3] = [256, 256, 64];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;

/// Link status.
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;

/// First part of the addresses that QEMU gives its cards; the last byte counts from 0x56.
const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

/// The device.
#[derive(Debug)]
pub struct Net {
    netdev: Netdev,
    /// The address after a reset.
    own_mac: [u8; 6],
    mac: [u8; 6],
    status: u16,
    filter: Filter,
    /// A frame waits until the backend takes it.
    transmit_waits: bool,
    /// What the guest takes, beyond plain frames.
    guest_offloads: u64,
    /// A frame that came and that the guest has no room for yet.
    inbox: Vec<u8>,
    /// The features and offloads that the backend was told of.
    told: Option<(u64, u64)>,
    /// The network has not been told yet that the guest is here now.
    arrived: bool,
}

impl Net {
    /// A card with this address, or with that of QEMU's card number `number`, counted from 0.
    pub fn new(netdev: Netdev, mac: Option<[u8; 6]>, number: u8) -> Net {
        let own_mac = mac.unwrap_or_else(|| {
            let mut mac = MAC;
            mac[5] = mac[5].wrapping_add(number);
            mac
        });
        Net {
            netdev,
            own_mac,
            mac: own_mac,
            status: LINK_UP,
            filter: Filter::default(),
            transmit_waits: false,
            guest_offloads: 0,
            inbox: Vec::new(),
            told: None,
            arrived: false,
        }
    }

    fn header(features: u64) -> usize {
        if features & MRG_RXBUF != 0 { 12 } else { 10 }
    }

    /// Tells the backend what the guest has accepted.
    fn adopt(&mut self, features: u64) {
        let now = (features, self.guest_offloads);
        if self.told != Some(now) {
            self.told = Some(now);
            let taken = if features & CTRL_GUEST_OFFLOADS != 0 { self.guest_offloads } else { features };
            let offloads = GUEST_OFFLOADS.iter().filter(|(bit, _)| taken & bit != 0).map(|(_, name)| name).sum();
            self.netdev.set_up(Net::header(features), offloads);
        }
    }

    fn transmit(&mut self, access: &mut Access<'_>) -> Result<(), RingError> {
        let header = Net::header(access.features);
        let kept = if self.netdev.has_header() { 0 } else { header };
        self.transmit_waits = false;
        while let Some(chain) = access.peek(TRANSMIT)? {
            let len = chain.readable_len();
            if len < header as u64 || !chain.writable.is_empty() {
                return Err(RingError::Request { what: "a frame without a whole header, or to be written" });
            }
            if len <= (header + MAX_FRAME) as u64 {
                let mut frame = vec![0; len as usize - kept];
                chain.read(access.memory, kept as u64, &mut frame)?;
                if !self.netdev.send(&frame) {
                    self.transmit_waits = true;
                    return Ok(());
                }
            }
            if let Some(chain) = access.pop(TRANSMIT)? {
                access.push(TRANSMIT, chain.head, 0)?;
            }
        }
        Ok(())
    }

    /// Receives frames for as long as there are any and the guest has room, but not more than a queue's worth in a
    /// turn: the rest waits at the host.
    fn receive(&mut self, access: &mut Access<'_>) -> Result<(), RingError> {
        let header = Net::header(access.features);
        for _ in 0..QUEUES[RECEIVE] {
            if self.inbox.is_empty() {
                if access.peek(RECEIVE)?.is_none() {
                    return Ok(());
                }
                let kept = if self.netdev.has_header() { 0 } else { header };
                let mut bytes = vec![0; MAX_HEADER + MAX_FRAME];
                let len = self.netdev.receive(&mut bytes[kept..]);
                if len == 0 {
                    return Ok(());
                }
                bytes.truncate(kept + len);
                let frame = bytes.get(header..).unwrap_or_default();
                if !self.filter.accepts(frame, &self.mac) {
                    continue;
                }
                self.inbox = bytes;
            }
            if !self.deliver(access)? {
                return Ok(());
            }
            self.inbox.clear();
        }
        Ok(())
    }

    /// Gives the guest what is in the inbox; false if it has no room.
    fn deliver(&mut self, access: &mut Access<'_>) -> Result<bool, RingError> {
        /// Offset of `num_buffers` in the header.
        const NUM_BUFFERS: usize = 10;
        let (mut chains, mut room): (Vec<Chain>, u64) = (Vec::new(), 0);
        let mergeable = access.features & MRG_RXBUF != 0;
        while room < self.inbox.len() as u64 && (mergeable || chains.is_empty()) {
            let Some(chain) = access.peek_at(RECEIVE, chains.len() as u16)? else { return Ok(false) };
            let len = chain.writable_len();
            if len == 0 {
                return Err(RingError::Request { what: "a receive buffer that cannot be written" });
            }
            room += len;
            chains.push(chain);
        }
        if room < self.inbox.len() as u64 {
            tracing::debug!(bytes = self.inbox.len(), room, "a frame does not fit the guest's buffers and is dropped");
            return Ok(true);
        }
        if mergeable && let Some(count) = self.inbox.get_mut(NUM_BUFFERS..NUM_BUFFERS + 2) {
            count.copy_from_slice(&(chains.len() as u16).to_le_bytes());
        }
        let mut rest = &self.inbox[..];
        for _ in 0..chains.len() {
            let Some(chain) = access.pop(RECEIVE)? else { return Ok(false) };
            let written = chain.write(access.memory, 0, rest)?;
            rest = &rest[written..];
            access.push(RECEIVE, chain.head, written as u32)?;
        }
        Ok(true)
    }

    fn control(&mut self, access: &mut Access<'_>) -> Result<(), RingError> {
        /// Longest command: two tables of addresses, of which those beyond the filter's size are not looked at.
        const LONGEST: usize = 64 << 10;
        const GUEST_OFFLOADS_SET: [u8; 2] = [5, 0];
        const ANNOUNCE_ACK: [u8; 2] = [3, 0];
        const MAC_ADDR_SET: [u8; 2] = [1, 1];
        while let Some(chain) = access.pop(CONTROL)? {
            if chain.writable_len() == 0 || chain.readable_len() < 2 {
                return Err(RingError::Request { what: "a command to the network card without its header or answer" });
            }
            let mut bytes = vec![0; chain.readable_len().min(LONGEST as u64) as usize];
            chain.read(access.memory, 0, &mut bytes)?;
            let (command, data) = bytes.split_at(2);
            let done = match (command, data) {
                (command, _) if command == ANNOUNCE_ACK => {
                    self.status &= !ANNOUNCE;
                    true
                }
                (command, data) if command == MAC_ADDR_SET => match data.try_into() {
                    Ok(mac) => {
                        self.mac = mac;
                        true
                    }
                    Err(_) => false,
                },
                (command, data) if command == GUEST_OFFLOADS_SET => match data.try_into().map(u64::from_le_bytes) {
                    Ok(offloads) if offloads & !access.features == 0 => {
                        self.guest_offloads = offloads;
                        self.adopt(access.features);
                        true
                    }
                    _ => false,
                },
                (command, data) => self.filter.command(command[0], command[1], data),
            };
            chain.write(access.memory, 0, &[u8::from(!done)])?;
            access.push(CONTROL, chain.head, 1)?;
        }
        Ok(())
    }

    /// Asks a guest that knows how to tell the network where it is now.
    fn ask_to_announce(&mut self, access: &mut Access<'_>) {
        if access.features & GUEST_ANNOUNCE != 0 {
            self.status |= ANNOUNCE;
            access.config_changed();
        }
    }

    /// The same by a RARP frame in its name.
    fn send_rarp(&mut self, access: &Access<'_>) {
        let mut frame = vec![0; if self.netdev.has_header() { Net::header(access.features) } else { 0 }];
        frame.extend([0xff; 6]);
        frame.extend(self.mac);
        // RARP: request reverse, Ethernet and IPv4 (RFC 903).
        frame.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        frame.extend(self.mac);
        frame.extend([0; 4]);
        frame.extend(self.mac);
        frame.extend([0; 4]);
        frame.resize(frame.len() + 18, 0);
        // If it cannot be sent now, the guest's next frame says the same.
        self.netdev.send(&frame);
    }
}

impl Model for Net {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        if self.netdev.has_header() { FEATURES | OFFLOADS } else { FEATURES }
    }

    fn queues(&self) -> Vec<u32> {
        QUEUES.into()
    }

    fn config(&self) -> Vec<u8> {
        [&self.mac[..], &self.status.to_le_bytes()].concat()
    }

    fn write_config(&mut self, offset: usize, data: &[u8], _features: u64) {
        // A legacy driver sets its address here.
        for (byte, into) in data.iter().zip(self.mac.iter_mut().skip(offset)) {
            *into = *byte;
        }
    }

    fn process(&mut self, queue: usize, access: &mut Access<'_>) -> Result<(), RingError> {
        self.adopt(access.features);
        match queue {
            RECEIVE => self.receive(access),
            TRANSMIT => self.transmit(access),
            _ => self.control(access),
        }
    }

    fn accepted(&mut self, features: u64) {
        self.guest_offloads = features & GUEST_OFFLOADS.iter().map(|(bit, _)| bit).sum::<u64>();
        self.adopt(features);
    }

    fn resume(&mut self, access: &mut Access<'_>) -> Result<(), RingError> {
        self.adopt(access.features);
        if std::mem::take(&mut self.arrived) {
            self.ask_to_announce(access);
        }
        Ok(())
    }

    fn announce(&mut self, access: &mut Access<'_>) {
        self.send_rarp(access);
        self.ask_to_announce(access);
    }

    fn interest(&mut self, access: &mut Access<'_>) -> Result<Vec<(RawFd, i16)>, RingError> {
        let wanted = self.inbox.is_empty() && access.peek(RECEIVE)?.is_some();
        Ok(self.netdev.interest(wanted, self.transmit_waits))
    }

    fn pump(&mut self, ready: &[(RawFd, i16)], access: &mut Access<'_>) -> Result<(), RingError> {
        self.receive(access)?;
        self.netdev.settle(ready);
        if self.transmit_waits { self.transmit(access) } else { Ok(()) }
    }

    fn reset(&mut self) {
        (self.mac, self.status, self.filter) = (self.own_mac, LINK_UP, Filter::default());
        (self.transmit_waits, self.guest_offloads, self.told) = (false, 0, None);
        self.inbox.clear();
    }

    fn save(&self) -> VirtioDeviceState {
        VirtioDeviceState::Net(Box::new(VirtioNetState {
            mac: self.mac,
            status: self.status,
            transmit_waits: self.transmit_waits,
            header: self.netdev.has_header(),
            guest_offloads: self.guest_offloads,
            filter: self.filter.state.clone(),
        }))
    }

    fn load(&mut self, state: &VirtioDeviceState) -> Result<(), String> {
        let VirtioDeviceState::Net(state) = state else { return Err("it is no network card".into()) };
        if state.header && !self.netdev.has_header() {
            return Err(
                "the source's network leaves work to the guest (vnet_hdr=on), and this machine's cannot: use a tap"
                    .into(),
            );
        }
        self.filter.load(&state.filter)?;
        (self.mac, self.status) = (state.mac, state.status);
        (self.transmit_waits, self.guest_offloads) = (state.transmit_waits, state.guest_offloads);
        self.inbox.clear();
        self.told = None;
        self.arrived = true;
        Ok(())
    }
}
