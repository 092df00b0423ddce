//! KVM's table of interrupt routes. `KVM_SET_GSI_ROUTING` replaces all of it, those of the chips in the kernel
//! included, so that it has one owner here, who puts it together anew at each change.

use crate::devices::Message;
use crate::devices::pci::PciMessage;
use crate::error::{Error, Result, kvm};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use std::sync::Arc;

/// Pins of the first IOAPIC, and so the interrupts that are not a device's alone.
const PINS: u32 = 24;
/// Pins of each 8259.
const PIC_PINS: u32 = 8;

/// What the table says.
#[derive(Debug, Default)]
struct Table {
    /// The kernel has the IOAPIC and the 8259s.
    chips: bool,
    /// Messages of the IOAPIC's pins, where the monitor has it: by them the kernel knows whose ends of interrupts to
    /// tell.
    pins: Vec<Option<Message>>,
    /// Messages of interrupts after the pins.
    messages: Vec<PciMessage>,
}

/// Where an interrupt goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// To a pin of a chip in the kernel.
    Pin { irqchip: u32, pin: u32 },
    /// To a local APIC, as a message.
    Message(PciMessage),
}

impl Table {
    /// What an interrupt after the pins sends, if there is such.
    fn message(&mut self, gsi: u32) -> Option<&mut PciMessage> {
        self.messages.get_mut(gsi.checked_sub(PINS)? as usize)
    }

    /// Numbers of interrupts, and where they go; some go to two places.
    fn routes(&self) -> Vec<(u32, Route)> {
        let mut routes = Vec::new();
        // As the kernel has them before any is set: 0 to 15 reach an 8259 and the IOAPIC.
        for gsi in (0..PINS).filter(|_| self.chips) {
            let pic = |irqchip| (gsi, Route::Pin { irqchip, pin: gsi % PIC_PINS });
            match gsi / PIC_PINS {
                0 => routes.push(pic(KVM_IRQCHIP_PIC_MASTER)),
                1 => routes.push(pic(KVM_IRQCHIP_PIC_SLAVE)),
                _ => {}
            }
            routes.push((gsi, Route::Pin { irqchip: KVM_IRQCHIP_IOAPIC, pin: gsi }));
        }
        let message = |message: Message| PciMessage { address: message.address.into(), data: message.data };
        let pins = (0..).zip(&self.pins).filter_map(|(pin, of)| Some((pin, Route::Message(message((*of)?)))));
        routes.extend(pins);
        routes.extend((PINS..).zip(&self.messages).map(|(gsi, message)| (gsi, Route::Message(*message))));
        routes
    }
}

fn entry((gsi, route): (u32, Route)) -> kvm_irq_routing_entry {
    let (type_, u) = match route {
        Route::Pin { irqchip, pin } => {
            let irqchip = kvm_irq_routing_irqchip { irqchip, pin };
            (KVM_IRQ_ROUTING_IRQCHIP, kvm_irq_routing_entry__bindgen_ty_1 { irqchip })
        }
        Route::Message(PciMessage { address, data }) => {
            let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
            let msi = kvm_irq_routing_msi { address_lo, address_hi, data, ..kvm_irq_routing_msi::default() };
            (KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry__bindgen_ty_1 { msi })
        }
    };
    kvm_irq_routing_entry { gsi, type_, u, ..kvm_irq_routing_entry::default() }
}

/// The owner of the table of a virtual machine.
pub(crate) struct Routes {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

impl Routes {
    /// The table as it is when the machine is made: the kernel's own, or none where the monitor has the chips.
    pub(super) fn new(vm: &Arc<VmFd>, split: bool) -> Routes {
        Routes { vm: vm.clone(), table: Mutex::new(Table { chips: !split, ..Table::default() }) }
    }

    /// The messages of the first IOAPIC's pins, which is the monitor's.
    pub(super) fn set_pins(&self, pins: &[Option<Message>]) -> Result<()> {
        self.change(|table| table.pins = pins.to_vec())
    }

    /// Adds an interrupt that sends a message: its number.
    pub(crate) fn add(&self, message: PciMessage) -> Result<u32> {
        let mut gsi = 0;
        self.change(|table| {
            gsi = PINS + table.messages.len() as u32;
            table.messages.push(message);
        })?;
        Ok(gsi)
    }

    /// An interrupt that was [added](Routes::add) sends another message from now on.
    pub(crate) fn update(&self, gsi: u32, message: PciMessage) -> Result<()> {
        if self.table.lock().message(gsi).is_none_or(|now| *now == message) {
            return Ok(());
        }
        self.change(|table| table.message(gsi).into_iter().for_each(|now| *now = message))
    }

    fn change(&self, change: impl FnOnce(&mut Table)) -> Result<()> {
        let mut table = self.table.lock();
        change(&mut table);
        let entries: Vec<_> = table.routes().into_iter().map(entry).collect();
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| Error::Config("the interrupt routes have no room".to_owned()))?;
        self.vm.set_gsi_routing(&routing).map_err(kvm("route interrupts"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// KVM's default routing (kernel documentation, KVM_CREATE_IRQCHIP: 0 to 15 reach both, 16 to 23 the IOAPIC alone).
    #[test]
    fn a_message_leaves_the_kernels_chips_where_they_were() {
        let message = PciMessage { address: 0x1_fee0_1000, data: 0x41 };
        let table = Table { chips: true, messages: vec![message], ..Table::default() };
        let routes = table.routes();
        let of = |gsi: u32| routes.iter().filter(|route| route.0 == gsi).map(|route| route.1).collect::<Vec<_>>();
        // Chips: 0 the first 8259, 1 the second, 2 the IOAPIC.
        let pin = |irqchip, pin| Route::Pin { irqchip, pin };
        assert_eq!(of(4), [pin(0, 4), pin(2, 4)]);
        assert_eq!(of(9), [pin(1, 1), pin(2, 9)]);
        assert_eq!(of(16), [pin(2, 16)]);
        assert_eq!(of(24), [Route::Message(message)]);
        assert_eq!(routes.len(), 16 + 24 + 1);
    }

    #[test]
    fn pins_of_the_monitors_ioapic_and_messages_do_not_touch_each_other() {
        let pin = |data| Some(Message { address: 0xfee0_0000, data });
        let message = PciMessage { address: 0xfee0_2000, data: 0x50 };
        let mut table = Table { pins: vec![None, pin(0x31), None], messages: vec![message], ..Table::default() };
        let to = |address, data| Route::Message(PciMessage { address, data });
        assert_eq!(table.routes(), [(1, to(0xfee0_0000, 0x31)), (24, to(0xfee0_2000, 0x50))]);
        table.pins = vec![pin(0x32)];
        assert_eq!(table.routes(), [(0, to(0xfee0_0000, 0x32)), (24, to(0xfee0_2000, 0x50))]);
    }
}
