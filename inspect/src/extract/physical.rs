//! Which RAM blocks are guest-physical memory, and where.

use super::piece::Piece;
use super::{Guest, Tables};
use crate::failure::{Error, printable};
use crate::ram::GuestRam;
use crate::size::size;
use qevm_savevm::guest_memory::{
    Segment, cmos_fits, fixed_segments, is_rom_or_device, main_block, memory_in_cmos, segments,
};

/// The machine type of streams without configuration section, which those of types up to 2.3 have not: `pc` places
/// memory as all of them do, up to the size at which their holes differ.
const WITHOUT_CONFIGURATION: &str = "pc-i440fx-2.3";
/// Up to here all machine types of x86 place all memory at 0.
const BELOW_ALL_HOLES: u64 = 2 << 30;
/// More blocks are not tried in all combinations.
const MAX_TRIED: usize = 12;

/// ELF's numbers of processors whose `virt` machines have names that do not tell which they are.
const EM_ARM: u16 = 40;
const EM_AARCH64: u16 = 183;
const EM_RISCV: u16 = 243;
/// Machine types of other targets than x86 whose main memory may be memory backends, and the RAM block of which these
/// take the place. For `virt` the processor tells it.
const BACKENDS: [(&str, &str); 3] = [("virt", ""), (PSERIES, "ppc_spapr.ram"), ("s390-ccw-virtio", "s390.ram")];
const PSERIES: &str = "pseries";

const NO_REGISTERS: &str = "the stream tells no registers of a target that cores are written of";

/// A RAM block of guest-physical memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryBlock {
    /// Its name.
    pub name: String,
    /// Where it lies; otherwise it is a part of the main memory.
    pub address: Option<u64>,
}

/// Guest-physical memory: its pieces, and what is in none of them.
#[derive(Debug)]
pub struct PhysicalMemory {
    /// The pieces, in order of their addresses.
    pub segments: Vec<Piece>,
    /// The RAM blocks that are memory devices.
    pub devices: Vec<usize>,
    /// Remarks on how the blocks were found.
    pub notes: Vec<String>,
    /// One line for each block of memory that is not in any piece.
    pub left_out: Vec<String>,
}

impl PhysicalMemory {
    /// Places the RAM blocks of a `machine` in guest-physical memory. `wanted`, unless it is empty, says which blocks
    /// are the main memory, in order, and where others lie. `tables`: what the guest's ACPI tables tell of memory
    /// devices.
    ///
    /// # Errors
    /// [`Error::Usage`] for machine types without known rules, blocks that are not there, and guests of which it is not
    /// known which blocks are their main memory.
    pub fn find(
        machine: &str,
        ram: &GuestRam,
        guest: &Guest,
        tables: &Tables,
        wanted: &[MemoryBlock],
    ) -> Result<Self, Error> {
        let mut notes = Vec::new();
        let mut pieces = Vec::new();
        let mut main = Vec::new();
        for MemoryBlock { name, address } in wanted {
            let found = ram.blocks().iter().position(|block| block.name == *name);
            let block =
                found.ok_or_else(|| Error::Usage(format!("no RAM block '{name}': the blocks are {}", names(ram))))?;
            match address {
                Some(address) => pieces.push(whole(ram, block, *address)),
                None => main.push(block),
            }
        }
        if main.is_empty() && pieces.is_empty() {
            main = main_memory(machine, ram, guest, &mut notes)?;
        }
        let placed: Option<Vec<_>> = main.iter().map(|&block| Some((block, fixed(machine, ram, block)?))).collect();
        if let Some(placed) = placed {
            for (block, segments) in placed {
                let piece = |Segment { address, block_offset, len }| Piece { block, address, block_offset, len };
                pieces.extend(segments.into_iter().map(piece));
            }
        } else if !main.is_empty() {
            let machine = known_machine(machine, ram, &main, guest, &mut notes)?;
            pieces.extend(mapped(machine, ram, &main, guest, &mut notes)?);
        }
        // The main memory is none, even if it was not asked for.
        let device = |block: &usize| main_block(machine) != Some(ram.blocks()[*block].name.as_str());
        let left: Vec<usize> = without_place(ram, &pieces).filter(device).collect();
        let above_4g = pieces.iter().map(|piece| piece.address + piece.len).max().unwrap_or(0);
        let (devices, remarks) = guest.memory_devices.place(machine, ram, &left, tables, above_4g);
        notes.extend(remarks);
        let device_blocks = devices.iter().map(|piece| piece.block).collect();
        pieces.extend(devices);
        pieces.sort_by_key(|piece| piece.address);
        let mut pairs = pieces.iter().zip(pieces.iter().skip(1));
        if let Some((a, b)) = pairs.find(|(a, b)| a.address.saturating_add(a.len) > b.address) {
            let name = |piece: &Piece| ram.blocks()[piece.block].name.clone();
            return Err(Error::Usage(format!(
                "RAM blocks '{}' and '{}' overlap at {:#x}",
                name(a),
                name(b),
                b.address
            )));
        }
        let left_out = left_out(ram, &pieces);
        Ok(PhysicalMemory { segments: pieces, devices: device_blocks, notes, left_out })
    }

    /// What is needed for an ELF core or a kdump-compressed file: a guest of x86, or the registers of one of another
    /// target, which tell which it is.
    ///
    /// # Errors
    /// [`Error::Usage`], which names the `machine` and what is wrong with the registers; or memory that a core of 32
    /// bits has no addresses for.
    pub fn require_core(&self, machine: &str, ram: &GuestRam, guest: &Guest) -> Result<(), Error> {
        let Some(first) = guest.other_cpus.first() else {
            let why = guest.other_unread.first().map_or(NO_REGISTERS, String::as_str);
            return match self.is_other_target(machine, ram) {
                true => Err(Error::Usage(format!(
                    "no core can be written for machine type '{machine}': {why}; use --memory or --ram"
                ))),
                false => Ok(()),
            };
        };
        let end = self.segments.last().map_or(0, |last| last.address.saturating_add(last.len));
        match first.format.narrow && end > 1 << 32 {
            true => Err(Error::Usage(format!(
                "memory up to {end:#x} has no place in a core of a 32-bit guest: use --memory or --ram"
            ))),
            false => Ok(()),
        }
    }

    /// True if the memory is that of a target other than x86.
    pub fn is_other_target(&self, machine: &str, ram: &GuestRam) -> bool {
        let has_rules = |(name, _): &(&str, &str)| of_type(machine, name);
        BACKENDS.iter().any(has_rules) || self.segments.iter().any(|piece| fixed(machine, ram, piece.block).is_some())
    }
}

/// `virt-10.0` is of type `virt`, and so is `virt`.
fn of_type(machine: &str, name: &str) -> bool {
    machine.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// The RAM block that the memory backends of a machine of another target than x86 take the place of.
fn instead_of(machine: &str, guest: &Guest) -> Option<&'static str> {
    let (_, block) = BACKENDS.iter().find(|(name, _)| of_type(machine, name))?;
    match guest.other_cpus.first().map(|cpu| cpu.format.machine) {
        _ if !block.is_empty() => Some(block),
        Some(EM_ARM | EM_AARCH64) => Some("mach-virt.ram"),
        Some(EM_RISCV) => Some("riscv_virt_board.ram"),
        _ => None,
    }
}

fn whole(ram: &GuestRam, block: usize, address: u64) -> Piece {
    Piece { block, address, block_offset: 0, len: ram.blocks()[block].used_length }
}

/// Where a block lies that is the main memory of a machine that is no PC.
fn fixed(machine: &str, ram: &GuestRam, block: usize) -> Option<Vec<Segment>> {
    let block = &ram.blocks()[block];
    fixed_segments(machine, &block.name, block.used_length)
}

fn names(ram: &GuestRam) -> String {
    let names: Vec<String> = ram.blocks().iter().map(|block| printable(&block.name)).collect();
    names.join(", ")
}

/// The RAM blocks of memory of which no piece is.
fn without_place<'r>(ram: &'r GuestRam, pieces: &'r [Piece]) -> impl Iterator<Item = usize> + 'r {
    let blocks = ram.blocks().iter().enumerate();
    let without = blocks
        .filter(|(index, block)| !is_rom_or_device(&block.name) && pieces.iter().all(|piece| piece.block != *index));
    without.map(|(index, _)| index)
}

fn left_out(ram: &GuestRam, pieces: &[Piece]) -> Vec<String> {
    let blocks = without_place(ram, pieces).map(|index| &ram.blocks()[index]);
    blocks
        .map(|block| {
            format!(
                "left out: RAM block '{}', {}: where it lies (a DIMM or NVDIMM?) is not known; \
                 --memory-block '{}@ADDRESS' tells, as `info memory-devices` has it",
                printable(&block.name),
                size(block.used_length),
                printable(&block.name)
            )
        })
        .collect()
}

/// The blocks that are the main memory, in the order of their addresses.
fn main_memory(machine: &str, ram: &GuestRam, guest: &Guest, notes: &mut Vec<String>) -> Result<Vec<usize>, Error> {
    let blocks = ram.blocks();
    let by_default = |name: &str| main_block(machine) == Some(name) || machine.is_empty() && name == "pc.ram";
    if let Some(block) = blocks.iter().position(|block| by_default(&block.name)) {
        return Ok(vec![block]);
    }
    let fixed: Vec<usize> = (0..blocks.len()).filter(|&block| fixed(machine, ram, block).is_some()).collect();
    if !fixed.is_empty() {
        return Ok(fixed);
    }
    if main_block(machine).is_none() && instead_of(machine, guest).is_none() {
        let message = "no rules for the memory map of machine type";
        return Err(Error::Usage(format!(
            "{message} '{machine}': use --ram, or place the blocks with --memory-block NAME@ADDRESS; they are {}",
            names(ram)
        )));
    }
    // A memory backend for all, or one for each NUMA node, with names that the operator chose.
    let mut candidates: Vec<usize> =
        (0..blocks.len()).filter(|&block| !is_rom_or_device(&blocks[block].name)).collect();
    candidates.sort_by_cached_key(|&block| natural(&blocks[block].name));
    // Without DIMMs, which lie elsewhere, all of several backends are NUMA nodes. A pseries tells of no DIMMs.
    let tells_dimms = main_block(machine).is_none() && !of_type(machine, PSERIES);
    let all_are_nodes = tells_dimms && guest.memory_devices.dimms() == 0;
    let in_cmos = guest.cmos.as_deref().and_then(memory_in_cmos);
    let chosen = match in_cmos {
        _ if candidates.len() == 1 || all_are_nodes => Some(candidates.clone()),
        Some(total) => only_sum(ram, &candidates, total),
        None => None,
    };
    let chosen = chosen.filter(|chosen| !chosen.is_empty()).ok_or_else(|| {
        Error::Usage(format!(
            "which RAM blocks are the main memory of '{machine}' is not known: name them with --memory-block, in the order of \
             the NUMA nodes; the blocks are {}",
            names(ram)
        ))
    })?;
    let listed: Vec<String> = chosen.iter().map(|&block| printable(&blocks[block].name)).collect();
    let order = if chosen.len() > 1 { ", in the order of their names (--memory-block tells another)" } else { "" };
    notes.push(format!("main memory: {}{order}", listed.join(", ")));
    Ok(chosen)
}

/// `ram-node2` before `ram-node10`: digits as numbers.
fn natural(name: &str) -> Vec<(String, u64)> {
    let mut parts = vec![(String::new(), 0u64)];
    let mut in_number = false;
    for c in name.chars() {
        match c.to_digit(10) {
            Some(digit) => {
                if let Some((_, number)) = parts.last_mut() {
                    *number = number.saturating_mul(10).saturating_add(digit.into());
                }
            }
            None if in_number => parts.push((c.into(), 0)),
            None => parts.last_mut().into_iter().for_each(|(text, _)| text.push(c)),
        }
        in_number = c.is_ascii_digit();
    }
    parts
}

/// The only choice of `candidates` that has `total` bytes.
fn only_sum(ram: &GuestRam, candidates: &[usize], total: u64) -> Option<Vec<usize>> {
    let len = |block: usize| ram.blocks()[block].used_length;
    if candidates.iter().fold(0u64, |sum, &block| sum.saturating_add(len(block))) == total {
        return Some(candidates.to_vec());
    }
    if candidates.len() > MAX_TRIED {
        return None;
    }
    let choice = |bits: u32| (0..candidates.len()).filter(move |at| bits >> at & 1 != 0).map(|at| candidates[at]);
    let mut fitting = (1u32..1 << candidates.len())
        .filter(|&bits| choice(bits).fold(0u64, |sum, block| sum.saturating_add(len(block))) == total);
    let only = fitting.next()?;
    fitting.next().is_none().then(|| choice(only).collect())
}

/// The machine type whose rules hold.
fn known_machine<'a>(
    machine: &'a str,
    ram: &GuestRam,
    main: &[usize],
    guest: &Guest,
    notes: &mut Vec<String>,
) -> Result<&'a str, Error> {
    if !machine.is_empty() {
        return Ok(machine);
    }
    let total = total(ram, main);
    let cmos_tells = guest.cmos.as_deref().is_some_and(|cmos| memory_in_cmos(cmos) == Some(total));
    if total > BELOW_ALL_HOLES && !cmos_tells {
        let message = "the stream does not tell the machine type, and where the hole below 4 GiB starts depends on it";
        return Err(Error::Usage(format!("{message}: name it with --machine")));
    }
    notes.push("the stream does not tell the machine type: taken for a PC (--machine tells another)".into());
    Ok(WITHOUT_CONFIGURATION)
}

fn total(ram: &GuestRam, main: &[usize]) -> u64 {
    main.iter().fold(0, |sum, &block| sum.saturating_add(ram.blocks()[block].used_length))
}

/// The blocks one after the other, with the hole of the machine type where it is.
fn mapped(
    machine: &str,
    ram: &GuestRam,
    main: &[usize],
    guest: &Guest,
    notes: &mut Vec<String>,
) -> Result<Vec<Piece>, Error> {
    let total = total(ram, main);
    let backends = || fixed_segments(machine, instead_of(machine, guest)?, total);
    let stretches = segments(machine, total, guest.cmos.as_deref()).or_else(backends).ok_or_else(|| {
        let message = "no rules for the memory map of machine type";
        Error::Usage(format!("{message} '{machine}': use --ram, or place the blocks with --memory-block NAME@ADDRESS"))
    })?;
    if let Some(cmos) = guest.cmos.as_deref().filter(|cmos| !cmos_fits(cmos, total)) {
        let told = memory_in_cmos(cmos).map_or("nothing".into(), size);
        notes.push(format!(
            "the guest's CMOS tells of {told} of memory and the RAM blocks of {}: it is not followed",
            size(total)
        ));
    }
    let mut pieces = Vec::new();
    let mut start = 0;
    for &block in main {
        let end = start + ram.blocks()[block].used_length;
        for Segment { address, block_offset, len } in &stretches {
            let (from, to) = (start.max(*block_offset), end.min(block_offset + len));
            if from < to {
                let (address, block_offset, len) = (address + (from - block_offset), from - start, to - from);
                pieces.push(Piece { block, address, block_offset, len });
            }
        }
        start = end;
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::super::CpuNotes;
    use super::super::elf_core::Format;
    use super::*;
    use crate::ram::tests::of_mib as ram;

    const MIB: u64 = 1 << 20;

    fn guest(low: u64, high: u64) -> Guest {
        let mut cmos = vec![0; 128];
        cmos[0x34..0x36].copy_from_slice(&((((low - 16) * MIB) >> 16) as u16).to_le_bytes());
        cmos[0x5b..0x5e].copy_from_slice(&(((high * MIB) >> 16) as u32).to_le_bytes()[..3]);
        Guest { cmos: Some(cmos), ..Guest::default() }
    }

    fn at(map: &PhysicalMemory) -> Vec<(usize, u64, u64, u64)> {
        map.segments.iter().map(|p| (p.block, p.address / MIB, p.block_offset / MIB, p.len / MIB)).collect()
    }

    #[test]
    fn nodes_go_over_the_hole_in_the_order_of_their_numbers() {
        let names: Vec<String> = (0..12).map(|node| format!("ram-node{node}")).collect();
        let mut blocks: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 512)).collect();
        // QEMU lists blocks by length, whatever node they are of.
        blocks.reverse();
        let map =
            PhysicalMemory::find("pc-q35-10.0", &ram(&blocks), &guest(2048, 4096), &Tables::default(), &[]).unwrap();
        let places: Vec<(usize, u64)> = map.segments.iter().map(|p| (11 - p.block, p.address / MIB)).collect();
        let expected = (0..4).map(|node| (node, node as u64 * 512));
        assert_eq!(
            places,
            expected.chain((4..12).map(|node| (node, 4096 + (node as u64 - 4) * 512))).collect::<Vec<_>>()
        );
        assert!(map.left_out.is_empty());
        // A node that the hole goes through.
        let odd = ram(&[("a1", 3000), ("a0", 1000), ("pc.bios", 1)]);
        let map = PhysicalMemory::find("pc-q35-10.0", &odd, &guest(2048, 1952), &Tables::default(), &[]).unwrap();
        assert_eq!(at(&map), [(1, 0, 0, 1000), (0, 1000, 0, 1048), (0, 4096, 1048, 1952)]);
    }

    #[test]
    fn memory_devices_are_named_unless_they_are_placed() {
        let ram = ram(&[("d0", 128), ("mem0", 64), ("/rom@etc/acpi/tables", 1), ("0000:00:02.0/vga.vram", 16)]);
        let map = PhysicalMemory::find("pc-q35-11.1", &ram, &guest(64, 0), &Tables::default(), &[]).unwrap();
        assert_eq!(at(&map), [(1, 0, 0, 64)]);
        assert!(matches!(&map.left_out[..], [line] if line.contains("'d0', 128 MiB")), "{:?}", map.left_out);
        let named = |name: &str, address| MemoryBlock { name: name.into(), address };
        let wanted = [named("mem0", None), named("d0", Some(4096 * MIB))];
        let map = PhysicalMemory::find("pc-q35-11.1", &ram, &guest(64, 0), &Tables::default(), &wanted).unwrap();
        assert_eq!((at(&map), map.left_out.len()), (vec![(1, 0, 0, 64), (0, 4096, 0, 128)], 0));
        let wanted = [named("mem0", None), named("d0", Some(MIB))];
        assert!(
            PhysicalMemory::find("pc-q35-11.1", &ram, &guest(64, 0), &Tables::default(), &wanted).is_err(),
            "overlap"
        );
    }

    /// Addresses of `info mtree -f` of QEMU 11.1.
    #[test]
    fn nodes_of_other_targets_follow_one_another() {
        let with_cpu = |machine| {
            let format = Format { machine, big_endian: false, narrow: false };
            let cpu = CpuNotes { format, notes: Vec::new(), left_out: None };
            Guest { other_cpus: vec![cpu], ..Guest::default() }
        };
        let nodes = ram(&[("b10", 64), ("b9", 128), ("virt.flash0", 64)]);
        let find = |machine, ram, guest: &_| PhysicalMemory::find(machine, ram, guest, &Tables::default(), &[]);
        for (machine, processor, mib) in [("virt-11.1", EM_AARCH64, 1024), ("virt", EM_RISCV, 2048)] {
            let map = find(machine, &nodes, &with_cpu(processor)).unwrap();
            assert_eq!(at(&map), [(1, mib, 0, 128), (0, mib + 128, 0, 64)], "{machine}");
            assert!(map.is_other_target(machine, &nodes) && map.left_out.is_empty());
        }
        let one = ram(&[("mem0", 64)]);
        assert_eq!(at(&find("s390-ccw-virtio-11.1", &one, &Guest::default()).unwrap()), [(0, 0, 0, 64)]);
        assert_eq!(at(&find("pseries-11.1", &one, &Guest::default()).unwrap()), [(0, 0, 0, 64)]);
        // Which processor a `virt` has is not known; the second could be a DIMM of a pseries.
        assert!(find("virt-11.1", &one, &Guest::default()).is_err());
        assert!(find("pseries-11.1", &ram(&[("mem0", 64), ("mem1", 64)]), &Guest::default()).is_err());
    }

    #[test]
    fn what_is_doubtful_is_asked_for() {
        // Two blocks of the same length: either could be the main memory.
        let twice = ram(&[("a", 64), ("b", 64)]);
        assert!(PhysicalMemory::find("pc-q35-11.1", &twice, &guest(64, 0), &Tables::default(), &[]).is_err());
        assert!(PhysicalMemory::find("strange", &twice, &Guest::default(), &Tables::default(), &[]).is_err());
        let large = ram(&[("pc.ram", 3000)]);
        assert!(
            PhysicalMemory::find("", &large, &Guest::default(), &Tables::default(), &[]).is_err(),
            "the hole depends on the type"
        );
        let map = PhysicalMemory::find("", &large, &guest(2048, 952), &Tables::default(), &[]).unwrap();
        assert_eq!(at(&map), [(0, 0, 0, 2048), (0, 4096, 2048, 952)]);
        // A CMOS that the guest has changed is not followed, and that is said.
        let map = PhysicalMemory::find("pc-q35-11.1", &ram(&[("pc.ram", 64)]), &guest(32, 0), &Tables::default(), &[])
            .unwrap();
        assert_eq!((at(&map), map.notes.len()), (vec![(0, 0, 0, 64)], 1));
    }
}
