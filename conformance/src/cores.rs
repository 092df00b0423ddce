//! ELF cores and kdump-compressed dumps of every target beside those that QEMU's `dump-guest-memory` writes of the same
//! stopped guest.

mod dump;

use crate::exec;
use crate::launch::Qemu;
use crate::roots::{Root, Suite};
use anyhow::{Context, Result, bail, ensure};
use dump::Dump;
use qevm_inspect::Migration;
use qevm_inspect::extract::PageCompression;
use reference_vmm::payload::IMAGE;
use serde_json::json;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// How long firmware runs, so that registers and memory are not those of a reset.
const FIRMWARE_TIME: Duration = Duration::from_millis(700);
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
const NT_PRSTATUS: u64 = 1;

const X86_64: &str = "x86_64";
/// Where QEMU has what a guest of x86 reads: ROM, until firmware has copied it to RAM.
const ROM: Range<u64> = 0xa_0000..0x10_0000;
/// In arguments: the name of a file with reference-vmm's payload guest, which is in long mode.
const PAYLOAD: &str = "{payload}";
/// The suites whose packages are used, and the guests: target, and arguments.
const SUITES: [Suite; 3] = [Suite::Bookworm, Suite::Trixie, Suite::Sid];
const GUESTS: [(&str, &str); 14] = [
    (X86_64, "-M q35,accel=tcg -m 64"),
    // Memory beyond the firmware, so that the last page is the same.
    (
        X86_64,
        "-M pc,accel=tcg -m 32,slots=1,maxmem=8G -object memory-backend-ram,id=m,size=128M -device pc-dimm,memdev=m",
    ),
    (X86_64, "-M microvm,accel=tcg -m 64 -smp 2 -bios {payload}"),
    ("aarch64", "-M virt,gic-version=3 -cpu cortex-a72 -m 32 -smp 2"),
    ("aarch64", "-M virt -cpu cortex-a53 -m 256"),
    ("aarch64", "-M virt -cpu max -m 32 -smp 2"),
    ("arm", "-M virt -cpu cortex-a15 -m 32 -smp 2"),
    ("riscv64", "-M virt -m 64 -smp 3 -bios none"),
    ("riscv32", "-M virt -m 64 -bios none"),
    ("riscv64", "-M spike -m 64 -bios none"),
    ("s390x", "-M s390-ccw-virtio -m 32 -smp 2 -no-shutdown -action panic=none"),
    ("ppc64", "-M pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken -cpu power9 -m 256 -smp 2"),
    ("ppc64", "-M pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken -cpu power8 -m 256"),
    ("ppc", "-M mac99 -m 64"),
];

/// What became of one guest: its name, and what was compared, or why that went wrong.
#[derive(Debug)]
pub struct Outcome {
    /// Release, target and arguments.
    pub name: String,
    /// What is alike.
    pub result: Result<Alike>,
}

/// What is alike in QEMU's cores and ours.
#[derive(Debug, Clone, Copy)]
pub struct Alike {
    /// Notes of an ELF core.
    pub notes: usize,
    /// Bytes of memory of an ELF core.
    pub bytes: u64,
    /// Pages of a kdump-compressed dump.
    pub pages: usize,
    /// Pages of QEMU's that ours does not have: firmware, which is no RAM of the guest's.
    pub more: usize,
}

/// Compares the cores of all guests whose name contains one of `only`, or of all.
///
/// # Errors
/// The packages cannot be had, or there is no such guest.
pub fn compare(only: &[String]) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for suite in SUITES {
        let names: Vec<_> =
            GUESTS.iter().map(|(target, arguments)| format!("{} {target} {arguments}", suite.series())).collect();
        let wanted = |name: &String| only.is_empty() || only.iter().any(|only| name.contains(only.as_str()));
        if !names.iter().any(wanted) {
            continue;
        }
        for (name, (target, arguments)) in names.into_iter().zip(GUESTS).filter(|(name, _)| wanted(name)) {
            let root = match target {
                X86_64 => Root::install(suite)?,
                _ => Root::install_targets(suite)?.of_target(target),
            };
            let result = guest(&root, suite, target, arguments);
            outcomes.push(Outcome { name, result });
        }
    }
    ensure!(!outcomes.is_empty(), "no guest has such a name");
    Ok(outcomes)
}

fn guest(root: &Root, suite: Suite, target: &str, arguments: &str) -> Result<Alike> {
    let scratch = tempfile::Builder::new().prefix("qevm-").tempdir()?;
    let place = |name: &str| scratch.path().join(name);
    let payload = place("payload.bin");
    fs::write(&payload, IMAGE)?;
    let words = arguments.split(' ').map(|word| word.replace(PAYLOAD, &payload.display().to_string()));
    let words: Vec<String> = words.chain(["-S", "-serial", "null"].map(Into::into)).collect();
    let mut qemu = Qemu::start(root, "source", &words, scratch.path())?;
    qemu.execute("cont", json!({}))?;
    thread::sleep(FIRMWARE_TIME);
    qemu.execute("stop", json!({}))?;
    for (name, format) in [("theirs", "elf"), ("theirs.kdump", "kdump-zlib")] {
        let file = format!("file:{}", place(name).display());
        qemu.execute("dump-guest-memory", json!({ "paging": false, "protocol": file, "format": format }))?;
    }
    exec::save(&mut qemu, &place("stream"))?;
    qemu.quit();
    let mut migration = Migration::open(&place("stream"))?;
    migration.write_elf(&place("ours"))?;
    // Those of big-endian targets had the number of the process in the host's byte order.
    let pid_swapped = suite == Suite::Bookworm;
    let apart = if target == X86_64 { ROM } else { 0..0 };
    let (theirs, ours) = (Core::read(&place("theirs"))?, Core::read(&place("ours"))?);
    let (notes, bytes) = same(&theirs, &ours, pid_swapped, &apart)?;

    let loads = ours.segments(PT_LOAD)?;
    let in_core =
        |address: u64| loads.iter().any(|(start, memory)| (*start..*start + memory.len() as u64).contains(&address));
    let judge = Dump::read(fs::read(place("theirs.kdump"))?).context("QEMU's dump")?;
    let swapped = pid_swapped && theirs.bytes[5] == 2;
    let mut alike = Alike { notes, bytes, pages: 0, more: 0 };
    for compression in [PageCompression::Zlib, PageCompression::Zstd] {
        let path = place(&format!("{compression:?}"));
        migration.write_kdump(&path, compression)?;
        let ours = Dump::read(fs::read(&path)?).with_context(|| format!("the dump by {compression:?}"))?;
        let found = judge.judge(&ours, &apart, |address| !in_core(address), !swapped);
        let found = found.with_context(|| format!("the dump by {compression:?}"))?;
        (alike.pages, alike.more) = (found.pages, found.more);
    }
    Ok(alike)
}

/// Compares an ELF core of a guest of x86 with QEMU's, and gives how many notes and bytes of memory are the same: all.
///
/// # Errors
/// One is not.
pub(crate) fn same_elf(theirs: &Path, ours: &Path) -> Result<(usize, u64)> {
    same(&Core::read(theirs)?, &Core::read(ours)?, false, &ROM)
}

fn same(theirs: &Core, ours: &Core, pid_swapped: bool, apart: &Range<u64>) -> Result<(usize, u64)> {
    ensure!(theirs.bytes[..20] == ours.bytes[..20], "the files are of different kinds");
    let (expected, found) = (theirs.notes(pid_swapped)?, ours.notes(pid_swapped)?);
    ensure!(expected.len() == found.len(), "{} notes, QEMU has {}", found.len(), expected.len());
    for (number, (expected, found)) in expected.iter().zip(&found).enumerate() {
        ensure!(expected == found, "note {number} is {found:02x?}, QEMU's {expected:02x?}");
    }
    let loads = theirs.segments(PT_LOAD)?;
    let mut alike = 0;
    for (address, memory) in ours.segments(PT_LOAD)? {
        // QEMU may cut a stretch into several, and has firmware's besides.
        let mut at = address;
        while at < address + memory.len() as u64 {
            let found = loads.iter().find(|(from, bytes)| (*from..*from + bytes.len() as u64).contains(&at));
            let (from, bytes) = found.with_context(|| format!("QEMU has no memory at {at:#x}"))?;
            let theirs = &bytes[(at - from) as usize..];
            let ours = &memory[(at - address) as usize..];
            let cut = [apart.start, apart.end].into_iter().find(|cut| *cut > at).map_or(u64::MAX, |cut| cut - at);
            let len = (theirs.len().min(ours.len()) as u64).min(cut) as usize;
            ensure!(apart.contains(&at) || theirs[..len] == ours[..len], "memory from {at:#x} on differs");
            at += len as u64;
        }
        alike += memory.len() as u64;
    }
    ensure!(alike > 0, "there is no memory");
    Ok((found.len(), alike))
}

/// A core as the System V ABI has it.
struct Core {
    bytes: Vec<u8>,
}

impl Core {
    fn read(path: &Path) -> Result<Core> {
        let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        ensure!(bytes.len() >= 64 && bytes.starts_with(b"\x7fELF"), "{} is no ELF file", path.display());
        Ok(Core { bytes })
    }

    fn number(&self, bytes: &[u8]) -> u64 {
        let shift_in = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
        if self.bytes[5] == 2 { bytes.iter().fold(0, shift_in) } else { bytes.iter().rev().fold(0, shift_in) }
    }

    fn at(&self, offset: usize, len: usize) -> Result<&[u8]> {
        let end = offset.checked_add(len).context("an offset beyond all files")?;
        self.bytes.get(offset..end).with_context(|| format!("the file ends before {end}"))
    }

    /// Address and content of the segments of a kind.
    fn segments(&self, kind: u64) -> Result<Vec<(u64, &[u8])>> {
        let wide = self.bytes[4] == 2;
        let word = if wide { 8 } else { 4 };
        // e_phoff, e_phnum, the size of a program header; p_offset, p_paddr and p_filesz in it.
        let (first, count, size) = if wide { (32, 56, 56) } else { (28, 44, 32) };
        let places = if wide { [8, 24, 32] } else { [4, 12, 16] };
        let (first, count) = (self.number(self.at(first, word)?) as usize, self.number(self.at(count, 2)?) as usize);
        let mut segments = Vec::new();
        for header in (0..count).map(|number| first + number * size) {
            if self.number(self.at(header, 4)?) != kind {
                continue;
            }
            let mut fields = [0; 3];
            for (field, place) in fields.iter_mut().zip(places) {
                *field = self.number(self.at(header + place, word)?);
            }
            let [offset, address, len] = fields;
            segments.push((address, self.at(offset as usize, len as usize)?));
        }
        Ok(segments)
    }

    /// Every note: owner, kind and descriptor as they are in the file.
    fn notes(&self, pid_swapped: bool) -> Result<Vec<Vec<u8>>> {
        let [(_, mut rest)] = self.segments(PT_NOTE)?[..] else { bail!("not one PT_NOTE") };
        let mut notes = Vec::new();
        while !rest.is_empty() {
            ensure!(rest.len() >= 12, "a note is cut");
            let [name, len, kind] = [0, 4, 8].map(|at| self.number(&rest[at..at + 4]) as usize);
            let start = 12 + name.next_multiple_of(4);
            let end = start + len.next_multiple_of(4);
            ensure!(rest.len() >= end, "a note is cut");
            let mut note = rest[..end].to_vec();
            if pid_swapped && self.bytes[5] == 2 && kind as u64 == NT_PRSTATUS {
                note[start + 32..start + 36].fill(0);
            }
            notes.push(note);
            rest = &rest[end..];
        }
        Ok(notes)
    }
}
