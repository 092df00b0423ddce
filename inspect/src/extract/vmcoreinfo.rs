//! `VMCOREINFO`, a note that a Linux guest keeps in its memory: what programs that read a dump have to know of its
//! kernel. Where it is, the device `vmcoreinfo` knows. See `docs/format/kdump.md`.

use super::elf_core::{EM_X86_64, Format, Note};
use super::registers::machine::EM_AARCH64;

/// The device's section.
pub(super) const SECTION: &str = "vmcoreinfo";
/// Who defines the note.
pub(super) const OWNER: &str = "VMCOREINFO";
/// A longer one is not read: those of Linux have less than 4 KiB.
pub(super) const MAX_LEN: u32 = 1 << 20;
/// What the guest calls an ELF note.
const ELF: u16 = 1;
/// Name and descriptor of a note follow three words.
const NOTE_HEADER: usize = 12;

/// What was found of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmCoreInfo {
    /// The note, as a core has it.
    pub note: Option<Note>,
    /// Why there is none, if the guest has told where it is.
    pub unread: Option<String>,
}

/// Where the guest keeps it: guest-physical address and length, which may be more than the note has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) address: u64,
    pub(super) len: u32,
}

impl Place {
    /// Of the content of the device's section. `None` if the guest has told none.
    ///
    /// # Errors
    /// The section is of another length, or what the guest keeps there is no ELF note.
    pub(super) fn of_section(body: &[u8]) -> Result<Option<Place>, String> {
        // Whether the guest has told; two formats, the second of which is the guest's; length and address.
        let (Some((told, rest)), 17) = (body.split_first(), body.len()) else {
            return Err(format!("section '{SECTION}' has {} bytes, and not 17", body.len()));
        };
        let number = |bytes: &[u8]| bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let (format, len, address) = (number(&rest[2..4]), number(&rest[4..8]) as u32, number(&rest[8..]));
        match (told, format) {
            (0, _) => Ok(None),
            (_, format) if format == u64::from(ELF) => Ok(Some(Place { address, len })),
            (_, 0) => Ok(None),
            (_, format) => Err(format!("section '{SECTION}': the guest's format is {format}, and not that of ELF")),
        }
    }
}

impl VmCoreInfo {
    /// Of the `bytes` at the place that the guest has told.
    pub(super) fn read(format: Format, place: Place, bytes: &[u8]) -> VmCoreInfo {
        let note = note(format, bytes);
        let unread = match &note {
            Some(_) => None,
            None => Some(format!("not in the core: {OWNER}, of which there is no note at {:#x}", place.address)),
        };
        VmCoreInfo { note, unread }
    }
}

fn note(format: Format, bytes: &[u8]) -> Option<Note> {
    let word = |at: usize| {
        let word = bytes.get(at..at + 4)?.try_into().ok()?;
        Some(if format.big_endian { u32::from_be_bytes(word) } else { u32::from_le_bytes(word) })
    };
    let (name_len, len, kind) = (word(0)? as usize, word(4)? as usize, word(8)?);
    let name = bytes.get(NOTE_HEADER..NOTE_HEADER.checked_add(name_len)?)?;
    let start = NOTE_HEADER + name_len.checked_next_multiple_of(4)?;
    let content = bytes.get(start..start.checked_add(len)?)?.to_vec();
    (name.strip_suffix(b"\0")? == OWNER.as_bytes()).then_some(Note { owner: OWNER, kind, content })
}

/// Where the kernel lies in physical memory, as a note tells: the offset of its addresses from those that it was linked
/// for.
pub(super) fn physical_base(format: Format, note: &Note) -> Option<u64> {
    let name = match format.machine {
        EM_X86_64 => "NUMBER(phys_base)=",
        EM_AARCH64 => "NUMBER(PHYS_OFFSET)=",
        _ => return None,
    };
    let mut lines = note.content.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    let number = lines.find_map(|line| line.strip_prefix(name))?;
    match number.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        // A kernel below the address that it was linked for has a negative one.
        None => number.parse::<i64>().ok().map(|number| number as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: Format = Format { machine: EM_X86_64, big_endian: false, narrow: false };

    /// From a stream of QEMU 10.0 with Debian's kernel 6.12.
    #[test]
    fn the_device_knows_the_place() {
        let body = [1, 1, 0, 0, 1, 0, 0, 0x10, 0x24, 0, 0, 0, 0, 1, 0xad, 0, 0];
        assert_eq!(Place::of_section(&body), Ok(Some(Place { address: 0x1ad_0000, len: 0x1024 })));
        let mut untold = body;
        untold[0] = 0;
        assert_eq!(Place::of_section(&untold), Ok(None));
        let mut other = body;
        other[4] = 2;
        assert!(Place::of_section(&other).unwrap_err().contains("format is 2"));
        assert!(Place::of_section(&body[..16]).unwrap_err().contains("16 bytes"));
        assert!(Place::of_section(&[]).is_err());
    }

    fn bytes(name: &[u8], content: &[u8], len: u32) -> Vec<u8> {
        let mut bytes: Vec<u8> = [name.len() as u32, len, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend_from_slice(name);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend_from_slice(content);
        bytes
    }

    #[test]
    fn a_note_that_is_none_is_said() {
        let place = Place { address: 0x1000, len: 64 };
        let read = |bytes: &[u8]| VmCoreInfo::read(WIDE, place, bytes);
        let good = bytes(b"VMCOREINFO\0", b"PAGESIZE=4096\n", 14);
        let mut padded = good.clone();
        padded.resize(4096, 0);
        for bytes in [&good, &padded] {
            let note = read(bytes).note.unwrap();
            assert_eq!((note.owner, note.kind, note.content.as_slice()), ("VMCOREINFO", 0, &b"PAGESIZE=4096\n"[..]));
        }
        let others = [
            vec![0; 64],
            vec![],
            good[..good.len() - 1].to_vec(),
            bytes(b"VMCOREINFO\0", b"", u32::MAX),
            bytes(b"CORE\0", b"abcd", 4),
            vec![0xff; 64],
        ];
        for bytes in others {
            let read = read(&bytes);
            assert!(read.note.is_none() && read.unread.unwrap().contains("0x1000"), "{bytes:?}");
        }
    }

    /// The lines are of Debian's kernels 6.12 for clouds, in QEMU 10.0.
    #[test]
    fn a_kernel_tells_where_it_lies() {
        let base = |machine, content: &[u8]| {
            let note = Note { owner: OWNER, kind: 0, content: content.to_vec() };
            physical_base(Format { machine, ..WIDE }, &note)
        };
        let x86 = b"SIZE(page)=64\nNUMBER(phys_base)=-236978176\nNUMBER(sme_mask)=0\n";
        assert_eq!(base(EM_X86_64, x86), Some(236_978_176_u64.wrapping_neg()));
        assert_eq!(base(EM_AARCH64, b"NUMBER(PHYS_OFFSET)=0xfff0d57a00000000\n"), Some(0xfff0_d57a_0000_0000));
        assert_eq!(base(EM_X86_64, b"NUMBER(phys_base)=\n"), None);
        assert_eq!(base(machine_without_rule(), x86), None);
    }

    fn machine_without_rule() -> u16 {
        crate::extract::registers::machine::EM_S390
    }
}
