//! What real QEMUs wrote. `tests/data/main-channel/README.md` tells how each file was made; expectations are what QEMU
//! was told and what its memory held.

use crate::pump::{Pumped, pump, pump_with};
use crate::streams::name;
use qevm_savevm::block_migration::{BLOCK_LEN, BlockRecord};
use qevm_savevm::command::{Command, DiscardRange, PostcopyAdvise, RamDiscard};
use qevm_savevm::configuration::{Configuration, ConfigurationSubsection};
use qevm_savevm::dirty_bitmap::{Chunk, ChunkContent, start_flag};
use qevm_savevm::framing::SectionKind;
use qevm_savevm::ram::{MappedRamHeader, RamBlock, RamRecord};
use qevm_savevm::{Decoder, DecoderOptions, Encoder, Error, ErrorKind, Event, Footers, StreamError, xbzrle};
use qevm_wire::{Decode, Driver, Window, WireError, next_event};

const MIB: u64 = 1 << 20;

fn file(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/data/main-channel/{name}.qevm", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn read(decoder: &mut Decoder, bytes: &[u8]) -> Result<Pumped, Error> {
    let pumped = pump(decoder, bytes, || 1)?;
    assert_eq!(pumped.bytes, bytes);
    assert_eq!(pump(&mut Decoder::new(DecoderOptions::default()), bytes, || 1 << 20)?, pumped);
    Ok(pumped)
}

fn blocks(decoder: &Decoder) -> Vec<RamBlock> {
    decoder.ram_blocks().iter().map(|(_, block)| block.clone()).collect()
}

/// The blocks of `-M microvm -m 32` with a firmware of 64 KiB.
fn microvm_blocks() -> Vec<RamBlock> {
    let block = |text, len| RamBlock::new(name(text), len);
    vec![
        block("microvm.ram", 32 * MIB),
        block("/rom@etc/acpi/tables", 4096),
        block("pc.bios", 65536),
        block("/rom@etc/table-loader", 4096),
        block("/rom@etc/acpi/rsdp", 4096),
    ]
}

fn position(pumped: &Pumped, event: &Event<'_>) -> usize {
    let text = format!("{event:?}");
    pumped.events.iter().position(|(_, event)| *event == text).unwrap_or_else(|| panic!("no {text}"))
}

/// Shows the decoder the whole stream, and the caller every event with what follows it.
fn each(bytes: &[u8], mut action: impl FnMut(&Event<'_>, &[u8], u64)) {
    let (mut decoder, mut rest) = (Decoder::new(DecoderOptions::default()), bytes);
    while let Some((event, read)) = next_event(&mut rest, &mut decoder).unwrap() {
        let consumed = read.len();
        let following = &bytes[decoder.offset() as usize..];
        action(&event, following, decoder.offset());
        rest.consume(consumed);
    }
}

/// The guest counted in its page while it was sent; what QEMU's memory held when it had stopped is known.
#[test]
fn xbzrle_pages_become_what_the_guest_had() {
    for (stream, counter) in [("5.2-microvm-xbzrle", 86u64), ("10.0-microvm-xbzrle", 449)] {
        let bytes = file(stream);
        let mut decoder = Decoder::new(DecoderOptions::default());
        read(&mut decoder, &bytes).unwrap();
        assert_eq!(blocks(&decoder), microvm_blocks());

        let mut page = vec![0xff; 4096];
        let (mut wholes, mut differences) = (0, 0);
        each(&bytes, |event, payload, at| match event {
            Event::Ram(RamRecord::Page(_)) => {
                page.copy_from_slice(&payload[..4096]);
                wholes += 1;
            }
            Event::Ram(RamRecord::Xbzrle { data, .. }) => {
                xbzrle::decode(data, at - data.len() as u64, &mut page).unwrap();
                differences += 1;
            }
            _ => {}
        });
        assert!(wholes >= 1 && differences >= 2, "{stream}: {wholes} {differences}");
        let (found, rest) = page.split_at(8);
        assert_eq!(found, counter.to_le_bytes(), "{stream}");
        assert!(rest.iter().all(|byte| *byte == 0), "{stream}");
    }
}

#[test]
fn compressed_pages_are_zlib_streams_of_one_page() {
    let bytes = file("7.2-microvm-compress");
    read(&mut Decoder::new(DecoderOptions::default()), &bytes).unwrap();
    let mut found = 0;
    each(&bytes, |event, _, _| {
        if let Event::Ram(RamRecord::Compressed { data, .. }) = event {
            // Header of a zlib stream at the default compress-level 1: a multiple of 31.
            assert_eq!(data[..2], [0x78, 0x01]);
            found += 1;
        }
    });
    assert_eq!(found, 3);
}

#[test]
fn dirty_bitmaps() {
    for stream in ["5.2-pc-dirty-bitmaps", "11.1-pc-dirty-bitmaps"] {
        let bytes = file(stream);
        let pumped = read(&mut Decoder::new(DecoderOptions::default()), &bytes).unwrap();
        position(&pumped, &Event::Command(Command::PostcopyAdvise(None)));
        let chunk = |node: Option<&str>, bitmap: Option<&str>, content| {
            Event::DirtyBitmap(Chunk::Bitmap { node: node.map(name), bitmap: bitmap.map(name), content })
        };
        let start = ChunkContent::Start { granularity: 4096, flags: start_flag::ENABLED };
        let bits = ChunkContent::Bits { first_sector: 0, sectors: 16384, len: Some(256) };
        let order = [
            position(&pumped, &chunk(Some("q0"), Some("b0"), start)),
            position(&pumped, &chunk(None, None, bits)),
            position(&pumped, &chunk(None, None, ChunkContent::Complete)),
        ];
        assert!(order.is_sorted(), "{stream}");

        // 12 KiB at 64 KiB are bits 16 to 18, 4 KiB at 5 MiB are bit 1280.
        let mut expected = [0u8; 256];
        (expected[2], expected[160]) = (0x07, 0x01);
        each(&bytes, |event, payload, _| {
            if let Event::DirtyBitmap(Chunk::Bitmap { content: ChunkContent::Bits { .. }, .. }) = event {
                assert_eq!(payload[..256], expected, "{stream}");
            }
        });
    }
}

#[test]
fn block_migration() {
    let bytes = file("5.2-pc-block-migration-head");
    let mut decoder = Decoder::new(DecoderOptions::default());
    let error = read(&mut decoder, &bytes).unwrap_err();
    // The disk ends in the middle of its last block, but the block is sent whole.
    assert_eq!(error.kind, WireError::Truncated { needed: BLOCK_LEN, available: 100 }.into());
    assert_eq!(error.path.to_string(), "section 1 'block'");

    let mut blocks = Vec::new();
    let mut progress = Vec::new();
    let decoder = Decoder::new(DecoderOptions::default());
    let mut driver = Driver::new(&*bytes, decoder);
    while let Ok(Some(event)) = driver.next() {
        match event {
            Event::BlockMigration(BlockRecord::DeviceBlock { sector, device, zero }) => {
                assert_eq!(device, "d0");
                blocks.push((sector, zero));
            }
            Event::BlockMigration(BlockRecord::Progress(percent)) => progress.push(percent),
            Event::Ram(RamRecord::Page(_)) => panic!("no pages are left"),
            _ => {}
        }
    }
    assert_eq!(blocks, [(0, true), (2048, true), (4096, true), (6144, false)]);
    assert_eq!(progress, [0, 28, 57, 85]);
}

#[test]
fn huge_pages_announce_their_size() {
    for stream in ["5.2-microvm-huge-pages-head", "11.1-microvm-huge-pages-head"] {
        let mut decoder = Decoder::new(DecoderOptions::default());
        let bytes = file(stream);
        let error = pump(&mut decoder, &bytes, || 1).unwrap_err();
        assert_eq!((error.is_truncated(), error.offset), (true, bytes.len() as u64));
        let blocks = blocks(&decoder);
        let sizes: Vec<_> = blocks.iter().map(|block| (block.name.as_str().unwrap(), block.page_size)).collect();
        let expected = [
            ("m0", Some(2 * MIB)),
            ("/rom@etc/acpi/tables", None),
            ("pc.bios", None),
            ("/rom@etc/table-loader", None),
            ("/rom@etc/acpi/rsdp", None),
        ];
        assert_eq!(sizes, expected, "{stream}");
        assert_eq!(blocks[0].used_length, 32 * MIB);
    }
}

#[test]
fn a_broken_postcopy_goes_on() {
    let (mut first, mut encoder) = (Decoder::new(DecoderOptions::default()), Encoder::default());
    let bytes = file("10.0-microvm-postcopy-recovery");
    let error = pump_with(&mut first, &mut encoder, &bytes, || 7).unwrap_err();
    assert!(error.is_truncated(), "{error}");
    assert_eq!(error.path.to_string(), "section 1 'ram'");

    let bytes = file("10.0-microvm-postcopy-recovery-resumed");
    let pumped = pump_with(&mut first.recovery(), &mut encoder.recovery(), &bytes, || 7).unwrap();
    assert_eq!(pumped.bytes, bytes);
    let mut expected: Vec<_> = microvm_blocks().into_iter().map(|block| Command::RecvBitmap(block.name)).collect();
    expected.push(Command::PostcopyResume);
    let expected: Vec<_> = expected.into_iter().map(|command| format!("{:?}", Event::Command(command))).collect();
    let found: Vec<_> = pumped.events.iter().take(expected.len()).map(|(_, event)| event.clone()).collect();
    assert_eq!(found, expected);
}

#[test]
fn postcopy_sends_the_devices_in_a_package() {
    let bytes = file("11.1-microvm-postcopy-multifd");
    let mut decoder = Decoder::new(DecoderOptions::default());
    let pumped = read(&mut decoder, &bytes).unwrap();
    assert_eq!(blocks(&decoder), microvm_blocks());
    let advise = PostcopyAdvise { page_size_summary: 4096, target_page_size: 4096 };
    let discard =
        RamDiscard { block: name("microvm.ram"), ranges: vec![DiscardRange { start: 4 * MIB, len: 28 * MIB }] };
    let order: Vec<_> = [
        Command::OpenReturnPath,
        Command::Ping(1),
        Command::PostcopyAdvise(Some(advise)),
        Command::SwitchoverStart,
        Command::RamDiscard(discard),
        Command::Ping(2),
        Command::PostcopyListen,
        Command::Ping(3),
        Command::Ping(0x42),
        Command::PostcopyRun,
        Command::Ping(4),
    ]
    .map(|command| position(&pumped, &Event::Command(command)))
    .to_vec();
    assert!(order.is_sorted(), "{order:?}");
    let flushes = pumped.events.iter().filter(|(_, event)| *event == "Ram(MultifdFlush)").count();
    assert_eq!(flushes, 2);
}

/// Pages first, then the devices as they were before them; `ram` has no END.
#[test]
fn a_background_snapshot() {
    let bytes = file("7.2-microvm-background-snapshot");
    let pumped = read(&mut Decoder::new(DecoderOptions::default()), &bytes).unwrap();
    let section_end = format!("kind: {:?}", SectionKind::End);
    assert!(!pumped.events.iter().any(|(_, event)| event.contains(&section_end)));
    assert_eq!(pumped.events.last().unwrap().1, "Eof");
    // Lengths of sections that the release fixes: `timer` 24 bytes, `i8259` 16, `i8254` 108.
    let mut bodies = Vec::new();
    let mut device = String::new();
    each(&bytes, |event, _, _| match event {
        Event::Section { kind: SectionKind::Full, header } => device = header.idstr.to_string(),
        Event::Body(body) => bodies.push((device.clone(), body.len())),
        _ => {}
    });
    for expected in [("timer", 24), ("i8259", 16), ("i8254", 108)] {
        assert!(bodies.iter().any(|(device, len)| (device.as_str(), *len) == expected), "{bodies:?}");
    }
}

#[test]
fn shared_memory_is_listed_with_addresses() {
    let mut decoder = Decoder::new(DecoderOptions::default());
    let pumped = read(&mut decoder, &file("10.0-q35-ignore-shared")).unwrap();
    let capabilities = ConfigurationSubsection::Capabilities(vec![name("x-ignore-shared")]);
    let configuration = Configuration { machine: b"pc-q35-10.0".to_vec(), subsections: vec![capabilities] };
    assert_eq!(position(&pumped, &Event::Configuration(configuration)), 1);
    let found: Vec<_> =
        blocks(&decoder).iter().map(|block| (block.name.to_string(), block.used_length, block.address)).collect();
    let block = |name: &str, len, address| (name.to_string(), len, Some(address));
    let expected = [
        block("pc.ram", 32 * MIB, 0),
        block("/rom@etc/acpi/tables", 131_072, 0),
        // The firmware ends at 4 GiB, the option ROMs start at 768 KiB.
        block("pc.bios", 262_144, (4 << 30) - 262_144),
        block("pc.rom", 131_072, 0xc_0000),
        block("/rom@etc/table-loader", 4096, 0),
        block("/rom@etc/acpi/rsdp", 4096, 0),
    ];
    assert_eq!(found, expected);
}

#[test]
fn the_uuid() {
    let pumped = read(&mut Decoder::new(DecoderOptions::default()), &file("10.0-q35-validate-uuid")).unwrap();
    let uuid = 0x2bbd4b29_9d2b_4e0b_9d0e_1f3f6f0e7a11u128.to_be_bytes();
    let subsections = vec![ConfigurationSubsection::Uuid(uuid)];
    position(&pumped, &Event::Configuration(Configuration { machine: b"pc-q35-10.0".to_vec(), subsections }));
}

#[test]
fn a_mapped_ram_file_jumps_to_the_end_of_the_pages() {
    let bytes = file("11.1-pc-mapped-ram-head");
    let mut decoder = Decoder::new(DecoderOptions::default());
    let error = pump(&mut decoder, &bytes, || 1).unwrap_err();
    let blocks = blocks(&decoder);
    let [block] = blocks.as_slice() else { panic!("{blocks:?}") };
    assert_eq!((block.name.to_string(), block.used_length), ("pc.ram".to_string(), 32 * MIB));
    let Some(MappedRamHeader { page_size: 4096, bitmap_offset, pages_offset }) = block.mapped_ram else { panic!() };
    // The bitmap starts where the header ends, the pages at the next MiB, and the stream goes on after them.
    assert_eq!(pages_offset, MIB);
    assert_eq!(error.offset, bitmap_offset);
    let needed = pages_offset + 32 * MIB - bitmap_offset;
    let available = bytes.len() as u64 - bitmap_offset;
    assert_eq!(error.kind, WireError::Truncated { needed, available }.into());
}

#[test]
fn an_old_machine_type_has_neither_configuration_nor_footers() {
    let bytes = file("7.2-pc-i440fx-2.3-head");
    let mut decoder = Decoder::new(DecoderOptions::default());
    let error = pump(&mut decoder, &bytes, || 1).unwrap_err();
    assert_eq!(decoder.footers(), Footers::Absent);
    assert_eq!(error.kind, ErrorKind::Stream(StreamError::LengthUnknown));
    assert_eq!(error.path.to_string(), "section 0 'timer'");
    let names: Vec<_> = blocks(&decoder).iter().map(|block| block.name.to_string()).collect();
    let expected = [
        "pc.ram",
        "vga.vram",
        "/rom@etc/acpi/tables",
        "pc.bios",
        "0000:00:03.0/virtio-net-pci.rom",
        "0000:00:07.0/e1000.rom",
        "pc.rom",
        "0000:00:02.0/vga.rom",
        "/rom@etc/table-loader",
        "/rom@etc/acpi/rsdp",
    ];
    assert_eq!(names, expected);
}
