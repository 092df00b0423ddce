use super::*;
use crate::ErrorKind;
use crate::vmdesc::Description;
use proptest::prelude::*;
use qevm_wire::WireError;

/// A field of one element.
fn field(name: &str, type_name: &str, size: u64) -> FieldDescription {
    FieldDescription { name: name.into(), type_name: type_name.into(), size, ..FieldDescription::default() }
}

fn structure_of(vmsd_name: &str, fields: Vec<FieldDescription>) -> StructDescription {
    StructDescription { vmsd_name: vmsd_name.into(), version: 1, fields, subsections: Vec::new() }
}

fn device(fields: Vec<FieldDescription>) -> DeviceDescription {
    DeviceDescription { name: "x".into(), instance_id: 0, body: DeviceBody::Struct(structure_of("x", fields)) }
}

/// Decodes and checks what must hold of every tree.
fn decode(device: &DeviceDescription, body: &[u8]) -> Result<Node, Error> {
    const OFFSET: u64 = 1000;
    let node = device.decode(body, OFFSET, &Limits::default())?;
    let mut copy = Vec::new();
    node.encode(&mut copy).unwrap();
    assert_eq!(copy, body);
    assert_eq!((node.len, node.encoded_len()), (body.len() as u64, body.len() as u64));
    let mut next = OFFSET;
    node.leaves(&mut |path, leaf| {
        assert!(leaf.offset >= next, "{path} overlaps what is before it");
        next = leaf.offset + leaf.len;
    });
    Ok(node)
}

fn names(node: &Node) -> Vec<&str> {
    node.children().iter().map(|n| n.name.as_ref()).collect()
}

fn kind(error: Error) -> VmdescError {
    match error.kind {
        ErrorKind::Vmdesc(kind) => kind,
        other => panic!("{other:?}"),
    }
}

/// Fields that QEMU wrote, from `golden/fields.txt`.
fn golden() -> impl Iterator<Item = (DeviceDescription, Vec<u8>)> {
    let lines = include_str!("../golden/fields.txt").lines().filter(|l| !l.starts_with('#'));
    lines.map(|line| {
        let mut words = line.split(' ');
        let mut word = || words.next().unwrap().to_owned();
        let (_release, idstr, vmsd_name, type_name) = (word(), word(), word(), word().replace('_', " "));
        let underscores = ["virtio", "powered", "tlb"].iter().any(|start| type_name.starts_with(start));
        let type_name = if underscores { type_name.replace(' ', "_") } else { type_name };
        let bytes: Vec<u8> = words
            .flat_map(|word| {
                let (hex, count) = word.split_once('*').unwrap_or((word, "1"));
                let digits = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap());
                digits.collect::<Vec<_>>().repeat(count.parse().unwrap())
            })
            .collect();
        let body = structure_of(&vmsd_name, vec![field("it", &type_name, bytes.len() as u64)]);
        (DeviceDescription { name: idstr, instance_id: 0, body: DeviceBody::Struct(body) }, bytes)
    })
}

/// The first golden field of this section type and kind of field.
fn golden_field(idstr: &str, type_name: &str) -> Node {
    let is_it = |device: &DeviceDescription| {
        let DeviceBody::Struct(body) = &device.body else { return false };
        device.name.ends_with(idstr) && body.fields[0].type_name == type_name
    };
    let (device, bytes) = golden().find(|(device, _)| is_it(device)).unwrap();
    decode(&device, &bytes).unwrap()
}

fn number(node: &Node, path: &str) -> i128 {
    node.find(path).and_then(Node::scalar).unwrap_or_else(|| panic!("no number {path}")).as_i128()
}

#[test]
fn every_byte_of_composite_types_belongs_to_a_named_field() {
    let mut count = 0;
    for (device, bytes) in golden() {
        let node = decode(&device, &bytes).unwrap();
        assert_eq!(node.opaque_bytes(), 0, "{}", device.name);
        count += 1;
    }
    assert_eq!(count, 36);
}

#[test]
fn virtio_devices_have_the_values_they_were_started_with() {
    // Started by QEMU 10.0.13 with the default MAC address; the guest had used the disk's queue once.
    let net = golden_field("feb02c00/virtio-net", "virtio");
    assert_eq!(net.find("it.device.mac").unwrap().value, Value::Buffer(vec![0x52, 0x54, 0, 0x12, 0x34, 0x56]));
    assert_eq!(number(&net, "it.vq[2].num"), 1024);
    let disk = golden_field("/virtio-blk", "virtio");
    assert_eq!(number(&disk, "it.vq[0].last_avail_idx"), 1);
    assert_eq!(number(&disk, "it.status"), 0x0f);
    assert_eq!(number(&disk, "it.virtio/64bit_features.guest_features"), number(&disk, "it.guest_features"));
    assert_eq!(number(&disk, "it.virtio/started.started"), 1);
    // One port each for console and port: `virtconsole` and `virtserialport`.
    let serial = golden_field("0000:00:01.0/virtio-console", "virtio");
    assert_eq!(number(&serial, "it.device.nr_active_ports"), 2);
    assert_eq!(number(&serial, "it.device.ports[1].id"), 1);
    // `-object memory-backend-ram,size=32M` and `requested-size=8M`, before and with section virtio-mem-device-early.
    let memory = golden().filter(|(d, _)| d.name.ends_with("virtio-mem")).map(|(d, b)| decode(&d, &b).unwrap());
    let sizes: Vec<_> = memory.map(|m| number(&m, "it.device.requested_size")).collect();
    assert_eq!(sizes, [8 << 20, 8 << 20]);
    // A device on a PCI Express port has 4096 bytes of configuration space.
    let express = golden_field("00.0/virtio-rng", "virtio");
    assert_eq!(express.find("it.transport.config").unwrap().len, 4096);
    // Cursor and frame buffer of the one scanout.
    let gpu = golden_field("feb02c00/virtio-gpu", "virtio-gpu");
    assert_eq!(number(&gpu, "it.max_outputs"), 1);
    assert!(gpu.find("it.scanout[0].fb.offset").is_some());
}

#[test]
fn registers_have_the_values_that_the_guest_has_loaded() {
    assert_eq!(number(&golden_field("cpu", "fpscr"), "it"), 0x00c0_009f);
    assert_eq!(number(&golden_field("cpu", "powered_off"), "it"), 1);
    assert_eq!(number(&golden_field("cpu", "slbe"), "it.esid"), 0x0800_0000);
    assert_eq!(number(&golden_field("cpu", "fpr"), "it.fpr"), 0x19ab_54db);
    let vector = golden_field("cpu-pseries", "avr");
    assert_eq!(number(&vector, "it.high"), 0x0011_2233_4455_6677);
    assert_eq!(number(&vector, "it.low"), 0x8899_aabb_ccdd_eeff);
    assert_eq!(number(&golden_field("cpu-pseries", "fpr"), "it"), 0x0123_4567_89ab_cdef);
    for idstr in ["cpu", "cpu64"] {
        let entry = golden_field(idstr, "tlb_entry");
        assert_eq!((number(&entry, "it.VPN"), number(&entry, "it.ASID")), (0x1234_4000, 0x55), "{idstr}");
        assert_eq!(number(&entry, "it.PFN[1]"), 0x34_6000, "{idstr}");
    }
}

#[test]
fn scsi_requests_in_flight_are_read() {
    // A Linux guest that reads a `usb-storage` disk (11.1.3).
    let disk = golden_field("scsi-disk", "scsi-requests");
    assert_eq!((number(&disk, "it.[0].state"), number(&disk, "it.[0].data_len")), (2, 512));
    let Value::Buffer(cdb) = &disk.find("it.[0].cdb").unwrap().value else { panic!("no buffer") };
    assert_eq!((cdb[0], number(&disk, "it.[0].tag")), (0x28, 0x3d)); // READ (10)

    let decode = |bytes: &[u8]| decode(&device(vec![field("it", "scsi-requests", bytes.len() as u64)]), bytes).unwrap();
    let request = |state: u8, operation: u8, rest: &[u8]| {
        let mut bytes = vec![state, operation];
        bytes.resize(1 + 16 + 8 + 12, 0);
        bytes.extend([0, 0, 0, 3]); // buflen
        [&bytes[..], rest].concat()
    };
    let write = decode(&request(2, 0x2a, &[7, 8, 9, 0]));
    assert_eq!(write.find("it.[0].data").unwrap().len, 3);
    let retried = decode(&[request(1, 0x28, &[]), request(1, 0x28, &[0])].concat());
    assert_eq!((retried.opaque_bytes(), number(&retried, "it.[1].buflen")), (0, 3));
    assert_eq!(decode(&request(3, 0x28, &[0])).opaque_bytes(), 42);
}

#[test]
fn a_virtio_device_of_unknown_kind_keeps_one_named_opaque_leaf() {
    let (mut device, bytes) = golden().find(|(d, _)| d.name.ends_with("feb02c00/virtio-net")).unwrap();
    let DeviceBody::Struct(body) = &mut device.body else { unreachable!() };
    body.vmsd_name = "virtio-new".into();
    let node = decode(&device, &bytes).unwrap();
    assert_eq!(node.opaque_bytes(), node.find("it.device").unwrap().len);
    assert_eq!(node.opaque_bytes(), 545);
    assert_eq!(number(&node, "it.virtio/64bit_features.guest_features"), 0);
}

#[test]
fn what_does_not_keep_to_its_layout_is_opaque_not_wrong() {
    for type_name in ["virtio", "virtio-gpu", "shpc", "msix state", "scsi-requests", "something new", "bitmap"] {
        let node = decode(&device(vec![field("it", type_name, 3)]), &[7, 8, 9]).unwrap();
        assert_eq!((node.opaque_bytes(), names(&node)), (3, vec!["it"]), "{type_name}");
    }
    let old_style = |name: &str, size| {
        let device = DeviceDescription { name: name.into(), instance_id: 0, body: DeviceBody::OldStyle { size } };
        decode(&device, &vec![0; size as usize]).unwrap().opaque_bytes()
    };
    assert_eq!((old_style("slirp", 131), old_style("slirp", 130), old_style("other", 131)), (0, 130, 131));
}

#[test]
fn elements_have_the_same_names_whatever_release_described_them() {
    let element = |index| FieldDescription {
        index,
        nested: vec![structure_of("e", vec![field("f", "uint8", 1)])],
        ..field("a", "struct", 1)
    };
    let marker = || field("a", "ptr-marker", 1);
    let of_7_2 = device(vec![element(Some(0)), element(Some(1)), element(Some(2))]);
    let of_10_0 = device(vec![element(Some(0)), element(Some(1)), element(None)]);
    let of_11_1 = device(vec![element(None), element(None), element(None)]);
    let packed = device(vec![FieldDescription { array_len: Some(3), ..element(None) }]);
    for device in [of_7_2, of_10_0, of_11_1, packed] {
        let node = decode(&device, &[1, 2, 3]).unwrap();
        assert_eq!(names(&node), ["a[0]", "a[1]", "a[2]"]);
        assert_eq!(number(&node, "a[2].f"), 3);
    }
    let node = decode(&device(vec![marker(), element(None), marker(), marker(), element(None)]), b"1\x010\x31\x02");
    let node = node.unwrap();
    assert_eq!(names(&node), ["a[0].present", "a[0]", "a[1].present", "a[2].present", "a[2]"]);
    assert_eq!(node.find("a[1].present").unwrap().scalar().unwrap().to_string(), "null");
}

#[test]
fn null_pointers_look_different_in_each_release() {
    // Up to 7.2 an empty struct of one byte, in 10.0 a type of its own.
    let old = FieldDescription { nested: vec![structure_of("e", vec![])], index: Some(0), ..field("p", "struct", 1) };
    for entry in [old, FieldDescription { index: Some(0), ..field("p", "nullptr", 1) }, field("p", "uint32", 1)] {
        let node = decode(&device(vec![entry]), b"0").unwrap();
        assert_eq!(node.children()[0].scalar().unwrap().kind(), ScalarKind::PointerMarker);
    }
}

#[test]
fn lists_and_trees_have_an_element_for_each_description() {
    let nested = |n| vec![structure_of("e", vec![field("f", "uint16", 2)]); n];
    let list = |n, size| device(vec![FieldDescription { nested: nested(n), ..field("l", "qtailq", size) }]);
    let node = decode(&list(2, 7), &[1, 0, 7, 1, 0, 8, 0]).unwrap();
    assert_eq!(names(node.child("l").unwrap()), ["[0].present", "[0]", "[1].present", "[1]", "[2].present"]);
    assert_eq!(number(&node, "l.[1].f"), 8);
    let bad = |error: Result<Node, Error>| matches!(kind(error.unwrap_err()), VmdescError::List { .. });
    assert!(bad(decode(&list(2, 4), &[1, 0, 7, 0])));
    assert!(bad(decode(&list(1, 7), &[1, 0, 7, 1, 0, 8, 0])));
    assert!(bad(decode(&list(1, 4), &[2, 0, 7, 0])));

    let tree = |n, size| device(vec![FieldDescription { nested: nested(n), ..field("t", "gtree", size) }]);
    let direct = [&[0, 0, 0, 1, 1][..], &[0, 0, 0, 0, 0, 0, 0, 9], &[0, 5, 0]].concat();
    let node = decode(&tree(1, 16), &direct).unwrap();
    assert_eq!((number(&node, "t.[0].key"), number(&node, "t.[0].value.f")), (9, 5));
    let node = decode(&tree(2, 10), &[0, 0, 0, 1, 1, 0, 3, 0, 4, 0]).unwrap();
    assert_eq!((number(&node, "t.[0].key.f"), number(&node, "t.[0].value.f")), (3, 4));
    assert!(bad(decode(&tree(1, 5), &[0, 0, 0, 9, 0])));
    assert!(decode(&tree(0, 5), &[0; 5]).is_ok());
}

#[test]
fn every_contradiction_has_its_kind_and_place() {
    let with_subsection = || {
        let mut device = device(vec![field("f", "uint8", 1)]);
        let DeviceBody::Struct(body) = &mut device.body else { unreachable!() };
        body.subsections.push(structure_of("x/s", vec![field("g", "uint8", 1)]));
        device
    };
    let error = |body: &[u8]| decode(&with_subsection(), body).unwrap_err();
    assert!(decode(&with_subsection(), b"\x01\x05\x03x/s\0\0\0\x01\x02").is_ok());
    let marker = error(b"\x01\x06\x03x/s\0\0\0\x01\x02");
    assert_eq!((marker.offset, marker.path.to_string()), (1001, "x/s".to_owned()));
    assert!(matches!(kind(marker), VmdescError::SubsectionMarker { found: 6, expected: 5, .. }));
    assert!(matches!(kind(error(b"\x01\x05\x03x/t\0\0\0\x01\x02")), VmdescError::SubsectionName { .. }));
    let version = kind(error(b"\x01\x05\x03x/s\0\0\0\x02\x02"));
    assert!(matches!(version, VmdescError::SubsectionVersion { found: 2, expected: 1, .. }));
    assert!(matches!(kind(error(b"\x01")), VmdescError::SectionSize { found: 1, expected: 11 }));

    let nested =
        FieldDescription { nested: vec![structure_of("n", vec![field("g", "uint8", 1)])], ..field("s", "struct", 2) };
    let size = decode(&device(vec![nested]), &[0, 0]).unwrap_err();
    assert_eq!((size.offset, size.path.to_string()), (1000, "s".to_owned()));
    assert!(matches!(kind(size), VmdescError::StructSize { content: 1, declared: 2, .. }));
}

fn exceeded(result: Result<Node, Error>) -> &'static str {
    match result.map(drop).unwrap_err().kind {
        ErrorKind::Wire(WireError::LimitExceeded { what, .. }) => what,
        other => panic!("{other:?}"),
    }
}

#[test]
fn elements_without_bytes_cost_nothing() {
    // A description of one line that claims 2^64 - 1 elements.
    let array = |type_name, array_len| FieldDescription { array_len: Some(array_len), ..field("z", type_name, 0) };
    for type_name in ["buffer", "unused_buffer", "struct", "unheard of"] {
        let node = decode(&device(vec![array(type_name, u64::MAX)]), &[]).unwrap();
        assert_eq!((names(&node), node.children()[0].children().len()), (vec!["z"], 0), "{type_name}");
    }
    // The same in pieces: elements of one byte that have many fields without any.
    let empty = (0..64).map(|_| field("e", "buffer", 0)).chain([field("b", "uint8", 1)]).collect();
    let nested = vec![structure_of("e", empty)];
    let many = FieldDescription { array_len: Some(1000), nested, ..field("s", "struct", 1) };
    assert_eq!(exceeded(decode(&device(vec![many]), &[0; 1000])), "fields without bytes of a section");
    // Real sections have some.
    let some = (0..100).map(|_| field("e", "buffer", 0)).collect();
    assert_eq!(decode(&device(some), &[]).unwrap().children().len(), 100);
}

#[test]
fn the_memory_for_fields_is_bounded() {
    let long = "n".repeat(255);
    let many = |count| {
        let nested = vec![structure_of("e", vec![field(&long, "uint8", 1)])];
        device(vec![FieldDescription { array_len: Some(count), nested, ..field(&long, "struct", 1) }])
    };
    assert!(decode(&many(1000), &[0; 1000]).is_ok());
    assert_eq!(exceeded(decode(&many(100_000), &[0; 100_000])), "memory for the fields of a section");
    let limits = Limits { fields: 0, ..Limits::default() };
    assert_eq!(exceeded(many(10).decode(&[0; 10], 0, &limits)), "memory for the fields of a section");
}

/// A field with as many bytes as its type needs, and its description.
fn any_field() -> impl Strategy<Value = (FieldDescription, Vec<u8>)> + Clone {
    let leaf = prop_oneof![
        Just(("bool", 1)),
        Just(("uint8", 1)),
        Just(("int16", 2)),
        Just(("uint32", 4)),
        Just(("int64", 8)),
        Just(("timer", 8)),
        Just(("CPU_Double_U", 8)),
        Just(("int32 le", 4)),
        Just(("pci irq state", 16)),
        Just(("bitmap", 24)),
        Just(("buffer", 5)),
        Just(("unused_buffer", 0)),
        Just(("msix state", 17)),
        Just(("virtio", 40)),
        Just(("a new one", 3)),
    ];
    let leaf =
        (leaf, "[a-z]{1,8}", prop::option::of(0..5_u64)).prop_flat_map(|((type_name, size), name, array_len)| {
            let bytes = prop::collection::vec(any::<u8>(), size as usize * array_len.unwrap_or(1) as usize);
            bytes.prop_map(move |bytes| (FieldDescription { array_len, ..field(&name, type_name, size) }, bytes))
        });
    leaf.prop_recursive(3, 24, 4, |inner| {
        (any_struct(inner), "[a-z]{1,8}", prop::bool::ANY).prop_map(|((structure, bytes), name, list)| {
            let (type_name, bytes) =
                if list { ("qlist", [&[1], &bytes[..], &[0]].concat()) } else { ("struct", bytes) };
            let size = bytes.len() as u64;
            (FieldDescription { nested: vec![structure], ..field(&name, type_name, size) }, bytes)
        })
    })
}

fn any_struct(
    fields: impl Strategy<Value = (FieldDescription, Vec<u8>)> + Clone,
) -> impl Strategy<Value = (StructDescription, Vec<u8>)> {
    let fields = || prop::collection::vec(fields.clone(), 0..4);
    (fields(), prop::option::of(("[a-z]{1,8}/[a-z]{1,8}", any::<u32>(), fields()))).prop_map(|(fields, subsection)| {
        let (fields, bytes): (Vec<_>, Vec<_>) = fields.into_iter().unzip();
        let mut bytes = bytes.concat();
        let mut structure = structure_of("vmsd", fields);
        if let Some((vmsd_name, version, fields)) = subsection {
            let (fields, content): (Vec<_>, Vec<_>) = fields.into_iter().unzip();
            bytes.extend([0x05, vmsd_name.len() as u8]);
            bytes.extend(vmsd_name.as_bytes());
            bytes.extend(version.to_be_bytes());
            bytes.extend(content.concat());
            structure.subsections.push(StructDescription { vmsd_name, version, fields, subsections: Vec::new() });
        }
        (structure, bytes)
    })
}

/// The description as QEMU would write it.
fn json(structure: &StructDescription) -> String {
    let fields: Vec<String> = structure
        .fields
        .iter()
        .map(|f| {
            let array = f.array_len.map_or_else(String::new, |n| format!(r#""array_len": {n}, "#));
            let nested: String = f
                .nested
                .iter()
                .map(|n| match f.type_name.as_str() {
                    "struct" => format!(r#""struct": {{{}}}, "#, json(n)),
                    _ => format!("{}, ", json(n)),
                })
                .collect();
            format!(r#"{{"name": "{}", {array}"type": "{}", {nested}"size": {}}}"#, f.name, f.type_name, f.size)
        })
        .collect();
    let subsections: Vec<String> = structure.subsections.iter().map(|s| format!("{{{}}}", json(s))).collect();
    let (name, version) = (&structure.vmsd_name, structure.version);
    let (fields, subsections) = (fields.join(", "), subsections.join(", "));
    format!(r#""vmsd_name": "{name}", "version": {version}, "fields": [{fields}], "subsections": [{subsections}]"#)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn sections_of_random_descriptions_encode_to_their_bytes((structure, bytes) in any_struct(any_field())) {
        let text = format!(r#"{{"devices": [{{"name": "x", "instance_id": 0, {}}}]}}"#, json(&structure));
        let device = Description::parse(text.as_bytes(), &Limits::default()).unwrap().devices.remove(0);
        prop_assert_eq!(&device.body, &DeviceBody::Struct(structure));
        prop_assert_eq!(device.wire_size(), bytes.len() as u64);
        decode(&device, &bytes)?;
    }

    #[test]
    fn damage_is_an_error_or_encodes_to_itself((structure, mut bytes) in any_struct(any_field()), at: prop::sample::Index, by: u8) {
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] ^= by;
        }
        let device = DeviceDescription { name: "x".into(), instance_id: 0, body: DeviceBody::Struct(structure) };
        let _ = decode(&device, &bytes);
    }
}
