//! What people report of real files: each is read as QEMU reads it. See `streams/reported/README.md` for where the
//! values come from.

use crate::sample::{Ran, file, path, qevm, qevm_reading};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// The content of a file of `inspect/tests/streams/reported`.
pub(crate) fn reported(name: &str) -> Vec<u8> {
    let packed = std::fs::File::open(path(&format!("reported/{name}.xz"))).unwrap();
    let out = Command::new("xz").arg("-dc").stdin(packed).output().expect("xz is part of every Debian");
    assert!(out.status.success(), "{name}");
    out.stdout
}

pub(crate) fn base() -> Vec<u8> {
    reported("base.q")
}

/// Runs `qevm` with these words; `FILE` is the file, and `DIR/…` is in `dir`.
pub(crate) fn run(dir: &TempDir, words: &str, file: &Path) -> Ran {
    let folder = dir.path().display().to_string();
    let file = file.display().to_string();
    qevm(words.split(' ').map(|word| word.replace("FILE", &file).replace("DIR", &folder)))
}

pub(crate) fn good(dir: &TempDir, words: &str, file: &Path) -> String {
    let ran = run(dir, words, file);
    assert_eq!(ran.code, Some(0), "{words}: {}{}", ran.stdout, ran.stderr);
    ran.stdout
}

#[test]
fn lz4_files_are_read_like_the_plain_stream() {
    let dir = TempDir::new().unwrap();
    let plain = file(&dir, "base.q", &base());
    let compressed = reported("base.lz4");
    let whole = file(&dir, "base.q.lz4", &compressed);
    assert!(good(&dir, "verify FILE", &whole).contains("ok: "));
    assert!(good(&dir, &format!("diff {} FILE", plain.display()), &whole).contains("no differences"));
    // Cut where a block ends, which its decoder takes for the end.
    let cut = file(&dir, "cut.lz4", &compressed[..compressed.len() - 8]);
    let ran = run(&dir, "verify FILE", &cut);
    assert!(ran.code == Some(1) && ran.stderr.contains("the compressed data (lz4) ends early"), "{}", ran.stderr);
}

#[test]
fn a_volume_is_longer_than_the_stream_in_it() {
    let dir = TempDir::new().unwrap();
    let whole = base();
    let plain = file(&dir, "base.q", &whole);
    let fields = good(&dir, "inspect --fields FILE", &plain);
    let other = reported("dimm.q");
    let followed: [(&str, Vec<u8>); 5] = [
        ("zeros", vec![0; 1 << 20]),
        ("one byte", vec![6]),
        ("what is no text", (0..1u32 << 16).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()),
        ("the end of an older stream", whole[100_000..].to_vec()),
        ("the end of another guest's stream", other[whole.len()..].to_vec()),
    ];
    for (what, after) in followed {
        let volume = file(&dir, "volume", &[&whole[..], &after].concat());
        let verified = good(&dir, "verify FILE", &volume);
        let note = format!("{} bytes follow the end of the stream at byte {}", after.len(), whole.len());
        assert!(
            verified.contains(&note) && verified.contains("ok: ") && verified.contains("nothing opaque"),
            "{what}: {verified}"
        );
        // Every field is as without it: an older description explains nothing.
        let shown = good(&dir, "inspect --fields FILE", &volume);
        assert!(fields.lines().filter(|line| line.contains(" = ")).all(|line| shown.contains(line)), "{what}");
        assert_eq!(good(&dir, &format!("diff {} FILE", plain.display()), &volume), "no differences\n", "{what}");
        good(&dir, "extract --force --memory DIR/m.raw --devices DIR/d.json FILE", &volume);
        good(&dir, "check --machine pc-q35-11.1 FILE", &volume);
        good(&dir, "convert --force --out DIR/c.q FILE", &volume);
        let piped = qevm_reading(["verify", "-"], &std::fs::read(&volume).unwrap());
        assert_eq!(piped.code, Some(0), "{what}: {}", piped.stderr);
    }
}

#[test]
fn a_stream_that_is_cut_in_its_description_is_whole() {
    let dir = TempDir::new().unwrap();
    let whole = base();
    // The end of the stream, the description's type, its length, and its text of 44,414 bytes.
    let end = whole.len() - 44_414 - 5;
    for cut in [end, end + 1, end + 3, end + 5, end + 6, end + 1000, whole.len() - 9000, whole.len() - 1] {
        let cut_file = file(&dir, "cut.q", &whole[..cut]);
        assert_eq!(
            good(&dir, "check --machine pc-q35-11.1 FILE", &cut_file).matches("nothing stops").count(),
            1,
            "{cut}"
        );
        good(&dir, "extract --force --memory DIR/m.raw --elf DIR/core.elf --ram DIR/rams FILE", &cut_file);
        assert_eq!(std::fs::metadata(dir.path().join("m.raw")).unwrap().len(), 16 << 20);
        let verified = run(&dir, "verify FILE", &cut_file);
        assert_eq!(verified.code, Some(if cut == end { 0 } else { 1 }), "verify is strict: {cut} {}", verified.stderr);
    }
    let text = String::from_utf8_lossy(&whole[end + 5..]).replace("\"devices\"", "\"devises\"");
    let damaged = file(&dir, "damaged.q", &[&whole[..end + 5], text.as_bytes()].concat());
    good(&dir, "extract --force --memory DIR/m.raw --devices DIR/d.json FILE", &damaged);
}

#[test]
fn a_mapped_ram_file_that_is_cut_has_the_pages_before() {
    let dir = TempDir::new().unwrap();
    good(&dir, "convert --format mapped-ram --out DIR/mapped.q FILE", &file(&dir, "base.q", &base()));
    let mapped = std::fs::read(dir.path().join("mapped.q")).unwrap();
    good(&dir, "extract --ram DIR/rams FILE", &file(&dir, "whole.q", &mapped));
    let mut memory = std::fs::read(dir.path().join("rams/block-0.raw")).unwrap();
    let last = memory.chunks(4096).rposition(|page| page.iter().any(|byte| *byte != 0)).unwrap() * 4096;
    let place = mapped.chunks(4096).position(|page| page == &memory[last..last + 4096]).unwrap() * 4096;
    let ran = run(&dir, "extract --force --partial --ram DIR/rams FILE", &file(&dir, "cut.q", &mapped[..place + 100]));
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    memory[last..last + 4096].fill(0);
    assert!(std::fs::read(dir.path().join("rams/block-0.raw")).unwrap() == memory);
}

#[test]
fn a_stream_that_is_cut_gives_what_it_has() {
    let dir = TempDir::new().unwrap();
    let whole = base();
    for cut in [60_000, 130_000, 159_000] {
        let cut_file = file(&dir, "cut.q", &whole[..cut]);
        let words = "extract --force --json --ram DIR/rams --devices DIR/d.json FILE";
        assert_eq!(run(&dir, words, &cut_file).code, Some(1));
        let ran = run(&dir, &format!("{words} --partial"), &cut_file);
        assert_eq!((ran.code, &ran.json()["partial"]), (Some(0), &true.into()), "{cut}: {}", ran.stderr);
        assert!(ran.json()["notes"].to_string().contains("partial: "), "{}", ran.stdout);
        assert_eq!(std::fs::metadata(dir.path().join("rams/block-0.raw")).unwrap().len(), 16 << 20);
    }
    let ran = run(&dir, "extract --force --json --partial --ram DIR/rams FILE", &file(&dir, "whole.q", &whole));
    assert_eq!(ran.json()["partial"], false);
}

#[test]
fn the_advice_of_postcopy_tells_the_size_of_target_pages() {
    let dir = TempDir::new().unwrap();
    let stream = reported("microbit.q");
    // Header, configuration with the machine type alone; then the command, whose second word is the size.
    let configured = 8 + 1 + 4 + u32::from_be_bytes(stream[9..13].try_into().unwrap()) as usize;
    assert_eq!(stream[configured], 1, "section 'ram' starts");
    let text = stream.windows(12).position(|bytes| bytes == b"{\"page_size\"").expect("a description");
    let end = text - 5;
    for size in [0x400u64, 0x2000] {
        let advice = [&[8, 0, 3, 0, 16][..], &0x1000u64.to_be_bytes(), &size.to_be_bytes()].concat();
        let advised = [&stream[..configured], &advice, &stream[configured..end]].concat();
        let ran = run(&dir, "verify FILE", &file(&dir, "advised.q", &advised));
        assert_eq!(ran.code, Some(if size == 0x400 { 0 } else { 1 }), "{size:#x}: {}{}", ran.stdout, ran.stderr);
    }
}

#[test]
fn registers_of_32_bits_are_in_the_core() {
    let dir = TempDir::new().unwrap();
    let stream = file(&dir, "i386.q", &reported("i386.q"));
    let said = good(&dir, "extract --elf DIR/core.elf FILE", &stream);
    assert!(said.contains("ELF core with 1 CPUs") && !said.contains("not read"), "{said}");
    let core = std::fs::read(dir.path().join("core.elf")).unwrap();
    assert_eq!(core[18..20], 3u16.to_le_bytes(), "the machine is i386");
    // EIP in the PRSTATUS note of i386: after two program headers, the note's header and name, 120 bytes.
    let at = 64 + 2 * 56 + 12 + 8 + 120;
    assert_eq!(core[at..at + 4], 0xfff0u32.to_le_bytes());
}

#[test]
fn a_description_that_does_not_tell_all_of_a_section_stops_no_command() {
    let dir = TempDir::new().unwrap();
    let stream = file(&dir, "s390x.q", &reported("s390x.q"));
    for words in ["inspect FILE", "verify FILE", "extract --ram DIR/rams FILE"] {
        good(&dir, words, &stream);
    }
    let verified = good(&dir, "verify FILE", &stream);
    assert!(verified.contains("'s390_css'") && verified.contains("ok: "), "{verified}");
}

/// Where the devices are is in the names of their sections; the rest are QEMU's defaults, and what the command line
/// says.
#[test]
fn virtio_devices_of_s390x_are_not_taken_for_pci_devices() {
    let dir = TempDir::new().unwrap();
    let stream = file(&dir, "ccw.q", &reported("ccw.q"));
    let shown = good(&dir, "inspect --section virtio FILE", &stream);
    assert!(!shown.contains("virtio-pci"), "{shown}");
    let devices: Vec<&str> = shown.split("\n/fe.0.").skip(1).collect();
    assert_eq!(devices.len(), 8, "{shown}");
    for (number, device) in devices.iter().enumerate() {
        assert!(device.starts_with(&format!("{number:04x}/virtio-")), "{device}");
        // Control unit type 0x3832 is virtio (virtio 1.2, 4.3.1).
        for words in [&format!("devno = {number:#x} "), "cssid = 0xfe ", "cu_type = 0x3832 ", "revision = 0xffffffff "]
        {
            assert!(device.contains(words), "{words}: {device}");
        }
    }
    for words in
        ["transport  (virtio-ccw, 495 bytes", "mac = 525400123456", "queues = 0x3 ", "num = 0x100 ", "vector = 0xffff "]
    {
        assert!(devices[0].contains(words), "{words}: {}", devices[0]);
    }
    assert!(good(&dir, "verify FILE", &stream).contains("ok: "));
}

#[test]
fn target_pages_have_the_size_that_the_description_tells() {
    let dir = TempDir::new().unwrap();
    for name in ["netduino2.q", "microbit.q"] {
        let stream = reported(name);
        good(&dir, "extract --force --ram DIR/rams FILE", &file(&dir, name, &stream));
        assert!(good(&dir, "verify FILE", &file(&dir, name, &stream)).contains("ok: "));
    }
}

/// `spapr/htab` and `s390-storage_attributes`, which no description tells, are what the guest made of them; they can be
/// given back to it in every form.
#[test]
fn iterable_sections_of_other_targets_are_read_and_rewritten() {
    let dir = TempDir::new().unwrap();
    for name in ["pseries.q", "s390x-keys.q"] {
        let stream = file(&dir, name, &reported(name));
        let said = good(&dir, "verify FILE", &stream);
        assert!(said.contains("nothing opaque"), "{name}: {said}");
        good(&dir, "convert --force --format mapped-ram --out DIR/mapped FILE", &stream);
        let mapped = dir.path().join("mapped");
        assert!(good(&dir, "verify FILE", &mapped).contains("nothing opaque"), "{name}");
        good(&dir, "convert --force --format plain --out DIR/plain FILE", &mapped);
        let plain = dir.path().join("plain");
        assert!(good(&dir, &format!("diff {} FILE", stream.display()), &plain).contains("no differences"), "{name}");
        if name == "pseries.q" {
            // The entries that the guest made, 24 apart: valid ones of the pages 0 to 39, one each.
            let entry = |entry: u64| {
                let chunk = [&(entry as u32 * 24).to_be_bytes()[..], &[0, 1, 0, 0]].concat();
                [chunk, (entry << 12 | 1).to_be_bytes().to_vec(), (entry << 12 | 0x12).to_be_bytes().to_vec()].concat()
            };
            let chunks: Vec<u8> = (0..40).flat_map(entry).chain([0; 8]).collect();
            for written in [mapped, plain] {
                let mut end = vec![0; 3 << 20];
                let file = std::fs::File::open(&written).unwrap();
                let from = file.metadata().unwrap().len().saturating_sub(end.len() as u64);
                let len = file.read_at(&mut end, from).unwrap();
                let found = end[..len].windows(chunks.len()).any(|bytes| bytes == chunks);
                assert!(found, "{}", written.display());
            }
        }
    }
    let keys = file(&dir, "s390x-keys.q", &reported("s390x-keys.q"));
    let said = good(&dir, "inspect --section s390-skeys --fields FILE", &keys);
    assert!(said.contains("[0].count = 0x1000"), "{said}");
    let console = file(&dir, "pseries-serial.q", &reported("pseries-serial.q"));
    assert!(good(&dir, "verify FILE", &console).contains("nothing opaque"));
    let said = good(&dir, "inspect --section virtio-console --fields FILE", &console);
    assert!(said.contains(" max_nr_ports = 0x1f "), "{said}");
}

#[test]
fn what_x_ignore_shared_leaves_out_has_no_digest() {
    let dir = TempDir::new().unwrap();
    for name in ["ignored.q", "ignored.mapped"] {
        let stream = file(&dir, name, &reported(name));
        let said = good(&dir, "verify FILE", &stream);
        assert!(said.contains("RAM block 'm' is not in the stream") && said.contains("ok: "), "{name}: {said}");
        let ran = run(&dir, "verify --json FILE", &stream);
        let blocks = ran.json()["ram"].as_array().unwrap().clone();
        assert!(
            blocks.len() == 6 && blocks[0]["name"] == "m" && blocks[0].get("crc32").is_none(),
            "{name}: {}",
            ran.stdout
        );
        assert!(blocks[1..].iter().all(|block| block["crc32"].is_string()), "{name}: {}", ran.stdout);
        for form in ["mapped-ram", "plain"] {
            good(&dir, &format!("convert --force --format {form} --out DIR/out FILE"), &stream);
            let out = dir.path().join("out");
            assert!(good(&dir, "verify FILE", &out).contains("RAM block 'm' is not in the stream"), "{name} as {form}");
        }
    }
}

/// A libvirt save image of the stream: format, and what follows its header of 137 bytes.
fn save_image(format: u32, payload: &[u8]) -> Vec<u8> {
    let mut image = b"LibvirtQemudSave".to_vec();
    [2u32, 45, 1, format, 0].iter().for_each(|word| image.extend(word.to_le_bytes()));
    image.resize(92, 0);
    image.extend(b"<domain type=\"qemu\"><name>g</name></domain>\n");
    image.resize(137, 0);
    image.extend(payload);
    image
}

#[test]
fn offsets_count_from_the_first_byte_of_the_file() {
    let dir = TempDir::new().unwrap();
    let image = file(&dir, "img.save", &save_image(0, &base()));
    for words in ["verify FILE", "verify --offset 137 FILE"] {
        assert!(good(&dir, words, &image).contains("nothing opaque"), "{words}");
    }
    assert_eq!(run(&dir, "verify --offset 136 FILE", &image).code, Some(1));
}

#[test]
fn what_is_no_stream_is_named_with_what_to_do() {
    let dir = TempDir::new().unwrap();
    for (first, words) in [
        (&b"\x7fELF\x02\x01\x01"[..], "an ELF core"),
        (b"KDUMP   ", "a kdump-compressed dump"),
        (b"QCPR\0\0\0\x01", "the CPR channel"),
        (&[0x02, 0x21, 0x4c, 0x18, 0x64], "`lz4 -dc`"),
    ] {
        let foreign = file(&dir, "foreign", &[first, &[0; 400]].concat());
        let ran = run(&dir, "inspect FILE", &foreign);
        assert_eq!(ran.code, Some(1));
        assert!(ran.stderr.contains(words), "{}", ran.stderr);
    }
    let lzop = file(&dir, "lzop.save", &save_image(4, b"\x89LZO\0\r\n\x1a\n\0\0"));
    let ran = run(&dir, "verify FILE", &lzop);
    assert!(ran.code == Some(2) && ran.stderr.contains("`tail -c +138 FILE | lzop -dc`"), "{}", ran.stderr);
}

#[test]
fn what_a_save_image_says_beside_the_stream_is_shown() {
    let dir = TempDir::new().unwrap();
    let whole = save_image(0, &base());
    let mut partial = whole.clone();
    partial[12..16].copy_from_slice(b"Part");
    let mut paused = whole.clone();
    paused[24] = 0;
    for (image, words) in [
        (&whole, "libvirt save image, version 2, running guest, format raw, 44 B of domain XML\n"),
        (&partial, "44 B of domain XML, incomplete: virsh restore refuses it\n"),
        (&paused, "paused guest"),
    ] {
        let image = file(&dir, "img.save", image);
        let said = good(&dir, "inspect FILE", &image);
        assert!(said.lines().next().is_some_and(|line| format!("{line}\n").contains(words)), "{said}");
    }
    let image = file(&dir, "img.save", &partial);
    let json = run(&dir, "inspect --json FILE", &image).json();
    let container = &json["containers"][0];
    assert_eq!((&container["kind"], &container["complete"]), (&"libvirt".into(), &false.into()));
    // The XML is there even if nothing of the stream is.
    let cut = file(&dir, "img.save", &partial[..138]);
    good(&dir, "extract --xml DIR/g.xml FILE", &cut);
    assert_eq!(std::fs::read(dir.path().join("g.xml")).unwrap(), b"<domain type=\"qemu\"><name>g</name></domain>\n");
    let packed = qevm_reading(["inspect", "-"], &gzip(&whole));
    assert!(
        packed.stdout.starts_with("container     compressed with gzip\ncontainer     libvirt save image"),
        "{}",
        packed.stdout
    );
    assert_eq!(run(&dir, "extract --xml DIR/other.xml FILE", &file(&dir, "base.q", &base())).code, Some(2));
}

/// Whatever a save image is compressed with, once or twice, it is read; the domain XML is of any length.
#[test]
fn compressed_save_images_are_read() {
    let dir = TempDir::new().unwrap();
    for len in [0, 1, 44, 45, 5000] {
        let mut image = b"LibvirtQemudSave".to_vec();
        [2u32, len, 1, 0, 0].iter().for_each(|word| image.extend(word.to_le_bytes()));
        image.resize(92 + len as usize, b' ');
        image.extend(base());
        for outer in ["gzip", "bzip2", "xz"] {
            let once = pack(outer, &image);
            assert!(
                good(&dir, "verify FILE", &file(&dir, "img.save", &once)).contains("nothing opaque"),
                "{outer} {len}"
            );
            let twice = gzip(&once);
            assert!(
                good(&dir, "verify FILE", &file(&dir, "img.save", &twice)).contains("nothing opaque"),
                "{outer} {len}"
            );
        }
    }
}

/// What a program of every Debian makes of these bytes.
fn pack(program: &str, bytes: &[u8]) -> Vec<u8> {
    let dir = TempDir::new().unwrap();
    let path = file(&dir, "plain", bytes);
    let out = Command::new(program).arg("-1c").arg(path).output().unwrap();
    assert!(out.status.success(), "{program}");
    out.stdout
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}
