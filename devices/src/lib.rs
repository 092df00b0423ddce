//! The device sections of `-M microvm`, with and without `accel=kvm`, as declared types.
//!
//! The types hold what the wire holds, under QEMU's names, and nothing else: a monitor converts its own state to and
//! from them in one place. [`vmstate::save`](qevm_savevm::vmstate::save) and
//! [`vmstate::load`](qevm_savevm::vmstate::load) do what QEMU's source and destination do;
//! [`vmstate::encode`](qevm_savevm::vmstate::encode) and [`vmstate::decode`](qevm_savevm::vmstate::decode) are the bare
//! codec.
//!
//! | section (`idstr`) | instance | type | source |
//! |---|---|---|---|
//! | `apic` | initial APIC id | [`apic::Apic`] | one per vCPU |
//! | `timer` | 0 | [`timer::CpuTimers`] | always |
//! | `fw_cfg` | 0 | [`fw_cfg::FwCfg`] | always |
//! | `cpu_common` | cpu_index | [`cpu_common::CpuCommon`] | one per vCPU |
//! | `cpu` | cpu_index | [`cpu::Cpu`] | one per vCPU |
//! | `kvm-tpr-opt` | 0 | [`kvm_tpr_opt::KvmTprOpt`] | guests with the vapic device |
//! | `kvmclock` | 0 | [`kvmclock::KvmClock`] | `accel=kvm` |
//! | `ioapic` | 0, 1 | [`ioapic::IoApic`] | `ioapic2=off` and 5.2 have only one |
//! | `acpi-ged` | 0 | [`acpi_ged::AcpiGed`] | `acpi=on` |
//! | `0000:00:00.0/gpex_root` | 0 | [`gpex::GpexRoot`] | `pcie=on` |
//! | `PCIHost` | 0 | [`gpex::PciHost`] | `pcie=on` |
//! | `PCIBUS` | 0 | [`gpex::PciBus`] | `pcie=on` |
//! | `i8259` | 0, 1 | [`i8259::I8259`] | `pic=on` |
//! | `i8254` | 0 | [`i8254::I8254`] | `pit=on` |
//! | `mc146818rtc` | 0 | [`mc146818rtc::Mc146818Rtc`] | `rtc=on`, by default not under KVM |
//! | `serial` | 0 | [`serial::IsaSerial`] | `isa-serial=on` |
//! | `virtio-mmio@<address>/virtio-…` | 0 | [`virtio`] | `-device virtio-{blk,net,rng,serial}-device` |
//! | `globalstate` | 0 | [`globalstate::GlobalState`] | always, last |
//!
//! [`pci`] has what all PCI devices share and what a VFIO device's section contains.
//!
//! Layouts were compared with the descriptions and bytes of real streams of QEMU 5.2, 7.2, 10.0 and 11.1, and the names
//! and versions of what those streams do not carry with the tables in the same releases' binaries.
//!
//! # Example: a section, and what a newer release may send
//!
//! ```
//! use qevm_devices::{DeviceState, cpu::Cpu, descriptions};
//! use qevm_savevm::vmstate::compare::{Severity, Source, compare};
//! use qevm_savevm::vmstate::{Context, VmState};
//!
//! let old = Context::new("10.0".parse()?, "microvm");
//! let new = Context::new("11.1".parse()?, "microvm");
//!
//! let payload = [0, 0, 0, 1, 0, 0, 0, 0];
//! let state = DeviceState::decode("cpu_common", 1, &payload, &old).expect("a declared section")?;
//! assert!(matches!(&state, DeviceState::CpuCommon(cpu) if cpu.halted == 1));
//! assert_eq!(state.encode(1, &new)?, payload);
//!
//! // 11.1 may send four subsections of `cpu` that 10.0 does not know.
//! let findings = compare(&Cpu::description(&new), Source::Schema, &descriptions(&old));
//! assert_eq!(findings.len(), 4);
//! assert!(findings.iter().all(|finding| finding.severity == Severity::Suspicious));
//! assert!(compare(&Cpu::description(&old), Source::Schema, &descriptions(&new)).is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

pub mod acpi_ged;
pub mod apic;
pub mod cpu;
pub mod cpu_common;
pub mod fw_cfg;
pub mod globalstate;
pub mod gpex;
pub mod i8254;
pub mod i8259;
pub mod ioapic;
pub mod kvm_tpr_opt;
pub mod kvmclock;
pub mod mc146818rtc;
pub mod pci;
pub mod serial;
mod state;
#[cfg(test)]
mod tests;
pub mod timer;
pub mod virtio;

pub use state::{DeviceState, descriptions};
