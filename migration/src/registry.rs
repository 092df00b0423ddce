//! Devices that are declared, by the names of their sections.

use crate::{DeviceSection, Devices, GuestError, SavedDevices};
use qevm_devices::globalstate::GlobalState;
use qevm_savevm::Reader;
use qevm_savevm::vmdesc::StructDescription;
use qevm_savevm::vmstate::{self, Context, VmState};
use qevm_wire::{CountedString, Profile, QemuVersion};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The section that says whether the guest ran. Every machine of QEMU's has it.
const GLOBAL_STATE: &str = "globalstate";
/// The run states of a source in good health.
const RUNNING: &str = "running";
const PAUSED: &str = "paused";

/// The devices of a guest, each with the name and the instance of its section. It saves and loads whatever is declared
/// with [`#[derive(VmState)]`](VmState), and collects the description that goes with the stream.
///
/// Section `globalstate`, which says whether the guest ran, is the registry's own.
///
/// ```
/// use qevm_migration::{Devices, Registry};
/// use qevm_savevm::vmstate::VmState;
/// use qevm_wire::{Profile, QemuVersion};
/// use std::sync::{Arc, Mutex};
///
/// #[derive(VmState, Debug, Clone, Default, PartialEq)]
/// #[vmstate(name = "button", version = 1)]
/// struct Button {
///     pressed: u32,
/// }
///
/// let button = Arc::new(Mutex::new(Button { pressed: 3 }));
/// let mut source = Registry::new("microvm");
/// source.share("button", 0, button.clone())?;
/// let saved = source.save(&Profile::new(QemuVersion::NEWEST, "microvm"), true)?;
/// assert!(saved.description().contains("pressed"));
///
/// let mut arrived = Button::default();
/// let mut destination = Registry::new("microvm");
/// destination.add("button", 0, &mut arrived)?;
/// let running = destination.load(saved.sections())?;
/// drop(destination);
/// assert!(running);
/// assert_eq!(arrived, Button { pressed: 3 });
/// # Ok::<(), qevm_migration::GuestError>(())
/// ```
pub struct Registry<'d> {
    machine_type: String,
    context: Context,
    entries: Vec<Entry<'d>>,
    ignored: Vec<CountedString>,
}

struct Entry<'d> {
    idstr: CountedString,
    instance_id: u32,
    optional: bool,
    device: Box<dyn Slot + 'd>,
}

/// Why a registry does not take a device, or its devices' state cannot be saved or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// No section can have this name: it has no bytes, or more than 255.
    #[error("no section can be called '{found}': a name has 1 to 255 bytes")]
    Name {
        /// The name.
        found: String,
    },
    /// A section of this name and instance is there already.
    #[error("there is a section '{idstr}' {instance_id} already")]
    Twice {
        /// The section.
        idstr: CountedString,
        /// Its instance.
        instance_id: u32,
    },
    /// A device's state cannot be expressed in its section.
    #[error("cannot save section '{idstr}' {instance_id}: {source}")]
    Unsavable {
        /// The section.
        idstr: CountedString,
        /// Its instance.
        instance_id: u32,
        /// The field, and what is wrong with it.
        source: qevm_savevm::Error,
    },
    /// A section came that no device is registered for.
    #[error("there is no device for section '{idstr}' {instance_id}")]
    Unknown {
        /// The section.
        idstr: CountedString,
        /// Its instance.
        instance_id: u32,
    },
    /// No section came for a device that is registered, and not as [`optional`](Registry::optional).
    #[error("section '{idstr}' {instance_id} did not arrive: start the source with this machine's devices")]
    Missing {
        /// The section.
        idstr: CountedString,
        /// Its instance.
        instance_id: u32,
    },
    /// A section's version or content is not what its device is declared as.
    #[error("section '{idstr}' {instance_id}: {source}")]
    Content {
        /// The section.
        idstr: CountedString,
        /// Its instance.
        instance_id: u32,
        /// What is wrong, and at which byte of the content.
        source: qevm_savevm::Error,
    },
}

impl<'d> Registry<'d> {
    /// A registry without devices, of a machine of this type under TCG.
    pub fn new(machine_type: &str) -> Self {
        // The newest release knows what every release sends.
        let context = Context::new(QemuVersion::NEWEST, machine_type);
        Registry { machine_type: machine_type.into(), context, entries: Vec::new(), ignored: Vec::new() }
    }

    /// The same with other facts for the declarations to ask: an accelerator, numbers of slots, limits. Its profile
    /// holds for loading; what is saved suits the profile of the migration.
    #[must_use]
    pub fn with_context(mut self, context: Context) -> Self {
        self.context = context;
        self
    }

    /// Adds a device that is the registry's as long as the registry is there. Sections are sent in the order in which
    /// devices were added.
    ///
    /// # Errors
    /// [`RegistryError::Name`] and [`RegistryError::Twice`].
    pub fn add<T>(&mut self, idstr: &str, instance_id: u32, device: &'d mut T) -> Result<(), RegistryError>
    where
        T: VmState + Clone + Send,
    {
        self.insert(idstr, instance_id, Box::new(Exclusive(Mutex::new(device))))
    }

    /// Adds a device that others use as well, as an `Arc<Mutex<…>>` or a `&Mutex<…>`. It is locked while it is saved or
    /// loaded.
    ///
    /// # Errors
    /// As [`add`](Registry::add).
    pub fn share<T, D>(&mut self, idstr: &str, instance_id: u32, device: D) -> Result<(), RegistryError>
    where
        T: VmState + Clone + Send + 'd,
        D: Deref<Target = Mutex<T>> + Send + Sync + 'd,
    {
        self.insert(idstr, instance_id, Box::new(Shared(device, PhantomData)))
    }

    /// Takes a source that does not send the section of this device: the device then stays as it is.
    ///
    /// # Errors
    /// [`RegistryError::Unknown`] and [`RegistryError::Name`].
    pub fn optional(&mut self, idstr: &str, instance_id: u32) -> Result<(), RegistryError> {
        let idstr = name(idstr)?;
        match self.entries.iter_mut().find(|entry| entry.idstr == idstr && entry.instance_id == instance_id) {
            Some(entry) => entry.optional = true,
            None => return Err(RegistryError::Unknown { idstr, instance_id }),
        }
        Ok(())
    }

    /// Takes sections of this name, whatever their instance, and does nothing with them: for devices of the source
    /// whose state this machine can do without.
    ///
    /// # Errors
    /// [`RegistryError::Name`].
    pub fn ignore(&mut self, idstr: &str) -> Result<(), RegistryError> {
        self.ignored.push(name(idstr)?);
        Ok(())
    }

    fn insert(&mut self, idstr: &str, instance_id: u32, device: Box<dyn Slot + 'd>) -> Result<(), RegistryError> {
        let idstr = name(idstr)?;
        if self.find(&idstr, instance_id).is_some() || idstr == *GLOBAL_STATE {
            return Err(RegistryError::Twice { idstr, instance_id });
        }
        self.entries.push(Entry { idstr, instance_id, optional: false, device });
        Ok(())
    }

    fn find(&self, idstr: &CountedString, instance_id: u32) -> Option<&Entry<'d>> {
        self.entries.iter().find(|entry| entry.idstr == *idstr && entry.instance_id == instance_id)
    }

    fn is_ignored(&self, idstr: &CountedString) -> bool {
        self.ignored.contains(idstr)
    }

    fn sections(&self, context: &Context, running: bool) -> Result<Vec<Described>, RegistryError> {
        let mut described = Vec::new();
        for Entry { idstr, instance_id, device, .. } in &self.entries {
            described.push(device.save(idstr, *instance_id, context)?);
        }
        let idstr = name(GLOBAL_STATE)?;
        // Both names fit.
        let state = GlobalState::new(if running { RUNNING } else { PAUSED }, context).unwrap_or_default();
        described.push(save(&state, &idstr, 0, context)?);
        Ok(described)
    }

    /// Decodes everything, and only then lets devices take it over: all of them or none.
    fn take(&self, sections: &[DeviceSection]) -> Result<bool, RegistryError> {
        let (mut running, mut taken): (_, Vec<Taken<'_>>) = (true, Vec::new());
        for section in sections {
            let DeviceSection { idstr, instance_id, .. } = section;
            if let Some(entry) = self.find(idstr, *instance_id) {
                taken.push(entry.device.load(section, &self.context)?);
            } else if *idstr == *GLOBAL_STATE && *instance_id == 0 {
                running = load::<GlobalState>(section, &self.context)?.name() == Some(RUNNING);
            } else if !self.is_ignored(idstr) {
                return Err(RegistryError::Unknown { idstr: idstr.clone(), instance_id: *instance_id });
            }
        }
        let came = |entry: &Entry<'_>| {
            sections.iter().any(|section| section.idstr == entry.idstr && section.instance_id == entry.instance_id)
        };
        if let Some(Entry { idstr, instance_id, .. }) =
            self.entries.iter().find(|entry| !entry.optional && !came(entry))
        {
            return Err(RegistryError::Missing { idstr: idstr.clone(), instance_id: *instance_id });
        }
        for take_over in taken {
            take_over();
        }
        Ok(running)
    }
}

impl Devices for Registry<'_> {
    fn save(&self, profile: &Profile, running: bool) -> Result<SavedDevices, GuestError> {
        let mut context = self.context.clone();
        context.profile = profile.clone();
        Ok(SavedDevices::described(&self.machine_type, profile, self.sections(&context, running)?))
    }

    fn load(&self, devices: &[DeviceSection]) -> Result<bool, GuestError> {
        Ok(self.take(devices)?)
    }

    fn has(&self, idstr: &CountedString, instance_id: u32) -> bool {
        let own = *idstr == *GLOBAL_STATE && instance_id == 0;
        own || self.find(idstr, instance_id).is_some() || self.is_ignored(idstr)
    }
}

impl fmt::Debug for Registry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let devices = self.entries.iter().map(|entry| (&entry.idstr, entry.instance_id));
        f.debug_struct("Registry")
            .field("devices", &devices.collect::<Vec<_>>())
            .field("ignored", &self.ignored)
            .finish_non_exhaustive()
    }
}

type Described = (DeviceSection, Option<StructDescription>);
/// Brings a device to the state that was decoded for it.
type Taken<'a> = Box<dyn FnOnce() + 'a>;

/// A device, whatever its type.
trait Slot: Send + Sync {
    fn save(&self, idstr: &CountedString, instance_id: u32, context: &Context) -> Result<Described, RegistryError>;

    fn load<'a>(&'a self, section: &DeviceSection, context: &Context) -> Result<Taken<'a>, RegistryError>;
}

struct Exclusive<'d, T>(Mutex<&'d mut T>);

impl<T: VmState + Clone + Send> Slot for Exclusive<'_, T> {
    fn save(&self, idstr: &CountedString, instance_id: u32, context: &Context) -> Result<Described, RegistryError> {
        save(&**lock(&self.0), idstr, instance_id, context)
    }

    fn load<'a>(&'a self, section: &DeviceSection, context: &Context) -> Result<Taken<'a>, RegistryError> {
        let state = load::<T>(section, context)?;
        Ok(Box::new(move || **lock(&self.0) = state))
    }
}

/// The second part says that it lives no longer than the device.
struct Shared<T, D>(D, PhantomData<fn() -> T>);

impl<T, D> Slot for Shared<T, D>
where
    T: VmState + Clone + Send,
    D: Deref<Target = Mutex<T>> + Send + Sync,
{
    fn save(&self, idstr: &CountedString, instance_id: u32, context: &Context) -> Result<Described, RegistryError> {
        save(&*lock(&self.0), idstr, instance_id, context)
    }

    fn load<'a>(&'a self, section: &DeviceSection, context: &Context) -> Result<Taken<'a>, RegistryError> {
        let state = load::<T>(section, context)?;
        Ok(Box::new(move || *lock(&self.0) = state))
    }
}

/// The section of a device and its description. Hooks work on a copy: a device whose migration fails stays as it was.
fn save<T: VmState + Clone>(
    device: &T,
    idstr: &CountedString,
    instance_id: u32,
    context: &Context,
) -> Result<Described, RegistryError> {
    let mut device = device.clone();
    match vmstate::save_described(&mut device, context) {
        Ok((version_id, body, description)) => {
            Ok((DeviceSection { idstr: idstr.clone(), instance_id, version_id, body }, Some(description)))
        }
        Err(source) => Err(RegistryError::Unsavable { idstr: idstr.clone(), instance_id, source }),
    }
}

fn load<T: VmState>(section: &DeviceSection, context: &Context) -> Result<T, RegistryError> {
    let mut reader = Reader::new(&section.body);
    let loaded = vmstate::load(&mut reader, section.version_id, context);
    let whole = loaded.and_then(|state| reader.expect_end("the section's content").map(|()| state));
    let DeviceSection { idstr, instance_id, .. } = section;
    whole.map_err(|source| RegistryError::Content { idstr: idstr.clone(), instance_id: *instance_id, source })
}

fn name(idstr: &str) -> Result<CountedString, RegistryError> {
    CountedString::new(idstr).ok_or_else(|| RegistryError::Name { found: idstr.into() })
}

/// A monitor's devices are in locks of the standard library, so that this interface names no other crate's type.
fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
