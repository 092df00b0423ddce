//! A virtual machine monitor without a processor: its guest is memory, a thread that writes to it, and a watchdog. It
//! takes a guest from a QEMU, runs it, and gives it back while it runs (docs/first-migration.md goes through it):
//!
//!     toy_vmm microvm 64 11.1 unix:from.sock unix:to.sock return-path multifd
//! For `-M microvm,rtc=on -device ib700`, or `none`. RAM as it came and as it went is in `arrived.ram` and `left.ram`.

use qevm_migration::*;
use qevm_savevm::vmstate::{Timer, VmState};
use std::env;
use std::fs::File;
use std::iter;
use std::mem;
use std::ops::Range;
use std::process;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

const PAGE: usize = 4096;
/// QEMU's devices that this monitor does without.
const IGNORED: &str = "apic timer fw_cfg cpu_common cpu kvm-tpr-opt ioapic acpi-ged i8259 i8254 mc146818rtc serial";

/// QEMU's watchdog `ib700`.
#[derive(VmState, Clone, Default)]
#[vmstate(name = "ib700_wdt", version = 0)]
struct Ib700 {
    timer: Timer,
}

/// A RAM block, and for each of its pages a bit that says that it was written.
struct Block(&'static str, MmapRegion, Vec<AtomicU64>);

struct Toy {
    machine: String,
    blocks: Vec<Block>,
    /// Locked during each step of the guest.
    running: Mutex<bool>,
    devices: Registry<'static>,
}

impl Toy {
    fn new(machine: &str, ram: usize, qemu: &str, watchdog: Arc<Mutex<Ib700>>) -> Result<Toy, GuestError> {
        let bios = if qemu.starts_with('7') { 64 << 10 } else { 128 << 10 };
        let (mut sizes, mut devices) = (vec![("ram", ram)], Registry::new(machine));
        if machine == "microvm" {
            sizes = vec![("microvm.ram", ram), ("pc.bios", bios), ("/rom@etc/acpi/tables", PAGE)];
            sizes.extend([("/rom@etc/table-loader", PAGE), ("/rom@etc/acpi/rsdp", PAGE)]);
            devices.share("ib700_wdt", 0, watchdog)?;
        }
        IGNORED.split(' ').try_for_each(|name| devices.ignore(name))?;
        let dirty = |size: usize| iter::repeat_with(AtomicU64::default).take(size.div_ceil(64 * PAGE)).collect();
        let block = |(name, size)| Ok(Block(name, MmapRegion::new(size)?, dirty(size)));
        let blocks = sizes.into_iter().map(block).collect::<Result<_, GuestError>>()?;
        Ok(Toy { machine: machine.into(), blocks, running: Mutex::new(false), devices })
    }

    /// A step of the guest, which writes to 16 MiB until three passes are over, and then slowly to 64 KiB. A page is
    /// marked when it is written: marked before, it could be sent in between. False if the guest does not run.
    fn step(&self, number: usize, job: &Job) -> bool {
        let settled = job.statistics().rounds.len() >= 3;
        let page = number % if settled { 16 } else { 4096 };
        thread::sleep(Duration::from_millis(settled.into()));
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if *running && self.blocks[0].1.as_volatile_slice().write_obj(number, page * PAGE + 8).is_ok() {
            self.blocks[0].2[page / 64].fetch_or(1 << (page % 64), SeqCst);
        }
        *running
    }

    fn dump(&self, file: &str) -> Result<(), GuestError> {
        let Block(_, memory, _) = &self.blocks[0];
        Ok(memory.as_volatile_slice().write_all_volatile_to(0, &mut File::create(file)?, memory.size())?)
    }
}

impl Guest for Toy {
    fn machine_type(&self) -> &str {
        &self.machine
    }
    fn ram(&self) -> Vec<RamView<'_>> {
        self.blocks.iter().map(|b| RamView { name: b.0, memory: b.1.as_volatile_slice(), pristine: false }).collect()
    }
    fn start_dirty_log(&self) -> Result<Box<dyn DirtyLog + '_>, GuestError> {
        self.blocks.iter().flat_map(|block| &block.2).for_each(|word| word.store(u64::MAX, SeqCst));
        Ok(Box::new(Log(&self.blocks, Vec::new())))
    }
    fn pause(&self) -> Result<bool, GuestError> {
        Ok(mem::take(&mut *self.running.lock().unwrap_or_else(PoisonError::into_inner)))
    }
    fn resume(&self) -> Result<(), GuestError> {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = true;
        Ok(())
    }
    fn devices(&self) -> &dyn Devices {
        &self.devices
    }
}

/// The blocks, and what the last reading reported and was not reset since.
struct Log<'t>(&'t [Block], Vec<Vec<u64>>);

impl DirtyLog for Log<'_> {
    fn read(&mut self, found: &mut dyn FnMut(usize, usize, u64)) -> Result<(), GuestError> {
        self.1 = self.0.iter().map(|block| block.2.iter().map(|word| word.load(SeqCst)).collect()).collect();
        for (block, words) in self.1.iter().enumerate() {
            words.iter().enumerate().for_each(|(number, word)| found(block, number, *word));
        }
        Ok(())
    }
    fn reset(&mut self, block: usize, pages: Range<u64>) -> Result<(), GuestError> {
        for number in pages.start as usize / 64..(pages.end as usize).div_ceil(64) {
            self.0[block].2[number].fetch_and(!mem::take(&mut self.1[block][number]), SeqCst);
        }
        Ok(())
    }
}

fn main() {
    if let Err(error) = run(&env::args().skip(1).collect::<Vec<_>>()) {
        eprintln!("toy_vmm: {error}");
        process::exit(1);
    }
}

pub(crate) fn run(arguments: &[String]) -> Result<(), GuestError> {
    let [machine, mib, qemu, from, to, capabilities @ ..] = arguments else {
        return Err("usage: toy_vmm MACHINE MIB QEMU FROM TO [CAPABILITY...]".into());
    };
    let watchdog = Arc::<Mutex<Ib700>>::default();
    let toy = Toy::new(machine, mib.parse::<usize>()? << 20, qemu, watchdog.clone())?;
    let (profile, job) = (qevm_wire::Profile::new(qemu.parse()?, machine), Job::default());
    job.set_capabilities(Capabilities::default().with(capabilities.iter().map(|name| (&**name, true)))?)?;
    job.begin()?;
    let incoming = Incoming::accept(&Listener::bind(&from.parse()?)?, &job, &profile)?;
    let arrival = receive(&toy, incoming, &job, &profile)?;
    job.end(None);
    toy.dump("arrived.ram")?;
    let ib700 = || watchdog.lock().unwrap_or_else(PoisonError::into_inner);
    println!("arrived: running {}, watchdog {}", arrival.running, ib700().timer.0);
    // This monitor runs whatever has arrived, feeds the watchdog, and has 64 MiB a second for the way back.
    ib700().timer.0 += 1_000_000_000;
    toy.resume()?;
    let mut limits = Parameters::default();
    (limits.max_bandwidth, limits.avail_switchover_bandwidth, limits.downtime_limit_ms) = (64 << 20, 64 << 20, 100);
    job.set_parameters(limits);
    job.begin()?;
    let outgoing = Outgoing::open(&to.parse()?, &job, &mut NoDescriptors)?;
    thread::scope(|scope| {
        scope.spawn(|| (0..).take_while(|number| toy.step(*number, &job)).count());
        let left = migrate(&toy, &outgoing, &job, &profile);
        toy.pause().and(left.map_err(GuestError::from))
    })?;
    toy.dump("left.ram")?;
    println!("left: passes {}, watchdog {}", job.statistics().rounds.len(), ib700().timer.0);
    Ok(())
}
