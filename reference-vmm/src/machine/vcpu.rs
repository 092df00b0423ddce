//! A vCPU and its thread.

use super::dirty_limit::Limits;
use super::run_control::{RunControl, Stop};
use super::split::{Place, ToVcpu};
use super::throttle_gate::ThrottleGate;
use crate::devices::{Devices, Request};
use crate::dirty_log::DirtyLog;
use crate::error::{Error, Result};
use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVMIO, kvm_interrupt, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use parking_lot::Mutex;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Once, OnceLock};
use std::thread::JoinHandle;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

vmm_sys_util::ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);

/// A vCPU. Its thread holds the lock while it runs; the lock is free while it is parked.
pub(crate) struct Vcpu {
    index: usize,
    pub(crate) fd: Mutex<VcpuFd>,
    run_page: RunPage,
    thread: OnceLock<libc::pthread_t>,
    /// The number of the thread, as the kernel has it.
    tid: OnceLock<u32>,
    /// The line from 8259s that are not in the kernel.
    external: OnceLock<Arc<ToVcpu>>,
}

/// What a vCPU's thread shares with the rest of the machine.
#[derive(Clone)]
pub(crate) struct VcpuContext {
    pub(crate) control: Arc<RunControl>,
    pub(crate) gate: Arc<ThrottleGate>,
    pub(crate) devices: Arc<Devices>,
    pub(crate) dirty_log: Arc<DirtyLog>,
    pub(crate) dirty_limit: Arc<Limits>,
}

/// The `kvm_run` page that the vCPU shares with the kernel, for what `VcpuFd` does not offer.
struct RunPage(*mut kvm_run);

// SAFETY: the page stays mapped as long as the vCPU's descriptor, which lives beside it.
unsafe impl Send for RunPage {}
// SAFETY: as above; `immediate_exit` is only used atomically, and `io_size` only by the thread that has the descriptor.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Makes the next `KVM_RUN` return at once.
    fn set_immediate_exit(&self, value: bool) {
        // SAFETY: see the Send implementation; the field is a byte.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.0).immediate_exit) }.store(value.into(), Ordering::SeqCst);
    }

    /// Whether the guest could take an interrupt of 8259s when it was last left.
    fn is_ready_for_interrupt(&self) -> bool {
        // SAFETY: see the Send implementation; the field is a byte that only the thread that has the descriptor uses.
        unsafe { (&raw const (*self.0).ready_for_interrupt_injection).read() != 0 }
    }

    /// Makes `KVM_RUN` return when the guest can take an interrupt of 8259s.
    fn ask_for_window(&self, ask: bool) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.0).request_interrupt_window).write(ask.into()) }
    }

    /// After an I/O exit: bytes in each access, of which a string instruction makes many at once.
    fn io_size(&self) -> usize {
        // SAFETY: see the Send implementation; the last exit was for I/O, so this is the member of the union that is
        // set.
        let size = unsafe { (&raw const (*self.0).__bindgen_anon_1.io.size).read() };
        usize::from(size).max(1)
    }
}

impl Vcpu {
    pub(crate) fn new(index: usize, mut fd: VcpuFd) -> Vcpu {
        let run_page = RunPage(fd.get_kvm_run());
        Vcpu {
            index,
            fd: Mutex::new(fd),
            run_page,
            thread: OnceLock::new(),
            tid: OnceLock::new(),
            external: OnceLock::new(),
        }
    }

    /// Makes the vCPU leave the guest, or not enter it, so that its thread looks at the run control again.
    pub(crate) fn kick(&self) {
        self.run_page.set_immediate_exit(true);
        if let Some(thread) = self.thread.get() {
            // SAFETY: the machine joins the thread only after the last kick, so the id is valid.
            unsafe { libc::pthread_kill(*thread, kick_signal()) };
        }
    }

    /// Whether its thread has this number, as the kernel has it.
    pub(super) fn has_thread(&self, tid: u32) -> bool {
        self.tid.get() == Some(&tid)
    }

    /// The number that the kernel has for its thread; 0 before it has begun.
    pub(super) fn thread(&self) -> u32 {
        self.tid.get().copied().unwrap_or_default()
    }

    /// Connects the 8259s.
    pub(super) fn attach(&self, line: Arc<ToVcpu>) {
        self.external.get_or_init(|| line);
    }

    /// The machine is reset.
    pub(super) fn forget_interrupts(&self) {
        self.external.get().into_iter().for_each(|line| line.forget());
    }

    /// The vector of an interrupt that was taken from 8259s that are not in the kernel, and which the guest, which is
    /// at `place`, has not got.
    pub(super) fn undelivered(&self, place: Place) -> Option<u8> {
        self.external.get()?.undelivered(place)
    }

    /// Hands the guest the interrupt of 8259s that are not in the kernel, or asks to be told when it can take one.
    fn inject(&self, fd: &VcpuFd, devices: &Devices) -> Option<Stop> {
        let (line, chips) = self.external.get().zip(devices.split.as_ref())?;
        if line.is_asserted() && self.run_page.is_ready_for_interrupt() && !line.is_under_way() {
            let inject = |vector: u8| {
                let interrupt = kvm_interrupt { irq: vector.into() };
                // SAFETY: the call reads one structure.
                match unsafe { ioctl_with_ref(fd, KVM_INTERRUPT(), &interrupt) } {
                    0 => Ok(true),
                    _ => match kvm_ioctls::Error::last() {
                        // The one before has not got into the guest yet.
                        error if error.errno() == libc::EEXIST => Ok(false),
                        error => Err(error),
                    },
                }
            };
            let handed =
                fd.get_regs().and_then(|regs| line.hand_over((regs.rip, regs.rsp), || chips.acknowledge(), inject));
            if let Err(error) = handed {
                return Some(Stop::Failed { vcpu: self.index, reason: format!("KVM_INTERRUPT: {error}"), rip: 0 });
            }
        }
        self.run_page.ask_for_window(line.is_asserted());
        None
    }

    /// Runs until the run control says otherwise or the guest stops by itself, then completes what the guest has begun.
    fn run(&self, around: &VcpuContext) -> Option<Stop> {
        let VcpuContext { control, gate, .. } = around;
        let pauses = &around.dirty_limit.pauses;
        let mut fd = self.fd.lock();
        let (mut paused, mut stopped) = (0, None);
        loop {
            // First the flag, then the question: a kick after the question finds the flag down and raises it.
            self.run_page.set_immediate_exit(false);
            if !control.may_run() {
                break;
            }
            if let Some(pause) = gate.due(&mut paused) {
                control.wait_while_running(pause, || gate.released());
                continue;
            }
            if let Some(pause) = pauses.due(self.index) {
                control.wait_while_running(pause.left, || pauses.has_changed(self.index, pause));
                // What it wrote between the decision and the pause is paid for as well.
                around.dirty_limit.look(self.index);
                continue;
            }
            let stop = self.inject(&fd, &around.devices);
            match stop.or_else(|| self.enter(&mut fd, around).1) {
                None => {}
                // There is nothing to complete, and it may not end.
                failed @ Some(Stop::Failed { .. }) => return failed,
                stop => {
                    stopped = stop;
                    break;
                }
            }
        }
        // An IN or MMIO access is finished by the next KVM_RUN: without it the saved registers would be those before
        // it.
        loop {
            self.run_page.set_immediate_exit(true);
            let (interrupted, stop) = self.enter(&mut fd, around);
            if interrupted || stop.is_some() {
                return stopped.or(stop);
            }
        }
    }

    /// One KVM_RUN. The first value tells whether it was interrupted before an exit.
    fn enter(&self, fd: &mut VcpuFd, around: &VcpuContext) -> (bool, Option<Stop>) {
        let reset = |cause: &str| Some(Stop::Reset { vcpu: self.index, cause: cause.to_owned() });
        let devices = &around.devices;
        let exit = fd.run();
        if let Some(line) = self.external.get()
            && !matches!(exit, Ok(VcpuExit::Intr) | Err(_))
        {
            line.delivered();
        }
        let failure = match exit {
            Ok(VcpuExit::IoIn(port, data)) => {
                data.chunks_mut(self.run_page.io_size()).for_each(|access| devices.port_in(port, access));
                return (false, None);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                data.chunks(self.run_page.io_size()).for_each(|access| devices.port_out(port, access));
                return (false, None);
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                devices.mmio_read(gpa, data);
                return (false, None);
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                let stop = match devices.mmio_write(gpa, data) {
                    Request::None => None,
                    Request::Reset => reset("reset register"),
                    Request::Shutdown => Some(Stop::Shutdown),
                };
                return (false, stop);
            }
            Ok(VcpuExit::IoapicEoi(vector)) => {
                devices.split.iter().for_each(|chips| chips.end_of_interrupt(vector));
                return (false, None);
            }
            Ok(VcpuExit::Shutdown) => return (false, reset("triple fault")),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return (true, None),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return (true, None),
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => match around.dirty_log.ring_full(self.index) {
                Ok(()) => {
                    around.dirty_limit.look(self.index);
                    return (false, None);
                }
                Err(error) => error.to_string(),
            },
            Ok(exit) => format!("unexpected exit {exit:?}"),
            Err(error) => format!("KVM_RUN: {error}"),
        };
        let rip = fd.get_regs().map_or(0, |regs| regs.rip);
        (false, Some(Stop::Failed { vcpu: self.index, reason: failure, rip }))
    }
}

/// Starts the thread of a vCPU; it parks at once.
pub(crate) fn spawn(vcpus: &Arc<[Vcpu]>, index: usize, around: VcpuContext) -> Result<JoinHandle<()>> {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        register_signal_handler(kick_signal(), ignore).expect("a real-time signal can be handled");
    });
    let all = Arc::clone(vcpus);
    let body = move || {
        let tid = nix::unistd::gettid().as_raw();
        all[index].tid.get_or_init(|| tid.cast_unsigned());
        let control = &around.control;
        let _gone = Gone(control);
        while control.park() {
            if let Some(stop) = all[index].run(&around) {
                control.stopped(stop);
                all.iter().for_each(Vcpu::kick);
            }
        }
    };
    let handle = std::thread::Builder::new()
        .name(format!("vcpu{index}"))
        .spawn(body)
        .map_err(|cause| Error::Host { what: "start a vCPU thread", cause })?;
    vcpus[index].thread.get_or_init(|| handle.as_pthread_t());
    Ok(handle)
}

struct Gone<'a>(&'a RunControl);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.0.gone();
    }
}

fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// The signal only has to interrupt `KVM_RUN`.
extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
