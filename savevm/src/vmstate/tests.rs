//! Every kind of field, on the wire, in the description and in the schema; and every way to be wrong.

use super::*;
use crate::vmdesc::FieldDescription as Described;
use crate::{Error, ErrorKind};
use qevm_wire::{Fault, Limits, WireError};

fn context(release: &str) -> Context {
    Context::new(release.parse().unwrap(), "microvm")
}

fn kind(error: Error) -> VmStateError {
    match error.kind {
        ErrorKind::VmState(kind) => kind,
        other => panic!("{other}"),
    }
}

/// Names, types, sizes and array notation of the entries, the way the spec's tables give them.
fn entries(fields: &[Described]) -> Vec<String> {
    fields
        .iter()
        .map(|f| {
            let array = match (f.array_len, f.index) {
                (Some(n), _) => format!("×{n}"),
                (_, Some(i)) => format!("#{i}"),
                _ => String::new(),
            };
            format!("{} {} {}{array}", f.name, f.type_name, f.size)
        })
        .collect()
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "pair", version = 1)]
struct Pair {
    a: u8,
    b: u16,
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "optional pair", version = 1)]
struct OptionalPair {
    a: u8,
    #[vmstate(exists = *a != 0)]
    b: Option<u16>,
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "all", version = 3, minimum_version = 2)]
struct All {
    flag: bool,
    #[vmstate(type = "uint8 equal")]
    count: u8,
    numbers: [i32; 3],
    single: [u8; 1],
    #[vmstate(len = *count)]
    pairs: Vec<Pair>,
    #[vmstate(len = *count)]
    optional_pairs: Vec<OptionalPair>,
    unused: Unused<2>,
    #[vmstate(name = "unused")]
    also_unused: Unused<1>,
    #[vmstate(len = *count as usize * 2)]
    blob: VarBuffer,
    #[vmstate(len = 65)]
    bits: Bitmap,
    tmp: Tmp<Pair>,
    versioned: VStruct<Newer, 1>,
    queue: QTailQ<Pair>,
    timer: Timer,
    #[vmstate(since = 3)]
    newest: u32,
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "newer", version = 2, minimum_version = 1)]
struct Newer {
    old: u8,
    #[vmstate(since = 2)]
    new: u8,
}

fn all() -> All {
    let pair = |a| Pair { a, b: 0x0203 };
    All {
        flag: true,
        count: 2,
        numbers: [1, -1, 2],
        single: [9],
        pairs: vec![pair(1), pair(2)],
        optional_pairs: vec![OptionalPair { a: 0, b: None }, OptionalPair { a: 1, b: Some(7) }],
        blob: VarBuffer(b"abcd".to_vec()),
        bits: Bitmap { words: vec![1, 2] },
        tmp: Tmp(pair(3)),
        versioned: VStruct(Newer { old: 5, new: 0 }),
        queue: QTailQ(vec![pair(4), pair(5)]),
        timer: Timer(1000),
        newest: 0xdead_beef,
        ..All::default()
    }
}

const ALL: &[u8] = b"\x01\x02\0\0\0\x01\xff\xff\xff\xff\0\0\0\x02\x09\
    \x01\x02\x03\x02\x02\x03\
    \0\x01\0\x07\
    \0\0\0abcd\
    \0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\
    \x03\x02\x03\x05\
    \x01\x04\x02\x03\x01\x05\x02\x03\0\
    \0\0\0\0\0\0\x03\xe8\xde\xad\xbe\xef";

#[test]
fn every_kind_of_field_has_its_place_on_the_wire() {
    let ctx = context("10.0");
    assert_eq!(encode(&all(), &ctx).unwrap(), ALL);
    assert_eq!(decode::<All>(ALL, 3, &ctx).unwrap(), all());
    // A version without the newest field.
    let older = &ALL[..ALL.len() - 4];
    assert_eq!(decode::<All>(older, 2, &ctx).unwrap(), All { newest: 0, ..all() });
    assert_eq!(encode_version(&all(), 2, &ctx).unwrap(), older);
}

#[test]
fn descriptions_follow_the_release() {
    let described = |release| {
        let (_, described) = encode_described(&all(), 3, &context(release)).unwrap();
        entries(&described.fields)
    };
    let before = ["flag bool 1", "count uint8 equal 1", "numbers int32 4×3", "single uint8 1", "pairs struct 3×2"];
    let after = [
        "unused[0] unused_buffer 2",
        "unused[1] unused_buffer 1",
        "blob buffer 4",
        "bits bitmap 16",
        "tmp tmp 3",
        "versioned vstruct 1",
        "queue qtailq 9",
        "timer timer 8",
        "newest uint32 4",
    ];
    for (release, elements) in [
        ("5.2", ["optional_pairs struct 1#0", "optional_pairs struct 3#1"]),
        ("7.2", ["optional_pairs struct 1#0", "optional_pairs struct 3#1"]),
        ("10.0", ["optional_pairs struct 1#0", "optional_pairs struct 3"]),
        ("11.1", ["optional_pairs struct 1", "optional_pairs struct 3"]),
    ] {
        let expected: Vec<&str> = before.iter().chain(&elements).chain(&after).copied().collect();
        assert_eq!(described(release), expected, "{release}");
    }
    let (_, described) = encode_described(&all(), 3, &context("10.0")).unwrap();
    let nested = |name: &str| &described.fields.iter().find(|f| f.name == name).unwrap().nested;
    assert_eq!(nested("queue").len(), 2, "a list describes each element");
    assert_eq!(nested("pairs").len(), 1, "a compressed array describes one");
    assert_eq!((nested("versioned")[0].version, nested("versioned")[0].fields.len()), (1, 1));
}

#[test]
fn the_schema_tells_what_does_not_depend_on_values() {
    let schema = All::description(&context("10.0"));
    assert_eq!((schema.version, schema.minimum_version), (3, 2));
    let field = |name: &str| schema.fields.iter().find(|f| f.name == name).unwrap();
    assert_eq!(field("numbers").count, Count::Fixed(3));
    assert_eq!(field("numbers").fixed_size(), Some(12));
    assert_eq!(field("pairs").count, Count::Variable);
    assert_eq!(field("newest").since, 3);
    assert!(matches!(&field("queue").element.layout, Layout::List(pair) if pair.fixed_size() == Some(3)));
    let Layout::Struct(optional) = &field("optional_pairs").element.layout else { panic!() };
    assert!(optional.fields[1].conditional);
    assert_eq!(optional.fixed_size(), None);
    assert_eq!(schema.fixed_size(), None);
}

#[test]
fn values_that_do_not_fit_are_refused_not_lost() {
    let ctx = context("10.0");
    let refused = |value: All| kind(encode(&value, &ctx).unwrap_err());
    assert!(matches!(
        refused(All { pairs: vec![], ..all() }),
        VmStateError::LengthMismatch { field: "pairs", found: 0, expected: 2 }
    ));
    assert!(matches!(
        refused(All { blob: VarBuffer(vec![0]), ..all() }),
        VmStateError::LengthMismatch { field: "blob", found: 1, expected: 4 }
    ));
    assert!(matches!(
        refused(All { bits: Bitmap { words: vec![0] }, ..all() }),
        VmStateError::LengthMismatch { field: "bits", found: 1, expected: 2 }
    ));
    let missing = OptionalPair { a: 1, b: None };
    assert!(matches!(kind(encode(&missing, &ctx).unwrap_err()), VmStateError::FieldMissing { field: "b" }));
    let excess = OptionalPair { a: 0, b: Some(1) };
    assert!(matches!(kind(encode(&excess, &ctx).unwrap_err()), VmStateError::FieldInExcess { field: "b" }));
    assert!(matches!(kind(encode_version(&all(), 4, &ctx).unwrap_err()), VmStateError::VersionTooNew { .. }));
}

#[test]
fn errors_name_offset_path_and_values() {
    let ctx = context("10.0");
    let error = |bytes: &[u8], version| decode::<All>(bytes, version, &ctx).unwrap_err();
    assert!(matches!(kind(error(ALL, 1)), VmStateError::VersionTooOld { name: "all", found: 1, minimum: 2 }));
    assert!(matches!(kind(error(ALL, 4)), VmStateError::VersionTooNew { name: "all", found: 4, supported: 3 }));
    let truncated = error(&ALL[..17], 3);
    assert!(truncated.is_truncated());
    assert_eq!(truncated.path.to_string(), "all › field pairs › element 0 › field b");
    assert_eq!(truncated.offset, 16);
    let mut marker = ALL.to_vec();
    let list = ALL.len() - 4 - 8 - 9;
    marker[list] = 2;
    let bad = error(&marker, 3);
    assert_eq!(bad.offset, list as u64);
    assert!(matches!(kind(bad), VmStateError::BadMarker { found: 2, .. }));
    let mut over = ALL.to_vec();
    over.push(0);
    assert!(matches!(error(&over, 3).kind, ErrorKind::Wire(WireError::TrailingBytes { left: 1, .. })));
    let mut odd_bool = ALL.to_vec();
    odd_bool[0] = 2;
    assert!(matches!(kind(error(&odd_bool, 3)), VmStateError::NotCanonical { found: 2, .. }));
    assert!(load::<All>(&mut Reader::new(&odd_bool), 3, &ctx).unwrap().flag);
}

#[test]
fn limits_bound_counts_and_nesting() {
    let few = context("10.0").with_limits(Limits { elements: 1, ..Limits::default() });
    let error = decode::<All>(ALL, 3, &few).unwrap_err();
    assert_eq!((error.fault(), error.path.to_string()), (Fault::Limit, "all › field pairs".to_owned()));
    let shallow = context("10.0").with_limits(Limits { depth: 0, ..Limits::default() });
    assert_eq!(decode::<All>(ALL, 3, &shallow).unwrap_err().fault(), Fault::Limit);
}

/// A device with a list of devices: as deep as the input says.
#[derive(VmState, Debug, Default, PartialEq)]
#[vmstate(name = "tree", version = 1)]
struct Tree {
    children: QTailQ<Tree>,
}

#[test]
fn recursive_state_does_not_overflow_the_stack() {
    let ctx = context("10.0");
    let deep = decode::<Tree>(&[1; 1 << 20], 1, &ctx).unwrap_err();
    assert_eq!(deep.fault(), Fault::Limit);
    let two = Tree { children: QTailQ(vec![Tree::default(), Tree::default()]) };
    assert_eq!(decode::<Tree>(&encode(&two, &ctx).unwrap(), 1, &ctx).unwrap(), two);
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "dev", version = 1, pre_save = Device::tidy, post_load = Device::check)]
struct Device {
    value: u8,
    inner: Inner,
    #[vmstate(subsection)]
    first: Option<First>,
    #[vmstate(subsection, since_release = "8.0", until_release = "10.2", needed = |device, _| device.value != 9)]
    second: Option<Second>,
}

/// Its name starts with its parent's, and so do its subsections'.
#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "dev/inner", version = 1)]
struct Inner {
    #[vmstate(subsection)]
    more: Option<More>,
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "dev/inner/more", version = 1)]
struct More {
    value: u8,
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "dev/first", version = 2, minimum_version = 1, needed = |first, _| first.value != 0)]
struct First {
    value: u8,
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "dev_second", version = 1)]
struct Second {
    value: u8,
}

impl Device {
    fn tidy(&mut self, _: &Context) -> Result<(), VmStateError> {
        self.value &= 0x7f;
        Ok(())
    }

    fn check(&mut self, version: u32, _: &Context) -> Result<(), VmStateError> {
        assert_eq!(version, 1);
        match self.value {
            0..0x80 => Ok(()),
            found => Err(VmStateError::Refused { what: "value", found: found.into(), expected: "below 0x80" }),
        }
    }
}

fn subsection(name: &str, version: u32, payload: &[u8]) -> Vec<u8> {
    [&[5, name.len() as u8][..], name.as_bytes(), &version.to_be_bytes(), payload].concat()
}

#[test]
fn subsections_follow_the_fields_they_belong_to() {
    let ctx = context("10.0");
    let device = Device {
        value: 1,
        inner: Inner { more: Some(More { value: 2 }) },
        first: Some(First { value: 3 }),
        second: Some(Second { value: 4 }),
    };
    let more = subsection("dev/inner/more", 1, &[2]);
    let (first, second) = (subsection("dev/first", 2, &[3]), subsection("dev_second", 1, &[4]));
    let bytes = [&[1][..], &more, &first, &second].concat();
    assert_eq!(encode(&device, &ctx).unwrap(), bytes);
    assert_eq!(decode::<Device>(&bytes, 1, &ctx).unwrap(), device);

    // What is no subsection of this device is left to a reader that goes on.
    let foreign = [&bytes[..], &subsection("other/thing", 1, &[])].concat();
    let mut reader = Reader::new(&foreign);
    assert_eq!(decode_from::<Device>(&mut reader, 1, &ctx).unwrap(), device);
    assert_eq!(reader.remaining(), foreign.len() - bytes.len());
    // Neither is a name that only is the device's own.
    let own = [&[1][..], &subsection("dev", 1, &[])].concat();
    assert!(matches!(
        decode::<Device>(&own, 1, &ctx).unwrap_err().kind,
        ErrorKind::Wire(WireError::TrailingBytes { .. })
    ));
}

#[test]
fn subsections_are_checked_as_qemu_checks_them() {
    let ctx = context("10.0");
    let with = |parts: &[Vec<u8>]| [vec![1], parts.concat()].concat();
    let decoded = |parts: &[Vec<u8>]| decode::<Device>(&with(parts), 1, &ctx);
    let loaded = |parts: &[Vec<u8>]| load::<Device>(&mut Reader::new(&with(parts)), 1, &ctx);

    let unknown = decoded(&[subsection("device", 1, &[])]).unwrap_err();
    assert_eq!(unknown.offset, 1);
    assert!(matches!(kind(unknown), VmStateError::UnknownSubsection { parent: "dev", name } if name == "device"));
    let newer = decoded(&[subsection("dev/first", 3, &[0])]).unwrap_err();
    assert!(matches!(kind(newer), VmStateError::VersionTooNew { name: "dev/first", found: 3, supported: 2 }));
    let older = decoded(&[subsection("dev/first", 0, &[0])]).unwrap_err();
    assert!(matches!(kind(older), VmStateError::VersionTooOld { name: "dev/first", found: 0, minimum: 1 }));
    let twice = decoded(&[subsection("dev/first", 2, &[0]), subsection("dev/first", 2, &[0])]).unwrap_err();
    assert!(matches!(kind(twice), VmStateError::RepeatedSubsection { name: "dev/first" }));

    // QEMU reads these; they would not survive re-encoding.
    for parts in [
        vec![subsection("dev_second", 1, &[0]), subsection("dev/first", 2, &[0])],
        vec![subsection("dev/first", 1, &[0])],
        vec![subsection("dev/first", 0x102, &[0])],
    ] {
        assert!(matches!(kind(decoded(&parts).unwrap_err()), VmStateError::NotCanonical { .. }));
        assert_eq!(loaded(&parts).unwrap().first, Some(First { value: 0 }));
    }
    // A header that the input cuts off asks for more, unless it cannot become one of ours.
    let whole = with(&[subsection("dev/first", 2, &[0])]);
    for end in 2..whole.len() {
        assert!(decode::<Device>(&whole[..end], 1, &ctx).unwrap_err().is_truncated(), "{end}");
    }
}

#[test]
fn a_source_sends_what_is_needed_and_known() {
    let ctx = context("10.0");
    let mut device =
        Device { value: 0x89, first: Some(First::default()), second: Some(Second::default()), ..Device::default() };
    // The hook clears the high bit, the first subsection's content is not needed, and the second one's parent is 9.
    assert_eq!(save(&mut device, &ctx).unwrap(), (1, vec![9]));
    assert_eq!((device.first, device.second), (None, None));

    for (release, exists) in [("7.2", "since 8.0"), ("11.1", "until 10.2")] {
        let mut device = Device { second: Some(Second::default()), ..Device::default() };
        let error = kind(save(&mut device, &context(release)).unwrap_err());
        assert!(matches!(error, VmStateError::NotInRelease { name: "dev_second", exists: e, .. } if e == exists));
        assert_eq!(Device::description(&context(release)).subsections.len(), 1);
    }
    assert_eq!(Device::description(&ctx).subsections.len(), 2);
}

#[test]
fn a_destination_asks_the_hooks() {
    let ctx = context("10.0");
    let error = load::<Device>(&mut Reader::at(&[0xff], 100), 1, &ctx).unwrap_err();
    assert_eq!((error.fault(), error.offset), (Fault::Mismatch, 100));
    assert!(matches!(kind(error), VmStateError::Refused { what: "value", found: 0xff, .. }));
    assert_eq!(decode::<Device>(&[0xff], 1, &ctx).unwrap().value, 0xff, "decoding runs no hook");
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "pointers", version = 1)]
struct Pointers {
    map: u8,
    #[vmstate(null = map & (1 << index) == 0)]
    pointers: [Pointer<Pair>; 3],
    #[vmstate(len = 2, null = index == 1)]
    some: Vec<Pointer<Pair>>,
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "marked", version = 1)]
struct MarkedArray {
    sq: MarkedPointers<Pair, 2>,
}

#[test]
fn null_pointers_leave_a_marker() {
    let pair = || Pointer(Some(Box::new(Pair { a: 0x30, b: 1 })));
    let value = Pointers { map: 0b101, pointers: [pair(), Pointer(None), pair()], some: vec![pair(), Pointer(None)] };
    let bytes = b"\x05\x30\0\x01\x30\x30\0\x01\x30\0\x01\x30";
    for (release, elements) in [
        ("7.2", ["pointers struct 3#0", "pointers struct 1#1", "pointers struct 3#2"]),
        ("10.0", ["pointers struct 3#0", "pointers nullptr 1#1", "pointers struct 3"]),
    ] {
        let ctx = context(release);
        let (encoded, described) = encode_described(&value, 1, &ctx).unwrap();
        assert_eq!(encoded, bytes);
        assert_eq!(entries(&described.fields[1..4]), elements);
        assert_eq!(decode::<Pointers>(bytes, 1, &ctx).unwrap(), value);
    }
    let error = decode::<Pointers>(b"\x05\x30\0\x01\x31", 1, &context("10.0")).unwrap_err();
    assert!(matches!(kind(error), VmStateError::BadMarker { found: 0x31, expected: "0x30", .. }));
}

/// Names, types and order as in the description of nvme's queues in 11.1.
#[test]
fn marked_pointers_are_described_with_their_markers() {
    let ctx = context("11.1");
    let value = MarkedArray { sq: MarkedPointers([Some(Box::new(Pair { a: 1, b: 2 })), None]) };
    let (bytes, described) = encode_described(&value, 1, &ctx).unwrap();
    assert_eq!(bytes, b"\x31\x01\0\x02\x30");
    assert_eq!(entries(&described.fields), ["sq ptr-marker 1", "sq struct 3", "sq ptr-marker 1"]);
    assert_eq!(decode::<MarkedArray>(&bytes, 1, &ctx).unwrap(), value);
    let error = decode::<MarkedArray>(b"\x32", 1, &ctx).unwrap_err();
    assert!(matches!(kind(error), VmStateError::BadMarker { found: 0x32, .. }));
}

#[test]
fn loaders_find_subsections_by_the_vmsds_name_and_more() {
    let found = |subsection| __names_subsection("toy", subsection);
    assert!(found("toy/sub") && found("toys"));
    assert!(!found("toy") && !found("to") && !found("") && !found("other/toy"));
    assert!(__same_name("toy/sub", "toy/sub"));
    assert!(!__same_name("toy/sub", "toy/suc") && !__same_name("toy/sub", "toy/su"));
}

/// Declarations of a crate that has `qevm-savevm` through another.
mod of_a_crate_elsewhere {
    /// As a façade hands it on.
    mod facade {
        pub(super) use qevm_savevm as savevm;
    }
    use facade::savevm::vmstate::{self, Context, VmState};

    #[derive(VmState, Debug, Clone, Default, PartialEq)]
    #[vmstate(name = "elsewhere/sub", version = 1, crate = facade::savevm)]
    struct Sub {
        c: u8,
    }

    #[derive(VmState, Debug, Clone, Default, PartialEq)]
    #[vmstate(name = "elsewhere", version = 1, crate = facade::savevm)]
    struct Elsewhere<T: vmstate::Field> {
        a: T,
        #[vmstate(len = 2)]
        b: Vec<u8>,
        #[vmstate(subsection)]
        sub: Option<Sub>,
    }

    #[test]
    fn the_derive_finds_the_crate_where_it_is_told() {
        let ctx = Context::new("11.1".parse().unwrap(), "microvm");
        let state = Elsewhere { a: 7u16, b: vec![1, 2], sub: None };
        assert_eq!(vmstate::encode(&state, &ctx).unwrap(), [0, 7, 1, 2]);
    }
}
