//! The registers of a legacy virtio-mmio transport (virtio 1.2, 4.2.4), and what all devices behind them have in
//! common.

mod state;
mod tasks;

use parking_lot::Condvar;
use std::os::fd::RawFd;
use std::sync::Arc;

pub(crate) use tasks::{drain, settle};

use super::model::{Access, Model};
use super::queue::{MAX_QUEUE, Queue, RingError};
use super::wake::Wake;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;

/// Registers, by offset.
mod register {
    pub(super) const MAGIC: u64 = 0x00;
    pub(super) const VERSION: u64 = 0x04;
    pub(super) const DEVICE_ID: u64 = 0x08;
    pub(super) const VENDOR_ID: u64 = 0x0c;
    pub(super) const HOST_FEATURES: u64 = 0x10;
    pub(super) const HOST_FEATURES_SEL: u64 = 0x14;
    pub(super) const GUEST_FEATURES: u64 = 0x20;
    pub(super) const GUEST_FEATURES_SEL: u64 = 0x24;
    pub(super) const GUEST_PAGE_SIZE: u64 = 0x28;
    pub(super) const QUEUE_SEL: u64 = 0x30;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x34;
    pub(super) const QUEUE_NUM: u64 = 0x38;
    pub(super) const QUEUE_ALIGN: u64 = 0x3c;
    pub(super) const QUEUE_PFN: u64 = 0x40;
    pub(super) const QUEUE_NOTIFY: u64 = 0x50;
    pub(super) const INTERRUPT_STATUS: u64 = 0x60;
    pub(super) const INTERRUPT_ACK: u64 = 0x64;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const CONFIG: u64 = 0x100;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const LEGACY: u32 = 1;
const VENDOR: u32 = u32::from_le_bytes(*b"QEMU");

/// Device status: the driver is ready.
const DRIVER_OK: u8 = 4;

/// Whether the machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Paused,
    /// The vCPUs have stopped, and the device finishes what it has begun.
    Draining,
    Running,
}

/// A transport with its device.
pub(crate) struct Transport {
    host_features_sel: u32,
    guest_features_sel: u32,
    guest_page_shift: u32,
    status: u8,
    isr: u8,
    queue_sel: u16,
    guest_features: u64,
    config: Vec<u8>,
    started: bool,
    broken: bool,
    queues: Vec<Queue>,
    phase: Phase,
    /// The device's thread has a task.
    busy: bool,
    /// A task was finished, or there is none.
    idle: Arc<Condvar>,
    gone: bool,
    wake: Option<Wake>,
    model: Box<dyn Model>,
    line: Box<dyn FnMut(bool) + Send>,
    memory: Arc<GuestMemory>,
}

impl Transport {
    /// After reset. `line` is the interrupt.
    pub(crate) fn new(model: Box<dyn Model>, memory: Arc<GuestMemory>, line: Box<dyn FnMut(bool) + Send>) -> Transport {
        Transport {
            host_features_sel: 0,
            guest_features_sel: 0,
            guest_page_shift: 0,
            status: 0,
            isr: 0,
            queue_sel: 0,
            guest_features: 0,
            config: vec![0; model.config().len()],
            started: false,
            broken: false,
            queues: model.queues().into_iter().map(Queue::new).collect(),
            phase: Phase::Paused,
            busy: false,
            idle: Arc::default(),
            gone: false,
            wake: None,
            model,
            line,
            memory,
        }
    }

    /// A read by the guest. Registers are words; other accesses to them read as zero.
    pub(crate) fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            self.config = self.model.config();
            let bytes = self.config.iter().skip(at as usize).copied().chain(std::iter::repeat(0xff));
            data.iter_mut().zip(bytes).for_each(|(into, byte)| *into = byte);
            return;
        }
        let value = match offset {
            register::DEVICE_ID => self.model.id(),
            register::HOST_FEATURES if self.host_features_sel == 0 => self.model.features() as u32,
            register::QUEUE_NUM_MAX => self.queue().map_or(0, |queue| queue.default_num()),
            register::QUEUE_PFN => {
                let shift = self.guest_page_shift;
                self.queue().map_or(0, |queue| (queue.desc >> shift) as u32)
            }
            register::INTERRUPT_STATUS => self.isr.into(),
            register::STATUS => self.status.into(),
            _ => return read_empty(offset, data),
        };
        put_word(value, data);
    }

    /// A write by the guest.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            return self.model.write_config(at as usize, data, self.guest_features);
        }
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        let shift = self.guest_page_shift;
        match offset {
            register::HOST_FEATURES_SEL => self.host_features_sel = u32::from(value != 0),
            register::GUEST_FEATURES if self.guest_features_sel == 0 => {
                self.guest_features = u64::from(value) & self.model.features();
                self.model.accepted(self.guest_features);
            }
            register::GUEST_FEATURES_SEL => self.guest_features_sel = u32::from(value != 0),
            // 0 and what is no power of two mean nothing; the lowest bit counts.
            register::GUEST_PAGE_SIZE => self.guest_page_shift = value.trailing_zeros() % u32::BITS,
            register::QUEUE_SEL if value < MAX_QUEUE => self.queue_sel = value as u16,
            register::QUEUE_NUM => match self.queue() {
                Some(queue) if value != 0 && value <= queue.default_num() => queue.num = value,
                _ => tracing::warn!(value, queue = self.queue_sel, "a virtio driver asks for a queue that cannot be"),
            },
            register::QUEUE_ALIGN => match self.queue() {
                Some(queue) if value.is_power_of_two() => queue.align = value,
                _ => tracing::warn!(value, "a virtio driver asks for an alignment that cannot be"),
            },
            register::QUEUE_PFN if value == 0 => self.reset(),
            register::QUEUE_PFN => {
                if let Some(queue) = self.queue() {
                    queue.desc = u64::from(value) << shift;
                }
            }
            register::QUEUE_NOTIFY => self.notify(value as usize),
            register::INTERRUPT_ACK => {
                self.isr &= !(value as u8);
                self.update_line();
            }
            register::STATUS => self.set_status(value as u8),
            _ => {}
        }
    }

    /// The machine is about to run.
    ///
    /// # Errors
    /// [`Error::State`] when the queues' indices do not fit what guest memory says.
    pub(crate) fn resume(&mut self) -> Result<()> {
        self.check()?;
        self.update_line();
        self.phase = Phase::Running;
        self.wake();
        if !self.started || self.broken {
            return Ok(());
        }
        self.serve(|model, access| {
            model.resume(access)?;
            for index in 0..access.queues.len() {
                if access.queues[index].is_ready() {
                    access.queues[index].listen(access.memory, access.features)?;
                    model.process(index, access)?;
                }
            }
            Ok(())
        });
        Ok(())
    }

    /// Whether the queues' indices fit what guest memory says.
    ///
    /// # Errors
    /// [`Error::State`] when they do not.
    pub(crate) fn check(&mut self) -> Result<()> {
        if self.broken {
            return Ok(());
        }
        for (index, queue) in self.queues.iter_mut().enumerate() {
            queue.check(&self.memory).map_err(|error| {
                Error::State(format!("queue {index} of virtio device {}: {error}", self.model.id()))
            })?;
        }
        Ok(())
    }

    /// The machine has stopped: the guest sees nothing of the device any more when this returns.
    pub(super) fn pause(&mut self) {
        self.phase = Phase::Paused;
        self.wake();
        self.model.pause();
    }

    /// See [`Model::activate`].
    pub(crate) fn activate(&mut self) -> Result<()> {
        self.model.activate()
    }

    /// See [`Model::inactivate`].
    pub(crate) fn inactivate(&mut self) {
        self.model.inactivate();
    }

    /// Ends the thread of the device.
    pub(crate) fn end(&mut self) {
        self.gone = true;
        self.wake();
    }

    pub(super) fn set_wake(&mut self, wake: Wake) {
        self.wake = Some(wake);
    }

    /// What the device's thread is to wait for; `None` when it is to end.
    pub(super) fn interest(&mut self) -> Option<Vec<(RawFd, i16)>> {
        let mut interest = Vec::new();
        if self.runs() && !self.gone {
            self.work(|model, access| {
                interest = model.interest(access)?;
                Ok(())
            });
        }
        (!self.gone).then_some(interest)
    }

    /// Some of it has happened. A machine that has stopped meanwhile learns of it when it goes on.
    pub(super) fn pump(&mut self, ready: &[(RawFd, i16)]) {
        if self.runs() {
            self.work(|model, access| model.pump(ready, access));
        }
    }

    /// See [`Model::announce`]. A guest that is paused is nowhere.
    pub(crate) fn announce(&mut self) {
        if self.runs() {
            self.work(|model, access| {
                model.announce(access);
                Ok(())
            });
        }
    }

    fn runs(&self) -> bool {
        self.phase == Phase::Running && !self.broken
    }

    /// Whether chains wait that were too many for one turn.
    pub(super) fn has_left(&self) -> bool {
        self.runs() && self.queues.iter().any(Queue::has_left)
    }

    /// Does a turn's worth of what was too much for one turn.
    pub(super) fn process_left(&mut self) {
        for index in 0..self.queues.len() {
            if self.runs() && self.queues[index].take_left() && self.queues[index].is_ready() {
                self.work(|model, access| model.process(index, access));
            }
        }
    }

    /// Makes the device's thread look at everything anew.
    pub(crate) fn wake(&self) {
        if let Some(wake) = &self.wake {
            wake.wake();
        }
    }

    fn queue(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(usize::from(self.queue_sel))
    }

    fn set_status(&mut self, status: u8) {
        self.status = status;
        self.started = status & DRIVER_OK != 0;
        if status == 0 {
            self.reset();
        }
    }

    /// As when the machine is switched on: what a driver's reset leaves alone is reset as well.
    pub(crate) fn switch_on(&mut self) {
        (self.host_features_sel, self.guest_features_sel, self.guest_page_shift) = (0, 0, 0);
        self.reset();
        self.wake();
    }

    fn reset(&mut self) {
        (self.status, self.isr, self.queue_sel, self.guest_features) = (0, 0, 0, 0);
        (self.started, self.broken) = (false, false);
        self.queues.iter_mut().for_each(|queue| *queue = Queue::new(queue.default_num()));
        self.model.reset();
        self.update_line();
    }

    fn notify(&mut self, index: usize) {
        if self.broken || !self.queues.get(index).is_some_and(Queue::is_ready) {
            return;
        }
        // A legacy driver may use a queue before it says that it is ready.
        self.started = true;
        self.serve(|model, access| model.process(index, access));
    }

    /// Lets the model work; what it waits for may be something else then.
    fn serve(&mut self, work: impl FnOnce(&mut dyn Model, &mut Access<'_>) -> Result<(), RingError>) {
        self.work(work);
        self.wake();
    }

    /// Lets the model work for a turn, and interrupts the guest if it is to be.
    fn work(&mut self, work: impl FnOnce(&mut dyn Model, &mut Access<'_>) -> Result<(), RingError>) {
        let features = self.guest_features;
        self.queues.iter_mut().for_each(Queue::refill);
        let mut access = Access { memory: &self.memory, features, queues: &mut self.queues, raise: 0 };
        let result = work(&mut *self.model, &mut access);
        let raise = access.raise;
        if let Err(error) = result {
            tracing::error!(device = self.model.id(), %error, "a virtio driver broke the protocol; its device waits for a reset");
            self.broken = true;
        }
        if raise != 0 {
            self.isr |= raise;
            self.update_line();
        }
    }

    fn update_line(&mut self) {
        (self.line)(self.isr != 0);
    }
}

/// A read from a transport without a device, or of a register that is the same for all.
pub(crate) fn read_empty(offset: u64, data: &mut [u8]) {
    let value = match offset {
        register::MAGIC => MAGIC,
        register::VERSION => LEGACY,
        register::VENDOR_ID => VENDOR,
        _ => 0,
    };
    put_word(value, data);
}

fn put_word(value: u32, data: &mut [u8]) {
    data.fill(0);
    if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
        *word = value.to_le_bytes();
    }
}
