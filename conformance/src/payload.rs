//! A firmware image of a few dozen instructions that dirties guest RAM for ever, for any x86 machine type (`-bios`).
//!
//! It enters 32-bit protected mode at the reset vector and then adds one to the first word of each page of a range,
//! round after round, with a delay loop in between and one `.` on the first serial port per round. That gives
//! migrations several rounds, XBZRLE small differences, and postcopy destinations pages to ask for.

/// What the guest dirties.
#[derive(Debug, Clone, Copy)]
pub struct Dirtying {
    /// First byte, page aligned, at least 2 MiB so that no firmware structure is hit.
    pub base: u32,
    /// Number of 4096-byte pages, at least one.
    pub pages: u32,
    /// Iterations of the delay loop between two pages, at least one.
    pub delay: u32,
}

const SIZE: usize = 64 * 1024;
const CODE_AT: usize = 0xff00;
const GDT_AT: usize = 0xffa0;
const GDT_POINTER_AT: usize = 0xffc0;
const BASE_AT: usize = 0xffd8;
const PAGES_AT: usize = 0xffdc;
const DELAY_AT: usize = 0xffe0;
const RESET_AT: usize = 0xfff0;

#[rustfmt::skip]
const CODE: &[u8] = &[
    0xfa,                                           // cli
    0x2e, 0x66, 0x0f, 0x01, 0x16, 0xc0, 0xff,       // lgdtl %cs:0xffc0
    0x0f, 0x20, 0xc0,                               // mov %cr0, %eax
    0x0c, 0x01,                                     // or $1, %al
    0x0f, 0x22, 0xc0,                               // mov %eax, %cr0
    0x66, 0xea, 0x18, 0xff, 0xff, 0xff, 0x08, 0x00, // ljmpl $8, $0xffffff18
    0xb8, 0x10, 0x00, 0x00, 0x00,                   // mov $0x10, %eax
    0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0,             // mov %eax, %ds, %es, %ss
    0x8b, 0x1d, 0xd8, 0xff, 0xff, 0xff,             // mov base, %ebx
    0x89, 0xdf,                                     // round: mov %ebx, %edi
    0x8b, 0x15, 0xdc, 0xff, 0xff, 0xff,             // mov pages, %edx
    0xff, 0x07,                                     // page: incl (%edi)
    0x8b, 0x0d, 0xe0, 0xff, 0xff, 0xff,             // mov delay, %ecx
    0x49, 0x75, 0xfd,                               // 1: dec %ecx; jnz 1b
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00,             // add $4096, %edi
    0x4a, 0x75, 0xec,                               // dec %edx; jnz page
    0xba, 0xf8, 0x03, 0x00, 0x00,                   // mov $0x3f8, %edx
    0xb0, 0x2e, 0xee,                               // mov $'.', %al; out %al, %dx
    0xeb, 0xda,                                     // jmp round
];

/// The image for `-bios`, 64 KiB.
pub fn firmware(dirtying: Dirtying) -> Vec<u8> {
    let mut image = vec![0; SIZE];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(CODE_AT, CODE);
    // Null, then flat 4 GiB code (0x08) and data (0x10) segments.
    put(GDT_AT + 8, &0x00cf_9a00_0000_ffff_u64.to_le_bytes());
    put(GDT_AT + 16, &0x00cf_9200_0000_ffff_u64.to_le_bytes());
    put(GDT_POINTER_AT, &23_u16.to_le_bytes());
    put(GDT_POINTER_AT + 2, &(0xffff_0000 + GDT_AT as u32).to_le_bytes());
    put(BASE_AT, &dirtying.base.to_le_bytes());
    put(PAGES_AT, &dirtying.pages.max(1).to_le_bytes());
    put(DELAY_AT, &dirtying.delay.max(1).to_le_bytes());
    let jump = CODE_AT.wrapping_sub(RESET_AT + 3) as u16;
    put(RESET_AT, &[0xe9, jump as u8, (jump >> 8) as u8]);
    image
}

/// An image for `-bios` that halts its processor for good and touches no RAM, 64 KiB.
pub fn halt() -> Vec<u8> {
    let mut image = vec![0; SIZE];
    // cli; 1: hlt; jmp 1b
    image[RESET_AT..RESET_AT + 4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    image
}

/// Bytes for guest RAM: zero pages, pages of one repeated byte, text and incompressible pages take turns, so that every
/// kind of page record appears. `pages` counts 4096-byte pages.
pub fn pattern(pages: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(pages * 4096);
    for page in 0..pages {
        match page % 5 {
            0 => bytes.resize(bytes.len() + 4096, 0),
            1 => bytes.resize(bytes.len() + 4096, 0xa5),
            2 => {
                let line = format!("page {page:06} of a guest that migrates\n");
                bytes.extend(line.bytes().cycle().take(4096));
            }
            _ => bytes.extend((0..512).flat_map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()
            })),
        }
    }
    bytes
}
