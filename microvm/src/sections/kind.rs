//! The sections whose names are the same on every machine.

/// A device section of `microvm` that is not of a virtio or VFIO device. The variants are named as those of
/// [`DeviceState`](qevm_devices::DeviceState).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SectionKind {
    AcpiGed,
    Apic,
    Cpu,
    CpuCommon,
    FwCfg,
    GlobalState,
    GpexRoot,
    I8254,
    I8259,
    IoApic,
    KvmClock,
    KvmTprOpt,
    Mc146818Rtc,
    PciBus,
    PciHost,
    Serial,
    Timer,
}

impl SectionKind {
    const ALL: [SectionKind; 17] = {
        use SectionKind::*;
        [
            AcpiGed,
            Apic,
            Cpu,
            CpuCommon,
            FwCfg,
            GlobalState,
            GpexRoot,
            I8254,
            I8259,
            IoApic,
            KvmClock,
            KvmTprOpt,
            Mc146818Rtc,
            PciBus,
            PciHost,
            Serial,
            Timer,
        ]
    };

    /// The name on the wire.
    pub(super) const fn idstr(self) -> &'static str {
        match self {
            SectionKind::AcpiGed => "acpi-ged",
            SectionKind::Apic => "apic",
            SectionKind::Cpu => "cpu",
            SectionKind::CpuCommon => "cpu_common",
            SectionKind::FwCfg => "fw_cfg",
            SectionKind::GlobalState => "globalstate",
            SectionKind::GpexRoot => "0000:00:00.0/gpex_root",
            SectionKind::I8254 => "i8254",
            SectionKind::I8259 => "i8259",
            SectionKind::IoApic => "ioapic",
            SectionKind::KvmClock => "kvmclock",
            SectionKind::KvmTprOpt => "kvm-tpr-opt",
            SectionKind::Mc146818Rtc => "mc146818rtc",
            SectionKind::PciBus => "PCIBUS",
            SectionKind::PciHost => "PCIHost",
            SectionKind::Serial => "serial",
            SectionKind::Timer => "timer",
        }
    }

    /// The section of that name.
    pub(super) fn of(idstr: &str) -> Option<Self> {
        SectionKind::ALL.into_iter().find(|kind| kind.idstr() == idstr)
    }
}
