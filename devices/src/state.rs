//! Any of the declared sections, chosen by its `idstr`.

use super::{
    acpi_ged, apic, cpu, cpu_common, fw_cfg, globalstate, gpex, i8254, i8259, ioapic, kvm_tpr_opt, kvmclock,
    mc146818rtc, serial, timer, virtio,
};
use qevm_savevm::Error;
use qevm_savevm::vmdesc::StructDescription;
use qevm_savevm::vmstate::{self, Context, Description, LoadStep, VmState, VmStateError};

macro_rules! sections {
    ($($(#[$doc:meta])* $variant:ident($type:ty),)*) => {
        /// The state of one declared device section.
        ///
        /// ```
        /// use qevm_devices::DeviceState;
        /// use qevm_savevm::vmstate::Context;
        /// use qevm_wire::QemuVersion;
        ///
        /// let ctx = Context::new(QemuVersion::new(10, 0), "microvm");
        /// let payload = [0, 0, 0, 1, 0, 0, 0, 0];
        /// let state = DeviceState::decode("cpu_common", 1, &payload, &ctx).unwrap()?;
        /// assert!(matches!(&state, DeviceState::CpuCommon(cpu) if cpu.halted == 1));
        /// assert_eq!(state.encode(1, &ctx)?, payload);
        /// assert!(DeviceState::decode("slirp", 4, &[], &ctx).is_none());
        /// assert!(DeviceState::decode("0000:00:01.0/virtio-rng", 1, &[], &ctx).is_none()); // not virtio-mmio
        /// # Ok::<(), qevm_savevm::Error>(())
        /// ```
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[non_exhaustive]
        #[allow(clippy::large_enum_variant)] // One of each exists at a time; a box would cost every user a dereference.
        pub enum DeviceState {
            $($(#[$doc])* $variant($type),)*
        }

        impl DeviceState {
            /// Decodes the section `idstr`, see [`vmstate::decode`]; `None` if it is not declared.
            pub fn decode(
                idstr: &str, version: u32, payload: &[u8], ctx: &Context,
            ) -> Option<Result<DeviceState, Error>> {
                let name = vmsd_name(idstr);
                $(if name == <$type>::NAME {
                    return Some(vmstate::decode::<$type>(payload, version, ctx).map(DeviceState::$variant));
                })*
                None
            }

            /// Loads the section `idstr` as a destination does, see [`vmstate::load`]; `None` if it is not declared.
            pub fn load(
                idstr: &str, version: u32, reader: &mut qevm_savevm::Reader<'_>, ctx: &Context,
            ) -> Option<Result<DeviceState, Error>> {
                let name = vmsd_name(idstr);
                $(if name == <$type>::NAME {
                    return Some(vmstate::load::<$type>(reader, version, ctx).map(DeviceState::$variant));
                })*
                None
            }

            /// Loads the section `idstr` from the beginning of a stream that is still arriving, see
            /// [`vmstate::load_step`]; `None` if it is not declared.
            pub fn load_step(
                idstr: &str, version: u32, input: &[u8], ctx: &Context,
            ) -> Option<Result<LoadStep<DeviceState>, Error>> {
                let name = vmsd_name(idstr);
                $(if name == <$type>::NAME {
                    let step = vmstate::load_step::<$type>(input, version, ctx);
                    return Some(step.map(|step| match step {
                        LoadStep::Loaded { consumed, state } => {
                            LoadStep::Loaded { consumed, state: DeviceState::$variant(state) }
                        }
                        LoadStep::NeedMore { at_least } => LoadStep::NeedMore { at_least },
                    }));
                })*
                None
            }

            /// Encodes the section as `version`, see [`vmstate::encode_version`].
            ///
            /// # Errors
            /// As [`vmstate::encode_version`].
            pub fn encode(&self, version: u32, ctx: &Context) -> Result<Vec<u8>, Error> {
                match self {
                    $(DeviceState::$variant(state) => vmstate::encode_version(state, version, ctx),)*
                }
            }

            /// Encodes and describes the section, see [`vmstate::encode_described`].
            ///
            /// # Errors
            /// As [`vmstate::encode_version`].
            pub fn encode_described(&self, version: u32, ctx: &Context) -> Result<(Vec<u8>, StructDescription), Error> {
                match self {
                    $(DeviceState::$variant(state) => vmstate::encode_described(state, version, ctx),)*
                }
            }

            /// Runs the pre-save hooks and drops what need not be sent, see [`vmstate::save`].
            ///
            /// # Errors
            /// What a hook refuses.
            pub fn prepare(&mut self, ctx: &Context) -> Result<(), VmStateError> {
                match self {
                    $(DeviceState::$variant(state) => state.prepare(ctx),)*
                }
            }

            /// The VMSD's name.
            pub fn name(&self) -> &'static str {
                match self {
                    $(DeviceState::$variant(_) => <$type>::NAME,)*
                }
            }

            /// The version its section is sent with.
            pub fn version(&self, ctx: &Context) -> u32 {
                match self {
                    $(DeviceState::$variant(state) => state.wire_version(ctx),)*
                }
            }
        }

        /// The schemas of all declared sections for the release of `ctx`.
        pub fn descriptions(ctx: &Context) -> Vec<Description> {
            vec![$(<$type>::description(ctx)),*]
        }
    };
}

sections! {
    /// `apic`
    Apic(apic::Apic),
    /// `timer`
    Timer(timer::CpuTimers),
    /// `fw_cfg`
    FwCfg(fw_cfg::FwCfg),
    /// `cpu_common`
    CpuCommon(cpu_common::CpuCommon),
    /// `cpu`
    Cpu(cpu::Cpu),
    /// `kvm-tpr-opt`
    KvmTprOpt(kvm_tpr_opt::KvmTprOpt),
    /// `kvmclock`
    KvmClock(kvmclock::KvmClock),
    /// `ioapic`
    IoApic(ioapic::IoApic),
    /// `acpi-ged`
    AcpiGed(acpi_ged::AcpiGed),
    /// `0000:00:00.0/gpex_root`
    GpexRoot(gpex::GpexRoot),
    /// `PCIHost`
    PciHost(gpex::PciHost),
    /// `PCIBUS`
    PciBus(gpex::PciBus),
    /// `i8259`
    I8259(i8259::I8259),
    /// `i8254`
    I8254(i8254::I8254),
    /// `mc146818rtc`
    Mc146818Rtc(mc146818rtc::Mc146818Rtc),
    /// `serial`
    Serial(serial::IsaSerial),
    /// `virtio-rng` on virtio-mmio
    VirtioRng(virtio::VirtioRng),
    /// `virtio-blk` on virtio-mmio
    VirtioBlk(virtio::VirtioBlk),
    /// `virtio-net` on virtio-mmio
    VirtioNet(virtio::VirtioNet),
    /// `virtio-console` on virtio-mmio
    VirtioConsole(virtio::VirtioConsole),
    /// `globalstate`
    GlobalState(globalstate::GlobalState),
}

/// The VMSD's name in an `idstr`: what follows the path of a device on virtio-mmio, or that of the host bridge. Devices
/// on other buses have other layouts under the same names, so that their `idstr` names nothing here.
fn vmsd_name(idstr: &str) -> &str {
    match idstr.split_once('/') {
        Some((path, name)) if path.starts_with("virtio-mmio@") && name.starts_with("virtio-") => name,
        Some(("0000:00:00.0", name @ "gpex_root")) => name,
        None if !idstr.starts_with("virtio-") && idstr != "gpex_root" => idstr,
        _ => "",
    }
}
