//! DIMMs, NVDIMMs and virtio-mem: where they lie in guest-physical memory.
//!
//! The section of a virtio-mem device has its address. The ACPI tables that QEMU gives to the firmware, a RAM block of
//! the stream, tell where memory devices may lie and where NVDIMMs do. The places of DIMMs are in no stream: QEMU puts
//! each, in the order in which they were made, at the first place that is free and large enough, unless `addr=` says
//! another.

use super::piece::Piece;
use crate::failure::printable;
use crate::ram::GuestRam;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::vmdesc::Node;
use std::io;

/// The RAM block with the ACPI tables.
const TABLES: &str = "/rom@etc/acpi/tables";
/// More of it is not read.
const TABLES_LIMIT: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
/// Memory backends are mapped to addresses that are multiples of this, and memory devices lie at such addresses.
const ALIGNMENT: u64 = 2 << 20;

/// What the device sections tell of memory devices.
#[derive(Debug, Clone, Default)]
pub struct MemoryDevices {
    /// Of each virtio-mem device, what the names of its section and of its RAM block start with, and its address and
    /// length.
    virtio: Vec<(String, u64, u64)>,
    /// How many slots have a DIMM.
    dimms: usize,
}

impl MemoryDevices {
    /// Takes note of the fields of a section.
    pub(super) fn note(&mut self, header: &SectionHeader, fields: &Node) {
        let idstr = header.idstr.to_string();
        let (path, device) = idstr.rsplit_once('/').unwrap_or(("", &idstr));
        match device {
            "virtio-mem-device-early" | "virtio-mem" => {
                if let Some((address, len)) = number(fields, "addr").zip(number(fields, "region_size")) {
                    self.virtio.push((format!("{path}/"), address, len));
                }
            }
            "ICH9LPC" | "piix4_pm" | "acpi-ged" => fields.leaves(&mut |path, leaf| {
                let enabled = path.ends_with(".is_enabled") && leaf.scalar().is_some_and(|value| value.as_u64() != 0);
                self.dimms += usize::from(enabled);
            }),
            _ => {}
        }
    }

    /// How many slots have a DIMM, as far as the stream tells.
    pub(super) fn dimms(&self) -> usize {
        self.dimms
    }

    /// Places the memory devices of a `machine` among the RAM blocks `left`, which no piece of memory has so far.
    /// `above_4g`: where the main memory ends. Gives remarks on what was assumed.
    pub(super) fn place(
        &self,
        machine: &str,
        ram: &GuestRam,
        left: &[usize],
        tables: &Tables,
        above_4g: u64,
    ) -> (Vec<Piece>, Vec<String>) {
        let (mut pieces, mut notes) = (Vec::new(), Vec::new());
        let mut left = left.to_vec();
        let len = |block: usize| ram.blocks()[block].used_length;
        let name = |block: usize| printable(&ram.blocks()[block].name);
        for (path, address, bytes) in &self.virtio {
            let is = |block: &usize| ram.blocks()[*block].name.starts_with(path.as_str()) && len(*block) == *bytes;
            if let Some(block) = (0..ram.blocks().len()).find(is) {
                left.retain(|&other| other != block);
                pieces.push(Piece { block, address: *address, block_offset: 0, len: *bytes });
            }
        }
        for &(address, bytes) in &tables.nvdimms {
            let fitting: Vec<usize> = left.iter().copied().filter(|&block| len(block) == bytes).collect();
            let Some(&block) = fitting.first() else { continue };
            if fitting.len() > 1 {
                notes.push(format!(
                    "NVDIMM at {address:#x}: assumed to be the first of several RAM blocks of its length, '{}' \
                     (--memory-block tells another)",
                    name(block)
                ));
            }
            left.retain(|&other| other != block);
            pieces.push(Piece { block, address, block_offset: 0, len: bytes });
        }
        // A pseries tells of no slots, and has no other memory devices; they may lie right behind the main memory.
        let (dimms, lowest) = match machine == "pseries" || machine.starts_with("pseries-") {
            true => (left.len(), 0),
            false => (self.dimms, 4 * GIB),
        };
        // Only if every block that is left is a DIMM is it known which are.
        if dimms == 0 || dimms != left.len() {
            return (pieces, notes);
        }
        let Some(order) = order(ram, &left) else { return (pieces, notes) };
        let base = tables.device_memory.unwrap_or_else(|| above_4g.max(lowest).next_multiple_of(GIB));
        for block in order {
            let address = free(base, len(block), &pieces);
            pieces.push(Piece { block, address, block_offset: 0, len: len(block) });
            notes.push(format!(
                "DIMM '{}' at {address:#x}: where QEMU puts it unless addr= says another (--memory-block tells another)",
                name(block)
            ));
        }
        (pieces, notes)
    }
}

/// The order in which the blocks were made: equally long ones come in it; of others only names tell that have a number
/// at their end and are alike before it.
fn order(ram: &GuestRam, blocks: &[usize]) -> Option<Vec<usize>> {
    let block = |index: usize| &ram.blocks()[index];
    if blocks.iter().all(|&index| block(index).used_length == block(blocks[0]).used_length) {
        return Some(blocks.to_vec());
    }
    let numbered = |index: usize| {
        let name = block(index).name.as_str();
        let text = name.trim_end_matches(|c: char| c.is_ascii_digit());
        Some((text, name[text.len()..].parse::<u64>().ok()?))
    };
    let mut order: Vec<((&str, u64), usize)> =
        blocks.iter().map(|&index| Some((numbered(index)?, index))).collect::<Option<_>>()?;
    order.sort();
    order
        .iter()
        .all(|((text, _), _)| *text == order[0].0.0)
        .then(|| order.into_iter().map(|(_, index)| index).collect())
}

/// The first place from `base` on for `len` bytes that no piece has.
fn free(base: u64, len: u64, pieces: &[Piece]) -> u64 {
    let mut taken: Vec<(u64, u64)> =
        pieces.iter().map(|piece| (piece.address, piece.address.saturating_add(piece.len))).collect();
    taken.sort_unstable();
    let mut address = base.next_multiple_of(ALIGNMENT);
    for (start, end) in taken {
        if start < address.saturating_add(len) && address < end {
            address = end.checked_next_multiple_of(ALIGNMENT).unwrap_or(end);
        }
    }
    address
}

/// The number at the only path that ends with this name.
fn number(fields: &Node, name: &str) -> Option<u64> {
    let mut found = None;
    fields.leaves(&mut |_, leaf| {
        if leaf.name == name && found.is_none() {
            found = leaf.scalar().map(|value| value.as_u64());
        }
    });
    found
}

/// What the ACPI tables tell of memory devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {
    /// Where memory devices may lie.
    device_memory: Option<u64>,
    /// Address and length of each NVDIMM.
    nvdimms: Vec<(u64, u64)>,
}

impl Tables {
    /// Reads them from the RAM block that has them, if there is one.
    ///
    /// # Errors
    /// If a temporary file cannot be read.
    pub fn read(ram: &mut GuestRam) -> io::Result<Self> {
        let Some(block) = ram.blocks().iter().position(|block| block.name == TABLES) else {
            return Ok(Self::default());
        };
        let len = ram.blocks()[block].used_length.min(TABLES_LIMIT);
        let page_size = ram.page_size() as usize;
        let mut bytes = vec![0; (len as usize).next_multiple_of(page_size)];
        for (offset, page) in (0..).step_by(page_size).zip(bytes.chunks_exact_mut(page_size)) {
            ram.read(block, offset, page)?;
        }
        Ok(Self::parse(&bytes))
    }

    /// The tables lie one after the other, with gaps for alignment.
    fn parse(bytes: &[u8]) -> Self {
        let places = (0..bytes.len().saturating_sub(HEADER)).filter(|at| bytes[*at..].starts_with(b"SRAT"));
        places.filter_map(|at| affinities(&bytes[at..])).next().unwrap_or_default()
    }
}

/// Header of a table, and what SRAT has reserved after it (ACPI 6.5, 5.2.6 and 5.2.16).
const HEADER: usize = 36;
const RESERVED: usize = 12;
/// Memory affinity structure (ACPI 6.5, 5.2.16.2): its type and length, and bits of its flags.
const MEMORY: u8 = 1;
const MEMORY_LEN: usize = 40;
const ENABLED: u32 = 1 << 0;
const HOT_PLUGGABLE: u32 = 1 << 1;
const NON_VOLATILE: u32 = 1 << 2;

/// What a system resource affinity table says; `None` if this is none.
fn affinities(table: &[u8]) -> Option<Tables> {
    let word = |at: usize| Some(u64::from_le_bytes(table.get(at..at + 8)?.try_into().ok()?));
    let half = |at: usize| Some(u32::from_le_bytes(table.get(at..at + 4)?.try_into().ok()?));
    let end = half(4)? as usize;
    table.get(..end)?;
    let mut tables = Tables::default();
    let mut at = HEADER + RESERVED;
    while at < end {
        let &[kind, len] = table.get(at..at + 2)? else { return None };
        // A structure without a length is none.
        if len < 2 || at + usize::from(len) > end {
            return None;
        }
        if kind == MEMORY && usize::from(len) == MEMORY_LEN {
            let (address, bytes, flags) = (word(at + 8)?, word(at + 16)?, half(at + 28)?);
            match flags {
                flags if flags & ENABLED == 0 => {}
                flags if flags & NON_VOLATILE != 0 => tables.nvdimms.push((address, bytes)),
                flags if flags & HOT_PLUGGABLE != 0 => {
                    tables.device_memory = Some(tables.device_memory.map_or(address, |first| first.min(address)));
                }
                _ => {}
            }
        }
        at += usize::from(len);
    }
    (at == end).then_some(tables)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::tests::of_mib as ram;

    const MIB: u64 = 1 << 20;

    fn places(devices: &MemoryDevices, tables: &Tables, blocks: &[(&str, u64)]) -> Vec<(String, u64)> {
        places_behind(0, "pc-q35-11.1", devices, tables, blocks)
    }

    fn places_behind(
        main: u64,
        machine: &str,
        devices: &MemoryDevices,
        tables: &Tables,
        blocks: &[(&str, u64)],
    ) -> Vec<(String, u64)> {
        let ram = ram(blocks);
        let left: Vec<usize> = (0..blocks.len()).filter(|block| !blocks[*block].0.contains('/')).collect();
        let (pieces, _) = devices.place(machine, &ram, &left, tables, main * MIB);
        pieces.iter().map(|piece| (ram.blocks()[piece.block].name.clone(), piece.address / MIB)).collect()
    }

    fn at(places: &[(&str, u64)]) -> Vec<(String, u64)> {
        places.iter().map(|(name, mib)| ((*name).to_owned(), *mib)).collect()
    }

    /// `query-memory-devices` of QEMU 11.1 for guests of 16 MiB and 4 GiB of main memory.
    #[test]
    fn memory_devices_lie_where_qemu_puts_them() {
        let tables = |base| Tables { device_memory: Some(base * MIB), nvdimms: Vec::new() };
        let dimms = |dimms| MemoryDevices { dimms, ..MemoryDevices::default() };
        assert_eq!(places(&dimms(1), &tables(4096), &[("d0", 128)]), at(&[("d0", 4096)]));
        assert_eq!(places(&dimms(1), &Tables::default(), &[("d0", 128)]), at(&[("d0", 4096)]));
        assert_eq!(places(&dimms(2), &tables(6144), &[("d1", 256), ("d0", 128)]), at(&[("d0", 6144), ("d1", 6272)]));
        // `virtio-mem-pci,memdev=d0` first, and a DIMM after it.
        let virtio = |address, len| vec![("0000:00:01.0/".to_owned(), address * MIB, len * MIB)];
        let mixed = MemoryDevices { virtio: virtio(4096, 128), dimms: 1 };
        let blocks = [("d1", 128), ("0000:00:01.0/d0", 128)];
        assert_eq!(places(&mixed, &tables(4096), &blocks), at(&[("0000:00:01.0/d0", 4096), ("d1", 4224)]));
        let nvdimm = Tables { nvdimms: vec![(4096 * MIB, 128 * MIB)], ..tables(4096) };
        assert_eq!(places(&dimms(1), &nvdimm, &[("d0", 128), ("d1", 64)]), at(&[("d0", 4096), ("d1", 4224)]));
        // A gap that is large enough is used.
        let apart = MemoryDevices { virtio: virtio(4608, 256), dimms: 2 };
        let blocks = [("0000:00:01.0/v", 256), ("d0", 512), ("d1", 1024)];
        assert_eq!(places(&apart, &tables(4096), &blocks), at(&[("0000:00:01.0/v", 4608), ("d0", 4096), ("d1", 4864)]));
    }

    /// `info memory-devices` of QEMU 11.1 for pseries guests of 256 to 2048 MiB with two DIMMs.
    #[test]
    fn dimms_of_a_pseries_lie_right_behind_its_memory() {
        for (main, first) in [(256, 1024), (512, 1024), (1280, 2048), (2048, 2048)] {
            let blocks = [("m0", 256), ("m1", 512)];
            let found = places_behind(main, "pseries-11.1", &MemoryDevices::default(), &Tables::default(), &blocks);
            assert_eq!(found, at(&[("m0", first), ("m1", first + 256)]));
        }
    }

    #[test]
    fn what_is_not_known_is_not_placed() {
        let dimms = |dimms| MemoryDevices { dimms, ..MemoryDevices::default() };
        let none = at(&[]);
        // Nothing tells which of the two was made first; one of them is no DIMM; there is no DIMM.
        assert_eq!(places(&dimms(2), &Tables::default(), &[("z", 256), ("a", 128)]), none);
        assert_eq!(places(&dimms(1), &Tables::default(), &[("d0", 128), ("shared", 64)]), none);
        assert_eq!(places(&dimms(0), &Tables::default(), &[("d0", 128)]), none);
    }

    /// The SRAT of QEMU 11.1 for `-m 16,slots=4,maxmem=16G` with an NVDIMM of 128 MiB, in its memory entries.
    #[test]
    fn the_tables_tell_of_device_memory_and_nvdimms() {
        let mut srat = b"SRAT".to_vec();
        srat.extend((48u32 + 16 + 4 * 40).to_le_bytes());
        srat.resize(48, 0);
        srat.extend([0, 16]);
        srat.resize(64, 0);
        for (address, len, flags) in
            [(0u64, 0xa0000u64, 1u32), (0, 0, 0), (0x1_0000_0000, 0x800_0000, 5), (0x1_0000_0000, 0x4_ff00_0000, 3)]
        {
            let start = srat.len();
            srat.extend([1, 40]);
            srat.resize(start + 8, 0);
            srat.extend(address.to_le_bytes());
            srat.extend(len.to_le_bytes());
            srat.resize(start + 28, 0);
            srat.extend(flags.to_le_bytes());
            srat.resize(start + 40, 0);
        }
        let found = Tables { device_memory: Some(1 << 32), nvdimms: vec![(1 << 32, 128 << 20)] };
        let tables = [&b"FACS"[..], &[0; 60], &srat, &[0; 4000]].concat();
        assert_eq!(Tables::parse(&tables), found);
        for cut in 0..srat.len() {
            assert_eq!(Tables::parse(&srat[..cut]), Tables::default(), "{cut}");
        }
        let mut circle = srat.clone();
        circle[49] = 0;
        assert_eq!(Tables::parse(&circle), Tables::default());
    }
}
