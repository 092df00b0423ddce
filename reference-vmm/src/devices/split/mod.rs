//! The interrupt controllers and the PIT of `kernel-irqchip=split`, where the kernel has the local APICs only.

pub(crate) mod pic;
pub(crate) mod pit;

use super::ioapic::Ioapic;
use super::ticker::Ticker;
use parking_lot::Mutex;
use pic::Pics;
use pit::Pit;
use qevm_microvm::state::{IoapicState, PicState, PitState};
use std::sync::Arc;

/// Interrupt of the PIT.
const PIT_IRQ: u32 = 0;
/// The first IOAPIC's pin for it; pin 0 is the 8259s'.
const PIT_PIN: usize = 2;

/// What a device's interrupt reaches.
#[derive(Clone)]
pub(crate) struct Lines {
    pics: Arc<Mutex<Pics>>,
    ioapic: Arc<Mutex<Ioapic>>,
}

impl Lines {
    pub(crate) fn new(pics: Pics, ioapic: Ioapic) -> Lines {
        Lines { pics: Arc::new(Mutex::new(pics)), ioapic: Arc::new(Mutex::new(ioapic)) }
    }

    /// A device raises or lowers interrupt 0 to 15.
    pub(crate) fn set(&self, irq: u32, level: bool) {
        self.pics.lock().set_line(irq as u8, level);
        let pin = if irq == PIT_IRQ { PIT_PIN } else { irq as usize };
        self.ioapic.lock().set_line(pin, level);
    }
}

/// The chips.
pub(crate) struct SplitChips {
    pub(crate) lines: Lines,
    pub(crate) pit: Arc<Ticker<Pit>>,
}

impl SplitChips {
    /// Leaves the chips as firmware would, for a kernel that is entered without one.
    pub(crate) fn set_up(&self) {
        self.lines.pics.lock().set_up();
    }

    /// A read of a port; false if it is none of theirs.
    pub(crate) fn port_in(&self, port: u16, data: &mut [u8]) -> bool {
        let Some(byte) = data.first_mut() else { return false };
        let value = match port {
            0x40..=0x43 => self.pit.with(|pit, now| pit.read(port, now as i64)),
            _ => self.lines.pics.lock().read(port),
        };
        value.is_some_and(|value| {
            *byte = value;
            true
        })
    }

    /// A write to a port; false if it is none of theirs.
    pub(crate) fn port_out(&self, port: u16, data: &[u8]) -> bool {
        let Some(value) = data.first().copied() else { return false };
        match port {
            0x40..=0x43 => self.pit.with(|pit, now| pit.write(port, value, now as i64)),
            _ => self.lines.pics.lock().write(port, value),
        }
    }

    /// A read of an address; false if it is not the first IOAPIC's.
    pub(crate) fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let offset = Ioapic::first_offset(gpa);
        offset.into_iter().for_each(|offset| self.lines.ioapic.lock().read(offset, data));
        offset.is_some()
    }

    /// A write to an address; false if it is not the first IOAPIC's.
    pub(crate) fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        let offset = Ioapic::first_offset(gpa);
        offset.into_iter().for_each(|offset| self.lines.ioapic.lock().write(offset, data));
        offset.is_some()
    }

    /// A local APIC has ended a level-triggered interrupt.
    pub(crate) fn end_of_interrupt(&self, vector: u8) {
        self.lines.ioapic.lock().end_of_interrupt(vector);
    }

    /// The first vCPU takes the 8259s' interrupt: its vector.
    pub(crate) fn acknowledge(&self) -> u8 {
        self.lines.pics.lock().acknowledge()
    }

    pub(crate) fn save_irqchip(&self) -> ([PicState; 2], IoapicState) {
        (self.lines.pics.lock().save(), self.lines.ioapic.lock().save())
    }

    pub(crate) fn save_pit(&self) -> PitState {
        self.pit.with(|pit, _| pit.save())
    }

    pub(crate) fn load(&self, pics: &[PicState; 2], ioapic: &IoapicState, pit: &PitState) {
        // The PIT first: what it puts out is no news to controllers that come with it, and none to controllers after a
        // reset.
        self.pit.with(|device, now| device.load(pit, now as i64));
        self.lines.pics.lock().load(pics);
        self.lines.ioapic.lock().load(ioapic);
    }
}
