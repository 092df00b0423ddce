//! Section `acpi-ged`: the ACPI generic event device.

use qevm_savevm::vmstate::VmState;

/// The device, section `acpi-ged` version 1. (`docs/format/microvm-devices.md`, acpi-ged)
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "acpi-ged", version = 1)]
pub struct AcpiGed {
    /// The event selector.
    #[vmstate(since = 1)]
    pub ged_state: GedState,
    /// Subsection `acpi-ged/memhp`: always sent.
    #[vmstate(subsection)]
    pub memhp: Option<Memhp>,
    /// Subsection `acpi-ged/cpuhp`: machines that plug CPUs (not microvm); seen in 10.0 and 11.1, not in 7.2.
    #[vmstate(subsection, since_release = "8.0")]
    pub cpuhp: Option<Cpuhp>,
    /// Subsection `acpi-ged/ghes`: machines with hardware error reporting.
    #[vmstate(subsection)]
    pub ghes: Option<Ghes>,
    /// Subsection `acpi-ged/pcihp`: machines that plug PCI devices by ACPI; seen in 11.1, not in 10.0.
    #[vmstate(subsection, since_release = "11.0")]
    pub pcihp: Option<Pcihp>,
    /// Subsection `acpi-ged/hest`; seen in 11.1, not in 10.0.
    #[vmstate(subsection, since_release = "11.0")]
    pub hest: Option<Hest>,
}

/// Structure `acpi-ged-state`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "acpi-ged-state", version = 1)]
pub struct GedState {
    /// Events that wait to be read by the guest, a bit for each.
    pub sel: u32,
}

/// Subsection `acpi-ged/memhp`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "acpi-ged/memhp", version = 1)]
pub struct Memhp {
    /// Memory hotplug.
    #[vmstate(since = 1)]
    pub memhp_state: MemoryHotplug,
}

/// Structure `memory hotplug state`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "memory hotplug state", version = 1)]
pub struct MemoryHotplug {
    /// The selected slot.
    pub selector: u32,
    /// One for each slot (`-m slots=`, [`Context::memory_slots`](qevm_savevm::vmstate::Context::memory_slots)).
    #[vmstate(len = ctx.memory_slots)]
    pub devs: Vec<MemorySlot>,
}

/// Structure `memory hotplug device state`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "memory hotplug device state", version = 1)]
pub struct MemorySlot {
    /// There is a DIMM.
    pub is_enabled: bool,
    /// It is being plugged.
    pub is_inserting: bool,
    /// `_OST` event.
    pub ost_event: u32,
    /// `_OST` status.
    pub ost_status: u32,
}

/// Subsection `acpi-ged/cpuhp`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "acpi-ged/cpuhp", version = 1)]
pub struct Cpuhp {
    /// CPU hotplug.
    #[vmstate(since = 1)]
    pub cpuhp_state: CpuHotplug,
}

/// Structure `CPU hotplug state`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "CPU hotplug state", version = 1)]
pub struct CpuHotplug {
    /// The selected CPU.
    pub selector: u32,
    /// The command.
    pub command: u8,
    /// One for each possible CPU ([`Context::hotplug_cpus`](qevm_savevm::vmstate::Context::hotplug_cpus)).
    #[vmstate(len = ctx.hotplug_cpus)]
    pub devs: Vec<CpuSlot>,
}

/// Structure `CPU hotplug device state`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "CPU hotplug device state", version = 1)]
pub struct CpuSlot {
    /// It is being plugged.
    pub is_inserting: bool,
    /// It is being removed.
    pub is_removing: bool,
    /// `_OST` event.
    pub ost_event: u32,
    /// `_OST` status.
    pub ost_status: u32,
}

/// Subsection `acpi-ged/ghes`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "acpi-ged/ghes", version = 1, needed = |ghes, _| ghes.ghes_state.hw_error_le != 0)]
pub struct Ghes {
    /// Hardware error reporting.
    #[vmstate(since = 1)]
    pub ghes_state: GhesState,
}

/// Structure `acpi-ghes`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "acpi-ghes", version = 1)]
pub struct GhesState {
    /// Guest-physical address of `etc/hardware_errors`; called `ghes_addr_le` up to 7.2.
    pub hw_error_le: u64,
}

/// Subsection `acpi-ged/pcihp`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "acpi-ged/pcihp", version = 1)]
pub struct Pcihp {
    /// The selected bus.
    #[vmstate(name = "pcihp_state.hotplug_select")]
    pub hotplug_select: u32,
    /// One for each bus.
    #[vmstate(name = "pcihp_state.acpi_pcihp_pci_status", since = 1)]
    pub pci_status: qevm_savevm::vmstate::Table<PcihpStatus, 256>,
    /// The selected ACPI index.
    #[vmstate(name = "pcihp_state.acpi_index")]
    pub acpi_index: u32,
}

/// Structure `acpi_pcihp_pci_status`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "acpi_pcihp_pci_status", version = 1)]
pub struct PcihpStatus {
    /// Slots being plugged.
    pub up: u32,
    /// Slots being unplugged.
    pub down: u32,
}

/// Subsection `acpi-ged/hest`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "acpi-ged/hest", version = 1, needed = |hest, _| hest.ghes_state.hest_addr_le != 0)]
pub struct Hest {
    /// The error source table.
    #[vmstate(since = 1)]
    pub ghes_state: HestState,
}

/// Structure `acpi-hest`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "acpi-hest", version = 1)]
pub struct HestState {
    /// Guest-physical address of the table.
    pub hest_addr_le: u64,
}
