//! A destination of QEMU's waits for ever for a description that was promised: a source cannot leave it out.

use qevm_migration::{
    Channel, DeviceSection, Devices, DirtyLog, Guest, GuestError, Job, RamView, Registry, SavedDevices, Socket, migrate,
};
use qevm_savevm::vmdesc::{Description, DeviceBody};
use qevm_savevm::vmstate::VmState;
use qevm_savevm::{Decoder, DecoderOptions, Event};
use qevm_wire::{CountedString, Driver, Limits, Profile, QemuVersion};
use std::io::Read;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use vm_memory::{MmapRegion, VolatileMemory};

/// A stopped guest of 64 pages.
struct Stopped<D> {
    memory: MmapRegion,
    devices: D,
}

impl<D: Devices> Guest for Stopped<D> {
    fn machine_type(&self) -> &str {
        "microvm"
    }

    fn ram(&self) -> Vec<RamView<'_>> {
        vec![RamView { name: "microvm.ram", memory: self.memory.as_volatile_slice(), pristine: false }]
    }

    fn start_dirty_log(&self) -> Result<Box<dyn DirtyLog + '_>, GuestError> {
        Ok(Box::new(Clean))
    }

    fn pause(&self) -> Result<bool, GuestError> {
        Ok(false)
    }

    fn resume(&self) -> Result<(), GuestError> {
        Err("it did not run".into())
    }

    fn devices(&self) -> &dyn Devices {
        &self.devices
    }
}

struct Clean;

impl DirtyLog for Clean {
    fn read(&mut self, _: &mut dyn FnMut(usize, usize, u64)) -> Result<(), GuestError> {
        Ok(())
    }

    fn reset(&mut self, _: usize, _: Range<u64>) -> Result<(), GuestError> {
        Ok(())
    }
}

/// A device of which nothing is known but its five bytes.
struct Silent;

impl Devices for Silent {
    fn save(&self, _: &Profile, _: bool) -> Result<SavedDevices, GuestError> {
        let idstr = CountedString::new("silent").ok_or("no name")?;
        let section = DeviceSection { idstr, instance_id: 2, version_id: 1, body: vec![7; 5] };
        Ok(SavedDevices::opaque(vec![section]))
    }

    fn load(&self, _: &[DeviceSection]) -> Result<bool, GuestError> {
        Err("it only leaves".into())
    }

    fn has(&self, _: &CountedString, _: u32) -> bool {
        false
    }
}

#[derive(VmState, Debug, Clone, Default)]
#[vmstate(name = "button", version = 1)]
struct Button {
    pressed: u32,
}

/// What follows the end of the stream of a guest with these devices.
fn description<D: Devices>(devices: D, profile: &Profile) -> Option<Description> {
    let guest = Stopped { memory: MmapRegion::new(64 * 4096).unwrap(), devices };
    let (here, mut there) = UnixStream::pair().unwrap();
    let job = Job::default();
    job.begin().unwrap();
    let stream = thread::scope(|scope| {
        let reading = scope.spawn(move || {
            let mut stream = Vec::new();
            there.read_to_end(&mut stream).map(|_| stream)
        });
        let channel: Arc<dyn Channel> = Arc::new(Socket::Unix(here));
        migrate(&guest, &channel.into(), &job, profile).unwrap();
        reading.join().unwrap().unwrap()
    });
    let mut driver = Driver::new(&*stream, Decoder::new(DecoderOptions::default()));
    loop {
        let found = driver.next().unwrap().map(|event| matches!(event, Event::VmDescription { .. }));
        if found? {
            let mut text = String::new();
            driver.payload().read_to_string(&mut text).unwrap();
            return Some(Description::parse(text.as_bytes(), &Limits::default()).unwrap());
        }
    }
}

#[test]
fn a_device_that_is_not_described_is_a_buffer() {
    let described = description(Silent, &Profile::new(QemuVersion::NEWEST, "microvm")).unwrap();
    let [device] = &described.devices[..] else { panic!("{described:?}") };
    assert_eq!((&*device.name, device.instance_id), ("silent", 2));
    assert!(matches!(device.body, DeviceBody::OldStyle { size: 5 }), "{device:?}");
}

#[test]
fn a_declared_device_is_described_by_its_fields() {
    let mut registry = Registry::new("microvm");
    registry.share("button", 0, Arc::new(Mutex::new(Button { pressed: 3 }))).unwrap();
    let described = description(registry, &Profile::new(QemuVersion::NEWEST, "microvm")).unwrap();
    let names: Vec<_> = described.devices.iter().map(|device| &*device.name).collect();
    assert_eq!(names, ["button", "globalstate"]);
    let DeviceBody::Struct(button) = &described.devices[0].body else { panic!("{described:?}") };
    assert_eq!((&*button.vmsd_name, &*button.fields[0].name), ("button", "pressed"));
}

#[test]
fn there_is_none_where_the_profile_has_none() {
    let mut profile = Profile::new(QemuVersion::NEWEST, "microvm");
    profile.vmdesc = false;
    assert_eq!(description(Silent, &profile), None);
}
