//! Inputs, the same in each run: seeds that were changed, and streams made of random items.

use qevm_savevm::StreamWriter;
use qevm_savevm::command::{Command, DiscardRange, PostcopyAdvise, RamDiscard};
use qevm_savevm::configuration::Configuration;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::ram::{BlockId, RamBlock};
use qevm_wire::CountedString;
use std::fs;
use std::path::{Path, PathBuf};

/// A generator of numbers (xorshift64*, Vigna 2014).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
}

pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The files of a folder, by their names, in order.
pub(crate) fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect();
    files.sort();
    files
}

/// The hostile streams, as files.
pub(crate) fn hostile() -> Vec<PathBuf> {
    let folder = repository().join("fuzz/hostile");
    let names = files(&folder).into_iter().map(|(name, _)| name).filter(|name| !name.ends_with(".md"));
    names.map(|name| folder.join(name)).collect()
}

/// Changes some bytes: numbers that claim much, pieces twice, pieces left out, other bytes.
pub(crate) fn mutate(random: &mut Random, seed: &[u8]) -> Vec<u8> {
    const CLAIMS: [&[u8]; 8] = [
        &[0xff, 0xff, 0xff, 0xff],
        &[0x7f, 0xff, 0xff, 0xff],
        &[0, 0xff, 0xff, 0xff],
        &[0, 0, 0x10, 0, 0, 0, 0, 0],
        &[0xff; 8],
        &[0; 8],
        b"99999999",
        b"18446744073709551615",
    ];
    let mut bytes = seed.to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len() as u64 + 1) as usize;
        let len = (random.below(64) as usize).min(bytes.len() - at);
        match random.below(5) {
            0 => {
                let claim = *random.one(&CLAIMS);
                let end = (at + claim.len()).min(bytes.len());
                bytes.splice(at..end, claim.iter().copied());
            }
            1 => {
                let piece = bytes[at..at + len].to_vec();
                let times = 1 + random.below(50) as usize;
                bytes.splice(at..at, piece.repeat(times));
            }
            2 => drop(bytes.drain(at..at + len)),
            3 if at < bytes.len() => bytes[at] = random.next() as u8,
            _ => bytes.truncate(at.max(16)),
        }
    }
    bytes
}

pub(crate) fn name(name: impl AsRef<[u8]>) -> CountedString {
    CountedString::new(name).expect("a name of at most 255 bytes")
}

pub(crate) fn header(section_id: u32, idstr: &str, instance_id: u32, version_id: u32) -> SectionHeader {
    SectionHeader { section_id, idstr: name(idstr), instance_id, version_id }
}

/// A stream up to the end of its first section, with blocks of these lengths.
pub(crate) fn start(blocks: &[u64]) -> StreamWriter {
    let mut stream = StreamWriter::default();
    stream.header(Some(&Configuration::new("pc-q35-10.0"))).unwrap();
    stream.section_start(&header(2, "ram", 0, 4)).unwrap();
    let blocks = blocks.iter().enumerate().map(|(i, len)| {
        let block = if i == 0 { "pc.ram".to_owned() } else { format!("block{i}") };
        RamBlock::new(name(block), *len)
    });
    stream.ram_setup(blocks).unwrap();
    stream.eos().unwrap();
    stream.footer().unwrap();
    stream
}

/// Ends the `ram` section with what `pages` writes.
pub(crate) fn end_of_ram(stream: &mut StreamWriter, pages: impl FnOnce(&mut StreamWriter)) {
    stream.section_end(2).unwrap();
    pages(stream);
    stream.eos().unwrap();
    stream.footer().unwrap();
}

const NAMES: [&str; 8] =
    ["cpu", "serial", "timer", "0000:00:02.0/virtio-net", "fw_cfg", "i8254", "slirp", "a name that nobody knows"];

/// A stream of random items, most of it legal.
pub(crate) fn stream(random: &mut Random) -> Vec<u8> {
    let lens = [1 << 20, 1 << 30, 1 << 43, 1 << 50, 4096, 64 << 20];
    let blocks: Vec<u64> = (0..1 + random.below(3)).map(|_| *random.one(&lens)).collect();
    let mut stream = start(&blocks);
    let pages = |stream: &mut StreamWriter, random: &mut Random| {
        for _ in 0..random.below(60) {
            let block = random.below(blocks.len() as u64) as usize;
            let offset = random.below(blocks[block] / 4096) * 4096;
            match random.below(8) {
                0 => {
                    stream.page_header(BlockId(block as u32), offset).unwrap();
                    stream.payload(&[random.next() as u8; 4096]).expect("payload");
                }
                // Runs.
                1 => {
                    for page in 0..random.below(40) {
                        let offset = (offset + page * 4096) % blocks[block];
                        stream.zero_page(BlockId(block as u32), offset).unwrap();
                    }
                }
                _ => stream.zero_page(BlockId(block as u32), offset).unwrap(),
            }
        }
    };
    if random.below(3) == 0 {
        let advise = PostcopyAdvise { page_size_summary: 4096, target_page_size: 4096 };
        stream.command(Command::PostcopyAdvise(Some(advise))).unwrap();
    }
    for _ in 0..random.below(3) {
        stream.section_part(2).unwrap();
        pages(&mut stream, random);
        stream.eos().unwrap();
        stream.footer().unwrap();
    }
    for _ in 0..random.below(20) {
        let range = DiscardRange { start: 0, len: blocks[0] };
        let ranges = vec![range; 1 + random.below(5) as usize];
        match random.below(4) {
            0 => stream.command(Command::RamDiscard(RamDiscard { block: name("pc.ram"), ranges })).unwrap(),
            1 => stream.package(b"\x08\0\x02\0\x04\0\0\0\x03").unwrap(),
            _ => stream.command(Command::Ping(random.next() as u32)).unwrap(),
        }
    }
    end_of_ram(&mut stream, |stream| pages(stream, random));
    let mut devices = Vec::new();
    for id in 0..random.below(12) as u32 {
        let idstr = *random.one(&NAMES);
        let fill = *random.one(&[0, 1, 0x30, 0x31, 0x7e, 0x05]);
        let body = vec![fill; random.below(400) as usize];
        stream.section_full(&header(10 + id, idstr, id, 1 + random.below(3) as u32), &body).unwrap();
        devices.push((idstr, id, body.len()));
    }
    stream.eof().unwrap();
    if random.below(3) > 0 {
        let devices: Vec<String> = devices.iter().map(|(idstr, id, len)| device(random, idstr, *id, *len)).collect();
        stream.vmdesc(&format!(r#"{{"page_size": 4096, "devices": [{}]}}"#, devices.join(","))).unwrap();
    }
    stream.take()
}

/// A description of `len` bytes, with fields that take none.
fn device(random: &mut Random, idstr: &str, instance: u32, len: usize) -> String {
    let types = ["buffer", "uint8", "struct", "unused_buffer", "bitmap", "virtio", "qtailq", "nobody's type"];
    let mut fields = Vec::new();
    for number in 0..random.below(6) {
        let count = *random.one(&[1, 1000, 1_000_000, u64::MAX]);
        fields.push(format!(
            r#"{{"name": "e{number}", "type": "{}", "size": 0, "array_len": {count}}}"#,
            random.one(&types)
        ));
    }
    if len > 0 {
        let kind = random.one(&["uint8", "buffer", "struct"]);
        let nested = r#", "struct": {"vmsd_name": "n", "version": 1, "fields": [{"name": "z", "type": "buffer", "size": 0},
            {"name": "b", "type": "uint8", "size": 1}]}"#;
        let nested = if *kind == "struct" { nested } else { "" };
        fields.push(format!(r#"{{"name": "b", "type": "{kind}", "size": 1, "array_len": {len}{nested}}}"#));
    }
    format!(
        r#"{{"name": "{idstr}", "instance_id": {instance}, "vmsd_name": "v", "version": 1, "fields": [{}]}}"#,
        fields.join(",")
    )
}
