use super::*;
use proptest::prelude::*;
use qevm_wire::Driver;

/// What a QEMU 11.1.3 of machine type microvm with `memory-backend=mem` wrote, record by record.
const RECORDED: [&[u8]; 6] = [
    b"QCPR\0\0\0\x01\x01\0\0\0\x13/rom@etc/acpi/rsdp\0\0\0\0\0\x20",
    b"\x01\0\0\0\x15/rom@etc/acpi/tables\0\0\0\0\0\x20",
    b"\x01\0\0\0\x08pc.bios\0\0\0\0\0\x20",
    b"\x01\0\0\0\x16/rom@etc/table-loader\0\0\0\0\0\x20",
    b"\x01\0\0\0\x04mem\0\0\0\0\0\x20",
    b"\0\x05\x15CprState/vfio devices\0\0\0\x01\0",
];

fn read(bytes: &[u8]) -> Result<Vec<CprEvent>, String> {
    let mut driver = Driver::new(bytes, CprDecoder::default());
    let mut events = Vec::new();
    while let Some(event) = driver.next().map_err(|error| error.to_string())? {
        events.push(event);
    }
    Ok(events)
}

#[test]
fn what_a_qemu_wrote_is_read_and_written_again() {
    let events = read(&RECORDED.concat()).unwrap();
    let names = ["/rom@etc/acpi/rsdp", "/rom@etc/acpi/tables", "pc.bios", "/rom@etc/table-loader", "mem"];
    let mut encoder = CprEncoder::default();
    assert_eq!(events.len(), names.len());
    for ((event, expected), record) in events.iter().zip(names).zip(RECORDED) {
        let CprEvent::Descriptor(descriptor) = event else { panic!("{event:?}") };
        assert_eq!((descriptor.name.as_str(), descriptor.id), (Some(expected), 0));
        assert_eq!(encoder.descriptor(descriptor), record);
    }
    // A 10.0.13 ends here.
    assert_eq!(encoder.clone().end(), b"\0");
    assert_eq!(encoder.end_with(&[]), RECORDED[5]);
    assert_eq!(read(b"QCPR\0\0\0\x01\0"), Ok(vec![]));
}

#[test]
fn what_is_no_side_channel_is_refused_where_it_differs() {
    let of = |bytes: &[u8]| read(bytes).unwrap_err();
    let head = |rest: &[u8]| of(&[b"QCPR\0\0\0\x01", rest].concat());
    let found = [
        (of(b"QEVM\0\0\0\x03"), "byte 0", "CPR magic is 0x5145564d, expected 0x51435052"),
        (of(b"QCPR\0\0\0\x02"), "byte 4", "CPR version is 0x2, expected 0x1"),
        (head(b"\x02"), "byte 8", "the list has byte 0x02"),
        (head(b"\x01\0\0\0\0"), "byte 9", "a name of 0 bytes"),
        (head(b"\x01\0\0\0\x01\0"), "byte 9", "a name of 1 bytes"),
        (head(b"\x01\0\0\0\x02ab"), "byte 9", "a name of 2 bytes without a zero byte"),
        (head(b"\x01\0\0\0\x03\0b\0"), "byte 9", "a name of 3 bytes without a zero byte"),
        (head(b"\x01\xff\xff\xff\xff"), "byte 9", "length of a name is 4294967295, above the limit of 256"),
        (head(b"\x01\0\0\0\x02a\0\0\0\0\0\x21"), "byte 19", "the byte of a descriptor is 0x21, expected 0x20"),
        (head(b"\0\x04"), "byte 9", "what follows the descriptors is 0x04, expected 0x05"),
        (head(b"\0\x05\x01x"), "byte 10", "subsection 'x'"),
        (head(&[RECORDED[5], b"\x05\x15CprState/vfio devices"].concat()), "byte 38", "'CprState/vfio devices', once"),
        (head(b"\x01\0\0\0\x02a\0\0\0"), "byte 15", "the input ends here"),
        (head(b""), "byte 8", "the input ends here"),
    ];
    for (error, place, why) in found {
        assert!(error.contains(place) && error.contains(why), "{error}, not {place}: {why}");
    }
    let many = [b"QCPR\0\0\0\x01".to_vec(), b"\x01\0\0\0\x02a\0\0\0\0\0\x20".repeat(4097)].concat();
    assert!(of(&many).contains("number of descriptors is 4097, above the limit of 4096"));
}

fn names() -> impl Strategy<Value = CountedString> {
    prop::collection::vec(1..=255_u8, 1..=255).prop_map(|name| CountedString::new(name).unwrap())
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        descriptors in prop::collection::vec((names(), any::<u32>()), 0..5),
        devices in prop::option::of(prop::collection::vec((names(), any::<i32>(), any::<u32>(), any::<u32>()), 0..4)),
        piece in 1..40_usize,
    ) {
        let mut encoder = CprEncoder::default();
        let (mut bytes, mut expected) = (Vec::new(), Vec::new());
        for (name, id) in descriptors {
            let descriptor = PassedDescriptor { name, id };
            bytes.extend(encoder.descriptor(&descriptor));
            expected.push((bytes.len() as u64, CprEvent::Descriptor(descriptor)));
        }
        match devices {
            None => bytes.extend(encoder.end()),
            Some(devices) => {
                let device = |(name, device, ioas, page_table)| PassedDevice { name, device, ioas, page_table };
                let devices: Vec<_> = devices.into_iter().map(device).collect();
                bytes.extend(encoder.end_with(&devices));
                expected.extend(devices.into_iter().map(|device| (0, CprEvent::VfioDevice(device))));
            }
        }
        let mut driver = Driver::new(Pieces(&bytes, piece), CprDecoder::default());
        for (end, event) in expected {
            prop_assert_eq!(driver.next().unwrap(), Some(event));
            // The descriptor comes with the last byte of its record.
            prop_assert!(end == 0 || driver.decoder().offset() == end);
        }
        prop_assert_eq!(driver.next().unwrap(), None);
        for end in 0..bytes.len() {
            // Only a list that ends may be the end: of the descriptors, where devices would be the rest.
            prop_assert!(read(&bytes[..end]).is_err() || bytes[end] == SUBSECTION);
        }
    }
}

/// A reader that returns at most this many bytes per call.
struct Pieces<'b>(&'b [u8], usize);

impl std::io::Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let count = self.1.min(into.len());
        self.0.read(&mut into[..count])
    }
}
