//! What the engines need of a virtual machine.

mod pages;

pub use pages::{MissingPages, ProtectedPages, Touch};

use super::{DeviceSection, GuestError, IterativeDevice, PAGE_SIZE, SavedDevices};
use qevm_wire::{CountedString, Profile};
use std::ops::Range;
use std::time::Duration;
use vm_memory::VolatileSlice;

/// The advice where nothing more is known of a section.
pub const ADVICE: &str = "start this machine with the devices that the source has, or the source without this one";

/// A virtual machine as a migration sees it, on either side: memory whose changes are logged, and that can be paused.
///
/// What else it has comes through [`devices`](Guest::devices), and what it wants to know or can do on the way through
/// [`hooks`](Guest::hooks).
pub trait Guest: Send + Sync {
    /// The machine type, as the configuration section carries it.
    fn machine_type(&self) -> &str;

    /// The RAM blocks, in the order of the stream (QEMU's is largest first).
    fn ram(&self) -> Vec<RamView<'_>>;

    /// Starts to log which pages change, whatever changes them: vCPUs, in-kernel devices or the monitor's own devices.
    ///
    /// # Errors
    /// The guest's own.
    fn start_dirty_log(&self) -> Result<Box<dyn DirtyLog + '_>, GuestError>;

    /// Stops all vCPUs and devices; when it returns, nothing in the guest changes any more. Says whether it was
    /// running.
    ///
    /// # Errors
    /// The guest's own. The guest is then as it was.
    fn pause(&self) -> Result<bool, GuestError>;

    /// Lets vCPUs and devices go on.
    ///
    /// # Errors
    /// The guest's own.
    fn resume(&self) -> Result<(), GuestError>;

    /// The devices.
    fn devices(&self) -> &dyn Devices;

    /// What the guest wants to be told, and can do for a migration; nothing by default.
    fn hooks(&self) -> &dyn Hooks {
        &NoHooks
    }

    /// Gives RAM block `block` (its number in [`ram`](Guest::ram)) the length that the source uses. Called only before
    /// the guest has run, and only for a length that differs. No block can have another length by default.
    ///
    /// # Errors
    /// The guest's own, if the block cannot have this length.
    fn resize_ram(&self, block: usize, used_length: u64) -> Result<(), GuestError> {
        let _ = block;
        Err(format!("this machine's RAM blocks have fixed lengths, none of {used_length} bytes").into())
    }
}

/// The devices of a guest. A [`Registry`](crate::Registry) is one, of devices that are declared.
pub trait Devices: Send + Sync {
    /// The state of all devices of a paused guest, in the order of the stream. `running` is what the destination is to
    /// take over: whether the guest ran before it was paused for the migration.
    ///
    /// # Errors
    /// The guest's own.
    fn save(&self, profile: &Profile, running: bool) -> Result<SavedDevices, GuestError>;

    /// Takes over the state of the devices, as [`save`](Devices::save) gave it, into a paused guest, and
    /// says whether the guest ran at the source.
    ///
    /// # Errors
    /// The guest's own; the guest is unusable then.
    fn load(&self, devices: &[DeviceSection]) -> Result<bool, GuestError>;

    /// Whether this machine has a device whose state comes in a section of this name and instance.
    fn has(&self, idstr: &CountedString, instance_id: u32) -> bool;

    /// What the operator may do when a section came that neither [`has`](Devices::has) nor
    /// [`iterative`](Devices::iterative) knows.
    fn advice(&self, idstr: &CountedString) -> String {
        let _ = idstr;
        ADVICE.into()
    }

    /// The devices whose state is sent in parts while the guest runs; none by default.
    fn iterative(&self) -> Vec<&dyn IterativeDevice> {
        Vec::new()
    }
}

/// What a guest is told of its migration, and what it can be asked for. Everything has a default.
pub trait Hooks: Send + Sync {
    /// The guest is about to be migrated, from here or to here: what can be done ahead for saving or loading its
    /// devices is done now, because later the guest would wait for it.
    fn prepare(&self) {}

    /// The migration has failed, and the guest, which did not run before [`Guest::pause`] either, stays as it was.
    fn stay_stopped(&self) {}

    /// Takes exclusive ownership of the stopped guest's disks (block activation); [`Guest::resume`] implies
    /// it. Called at the destination when everything has been loaded, but not under `late-block-activate`, and at the
    /// source when a migration has failed.
    ///
    /// # Errors
    /// Another process uses a disk.
    fn activate(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// The stopped guest's disks may be used by the destination from now on; told at the source before the end of the
    /// stream is sent.
    fn inactivate(&self) {}

    /// Throttles the vCPUs by `per_cent` of their time, 0 to 99; for capability `auto-converge`.
    ///
    /// # Errors
    /// The guest's own.
    fn throttle(&self, per_cent: u8) -> Result<(), GuestError> {
        if per_cent == 0 { Ok(()) } else { Err("the vCPUs of this machine cannot be slowed down".into()) }
    }

    /// Keeps every vCPU from dirtying more than this many MiB in a second, or ends that with `None`; for capability
    /// `dirty-limit`. Rates are measured over `period`.
    ///
    /// # Errors
    /// The guest's own.
    fn limit_dirty_rate(&self, mib_per_second: Option<u64>, period: Duration) -> Result<(), GuestError> {
        let _ = period;
        if mib_per_second.is_none() { Ok(()) } else { Err("the dirty rate of this machine cannot be limited".into()) }
    }

    /// Bytes of a page of the host in a RAM block (numbered in the order of [`Guest::ram`]): more than 4096 bytes where
    /// its memory is in huge pages. A guest that goes before its memory gets such a page as a whole.
    fn host_page_size(&self, block: usize) -> u64 {
        let _ = block;
        PAGE_SIZE
    }

    /// Whether the memory of a RAM block (numbered in the order of [`Guest::ram`]) is a file that is mapped shared, so
    /// that a machine with the same file has it, too. With capability `x-ignore-shared` such a block is not sent, and
    /// at the destination none of it is taken.
    fn shares(&self, block: usize) -> bool {
        let _ = block;
        false
    }

    /// What makes pages of guest memory missing until they are filled in; for a destination that [leaves them in a
    /// file](crate::LazyRestore).
    ///
    /// # Errors
    /// The guest's own: the host cannot do that, or this process may not.
    fn missing_pages(&self) -> Result<Box<dyn MissingPages>, GuestError> {
        Err("this machine has all of its memory at once".into())
    }

    /// What protects pages of guest memory against writes; for a [background snapshot](crate::ProtectedPages).
    ///
    /// # Errors
    /// The guest's own: the host cannot do that, or this process may not.
    fn protected_pages(&self) -> Result<Box<dyn ProtectedPages>, GuestError> {
        Err("the memory of this machine cannot be protected".into())
    }

    /// Gives bytes of a RAM block back to the host, whole pages of the host's: the destination has them and runs the
    /// guest, which never runs here again. For capability `release-ram`.
    ///
    /// # Errors
    /// The guest's own; the memory stays then.
    fn release(&self, block: usize, bytes: Range<u64>) -> Result<(), GuestError> {
        let _ = (block, bytes);
        Err("this machine keeps its memory".into())
    }

    /// The guest has gone to the destination for good; told at the source.
    fn handed_over(&self) {}
}

/// The hooks of a guest that has none of its own.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHooks;

impl Hooks for NoHooks {}

/// A RAM block.
#[derive(Debug, Clone, Copy)]
pub struct RamView<'g> {
    /// Its name in the stream, e.g. `microvm.ram`.
    pub name: &'g str,
    /// Its memory, whole pages. vCPUs may be writing to it.
    pub memory: VolatileSlice<'g>,
    /// Nothing has been written to it yet, so every page is zero: a destination need not touch pages to clear them.
    pub pristine: bool,
}

/// A running log of changed pages. Dropping it ends the log.
///
/// Reading and resetting are apart: pages stay in the log until they are reset just before they are sent, so that a
/// write in between is covered by what is sent and does not make the page dirty again.
pub trait DirtyLog {
    /// Reports every page that is in the log: block number (in the order of [`Guest::ram`]), a word number, and the
    /// word, bit `i` of which is page `64 * word_number + i` of the block. All pages may be in the log at first.
    ///
    /// # Errors
    /// The guest's own.
    fn read(&mut self, found: &mut dyn FnMut(usize, usize, u64)) -> Result<(), GuestError>;

    /// Resets those pages of a range that the last [`read`](DirtyLog::read) reported. Pages that were written after it
    /// and not reported stay in the log. The range starts and ends at multiples of 64 pages or the block's end.
    ///
    /// # Errors
    /// The guest's own.
    fn reset(&mut self, block: usize, pages: Range<u64>) -> Result<(), GuestError>;
}
