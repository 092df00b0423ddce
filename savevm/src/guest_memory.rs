//! Where the bytes of the main RAM block are in guest-physical memory.
//!
//! A stream names RAM blocks and offsets in them, not guest-physical addresses. x86 machines cut their one RAM block in
//! two: the first part starts at address 0, the rest goes on at 4 GiB, and the hole between them is for devices. Where
//! the cut is follows from the machine type and the size, unless the operator moved it (`max-ram-below-4g`); the size
//! of the low part is also in the guest's CMOS, which a stream of `pc` and `q35` carries and which therefore wins.

mod boards;

use qevm_wire::QemuVersion;
use qevm_wire::profile::machine_version;

/// One stretch of guest-physical memory and the part of the RAM block that backs it. Addresses and lengths in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of the first byte.
    pub address: u64,
    /// Offset of that byte in the RAM block.
    pub block_offset: u64,
    /// Length of the stretch.
    pub len: u64,
}

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// CMOS registers, little-endian, in units of 64 KiB: memory between 16 MiB and 4 GiB.
const CMOS_ABOVE_16M: core::ops::RangeInclusive<usize> = 0x34..=0x35;

/// CMOS registers, little-endian, in units of 1 KiB: memory between 1 MiB and 64 MiB.
const CMOS_ABOVE_1M: core::ops::RangeInclusive<usize> = 0x30..=0x31;
/// CMOS registers, little-endian, in units of 64 KiB: memory above 4 GiB.
const CMOS_ABOVE_4G: core::ops::RangeInclusive<usize> = 0x5b..=0x5d;

/// Main memory that is one piece in the guest, by the name of its RAM block, and its guest-physical address. Measured
/// (`info mtree -f`).
const WHOLE: [(&str, u64); 15] = [
    ("mach-virt.ram", 0x4000_0000),
    ("sbsa-ref.ram", 0x100_0000_0000),
    ("riscv_virt_board.ram", 0x8000_0000),
    ("riscv.spike.ram", 0x8000_0000),
    ("riscv.sifive.u.ram", 0x8000_0000),
    ("s390.ram", 0),
    ("ppc_spapr.ram", 0),
    ("ppc_core99.ram", 0),
    ("ppc_heathrow.ram", 0),
    ("mpc8544ds.ram", 0),
    ("sun4m.ram", 0),
    ("sun4u.ram", 0),
    ("m68k_virt.ram", 0),
    ("openrisc.ram", 0),
    ("petalogix_s3adsp1800.ram", 0x9000_0000),
];

/// Machine types whose main memory is at 0 in a RAM block that is only called `ram`: Alpha, HPPA.
const NAMELESS: [&str; 5] = ["clipper", "715", "A400", "B160L", "C3700"];

/// Where the main memory of machines that are no PCs lies, `len` bytes long, by the name of its RAM block: machine
/// types of different targets have the same name (`virt`), these blocks have not. `None` for all other blocks.
///
/// A part of the block can lie at two addresses: Malta boards have the whole at 2 GiB once more. Machine types may have
/// several blocks; of about a hundred boards all are known, and larger memory than was measured there has no place.
///
/// ```
/// use qevm_savevm::guest_memory::fixed_segments;
///
/// let memory = fixed_segments("virt", "loongarch.ram", 1 << 30).unwrap();
/// assert_eq!((memory[1].address, memory[1].block_offset), (0x8000_0000, 0x1000_0000));
/// assert_eq!(fixed_segments("pc-q35-10.0", "pc.ram", 1 << 30), None);
/// ```
pub fn fixed_segments(machine: &str, block: &str, len: u64) -> Option<Vec<Segment>> {
    /// Address, offset in the block, and how much is there at most.
    type Place = (u64, u64, u64);
    let address = WHOLE.iter().find(|(name, _)| *name == block).map(|(_, address)| *address);
    let address = address.or((block == "ram" && NAMELESS.contains(&machine)).then_some(0));
    let whole;
    let places: &[Place] = match (address, block) {
        (Some(address), _) => {
            whole = [(address, 0, u64::MAX)];
            &whole
        }
        (None, "loongarch.ram") => &[(0, 0, 256 * MIB), (0x8000_0000, 256 * MIB, u64::MAX)],
        (None, "mips_malta.ram") => &[(0, 0, 256 * MIB), (512 * MIB, 512 * MIB, 1536 * MIB), (0x8000_0000, 0, 2 * GIB)],
        (None, _) => return boards::segments(machine, block, len),
    };
    let segment = |&(address, block_offset, most): &Place| {
        let len = len.checked_sub(block_offset).filter(|len| *len > 0)?.min(most);
        Some(Segment { address, block_offset, len })
    };
    Some(places.iter().filter_map(segment).collect())
}

/// True for RAM blocks that are no main memory and no memory device, by the names that QEMU gives them: firmware, ROMs,
/// flash, the memory of display devices and the files of `fw_cfg`.
///
/// ```
/// use qevm_savevm::guest_memory::is_rom_or_device;
///
/// assert!(is_rom_or_device("/rom@etc/acpi/tables") && is_rom_or_device("0000:00:02.0/vga.vram"));
/// assert!(!is_rom_or_device("ram-node0") && !is_rom_or_device("/objects/mem0"));
/// ```
pub fn is_rom_or_device(block: &str) -> bool {
    let of_device = block.contains('/') && !block.starts_with("/objects/");
    let endings = [".rom", ".mrom", ".prom", ".bios", ".vram", ".flash0", ".flash1", ".flash"];
    of_device
        || endings.iter().any(|ending| block.ends_with(ending))
        || block == "vga.vram"
        || block.starts_with("bios.")
}

/// Name of the RAM block that is the main memory of `machine` by default; `None` for machine types this module has no
/// rules for.
///
/// ```
/// assert_eq!(qevm_savevm::guest_memory::main_block("pc-q35-10.0"), Some("pc.ram"));
/// assert_eq!(qevm_savevm::guest_memory::main_block("virt-10.0"), None);
/// ```
pub fn main_block(machine: &str) -> Option<&'static str> {
    Some(match family(machine)? {
        Family::Microvm => "microvm.ram",
        Family::I440fx | Family::Q35 | Family::Isapc => "pc.ram",
    })
}

/// Maps the main RAM block, `ram_len` bytes long, into the guest-physical memory of `machine` (the name the stream
/// carries). `cmos` is the content of the RTC's CMOS where the stream has it (section `mc146818rtc`, 128 bytes).
///
/// A CMOS is the guest's word: one that contradicts `ram_len` is not followed ([`cmos_fits`]).
///
/// `None` for machine types without rules here. Sources: QEMU's documentation of `max-ram-below-4g` and real `pc`,
/// `q35` and `microvm` guests of 5.2 to 11.1. Not covered: memory devices (`pc-dimm`, `virtio-mem`), and `pc` guests of
/// about 1 TiB on AMD hosts, whose high part starts at 1 TiB since 7.1.
///
/// ```
/// use qevm_savevm::guest_memory::{Segment, segments};
///
/// // q35 keeps 2 GiB below its hole as soon as the guest has 2.75 GiB.
/// let gib = 1 << 30;
/// assert_eq!(
///     segments("pc-q35-10.0", 4 * gib, None).unwrap(),
///     [
///         Segment { address: 0, block_offset: 0, len: 2 * gib },
///         Segment { address: 4 * gib, block_offset: 2 * gib, len: 2 * gib },
///     ]
/// );
/// ```
pub fn segments(machine: &str, ram_len: u64, cmos: Option<&[u8]>) -> Option<Vec<Segment>> {
    let low = cmos
        .and_then(|cmos| low_memory_from_cmos(cmos, ram_len))
        .unwrap_or(low_memory_limit(family(machine)?, machine, ram_len))
        .min(ram_len);
    let mut segments = Vec::with_capacity(2);
    if low > 0 {
        segments.push(Segment { address: 0, block_offset: 0, len: low });
    }
    if ram_len > low {
        segments.push(Segment { address: 4 * GIB, block_offset: low, len: ram_len - low });
    }
    Some(segments)
}

#[derive(Clone, Copy)]
enum Family {
    Microvm,
    I440fx,
    Q35,
    Isapc,
}

fn family(machine: &str) -> Option<Family> {
    match machine {
        "microvm" => Some(Family::Microvm),
        "isapc" => Some(Family::Isapc),
        m if m == "q35" || m.starts_with("pc-q35-") => Some(Family::Q35),
        m if m == "pc" || m.starts_with("pc-") => Some(Family::I440fx),
        _ => None,
    }
}

/// Where the hole below 4 GiB starts by default. Types before 2.0 did not round the cut to whole GiB.
fn low_memory_limit(family: Family, machine: &str, ram_len: u64) -> u64 {
    let rounds = machine_version(machine).is_none_or(|version| version >= QemuVersion::new(2, 0));
    let (full, rounded) = match family {
        Family::Q35 => (2816 * MIB, 2 * GIB),
        Family::I440fx | Family::Microvm => (3584 * MIB, 3 * GIB),
        Family::Isapc => return 3584 * MIB,
    };
    if rounds && ram_len >= full { rounded } else { full }
}

/// How much memory the CMOS tells of, without memory devices; `None` if it tells nothing.
pub fn memory_in_cmos(cmos: &[u8]) -> Option<u64> {
    if let Some((low, high)) = memory_from_cmos(cmos) {
        return Some(low + high);
    }
    let [low, high]: [u8; 2] = cmos.get(CMOS_ABOVE_1M)?.try_into().ok()?;
    let above_1m = u64::from(u16::from_le_bytes([low, high])) << 10;
    (above_1m > 0).then_some(MIB + above_1m)
}

/// False if the CMOS tells of other sizes than those of a main memory of `ram_len` bytes; true if it fits, or tells
/// nothing.
///
/// ```
/// let mut cmos = [0; 128];
/// assert!(qevm_savevm::guest_memory::cmos_fits(&cmos, 1 << 30));
/// cmos[0x34..0x36].copy_from_slice(&0x1000u16.to_le_bytes());
/// assert!(!qevm_savevm::guest_memory::cmos_fits(&cmos, 1 << 30));
/// ```
pub fn cmos_fits(cmos: &[u8], ram_len: u64) -> bool {
    memory_from_cmos(cmos).is_none_or(|(low, high)| low + high == ram_len)
}

/// The size of the low part as the firmware's CMOS tells it, if it makes sense for `ram_len` bytes of memory.
fn low_memory_from_cmos(cmos: &[u8], ram_len: u64) -> Option<u64> {
    memory_from_cmos(cmos).filter(|(low, high)| low + high == ram_len).map(|(low, _)| low)
}

/// The sizes of both parts as the CMOS tells them.
fn memory_from_cmos(cmos: &[u8]) -> Option<(u64, u64)> {
    let [low, high]: [u8; 2] = cmos.get(CMOS_ABOVE_16M)?.try_into().ok()?;
    let above_16m = u64::from(u16::from_le_bytes([low, high])) << 16;
    let [a, b, c]: [u8; 3] = cmos.get(CMOS_ABOVE_4G)?.try_into().ok()?;
    let above_4g = u64::from(u32::from_le_bytes([a, b, c, 0])) << 16;
    // Zero means less than 16 MiB, or a machine that does not fill these registers.
    (above_16m > 0).then_some((16 * MIB + above_16m, above_4g))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn low(machine: &str, ram_len: u64) -> u64 {
        segments(machine, ram_len, None).unwrap()[0].len
    }

    #[test]
    fn small_guests_have_no_hole() {
        for machine in ["microvm", "pc-i440fx-10.0", "pc-q35-10.0", "isapc"] {
            let all = segments(machine, 512 * MIB, None).unwrap();
            assert_eq!(all, [Segment { address: 0, block_offset: 0, len: 512 * MIB }], "{machine}");
        }
        assert!(segments("pc-q35-10.0", 0, None).unwrap().is_empty());
    }

    #[test]
    fn the_cut_depends_on_type_and_size() {
        assert_eq!(low("pc-q35-10.0", 2816 * MIB - 4096), 2816 * MIB - 4096);
        assert_eq!(low("pc-q35-10.0", 2816 * MIB), 2 * GIB);
        assert_eq!(low("pc-i440fx-10.0", 3584 * MIB), 3 * GIB);
        assert_eq!(low("pc-i440fx-1.7", 8 * GIB), 3584 * MIB);
        assert_eq!(low("microvm", 8 * GIB), 3 * GIB);
    }

    #[test]
    fn cmos_wins_where_it_makes_sense() {
        let mut cmos = [0; 128];
        cmos[0x34..=0x35].copy_from_slice(&(((GIB - 16 * MIB) >> 16) as u16).to_le_bytes());
        cmos[0x5b..=0x5d].copy_from_slice(&(((3 * GIB) >> 16) as u32).to_le_bytes()[..3]);
        let moved = segments("pc-q35-10.0", 4 * GIB, Some(&cmos)).unwrap();
        assert_eq!(moved[0].len, GIB);
        assert_eq!(moved[1], Segment { address: 4 * GIB, block_offset: GIB, len: 3 * GIB });
        // The two parts are not what there is: not a CMOS of this guest.
        assert_eq!(segments("pc-q35-10.0", 8 * GIB, Some(&cmos)).unwrap()[0].len, 2 * GIB);
        assert_eq!(segments("pc-q35-10.0", 64 * MIB, Some(&cmos)).unwrap()[0].len, 64 * MIB);
        assert_eq!(segments("pc-q35-10.0", 4 * GIB, Some(&[])).unwrap()[0].len, 2 * GIB);
    }

    /// `info mtree -f` of QEMU 11.1.3 with 128 MiB, 512 MiB, 1 GiB and 2 GiB.
    #[test]
    fn other_targets_have_their_memory_where_qemu_says() {
        let map = |machine, block, len| -> Vec<(u64, u64, u64)> {
            let segments = fixed_segments(machine, block, len).unwrap().into_iter();
            segments.map(|segment| (segment.address, segment.block_offset, segment.len)).collect()
        };
        assert_eq!(map("virt", "loongarch.ram", 128 * MIB), [(0, 0, 128 * MIB)]);
        let low = (0, 0, 256 * MIB);
        assert_eq!(map("virt", "loongarch.ram", 512 * MIB), [low, (0x8000_0000, 256 * MIB, 256 * MIB)]);
        assert_eq!(map("virt", "loongarch.ram", 2 * GIB), [low, (0x8000_0000, 256 * MIB, 1792 * MIB)]);
        let small = [(0, 0, 128 * MIB), (0x8000_0000, 0, 128 * MIB)];
        assert_eq!(map("malta", "mips_malta.ram", 128 * MIB), small);
        let large = [low, (0x2000_0000, 512 * MIB, 512 * MIB), (0x8000_0000, 0, GIB)];
        assert_eq!(map("malta", "mips_malta.ram", GIB), large);
        assert_eq!(map("clipper", "ram", GIB), [(0, 0, GIB)]);
        assert_eq!(map("raspi1ap", "ram", 512 * MIB), [(0, 0, 512 * MIB)]);
        assert_eq!(map("ast2600-evb", "ram", GIB), [(0x8000_0000, 0, GIB)]);
        assert_eq!(map("netduino2", "STM32F205.sram", 128 << 10), [(0x2000_0000, 0, 128 << 10)]);
        assert_eq!(fixed_segments("raspi9", "ram", GIB), None);
    }

    #[test]
    fn unknown_machines_have_no_layout() {
        assert_eq!(segments("virt-10.0", GIB, None), None);
        assert_eq!(main_block("none"), None);
    }
}
