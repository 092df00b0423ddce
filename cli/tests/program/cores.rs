//! ELF cores of guests of every target, held against those that QEMU's `dump-guest-memory` wrote of the same stopped
//! guests. See `streams/cores/README.md`.

use crate::sample::{Ran, file, path, qevm};
use qevm_savevm::StreamWriter;
use qevm_savevm::configuration::Configuration;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::ram::{BlockId, RamBlock};
use qevm_wire::CountedString;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// A target: name, `e_ident` up to the byte order, `e_machine`, and the address and CRC-32 of the memory.
pub(crate) const TARGETS: [(&str, [u8; 2], u16, u64, u32); 8] = [
    ("aarch64", [2, 1], 183, 0x4000_0000, 0x5dcd_2682),
    ("arm", [1, 1], 40, 0x4000_0000, 0x7c09_c235),
    ("riscv64", [2, 1], 243, 0x8000_0000, 0xb996_f407),
    ("riscv32", [1, 1], 243, 0x8000_0000, 0xf13b_70e5),
    ("s390x", [2, 2], 22, 0, 0x31ee_d965),
    ("ppc64", [2, 2], 21, 0, 0x073a_2889),
    ("ppc64le", [2, 1], 21, 0, 0xb997_256a),
    ("ppc", [1, 2], 20, 0, 0xe91d_1751),
];

pub(crate) fn stream(name: &str) -> Vec<u8> {
    unpacked(&format!("cores/{name}.q.xz"))
}

pub(crate) fn unpacked(name: &str) -> Vec<u8> {
    let packed = std::fs::File::open(path(name)).unwrap();
    let out = Command::new("xz").arg("-dc").stdin(packed).output().expect("xz is part of every Debian");
    assert!(out.status.success(), "{name}");
    out.stdout
}

pub(crate) fn notes(name: &str) -> Vec<u8> {
    std::fs::read(path(&format!("cores/{name}.notes"))).unwrap()
}

fn extract(dir: &TempDir, stream: &Path) -> Ran {
    let core = dir.path().join("core").display().to_string();
    qevm(["extract", "--force", "--elf", &core, &stream.display().to_string()])
}

/// A core as the System V ABI has it.
struct Core(Vec<u8>);

impl Core {
    fn read(dir: &TempDir) -> Self {
        Core(std::fs::read(dir.path().join("core")).unwrap())
    }

    fn number(&self, at: usize, len: usize) -> u64 {
        let bytes = &self.0[at..at + len];
        let shift_in = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
        if self.0[5] == 2 { bytes.iter().fold(0, shift_in) } else { bytes.iter().rev().fold(0, shift_in) }
    }

    /// Type, address and content of every segment.
    fn segments(&self) -> Vec<(u64, u64, &[u8])> {
        let wide = self.0[4] == 2;
        // e_phoff and e_phnum; size of a program header; p_offset, p_paddr, p_filesz.
        let (first, count, size) = if wide { (32, 56, 56) } else { (28, 44, 32) };
        let (offset, address, len) = if wide { (8, 24, 32) } else { (4, 12, 16) };
        let word = if wide { 8 } else { 4 };
        let (first, count) = (self.number(first, word) as usize, self.number(count, 2) as usize);
        let segment = |at: usize| {
            let field = |field: usize| self.number(at + field, word) as usize;
            (self.number(at, 4), field(address) as u64, &self.0[field(offset)..][..field(len)])
        };
        (0..count).map(|header| segment(first + header * size)).collect()
    }
}

#[test]
fn cores_are_those_that_qemu_writes() {
    let dir = TempDir::new().unwrap();
    for (name, ident, machine, address, crc) in TARGETS {
        let ran = extract(&dir, &file(&dir, name, &stream(name)));
        assert_eq!(ran.code, Some(0), "{name}: {}", ran.stderr);
        let core = Core::read(&dir);
        assert_eq!((&core.0[..4], &core.0[4..6]), (&b"\x7fELF"[..], &ident[..]), "{name}");
        assert_eq!((core.number(16, 2), core.number(18, 2)), (4, u64::from(machine)), "{name}");
        let segments = core.segments();
        let [(4, _, told), (1, at, memory)] = segments[..] else { panic!("{name}: {} segments", segments.len()) };
        assert!(told == notes(name), "{name}: the notes differ: {}", ran.stdout);
        assert_eq!((at, crc32fast::hash(memory)), (address, crc), "{name}");
    }
}

#[test]
fn notes_of_i386_are_those_that_qemu_writes() {
    let dir = TempDir::new().unwrap();
    let ran = extract(&dir, &file(&dir, "i386", &stream("i386")));
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let core = Core::read(&dir);
    assert_eq!((core.0[4], core.number(18, 2)), (2, 3));
    let segments = core.segments();
    let [(4, _, told), (1, 0, memory)] = segments[..] else { panic!("{} segments", segments.len()) };
    assert!(told == notes("i386"), "the notes differ");
    assert_eq!(crc32fast::hash(&memory[0x10_0000..]), 0xee17_f47c);
}

/// Fields that are not there are told by name, each of them; nothing is made up for them.
#[test]
fn a_register_that_is_not_in_the_stream_is_named() {
    let dir = TempDir::new().unwrap();
    for (name, fields) in [
        ("aarch64", &["env.xregs", "env.pc", "cpsr", "fpscr"][..]),
        ("arm", &["env.regs", "cpsr", "fpscr", "cpreg_vmstate_indexes"]),
        ("riscv64", &["env.gpr", "env.pc"]),
        (
            "s390x",
            &[
                "env.regs",
                "env.psw.mask",
                "env.aregs",
                "env.fpc",
                "env.psa",
                "env.cregs",
                "env.cputm",
                "env.ckc",
                "env.todpr",
            ],
        ),
        ("ppc64", &["env.gpr", "env.crf", "env.msr", "env.fpscr", "vscr"]),
    ] {
        let whole = stream(name);
        let start = whole.windows(11).position(|bytes| bytes == b"\"page_size\"").expect("a description");
        let description = String::from_utf8(whole[start..].to_vec()).unwrap();
        for field in fields {
            let other = format!("\"{}_\"", &field[..field.len() - 1]);
            let text = description.replace(&format!("\"{field}\""), &other);
            assert_ne!(text, description, "{name}: {field}");
            let without = file(&dir, "without", &[&whole[..start], text.as_bytes()].concat());
            let ran = extract(&dir, &without);
            assert_eq!(ran.code, Some(2), "{name} without {field}: {}", ran.stdout);
            let named =
                ran.stderr.contains(&format!("{field}'")) && ran.stderr.contains("section 'cpu', instance 0: no field");
            // These fields tell that it is an Arm: without them the registers could be any target's.
            assert!(named || ran.stderr.contains("no registers of a target"), "{name}: {}", ran.stderr);
        }
    }
}

/// A guest of x86 that keeps `note` at 0x2ff4, across two pages, and has told its device `vmcoreinfo` that `len` bytes
/// are there.
fn guest_with_note(note: &[u8], len: u32) -> Vec<u8> {
    let section = |section_id, idstr: &str, version_id| SectionHeader {
        section_id,
        idstr: CountedString::new(idstr).unwrap(),
        instance_id: 0,
        version_id,
    };
    let mut memory = vec![0; 8 * 4096];
    memory[0x2ff4..0x2ff4 + note.len()].copy_from_slice(note);
    let mut stream = StreamWriter::default();
    stream.header(Some(&Configuration::new("microvm"))).unwrap();
    stream.section_start(&section(1, "ram", 4)).unwrap();
    stream.ram_setup([RamBlock::new(CountedString::new("microvm.ram").unwrap(), memory.len() as u64)]).unwrap();
    stream.eos().unwrap();
    stream.footer().unwrap();
    stream.section_end(1).unwrap();
    for (number, page) in memory.chunks(4096).enumerate() {
        stream.page_header(BlockId(0), number as u64 * 4096).unwrap();
        stream.payload(page).unwrap();
    }
    stream.eos().unwrap();
    stream.footer().unwrap();
    // As QEMU 10.0 writes it: told, both formats, length and address.
    let body = [&[1, 1, 0, 0, 1][..], &len.to_be_bytes(), &0x2ff4_u64.to_be_bytes()].concat();
    stream.section_full(&section(2, "vmcoreinfo", 1), &body).unwrap();
    stream.eof().unwrap();
    stream.bytes().to_vec()
}

#[test]
fn a_core_has_the_note_in_which_the_kernel_tells_of_itself() {
    let dir = TempDir::new().unwrap();
    let note = [&[11, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0][..], b"VMCOREINFO\0\0", b"TEXT=1\n\0"].concat();
    let given = file(&dir, "guest", &guest_with_note(&note, 0x1024));
    let ran = extract(&dir, &given);
    assert_eq!((ran.code, ran.stdout.contains("VMCOREINFO")), (Some(0), false), "{} {}", ran.stdout, ran.stderr);
    let core = Core::read(&dir);
    let (_, _, notes) = core.segments().into_iter().find(|(kind, ..)| *kind == 4).expect("PT_NOTE");
    assert_eq!(notes, note);

    for (note, len) in [(&note[..], 30), (&note[..], 0), (&note[..20], 0x1024), (&b"no note is here"[..], 0x1024)] {
        let ran = extract(&dir, &file(&dir, "guest", &guest_with_note(note, len)));
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        assert!(
            ran.stdout.contains("not in the core: VMCOREINFO, of which there is no note at 0x2ff4"),
            "{}",
            ran.stdout
        );
    }
}
