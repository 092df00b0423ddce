//! The machine: RAM, vCPUs on KVM, in-kernel interrupt controllers and PIT, and the devices of
//! [`devices`](crate::devices).
//!
//! A [`Machine`] is built paused at the reset vector. All calls take `&self` and may come from any thread; those that
//! change or read what the vCPUs use need it paused and say so. Dropping it ends its threads.
//!
//! ```no_run
//! use reference_vmm::machine::{Machine, MachineConfig};
//! let machine = Machine::new(MachineConfig { memory: 128 << 20, cpus: 2, ..MachineConfig::default() })?;
//! machine.resume()?;
//! std::thread::sleep(std::time::Duration::from_secs(1));
//! machine.pause();
//! let state = machine.save_state()?;
//! let other = Machine::new(MachineConfig { memory: 128 << 20, cpus: 2, ..MachineConfig::default() })?;
//! // … copy every RAM block …
//! other.load_state(&state)?;
//! other.resume()?;
//! # Ok::<(), reference_vmm::Error>(())
//! ```

mod board;
mod clock;
mod config;
mod cpuid;
mod dirty_limit;
mod guest;
mod kvm_state;
mod reset;
mod routes;
mod run_control;
mod running_log;
mod save;
mod slow;
mod split;
mod throttle;
mod throttle_gate;
mod vcpu;
mod vfio;
mod vm;

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VmFd};
use parking_lot::Mutex;
use qevm_multifd::Uuid;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::Kernel;
use crate::devices::pci::PciMessage;
use crate::devices::{Devices, Serial, Transport, missing};
use crate::dirty_log::{DirtyLog, Reaper};
use crate::error::{Error, Result, kvm};
use crate::memory::{BackendError, GuestMemory};
use crate::vfio::VfioDevices;
use board::Board;
use clock::VirtualClock;
pub use config::MachineConfig;
use dirty_limit::DirtyLimit;
pub use dirty_limit::VcpuDirtyLimit;
use kvm_state::FrozenClocks;
use qevm_microvm::state::{MachineState, OpaqueState};
use qevm_microvm::virtio::{TRANSPORTS, VirtioDevice};
pub(crate) use routes::Routes;
use run_control::RunControl;
pub use run_control::{RunState, Stop};
pub use throttle::MAX_THROTTLE;
use throttle::Throttle;
use vcpu::{Vcpu, VcpuContext};
use vm::create_vm;
pub use vm::open_kvm;

/// Most vCPUs a machine can have: CPUID leaf 4 has six bits for their number.
pub const MAX_CPUS: usize = 64;

/// How long a stopped machine waits for its disks.
const DRAIN: Duration = Duration::from_millis(300);
/// How long one that is to be saved waits for what they have begun: nothing may be written when the guest is elsewhere.
const SETTLE: Duration = Duration::from_secs(30);
/// How long the end of a machine waits for the threads of its devices.
const PATIENCE: Duration = Duration::from_secs(1);

const KVM_DEVICE: &str = "/dev/kvm";

/// A virtual machine.
pub struct Machine {
    vcpus: Arc<[Vcpu]>,
    control: Arc<RunControl>,
    throttle: Throttle,
    dirty_limit: DirtyLimit,
    vfio: VfioDevices,
    threads: Vec<std::thread::JoinHandle<()>>,
    /// Those of the virtio devices.
    pumps: Vec<std::thread::JoinHandle<()>>,
    devices: Arc<Devices>,
    clock: Arc<Mutex<VirtualClock>>,
    /// What KVM lets run on while the vCPUs are paused, as it was when they stopped.
    held: Mutex<Option<FrozenClocks>>,
    virtio: Vec<VirtioDevice>,
    bios: Vec<u8>,
    kernel: Option<Kernel>,
    /// RAM was written to before the guest has run.
    has_kernel: bool,
    opaque: Mutex<OpaqueState>,
    dirty_log: Arc<DirtyLog>,
    _reaper: Reaper,
    saved_msrs: Vec<u32>,
    /// The state in which the machine was made, before a kernel was loaded; `None` until it is.
    fresh: Option<MachineState>,
    uuid: Option<Uuid>,
    memory: Arc<GuestMemory>,
    routes: Arc<Routes>,
    vm: Arc<VmFd>,
}

impl Machine {
    /// Builds a machine, paused at the reset vector.
    ///
    /// # Errors
    /// [`Error::KvmUnavailable`] when there is no usable `/dev/kvm`, [`Error::KvmCapability`] when its KVM lacks
    /// something, [`Error::Config`] and [`Error::MemoryBackend`] for a machine that cannot be, [`Error::Kvm`] and
    /// [`Error::Host`] when the host refuses.
    pub fn new(mut config: MachineConfig) -> Result<Machine> {
        check(&config)?;
        let memory = Arc::new(memory(&mut config)?);
        if config.mem_prealloc {
            memory.blocks().iter().try_for_each(|block| block.populate())?;
        }
        let kvm_fd = open_kvm(Path::new(KVM_DEVICE))?;
        let vm = Arc::new(create_vm(&kvm_fd, &memory, config.split_irqchip)?);
        // Rings are asked for before there is a vCPU.
        let dirty_log = Arc::new(DirtyLog::new(Arc::clone(&vm), Arc::clone(&memory), config.dirty_ring_size)?);
        let cpuid = cpuid::supported(&kvm_fd)?;
        let board = Board::new(&mut config, &vm, &memory, cpuid::physical_bits(&cpuid))?;
        let vcpus = create_vcpus(&kvm_fd, &vm, &cpuid, config.cpus, &dirty_log)?;
        if let Some(to_vcpu) = &board.to_vcpu {
            to_vcpu.connect(&vcpus);
        }
        let mut machine = Machine {
            vcpus,
            control: board.control,
            vfio: board.vfio,
            throttle: Throttle::default(),
            dirty_limit: DirtyLimit::new(config.cpus, dirty_log.clone()),
            threads: board.threads,
            pumps: board.pumps,
            devices: board.devices,
            clock: board.clock,
            held: Mutex::default(),
            virtio: board.virtio,
            has_kernel: config.kernel.is_some() && !config.incoming,
            bios: config.bios,
            kernel: config.kernel,
            opaque: Mutex::default(),
            _reaper: Reaper::start(&dirty_log)?,
            dirty_log,
            saved_msrs: kvm_state::saved_msrs(&kvm_fd)?,
            fresh: None,
            uuid: config.uuid,
            memory,
            routes: board.routes,
            vm,
        };
        machine.start_vcpus()?;
        machine.fresh = Some(machine.save_state()?);
        if machine.has_kernel {
            machine.load_kernel()?;
        }
        Ok(machine)
    }

    /// Starts the threads of the vCPUs, and returns when each is parked.
    fn start_vcpus(&mut self) -> Result<()> {
        let context = VcpuContext {
            control: self.control.clone(),
            gate: self.throttle.gate().clone(),
            devices: self.devices.clone(),
            dirty_log: self.dirty_log.clone(),
            dirty_limit: self.dirty_limit.limits().clone(),
        };
        for index in 0..self.vcpus.len() {
            self.threads.push(vcpu::spawn(&self.vcpus, index, context.clone())?);
        }
        self.control.wait_parked();
        Ok(())
    }

    /// Adds an interrupt that sends a message, and lets whatever is written to `event` raise it: its number.
    ///
    /// # Errors
    /// [`Error::Kvm`] when KVM refuses the route or the event.
    pub fn add_message(&self, event: &EventFd, message: PciMessage) -> Result<u32> {
        let gsi = self.routes.add(message)?;
        self.vm.register_irqfd(event, gsi).map_err(kvm("raise an interrupt by an event"))?;
        Ok(gsi)
    }

    /// The RAM.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The dirty log.
    pub fn dirty_log(&self) -> &DirtyLog {
        &self.dirty_log
    }

    /// Whether there is a real-time clock.
    pub fn has_rtc(&self) -> bool {
        self.devices.rtc.is_some()
    }

    /// Whether there is a PCI bus.
    pub fn has_pci(&self) -> bool {
        self.devices.pci.is_some()
    }

    /// Devices on virtio-mmio, in the order of the command line.
    pub fn virtio(&self) -> &[VirtioDevice] {
        &self.virtio
    }

    /// Whether it was built with a kernel, which is in its RAM.
    pub fn has_kernel(&self) -> bool {
        self.has_kernel
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> usize {
        self.vcpus.len()
    }

    /// The numbers that the kernel has for the threads of the vCPUs; 0 for one that has not begun.
    pub fn vcpu_threads(&self) -> Vec<u32> {
        self.vcpus.iter().map(Vcpu::thread).collect()
    }

    /// Whether the vCPUs run.
    pub fn run_state(&self) -> RunState {
        self.control.state()
    }

    /// Its UUID, if it was given one.
    pub fn uuid(&self) -> Option<Uuid> {
        self.uuid
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// [`Error::Config`] when the guest has stopped for good, or has devices without a model; [`Error::Kvm`] when KVM
    /// does not let the clocks go on.
    pub fn resume(&self) -> Result<()> {
        self.resume_and_tell(|| ())
    }

    /// The same. `tell` is called when all is ready but the VFIO devices, which begin to work after it and before the
    /// vCPUs, as a QEMU's do after its event RESUME.
    pub(crate) fn resume_and_tell(&self, tell: impl FnOnce()) -> Result<()> {
        self.can_run()?;
        if self.control.all_parked() {
            self.activate()?;
            self.devices.virtio.each(Transport::resume)?;
        }
        self.opaque.lock().mark_stale();
        tell();
        self.vfio.resume()?;
        if self.control.all_parked() {
            kvm_state::release(self)?;
        }
        self.clock.lock().start();
        self.tick(true);
        self.control.resume().map_err(|stop| {
            self.clock.lock().stop();
            Error::Config(format!("the machine cannot go on: {stop}"))
        })?;
        // What was too much for one turn goes on, too.
        self.devices.virtio.0.iter().flatten().for_each(|device| device.lock().wake());
        Ok(())
    }

    /// Locks the images of the disks, as QEMU does; [`resume`](Machine::resume) does so, too. A machine that waits for
    /// a guest leaves it at that, because the images are the source's until it has let go of them.
    ///
    /// # Errors
    /// [`Error::Config`] when another process uses one; none is locked then.
    pub fn activate(&self) -> Result<()> {
        let activated = self.devices.virtio.each(Transport::activate);
        if activated.is_err() {
            self.inactivate();
        }
        activated
    }

    /// Lets go of the images of the disks, for the destination of a migration to lock. The guest must be paused.
    pub fn inactivate(&self) {
        self.devices.virtio.0.iter().flatten().for_each(|device| device.lock().inactivate());
    }

    /// Whether every device of the machine has a model, so that a guest can run and not just be kept.
    ///
    /// # Errors
    /// [`Error::Config`] naming a device that has none.
    pub fn can_run(&self) -> Result<()> {
        let kept = self.virtio.iter().zip(&self.devices.virtio.0).find(|(_, model)| model.is_none());
        match kept {
            Some((device, _)) => Err(Error::Config(format!(
                "a guest with this {device} can be kept here (-S) but not run: it was given {}",
                missing(*device)
            ))),
            None => Ok(()),
        }
    }

    /// Stops the vCPUs and waits until none runs. RAM and device state change no more until [`Machine::resume`]. It
    /// takes less than a second whatever the guest and its disks do: requests that a disk has not answered by then are
    /// begun anew when the guest goes on.
    pub fn pause(&self) {
        let was_running = self.control.state() == RunState::Running;
        self.vfio.quiesce();
        self.control.pause(|| self.vcpus.iter().for_each(Vcpu::kick));
        self.clock.lock().stop();
        self.tick(false);
        if was_running && let Err(error) = kvm_state::hold(self) {
            tracing::warn!(%error, "clock and PIT go on while the machine is paused");
        }
        self.vfio.stop();
        self.devices.virtio.drain(Instant::now() + DRAIN);
        Serial::flush(&self.devices.serial);
    }

    /// Stops the guest for good, because a part of its memory cannot be had. It does not wait for vCPUs: who waits for
    /// that memory does so until the end.
    pub fn lose_memory(&self, reason: String) {
        self.control.stopped(Stop::MemoryLost(reason));
        self.vcpus.iter().for_each(Vcpu::kick);
    }

    /// Waits until the guest stops by itself, at most that long. `None`: it had not, or has been reset since.
    pub fn wait_stop(&self, timeout: Duration) -> Option<Stop> {
        self.control.wait_stop(timeout)
    }

    /// Bytes arrive on the serial line; returns how many the port took.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        self.devices.serial.lock().input(bytes)
    }

    /// Lets timers of devices run out, or holds them back.
    fn tick(&self, running: bool) {
        self.devices.serial.lock().run(running);
        self.devices.rtc.iter().for_each(|rtc| rtc.run(running));
        self.devices.split.iter().for_each(|chips| chips.pit.run(running));
    }

    fn must_be_paused(&self, to: &'static str) -> Result<()> {
        if self.control.all_parked() { Ok(()) } else { Err(Error::NotPaused(to)) }
    }
}

/// Fails for a machine that cannot be.
fn check(config: &MachineConfig) -> Result<()> {
    let (cpus, virtio) = (config.cpus, config.virtio.len());
    if !(1..=MAX_CPUS).contains(&cpus) {
        return Err(Error::Config(format!("the machine cannot have {cpus} vCPUs: wanted 1 to {MAX_CPUS}")));
    }
    if virtio > TRANSPORTS {
        return Err(Error::Config(format!("the machine has {TRANSPORTS} virtio-mmio transports, not {virtio}")));
    }
    Ok(())
}

/// RAM and ROM, of the files in `config` where it has some.
fn memory(config: &mut MachineConfig) -> Result<GuestMemory> {
    match &config.memory_backend {
        Some(backend) if backend.len() != config.memory => Err(BackendError::Size.into()),
        backend => {
            GuestMemory::of_files(config.memory, backend.as_ref(), &config.bios, std::mem::take(&mut config.files))
        }
    }
}

/// The vCPUs of a machine, each with its CPUID and, if there are some, a dirty ring.
fn create_vcpus(kvm_fd: &Kvm, vm: &VmFd, cpuid: &CpuId, cpus: usize, dirty_log: &DirtyLog) -> Result<Arc<[Vcpu]>> {
    let create = |index| {
        let fd = vm.create_vcpu(index as u64).map_err(kvm("create a vCPU"))?;
        fd.set_cpuid2(&cpuid::for_vcpu(cpuid, index, cpus)?).map_err(kvm("set a vCPU's CPUID"))?;
        kvm_state::set_up_mce(kvm_fd, &fd)?;
        dirty_log.attach(&fd)?;
        Ok(Vcpu::new(index, fd))
    };
    (0..cpus).map(create).collect()
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.throttle.end();
        self.dirty_limit.end();
        self.control.exit();
        self.devices.rtc.iter().for_each(|rtc| rtc.end());
        self.devices.split.iter().for_each(|chips| chips.pit.end());
        self.devices.virtio.0.iter().flatten().for_each(|device| device.lock().end());
        self.vcpus.iter().for_each(Vcpu::kick);
        // The last owner to drop it may be a vCPU itself, in a device that the embedder wrote: it does not wait for
        // itself.
        let own = std::thread::current().id();
        for thread in self.threads.drain(..).filter(|thread| thread.thread().id() != own) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
        // A thread that waits for a disk that hangs is left behind: it touches nothing any more.
        let deadline = Instant::now() + PATIENCE;
        while !self.pumps.iter().all(|pump| pump.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        Serial::flush(&self.devices.serial);
    }
}
