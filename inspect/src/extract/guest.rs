//! What extraction needs of the device sections: the CPUs' registers, the CMOS, or all of them.

use super::devices::Devices;
use super::elf_core::{Registers, SegmentRegister};
use super::memory_devices::{MemoryDevices, Tables};
use super::physical::{MemoryBlock, PhysicalMemory};
use super::registers::{self, CpuNotes};
use super::vmcoreinfo::{self, Place};
use crate::output_file::OutputFile;
use crate::ram::{Copying, GuestRam, PageCopy};
use crate::stream::Observer;
use qevm_devices::{cpu, mc146818rtc};
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::vmdesc::{Node, ScalarKind, Value};
use qevm_savevm::vmstate::{Context, VmState, load};
use qevm_savevm::{Event, Reader};
use qevm_wire::QemuVersion;
use std::fmt;

/// EFER.LMA: IA-32e mode is active.
const EFER_LMA: u64 = 1 << 10;

/// What the device sections told.
#[derive(Debug, Default)]
pub struct Guest {
    /// The registers of each CPU of x86, in the order of their sections.
    pub cpus: Vec<Registers>,
    /// What a core tells of each CPU of another target, in the order of their sections.
    pub other_cpus: Vec<CpuNotes>,
    /// The RTC's CMOS, which has the memory size as the firmware sees it.
    pub cmos: Option<Vec<u8>>,
    /// Where memory devices are.
    pub memory_devices: MemoryDevices,
    /// Where the kernel tells of itself.
    pub(super) vmcoreinfo: Option<Place>,
    /// All device sections, if they are asked for.
    pub devices: Option<Devices>,
    /// Sections that were there but could not be read, with the reason.
    pub unread: Vec<String>,
    /// CPUs of other targets than x86 of which no core can tell, with the reason: the field that is not there, for
    /// example.
    pub other_unread: Vec<String>,
}

impl Guest {
    /// How many CPUs have registers.
    pub fn cpu_count(&self) -> usize {
        self.cpus.len() + self.other_cpus.len()
    }

    /// What CPUs have that is not in a core, in words; a line for each thing.
    pub fn left_out(&self) -> Vec<String> {
        let mut left_out: Vec<&str> = self.other_cpus.iter().filter_map(|cpu| cpu.left_out).collect();
        left_out.dedup();
        left_out.iter().map(|what| format!("not in the core: {what}")).collect()
    }
}

/// Collects a [`Guest`] while a stream is read.
pub struct GuestObserver<'p> {
    guest: Guest,
    /// What each section `cpu` gave: its instance, and the registers or why they could not be read.
    cpus: Vec<(u32, Result<Found, String>)>,
    position: &'p mut dyn FnMut(u64),
    machine: Option<String>,
    wanted: Option<Wanted<'p>>,
}

/// A file of guest-physical memory that is to be written, as far as it is known beforehand.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'p> {
    /// The file.
    pub output: &'p OutputFile,
    /// It is an ELF core; otherwise raw.
    pub core: bool,
    /// The machine type, if not that of the stream is meant.
    pub machine: Option<&'p str>,
    /// As [`PhysicalMemory::find`] has it.
    pub blocks: &'p [MemoryBlock],
}

#[derive(Debug)]
enum Found {
    X86(Box<Registers>),
    Other(CpuNotes),
    /// A CPU of another target, and why there are no notes of it.
    Unread(String),
}

impl fmt::Debug for GuestObserver<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestObserver").field("guest", &self.guest).field("cpus", &self.cpus).finish_non_exhaustive()
    }
}

impl<'p> GuestObserver<'p> {
    /// Nothing found yet; tells `position` how far the main channel was read. `devices`: where all device sections are
    /// to be kept.
    pub fn new(position: &'p mut dyn FnMut(u64), devices: Option<Devices>) -> Self {
        let guest = Guest { devices, ..Guest::default() };
        GuestObserver { guest, cpus: Vec::new(), position, machine: None, wanted: None }
    }

    /// Writes memory to this file as it comes, if it can be told where it will be: so it need not be read twice.
    /// [`PhysicalMemory::write_raw`] and [`PhysicalMemory::write_elf`] do the rest.
    pub fn copying(self, wanted: Wanted<'p>) -> Self {
        GuestObserver { wanted: Some(wanted), ..self }
    }

    /// What was found.
    pub fn finish(self) -> Guest {
        let mut guest = self.guest;
        for (_, cpu) in self.cpus {
            match cpu {
                Ok(Found::X86(registers)) => guest.cpus.push(*registers),
                Ok(Found::Other(notes)) => guest.other_cpus.push(notes),
                Ok(Found::Unread(unread)) => guest.other_unread.push(unread),
                Err(unread) => guest.unread.push(unread),
            }
        }
        guest
    }
}

impl Observer for GuestObserver<'_> {
    fn position(&mut self, offset: u64) {
        (self.position)(offset);
    }

    fn restarted(&mut self) {
        let mut devices = self.guest.devices.take();
        devices.iter_mut().for_each(Devices::restarted);
        self.guest = Guest { devices, ..Guest::default() };
        self.cpus.clear();
    }

    fn event(&mut self, event: &Event<'_>) {
        if let Event::Configuration(configuration) = event {
            self.machine = Some(configuration.machine.escape_ascii().to_string());
        }
    }

    fn copy(&mut self, ram: &GuestRam, cpus: Option<usize>) -> Option<Copying> {
        let Wanted { output, core, machine, blocks } = self.wanted?;
        let machine = machine.or(self.machine.as_deref()).unwrap_or_default();
        let physical = PhysicalMemory::find(machine, ram, &Guest::default(), &Tables::default(), blocks).ok()?;
        let destinations = match core {
            false => physical.in_raw(),
            // Of other targets it is not known what their notes will be.
            true if physical.is_other_target(machine, ram) => return None,
            true => {
                let cpu = Registers { long_mode: true, ..Registers::default() };
                let (format, notes) = Guest { cpus: vec![cpu; cpus?], ..Guest::default() }.notes();
                physical.in_core(format, &notes).1
            }
        };
        // If it cannot be copied now, it will be written later.
        PageCopy::new(output.file(), &output.path().display().to_string(), destinations).ok()?.map(Copying::Placed)
    }

    fn fields(&mut self, header: &SectionHeader, fields: &Node) {
        // qemu-system-i386 writes registers of 32 bits, and other targets other registers, which only the description
        // shows.
        if header.idstr == cpu::Cpu::NAME
            && let Some((number, (_, cpu))) =
                (1..).zip(&mut self.cpus).find(|(_, (instance, _))| *instance == header.instance_id)
        {
            let unread = |reason| format!("section 'cpu', instance {}: {reason}", header.instance_id);
            if let Some(registers) = narrow_registers(fields) {
                *cpu = Ok(Found::X86(Box::new(registers)));
            } else if let Some(notes) = registers::notes(fields, number) {
                *cpu = Ok(notes.map_or_else(|reason| Found::Unread(unread(reason)), Found::Other));
            }
        }
        self.guest.memory_devices.note(header, fields);
        if let Some(devices) = &mut self.guest.devices {
            devices.fields(fields);
        }
    }

    fn body(&mut self, header: &SectionHeader, offset: u64, body: &[u8]) {
        if let Some(devices) = &mut self.guest.devices {
            devices.body(header, offset, body);
        }
        if header.idstr == cpu::Cpu::NAME {
            let state = read::<cpu::Cpu>(header, offset, body);
            self.cpus.push((header.instance_id, state.map(|state| Found::X86(Box::new(wide_registers(&state))))));
        } else if header.idstr == mc146818rtc::Mc146818Rtc::NAME {
            match read::<mc146818rtc::Mc146818Rtc>(header, offset, body) {
                Ok(state) => self.guest.cmos = Some(state.cmos_data.0.to_vec()),
                Err(unread) => self.guest.unread.push(unread),
            }
        } else if header.idstr == vmcoreinfo::SECTION {
            match Place::of_section(body) {
                Ok(place) => self.guest.vmcoreinfo = place,
                Err(unread) => self.guest.unread.push(unread),
            }
        }
    }
}

fn read<T: VmState>(header: &SectionHeader, offset: u64, body: &[u8]) -> Result<T, String> {
    // The registers are laid out alike in all releases; the context only matters to later subsections.
    let context = Context::new(QemuVersion::NEWEST, "");
    load(&mut Reader::at(body, offset), header.version_id, &context)
        .map_err(|error| format!("section '{}': {error}", header.idstr))
}

/// The registers of a section `cpu` whose registers have 32 bits; `None` for others.
fn narrow_registers(cpu: &Node) -> Option<Registers> {
    let Value::Scalars(general) = &cpu.child("env.regs")?.value else { return None };
    if general.kind() != ScalarKind::U32 || general.len() != 8 {
        return None;
    }
    let word = |node: &Node, name: &str| Some(node.child(name)?.scalar()?.as_u64());
    let segment = |name: &str| {
        let node = cpu.child(name)?;
        let half = |name| Some(word(node, name)? as u32);
        Some(SegmentRegister {
            selector: half("selector")?,
            limit: half("limit")?,
            flags: half("flags")?,
            base: word(node, "base")?,
        })
    };
    let mut registers =
        Registers { rip: word(cpu, "env.eip")?, rflags: word(cpu, "env.eflags")?, ..Registers::default() };
    for (register, value) in registers.general.iter_mut().zip(general.iter()) {
        *register = value.as_u64();
    }
    for (index, register) in registers.segments.iter_mut().enumerate() {
        *register = segment(&format!("env.segs[{index}]"))?;
    }
    for (name, register) in ["env.ldt", "env.tr", "env.gdt", "env.idt"].iter().zip(&mut registers.tables) {
        *register = segment(name)?;
    }
    for index in [0, 2, 3, 4] {
        registers.control[index] = word(cpu, &format!("env.cr[{index}]"))?;
    }
    Some(registers)
}

fn wide_registers(cpu: &cpu::Cpu) -> Registers {
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
        long_mode: cpu.efer & EFER_LMA != 0,
    }
}
