//! Kernels of a few bytes, entered by both boot protocols: they print their command line and the initial RAM disk.

use crate::Test;
use crate::guest::{Console, Guest};
use crate::state::copy_ram;
use reference_vmm::boot::Kernel;
use reference_vmm::machine::{Machine, MachineConfig};
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[Test] = &[
    ("boot_enters_an_elf_by_pvh", enters_an_elf_by_pvh),
    ("boot_enters_a_bzimage_in_long_mode", enters_a_bzimage),
    ("boot_is_interrupted_by_the_8259s_of_the_kernel", || is_interrupted_by_the_8259s(false)),
    ("boot_is_interrupted_by_the_8259s_of_the_monitor", || is_interrupted_by_the_8259s(true)),
    ("boot_with_a_split_irqchip_stays_healthy_elsewhere", with_a_split_irqchip_stays_healthy),
];

/// Where the ELF kernels are.
const ENTRY: u64 = 0x20_0000;

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
    prints_what_it_was_given(elf(code));
}

/// An ELF file with this code at its entry point.
pub(crate) fn elf(code: Vec<u8>) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\x00");
    file[32] = 64; // e_phoff
    file[54..58].copy_from_slice(&[56, 0, 2, 0]); // e_phentsize, e_phnum
    let program_header = |kind: u32, words: [u64; 6]| {
        let words: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        [u64::from(kind).to_le_bytes().to_vec(), words].concat()
    };
    let len = code.len() as u64;
    file[64..120].copy_from_slice(&program_header(1, [0x1000, ENTRY, ENTRY, len, len, 0x1000]));
    file[120..176].copy_from_slice(&program_header(4, [0x800, 0, 0, 20, 20, 4]));
    file[0x800..0x814].copy_from_slice(&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0, 0, 0, 0x20, 0]);
    file.extend(code);
    file
}

/// A guest that prints a line at each interrupt of the PIT, a hundred times a second, goes on in another machine.
fn is_interrupted_by_the_8259s(split_irqchip: bool) {
    const HANDLER: usize = 0x80;
    const TABLES: usize = 0xf0;
    const GDT: usize = 0x100;
    const IDT: usize = 0x200;
    const VECTOR: usize = 0x20;
    let mut code = [
        &[0x0f, 0x01, 0x15, 0xf0, 0x00, 0x20, 0x00, 0x0f, 0x01, 0x1d, 0xf8, 0x00, 0x20, 0x00][..], // lgdt, lidt: TABLES
        &[0xbc, 0x00, 0x00, 0x30, 0x00],                                                           // mov esp, 0x300000
        // The master 8259: vectors from 0x20, ICW3 and ICW4, only line 0 allowed.
        &[0xb0, 0x11, 0xe6, 0x20, 0xb0, 0x20, 0xe6, 0x21, 0xb0, 0x04, 0xe6, 0x21, 0xb0, 0x01, 0xe6, 0x21],
        &[0xb0, 0xfe, 0xe6, 0x21],
        // The PIT: channel 0, mode 2, 11932 ticks.
        &[0xb0, 0x34, 0xe6, 0x43, 0xb0, 0x9c, 0xe6, 0x40, 0xb0, 0x2e, 0xe6, 0x40],
        &[0xfb, 0xf4, 0xeb, 0xfd], // sti; hlt; jmp to hlt
    ]
    .concat();
    code.resize(HANDLER, 0);
    // mov dx, 0x3f8; mov al, '.'; out dx, al; mov al, '\n'; out dx, al; end of interrupt; and without IRET, which not
    // every KVM knows outside of long mode: add esp, 12; sti; hlt; jmp to hlt
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xb0, b'\n', 0xee, 0xb0, 0x20, 0xe6, 0x20]);
    code.extend([0x83, 0xc4, 0x0c, 0xfb, 0xf4, 0xeb, 0xfd]);
    code.resize(TABLES, 0);
    let table = |at: usize, limit: u16| [&limit.to_le_bytes()[..], &(ENTRY as u32 + at as u32).to_le_bytes()].concat();
    code.extend([table(GDT, 0x1f), vec![0; 2], table(IDT, 8 * VECTOR as u16 + 7), vec![0; 2]].concat());
    code.extend([0; 16]);
    code.extend([0x00cf_9b00_0000_ffffu64, 0x00cf_9300_0000_ffff].map(u64::to_le_bytes).concat());
    code.resize(IDT + 8 * VECTOR, 0);
    let handler = (ENTRY as u32 + HANDLER as u32).to_le_bytes();
    code.extend([handler[0], handler[1], 0x10, 0, 0, 0x8e, handler[2], handler[3]]);
    let machine = |kernel: Option<Kernel>| {
        let console = Console::default();
        let config = MachineConfig {
            memory: 32 << 20,
            bios: vec![0; 64 << 10],
            kernel,
            split_irqchip,
            serial: Box::new(console.clone()),
            ..MachineConfig::default()
        };
        (Machine::new(config).unwrap(), console)
    };
    let ticks = |console: &Console, least: usize| {
        let lines = console.wait_for("ticks", |lines| (lines.len() >= least).then(|| lines.to_vec()));
        assert!(lines.iter().all(|line| line == "."), "{lines:?}");
    };
    let (source, console) = machine(Some(Kernel { image: elf(code), ..Kernel::default() }));
    source.resume().unwrap();
    ticks(&console, 30);
    source.pause();
    let (destination, console) = machine(None);
    copy_ram(source.memory(), destination.memory());
    destination.load_state(&source.save_state().unwrap()).unwrap();
    let start = Instant::now();
    destination.resume().unwrap();
    ticks(&console, 30);
    assert!(start.elapsed() > Duration::from_millis(200), "30 ticks in {:?}", start.elapsed());
}

fn with_a_split_irqchip_stays_healthy() {
    let guest = Guest::with(32 << 20, 2, "dirty=1M hold=1M zero=1M report=20", true);
    guest.machine.resume().unwrap();
    guest.assert_healthy();
    guest.machine.pause();
    let next = Guest::with(32 << 20, 2, "", true);
    copy_ram(guest.machine.memory(), next.machine.memory());
    next.machine.load_state(&guest.machine.save_state().unwrap()).unwrap();
    next.machine.resume().unwrap();
    next.assert_healthy();
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
