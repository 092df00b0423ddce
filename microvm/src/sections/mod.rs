//! Between a machine's saved state and the device sections of QEMU's `microvm`.
//!
//! [`save`] gives the sections that a QEMU of the profile's release would send for this machine, in its order; [`load`]
//! takes what any release sends. What a section does not carry keeps the value of the machine that loads.

mod apic;
mod chips;
mod cpu;
mod fpu;
mod kind;
mod msr;
mod pci;
mod vfio;
mod virtio;

pub use vfio::idstr as vfio_idstr;

use crate::MACHINE_TYPE;
use crate::state::{MachineState, PciFunctionState};
use crate::virtio::{VirtioDevice, is_section_of};
use kind::SectionKind;
use qevm_devices::DeviceState;
use qevm_devices::globalstate::GlobalState;
use qevm_migration::{DeviceSection, SavedDevices};
use qevm_savevm::Reader;
use qevm_savevm::vmstate::{Accel, Context};
use qevm_wire::{CountedString, Profile, QemuVersion};

/// Why sections cannot be made or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SectionError {
    /// A section's content is not what its device sends.
    #[error("section '{idstr}' {instance_id}: {source}")]
    Content {
        /// The section.
        idstr: CountedString,
        /// Its instance.
        instance_id: u32,
        /// What is wrong, and at which byte of the content.
        source: qevm_savevm::Error,
    },
    /// The section says something that this machine cannot be brought to.
    #[error("section '{idstr}' {instance_id}: {reason}")]
    Refused {
        /// The section.
        idstr: CountedString,
        /// Its instance.
        instance_id: u32,
        /// Why not.
        reason: String,
    },
    /// A section that every source sends is missing.
    #[error("section '{idstr}' {instance_id} did not arrive: {}", usual_cause(idstr))]
    Missing {
        /// The section.
        idstr: String,
        /// Its instance.
        instance_id: u32,
    },
    /// The state cannot be expressed in a section.
    #[error("cannot make section '{idstr}': {reason}")]
    Unsendable {
        /// The section.
        idstr: String,
        /// Why not.
        reason: String,
    },
}

/// Why a section may be missing.
fn usual_cause(idstr: &str) -> &'static str {
    match SectionKind::of(idstr) {
        Some(SectionKind::Cpu | SectionKind::CpuCommon | SectionKind::Apic) => {
            "does the source have as many vCPUs as this machine?"
        }
        Some(SectionKind::GpexRoot | SectionKind::PciHost | SectionKind::PciBus) => {
            "start the source with -M microvm,pcie=on, or this machine without a PCI bus (--machine microvm,pcie=off)"
        }
        Some(SectionKind::I8254 | SectionKind::I8259 | SectionKind::AcpiGed) => {
            "start the source without pit=off, pic=off and acpi=off"
        }
        _ => "start the source with this machine's devices",
    }
}

/// Why a section may have come that this machine has no device for, and what to do.
pub fn advice(idstr: &CountedString) -> &'static str {
    let idstr = idstr.as_str().unwrap_or_default();
    let pci_address = |name: &str| name.len() == 12 && name.as_bytes()[4] == b':' && name.as_bytes()[7] == b':';
    if let Some(SectionKind::GpexRoot | SectionKind::PciHost | SectionKind::PciBus) = SectionKind::of(idstr) {
        return "the source has a PCI bus; start this machine with one (--machine microvm,pcie=on) or the source without (-M microvm,pcie=off)";
    }
    match idstr.split_once('/').map_or(idstr, |(path, _)| path) {
        "apic" | "cpu" | "cpu_common" => "the source has more vCPUs; start this machine with as many (--smp)",
        "mc146818rtc" => {
            "the source has an RTC (its default under TCG); start it with -M microvm,rtc=off or this machine with one"
        }
        "ioapic" => "the source has more IOAPICs; start it with -M microvm,ioapic2=off",
        "slirp" => "the source has a user network, whose connections cannot move; give it another -netdev",
        "dirty-bitmap" => "turn capability 'dirty-bitmaps' off at the source",
        "block" => "turn capability 'block' off at the source",
        path if path.starts_with("virtio-mmio@") => {
            "the source has a virtio device there; start this machine with the source's virtio devices, in the same order (-device)"
        }
        path if pci_address(path) => "the source has a PCI device that this machine does not have; start it without",
        _ => qevm_migration::ADVICE,
    }
}

/// Why a section of a device that this machine does not have is refused.
const NO_DEVICE: &str = "this machine has no such device";

/// The run states of QEMU that a source in good health reports.
const RUNNING: &str = "running";
const PAUSED: &str = "paused";

/// The sections for `state`, as the release of `profile` sends them.
///
/// # Errors
/// [`SectionError::Unsendable`].
pub fn save(state: &MachineState, profile: &Profile, running: bool) -> Result<SavedDevices, SectionError> {
    let accel = if profile.kvmclock { Accel::Kvm } else { Accel::Tcg };
    let ctx = Context::from_profile(profile.clone()).with_accel(accel);
    let mut devices: Vec<(&str, u32, DeviceState)> = Vec::new();
    let apics = || {
        (0..)
            .zip(&state.vcpus)
            .map(|(i, vcpu)| (SectionKind::Apic.idstr(), i, apic::save(vcpu, state.virtual_clock, accel)))
    };
    if profile.apic_first {
        devices.extend(apics());
    }
    devices.push((SectionKind::Timer.idstr(), 0, chips::timer(state, accel)));
    devices.push((SectionKind::FwCfg.idstr(), 0, chips::fw_cfg(state)));
    let mut later_apics = if profile.apic_first { Vec::new() } else { apics().collect() }.into_iter();
    for (i, vcpu) in (0..).zip(&state.vcpus) {
        devices.push((SectionKind::CpuCommon.idstr(), i, cpu::common(vcpu, accel)));
        devices.push((SectionKind::Cpu.idstr(), i, DeviceState::Cpu(cpu::save(vcpu, state, i))));
        if i == 0 {
            devices.push((SectionKind::KvmTprOpt.idstr(), 0, chips::kvm_tpr_opt(state)));
        }
        devices.extend(later_apics.next());
    }
    devices.push((SectionKind::IoApic.idstr(), 0, chips::ioapic(&state.ioapic)));
    if profile.microvm_second_ioapic {
        devices.push((SectionKind::IoApic.idstr(), 1, chips::ioapic(&state.ioapic2)));
    }
    if profile.kvmclock {
        devices.push((SectionKind::KvmClock.idstr(), 0, chips::kvmclock(state)));
    }
    devices.push((SectionKind::AcpiGed.idstr(), 0, chips::ged(state)));
    if let Some(bus) = &state.pci {
        devices.extend(pci::save(bus).map(|(kind, device)| (kind.idstr(), 0, device)));
    }
    for i in 0..state.pics.len() as u32 {
        devices.push((SectionKind::I8259.idstr(), i, chips::pic(state, i)));
    }
    devices.push((SectionKind::I8254.idstr(), 0, chips::pit(state)));
    if let Some(rtc) = &state.rtc {
        devices.push((SectionKind::Mc146818Rtc.idstr(), 0, chips::rtc(rtc, state)));
    }
    devices.push((SectionKind::Serial.idstr(), 0, chips::serial(&state.serial)));
    let places: Vec<String> = state.virtio.iter().enumerate().map(|(i, device)| device.idstr(i)).collect();
    let models = state.virtio_states.iter().map(Option::as_ref).chain(std::iter::repeat(None));
    for ((idstr, device), model) in places.iter().zip(&state.virtio).zip(models) {
        let kept = state.opaque.find(idstr, 0);
        if let Some(model) = model {
            let section = virtio::save(*device, model, kept, profile.qemu)
                .map_err(|reason| SectionError::Unsendable { idstr: idstr.clone(), reason })?;
            devices.push((idstr, 0, section));
            continue;
        }
        let kept = kept.ok_or_else(|| SectionError::Unsendable {
            idstr: idstr.clone(),
            reason: "the device has no model here, and no guest has brought its state".into(),
        })?;
        devices.push((idstr, 0, kept.clone()));
    }
    let runstate =
        GlobalState::new(if running { RUNNING } else { PAUSED }, &ctx).ok_or_else(|| SectionError::Unsendable {
            idstr: SectionKind::GlobalState.idstr().into(),
            reason: "its run state's name".into(),
        })?;
    devices.push((SectionKind::GlobalState.idstr(), 0, DeviceState::GlobalState(runstate)));
    if accel == Accel::Tcg && state.opaque.is_current() && state.opaque.find(SectionKind::KvmClock.idstr(), 0).is_none()
    {
        restore_verbatim(&mut devices, state);
    }
    let mut configurations = Vec::new();
    for function in state.pci.iter().flat_map(|bus| &bus.functions) {
        let idstr = vfio::idstr(function.slot);
        let body =
            vfio::save(function, &ctx).map_err(|reason| SectionError::Unsendable { idstr: idstr.clone(), reason })?;
        configurations.push((idstr, body));
    }
    write(devices, configurations, &ctx)
}

/// A guest of TCG's that has not run here goes back to TCG with what KVM cannot hold: requests that only TCG has, a TSC
/// that KVM counts on, reserved bits that it clears. What its run state was is decided here, though.
fn restore_verbatim(devices: &mut [(&str, u32, DeviceState)], state: &MachineState) {
    for (idstr, instance_id, device) in
        devices.iter_mut().filter(|(idstr, ..)| *idstr != SectionKind::GlobalState.idstr())
    {
        if let Some(kept) = state.opaque.find(idstr, *instance_id) {
            *device = kept.clone();
        }
    }
}

/// Encodes the devices and describes them. Configurations of VFIO devices come after all others but the run state.
fn write(
    devices: Vec<(&str, u32, DeviceState)>,
    configurations: Vec<(String, Vec<u8>)>,
    ctx: &Context,
) -> Result<SavedDevices, SectionError> {
    let mut described = Vec::new();
    let mut configurations = configurations.into_iter();
    for (idstr, instance_id, mut device) in devices {
        for (idstr, body) in
            configurations.by_ref().take(if idstr == SectionKind::GlobalState.idstr() { usize::MAX } else { 0 })
        {
            let named = CountedString::new(idstr.as_str())
                .ok_or_else(|| SectionError::Unsendable { idstr, reason: "its name".into() })?;
            let section = DeviceSection { idstr: named, instance_id: 0, version_id: vfio::VERSION, body };
            described.push((section, None));
        }
        let unsendable = |reason: String| SectionError::Unsendable { idstr: idstr.into(), reason };
        device.prepare(ctx).map_err(|error| unsendable(error.to_string()))?;
        let version_id = device.version(ctx);
        let (body, object) = device.encode_described(version_id, ctx).map_err(|error| unsendable(error.to_string()))?;
        let idstr = CountedString::new(idstr).ok_or_else(|| unsendable("its name".into()))?;
        described.push((DeviceSection { idstr, instance_id, version_id, body }, Some(object)));
    }
    Ok(SavedDevices::described(MACHINE_TYPE, &ctx.profile, described))
}

/// A loader takes what every release sends; the newest knows most.
pub fn newest() -> Profile {
    Profile::new(QemuVersion::NEWEST, MACHINE_TYPE)
}

/// Saves and loads `state` without effect, so that the next time, when a guest is paused, is not the first: then the
/// processor has been asked what it has, and code and heap are in memory.
///
/// # Errors
/// As [`save`] and [`load`].
pub fn rehearse(state: &MachineState) -> Result<(), SectionError> {
    let saved = save(state, &newest(), false)?;
    load(saved.sections(), &newest(), &mut state.clone()).map(drop)
}

/// Whether a machine of `cpus` vCPUs, with or without real-time clock, with a PCI bus with devices of these numbers,
/// with these virtio devices, has the section.
pub fn has_device(
    idstr: &CountedString,
    instance_id: u32,
    cpus: usize,
    rtc: bool,
    pci: Option<&[usize]>,
    virtio: &[VirtioDevice],
) -> bool {
    let name = idstr.as_str().unwrap_or_default();
    let instances = match SectionKind::of(name) {
        Some(SectionKind::Apic | SectionKind::Cpu | SectionKind::CpuCommon) => cpus as u32,
        Some(SectionKind::IoApic | SectionKind::I8259) => 2,
        Some(SectionKind::Mc146818Rtc) => u32::from(rtc),
        Some(SectionKind::GpexRoot | SectionKind::PciHost | SectionKind::PciBus) => u32::from(pci.is_some()),
        Some(
            SectionKind::AcpiGed
            | SectionKind::FwCfg
            | SectionKind::GlobalState
            | SectionKind::I8254
            | SectionKind::KvmClock
            | SectionKind::KvmTprOpt
            | SectionKind::Serial
            | SectionKind::Timer,
        ) => 1,
        None if pci.into_iter().flatten().any(|number| vfio::idstr(*number) == name) => 1,
        None => u32::from(is_section_of(virtio, idstr)),
    };
    instance_id < instances
}

/// Brings `state`, that of the machine that loads, to what the sections say. True if the guest ran at the source.
///
/// # Errors
/// [`SectionError`]; `state` is then partly loaded and not to be used.
pub fn load(sections: &[DeviceSection], profile: &Profile, state: &mut MachineState) -> Result<bool, SectionError> {
    let ctx = Context::from_profile(profile.clone()).with_accel(Accel::Kvm);
    let mut running = true;
    state.opaque.clear();
    // The virtual clock first: other devices' times count from it.
    let timers_first = |section: &&DeviceSection| section.idstr != *SectionKind::Timer.idstr();
    let mut ordered: Vec<_> = sections.iter().collect();
    ordered.sort_by_key(timers_first);
    for section in ordered {
        let DeviceSection { idstr, instance_id, version_id, body } = section;
        let content = |source| SectionError::Content { idstr: idstr.clone(), instance_id: *instance_id, source };
        let refused =
            |reason: String| SectionError::Refused { idstr: idstr.clone(), instance_id: *instance_id, reason };
        if let Some(function) = function_of(idstr, state) {
            *function = vfio::load(body, *version_id, function, &ctx).map_err(content)?;
            continue;
        }
        let mut reader = Reader::new(body);
        let loaded = DeviceState::load(idstr.as_str().unwrap_or_default(), *version_id, &mut reader, &ctx)
            .ok_or_else(|| refused(NO_DEVICE.into()))?
            .map_err(content)?;
        reader.expect_end("the section's content").map_err(content)?;
        let index = *instance_id as usize;
        let vcpu = state.vcpus.get_mut(index);
        match (&loaded, vcpu) {
            (DeviceState::Cpu(from), Some(into)) => cpu::load(from, into).map_err(refused)?,
            (DeviceState::CpuCommon(_), Some(_)) => {}
            (DeviceState::Apic(from), Some(into)) => apic::load(from, into, state.virtual_clock),
            (DeviceState::IoApic(from), _) if index == 0 => chips::load_ioapic(from, &mut state.ioapic),
            (DeviceState::IoApic(from), _) => chips::load_ioapic(from, &mut state.ioapic2),
            (DeviceState::I8259(from), _) if index < 2 => chips::load_pic(from, &mut state.pics[index]),
            (DeviceState::I8254(from), _) => chips::load_pit(from, &mut state.pit).map_err(refused)?,
            (DeviceState::Timer(from), _) => state.virtual_clock = from.cpu_clock_offset,
            (DeviceState::FwCfg(from), _) => chips::load_fw_cfg(from, &mut state.fw_cfg),
            (DeviceState::KvmClock(from), _) => chips::load_kvmclock(from, &mut state.clock),
            (DeviceState::AcpiGed(from), _) => state.ged.sel = from.ged_state.sel,
            (DeviceState::GpexRoot(from), _) => {
                pci::load_bridge(from, state.pci.as_mut().ok_or_else(|| refused(NO_DEVICE.into()))?)
            }
            (DeviceState::PciHost(from), _) => {
                state.pci.as_mut().ok_or_else(|| refused(NO_DEVICE.into()))?.config_reg = from.config_reg;
            }
            (DeviceState::PciBus(from), _) => {
                state.pci.as_mut().ok_or_else(|| refused(NO_DEVICE.into()))?.counts = from.irq_count;
            }
            (DeviceState::Serial(from), _) => chips::load_serial(&from.state, &mut state.serial),
            (DeviceState::Mc146818Rtc(from), _) => state.rtc = Some(chips::load_rtc(from)),
            (DeviceState::KvmTprOpt(from), _) => chips::expect_inactive(from).map_err(refused)?,
            (DeviceState::GlobalState(from), _) => running = from.name() == Some(RUNNING),
            (
                DeviceState::VirtioBlk(_)
                | DeviceState::VirtioNet(_)
                | DeviceState::VirtioRng(_)
                | DeviceState::VirtioConsole(_),
                _,
            ) if is_section_of(&state.virtio, idstr) => {
                let position = (0..state.virtio.len()).find(|at| *idstr == *state.virtio[*at].idstr(*at).as_str());
                let model = position.and_then(|at| state.virtio_states.get_mut(at)).and_then(Option::as_mut);
                if let Some(model) = model {
                    *model = virtio::load(&loaded).map_err(refused)?;
                }
            }
            _ => return Err(refused(NO_DEVICE.into())),
        }
        state.opaque.keep(idstr.as_str().unwrap_or_default(), *instance_id, loaded);
    }
    if state.opaque.find(SectionKind::KvmClock.idstr(), 0).is_none() {
        from_tcg(state);
    }
    match missing(sections, state) {
        Some((idstr, instance_id)) => Err(SectionError::Missing { idstr, instance_id }),
        None => Ok(running),
    }
}

/// What the machine has of the function that a section configures.
fn function_of<'s>(idstr: &CountedString, state: &'s mut MachineState) -> Option<&'s mut PciFunctionState> {
    let number = vfio::device_of(idstr.as_str()?).filter(|number| *idstr == *vfio::idstr(*number).as_str())?;
    state.pci.as_mut()?.functions.iter_mut().find(|function| function.slot == number)
}

/// The first device of this machine without a section, of those that every source has: not the serial port, which a
/// QEMU may lack, the second IOAPIC (since 7.2), the paravirtual clock and the TPR optimisation, which are KVM's, and
/// the real-time clock.
fn missing(sections: &[DeviceSection], state: &MachineState) -> Option<(String, u32)> {
    let vcpus = state.vcpus.len() as u32;
    let counts = [
        (SectionKind::Cpu, vcpus),
        (SectionKind::CpuCommon, vcpus),
        (SectionKind::Apic, vcpus),
        (SectionKind::Timer, 1),
        (SectionKind::FwCfg, 1),
        (SectionKind::IoApic, 1),
        (SectionKind::AcpiGed, 1),
        (SectionKind::GpexRoot, state.pci.is_some().into()),
        (SectionKind::PciHost, state.pci.is_some().into()),
        (SectionKind::PciBus, state.pci.is_some().into()),
        (SectionKind::I8259, state.pics.len() as u32),
        (SectionKind::I8254, 1),
        (SectionKind::GlobalState, 1),
    ];
    let chips = counts.into_iter().flat_map(|(kind, count)| (0..count).map(move |i| (kind.idstr().to_owned(), i)));
    let virtio = state.virtio.iter().enumerate().map(|(i, device)| (device.idstr(i), 0));
    let functions = state.pci.iter().flat_map(|bus| &bus.functions);
    let vfio = functions.map(|function| (vfio::idstr(function.slot), 0));
    chips.chain(virtio).chain(vfio).find(|(idstr, instance_id)| {
        !sections.iter().any(|section| section.idstr == *idstr.as_str() && section.instance_id == *instance_id)
    })
}

/// A source under TCG has the TSC and sleeping vCPUs in other places: it counts ticks in `timer`, and knows by flags
/// that a vCPU is halted or waits for its start.
fn from_tcg(state: &mut MachineState) {
    let MachineState { vcpus, opaque, .. } = state;
    let ticks = match opaque.find(SectionKind::Timer.idstr(), 0) {
        Some(DeviceState::Timer(timer)) => timer.cpu_ticks_offset as u64,
        _ => 0,
    };
    for (instance_id, vcpu) in (0..).zip(vcpus) {
        msr::set_tsc(&mut vcpu.msrs, ticks);
        let halted = match opaque.find(SectionKind::CpuCommon.idstr(), instance_id) {
            Some(DeviceState::CpuCommon(common)) => common.halted != 0,
            _ => false,
        };
        let waits = match opaque.find(SectionKind::Apic.idstr(), instance_id) {
            Some(DeviceState::Apic(apic)) => apic.sipi.as_ref().is_some_and(|sipi| sipi.wait_for_sipi != 0),
            _ => false,
        };
        if waits {
            vcpu.mp_state = cpu::MP_STATE_UNINITIALIZED;
        } else if halted {
            vcpu.mp_state = cpu::MP_STATE_HALTED;
        }
    }
}
