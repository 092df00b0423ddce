//! Devices of the host's kernel, as far as there need be none, and what devices write to RAM by themselves.

use crate::Test;
use crate::guest::Guest;
use crate::vfio::{Switches, capabilities, migrate_between};
use parking_lot::Mutex;
use qevm_migration::{Address, Guest as _};
use qevm_wire::{Profile, QemuVersion};
use reference_vmm::Error;
use reference_vmm::devices::pci::{ConfigOnly, ConfigSpace, Identity};
use reference_vmm::machine::{Machine, MachineConfig};
use reference_vmm::vfio::{
    DeviceState, DmaLog, Double, Failure, HostDevice, HostDeviceError, MultifdTransfer, Shape, Support, Tracking,
    VfioBacking, VfioError, VfioSlot,
};
use reference_vmm::vmm::{RunState, Vmm};
use rustix::io::Errno;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};
use vm_memory::Bytes as _;

pub(crate) const TESTS: &[Test] = &[
    ("vfio_device_of_the_host_that_is_none_is_refused", that_is_none),
    ("vfio_devices_writes_arrive", writes_arrive),
    ("vfio_devices_log_that_fails_leaves_the_guest_at_the_source", log_fails),
];

fn refusal(device: HostDevice, pcie: bool) -> Error {
    let slot = VfioSlot {
        id: None,
        addr: None,
        backing: VfioBacking::Host(device),
        multifd_transfer: MultifdTransfer::Auto,
        events: false,
    };
    let config = MachineConfig { memory: 32 << 20, pcie, vfio: vec![slot], ..MachineConfig::default() };
    Machine::new(config).err().expect("a machine without its device")
}

fn that_is_none() {
    let at = |path: &Path| HostDevice { sysfsdev: path.to_owned(), ..HostDevice::default() };
    let cause = |error: Error| match error {
        Error::HostDevice { cause, .. } => *cause,
        other => panic!("{other}"),
    };
    let error = refusal(at(Path::new("/nonexistent")), true);
    // As QEMU 11.1 says it.
    assert_eq!(error.to_string(), "vfio /nonexistent: no such host device: No such file or directory (os error 2)");
    let folder = tempfile::tempdir().unwrap();
    let error = refusal(at(folder.path()), true);
    assert!(error.to_string().contains("no iommu_group found: No such file or directory"), "{error}");
    assert!(matches!(cause(error), HostDeviceError::NoGroup(_)));
    let error = refusal(at(folder.path()), false).to_string();
    assert!(error.starts_with("No 'PCI' bus found for device 'vfio-pci'"), "{error}");
    if !Path::new("/dev/vfio/vfio").exists() {
        // A group without VFIO: either KVM or VFIO says so.
        symlink(folder.path(), folder.path().join("iommu_group")).unwrap();
        let error = refusal(at(folder.path()), true);
        let container = error.to_string().contains("/dev/vfio/vfio container: No such file");
        assert!(container || matches!(error, Error::Kvm { .. }), "{error}");
    }
}

const SHAPE: Shape = Shape {
    support: Support { p2p: true, precopy: true },
    initial: 70_000,
    dirty: 150_000,
    rest: 300_000,
    silent_drain: false,
    most: 0,
    takes_all: false,
    garbage: None,
};
const MEMORY: u64 = 32 << 20;
/// Pages that the payload does not use.
const FIRST: usize = 20 << 20;
const PAGE: usize = 4096;
const PAGES: usize = 300;

/// A log of a device that writes a page, and some that it has written before, just before it is asked.
struct Log {
    tracking: Tracking,
    /// It tells what it has written to.
    honest: bool,
    fails: Mutex<Option<Errno>>,
    vmm: OnceLock<Weak<Vmm>>,
    device: Double,
    reports: Mutex<Vec<DeviceState>>,
}

impl Log {
    fn write(&self, vmm: &Vmm, page: usize, number: u8) {
        let ram = vmm.ram();
        // Past the monitor's own log, as the kernel does.
        ram[0].memory.subslice(FIRST + page * PAGE, 1).unwrap().write_obj(number, 0).unwrap();
    }
}

struct Shared(Arc<Log>);

impl DmaLog for Shared {
    fn start(&self) -> Tracking {
        self.0.tracking
    }

    fn report(&self, found: &mut dyn FnMut(u64, &[u64])) -> Result<(), VfioError> {
        let log = &*self.0;
        if let Some(errno) = log.fails.lock().take() {
            let failure = Failure::Log { call: "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT", errno };
            return Err(VfioError { device: "vf0".into(), failure });
        }
        let vmm = log.vmm.get().and_then(Weak::upgrade).expect("the machine is gone");
        let number = {
            let mut reports = log.reports.lock();
            reports.push(*log.device.way().last().unwrap());
            reports.len()
        };
        // The first page each time, and another one each time.
        log.write(&vmm, 0, number as u8);
        log.write(&vmm, number % PAGES, number as u8);
        if log.honest {
            let mut words = vec![0_u64; PAGES.div_ceil(64)];
            words[0] |= 1;
            words[number % PAGES / 64] |= 1 << (number % PAGES % 64);
            found((FIRST / PAGE) as u64, &words);
        }
        Ok(())
    }

    fn stop(&self) {}
}

fn machine(device: &Double, log: Option<Arc<Log>>, ring: u32, incoming: bool) -> Arc<Vmm> {
    let function = Box::new(ConfigOnly(ConfigSpace::new(&Identity::default(), true)));
    let driver = Ok(Box::new(device.clone()) as Box<_>);
    let log = log.map(|log| Box::new(Shared(log)) as Box<dyn DmaLog>);
    let backing = VfioBacking::Model { function, driver, log };
    let slot = VfioSlot {
        id: Some("vf0".into()),
        addr: None,
        backing,
        multifd_transfer: MultifdTransfer::Auto,
        events: false,
    };
    let Guest { machine, .. } = Guest::configured(MEMORY, 1, "dirty=2M rate=8M pci=1", |config| {
        (config.pcie, config.vfio, config.dirty_ring_size) = (true, vec![slot], ring);
    });
    Vmm::new(machine, Profile::new(QemuVersion::NEWEST, "microvm"), incoming)
}

/// A source whose device writes, and a destination. The vCPUs' writes are told by KVM's log, or by rings of this many
/// entries.
fn pair(tracking: Tracking, honest: bool, ring: u32) -> (Arc<Vmm>, Arc<Vmm>, Arc<Log>) {
    let (source, destination) = (Double::new("one", SHAPE), Double::new("one", SHAPE));
    let log = Arc::new(Log {
        tracking,
        honest,
        fails: Mutex::default(),
        vmm: OnceLock::new(),
        device: source.clone(),
        reports: Mutex::default(),
    });
    let from = machine(&source, Some(log.clone()), ring, false);
    log.vmm.get_or_init(|| Arc::downgrade(&from));
    let to = machine(&destination, None, ring, true);
    from.cont().unwrap();
    (from, to, log)
}

/// What the writes that a device's log tells of must not get lost with.
const WAYS: [(u32, Switches<'_>); 4] = [
    (0, &[("multifd", true)]),
    (1024, &[]),
    (1024, &[("dirty-limit", true)]),
    (0, &[("mapped-ram", true), ("return-path", false)]),
];

fn migrate(from: &Arc<Vmm>, to: &Arc<Vmm>) -> Option<String> {
    let directory = tempfile::tempdir().unwrap();
    let address = Address::Unix(directory.path().join("migration"));
    to.listen(&address, false).unwrap();
    from.migrate(address).unwrap();
    from.outgoing().wait();
    from.outgoing().statistics().error
}

/// How many of the pages that the device has written differ.
fn stale(from: &Vmm, to: &Vmm) -> usize {
    let byte = |vmm: &Vmm, page: usize| {
        let ram = vmm.ram();
        ram[0].memory.subslice(FIRST + page * PAGE, 1).unwrap().read_obj::<u8>(0).unwrap()
    };
    (0..PAGES).filter(|page| byte(from, *page) != byte(to, *page)).count()
}

fn have_arrived(from: &Vmm, to: &Vmm, log: &Log) {
    crate::vfio::wait("the guest is not started", || to.run_state() == RunState::Running);
    let reports = log.reports.lock().clone();
    assert!(reports.len() > 1 && reports[0].is_running(), "{reports:?}");
    // The last one when the device has stopped for good, not when the vCPUs have.
    assert_eq!(reports.last(), Some(&DeviceState::StopCopy), "{reports:?}");
    assert_eq!(stale(from, to), 0, "{:?}", log.tracking);
}

/// Saves the guest in a file, and loads it from there.
fn by_a_file(from: &Arc<Vmm>, to: &Arc<Vmm>, switches: Switches<'_>) -> (Option<String>, Option<String>) {
    let directory = tempfile::tempdir().unwrap();
    let address: Address = format!("file:{}", directory.path().join("guest").display()).parse().unwrap();
    for vmm in [from, to] {
        vmm.outgoing().set_capabilities(capabilities(switches)).unwrap();
    }
    from.migrate(address.clone()).unwrap();
    from.outgoing().wait();
    to.listen(&address, false).unwrap();
    crate::vfio::wait("the guest does not come", || !to.incoming().status().is_running());
    (from.outgoing().statistics().error, to.incoming().statistics().error)
}

fn writes_arrive() {
    for (tracking, honest) in [(Tracking::Devices, true), (Tracking::Container, true), (Tracking::Nobody, false)] {
        let (from, to, log) = pair(tracking, honest, 0);
        assert_eq!(migrate(&from, &to), None);
        have_arrived(&from, &to, &log);
    }
    for (ring, switches) in WAYS {
        let (from, to, log) = pair(Tracking::Devices, true, ring);
        if switches.contains(&("mapped-ram", true)) {
            assert_eq!(by_a_file(&from, &to, switches), (None, None));
        } else {
            assert_eq!(migrate_between(&from, &to, switches), (None, None), "{switches:?}");
        }
        have_arrived(&from, &to, &log);
    }
    // What is not reported does not arrive: that is noticed above.
    let (from, to, _) = pair(Tracking::Devices, false, 0);
    assert_eq!(migrate(&from, &to), None);
    assert!(stale(&from, &to) > 0);
}

fn log_fails() {
    let (from, to, log) = pair(Tracking::Devices, true, 0);
    *log.fails.lock() = Some(Errno::IO);
    let error = migrate(&from, &to).expect("it has not failed");
    for part in ["the log of the pages that devices write to", "VFIO device 'vf0'", "DMA_LOGGING_REPORT", "os error 5"]
    {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(from.run_state(), RunState::Running);
    assert_eq!(migrate(&from, &to), None);
}
