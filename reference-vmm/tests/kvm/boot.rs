//! Kernels of a few bytes, entered by both boot protocols: they print their command line and the initial RAM disk.

use reference_vmm::boot::Kernel;
use reference_vmm::machine::{Machine, MachineConfig};

use crate::Test;
use crate::guest::Console;

pub(crate) const TESTS: &[Test] =
    &[("boot_enters_an_elf_by_pvh", enters_an_elf_by_pvh), ("boot_enters_a_bzimage_in_long_mode", enters_a_bzimage)];

/// A subroutine of 32 and 64 bits alike: prints the text at ESI up to its zero.
const PRINT: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xac, // lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x03, // jz to the end
    0xee, // out dx, al
    0xeb, 0xf8, // jmp to lodsb
];
/// hlt; jmp to itself
const SLEEP: &[u8] = &[0xf4, 0xeb, 0xfd];

fn enters_an_elf_by_pvh() {
    let code = [
        &[0x8b, 0x73, 0x18], // mov esi, [ebx + 0x18]: cmdline_paddr
        PRINT,
        &[0x8b, 0x43, 0x10, 0x8b, 0x30], // mov eax, [ebx + 0x10]; mov esi, [eax]: modlist_paddr, its first paddr
        PRINT,
        SLEEP,
    ]
    .concat();
    let mut file = vec![0; 0x1000];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\x00");
    file[32] = 64; // e_phoff
    file[54..58].copy_from_slice(&[56, 0, 2, 0]); // e_phentsize, e_phnum
    let program_header = |kind: u32, words: [u64; 6]| {
        let words: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        [u64::from(kind).to_le_bytes().to_vec(), words].concat()
    };
    let len = code.len() as u64;
    file[64..120].copy_from_slice(&program_header(1, [0x1000, 0x20_0000, 0x20_0000, len, len, 0x1000]));
    file[120..176].copy_from_slice(&program_header(4, [0x800, 0, 0, 20, 20, 4]));
    file[0x800..0x814].copy_from_slice(&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0, 0, 0, 0x20, 0]);
    file.extend(code);
    prints_what_it_was_given(file);
}

fn enters_a_bzimage() {
    let code = [
        &[0x48, 0x89, 0xf3, 0x8b, 0xb3, 0x28, 0x02, 0, 0], // mov rbx, rsi; mov esi, [rbx + 0x228]: cmd_line_ptr
        PRINT,
        &[0x8b, 0xb3, 0x18, 0x02, 0, 0], // mov esi, [rbx + 0x218]: ramdisk_image
        PRINT,
        SLEEP,
    ]
    .concat();
    let mut file = vec![0; 0x400 + 0x200];
    file[0x1f1] = 1; // setup_sects
    file[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    file[0x211] = 1; // loadflags: loaded high
    file[0x216] = 0x10; // code32_start: 1 MiB
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    file[0x236] = 1; // xloadflags: there is a 64-bit entry
    file[0x239] = 8; // cmdline_size
    file.extend(code);
    prints_what_it_was_given(file);
}

fn prints_what_it_was_given(image: Vec<u8>) {
    let console = Console::default();
    let kernel = Kernel {
        image,
        initrd: b"and-this-disk\n\0".to_vec(),
        command_line: "this-command-line ".into(),
        by_firmware: false,
    };
    let config = MachineConfig {
        memory: 32 << 20,
        cpus: 2,
        bios: vec![0; 64 << 10],
        kernel: Some(kernel),
        serial: Box::new(console.clone()),
        ..MachineConfig::default()
    };
    let machine = Machine::new(config).unwrap();
    assert!(machine.has_kernel());
    machine.resume().unwrap();
    let line = console.wait_for("the kernel's line", |lines| lines.first().cloned());
    assert_eq!(line, "this-command-line and-this-disk");
}
