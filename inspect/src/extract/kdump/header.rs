//! What comes before the pages of a dump.

use super::parts::PageCompression;
use crate::extract::elf_core::{EM_386, EM_X86_64, Format, Note, note_bytes};
use crate::extract::registers::machine;
use crate::extract::vmcoreinfo::{self, physical_base};
use std::ops::Range;

const SIGNATURE: &[u8; 8] = b"KDUMP   ";
const VERSION: u32 = 6;
/// Of each of the six parts of `uname`; the fifth is the machine.
const NAME_LEN: usize = 65;
/// The field `status` of a dump, and the flags of a page.
pub(super) const ZLIB: u32 = 1;
pub(super) const ZSTD: u32 = 0x20;
/// Pages of zeroes are left out. They are not, but share one content, and QEMU calls that so.
const WITHOUT_ZEROES: u32 = 1;
/// Bytes of a page's descriptor.
pub(super) const DESCRIPTOR_LEN: u64 = 24;

/// How a target's dumps are laid out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    format: Format,
    machine: &'static str,
    /// Bytes of a page of the dump, and of a block of the file.
    pub(super) frame_size: u64,
    /// The kernel is loaded at the start of the memory, wherever that is.
    from_first_address: bool,
}

impl Shape {
    pub(super) fn of(format: Format) -> Shape {
        let (machine, frame_size, from_first_address) = match (format.machine, format.narrow) {
            (EM_X86_64 | EM_386, _) => ("x86_64", 4096, false),
            (machine::EM_AARCH64, _) => ("aarch64", 65536, true),
            (machine::EM_ARM, _) => ("arm", 4096, true),
            (machine::EM_PPC64, _) => ("ppc64", 65536, false),
            (machine::EM_PPC, _) => ("ppc", 4096, false),
            (machine::EM_RISCV, false) => ("riscv64", 4096, false),
            (machine::EM_RISCV, true) => ("riscv32", 4096, false),
            (machine::EM_S390, _) => ("S390X", 4096, false),
            _ => ("Unknown", 4096, false),
        };
        Shape { format, machine, frame_size, from_first_address }
    }
}

/// The bytes before the bitmaps, and where what follows goes.
#[derive(Debug)]
pub(super) struct Header {
    /// Both headers and the notes.
    pub(super) bytes: Vec<u8>,
    /// File offset of each bitmap.
    pub(super) bitmaps: [u64; 2],
    /// File offset of the first descriptor.
    pub(super) descriptors: u64,
    /// File offset of the first page's content.
    pub(super) contents: u64,
}

impl Header {
    /// Of a dump with the pages in `ranges`. `None` if the format cannot count them.
    pub(super) fn new(
        shape: Shape,
        notes: &[Note],
        cpus: u32,
        first_address: u64,
        ranges: &[Range<u64>],
        compression: PageCompression,
    ) -> Option<Header> {
        let Shape { format, frame_size, .. } = shape;
        let kernel = notes.iter().position(|note| note.owner == vmcoreinfo::OWNER);
        let before = kernel.map_or(0, |kernel| note_bytes(format, &notes[..kernel + 1]).len());
        let kernel = kernel.map(|kernel| &notes[kernel]);
        let notes = note_bytes(format, notes);
        let (pages, end) = (ranges.iter().map(|r| r.end - r.start).sum::<u64>(), ranges.last().map_or(0, |r| r.end));
        let second_len = if format.narrow { 80 } else { 104 };
        let second_blocks = (second_len + notes.len() as u64).div_ceil(frame_size);
        let bitmap_blocks = end.div_ceil(8).div_ceil(frame_size);
        let both = u32::try_from(bitmap_blocks.checked_mul(2)?).ok()?;
        let bitmaps = [0, bitmap_blocks].map(|blocks| (1 + second_blocks + blocks) * frame_size);
        let descriptors = bitmaps[1] + bitmap_blocks * frame_size;
        let contents = descriptors.checked_add(pages.checked_mul(DESCRIPTOR_LEN)?)?;
        // None of them gets longer than it is; files end before 2^63.
        i64::try_from(contents.checked_add((pages + 1).checked_mul(frame_size)?)?).ok()?;

        let mut bytes = SIGNATURE.to_vec();
        format.word(&mut bytes, VERSION);
        let machine_at = bytes.len() + 4 * NAME_LEN;
        let names_end = bytes.len() + 6 * NAME_LEN;
        bytes.resize(machine_at, 0);
        bytes.extend_from_slice(shape.machine.as_bytes());
        bytes.resize(names_end.next_multiple_of(if format.narrow { 4 } else { 8 }), 0);
        format.addresses(&mut bytes, [0, 0]);
        let status = match compression {
            PageCompression::Zlib => ZLIB,
            PageCompression::Zstd => ZSTD,
        };
        let counted = u32::try_from(end).unwrap_or(u32::MAX);
        format.words(&mut bytes, [status, frame_size as u32, second_blocks as u32, both, counted, 0, 0, 0, 0, cpus]);
        bytes.resize(frame_size as usize, 0);

        let assumed = if shape.from_first_address { first_address } else { 0 };
        format.address(&mut bytes, kernel.and_then(|kernel| physical_base(format, kernel)).unwrap_or(assumed));
        format.words(&mut bytes, [WITHOUT_ZEROES, 0]);
        format.addresses(&mut bytes, [0, 0]); // not one of several dumps
        let notes_at = frame_size + second_len;
        let len = kernel.map_or(0, |kernel| kernel.content.len() as u64);
        // The descriptor alone, where it is among the notes: its padding ends with it.
        let start = notes_at + before as u64 - len.next_multiple_of(4);
        format.long(&mut bytes, if kernel.is_some() { start } else { 0 });
        format.address(&mut bytes, len);
        format.long(&mut bytes, notes_at);
        format.address(&mut bytes, notes.len() as u64);
        format.long(&mut bytes, 0); // nothing was erased
        format.address(&mut bytes, 0);
        format.longs(&mut bytes, [0, 0, end]);
        bytes.extend_from_slice(&notes);
        Some(Header { bytes, bitmaps, descriptors, contents })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From a dump that QEMU 11.1 wrote of a q35 guest with 64 MiB of memory and firmware below 4 GiB.
    #[test]
    fn the_numbers_are_qemus() {
        let shape = Shape::of(Format { machine: EM_X86_64, big_endian: false, narrow: false });
        // The lengths of QEMU's notes: CORE of an i386 guest, and QEMU.
        let notes = [("CORE", 144), ("QEMU", 440)].map(|(owner, len)| Note {
            owner,
            kind: u32::from(owner == "CORE"),
            content: vec![0; len],
        });
        let ranges = [0..0x4000, 0xfffc0..0x100000];
        let header = Header::new(shape, &notes, 1, 0, &ranges, PageCompression::Zlib).unwrap();
        let word = |at: usize| u32::from_le_bytes(header.bytes[at..at + 4].try_into().unwrap());
        assert_eq!([424, 428, 432, 436, 440, 460].map(word), [1, 4096, 1, 0x40, 0x100000, 1]);
        assert_eq!([0, 8, 0x30, 0x38, 0x60].map(|at| word(4096 + at)), [0, 1, 0x1068, 0x270, 0x100000]);
        assert_eq!((header.bitmaps, header.descriptors, header.contents), ([0x2000, 0x22000], 0x42000, 0xa2600));
        assert_eq!(word(0x1068), 5);
    }

    /// From dumps by QEMU 11.1 of a `virt` guest of arm with 32 MiB, and of `mac99` of ppc with 64 MiB and a ROM.
    #[test]
    fn dumps_of_32_bits_have_fields_of_32_bits() {
        let arm = Shape::of(Format { machine: machine::EM_ARM, big_endian: false, narrow: true });
        let range = 0x40000..0x42000;
        let bytes =
            Header::new(arm, &[], 2, 0x4000_0000, std::slice::from_ref(&range), PageCompression::Zlib).unwrap().bytes;
        assert_eq!(bytes[0x1a0..0x1b0], [0, 0x10, 0, 0, 1, 0, 0, 0, 0x12, 0, 0, 0, 0, 0x20, 4, 0]);
        assert_eq!(bytes[0x1c0], 2);
        assert_eq!(bytes[0x1000..0x1008], [0, 0, 0, 0x40, 1, 0, 0, 0]);
        assert_eq!(bytes[0x1020..0x1022], [0x50, 0x10]);
        assert_eq!(bytes[0x1048..0x104c], [0, 0x20, 4, 0]);
        let ppc = Shape::of(Format { machine: machine::EM_PPC, big_endian: true, narrow: true });
        let range = 0..0x100000;
        let bytes = Header::new(ppc, &[], 1, 0, std::slice::from_ref(&range), PageCompression::Zstd).unwrap().bytes;
        assert_eq!(bytes[0x19c..0x1b0], [0, 0, 0, 0x20, 0, 0, 16, 0, 0, 0, 0, 1, 0, 0, 0, 0x40, 0, 0x10, 0, 0]);
        assert_eq!(bytes[0x104c..0x1050], [0, 0x10, 0, 0]);
    }

    /// From dumps by QEMU 10.0 of guests with two CPUs and device `vmcoreinfo`: the lengths of the notes, and where the
    /// last one is. QEMU reads the decimal number of x86's kernel as a hexadecimal one, which is not followed.
    #[test]
    fn the_kernels_note_has_a_place_in_the_header() {
        let noted = |lengths: &[(&'static str, usize)], kernel: &[u8], len: usize| {
            let note = |owner, len| Note { owner, kind: 0, content: vec![0; len] };
            let mut notes: Vec<Note> = lengths.iter().map(|(owner, len)| note(*owner, *len)).collect();
            let mut content = kernel.to_vec();
            content.resize(len, b'\n');
            notes.push(Note { owner: vmcoreinfo::OWNER, kind: 0, content });
            notes
        };
        let x86 = Shape::of(Format { machine: EM_X86_64, big_endian: false, narrow: false });
        let notes = noted(
            &[("CORE", 336), ("CORE", 336), ("QEMU", 440), ("QEMU", 440)],
            b"A=1\nNUMBER(phys_base)=-236978176\n",
            0xcbf,
        );
        let bytes = Header::new(x86, &notes, 2, 0, &[0..1, 2..3], PageCompression::Zlib).unwrap().bytes;
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!([0x20, 0x28, 0x30, 0x38].map(|at| long(0x1000 + at)), [0x16e0, 0xcbf, 0x1068, 0x1338]);
        assert_eq!((long(0x1000) as i64, &bytes[0x16e0..0x16e4]), (-236_978_176, &b"A=1\n"[..]));

        let arm = Shape::of(Format { machine: machine::EM_AARCH64, big_endian: false, narrow: false });
        let cpus = [("CORE", 392), ("CORE", 528), ("CORE", 392), ("CORE", 528)];
        let notes = noted(&cpus, b"NUMBER(PHYS_OFFSET)=0xfff0d57a00000000\n", 0xd4a);
        let bytes = Header::new(arm, &notes, 2, 0x4000_0000, &[0..1, 2..3], PageCompression::Zlib).unwrap().bytes;
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!([0x20, 0x28, 0x30, 0x38].map(|at| long(0x1_0000 + at)), [0x1_0800, 0xd4a, 0x1_0068, 0x14e4]);
        assert_eq!(long(0x1_0000), 0xfff0_d57a_0000_0000);
    }

    #[test]
    fn what_cannot_be_counted_is_refused() {
        let shape = Shape::of(Format { machine: EM_X86_64, big_endian: false, narrow: false });
        let header = |end| Header::new(shape, &[], 1, 0, &[0..1, end - 1..end], PageCompression::Zlib);
        assert!(header((1 << 31) / 2 * 8 * 4096).is_some());
        assert!(header((1 << 31) * 8 * 4096 + 1).is_none());
        assert!(header(u64::MAX).is_none());
    }
}
