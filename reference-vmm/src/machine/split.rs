//! `kernel-irqchip=split`: the kernel has the local APICs, the monitor everything before them.

use super::clock::VirtualClock;
use super::routes::Routes;
use super::vcpu::Vcpu;
use crate::devices::{Ioapic, Lines, Message, Pics, Pit, SplitChips, Ticker};
use crate::error::{Error, Result, kvm};
use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_msi};
use kvm_ioctls::{Kvm, VmFd};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::JoinHandle;

/// Pins of the IOAPIC whose ends of interrupts the kernel tells.
const PINS: u64 = 24;

/// Makes a virtual machine that has no vCPU yet one with a split irqchip.
pub(super) fn enable(kvm_fd: &Kvm, vm: &VmFd) -> Result<()> {
    if kvm_fd.check_extension_raw(KVM_CAP_SPLIT_IRQCHIP.into()) <= 0 {
        return Err(Error::KvmCapability { capability: "KVM_CAP_SPLIT_IRQCHIP" });
    }
    let cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [PINS, 0, 0, 0], ..kvm_enable_cap::default() };
    vm.enable_cap(&cap).map_err(kvm("split the interrupt controllers"))
}

/// The chips while the machine is put together.
pub(super) struct Split {
    chips: SplitChips,
    pub(super) to_vcpu: Arc<ToVcpu>,
}

impl Split {
    /// Makes the chips of a machine; adds their threads.
    pub(super) fn new(
        vm: &Arc<VmFd>,
        routes: &Arc<Routes>,
        clock: &Arc<Mutex<VirtualClock>>,
        threads: &mut Vec<JoinHandle<()>>,
    ) -> Result<Split> {
        let to_vcpu = Arc::new(ToVcpu::default());
        let wire = to_vcpu.clone();
        let pics = Pics::new(Box::new(move |level| wire.set(level)));
        let (sender, routes) = (vm.clone(), routes.clone());
        let send = move |Message { address, data }| {
            let message = kvm_msi { address_lo: address, data, ..kvm_msi::default() };
            if let Err(error) = sender.signal_msi(message) {
                tracing::error!(%error, address, data, "an interrupt of the first IOAPIC is lost");
            }
        };
        let route = move |messages: &[Option<Message>]| {
            if let Err(error) = routes.set_pins(messages) {
                tracing::error!(%error, "ends of level-triggered interrupts are lost");
            }
        };
        let lines = Lines::new(pics, Ioapic::first(Box::new(send), Box::new(route)));
        let wires = lines.clone();
        let pit = Pit::new(Box::new(move |level| wires.set(0, level)));
        let clock = clock.clone();
        let (pit, thread) = Ticker::start("pit", pit, move || clock.lock().now().into())
            .map_err(|cause| Error::Host { what: "start the thread of the PIT", cause })?;
        threads.push(thread);
        Ok(Split { chips: SplitChips { lines, pit }, to_vcpu })
    }

    /// What a device with this interrupt drives.
    pub(super) fn line(&self, irq: u32) -> Box<dyn FnMut(bool) + Send> {
        let lines = self.chips.lines.clone();
        Box::new(move |level| lines.set(irq, level))
    }

    pub(super) fn into_chips(self) -> SplitChips {
        self.chips
    }
}

/// The line from the 8259s to the first vCPU.
#[derive(Default)]
pub(super) struct ToVcpu {
    asserted: AtomicBool,
    /// The vector of an interrupt that was taken from the 8259s and not yet by the kernel.
    taken: Mutex<Option<u8>>,
    /// An interrupt that the kernel has taken, as long as the guest may not have.
    handed: Mutex<Option<Handed>>,
    vcpus: OnceLock<Weak<[Vcpu]>>,
}

/// An interrupt that was handed to the kernel. Until the guest is entered it is in none of the states that KVM gives
/// out.
struct Handed {
    vector: u8,
    /// Where the guest was.
    place: Place,
}

/// RIP and RSP of a vCPU.
pub(super) type Place = (u64, u64);

impl ToVcpu {
    pub(super) fn connect(self: &Arc<Self>, vcpus: &Arc<[Vcpu]>) {
        self.vcpus.get_or_init(|| Arc::downgrade(vcpus));
        vcpus.iter().take(1).for_each(|vcpu| vcpu.attach(self.clone()));
    }

    /// The machine is reset: an interrupt that was taken and not handed over is no more.
    pub(super) fn forget(&self) {
        *self.taken.lock() = None;
        self.delivered();
    }

    /// The guest was entered, and has got what was handed over.
    pub(super) fn delivered(&self) {
        *self.handed.lock() = None;
    }

    /// The kernel may still have an interrupt for the guest, so that it would not take another.
    pub(super) fn is_under_way(&self) -> bool {
        self.handed.lock().is_some()
    }

    /// The vector of an interrupt that a guest has not got that is at `place` now: the 8259s do not have it any more.
    /// Of a KVM_RUN that was interrupted it is unknown whether it entered the guest, but where an interrupt is taken,
    /// the guest moves on.
    pub(super) fn undelivered(&self, place: Place) -> Option<u8> {
        let handed = self.handed.lock().as_ref().filter(|handed| handed.place == place).map(|handed| handed.vector);
        handed.or(*self.taken.lock())
    }

    /// Whether there is an interrupt for the vCPU.
    pub(super) fn is_asserted(&self) -> bool {
        self.asserted.load(Ordering::SeqCst) || self.taken.lock().is_some()
    }

    /// Hands an interrupt over to a guest at `place` by `inject`, which says whether it was taken; if not, the same one
    /// comes again.
    pub(super) fn hand_over<E>(
        &self,
        place: Place,
        acknowledge: impl FnOnce() -> u8,
        inject: impl FnOnce(u8) -> std::result::Result<bool, E>,
    ) -> std::result::Result<(), E> {
        let waiting = self.taken.lock().take();
        let vector = waiting.unwrap_or_else(acknowledge);
        match inject(vector)? {
            true => *self.handed.lock() = Some(Handed { vector, place }),
            false => *self.taken.lock() = Some(vector),
        }
        Ok(())
    }

    fn set(&self, level: bool) {
        self.asserted.store(level, Ordering::SeqCst);
        if level && let Some(vcpus) = self.vcpus.get().and_then(Weak::upgrade) {
            vcpus.iter().take(1).for_each(Vcpu::kick);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    const HLT: Place = (0x1000, 0x8000);

    fn hand_over(line: &ToVcpu, vector: u8, taken: bool) {
        line.hand_over(HLT, || vector, |_| Ok::<_, Infallible>(taken)).unwrap();
    }

    #[test]
    fn an_interrupt_is_undelivered_until_the_guest_was_entered() {
        let line = ToVcpu::default();
        hand_over(&line, 0x20, true);
        // KVM_RUN was interrupted: before the guest was entered, or after.
        assert_eq!((line.undelivered(HLT), line.undelivered((0x2000, 0x7ff4))), (Some(0x20), None));
        assert!(line.is_under_way());
        line.delivered();
        assert!(!line.is_under_way());
        assert_eq!(line.undelivered(HLT), None, "it was taken, and the guest is back at the same place");
    }

    #[test]
    fn an_interrupt_that_the_kernel_refuses_comes_again() {
        let line = ToVcpu::default();
        hand_over(&line, 0x20, false);
        assert_eq!((line.undelivered(HLT), line.is_asserted()), (Some(0x20), true));
        hand_over(&line, 0x21, true);
        assert_eq!(line.undelivered(HLT), Some(0x20), "and no other is taken from the 8259s");
    }

    #[test]
    fn a_reset_forgets_them() {
        let line = ToVcpu::default();
        hand_over(&line, 0x20, true);
        line.forget();
        assert_eq!((line.undelivered(HLT), line.is_under_way()), (None, false));
    }
}
