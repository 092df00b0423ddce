//! `kernel-irqchip=split`: the kernel has the local APICs, the monitor everything before them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread::JoinHandle;

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_msi};
use kvm_ioctls::{Kvm, VmFd};

use super::clock::VirtualClock;
use super::routes::Routes;
use super::vcpu::Vcpu;
use crate::devices::{Ioapic, Lines, Message, Pics, Pit, SplitChips, Ticker, lock};
use crate::error::{Error, Result, kvm};

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
        let (pit, thread) = Ticker::start("pit", pit, move || lock(&clock).now().into())
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
    vcpus: OnceLock<Weak<[Vcpu]>>,
}

impl ToVcpu {
    pub(super) fn connect(self: &Arc<Self>, vcpus: &Arc<[Vcpu]>) {
        self.vcpus.get_or_init(|| Arc::downgrade(vcpus));
        vcpus.iter().take(1).for_each(|vcpu| vcpu.attach(self.clone()));
    }

    /// The machine is reset: an interrupt that was taken and not handed over is no more.
    pub(super) fn forget(&self) {
        *lock(&self.taken) = None;
    }

    /// Whether there is an interrupt for the vCPU.
    pub(super) fn is_asserted(&self) -> bool {
        self.asserted.load(Ordering::SeqCst) || lock(&self.taken).is_some()
    }

    /// Hands an interrupt over by `inject`, which says whether it was taken; if not, the same one comes again.
    pub(super) fn hand_over<E>(
        &self,
        acknowledge: impl FnOnce() -> u8,
        inject: impl FnOnce(u8) -> std::result::Result<bool, E>,
    ) -> std::result::Result<(), E> {
        let waiting = lock(&self.taken).take();
        let vector = waiting.unwrap_or_else(acknowledge);
        if !inject(vector)? {
            *lock(&self.taken) = Some(vector);
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
