//! Guest-physical memory as qevm has it beside what the monitor's `xp` shows of the stopped guest.

use crate::launch::Qemu;
use crate::oracle::{self, Stretch};
use anyhow::{Context, Result, ensure};
use qevm_inspect::Migration;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// At least this many places are marked.
const MARKERS: u64 = 20;
/// Bytes of a marker.
const WIDTH: u64 = 8;
/// Where firmware and option ROMs of a PC shadow RAM while the chipset (PAM) maps them there, in pieces of 16 KiB.
const PC_FIRMWARE: Range<u64> = 0xc_0000..0x10_0000;
const STEP: u64 = 0x4000;

/// A place in guest-physical memory, and what the monitor shows there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marker {
    /// Guest-physical address.
    pub address: u64,
    /// The RAM block that lies there.
    pub block: String,
    /// What `xp` shows.
    pub bytes: Vec<u8>,
}

/// The markers of a guest, and where its RAM lies.
#[derive(Debug, Clone, Default)]
pub struct Marked {
    /// All places that were marked.
    pub markers: Vec<Marker>,
    /// Where blocks that are migrated lie.
    stretches: Vec<Stretch>,
}

/// What was compared.
#[derive(Debug, Clone, Copy, Default)]
pub struct Compared {
    /// Places at which both have the same.
    pub markers: usize,
    /// RAM blocks that qevm says it has no place for, and QEMU has none in the memory of its first CPU either.
    pub nowhere: usize,
}

/// Writes a marker at both ends of every stretch of a *stopped* guest's RAM and at places between them, and reads them
/// back by `xp`. A microvm (`x86`) has its firmware in RAM, which is left as it is.
///
/// # Errors
/// QEMU's memory cannot be written, or `xp` does not show what was written.
pub fn mark(qemu: &mut Qemu, x86: bool) -> Result<Marked> {
    let stretches = oracle::stretches(qemu)?;
    let memory = File::options().write(true).open(format!("/proc/{}/mem", qemu.pid()))?;
    let mut markers = Vec::new();
    let unplugged = unplugged(&qemu.execute("query-memory-devices", Value::Null)?);
    let is_unplugged = |stretch: &Stretch| unplugged.iter().any(|there| there.contains(&stretch.address));
    let is_firmware = |stretch: &Stretch| x86 && stretch.block.ends_with("bios");
    let marked = |at: &&Stretch| at.writable && !is_unplugged(at) && !is_firmware(at);
    let to_mark: Vec<&Stretch> = stretches.iter().filter(marked).collect();
    for place in places(&to_mark) {
        let Place { stretch: Stretch { address, block, offset, host, .. }, at, width } = place;
        let bytes = content(block, offset + at, width);
        let doing = || format!("marking {block} at {:#x}", address + at);
        memory.write_all_at(&bytes, host + offset + at).with_context(doing)?;
        markers.push(Marker { address: address + at, block: block.clone(), bytes });
    }
    for marker in &markers {
        let said = qemu.human(&format!("xp /{}xb {:#x}", marker.bytes.len(), marker.address))?;
        let shown = shown(&said).with_context(|| format!("xp at {:#x} says {said:?}", marker.address))?;
        ensure!(shown == marker.bytes, "at {:#x} xp shows {shown:02x?}, not {marker:02x?}", marker.address);
    }
    Ok(Marked { markers, stretches })
}

/// Where the memory of virtio-mem devices lies of which the guest has plugged nothing: such memory does not travel.
fn unplugged(devices: &Value) -> Vec<Range<u64>> {
    let devices = devices.as_array().map(Vec::as_slice).unwrap_or_default();
    let data = devices.iter().filter(|device| device["type"] == "virtio-mem").map(|device| &device["data"]);
    let number = |data: &Value, name: &str| data[name].as_u64().unwrap_or_default();
    let unplugged = data.filter(|data| number(data, "size") == 0);
    unplugged.map(|data| number(data, "memaddr")..number(data, "memaddr") + number(data, "max-size")).collect()
}

/// Compares guest-physical memory as qevm finds it in `stream` with what was marked, and its pieces with QEMU's. An
/// `x86` guest may see firmware in front of some RAM.
///
/// # Errors
/// The first difference. RAM of the guest that qevm has no place for is one, too.
pub fn compare(stream: &Path, marked: &Marked, x86: bool, scratch: &Path) -> Result<Compared> {
    let mut guest = Migration::open(stream)?;
    let memory = guest.physical_memory()?;
    for piece in &memory.segments {
        let block = &guest.blocks()[piece.block].name;
        let mut at = 0;
        while at < piece.len {
            let (address, offset) = (piece.address + at, piece.block_offset + at);
            let found = marked.stretches.iter().find_map(|stretch| stretch.left_of(block, address, offset));
            let under_firmware = (x86 && PC_FIRMWARE.contains(&address)).then(|| STEP - address % STEP);
            let left = found.or(under_firmware);
            at += left.with_context(|| format!("QEMU has {block} from {offset:#x} on not at {address:#x}"))?;
        }
    }
    let path = scratch.join("physical");
    guest.write_memory(&path)?;
    let file = File::open(&path)?;
    for Marker { address, block, bytes } in &marked.markers {
        let mut found = vec![0; bytes.len()];
        let read = file.read_exact_at(&mut found, *address);
        read.with_context(|| format!("memory ends before {address:#x} of {block}"))?;
        ensure!(found == *bytes, "at {address:#x} of {block} is {found:02x?}, xp shows {bytes:02x?}");
    }
    // Blocks that QEMU does not show its first CPU either are rightly nowhere, and have to be named as such.
    Ok(Compared { markers: marked.markers.len(), nowhere: memory.left_out.len() })
}

struct Place<'s> {
    stretch: &'s Stretch,
    /// Bytes from the start of the stretch.
    at: u64,
    width: u64,
}

/// Both ends of every stretch, and places between those of the longest until there are enough.
fn places<'s>(stretches: &[&'s Stretch]) -> Vec<Place<'s>> {
    let longest = stretches.iter().copied().max_by_key(|stretch| stretch.length);
    let ends: u64 = stretches.iter().map(|stretch| if stretch.length >= 2 * WIDTH { 2 } else { 1 }).sum();
    let mut places = Vec::new();
    for &stretch in stretches {
        let width = stretch.length.min(WIDTH);
        let last = stretch.length - width;
        let between = if longest == Some(stretch) { MARKERS.saturating_sub(ends) } else { 0 };
        let step = last / (between + 1);
        let mut offsets: Vec<u64> = (0..=between).map(|number| number * step).chain([last]).collect();
        // Places that would overlap are one.
        offsets.dedup_by(|next, before| *next < *before + width);
        places.extend(offsets.into_iter().map(|at| Place { stretch, at, width }));
    }
    places
}

/// What is written at `offset` of a block; the same where the block is seen once more.
fn content(block: &str, offset: u64, width: u64) -> Vec<u8> {
    let digest = Sha256::new().chain_update(block).chain_update(offset.to_be_bytes()).finalize();
    digest[..width as usize].to_vec()
}

/// The bytes that `xp /8xb` prints: `0000000040000000: 0x12 0x34`.
fn shown(said: &str) -> Option<Vec<u8>> {
    let words = said.lines().filter_map(|line| Some(line.split_once(": ")?.1)).flat_map(str::split_whitespace);
    words.map(|word| u8::from_str_radix(word.strip_prefix("0x")?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn stretch(address: u64, length: u64) -> Stretch {
        Stretch { address, length, block: "ram".into(), offset: 0, host: 0, writable: true }
    }

    #[test]
    fn both_ends_of_all_stretches_are_marked_and_twenty_places_in_all() {
        let all = [stretch(0, 4), stretch(0x1000, 0x10_0000), stretch(0x20_0000, 64)];
        let places = places(&all.each_ref());
        let addresses: Vec<u64> = places.iter().map(|place| place.stretch.address + place.at).collect();
        assert_eq!(places.len() as u64, MARKERS);
        for end in [0, 0x1000, 0x10_0ff8, 0x20_0000, 0x20_0038] {
            assert!(addresses.contains(&end), "{end:#x}: {addresses:x?}");
        }
        let apart = addresses.windows(2).zip(&places).all(|(pair, first)| pair[0] + first.width <= pair[1]);
        assert!(apart, "{addresses:x?}");
        assert_eq!(super::places(&[&stretch(0, 1 << 20)]).len() as u64, MARKERS);
    }

    #[test]
    fn a_stretch_tells_how_much_is_left_of_it() {
        let stretch = Stretch { offset: 0x800, ..stretch(0x1000, 0x100) };
        assert_eq!(stretch.left_of("ram", 0x1010, 0x810), Some(0xf0));
        for (block, address, offset) in [("rom", 0x1010, 0x810), ("ram", 0x1100, 0x900), ("ram", 0xfff, 0x7ff)] {
            assert_eq!(stretch.left_of(block, address, offset), None);
        }
        assert_eq!(stretch.left_of("ram", 0x1010, 0x10), None);
    }

    /// As QEMU 11.1 answers.
    #[test]
    fn memory_that_is_not_plugged_is_told() {
        let devices = json!([
            { "type": "dimm", "data": { "addr": 4096, "size": 4096 } },
            { "type": "virtio-mem", "data": { "memaddr": 8192, "max-size": 4096, "size": 0 } },
            { "type": "virtio-mem", "data": { "memaddr": 16384, "max-size": 4096, "size": 2048 } },
        ]);
        assert_eq!(unplugged(&devices), vec![8192u64..12288; 1]);
    }

    /// As QEMU 11.1 prints it.
    #[test]
    fn what_the_monitor_shows_is_read() {
        assert_eq!(shown("0000000040000000: 0x12 0xff\r\n0000000040000002: 0x00\r\n"), Some(vec![0x12, 0xff, 0]));
        assert_eq!(shown("0000000040000000: Cannot access memory\r\n"), None);
    }
}
