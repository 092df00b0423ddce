//! A guest that is memory and a counter, and writes when it is told to.

use super::device::FakeDevice;
use crate::testing::VfioDevice;
use crate::{DeviceSection, Devices, DirtyLog, Guest, GuestError, Hooks, IterativeDevice, RamView, SavedDevices};
use parking_lot::Mutex;
use qevm_wire::{CountedString, Profile};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};

const PAGE: usize = 4096;

pub(crate) struct FakeGuest {
    blocks: Vec<(String, MmapRegion)>,
    running: AtomicBool,
    /// The state of the only device: how often the guest worked.
    work: AtomicU64,
    /// What the guest does at each step: how many pages it writes.
    pub(crate) pages_per_step: AtomicU64,
    /// Loading the device fails.
    pub(crate) refuses_devices: AtomicBool,
    /// The first block is a file of both machines.
    pub(crate) shares: AtomicBool,
    /// A device whose state goes in parts.
    pub(crate) device: Option<FakeDevice>,
    /// Devices with all that a VFIO device does.
    pub(crate) vfio: Vec<VfioDevice>,
    /// Blocks and bytes that were given back to the host.
    pub(crate) released: Mutex<Vec<(usize, Range<u64>)>>,
    /// What happens when the guest stops.
    pub(crate) on_pause: Option<Box<dyn Fn() + Send + Sync>>,
    log: Mutex<Option<Log>>,
    /// Held by a step of the guest, so that it is over when the guest has stopped.
    step: Mutex<()>,
}

/// As KVM's with manual protect: a write sets a bit, and a bit stays until it is reset.
struct Log {
    written: Vec<Vec<u64>>,
    /// What the last reading reported.
    reported: Vec<Vec<u64>>,
}

impl FakeGuest {
    pub(crate) fn new(blocks: &[(&str, usize)]) -> Self {
        let region = |pages: usize| MmapRegion::new(pages * PAGE).unwrap();
        FakeGuest {
            blocks: blocks.iter().map(|(name, pages)| ((*name).into(), region(*pages))).collect(),
            running: AtomicBool::new(false),
            work: AtomicU64::new(0),
            pages_per_step: AtomicU64::new(3),
            refuses_devices: AtomicBool::new(false),
            shares: AtomicBool::new(false),
            device: None,
            vfio: Vec::new(),
            released: Mutex::default(),
            on_pause: None,
            log: Mutex::new(None),
            step: Mutex::new(()),
        }
    }

    pub(crate) fn shape(&self) -> Vec<(&str, usize)> {
        self.blocks.iter().map(|(name, region)| (&**name, region.size() / PAGE)).collect()
    }

    /// Fills two pages of three with numbers.
    pub(crate) fn fill(&self) {
        for (block, (_, region)) in self.blocks.iter().enumerate() {
            for page in (0..region.size() / PAGE).filter(|page| page % 3 != 0) {
                self.write(block, page, (block * 1000 + page) as u64);
            }
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    pub(crate) fn is_logging(&self) -> bool {
        self.log.lock().is_some()
    }

    /// A step of the guest: it writes some pages all over its memory, some of them with zeroes.
    pub(crate) fn work(&self) {
        let _step = self.step.lock();
        if !self.is_running() {
            return;
        }
        let step = self.work.fetch_add(1, Ordering::SeqCst);
        for i in 0..self.pages_per_step.load(Ordering::Relaxed) {
            let random = (step * 31 + i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let block = usize::from(random.is_multiple_of(16)) % self.blocks.len();
            let pages = self.blocks[block].1.size() / PAGE;
            let value = if random.is_multiple_of(5) { 0 } else { random };
            self.write(block, (random >> 20) as usize % pages, value);
        }
    }

    fn write(&self, block: usize, page: usize, value: u64) {
        // As a processor sets the dirty bit and writes in one: the log is not read between the two.
        let mut log = self.log.lock();
        if let Some(log) = &mut *log {
            log.written[block][page / 64] |= 1 << (page % 64);
        }
        let slice = self.blocks[block].1.get_slice(page * PAGE, PAGE).unwrap();
        for at in (0..PAGE).step_by(512) {
            slice.write_obj(value, at).unwrap();
        }
    }

    /// The content of every block.
    pub(crate) fn contents(&self) -> Vec<Vec<u8>> {
        let content = |(_, region): &(String, MmapRegion)| {
            let mut bytes = vec![0; region.size()];
            region.as_volatile_slice().read_slice(&mut bytes, 0).unwrap();
            bytes
        };
        self.blocks.iter().map(content).collect()
    }

    pub(crate) fn assert_same_memory(&self, other: &FakeGuest) {
        for ((name, mine), (_, theirs)) in self.blocks.iter().zip(&other.blocks) {
            let content = |region: &MmapRegion| {
                let mut bytes = vec![0; region.size()];
                region.as_volatile_slice().read_slice(&mut bytes, 0).unwrap();
                bytes
            };
            let (mine, theirs) = (content(mine), content(theirs));
            let stale: Vec<_> = mine
                .chunks(PAGE)
                .zip(theirs.chunks(PAGE))
                .enumerate()
                .filter(|(_, (a, b))| a != b)
                .map(|(i, _)| i)
                .collect();
            assert!(stale.is_empty(), "stale pages in {name}: {stale:?}");
        }
        assert_eq!(self.work.load(Ordering::SeqCst), other.work.load(Ordering::SeqCst), "device state");
    }
}

impl Guest for FakeGuest {
    fn machine_type(&self) -> &str {
        "microvm"
    }

    fn ram(&self) -> Vec<RamView<'_>> {
        let memory = |region: &'_ MmapRegion| -> VolatileSlice<'_> {
            // SAFETY: the slice borrows the guest, which owns the mapping.
            unsafe { VolatileSlice::new(region.as_ptr(), region.size()) }
        };
        self.blocks.iter().map(|(name, region)| RamView { name, memory: memory(region), pristine: true }).collect()
    }

    fn start_dirty_log(&self) -> Result<Box<dyn DirtyLog + '_>, GuestError> {
        let words =
            |fill: u64| self.blocks.iter().map(move |(_, region)| vec![fill; (region.size() / PAGE).div_ceil(64)]);
        // As with KVM_DIRTY_LOG_INITIALLY_SET.
        *self.log.lock() = Some(Log { written: words(u64::MAX).collect(), reported: words(0).collect() });
        Ok(Box::new(FakeLog(self)))
    }

    fn pause(&self) -> Result<bool, GuestError> {
        let _step = self.step.lock();
        self.device.iter().for_each(FakeDevice::stop);
        self.vfio.iter().for_each(VfioDevice::stop);
        self.on_pause.iter().for_each(|on_pause| on_pause());
        Ok(self.running.swap(false, Ordering::SeqCst))
    }

    fn resume(&self) -> Result<(), GuestError> {
        assert!(!self.running.swap(true, Ordering::SeqCst), "resumed twice");
        Ok(())
    }

    fn devices(&self) -> &dyn Devices {
        self
    }

    fn hooks(&self) -> &dyn Hooks {
        self
    }
}

impl Hooks for FakeGuest {
    fn shares(&self, block: usize) -> bool {
        block == 0 && self.shares.load(Ordering::Relaxed)
    }

    fn release(&self, block: usize, bytes: Range<u64>) -> Result<(), GuestError> {
        let memory = self.blocks[block].1.get_slice(bytes.start as usize, (bytes.end - bytes.start) as usize)?;
        memory.copy_from(&vec![0_u8; memory.len()]);
        self.released.lock().push((block, bytes));
        Ok(())
    }
}

impl Devices for FakeGuest {
    fn save(&self, _: &Profile, running: bool) -> Result<SavedDevices, GuestError> {
        assert!(!self.is_running(), "saved while running");
        let mut body = self.work.load(Ordering::SeqCst).to_be_bytes().to_vec();
        body.push(running.into());
        let idstr = CountedString::new("counter").unwrap();
        let mut sections = self.vfio.iter().map(VfioDevice::save).collect::<Result<Vec<_>, _>>()?;
        sections.push(DeviceSection { idstr, instance_id: 0, version_id: 1, body });
        Ok(SavedDevices::opaque(sections))
    }

    fn iterative(&self) -> Vec<&dyn IterativeDevice> {
        let vfio = self.vfio.iter().map(|device| device as &dyn IterativeDevice);
        self.device.iter().map(|device| device as &dyn IterativeDevice).chain(vfio).collect()
    }

    fn has(&self, idstr: &CountedString, instance_id: u32) -> bool {
        (*idstr == *"counter" || self.vfio.iter().any(|device| *idstr == *device.idstr())) && instance_id == 0
    }

    fn load(&self, devices: &[DeviceSection]) -> Result<bool, GuestError> {
        assert!(!self.is_running(), "loaded while running");
        if self.refuses_devices.load(Ordering::Relaxed) {
            return Err("the counter does not like its state".into());
        }
        let Some((DeviceSection { idstr, body, .. }, others)) = devices.split_last() else {
            return Err("one device expected".into());
        };
        for section in others {
            let device = self.vfio.iter().find(|device| section.idstr == *device.idstr());
            device.ok_or("there is no such device")?.load_configuration(section)?;
        }
        let (count, [running]) = body.split_first_chunk::<8>().ok_or("the counter is too short")? else {
            return Err("the counter is too long".into());
        };
        assert!(*idstr == *"counter");
        self.work.store(u64::from_be_bytes(*count), Ordering::SeqCst);
        Ok(*running != 0)
    }
}

struct FakeLog<'g>(&'g FakeGuest);

impl DirtyLog for FakeLog<'_> {
    fn read(&mut self, found: &mut dyn FnMut(usize, usize, u64)) -> Result<(), GuestError> {
        let mut log = self.0.log.lock();
        let log = log.as_mut().ok_or("the log was stopped")?;
        log.reported = log.written.clone();
        for (block, words) in log.reported.iter().enumerate() {
            words.iter().enumerate().for_each(|(i, word)| found(block, i, *word));
        }
        Ok(())
    }

    fn reset(&mut self, block: usize, pages: Range<u64>) -> Result<(), GuestError> {
        assert!(pages.start.is_multiple_of(64));
        // The guest may write between the reading and the resetting, and right after it.
        self.0.work();
        {
            let mut log = self.0.log.lock();
            let log = log.as_mut().ok_or("the log was stopped")?;
            for word in pages.start as usize / 64..(pages.end as usize).div_ceil(64) {
                log.written[block][word] &= !log.reported[block][word];
            }
        }
        self.0.work();
        Ok(())
    }
}

impl Drop for FakeLog<'_> {
    fn drop(&mut self) {
        *self.0.log.lock() = None;
    }
}
