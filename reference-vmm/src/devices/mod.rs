//! The devices that live in the monitor, and which port or address reaches which. The second IOAPIC is always here; the
//! other interrupt controllers and the PIT are in the kernel, or here with `kernel-irqchip=split`.

mod chardev;
mod fw_cfg;
mod ged;
mod ioapic;
mod netdev;
pub mod pci;
mod rtc;
mod serial;
mod split;
mod ticker;
mod virtio;

use parking_lot::Mutex;
use std::sync::Arc;

pub use chardev::{Chardev, ChardevOptions};
pub(crate) use fw_cfg::KEY_UUID;
pub use fw_cfg::{FwCfg, FwCfgItems};
pub use ged::{Ged, Request};
pub use ioapic::{Ioapic, Message};
pub use netdev::{Netdev, NetdevOptions};
pub use rtc::Rtc;
pub(crate) use rtc::ticker::{Clock, wall_clock};
pub use serial::Serial;
pub(crate) use split::pic::Pics;
pub(crate) use split::pit::Pit;
pub(crate) use split::{Lines, SplitChips};
pub(crate) use ticker::Ticker;
pub use virtio::{Block, BlockOptions, Net, Rng, VirtioSerial, VirtioSlot};
pub(crate) use virtio::{Transport, Transports, missing, start_pump};

use crate::memory::GuestMemory;
use pci::PciBus;

/// First port of the serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt of the serial port.
pub const SERIAL_IRQ: u32 = 4;

/// Interrupt of the generic event device.
pub const GED_IRQ: u32 = 9;
/// Interrupt of the real-time clock.
pub const RTC_IRQ: u32 = 8;

/// All devices of the machine, shared by the vCPU threads.
pub struct Devices {
    /// The serial port.
    pub serial: Arc<Mutex<Serial>>,
    /// The firmware configuration device.
    pub fw_cfg: Mutex<FwCfg>,
    /// The generic event device and its power registers.
    pub ged: Mutex<Ged>,
    /// The second IOAPIC.
    pub ioapic2: Arc<Mutex<Ioapic>>,
    /// The real-time clock, if there is one.
    pub(crate) rtc: Option<Arc<Clock>>,
    /// The virtio-mmio transports.
    pub(crate) virtio: Transports,
    /// The PCI bus, if there is one.
    pub(crate) pci: Option<Mutex<PciBus>>,
    /// Interrupt controllers and PIT, where the kernel does not have them.
    pub(crate) split: Option<SplitChips>,
    memory: Arc<GuestMemory>,
}

impl Devices {
    /// Puts the devices together.
    pub(crate) fn new(
        memory: Arc<GuestMemory>,
        serial: Arc<Mutex<Serial>>,
        fw_cfg: FwCfg,
        ged: Ged,
        ioapic2: Arc<Mutex<Ioapic>>,
        virtio: Transports,
        rtc: Option<Arc<Clock>>,
    ) -> Devices {
        Devices {
            rtc,
            split: None,
            pci: None,
            ioapic2,
            virtio,
            serial,
            fw_cfg: Mutex::new(fw_cfg),
            ged: Mutex::new(ged),
            memory,
        }
    }

    /// One read of a port, of 1, 2 or 4 bytes. Ports without a device read as all ones.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        match port {
            0x3f8..=0x3ff => {
                let mut serial = self.serial.lock();
                (port..).zip(data).for_each(|(port, byte)| *byte = serial.read((port - SERIAL_PORT) as u8 & 7));
            }
            0x510..=0x51b => self.fw_cfg.lock().port_in(port, data),
            0x71 if self.rtc.is_some() => {
                data.fill(0xff);
                if let Some((rtc, byte)) = self.rtc.as_ref().zip(data.first_mut()) {
                    *byte = rtc.with(Rtc::read);
                }
            }
            _ => {
                data.fill(0xff);
                self.split.iter().for_each(|chips| _ = chips.port_in(port, data));
            }
        }
    }

    /// One write to a port, of 1, 2 or 4 bytes. Ports without a device ignore it.
    pub fn port_out(&self, port: u16, data: &[u8]) {
        match port {
            0x3f8..=0x3ff => {
                let mut serial = self.serial.lock();
                (port..).zip(data).for_each(|(port, byte)| serial.write((port - SERIAL_PORT) as u8 & 7, *byte));
            }
            0x510..=0x51b => self.fw_cfg.lock().port_out(port, data, &self.memory),
            0x70 | 0x71 if self.rtc.is_some() => {
                let bytes = (port..=0x71).zip(data);
                for (rtc, (port, byte)) in self.rtc.iter().cycle().zip(bytes) {
                    rtc.with(|rtc, now| if port == 0x70 { rtc.select(*byte) } else { rtc.write(*byte, now) });
                }
            }
            _ => {
                if !self.split.as_ref().is_some_and(|chips| chips.port_out(port, data)) {
                    tracing::trace!(port, ?data, "write to a port without a device");
                }
            }
        }
    }

    /// A read of an address that is not RAM. Addresses without a device read as zero.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        data.fill(0);
        if self.virtio.read(gpa, data) {
            return;
        }
        if self.pci.as_ref().is_some_and(|bus| bus.lock().read(gpa, data)) {
            return;
        }
        if let Some(offset) = Ged::offset(gpa) {
            self.ged.lock().read(offset, data);
        } else if let Some(offset) = Ioapic::offset(gpa) {
            self.ioapic2.lock().read(offset, data);
        } else if let Some(chips) = &self.split {
            chips.mmio_read(gpa, data);
        }
    }

    /// A write to an address that is not RAM. Addresses without a device ignore it.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) -> Request {
        if self.virtio.write(gpa, data) || self.pci.as_ref().is_some_and(|bus| bus.lock().write(gpa, data)) {
            return Request::None;
        }
        if let Some(offset) = Ioapic::offset(gpa) {
            self.ioapic2.lock().write(offset, data);
        } else if self.split.as_ref().is_some_and(|chips| chips.mmio_write(gpa, data)) {
            return Request::None;
        }
        match Ged::offset(gpa) {
            Some(offset) => self.ged.lock().write(offset, data),
            None => Request::None,
        }
    }
}
