//! The header of an ELF core file of guest-physical memory, as `gdb`, `crash` and `readelf` open it.
//!
//! The shape is that of QMP `dump-guest-memory` without paging (checked against QEMU 10.0): one `PT_NOTE` with a
//! `CORE`/`NT_PRSTATUS` and a `QEMU` note for each CPU, then one `PT_LOAD` for each stretch of memory, its virtual
//! address equal to its physical one. `crash` takes control registers and the kernel's relocation from the `QEMU`
//! notes.
//!
//! A guest whose first CPU is not in long mode is an i386 one: the machine of the file and the `NT_PRSTATUS` notes are
//! i386's, in a 64-bit ELF file all the same, as its memory reaches up to 4 GiB (checked against QEMU 7.2 and 11.1, of
//! both programs).
//!
//! Guests of other targets have the machine, the byte order, the word size and the notes that the kernel gives a core
//! of their processors, and no `QEMU` note (checked against QEMU 7.2 to 11.1).

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromZeros, Immutable, IntoBytes};

/// One stretch of memory in the core file. Guest-physical address and length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Guest-physical address of the first byte.
    pub address: u64,
    /// Length of the stretch.
    pub len: u64,
}

/// A segment register or descriptor table register, as section `cpu` carries it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SegmentRegister {
    /// Selector (0 for GDT and IDT).
    pub selector: u32,
    /// Limit in bytes.
    pub limit: u32,
    /// Descriptor bits 8 to 23, in QEMU's layout.
    pub flags: u32,
    /// Linear base address.
    pub base: u64,
}

/// The registers of one CPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Registers {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8 to R15: the order of the instruction set, and of section `cpu`.
    pub general: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// ES CS SS DS FS GS: the order of the instruction set, and of section `cpu`.
    pub segments: [SegmentRegister; 6],
    /// LDTR, TR, GDTR, IDTR.
    pub tables: [SegmentRegister; 4],
    /// CR0 to CR4; CR1 does not exist and is 0.
    pub control: [u64; 5],
    /// MSR_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA-32e mode is active (EFER.LMA).
    pub long_mode: bool,
}

/// The bytes in front of the memory, and where in the file each stretch goes.
#[derive(Debug, PartialEq, Eq)]
pub struct CoreHeader {
    /// ELF header, program headers and notes.
    pub bytes: Vec<u8>,
    /// File offset of each `Load`, in the order given; multiples of 4096, so that zero pages can stay holes.
    pub offsets: Vec<u64>,
}

/// What kind of ELF file a core is: the guest's target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// `e_machine`.
    pub machine: u16,
    /// Numbers are big-endian.
    pub big_endian: bool,
    /// A file of 32 bits (`ELFCLASS32`).
    pub narrow: bool,
}

/// A note of a core: what is known of a CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Who defines the kind: `CORE`, `LINUX` or `QEMU`.
    pub owner: &'static str,
    /// `n_type`.
    pub kind: u32,
    /// The descriptor.
    pub content: Vec<u8>,
}

/// Numbers as a file has them.
impl Format {
    const X86_64: Format = Format { machine: EM_X86_64, big_endian: false, narrow: false };

    pub(super) fn half(self, out: &mut Vec<u8>, half: u16) {
        out.extend(if self.big_endian { half.to_be_bytes() } else { half.to_le_bytes() });
    }

    pub(super) fn word(self, out: &mut Vec<u8>, word: u32) {
        out.extend(if self.big_endian { word.to_be_bytes() } else { word.to_le_bytes() });
    }

    pub(super) fn long(self, out: &mut Vec<u8>, long: u64) {
        out.extend(if self.big_endian { long.to_be_bytes() } else { long.to_le_bytes() });
    }

    /// An address, an offset or a size, or a general register.
    pub(super) fn address(self, out: &mut Vec<u8>, address: u64) {
        match self.narrow {
            true => self.word(out, address as u32),
            false => self.long(out, address),
        }
    }

    pub(super) fn words(self, out: &mut Vec<u8>, words: impl IntoIterator<Item = u32>) {
        words.into_iter().for_each(|word| self.word(out, word));
    }

    pub(super) fn longs(self, out: &mut Vec<u8>, longs: impl IntoIterator<Item = u64>) {
        longs.into_iter().for_each(|long| self.long(out, long));
    }

    pub(super) fn addresses(self, out: &mut Vec<u8>, addresses: impl IntoIterator<Item = u64>) {
        addresses.into_iter().for_each(|address| self.address(out, address));
    }

    fn header_len(self) -> usize {
        if self.narrow { 52 } else { 64 }
    }

    fn program_header_len(self) -> usize {
        if self.narrow { 32 } else { 56 }
    }
}

const ET_CORE: u16 = 4;
pub(super) const EM_386: u16 = 3;
pub(super) const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NT_PRSTATUS: u32 = 1;
const QEMU_NOTE_VERSION: u32 = 1;
const PAGE: u64 = 4096;

/// Lays out a core file with these CPUs and these stretches of memory.
///
/// ```
/// use qevm_inspect::extract::elf_core::{core_header, Load, Registers};
///
/// let core = core_header(&[Registers::default()], &[Load { address: 0, len: 8192 }]);
/// assert_eq!(&core.bytes[..4], b"\x7fELF");
/// assert_eq!(core.offsets[0] % 4096, 0);
/// ```
pub fn core_header(cpus: &[Registers], loads: &[Load]) -> CoreHeader {
    let (format, notes) = x86_notes(cpus);
    core_header_of(format, &notes, loads)
}

/// The kind of file for a guest of x86 with these CPUs, and their notes.
pub(super) fn x86_notes(cpus: &[Registers]) -> (Format, Vec<Note>) {
    let long = cpus.first().is_none_or(|cpu| cpu.long_mode);
    let statuses = (1..).zip(cpus).map(|(number, cpu)| {
        let content = if long { prstatus(number, cpu) } else { narrow_prstatus(number, cpu) };
        Note { owner: "CORE", kind: NT_PRSTATUS, content }
    });
    let states = cpus.iter().map(|cpu| Note { owner: "QEMU", kind: 0, content: qemu_state(cpu) });
    let machine = if long { EM_X86_64 } else { EM_386 };
    (Format { machine, ..Format::X86_64 }, statuses.chain(states).collect())
}

/// Lays out a core file of any target with these notes and these stretches of memory. A narrow one has the low 32 bits
/// of addresses and lengths.
pub fn core_header_of(format: Format, notes: &[Note], loads: &[Load]) -> CoreHeader {
    let written = note_bytes(format, notes);
    let program_headers = 1 + loads.len();
    let notes_offset = (format.header_len() + format.program_header_len() * program_headers) as u64;
    let mut bytes = elf_header(format, program_headers);
    program_header(format, &mut bytes, PT_NOTE, notes_offset, 0, written.len() as u64);
    let mut offset = (notes_offset + written.len() as u64).next_multiple_of(PAGE);
    let mut offsets = Vec::with_capacity(loads.len());
    for load in loads {
        program_header(format, &mut bytes, PT_LOAD, offset, load.address, load.len);
        offsets.push(offset);
        offset = (offset + load.len).next_multiple_of(PAGE);
    }
    bytes.extend_from_slice(&written);
    CoreHeader { bytes, offsets }
}

/// Notes one after the other, as a file has them.
pub(super) fn note_bytes(format: Format, notes: &[Note]) -> Vec<u8> {
    let mut written = Vec::new();
    notes.iter().for_each(|note| write_note(format, &mut written, note));
    written
}

fn elf_header(format: Format, program_headers: usize) -> Vec<u8> {
    let (class, order) = (if format.narrow { 1 } else { 2 }, if format.big_endian { 2 } else { 1 });
    let mut bytes = vec![0x7f, b'E', b'L', b'F', class, order, 1];
    bytes.resize(16, 0);
    format.half(&mut bytes, ET_CORE);
    format.half(&mut bytes, format.machine);
    format.word(&mut bytes, 1);
    format.address(&mut bytes, 0); // entry
    format.address(&mut bytes, format.header_len() as u64);
    format.address(&mut bytes, 0); // no section headers
    format.word(&mut bytes, 0);
    // Guest memory has at most a few stretches, far from the 65,535 this field can count.
    for half in [format.header_len(), format.program_header_len(), program_headers, 0, 0, 0] {
        format.half(&mut bytes, half as u16);
    }
    bytes
}

fn program_header(format: Format, bytes: &mut Vec<u8>, kind: u32, offset: u64, address: u64, len: u64) {
    format.word(bytes, kind);
    if !format.narrow {
        format.word(bytes, 0); // flags
    }
    format.addresses(bytes, [offset, address, address, len, len]);
    if format.narrow {
        format.word(bytes, 0);
    }
    format.address(bytes, 0); // alignment
}

fn write_note(format: Format, notes: &mut Vec<u8>, note: &Note) {
    let name = [note.owner.as_bytes(), b"\0"].concat();
    format.words(notes, [name.len() as u32, note.content.len() as u32, note.kind]);
    for part in [&name, &note.content] {
        notes.extend_from_slice(part);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
}

/// `NT_PRSTATUS` of x86-64.
#[derive(FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct Status {
    signal: [u8; 32],
    pid: U32,
    family: [u8; 76],
    /// From here on Linux's `user_regs_struct`.
    general: [U64; 15],
    orig_rax: U64,
    /// RIP CS RFLAGS RSP SS.
    frame: [U64; 5],
    /// Of FS and GS.
    bases: [U64; 2],
    /// DS ES FS GS.
    selectors: [U64; 4],
    has_floating: U64,
}

/// `NT_PRSTATUS` of i386.
#[derive(FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct NarrowStatus {
    signal: [u8; 24],
    pid: U32,
    family: [u8; 44],
    /// i386's `user_regs_struct`.
    registers: [U32; 17],
    has_floating: U32,
}

/// The `QEMU` note.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct QemuState {
    version: U32,
    len: U32,
    /// RAX RBX RCX RDX RSI RDI RSP RBP, then R8 to R15.
    general: [U64; 16],
    rip: U64,
    rflags: U64,
    /// CS DS ES FS GS SS LDTR TR GDTR IDTR.
    segments: [QemuSegment; 10],
    control: [U64; 5],
    kernel_gs_base: U64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct QemuSegment {
    selector: U32,
    limit: U32,
    flags: U32,
    padding: U32,
    base: U64,
}

fn prstatus(pid: u32, cpu: &Registers) -> Vec<u8> {
    let [es, cs, ss, ds, fs, gs] = cpu.segments;
    let general = |index: usize| U64::new(cpu.general[index]);
    let selectors = [ds, es, fs, gs].map(|segment| U64::new(segment.selector.into()));
    let status = Status {
        pid: pid.into(),
        // R15 R14 R13 R12 RBP RBX R11 R10 R9 R8 RAX RCX RDX RSI RDI
        general: [15, 14, 13, 12, 5, 3, 11, 10, 9, 8, 0, 1, 2, 6, 7].map(general),
        frame: [cpu.rip, cs.selector.into(), cpu.rflags, cpu.general[4], ss.selector.into()].map(U64::new),
        bases: [fs.base.into(), gs.base.into()],
        selectors,
        ..Status::new_zeroed()
    };
    status.as_bytes().to_vec()
}

fn narrow_prstatus(pid: u32, cpu: &Registers) -> Vec<u8> {
    let [es, cs, ss, ds, fs, gs] = cpu.segments.map(|segment| segment.selector);
    let [eax, ecx, edx, ebx, esp, ebp, esi, edi, ..] = cpu.general.map(|register| register as u32);
    let (orig_eax, eip, eflags) = (0, cpu.rip as u32, cpu.rflags as u32);
    let registers = [ebx, ecx, edx, esi, edi, ebp, eax, ds, es, fs, gs, orig_eax, eip, cs, eflags, esp, ss];
    let status = NarrowStatus { pid: pid.into(), registers: registers.map(U32::new), ..NarrowStatus::new_zeroed() };
    status.as_bytes().to_vec()
}

fn qemu_state(cpu: &Registers) -> Vec<u8> {
    let [es, cs, ss, ds, fs, gs] = cpu.segments;
    let [ldtr, tr, gdtr, idtr] = cpu.tables;
    let segment = |register: SegmentRegister| QemuSegment {
        selector: register.selector.into(),
        limit: register.limit.into(),
        flags: register.flags.into(),
        padding: U32::ZERO,
        base: register.base.into(),
    };
    let state = QemuState {
        version: QEMU_NOTE_VERSION.into(),
        len: (size_of::<QemuState>() as u32).into(),
        general: [0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15].map(|index| cpu.general[index].into()),
        rip: cpu.rip.into(),
        rflags: cpu.rflags.into(),
        segments: [cs, ds, es, fs, gs, ss, ldtr, tr, gdtr, idtr].map(segment),
        control: cpu.control.map(U64::new),
        kernel_gs_base: cpu.kernel_gs_base.into(),
    };
    state.as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The two notes' sizes and owners, and the layout of the `QEMU` note, as QEMU 10.0's `dump-guest-memory` writes
    /// them for a guest whose CPU 0 was at 0x81af in flat protected mode (`crash` reads the same layout).
    #[test]
    fn the_qemu_note_is_laid_out_as_qemu_does() {
        let flat = |selector, flags| SegmentRegister { selector, limit: 0xffff_ffff, flags, base: 0 };
        let mut cpu = Registers { rip: 0x81af, rflags: 0x246, ..Registers::default() };
        cpu.general[0] = 0xc00;
        cpu.general[3] = 0xfe1d43;
        cpu.segments = [flat(0x10, 1), flat(0x8, 2), flat(0x10, 3), flat(0x10, 4), flat(0x10, 5), flat(0x10, 6)];
        cpu.tables[2] = SegmentRegister { limit: 0x47, base: 0x9cc30, ..Default::default() };
        cpu.control[0] = 0x11;
        let note = qemu_state(&cpu);
        assert_eq!(note.len(), 0x1b8);
        assert_eq!(note[..8], [1, 0, 0, 0, 0xb8, 1, 0, 0]);
        assert_eq!(note[8..16], 0xc00u64.to_le_bytes());
        assert_eq!(note[16..24], 0xfe1d43u64.to_le_bytes());
        assert_eq!(note[8 + 16 * 8..8 + 17 * 8], 0x81afu64.to_le_bytes());
        let segments = 8 + 18 * 8;
        let flags: Vec<u8> = (0..6).map(|i| note[segments + 24 * i + 8]).collect();
        assert_eq!(flags, [2, 4, 1, 5, 6, 3], "CS DS ES FS GS SS");
        assert_eq!(note[segments + 24 * 8 + 16..segments + 24 * 9], 0x9cc30u64.to_le_bytes());
        assert_eq!(note[segments + 24 * 10..][..8], 0x11u64.to_le_bytes());
    }

    /// What is not zero in the `NT_PRSTATUS` notes that `dump-guest-memory` of QEMU 7.2 and 11.1 writes of a guest at
    /// its reset vector, `qemu-system-i386` and `qemu-system-x86_64` alike.
    #[test]
    fn a_guest_that_is_not_in_long_mode_is_an_i386_one() {
        let mut cpu = Registers { rip: 0xfff0, rflags: 2, ..Registers::default() };
        cpu.general[2] = 0x663;
        cpu.segments[1].selector = 0xf000;
        let core = core_header(&[cpu], &[]).bytes;
        assert_eq!(core[4], 2, "a 64-bit file");
        assert_eq!(core[18..20], EM_386.to_le_bytes());
        let status = narrow_prstatus(1, &cpu);
        assert_eq!(status.len(), 144);
        let words: Vec<(usize, u32)> = (0..144)
            .step_by(4)
            .map(|at| (at, u32::from_le_bytes(status[at..at + 4].try_into().unwrap())))
            .filter(|(_, word)| *word != 0)
            .collect();
        assert_eq!(words, [(24, 1), (80, 0x663), (120, 0xfff0), (124, 0xf000), (128, 2)]);
        cpu.long_mode = true;
        assert_eq!(core_header(&[cpu], &[]).bytes[18..20], EM_X86_64.to_le_bytes());
    }

    #[test]
    fn every_part_is_where_its_header_says() {
        let cpu = |rip| Registers { rip, long_mode: true, ..Default::default() };
        let cpus = [cpu(0x1111), cpu(0x2222)];
        let loads = [Load { address: 0, len: 0xa0000 }, Load { address: 1 << 32, len: 4096 }];
        let CoreHeader { bytes, offsets } = core_header(&cpus, &loads);
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let header = |i: usize| 64 + i * 56;
        assert_eq!((half(header(0)), half(header(1)), half(header(2))), (PT_NOTE, PT_LOAD, PT_LOAD));
        assert_eq!((word(header(1) + 8), word(header(1) + 24), word(header(1) + 32)), (offsets[0], 0, 0xa0000));
        assert_eq!((word(header(2) + 8), word(header(2) + 24)), (offsets[1], 1 << 32));
        assert_eq!(offsets[1], offsets[0] + 0xa0000);

        let mut at = word(header(0) + 8) as usize;
        let end = at + word(header(0) + 32) as usize;
        assert_eq!(end, bytes.len());
        let mut owners = Vec::new();
        while at < end {
            let (name, len) = (half(at) as usize, half(at + 4) as usize);
            owners.push(bytes[at + 12..at + 12 + name - 1].to_vec());
            let content = at + 12 + name.next_multiple_of(4);
            if half(at + 8) == NT_PRSTATUS {
                assert_eq!(len, 336);
                let rip = word(content + 112 + 16 * 8);
                assert_eq!(rip, [0x1111, 0x2222][half(content + 32) as usize - 1]);
            }
            at = content + len.next_multiple_of(4);
        }
        assert_eq!(owners, [b"CORE", b"CORE", b"QEMU", b"QEMU"]);
    }
}
