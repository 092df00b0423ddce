//! What a stopped QEMU says is in its RAM: the truth that a stream is judged by.
//!
//! Two sources, which must agree. `pmemsave` gives what is mapped in guest-physical memory (the flat view of `info
//! mtree -f` says where each RAM block is). The process memory of QEMU, at the host address that `info ramblock` (10.0)
//! or `gpa2hva` (older) gives, holds each block whole, including what a hole or a ROM shadow hides.

use crate::launch::Qemu;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A RAM block as QEMU itself has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Block {
    /// The block's name (`idstr`).
    pub name: String,
    /// Bytes in use.
    pub used_length: u64,
    /// SHA-256 of the used length; absent when QEMU shows no way to the whole block.
    pub sha256: Option<String>,
    /// CRC-32 (IEEE) of the used length, eight hexadecimal digits.
    pub crc32: Option<String>,
    /// The part of the block that `pmemsave` covered, in pieces that are mapped in guest-physical memory.
    pub pmemsave: Vec<Piece>,
}

/// A piece of a block mapped in guest-physical memory, read by `pmemsave`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Piece {
    /// Guest-physical address.
    pub address: u64,
    /// Offset in the block, bytes.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// SHA-256 of the piece.
    pub sha256: String,
}

impl Block {
    /// Bytes of the used length that `pmemsave` covered.
    pub fn pmemsave_bytes(&self) -> u64 {
        // Pieces may alias (a BIOS is mapped twice), so overlaps count once.
        let mut spans: Vec<(u64, u64)> = self.pmemsave.iter().map(|p| (p.offset, p.offset + p.length)).collect();
        spans.sort_unstable();
        let (mut covered, mut end) = (0, 0);
        for (from, to) in spans {
            covered += to.saturating_sub(from.max(end));
            end = end.max(to);
        }
        covered
    }
}

/// Reads every RAM block of a *stopped* QEMU.
///
/// # Errors
/// QEMU's answers cannot be read, or `pmemsave` and the process memory disagree.
pub fn ram_blocks(qemu: &mut Qemu, scratch: &Path) -> Result<Vec<Block>> {
    let listing = qemu.human("info ramblock")?;
    let flat = system_memory(&qemu.human("info mtree -f")?);
    let memory = File::open(format!("/proc/{}/mem", qemu.pid())).context("opening QEMU's memory")?;
    let mut blocks = Vec::new();
    for listed in parse_ramblock(&listing)? {
        let mapped: Vec<&Mapped> = flat.iter().filter(|m| listed.is_called(&m.region)).collect();
        let host = match listed.host {
            Some(host) => Some(host),
            None => host_address(qemu, &mapped)?,
        };
        let whole = host.map(|host| read_memory(&memory, host, listed.used)).transpose()?;
        let mut pieces = Vec::new();
        for m in mapped {
            let length = m.length.min(listed.used.saturating_sub(m.offset));
            if length == 0 {
                continue;
            }
            let file = scratch.join("pmemsave.bin");
            qemu.execute("pmemsave", json!({ "val": m.address, "size": length, "filename": file }))?;
            let saved = fs::read(&file)?;
            if let Some(whole) = &whole {
                let (from, to) = (m.offset as usize, (m.offset + length) as usize);
                if saved != whole[from..to] {
                    bail!("pmemsave and the process memory of {} disagree at {:#x}", listed.name, m.address);
                }
            }
            pieces.push(Piece { address: m.address, offset: m.offset, length, sha256: sha256(&saved) });
        }
        blocks.push(Block {
            name: listed.name,
            used_length: listed.used,
            sha256: whole.as_deref().map(sha256),
            crc32: whole.as_deref().map(|w| format!("{:08x}", crc32fast::hash(w))),
            pmemsave: pieces,
        });
    }
    Ok(blocks)
}

/// A stretch of guest-physical memory that is of a block that is migrated. Addresses and lengths in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    /// Guest-physical address.
    pub address: u64,
    /// Length.
    pub length: u64,
    /// The block's name.
    pub block: String,
    /// Where it is in the block.
    pub offset: u64,
    /// Where the block's first byte is in the memory of QEMU's process.
    pub host: u64,
    /// RAM, and not ROM or flash.
    pub writable: bool,
}

impl Stretch {
    /// How much of the stretch is left from `address` on, if that is where it has `offset` of `block`.
    pub(crate) fn left_of(&self, block: &str, address: u64, offset: u64) -> Option<u64> {
        let into = address.checked_sub(self.address).filter(|into| *into < self.length)?;
        (self.block == block && self.offset + into == offset).then_some(self.length - into)
    }
}

/// Guest-physical memory of a *stopped* QEMU, as its first CPU has it and `xp` shows it.
///
/// # Errors
/// QEMU's answers cannot be read.
pub(crate) fn stretches(qemu: &mut Qemu) -> Result<Vec<Stretch>> {
    let listing = qemu.human("info ramblock")?;
    let flat = flat_view(&qemu.human("info mtree -f")?, "cpu-memory-0");
    let mut stretches = Vec::new();
    for listed in parse_ramblock(&listing)? {
        let mapped: Vec<&Mapped> = flat.iter().filter(|m| listed.is_called(&m.region)).collect();
        let host = match listed.host {
            Some(host) => Some(host),
            None => host_address(qemu, &mapped)?,
        };
        let Some(host) = host else { continue };
        for m in mapped {
            let length = m.length.min(listed.used.saturating_sub(m.offset));
            let Mapped { address, offset, writable, .. } = *m;
            stretches.push(Stretch { address, length, block: listed.name.clone(), offset, host, writable });
        }
    }
    stretches.retain(|stretch| stretch.length > 0);
    Ok(stretches)
}

/// Lower-case hexadecimal SHA-256.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn read_memory(memory: &File, host: u64, length: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length as usize];
    memory.read_exact_at(&mut bytes, host).with_context(|| format!("reading QEMU's memory at {host:#x}"))?;
    Ok(bytes)
}

/// The host address of a block's first byte, found through any mapped piece of it.
fn host_address(qemu: &mut Qemu, mapped: &[&Mapped]) -> Result<Option<u64>> {
    for m in mapped {
        let reply = qemu.human(&format!("gpa2hva {:#x}", m.address))?;
        if let Some(hex) = reply.trim().rsplit("is 0x").next().filter(|_| reply.contains("is 0x")) {
            let host = u64::from_str_radix(hex.trim(), 16).with_context(|| format!("gpa2hva said {reply:?}"))?;
            return Ok(host.checked_sub(m.offset));
        }
    }
    Ok(None)
}

struct Listed {
    name: String,
    used: u64,
    host: Option<u64>,
}

impl Listed {
    /// Whether a memory region of this name is the block's: the block's name is the region's, with the device's path
    /// in front of it for a device's own RAM.
    fn is_called(&self, region: &str) -> bool {
        self.name == region || self.name.rsplit_once('/').is_some_and(|(_, last)| last == region)
    }
}

/// `info ramblock`: name, page size (a number and a unit), offset, used, total and, since 10.0, the host address.
fn parse_ramblock(text: &str) -> Result<Vec<Listed>> {
    let mut blocks = Vec::new();
    let mut names = BTreeMap::new();
    for line in text.lines().skip(1).filter(|l| !l.trim().is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let numbers = words.iter().position(|w| w.starts_with("0x"));
        // A block that is never migrated has no name: its line starts with the page size, "4 KiB".
        let Some(at) = numbers.filter(|at| *at > 2) else { continue };
        let number = |i: usize| -> Result<u64> {
            let digits = words.get(at + i).with_context(|| format!("info ramblock printed {line:?}"))?;
            u64::from_str_radix(digits.trim_start_matches("0x"), 16)
                .with_context(|| format!("info ramblock printed {line:?}"))
        };
        let name = words[..at - 2].join(" ");
        if names.insert(name.clone(), ()).is_some() {
            bail!("info ramblock lists {name} twice");
        }
        let host = if words.len() > at + 3 { Some(number(3)?) } else { None };
        blocks.push(Listed { name, used: number(1)?, host });
    }
    Ok(blocks)
}

struct Mapped {
    address: u64,
    length: u64,
    offset: u64,
    region: String,
    /// RAM, and not ROM.
    writable: bool,
}

/// The RAM and ROM pieces in the flat view of address space `memory`, as `info mtree -f` prints them.
fn system_memory(text: &str) -> Vec<Mapped> {
    flat_view(text, "memory")
}

/// The same of any address space.
fn flat_view(text: &str, space: &str) -> Vec<Mapped> {
    let head = format!("AS \"{space}\"");
    let mut pieces = Vec::new();
    let mut ours = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with("FlatView") {
            ours = false;
        } else if line.starts_with(&head) {
            ours = true;
        } else if ours && let Some(piece) = parse_piece(line) {
            pieces.push(piece);
        }
    }
    pieces
}

/// `0000000000100000-0000000001ffffff (prio 0, ram): pc.ram @0000000000100000`.
fn parse_piece(line: &str) -> Option<Mapped> {
    let (range, rest) = line.split_once(" (prio ")?;
    let (from, to) = range.split_once('-')?;
    let (kind, named) = rest.split_once("): ")?;
    let kind = kind.split_once(", ")?.1;
    if !matches!(kind, "ram" | "rom" | "romd" | "ramd") && !kind.starts_with("nv-") {
        return None;
    }
    let named = named.split(" KVM").next()?.trim_end();
    let (region, offset) = match named.rsplit_once(" @") {
        Some((region, offset)) => (region, u64::from_str_radix(offset, 16).ok()?),
        None => (named, 0),
    };
    let (from, to) = (u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?);
    let writable = kind == "ram";
    Some(Mapped { address: from, length: to.checked_sub(from)? + 1, offset, region: region.into(), writable })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines as QEMU 7.2 and 10.0 print them.
    #[test]
    fn ramblock_listings_of_both_shapes_are_read() {
        let old = "              Block Name    PSize              Offset               Used              Total\r\n\
            \x20                 pc.ram    4 KiB  0x0000000000000000 0x0000000002000000 0x0000000002000000\r\n";
        let new = "              Block Name    PSize              Offset               Used              Total                HVA  RO\r\n\
            \x20   /rom@etc/acpi/tables    4 KiB  0x00000000030c0000 0x0000000000020000 0x0000000000200000 0x00007f0014200000  ro\r\n\
            \x20                            4 KiB  0x00000000030c0000 0x0000000000020000 0x0000000000200000 0x00007f0014200000  ro\r\n";
        let (old, new) = (parse_ramblock(old).unwrap(), parse_ramblock(new).unwrap());
        assert_eq!((old[0].name.as_str(), old[0].used, old[0].host), ("pc.ram", 0x200_0000, None));
        assert_eq!(new.len(), 1);
        assert_eq!(
            (new[0].name.as_str(), new[0].used, new[0].host),
            ("/rom@etc/acpi/tables", 0x2_0000, Some(0x7f00_1420_0000))
        );
    }

    #[test]
    fn only_ram_of_the_system_memory_is_taken() {
        let text = "FlatView #0\n AS \"I/O\", root: io\n  0000000000000000-0000000000000007 (prio 0, ram): other\n\n\
            FlatView #1\n AS \"memory\", root: system\n AS \"cpu-memory-0\", root: system\n Root memory region: system\n\
            \x20 0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM\n\
            \x20 00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\n\
            \x20 00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000\n";
        let pieces = system_memory(text);
        assert_eq!(pieces.len(), 2);
        assert_eq!((pieces[0].region.as_str(), pieces[0].length), ("pc.ram", 0xa_0000));
        assert_eq!((pieces[1].region.as_str(), pieces[1].address, pieces[1].offset), ("pc.bios", 0xe_0000, 0x2_0000));
        assert_eq!([pieces[0].writable, pieces[1].writable], [true, false]);
        assert_eq!((flat_view(text, "cpu-memory-0").len(), flat_view(text, "I/O")[0].region.as_str()), (2, "other"));
    }

    #[test]
    fn aliased_pieces_count_once() {
        let piece = |offset, length| Piece { address: 0, offset, length, sha256: String::new() };
        let block = Block {
            name: "pc.bios".into(),
            used_length: 0x4_0000,
            sha256: None,
            crc32: None,
            pmemsave: vec![piece(0x2_0000, 0x2_0000), piece(0, 0x4_0000)],
        };
        assert_eq!(block.pmemsave_bytes(), 0x4_0000);
    }
}
