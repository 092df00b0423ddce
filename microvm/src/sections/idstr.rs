//! Names of the sections whose content is kept, by their variant of [`DeviceState`](qevm_devices::DeviceState).

pub(super) const AcpiGed: &str = "acpi-ged";
pub(super) const Cpu: &str = "cpu";
pub(super) const FwCfg: &str = "fw_cfg";
pub(super) const I8259: &str = "i8259";
pub(super) const Mc146818Rtc: &str = "mc146818rtc";
pub(super) const KvmTprOpt: &str = "kvm-tpr-opt";
pub(super) const Timer: &str = "timer";
