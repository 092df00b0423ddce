//! An IOAPIC outside of the kernel (Intel 82093AA data sheet), which turns its pins into messages to the local APICs.
//!
//! The second one of QEMU's microvm, where the interrupts of virtio-mmio transports come, is always here. The kernel
//! does not report when a local APIC ends one of its interrupts, so a level-triggered pin sends one message each time
//! its line rises, as an edge-triggered one does. Its devices lower their line when the guest acknowledges.
//!
//! The first one is here with `kernel-irqchip=split`. The kernel is told of the pins' messages, and tells when a local
//! APIC ends a level-triggered one.

use qevm_microvm::state::IoapicState;

/// Where the guest sees the first and the second one (`info mtree` of QEMU 7.2 to 11.1).
const FIRST_BASE: u64 = 0xfec0_0000;
const BASE: u64 = 0xfec1_0000;
const LEN: u64 = 0x1000;
/// Pins.
const PINS: usize = 24;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const END_OF_INTERRUPT: u64 = 0x40;

const REGISTER_ID: u8 = 0;
const REGISTER_VERSION: u8 = 1;
const REGISTER_ARBITRATION: u8 = 2;
const REGISTER_TABLE: u8 = 0x10;

/// Version 0x20, which has the register for ends of interrupts.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;
const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const DELIVERY_STATUS: u64 = 1 << 12;
const LOGICAL: u64 = 1 << 11;
/// What the guest cannot write.
const READ_ONLY: u64 = REMOTE_IRR | DELIVERY_STATUS;
/// In a message's data: level-triggered, and the level is there.
const MESSAGE_LEVEL: u32 = 1 << 15 | 1 << 14;

/// A message to the local APICs (Intel SDM volume 3, "Message signalled interrupts").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Address that is written to.
    pub address: u32,
    /// What is written.
    pub data: u32,
}

/// Is told the messages of all pins, `None` for those that are masked.
pub(crate) type Route = Box<dyn FnMut(&[Option<Message>]) + Send>;

/// The device.
pub struct Ioapic {
    state: IoapicState,
    /// The lines of the pins.
    lines: u32,
    send: Box<dyn FnMut(Message) + Send>,
    /// Is notified of each change, and says when a level-triggered interrupt was ended.
    route: Option<Route>,
}

impl Ioapic {
    /// After reset; all pins masked. `send` delivers a message.
    pub fn new(send: Box<dyn FnMut(Message) + Send>) -> Ioapic {
        let state = IoapicState { base_address: BASE, redirtbl: [MASKED; PINS], ..IoapicState::default() };
        Ioapic { state, lines: 0, send, route: None }
    }

    /// The first one, after reset; all pins masked.
    pub(crate) fn first(send: Box<dyn FnMut(Message) + Send>, route: Route) -> Ioapic {
        let mut ioapic = Ioapic::new(send);
        ioapic.state.base_address = FIRST_BASE;
        ioapic.route = Some(route);
        ioapic
    }

    /// Where in the first one an address lies.
    pub(crate) fn first_offset(gpa: u64) -> Option<u64> {
        gpa.checked_sub(FIRST_BASE).filter(|offset| *offset < LEN)
    }

    /// Where in the device an address lies.
    pub fn offset(gpa: u64) -> Option<u64> {
        gpa.checked_sub(BASE).filter(|offset| *offset < LEN)
    }

    /// A device raises or lowers the line of a pin; pins beyond the last are ignored.
    pub fn set_line(&mut self, pin: usize, level: bool) {
        let Some(entry) = self.state.redirtbl.get(pin).copied() else { return };
        let rises = level && self.lines & 1 << pin == 0;
        if level {
            self.lines |= 1 << pin;
        } else {
            self.lines &= !(1 << pin);
            if entry & LEVEL != 0 {
                self.state.irr &= !(1 << pin);
            }
        }
        // An edge is lost while the pin is masked, a level waits.
        if rises && (entry & MASKED == 0 || entry & LEVEL != 0) {
            self.state.irr |= 1 << pin;
            self.serve(pin);
        }
    }

    /// A read of 4 bytes; others read as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match offset {
            SELECT => self.state.ioregsel.into(),
            WINDOW => self.register(),
            _ => 0,
        };
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(into, byte)| *into = byte);
    }

    /// A write of 4 bytes; others are ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        match offset {
            SELECT => self.state.ioregsel = value as u8,
            WINDOW => self.set_register(value),
            END_OF_INTERRUPT => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }

    /// A local APIC has ended the level-triggered interrupt of this vector; a level that is still there is sent again.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..PINS {
            let entry = &mut self.state.redirtbl[pin];
            if *entry & 0xff == u64::from(vector) && *entry & REMOTE_IRR != 0 {
                *entry &= !REMOTE_IRR;
                if self.state.irr & 1 << pin != 0 {
                    self.serve(pin);
                }
            }
        }
    }

    /// Registers and pending requests.
    pub fn save(&self) -> IoapicState {
        self.state.clone()
    }

    /// Takes over registers and pending requests, and sends those that are not masked.
    pub fn load(&mut self, state: &IoapicState) {
        self.state = IoapicState { base_address: self.state.base_address, ..state.clone() };
        self.lines = 0;
        self.tell_routes();
        (0..PINS).filter(|pin| state.irr & 1 << pin != 0).for_each(|pin| self.serve(pin));
    }

    fn register(&self) -> u32 {
        match self.state.ioregsel {
            REGISTER_ID | REGISTER_ARBITRATION => u32::from(self.state.id) << 24,
            REGISTER_VERSION => VERSION,
            select => match self.entry(select) {
                Some((pin, high)) => (self.state.redirtbl[pin] >> if high { 32 } else { 0 }) as u32,
                None => 0,
            },
        }
    }

    fn set_register(&mut self, value: u32) {
        if self.state.ioregsel == REGISTER_ID {
            self.state.id = (value >> 24 & 0xf) as u8;
        }
        let Some((pin, high)) = self.entry(self.state.ioregsel) else { return };
        let entry = &mut self.state.redirtbl[pin];
        *entry = match high {
            true => *entry & 0xffff_ffff | u64::from(value) << 32,
            false => *entry & (!0xffff_ffff | READ_ONLY) | u64::from(value) & !READ_ONLY,
        };
        self.tell_routes();
        if self.state.irr & 1 << pin != 0 {
            self.serve(pin);
        }
    }

    fn tell_routes(&mut self) {
        let messages: Vec<_> = (0..PINS).map(|pin| self.message(pin)).collect();
        self.route.iter_mut().for_each(|route| route(&messages));
    }

    /// The pin whose entry a register is half of, and whether it is the upper half.
    fn entry(&self, select: u8) -> Option<(usize, bool)> {
        let at = usize::from(select.checked_sub(REGISTER_TABLE)?);
        (at < 2 * PINS).then_some((at / 2, at % 2 == 1))
    }

    /// Sends the message of a pin unless it is masked.
    fn serve(&mut self, pin: usize) {
        let Some(message) = self.message(pin) else { return };
        let entry = &mut self.state.redirtbl[pin];
        if self.route.is_none() || *entry & LEVEL == 0 {
            self.state.irr &= !(1 << pin);
        } else if *entry & REMOTE_IRR == 0 {
            *entry |= REMOTE_IRR;
        } else {
            return;
        }
        (self.send)(message);
    }

    /// The message of a pin, unless it is masked.
    fn message(&self, pin: usize) -> Option<Message> {
        const LOCAL_APICS: u32 = 0xfee0_0000;
        let entry = self.state.redirtbl[pin];
        if entry & MASKED != 0 {
            return None;
        }
        let level = if self.route.is_some() && entry & LEVEL != 0 { MESSAGE_LEVEL } else { 0 };
        let logical = if entry & LOGICAL != 0 { 1 << 2 } else { 0 };
        let destination = (entry >> 56) as u32;
        // Vector and delivery mode are where the entry has them.
        let data = (entry & 0x7ff) as u32 | level;
        Some(Message { address: LOCAL_APICS | destination << 12 | logical, data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::sync::Arc;

    fn device() -> (Ioapic, Arc<Mutex<Vec<Message>>>) {
        let sent = Arc::new(Mutex::new(Vec::new()));
        let into = sent.clone();
        (Ioapic::new(Box::new(move |message| into.lock().push(message))), sent)
    }

    fn set(device: &mut Ioapic, register: u8, value: u32) {
        device.write(SELECT, &u32::from(register).to_le_bytes());
        device.write(WINDOW, &value.to_le_bytes());
    }

    fn get(device: &mut Ioapic, register: u8) -> u32 {
        device.write(SELECT, &u32::from(register).to_le_bytes());
        let mut data = [0; 4];
        device.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn registers_as_in_the_data_sheet() {
        let (mut device, _) = device();
        assert_eq!(get(&mut device, 1), 0x0017_0020);
        set(&mut device, 0, 0xff00_0000);
        assert_eq!(get(&mut device, 0), 0x0f00_0000);
        assert_eq!(get(&mut device, 0x10), MASKED as u32);
        set(&mut device, 0x3e, 0xffff_ffff);
        set(&mut device, 0x3f, 0x0300_0000);
        assert_eq!((get(&mut device, 0x3e), get(&mut device, 0x3f)), (!(READ_ONLY as u32), 0x0300_0000));
        set(&mut device, 0x40, 7);
        assert_eq!(get(&mut device, 0x40), 0, "there are 24 pins");
    }

    #[test]
    fn an_edge_is_a_message_unless_masked() {
        let (mut device, sent) = device();
        device.set_line(3, true);
        set(&mut device, 0x16, 0x0800 | 0x31);
        set(&mut device, 0x17, 0x0200_0000);
        assert!(sent.lock().is_empty(), "the edge came while masked");
        device.set_line(3, true);
        assert!(sent.lock().is_empty(), "the line was up");
        device.set_line(3, false);
        device.set_line(3, true);
        assert_eq!(*sent.lock(), [Message { address: 0xfee0_2004, data: 0x31 }]);
    }

    #[test]
    fn the_first_one_sends_a_level_until_it_is_ended() {
        let (sent, routes) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
        let (into, routed) = (sent.clone(), routes.clone());
        let mut device = Ioapic::first(
            Box::new(move |message| into.lock().push(message)),
            Box::new(move |messages| *routed.lock() = messages.to_vec()),
        );
        set(&mut device, 0x1b, 0x0100_0000);
        set(&mut device, 0x1a, LEVEL as u32 | 0x35);
        let message = Message { address: 0xfee0_1000, data: 0xc035 };
        assert_eq!(routes.lock()[5], Some(message));
        assert_eq!(routes.lock().iter().flatten().count(), 1);
        device.set_line(5, true);
        assert_eq!(*sent.lock(), [message]);
        assert_eq!(get(&mut device, 0x1a), (LEVEL | REMOTE_IRR) as u32 | 0x35);
        device.end_of_interrupt(0x36);
        assert_eq!(sent.lock().len(), 1);
        device.end_of_interrupt(0x35);
        assert_eq!(sent.lock().len(), 2, "the line is still up");
        device.set_line(5, false);
        device.end_of_interrupt(0x35);
        assert_eq!((sent.lock().len(), device.save().irr), (2, 0));
        set(&mut device, 0x18, 0x31);
        device.set_line(4, true);
        assert_eq!(sent.lock()[2], Message { address: 0xfee0_0000, data: 0x31 }, "an edge");
    }

    #[test]
    fn a_level_waits_for_the_mask_and_goes_along() {
        let (mut device, sent) = device();
        set(&mut device, 0x10, (MASKED | LEVEL) as u32 | 0x40);
        device.set_line(0, true);
        let state = device.save();
        assert_eq!(state.irr, 1);
        set(&mut device, 0x10, LEVEL as u32 | 0x40);
        assert_eq!(sent.lock().len(), 1);
        let (mut other, sent) = self::device();
        other.load(&state);
        assert!(sent.lock().is_empty());
        set(&mut other, 0x10, LEVEL as u32 | 0x40);
        assert_eq!(sent.lock().len(), 1);
        assert_eq!(other.save().irr, 0);
    }
}
