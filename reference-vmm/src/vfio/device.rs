//! The devices of a machine: what they are to its migration, and what they do when its guest stops and goes on.

use super::{DeviceState, DmaLog, Driver, Host, HostDevice, Migration, Opened, VfioError};
use crate::devices::pci::{Function, PciBus};
use crate::error::{Error, Result};
use parking_lot::Mutex;
use qevm_microvm::sections::vfio_idstr;
use qevm_migration::{GuestError, IterativeDevice, Pending};
use std::sync::atomic::{AtomicU64, Ordering};

/// A device for the PCI bus.
pub struct VfioSlot {
    /// The id that the command line gives it; messages and events have it.
    pub id: Option<String>,
    /// Its number on the bus; the lowest that is free when its turn comes without one (`addr`).
    pub addr: Option<usize>,
    /// What it is.
    pub backing: VfioBacking,
    /// Whether what is left of its state at the switchover goes over page channels (`x-migration-multifd-transfer`).
    pub multifd_transfer: MultifdTransfer,
    /// Its states are told as events VFIO_MIGRATION (`migration-events`).
    pub events: bool,
}

/// When a device's state goes over page channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MultifdTransfer {
    /// Never.
    Off,
    /// Where there are such.
    #[default]
    Auto,
    /// Always: without capability `multifd` there is no migration.
    On,
}

/// What a device of the machine is made of.
pub enum VfioBacking {
    /// A device of the host's kernel.
    Host(HostDevice),
    /// A model within the process.
    Model {
        /// What a guest sees of it.
        function: Box<dyn Function>,
        /// What migrates it, or why nothing does.
        driver: Result<Box<dyn Driver>, String>,
        /// Which pages of RAM it writes to, if it writes to any.
        log: Option<Box<dyn DmaLog>>,
    },
}

/// A device of the machine.
pub struct VfioDevice {
    id: Option<String>,
    idstr: String,
    /// Its place among those without an id, which is its name in QEMU's object tree.
    anonymous: usize,
    migration: Result<Migration, String>,
    multifd_transfer: MultifdTransfer,
    events: bool,
}

impl VfioDevice {
    /// When its state goes over page channels.
    pub fn multifd_transfer(&self) -> MultifdTransfer {
        self.multifd_transfer
    }

    /// Its name in messages.
    pub fn name(&self) -> &str {
        self.id.as_deref().unwrap_or(&self.idstr)
    }

    /// Its id on the command line.
    pub fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// Its path in QEMU's object tree.
    pub fn qom_path(&self) -> String {
        match &self.id {
            Some(id) => format!("/machine/peripheral/{id}"),
            None => format!("/machine/peripheral-anon/device[{}]", self.anonymous),
        }
    }

    /// Its state in the migration protocol; `None` if it cannot migrate.
    pub fn state(&self) -> Option<DeviceState> {
        self.migration.as_ref().ok().map(Migration::state)
    }

    /// `watcher` is told of its states from now on, if events were asked for.
    pub fn watch(&self, watcher: super::Watcher) {
        if let Some(migration) = self.migration.as_ref().ok().filter(|_| self.events) {
            migration.watch(watcher);
        }
    }
}

/// The devices of a machine, in the order of the command line.
#[derive(Default)]
pub struct VfioDevices {
    devices: Vec<VfioDevice>,
    logs: Vec<Box<dyn DmaLog>>,
    /// How often they began to work.
    starts: AtomicU64,
    /// What failed when the guest stopped, for who can do something about it.
    failure: Mutex<Option<VfioError>>,
}

impl VfioDevices {
    /// Puts devices on a machine's bus, if it has one. Those of the host's are opened.
    ///
    /// # Errors
    /// [`Error::Config`] without a bus, [`Error::Pci`] when it is full or a number is taken, [`Error::HostDevice`], and
    /// what KVM refuses.
    pub(crate) fn plug(slots: Vec<VfioSlot>, bus: Option<&mut PciBus>, mut host: Host) -> Result<VfioDevices> {
        if slots.is_empty() {
            return Ok(VfioDevices::default());
        }
        // The beginning is QEMU's.
        let none = "No 'PCI' bus found for device 'vfio-pci': start the machine with --machine microvm,pcie=on";
        let bus = bus.ok_or_else(|| Error::Config(none.to_owned()))?;
        let (mut devices, mut logs) = (Vec::new(), Vec::new());
        for (place, slot) in slots.into_iter().enumerate() {
            let VfioSlot { id, addr, backing, multifd_transfer, events } = slot;
            let Opened { function, driver } = match backing {
                VfioBacking::Host(device) => host.open(&device, bus.free(addr), id.as_deref())?,
                VfioBacking::Model { function, driver, log } => {
                    logs.extend(log);
                    Opened { function, driver }
                }
            };
            let idstr = vfio_idstr(bus.add(addr, id.as_deref(), function)?);
            let name = id.clone().unwrap_or_else(|| idstr.clone());
            let migration = driver.and_then(|driver| Migration::new(name, driver).map_err(|error| error.to_string()));
            devices.push(VfioDevice { id, idstr, anonymous: place, migration, multifd_transfer, events });
        }
        logs.extend(host.logs());
        let devices = VfioDevices { devices, logs, ..VfioDevices::default() };
        for reason in devices.blockers() {
            tracing::warn!("this machine cannot migrate: {reason}");
        }
        Ok(devices)
    }

    /// The devices.
    pub fn all(&self) -> &[VfioDevice] {
        &self.devices
    }

    /// The logs of what they write to.
    pub(crate) fn logs(&self) -> &[Box<dyn DmaLog>] {
        &self.logs
    }

    /// How often they began to work.
    pub(crate) fn starts(&self) -> u64 {
        self.starts.load(Ordering::SeqCst)
    }

    /// Why the machine cannot migrate with them.
    pub fn blockers(&self) -> Vec<String> {
        let unable = |device: &VfioDevice| {
            let reason = device.migration.as_ref().err()?;
            Some(format!("VFIO device '{}' cannot: {reason}", device.name()))
        };
        let alone = |device: &VfioDevice| {
            let migration = device.migration.as_ref().ok()?;
            let reason = "has no P2P states, without which devices cannot stop together: it can migrate only alone";
            (!migration.support().p2p).then(|| format!("VFIO device '{}' {reason}", device.name()))
        };
        let several = self.devices.len() > 1;
        self.devices.iter().flat_map(|device| [unable(device), alone(device).filter(|_| several)]).flatten().collect()
    }

    /// Those that migrate.
    pub fn iterative(&self) -> Vec<&dyn IterativeDevice> {
        let able = self.devices.iter().filter(|device| device.migration.is_ok());
        able.map(|device| device as &dyn IterativeDevice).collect()
    }

    /// The vCPUs are about to stop.
    pub(crate) fn quiesce(&self) {
        self.each(|migration| self.note(migration.quiesce()));
    }

    /// The vCPUs have stopped.
    pub(crate) fn stop(&self) {
        self.each(|migration| self.note(migration.stop()));
    }

    /// The stopped guest is to leave: what is left of the state can be read when this returns.
    ///
    /// # Errors
    /// What a device has refused, now or when the guest stopped.
    pub(crate) fn save(&self) -> Result<(), VfioError> {
        self.failed().map_or(Ok(()), Err)?;
        self.migrations().try_for_each(Migration::save)
    }

    /// The guest is about to go on. Either all devices work when this returns, or none does.
    ///
    /// # Errors
    /// What a device has refused.
    pub(crate) fn resume(&self) -> Result<(), VfioError> {
        self.failed();
        self.starts.fetch_add(1, Ordering::SeqCst);
        let resumed = self.migrations().try_for_each(Migration::resume);
        let running = resumed.and_then(|()| self.migrations().try_for_each(Migration::run));
        if running.is_err() {
            self.stop();
        }
        running
    }

    /// A guest is about to come. What fails is reported when it has.
    pub(crate) fn receive(&self) {
        self.each(|migration| {
            if let Err(error) = migration.receive() {
                tracing::warn!("{error}");
            }
        });
    }

    /// All of the guest has come.
    ///
    /// # Errors
    /// A device that does not like its state.
    pub fn loaded(&self) -> Result<(), VfioError> {
        self.migrations().try_for_each(Migration::loaded)
    }

    /// The guest has not come.
    pub(crate) fn forget(&self) {
        self.each(Migration::forget);
    }

    /// The machine is reset; its guest is paused.
    pub(crate) fn reset(&self) {
        self.each(Migration::power_cycle);
    }

    fn migrations(&self) -> impl Iterator<Item = &Migration> {
        self.devices.iter().filter_map(|device| device.migration.as_ref().ok())
    }

    fn each(&self, act: impl Fn(&Migration)) {
        self.migrations().for_each(act);
    }

    /// The first failure is the cause of others.
    fn note(&self, result: Result<(), VfioError>) {
        if let Err(error) = result {
            tracing::error!("{error}");
            self.failure.lock().get_or_insert(error);
        }
    }

    fn failed(&self) -> Option<VfioError> {
        self.failure.lock().take()
    }
}

impl VfioDevice {
    fn migration(&self) -> Result<&Migration, GuestError> {
        self.migration.as_ref().map_err(|reason| format!("VFIO device '{}' cannot: {reason}", self.name()).into())
    }
}

impl IterativeDevice for VfioDevice {
    fn idstr(&self) -> &str {
        &self.idstr
    }

    fn name(&self) -> &str {
        VfioDevice::name(self)
    }

    fn switchover_ack(&self) -> bool {
        self.migration.as_ref().is_ok_and(|migration| migration.support().precopy)
    }

    fn multifd_transfer(&self) -> bool {
        self.multifd_transfer != MultifdTransfer::Off
    }

    fn initial(&self) -> u64 {
        self.migration.as_ref().map_or(0, Migration::initial)
    }

    fn begin(&self) -> Result<(), GuestError> {
        Ok(self.migration()?.begin()?)
    }

    fn estimate(&self) -> Pending {
        self.migration.as_ref().map_or_else(|_| Pending::default(), Migration::estimate)
    }

    fn exact(&self) -> Result<Pending, GuestError> {
        Ok(self.migration()?.exact()?)
    }

    fn read(&self, into: &mut Vec<u8>, limit: usize) -> Result<(), GuestError> {
        Ok(self.migration()?.read(into, limit)?)
    }

    fn load(&self, piece: &[u8]) -> Result<(), GuestError> {
        let migration = self.migration()?;
        // Again, if it failed before.
        migration.receive()?;
        Ok(migration.load(piece)?)
    }

    fn end(&self) {
        if let Ok(migration) = &self.migration {
            migration.end();
        }
    }
}
