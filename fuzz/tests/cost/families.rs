//! Inputs that come in any length: twice as long must not cost more than twice as much, and a bit.

use crate::cost::Cost;
use crate::drivers::{self, Files, measure};
use crate::generate::{Random, end_of_ram, files, header, name, repository, start};
use qevm_inspect::ram::Keep;
use qevm_multifd::{ChannelEncoder, EncoderOptions, Init, PacketLayout, Pages, Uuid};
use qevm_returnpath::{Encoder, Message};
use qevm_savevm::StreamWriter;
use qevm_savevm::command::{Command, DiscardRange, PostcopyAdvise, RamDiscard};
use qevm_savevm::ram::{BlockId, MappedRamHeader};
use qevm_savevm::vmdesc::{Catalogue, Description, Schema};
use qevm_wire::{CountedString, Limits, QemuVersion, Writer};
use std::fmt::Write as _;

/// Reads an input, and says how many calls that took.
type Read = fn(&Files) -> u64;

/// Makes the input with `count` of whatever it is made of.
type Make = fn(u64) -> Files;

const PAGE: u64 = 4096;

/// Families by name, with the count that they are first tried with.
pub(crate) const FAMILIES: [(&str, u64, Make); 22] = [
    ("zero pages far apart", 3000, |count| zero_pages(count, |i| i << 26)),
    ("zero pages in order", 8000, |count| zero_pages(count, |i| i * PAGE)),
    ("zero pages backwards", 8000, |count| zero_pages(count, move |i| (count - i) * PAGE)),
    ("zero pages in any order", 8000, |count| zero_pages(count, move |i| i * 7919 % (2 * count) * PAGE)),
    ("pages far apart", 60, |count| data_pages(count)),
    ("discarded ranges", 1500, discards),
    ("one section again and again", 1000, |count| sections(count, |_| (9, "a".into()))),
    ("different sections", 1000, |count| sections(count, |i| (10 + i as u32, format!("s{i}")))),
    ("what looks like a footer", 8000, |count| one_section("x", &b"\x7e\0\0\0\x09x".repeat(count as usize))),
    ("headers in a section", 4000, |count| {
        one_section("x", &b"\x7e\0\0\0\x09\x04\0\0\0\x09\x01".repeat(count as usize))
    }),
    ("commands", 8000, |count| commands(count)),
    ("packages", 1500, |count| packages(count)),
    ("blocks", 1000, |count| Files::main(start(&vec![PAGE; count as usize]).take())),
    ("described fields", 800, |count| described(count, &["a", "b"])),
    ("described fields of one name", 800, |count| described(count, &["a"])),
    ("described devices", 400, devices),
    ("described subsections", 400, subsections),
    ("described arrays", 4000, |count| array(count, 1)),
    ("fields without bytes in arrays", 60, |count| array(count * 3, count)),
    ("packets of zero pages", 100, multifd),
    ("answers", 4000, answers),
    ("a bitmap of absent pages", 4096, mapped_ram),
];

fn zero_pages(count: u64, place: impl Fn(u64) -> u64) -> Files {
    let mut stream = start(&[1 << 50]);
    end_of_ram(&mut stream, |stream| {
        (0..count).for_each(|i| stream.zero_page(BlockId(0), place(i)).unwrap());
    });
    stream.eof().unwrap();
    Files::main(stream.take())
}

fn data_pages(count: u64) -> Files {
    let mut stream = start(&[1 << 50]);
    end_of_ram(&mut stream, |stream| {
        for i in 0..count {
            stream.page_header(BlockId(0), i << 30).unwrap();
            stream.payload(&[7; PAGE as usize]).expect("payload");
        }
    });
    stream.eof().unwrap();
    Files::main(stream.take())
}

/// Ranges that cover everything, between pages that come anew.
fn discards(count: u64) -> Files {
    let mut stream = start(&[1 << 40]);
    let advise = PostcopyAdvise { page_size_summary: PAGE, target_page_size: PAGE };
    stream.command(Command::PostcopyAdvise(Some(advise))).unwrap();
    stream.section_part(2).unwrap();
    (0..count).for_each(|i| stream.zero_page(BlockId(0), (i << 26) % (1 << 40)).unwrap());
    stream.eos().unwrap();
    stream.footer().unwrap();
    for i in 0..count {
        // All but the first pages.
        let ranges = vec![DiscardRange { start: (1 + i % 7) * PAGE, len: (1 << 39) }];
        stream.command(Command::RamDiscard(RamDiscard { block: name("pc.ram"), ranges })).unwrap();
    }
    end_of_ram(&mut stream, |_| {});
    stream.eof().unwrap();
    Files::main(stream.take())
}

fn whole(stream: &mut StreamWriter, sections: &[(u32, String, Vec<u8>)], description: Option<&str>) -> Files {
    end_of_ram(stream, |_| {});
    for (id, idstr, body) in sections {
        stream.section_full(&header(*id, idstr, 0, 1), body).unwrap();
    }
    stream.eof().unwrap();
    if let Some(text) = description {
        stream.vmdesc(text).unwrap();
    }
    Files::main(stream.take())
}

fn sections(count: u64, section: impl Fn(u64) -> (u32, String)) -> Files {
    let sections = (0..count).map(section).map(|(id, idstr)| (id, idstr, vec![1, 2])).collect::<Vec<_>>();
    whole(&mut start(&[PAGE]), &sections, None)
}

fn one_section(idstr: &str, body: &[u8]) -> Files {
    whole(&mut start(&[PAGE]), &[(9, idstr.to_owned(), body.to_vec())], None)
}

fn commands(count: u64) -> Files {
    let mut stream = start(&[PAGE]);
    (0..count).for_each(|i| stream.command(Command::Ping(i as u32)).unwrap());
    whole(&mut stream, &[], None)
}

fn packages(count: u64) -> Files {
    let mut stream = start(&[PAGE]);
    (0..count).for_each(|_| stream.package(b"\x08\0\x02\0\x04\0\0\0\x03").unwrap());
    whole(&mut stream, &[], None)
}

fn description(devices: impl IntoIterator<Item = (String, String)>) -> String {
    let mut text = r#"{"page_size": 4096, "devices": ["#.to_owned();
    for (number, (name, fields)) in devices.into_iter().enumerate() {
        let comma = if number > 0 { "," } else { "" };
        write!(text, r#"{comma}{{"name":"{name}","instance_id":0,"vmsd_name":"v","version":1,"fields":[{fields}]}}"#)
            .unwrap();
    }
    text + "]}"
}

fn fields(count: u64, field: impl Fn(u64) -> String) -> String {
    (0..count).map(field).collect::<Vec<_>>().join(",")
}

fn described(count: u64, names: &[&str]) -> Files {
    let field = |i: u64| format!(r#"{{"name":"{}","type":"uint8","size":1}}"#, names[i as usize % names.len()]);
    let text = description([("d".to_owned(), fields(count, field))]);
    whole(&mut start(&[PAGE]), &[(9, "d".to_owned(), vec![3; count as usize])], Some(&text))
}

fn devices(count: u64) -> Files {
    let field = r#"{"name":"a","type":"uint8","size":1}"#;
    let text = description((0..count).map(|i| (format!("d{i}"), field.to_owned())));
    let sections: Vec<_> = (0..count).map(|i| (10 + i as u32, format!("d{i}"), vec![1])).collect();
    whole(&mut start(&[PAGE]), &sections, Some(&text))
}

fn subsections(count: u64) -> Files {
    let (mut text, mut body) = (String::new(), Vec::new());
    for i in 0..count {
        let comma = if i > 0 { "," } else { "" };
        write!(text, r#"{comma}{{"vmsd_name":"d/{i}","version":1,"fields":[]}}"#).unwrap();
        let name = format!("d/{i}");
        body.extend([5, name.len() as u8]);
        body.extend(name.as_bytes());
        body.extend([0, 0, 0, 1]);
    }
    let text = format!(
        r#"{{"devices":[{{"name":"d","instance_id":0,"vmsd_name":"d","version":1,"fields":[],"subsections":[{text}]}}]}}"#
    );
    whole(&mut start(&[PAGE]), &[(9, "d".to_owned(), body)], Some(&text))
}

/// An array of structures of one byte and `empty` fields without any.
fn array(count: u64, empty: u64) -> Files {
    let inside = fields(empty, |i| format!(r#"{{"name":"e{i}","type":"buffer","size":0}}"#));
    let field = format!(
        r#"{{"name":"a","type":"struct","size":1,"array_len":{count},"struct":{{"vmsd_name":"n","version":1,
        "fields":[{inside},{{"name":"b","type":"uint8","size":1}}]}}}}"#
    );
    let text = description([("d".to_owned(), field)]);
    whole(&mut start(&[PAGE]), &[(9, "d".to_owned(), vec![3; count as usize])], Some(&text))
}

fn multifd(count: u64) -> Files {
    let mut main = start(&[1 << 50]);
    main.section_end(2).unwrap();
    main.multifd_flush().unwrap();
    main.eos().unwrap();
    main.footer().unwrap();
    main.eof().unwrap();
    let options = EncoderOptions { layout: PacketLayout::ZeroPages, ..EncoderOptions::default() };
    let (mut encoder, mut writer) = (ChannelEncoder::new(options), Writer::new());
    encoder.init(&Init::new(Uuid::default(), 0), &mut writer).unwrap();
    let block = name("pc.ram");
    for packet in 0..count {
        let zero: Vec<u64> = (0..128).map(|i| (packet * 128 + i) << 26).collect();
        let pages = Pages { block: &block, normal: &[], zero: &zero, packet_num: packet };
        encoder.pages(&pages, 0, &mut writer).unwrap();
    }
    encoder.sync(count, &mut writer).unwrap();
    Files { channel: Some(writer.as_bytes().to_vec()), ..Files::main(main.take()) }
}

fn answers(count: u64) -> Files {
    let (mut encoder, mut writer) = (Encoder::default(), Writer::new());
    // The last PING is answered first.
    for value in (0..count as u32).rev() {
        encoder.message(&Message::Pong { value }, &mut writer).unwrap();
    }
    encoder.message(&Message::Shut { status: 0 }, &mut writer).unwrap();
    Files { return_path: Some(writer.as_bytes().to_vec()), ..commands(count) }
}

/// `count` bytes of bitmap, in which no page is present: the pages' places are left out of the file.
fn mapped_ram(count: u64) -> Files {
    let used_length = count * 8 * PAGE;
    let mut stream = b"QEVM\0\0\0\x03\x07\0\0\0\x07microvm\x05\x1aconfiguration/capabilities".to_vec();
    stream.extend(b"\0\0\0\x01\0\0\0\x01\x0amapped-ram");
    stream.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    stream.extend((used_length | 4).to_be_bytes());
    stream.extend(b"\x06pc.ram");
    stream.extend(used_length.to_be_bytes());
    let at = stream.len() as u64 + MappedRamHeader::LEN;
    let pages_offset = (at + count).next_multiple_of(PAGE);
    stream.extend(
        [&1u32.to_be_bytes()[..], &PAGE.to_be_bytes(), &at.to_be_bytes(), &pages_offset.to_be_bytes()].concat(),
    );
    stream.resize(pages_offset as usize, 0);
    Files::main(stream)
}

/// Judges what a reader makes of a family.
pub(crate) fn judge(
    what: &str,
    count: u64,
    make: impl Fn(u64) -> Files,
    read: impl Fn(&Files) -> u64,
) -> Option<String> {
    let costs: Vec<Cost> = [count, 2 * count]
        .map(|count| {
            let files = make(count);
            measure(|| read(&files))
        })
        .to_vec();
    costs[0].judge_doubling(&costs[1]).err().map(|reason| format!("{what}: {reason}"))
}

#[test]
fn an_input_twice_as_long_makes_twice_the_work() {
    let mut beyond = Vec::new();
    for (what, count, make) in FAMILIES {
        let readers: [(&str, Read); 6] = [
            ("decoder", drivers::main_channel),
            ("page channel", drivers::page_channel),
            ("return path", drivers::return_path),
            ("walk", |files| drivers::walk(files, Keep::Digests)),
            ("walk with contents", |files| drivers::walk(files, Keep::Image)),
            ("index of pages", |files| drivers::walk(files, Keep::Places)),
        ];
        for (reader, read) in readers {
            beyond.extend(judge(&format!("{what}, {reader}"), count, make, read));
        }
    }
    assert!(beyond.is_empty(), "{}", beyond.join("\n"));
}

/// Sections that no description tells about, with bodies that more and more of the known layouts could explain.
#[test]
fn a_section_twice_as_long_makes_twice_the_search() {
    let mut beyond = Vec::new();
    let releases = [QemuVersion::NEWEST, QemuVersion::new(7, 2)];
    let mut names: Vec<(CountedString, u32)> = Vec::new();
    for (_, seed) in files(&repository().join("fuzz/seeds/savevm_catalogue")) {
        let mut parts = seed.splitn(2, |byte| *byte == 0);
        if let (Some(idstr), Some([version, ..])) = (parts.next(), parts.next()) {
            names.push((name(idstr), (*version).into()));
        }
    }
    names.extend([
        (name("virtio-gpu"), 1),
        (name("slirp"), 4),
        (name("0000:00:02.0/virtio-net"), 11),
        (name("cpu"), 12),
    ]);
    names.sort_by_key(|(name, version)| (name.to_string(), *version));
    names.dedup();
    let mut random = Random::new(7);
    for (idstr, version) in names {
        for fill in [0, 1, 0x30, 0x31] {
            let noise = random.next() as usize % 512;
            let read = |files: &Files| {
                drop(Catalogue::embedded().describe(&idstr, 0, version, &files.main, &releases));
                0
            };
            let make = |count| Files::main(vec![fill; count as usize + noise]);
            beyond.extend(judge(&format!("{idstr} of {fill:#x}"), 6000, make, read));
        }
    }
    assert!(beyond.is_empty(), "{}", beyond.join("\n"));
}

#[test]
fn a_text_twice_as_long_makes_twice_the_work() {
    let devices = |count| {
        let field = |i| format!(r#"{{"field":"f{i}","version_id":0,"size":1,"field_exists":{}}}"#, i % 2 == 0);
        let device = |i: u64| {
            format!(
                r#""d{i}":{{"Description":{{"name":"d","version_id":1,"minimum_version_id":1,"Fields":[{}]}}}}"#,
                fields(i % 5 + 1, field)
            )
        };
        Files::main(format!("{{{}}}", fields(count, device)).into_bytes())
    };
    let schema = |files: &Files| {
        let schema = Schema::parse(&files.main, &Limits::default()).expect("a schema");
        schema.descriptions().len() as u64
    };
    let nested = |count: u64| {
        Files::main(
            format!(r#"{{"devices":[],"x":{}0{}}}"#, "[".repeat(40), ",[0]".repeat(count as usize) + &"]".repeat(40))
                .into_bytes(),
        )
    };
    let text = |files: &Files| u64::from(Description::parse(&files.main, &Limits::default()).is_ok());
    let beyond = [judge("schema", 1000, devices, schema), judge("text", 4000, nested, text)];
    let beyond: Vec<String> = beyond.into_iter().flatten().collect();
    assert!(beyond.is_empty(), "{}", beyond.join("\n"));
}
