//! What extraction needs of the device sections: the CPUs' registers, the CMOS, or all of them.

use super::devices::Devices;
use super::elf_core::{Registers, SegmentRegister};
use crate::progress::Progress;
use crate::stream::Observer;
use qevm_savevm::Reader;
use qevm_savevm::devices::{cpu, mc146818rtc};
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::vmdesc::Node;
use qevm_savevm::vmstate::{Context, VmState, load};
use qevm_wire::QemuVersion;

/// What the device sections told.
#[derive(Debug, Default)]
pub struct Guest {
    /// The registers of each CPU, in the order of their sections.
    pub cpus: Vec<Registers>,
    /// The RTC's CMOS, which has the memory size as the firmware sees it.
    pub cmos: Option<Vec<u8>>,
    /// All device sections, if they are asked for.
    pub devices: Option<Devices>,
    /// Sections that were there but could not be read, with the reason.
    pub unread: Vec<String>,
}

/// Collects a [`Guest`] while a stream is read.
#[derive(Debug)]
pub struct GuestObserver {
    /// What was found so far.
    pub guest: Guest,
    bar: Progress,
}

impl GuestObserver {
    /// Nothing found yet; `bar` shows how far the stream was read. `devices`: where all device sections are to be kept.
    pub fn new(bar: Progress, devices: Option<Devices>) -> Self {
        let guest = Guest { devices, ..Guest::default() };
        GuestObserver { guest, bar }
    }
}

impl Observer for GuestObserver {
    fn position(&mut self, offset: u64) {
        self.bar.at(offset);
    }

    fn restarted(&mut self) {
        let mut devices = self.guest.devices.take();
        devices.iter_mut().for_each(Devices::restarted);
        self.guest = Guest { devices, ..Guest::default() };
    }

    fn fields(&mut self, _header: &SectionHeader, fields: &Node) {
        if let Some(devices) = &mut self.guest.devices {
            devices.fields(fields);
        }
    }

    fn body(&mut self, header: &SectionHeader, offset: u64, body: &[u8]) {
        if let Some(devices) = &mut self.guest.devices {
            devices.body(header, offset, body);
        }
        if header.idstr == cpu::Cpu::NAME {
            self.read(header, offset, body, |guest, state: cpu::Cpu| guest.cpus.push(registers(&state)));
        } else if header.idstr == mc146818rtc::Mc146818Rtc::NAME {
            self.read(header, offset, body, |guest, state: mc146818rtc::Mc146818Rtc| {
                guest.cmos = Some(state.cmos_data.0.to_vec());
            });
        }
    }
}

impl GuestObserver {
    fn read<T: VmState>(&mut self, header: &SectionHeader, offset: u64, body: &[u8], keep: impl FnOnce(&mut Guest, T)) {
        // The registers are laid out alike in all releases; the context only matters to later subsections.
        let context = Context::new(QemuVersion::NEWEST, "");
        match load(&mut Reader::at(body, offset), header.version_id, &context) {
            Ok(state) => keep(&mut self.guest, state),
            Err(error) => self.guest.unread.push(format!("section '{}': {error}", header.idstr)),
        }
    }
}

fn registers(cpu: &cpu::Cpu) -> Registers {
    let segment = |s: &cpu::registers::Segment| SegmentRegister {
        selector: s.selector,
        limit: s.limit,
        flags: s.flags,
        base: s.base,
    };
    Registers {
        general: cpu.regs,
        rip: cpu.eip,
        rflags: cpu.eflags,
        segments: std::array::from_fn(|i| segment(&cpu.segs[i])),
        tables: [segment(&cpu.ldt), segment(&cpu.tr), segment(&cpu.gdt), segment(&cpu.idt)],
        control: [cpu.cr0, 0, cpu.cr2, cpu.cr3, cpu.cr4],
        kernel_gs_base: cpu.kernelgsbase,
    }
}
