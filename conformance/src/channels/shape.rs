//! What a recorded migration looks like on the wire: proof that a row tried what its name says.

use super::setup::Setup;
use anyhow::{Context, Result, bail};
use qevm_multifd::{ChannelDecoder, ChannelOptions, Compression};
use qevm_savevm::framing::SectionKind;
use qevm_savevm::ram::RamRecord;
use qevm_savevm::{Decoder, DecoderOptions, Event};
use qevm_wire::{Driver, Profile, QemuVersion};
use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;

/// Counted on the main channel, up to the end of RAM.
#[derive(Debug, Default)]
struct Main {
    pages: u64,
    zeroes: u64,
    flushes: u64,
    eos: u64,
    mapped: bool,
}

/// Counted on all page channels together, but for SYNC packets, of which every channel has as many.
#[derive(Debug, Default)]
struct Pages {
    numbers: BTreeSet<u8>,
    methods: BTreeSet<&'static str>,
    normal: u64,
    zeroes: u64,
    syncs: BTreeSet<u64>,
}

/// Says in what the files are not what the set-up asks for.
///
/// # Errors
/// A file cannot be read or decoded.
pub(super) fn differences(
    main: &PathBuf,
    channels: &[PathBuf],
    setup: &Setup,
    profile: &Profile,
) -> Result<Vec<String>> {
    let (main, pages) = (read_main(main)?, read_channels(channels)?);
    let mut wrong = Vec::new();
    let mut expect = |holds: bool, what: String| {
        if !holds {
            wrong.push(what);
        }
    };
    let mapped = setup.has("mapped-ram");
    let multifd = setup.has("multifd") && !mapped;
    expect(main.mapped == mapped, format!("mapped-ram: {}", main.mapped));
    if multifd {
        let numbers: BTreeSet<u8> = (0..setup.channels as u8).collect();
        expect(pages.numbers == numbers, format!("channels {:?}", pages.numbers));
        expect(pages.methods.iter().eq([&setup.compression]), format!("compression {:?}", pages.methods));
        expect(main.pages == 0, format!("{} pages on the main channel", main.pages));
        let each_section = profile.multifd_flush_after_each_section;
        expect((main.flushes == 0) == each_section, format!("{} flush records", main.flushes));
        let announced = if each_section { main.eos } else { main.flushes };
        let syncs = &pages.syncs;
        expect(syncs.iter().eq([&announced]), format!("{syncs:?} SYNC packets for {announced} announced"));
    } else {
        expect(channels.is_empty(), format!("{} channels beside the main one", channels.len()));
    }
    if !mapped {
        let old = profile.qemu < QemuVersion::new(9, 0);
        let default = match profile.zero_page_detection {
            qevm_wire::profile::ZeroPageDetection::Multifd => "multifd",
            _ => "legacy",
        };
        let mode = if old { "legacy" } else { setup.zero_page.unwrap_or(default) };
        // Without page channels, multifd does what legacy does.
        let mode = if mode == "multifd" && !multifd { "legacy" } else { mode };
        let (on_main, in_packets) = (main.zeroes > 0, pages.zeroes > 0);
        let expected = (mode == "legacy", mode == "multifd");
        expect(
            (on_main, in_packets) == expected,
            format!("zero pages of {mode}: {} and {}", main.zeroes, pages.zeroes),
        );
    }
    Ok(wrong)
}

fn read_main(path: &PathBuf) -> Result<Main> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut driver = Driver::new(file, Decoder::new(DecoderOptions::default()));
    let (mut counted, mut ending) = (Main::default(), false);
    while let Some(event) = driver.next().with_context(|| format!("reading {}", path.display()))? {
        match event {
            Event::Ram(RamRecord::Page(_)) => counted.pages += 1,
            Event::Ram(RamRecord::Zero(_)) => counted.zeroes += 1,
            Event::Ram(RamRecord::MultifdFlush) => counted.flushes += 1,
            Event::Ram(RamRecord::EndOfSection) => counted.eos += 1,
            Event::Ram(RamRecord::Block(block)) => counted.mapped |= block.mapped_ram.is_some(),
            Event::SectionPart { kind: SectionKind::End, .. } => ending = true,
            Event::SectionFooter { .. } if ending => return Ok(counted),
            _ => {}
        }
    }
    bail!("{} ends before its RAM does", path.display())
}

fn read_channels(paths: &[PathBuf]) -> Result<Pages> {
    let mut counted = Pages::default();
    for path in paths {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let mut driver = Driver::new(file, ChannelDecoder::new(ChannelOptions::default()));
        let mut syncs = 0;
        while let Some(event) = driver.next().with_context(|| format!("reading {}", path.display()))? {
            match event {
                qevm_multifd::Event::Init(init) => drop(counted.numbers.insert(init.channel)),
                qevm_multifd::Event::Ram(packet) => {
                    syncs += u64::from(packet.is_sync());
                    counted.normal += u64::from(packet.normal_count());
                    counted.zeroes += u64::from(packet.zero_count());
                    if packet.normal_count() > 0 {
                        counted.methods.insert(Compression::name(packet.compression()));
                    }
                }
                _ => {}
            }
        }
        counted.syncs.insert(syncs);
    }
    Ok(counted)
}
