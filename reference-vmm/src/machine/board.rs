//! The board of a machine: interrupt controllers and devices, put together before there is a vCPU.

use super::clock::VirtualClock;
use super::config::MachineConfig;
use super::routes::Routes;
use super::run_control::RunControl;
use super::split::{Split, ToVcpu};
use super::vm::DeviceSlots;
use crate::boot;
use crate::devices::pci::{FIRST_GSI, PciBus};
use crate::devices::{
    Clock, Devices, FwCfg, FwCfgItems, GED_IRQ, Ged, Ioapic, KEY_UUID, Message, RTC_IRQ, Rtc, SERIAL_IRQ, Serial,
    Transport, Transports, start_pump, wall_clock,
};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::vfio::{Host, VfioDevices};
use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use qevm_microvm::virtio::{VirtioDevice, transport_of};
use std::collections::BTreeMap;
use std::mem;
use std::sync::Arc;
use std::thread::JoinHandle;

/// What is on the board, and the threads that serve it.
pub(super) struct Board {
    pub(super) devices: Arc<Devices>,
    pub(super) virtio: Vec<VirtioDevice>,
    pub(super) vfio: VfioDevices,
    pub(super) routes: Arc<Routes>,
    pub(super) clock: Arc<Mutex<VirtualClock>>,
    pub(super) control: Arc<RunControl>,
    /// The line of 8259s that are in the monitor.
    pub(super) to_vcpu: Option<Arc<ToVcpu>>,
    /// The threads of the virtio devices.
    pub(super) pumps: Vec<JoinHandle<()>>,
    /// Those of the other devices.
    pub(super) threads: Vec<JoinHandle<()>>,
}

impl Board {
    /// Takes the devices and the serial port's output out of `config`. `physical_bits` are those of guest addresses.
    pub(super) fn new(
        config: &mut MachineConfig,
        vm: &Arc<VmFd>,
        memory: &Arc<GuestMemory>,
        physical_bits: u8,
    ) -> Result<Board> {
        let fw_cfg = fw_cfg(config)?;
        let clock = Arc::new(Mutex::new(VirtualClock::default()));
        let mut threads = Vec::new();
        let routes = Arc::new(Routes::new(vm, config.split_irqchip));
        let split = match config.split_irqchip {
            true => Some(Split::new(vm, &routes, &clock, &mut threads)?),
            false => None,
        };
        let to_vcpu = split.as_ref().map(|split| split.to_vcpu.clone());
        let interrupt = |irq, of| interrupt(vm, split.as_ref(), irq, of);
        let ioapic2 = second_ioapic(vm);
        let slots = mem::take(&mut config.virtio);
        let virtio = slots.iter().map(|slot| slot.device()).collect();
        let mut transports = Transports::default();
        for (position, slot) in slots.into_iter().enumerate() {
            let (ioapic, pin) = (Arc::clone(&ioapic2), transport_of(position));
            let line = Box::new(move |level| ioapic.lock().set_line(pin, level));
            let device = slot.into_model().map(|model| Transport::new(model, Arc::clone(memory), line));
            transports.0.push(device.map(|device| Arc::new(Mutex::new(device))));
        }
        let output = mem::replace(&mut config.serial, Box::new(std::io::sink()));
        let serial = Serial::start(output, interrupt(SERIAL_IRQ, "serial port"))?;
        let control = Arc::new(RunControl::new(config.cpus));
        let mut pumps = Vec::new();
        for device in transports.0.iter().flatten() {
            let control = Arc::clone(&control);
            pumps.push(start_pump(device, move || control.may_run())?);
        }
        let mut rtc = None;
        if config.rtc {
            let device = Rtc::new(wall_clock(), config.memory, interrupt(RTC_IRQ, "real-time clock"));
            let (clock, thread) = Clock::start("rtc", device, wall_clock)
                .map_err(|cause| Error::Host { what: "start the thread of the clock", cause })?;
            threads.push(thread);
            rtc = Some(clock);
        }
        let mut pci = config.pcie.then(|| {
            let line = |number: usize| interrupt(FIRST_GSI + number as u32, "PCI bus");
            let mut bus = PciBus::new(physical_bits, std::array::from_fn(line));
            bus.show_by(Box::new(DeviceSlots::new(vm, memory)));
            bus
        });
        let host = Host::new(vm, &routes, memory, config.split_irqchip, mem::take(&mut config.iommufds));
        let vfio = VfioDevices::plug(mem::take(&mut config.vfio), pci.as_mut(), host)?;
        let ged = Ged::new(interrupt(GED_IRQ, "generic event device"));
        let mut devices = Devices::new(Arc::clone(memory), serial, fw_cfg, ged, ioapic2, transports, rtc);
        devices.pci = pci.map(Mutex::new);
        devices.split = split.map(Split::into_chips);
        Ok(Board { devices: Arc::new(devices), virtio, vfio, routes, clock, control, to_vcpu, pumps, threads })
    }
}

/// The firmware configuration device, which takes its files out of `config`.
fn fw_cfg(config: &mut MachineConfig) -> Result<FwCfg> {
    let (mut by_key, mut files) = (BTreeMap::new(), mem::take(&mut config.fw_cfg));
    boot::add_items(&mut by_key, &mut files, config.memory, config.kernel.as_ref())?;
    by_key.extend(config.uuid.map(|uuid| (KEY_UUID, uuid.0.to_vec())));
    FwCfg::new(FwCfgItems { ram_size: config.memory, cpus: config.cpus as u16, files, by_key })
}

/// What a device (`of`) with this interrupt drives: the chips that are in the monitor, or KVM's.
fn interrupt(vm: &Arc<VmFd>, split: Option<&Split>, irq: u32, of: &'static str) -> Box<dyn FnMut(bool) + Send> {
    if let Some(split) = split {
        return split.line(irq);
    }
    let line = Arc::clone(vm);
    Box::new(move |level| {
        if let Err(error) = line.set_irq_line(irq, level) {
            tracing::error!(%error, of, "an interrupt is lost");
        }
    })
}

/// The IOAPIC of the virtio devices, whose interrupts are messages.
fn second_ioapic(vm: &Arc<VmFd>) -> Arc<Mutex<Ioapic>> {
    let line = Arc::clone(vm);
    Arc::new(Mutex::new(Ioapic::new(Box::new(move |Message { address, data }| {
        let message = kvm_msi { address_lo: address, data, ..kvm_msi::default() };
        if let Err(error) = line.signal_msi(message) {
            tracing::error!(%error, address, data, "an interrupt of the second IOAPIC is lost");
        }
    }))))
}
