//! The test device of the lab (conformance/lab/testdev) within the process: what a guest sees of it, and a driver that
//! migrates it.

use parking_lot::{Mutex, MutexGuard};
use qevm_microvm::state::PciFunctionState;
use reference_vmm::devices::pci::{
    BarKind, BarPages, Changes, ConfigSpace, Function, MsixTable, PciError, PciMessage, command,
};
use reference_vmm::memory::SharedPages;
use reference_vmm::vfio::{DataFile, DeviceState, Driver, MultifdTransfer, PrecopyInfo, VfioBacking, VfioSlot};
use reference_vmm::vmm::Vmm;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use vmm_sys_util::eventfd::EventFd;

const BAR: u64 = 4096;
const VECTORS: u16 = 4;
const PENDING_AT: u32 = 0x800;
const ID: u32 = 0x7665_6474;
const MAGIC: u64 = 0x61_6d64_7665_6474;
/// Pages written with each interrupt that is raised.
const BURST: u64 = 4;
const STOP_COPY: u64 = 1 << 0;
const P2P: u64 = 1 << 1;
/// Bytes of the registers on the way.
const REGISTERS: usize = 40;

/// What gets lost on the way to a device, or at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loss {
    /// The registers that keep what is written.
    Registers,
    /// The page of memory.
    Memory,
    /// What it writes to the guest's pages.
    Dma,
    /// An interrupt.
    Interrupt,
    /// That an interrupt has come already: it comes twice.
    SecondInterrupt,
}

#[derive(Default)]
struct Registers {
    counter: u32,
    scratch: u32,
    pending: u32,
    raised: u32,
    dma_base: u64,
    dma_pages: u32,
    dma_done: u32,
    loss: Option<Loss>,
    /// The state came from elsewhere, and what is to get lost after that has not yet.
    arrived: bool,
}

/// A device; clones are the same one.
#[derive(Clone)]
pub(crate) struct Testdev {
    registers: Arc<Mutex<Registers>>,
    wires: Arc<Wires>,
    state: Arc<Mutex<DeviceState>>,
    inbox: Arc<Mutex<Vec<u8>>>,
    /// BAR 1: a page of memory.
    memory: Arc<File>,
    /// How often the monitor was asked for it.
    trapped: Arc<AtomicU64>,
}

/// How it reaches the machine that it is in.
#[derive(Default)]
struct Wires {
    vmm: OnceLock<Weak<Vmm>>,
    /// Events that raise an interrupt, by address and data of the message.
    events: Mutex<BTreeMap<(u64, u32), EventFd>>,
}

impl Wires {
    fn vmm(&self) -> Option<Arc<Vmm>> {
        self.vmm.get()?.upgrade()
    }

    fn send(&self, message: PciMessage) {
        let Some(vmm) = self.vmm() else { return };
        let mut events = self.events.lock();
        let event = events.entry((message.address, message.data)).or_insert_with(|| {
            let event = EventFd::new(0).unwrap();
            vmm.machine().add_message(&event, message).unwrap();
            event
        });
        event.write(1).unwrap();
    }
}

impl Testdev {
    pub(crate) fn new(loss: Option<Loss>) -> Testdev {
        let registers = Registers { loss, ..Registers::default() };
        let memory = File::from(rustix::fs::memfd_create("testdev", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(BAR).unwrap();
        Testdev {
            registers: Arc::new(Mutex::new(registers)),
            wires: Arc::default(),
            state: Arc::new(Mutex::new(DeviceState::Running)),
            inbox: Arc::default(),
            memory: Arc::new(memory),
            trapped: Arc::default(),
        }
    }

    /// How often an access of the guest's to its memory came by way of the monitor.
    pub(crate) fn trapped(&self) -> u64 {
        self.trapped.load(Ordering::Relaxed)
    }

    /// What a guest sees of it.
    pub(crate) fn function(&self) -> Box<dyn Function> {
        Box::new(TestdevFunction::new(self.clone()))
    }

    pub(crate) fn slot(&self) -> VfioSlot {
        let backing = VfioBacking::Model { function: self.function(), driver: Ok(Box::new(self.clone())), log: None };
        VfioSlot { id: None, addr: None, backing, multifd_transfer: MultifdTransfer::Auto, events: false }
    }

    /// The machine that it is in.
    pub(crate) fn connect(&self, vmm: &Arc<Vmm>) {
        self.wires.vmm.set(Arc::downgrade(vmm)).unwrap();
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock()
    }

    fn save(&self) -> Vec<u8> {
        let now = self.registers();
        let words = [now.counter, now.scratch, now.pending, now.raised, now.dma_pages, now.dma_done, 0, 0];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(now.dma_base.to_le_bytes());
        let mut memory = vec![0; BAR as usize];
        self.memory.read_exact_at(&mut memory, 0).unwrap();
        bytes.extend(memory);
        bytes
    }

    fn load(&self, bytes: &[u8]) -> Result<(), Errno> {
        if bytes.len() != REGISTERS + BAR as usize {
            return Err(Errno::INVAL);
        }
        let word = |index: usize| u32::from_le_bytes(*bytes[4 * index..].first_chunk().unwrap());
        let mut registers = self.registers();
        let now = &mut *registers;
        (now.counter, now.scratch, now.pending, now.raised) = (word(0), word(1), word(2), word(3));
        (now.dma_pages, now.dma_done) = (word(4), word(5));
        now.dma_base = u64::from_le_bytes(*bytes[32..].first_chunk().unwrap());
        self.memory.write_all_at(&bytes[REGISTERS..], 0).unwrap();
        now.arrived = true;
        match now.loss {
            Some(Loss::Registers) => now.counter = 0,
            Some(Loss::Memory) => self.memory.write_all_at(&[0; BAR as usize], 0).unwrap(),
            _ => {}
        }
        Ok(())
    }
}

/// The configuration space that the lab's device shows.
fn shown() -> [u8; 256] {
    let mut bytes = [0; 256];
    let parts: [(usize, &[u8]); 6] = [
        (0x00, &[0x57, 0x7e, 0x01, 0x00, 0, 0, 0x10, 0]),
        (0x0b, &[0xff]),
        (0x2c, &[0x57, 0x7e, 0x01, 0x00]),
        (0x34, &[0x40, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        // MSI with four vectors and addresses of 64 bits.
        (0x40, &[0x05, 0x60, 0x84, 0]),
        // MSI-X with four vectors, whose table and pending bits are in BAR 2.
        (0x60, &[0x11, 0, VECTORS as u8 - 1, 0, 2, 0, 0, 0, 2, (PENDING_AT >> 8) as u8, 0, 0]),
    ];
    parts.iter().for_each(|(at, part)| bytes[*at..at + part.len()].copy_from_slice(part));
    bytes
}

/// What the guest sees of it.
struct TestdevFunction {
    pages: Vec<BarPages>,
    device: Testdev,
    config: ConfigSpace,
    table: MsixTable,
}

impl TestdevFunction {
    fn new(device: Testdev) -> TestdevFunction {
        let mut config = ConfigSpace::of_device(&shown()).unwrap();
        for bar in 0..3 {
            config.add_bar(bar, BarKind::Memory32 { prefetchable: false }, BAR).unwrap();
        }
        // One that is to lose something has its memory trapped, so that a guest meets both on its way.
        let mut pages = Vec::new();
        if device.registers().loss.is_none() {
            let shared = SharedPages::map(&device.memory, 0, BAR).unwrap();
            pages.push(BarPages { bar: 1, offset: 0, pages: Arc::new(shared) });
        }
        TestdevFunction { pages, device, config, table: MsixTable::new(VECTORS).unwrap() }
    }

    fn uses_messages(&self) -> bool {
        let msi = self.config.msi().is_some_and(|(msi, bytes)| msi.is_enabled(bytes));
        msi || self.config.msix_control().is_some_and(|control| control.enabled)
    }

    fn message(&mut self, vector: u32) -> Option<PciMessage> {
        let control = self.config.msix_control().unwrap_or_default();
        if control.enabled {
            return self.table.trigger(vector as usize, control);
        }
        self.config.msi().and_then(|(msi, bytes)| msi.message(bytes, vector))
    }

    fn raise(&mut self, vector: u32) {
        self.write_pages();
        let mut registers = self.device.registers();
        registers.raised += 1;
        let lost = match registers.loss.filter(|_| registers.arrived) {
            Some(loss @ (Loss::Interrupt | Loss::SecondInterrupt)) => {
                registers.arrived = false;
                Some(loss)
            }
            _ => None,
        };
        if !self.uses_messages() {
            registers.pending |= if lost.is_some() { 0 } else { 1 << vector };
            return;
        }
        drop(registers);
        let Some(message) = self.message(vector).filter(|_| lost != Some(Loss::Interrupt)) else { return };
        self.device.wires.send(message);
        if lost == Some(Loss::SecondInterrupt) {
            // While this vCPU is here it takes none, and two of a kind would be one.
            let wires = self.device.wires.clone();
            std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(50));
                wires.send(message);
            });
        }
    }

    /// Numbered pages, round and round, as long as it is bus master.
    fn write_pages(&self) {
        let mut registers = self.device.registers();
        let Some(vmm) = self.device.wires.vmm() else { return };
        if self.config.command() & command::BUS_MASTER == 0 || registers.dma_pages == 0 {
            return;
        }
        let lost = registers.arrived && registers.loss == Some(Loss::Dma);
        for _ in 0..BURST {
            let number = u64::from(registers.dma_done);
            let address = registers.dma_base + number % u64::from(registers.dma_pages) * 4096;
            let stamp: Vec<u8> = [MAGIC, number, !number, address].iter().flat_map(|word| word.to_le_bytes()).collect();
            if !lost {
                vmm.machine().memory().write(address, &stamp).unwrap();
            }
            registers.dma_done += 1;
        }
    }
}

impl Function for TestdevFunction {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn changed(&mut self, changes: Changes) {
        if changes.msix {
            let control = self.config.msix_control().unwrap_or_default();
            let messages = self.table.control_changed(control);
            messages.into_iter().for_each(|message| self.device.wires.send(message));
        }
    }

    fn pages(&self) -> &[BarPages] {
        &self.pages
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        let registers = self.device.registers();
        match bar {
            0 => {
                let value = match offset {
                    0x00 => ID,
                    0x04 => registers.counter,
                    0x08 => registers.scratch,
                    0x10 => registers.pending,
                    0x14 => registers.raised,
                    0x18 => registers.dma_base as u32,
                    0x1c => (registers.dma_base >> 32) as u32,
                    0x20 => registers.dma_pages,
                    0x24 => registers.dma_done,
                    _ => 0,
                };
                assert_eq!(data.len(), 4, "the registers have 32 bits");
                data.copy_from_slice(&value.to_le_bytes());
            }
            1 => {
                self.device.trapped.fetch_add(1, Ordering::Relaxed);
                self.device.memory.read_exact_at(data, offset).unwrap();
            }
            _ if offset < PENDING_AT.into() => self.table.read(offset, data),
            _ => self.table.read_pending(offset - u64::from(PENDING_AT), data),
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        match bar {
            0 => {
                let value = u32::from_le_bytes(data.try_into().expect("the registers have 32 bits"));
                if offset == 0x0c {
                    return self.raise(value);
                }
                let mut registers = self.device.registers();
                let base = registers.dma_base;
                match offset {
                    0x04 => registers.counter = value,
                    0x08 => registers.scratch = value,
                    0x10 => registers.pending &= !value,
                    0x18 => (registers.dma_base, registers.dma_done) = (base >> 32 << 32 | u64::from(value), 0),
                    0x1c => registers.dma_base = u64::from(value) << 32 | base & u64::from(u32::MAX),
                    0x20 => (registers.dma_pages, registers.dma_done) = (value, 0),
                    _ => {}
                }
            }
            1 => {
                self.device.trapped.fetch_add(1, Ordering::Relaxed);
                self.device.memory.write_all_at(data, offset).unwrap();
            }
            _ if offset < PENDING_AT.into() => {
                let control = self.config.msix_control().unwrap_or_default();
                let messages = self.table.write(offset, data, control);
                messages.into_iter().for_each(|message| self.device.wires.send(message));
            }
            _ => {}
        }
    }

    fn pin(&self) -> Option<bool> {
        Some(self.device.registers().pending != 0 && !self.uses_messages())
    }

    fn msix_state(&self) -> Vec<u8> {
        self.table.save()
    }

    fn restore(&mut self, state: &PciFunctionState) -> Result<(), PciError> {
        self.config.load(&state.config)?;
        self.table.load(&state.msix)
    }
}

impl Driver for Testdev {
    fn migration_flags(&self) -> Result<u64, Errno> {
        Ok(STOP_COPY | P2P)
    }

    fn set_state(&self, state: u32) -> Result<Option<Box<dyn DataFile>>, Errno> {
        let to = DeviceState::from_raw(state).ok_or(Errno::INVAL)?;
        let mut now = self.state.lock();
        if *now == DeviceState::Resuming && to != DeviceState::Resuming {
            let came = std::mem::take(&mut *self.inbox.lock());
            self.load(&came)?;
        }
        *now = to;
        Ok(match to {
            DeviceState::StopCopy => Some(Box::new(Outgoing(self.save().into()))),
            DeviceState::Resuming => Some(Box::new(Incoming(self.inbox.clone()))),
            _ => None,
        })
    }

    fn state(&self) -> Result<u32, Errno> {
        Ok(self.state.lock().raw())
    }

    fn data_size(&self) -> Result<u64, Errno> {
        Ok(REGISTERS as u64 + BAR)
    }

    fn tell_reinit(&self) -> Result<(), Errno> {
        Err(Errno::NOTTY)
    }

    fn reset(&self) -> Result<(), Errno> {
        let mut registers = self.registers();
        *registers = Registers { loss: registers.loss, ..Registers::default() };
        self.memory.write_all_at(&[0; BAR as usize], 0).map_err(|_| Errno::IO)?;
        *self.state.lock() = DeviceState::Running;
        Ok(())
    }
}

struct Outgoing(std::collections::VecDeque<u8>);

impl DataFile for Outgoing {
    fn read(&mut self, into: &mut [u8]) -> Result<usize, Errno> {
        std::io::Read::read(&mut self.0, into).map_err(|_| Errno::IO)
    }

    fn write(&mut self, _from: &[u8]) -> Result<usize, Errno> {
        Err(Errno::BADF)
    }

    fn precopy_info(&self) -> Result<PrecopyInfo, Errno> {
        Err(Errno::NOTTY)
    }
}

struct Incoming(Arc<Mutex<Vec<u8>>>);

impl DataFile for Incoming {
    fn read(&mut self, _into: &mut [u8]) -> Result<usize, Errno> {
        Err(Errno::BADF)
    }

    fn write(&mut self, from: &[u8]) -> Result<usize, Errno> {
        self.0.lock().extend(from);
        Ok(from.len())
    }

    fn precopy_info(&self) -> Result<PrecopyInfo, Errno> {
        Err(Errno::NOTTY)
    }
}
