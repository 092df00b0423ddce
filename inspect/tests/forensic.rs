//! The example, on guests of real QEMUs in every container that a test can make without a QEMU.

#[path = "../examples/forensic.rs"]
#[allow(dead_code)]
mod forensic;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/streams").join(name)
}

/// The CRC-32 of the memory at address 0 in an ELF core, up to the length of its segment.
fn memory_at_zero(core: &[u8]) -> u32 {
    let number =
        |at: usize, len: usize| core[at..at + len].iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    assert_eq!(&core[..4], b"\x7fELF");
    assert_eq!(number(16, 2), 4, "a core");
    // Of 64 bits: e_phoff, e_phnum; then p_type, p_offset, p_paddr, p_filesz of each header (System V ABI).
    let (first, count) = (number(32, 8), number(56, 2));
    let headers = (0..count).map(|header| first + header * 56);
    let load = headers.into_iter().find(|at| number(*at, 4) == 1 && number(*at + 24, 8) == 0).expect("memory at 0");
    let (offset, len) = (number(load + 8, 8), number(load + 32, 8));
    crc32fast::hash(&core[offset..offset + len])
}

#[test]
fn every_container_gives_blocks_devices_and_a_core() {
    let folder = tempfile::tempdir().unwrap();
    let compressed = sample("7.2-return-path.zst");
    let stream = zstd::decode_all(File::open(&compressed).unwrap()).unwrap();
    let plain = folder.path().join("plain");
    fs::write(&plain, &stream).unwrap();
    // libvirt's: magic, version, length of the XML, running, not compressed.
    let mut save_image = b"LibvirtQemudSave".to_vec();
    for word in [2u32, 4, 1, 0] {
        save_image.extend(word.to_le_bytes());
    }
    save_image.resize(92, 0);
    save_image.extend(b"<d/>");
    save_image.extend(&stream);
    let libvirt = folder.path().join("libvirt");
    fs::write(&libvirt, save_image).unwrap();
    for (number, file) in [compressed, plain, libvirt].iter().enumerate() {
        let core = folder.path().join(format!("core-{number}"));
        let text = forensic::report(file, &core).unwrap();
        assert!(text.starts_with("machine microvm\nblock mem of 4194304 bytes, "), "{text}");
        assert!(text.contains("\ndevice cpu number 0\n") && text.contains("\ndevice fw_cfg number 0\n"), "{text}");
        // What QEMU left in the file behind the guest's memory: tests/streams/README.md.
        assert_eq!(memory_at_zero(&fs::read(core).unwrap()), 0x62d8_28c8, "{}", file.display());
    }
}

#[test]
fn a_snapshot_in_a_disk_image_is_read_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let (image, core) = (folder.path().join("image"), folder.path().join("core"));
    let packed = File::open(sample("reported/extl2.qcow2.xz")).unwrap();
    io::copy(&mut lzma_rust2::XzReader::new(packed, true), &mut File::create(&image).unwrap()).unwrap();
    let text = forensic::report(&image, &core).unwrap();
    assert!(text.contains("\nblock pc.ram of ") && text.contains("\ndevice cpu number 0\n"), "{text}");
    assert_eq!(&fs::read(core).unwrap()[..4], b"\x7fELF");
}

#[test]
fn what_is_no_guest_is_an_error_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let (file, core) = (folder.path().join("text"), folder.path().join("core"));
    fs::write(&file, "no stream").unwrap();
    let error = forensic::report(&file, &core).unwrap_err().to_string();
    assert!(error.contains("malformed at byte 0"), "{error}");
    assert!(!core.exists());
}
