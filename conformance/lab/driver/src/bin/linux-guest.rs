//! `linux-guest ADDRESS PAGES`: uses the test device (`conformance/lab/testdev`) from Linux as a driver in user space
//! does, by UIO, and never ends.
//!
//! Linux has found the device by ACPI, placed its BARs and connected its interrupt. Here, in each pass, a register and
//! a word of the device's memory are counted up and must be as they were left; the next of four bits raises the
//! interrupt, which must come once, by `/dev/uio0`; and some of the pages that the device writes to, from ADDRESS on,
//! must hold the number that it gave them last. What it sees it prints in the words of the payload
//! (`reference_vmm::payload`), so that the same judge reads both.

use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

const DEVICES: &str = "/sys/bus/pci/devices";
const VENDOR: &str = "0x7e57";
const EVENTS: &str = "/dev/uio0";
const MEMORY: &str = "/dev/mem";
const BAR: usize = 4096;
const PAGE: u64 = 4096;
const ID: u32 = 0x7665_6474;
const DMA_MAGIC: u64 = 0x61_6d64_7665_6474;
/// Registers.
const COUNTER: usize = 0x04;
const SCRATCH: usize = 0x08;
const RAISE: usize = 0x0c;
const PENDING: usize = 0x10;
const RAISED: usize = 0x14;
const DMA_LOW: usize = 0x18;
const DMA_HIGH: usize = 0x1c;
const DMA_PAGES: usize = 0x20;
const DMA_DONE: usize = 0x24;
const LAST_WORD: usize = BAR - 4;
/// Of the configuration space.
const COMMAND: u64 = 0x04;
const MEMORY_AND_MASTER: u16 = 1 << 1 | 1 << 2;
const INTX_DISABLE: u16 = 1 << 10;
const VECTORS: u32 = 4;
/// An interrupt that has not come by then is lost: long for a slow machine with a migration between, and shorter than a
/// guest is waited for.
const LOST: Duration = Duration::from_secs(20);
const REPORT: Duration = Duration::from_millis(250);
/// Pages looked at in a pass.
const LOOKED_AT: u64 = 32;
/// The device may be writing.
const TRIES: u32 = 1000;

fn main() {
    println!("qevm-payload start cpus=1");
    if let Err(error) = run() {
        println!("linux-guest: {error:#}");
    }
    // The first process must not end.
    loop {
        std::thread::sleep(REPORT);
    }
}

fn run() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut number = || arguments.next().and_then(|text| text.parse().ok());
    let (address, pages) = number().zip(number()).context("usage: linux-guest ADDRESS PAGES")?;
    let mut guest = Guest::start(address, pages)?;
    let mut reported = Instant::now();
    loop {
        guest.pass()?;
        if reported.elapsed() >= REPORT {
            guest.report();
            reported = Instant::now();
        }
        // Without a rest, as a sleep may last long in a machine that is emulated.
        std::thread::yield_now();
    }
}

struct Guest {
    slot: u64,
    config: File,
    registers: MmapRegion,
    memory: MmapRegion,
    /// What `/dev/uio0` has counted, one after the other.
    interrupts: Receiver<u32>,
    /// The last of them.
    counted: u32,
    dma: Dma,
    counter: u32,
    raised: u32,
    taken: u32,
    passes: u64,
    stale: u64,
    backwards: u64,
    began: Instant,
    clock: SystemTime,
}

impl Guest {
    fn start(address: u64, pages: u64) -> Result<Guest> {
        let folder = device()?;
        let name = folder.file_name().context("a device without a name")?.to_string_lossy().into_owned();
        // 0000:00:01.0
        let slot = name.get(8..10).and_then(|slot| u64::from_str_radix(slot, 16).ok()).context("its number")?;
        let config = File::options().read(true).write(true).open(folder.join("config")).context("its configuration")?;
        let interrupts = interrupts().context("its interrupt")?;
        let command = word(&config)?;
        ensure!(command & 1 << 1 != 0, "Linux has not turned its memory on: {command:#x}");
        config.write_all_at(&(command & !INTX_DISABLE | MEMORY_AND_MASTER).to_le_bytes(), COMMAND)?;
        let bar = |bar: usize| -> Result<MmapRegion> {
            let path = folder.join(format!("resource{bar}"));
            let file = File::options().read(true).write(true).open(&path);
            let file = file.with_context(|| format!("opening {}", path.display()))?;
            MmapRegion::from_file(FileOffset::new(file, 0), BAR).with_context(|| format!("mapping {}", path.display()))
        };
        let (registers, memory) = (bar(0)?, bar(1)?);
        let dma = Dma { memory: File::open(MEMORY).context("opening /dev/mem")?, address, pages, next: 0, seen: 0 };
        let (began, clock) = (Instant::now(), SystemTime::now());
        let mut guest = Guest {
            slot,
            config,
            registers,
            memory,
            interrupts,
            counted: 0,
            dma,
            counter: 0,
            raised: 0,
            taken: 0,
            passes: 0,
            stale: 0,
            backwards: 0,
            began,
            clock,
        };
        ensure!(guest.register(0)? == ID, "BAR 0 is not where the device's registers are");
        guest.leave()?;
        guest.set_register(DMA_LOW, address as u32)?;
        guest.set_register(DMA_HIGH, (address >> 32) as u32)?;
        guest.set_register(DMA_PAGES, pages as u32)?;
        (guest.raised, guest.taken) = (guest.register(RAISED)?, guest.register(RAISED)?);
        Ok(guest)
    }

    fn register(&self, at: usize) -> Result<u32> {
        Ok(self.registers.get_slice(0, BAR)?.load(at, Ordering::Relaxed)?)
    }

    fn set_register(&self, at: usize, value: u32) -> Result<()> {
        Ok(self.registers.get_slice(0, BAR)?.store(value, at, Ordering::Relaxed)?)
    }

    fn word(&self, at: usize) -> Result<u32> {
        Ok(self.memory.get_slice(0, BAR)?.load(at, Ordering::Relaxed)?)
    }

    fn set_word(&self, at: usize, value: u32) -> Result<()> {
        Ok(self.memory.get_slice(0, BAR)?.store(value, at, Ordering::Relaxed)?)
    }

    /// What the next pass has to find.
    fn leave(&self) -> Result<()> {
        self.set_register(COUNTER, self.counter)?;
        self.set_register(SCRATCH, !self.counter)?;
        self.set_word(0, self.counter)?;
        self.set_word(LAST_WORD, !self.counter)
    }

    fn pass(&mut self) -> Result<()> {
        for (at, expected) in [(COUNTER, self.counter), (SCRATCH, !self.counter), (RAISED, self.raised)] {
            let found = self.register(at)?;
            self.expect("pci-register", at as u64, expected.into(), found.into());
        }
        for (at, expected) in [(0, self.counter), (LAST_WORD, !self.counter)] {
            let found = self.word(at)?;
            self.expect("pci-memory", at as u64, expected.into(), found.into());
        }
        let command = word(&self.config)? & (MEMORY_AND_MASTER | INTX_DISABLE);
        self.expect("pci", COMMAND, MEMORY_AND_MASTER.into(), command.into());
        self.interrupt()?;
        let done = self.register(DMA_DONE)?;
        for (page, expected, found) in self.dma.look(done.into())? {
            self.expect("pci-dma", page, expected, found);
        }
        let now = SystemTime::now();
        self.backwards += u64::from(now < self.clock);
        self.clock = now;
        self.counter += 1;
        self.passes += 1;
        self.leave()
    }

    /// Raises an interrupt, and takes it.
    fn interrupt(&mut self) -> Result<()> {
        let vector = self.raised % VECTORS;
        self.raised += 1;
        self.set_register(RAISE, vector)?;
        let counted = match self.interrupts.recv_timeout(LOST) {
            Ok(counted) => counted,
            Err(RecvTimeoutError::Timeout) => bail!("interrupt {} does not come", self.raised),
            Err(RecvTimeoutError::Disconnected) => bail!("{EVENTS} tells nothing any more"),
        };
        self.expect("pci-interrupt", 0, u64::from(self.counted) + 1, counted.into());
        self.counted = counted;
        let pending = self.register(PENDING)?;
        self.expect("pci-interrupt", 1, 1 << vector, pending.into());
        // The kernel's half has switched it off, and leaves the rest to this one.
        let command = word(&self.config)?;
        self.expect("pci-interrupt", COMMAND, INTX_DISABLE.into(), (command & INTX_DISABLE).into());
        self.set_register(PENDING, 1 << vector)?;
        self.config.write_all_at(&(command & !INTX_DISABLE).to_le_bytes(), COMMAND)?;
        self.taken += 1;
        Ok(())
    }

    fn expect(&mut self, kind: &str, page: u64, expected: u64, found: u64) {
        if expected != found {
            self.stale += 1;
            println!(
                "qevm-payload stale-page kind={kind} page={page} word={} expected={expected} found={found}",
                self.slot
            );
        }
    }

    fn report(&self) {
        let Guest { slot, counter, raised, taken, passes, stale, backwards, .. } = self;
        let (seen, ms) = (self.dma.seen, self.began.elapsed().as_millis());
        println!(
            "qevm-payload pass={passes} pages={} stale={stale} tsc_back={backwards} written=0 checked={seen} rounds=0 ticks={taken} ms={ms}",
            self.dma.pages
        );
        println!(
            "qevm-payload pci-device slot={slot} counter={counter} raised={raised} taken={taken} spurious=0 dma={seen}"
        );
    }
}

/// The pages that the device writes to, round and round.
struct Dma {
    memory: File,
    address: u64,
    pages: u64,
    /// The next to be looked at.
    next: u64,
    /// How often one was.
    seen: u64,
}

impl Dma {
    /// Looks at some of them after the device has written `done`. Gives those that lack the number which they had been
    /// given by then, with that and what they hold.
    fn look(&mut self, done: u64) -> Result<Vec<(u64, u64, u64)>> {
        let mut bad = Vec::new();
        for _ in 0..LOOKED_AT {
            let page = self.next;
            self.next = (page + 1) % self.pages;
            if done <= page {
                continue;
            }
            self.seen += 1;
            let least = page + (done - 1 - page) / self.pages * self.pages;
            let found = self.stamp(page)?;
            if found.is_none_or(|number| number < least || number % self.pages != page) {
                bad.push((page, least, found.unwrap_or(u64::MAX)));
            }
        }
        Ok(bad)
    }

    /// The number that the device has given a page; `None` if it has given it none.
    fn stamp(&self, page: u64) -> Result<Option<u64>> {
        let address = self.address + page * PAGE;
        for _ in 0..TRIES {
            let mut bytes = [0; 32];
            self.memory.read_exact_at(&mut bytes, address).context("reading /dev/mem")?;
            let (words, _) = bytes.as_chunks::<8>();
            let word = |index: usize| u64::from_le_bytes(words[index]);
            let number = word(1);
            if word(0) == DMA_MAGIC && word(2) == !number && word(3) == address {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }
}

/// The folder of the first test device.
fn device() -> Result<PathBuf> {
    for entry in fs::read_dir(DEVICES).context("there is no PCI bus")? {
        let folder = entry?.path();
        if fs::read_to_string(folder.join("vendor")).is_ok_and(|vendor| vendor.trim() == VENDOR) {
            return Ok(folder);
        }
    }
    bail!("there is no test device")
}

/// The command register.
fn word(config: &File) -> Result<u16> {
    let mut bytes = [0; 2];
    config.read_exact_at(&mut bytes, COMMAND).context("reading the configuration")?;
    Ok(u16::from_le_bytes(bytes))
}

/// What the device's UIO file says, each time that it does.
fn interrupts() -> Result<Receiver<u32>> {
    let mut events = File::open(Path::new(EVENTS)).with_context(|| format!("opening {EVENTS}"))?;
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let mut count = [0; 4];
        while events.read_exact(&mut count).is_ok() && send.send(u32::from_ne_bytes(count)).is_ok() {}
    });
    Ok(receive)
}
