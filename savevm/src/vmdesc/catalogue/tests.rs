use super::*;
use crate::vmdesc::{Description, FieldDescription, Schema, StructDescription};
use proptest::prelude::*;
use qevm_wire::Limits;

const OLD: QemuVersion = QemuVersion::new(7, 2);
const NEW: QemuVersion = QemuVersion::new(10, 0);

fn field(name: &str, type_name: &str, size: u64) -> FieldDescription {
    FieldDescription { name: name.into(), type_name: type_name.into(), size, ..FieldDescription::default() }
}

fn structure(vmsd_name: &str, fields: Vec<FieldDescription>) -> StructDescription {
    StructDescription { vmsd_name: vmsd_name.into(), version: 1, fields, subsections: Vec::new() }
}

fn inside(name: &str, type_name: &str, nested: Vec<StructDescription>) -> FieldDescription {
    let size = nested.iter().map(StructDescription::wire_size).sum();
    FieldDescription { nested, ..field(name, type_name, size) }
}

fn device(structure: StructDescription) -> DeviceDescription {
    DeviceDescription { name: structure.vmsd_name.clone(), instance_id: 0, body: DeviceBody::Struct(structure) }
}

fn learnt(structures: &[(QemuVersion, StructDescription)]) -> Catalogue {
    let mut catalogue = Catalogue::default();
    for (release, structure) in structures {
        let devices = vec![device(structure.clone())];
        catalogue.learn(&Description { devices, ..Description::default() }, *release);
    }
    assert_eq!(catalogue.to_string().parse(), Ok(catalogue.clone()));
    catalogue
}

fn describe(catalogue: &Catalogue, body: &[u8]) -> Found {
    catalogue.describe(&CountedString::new("bus/0/x").unwrap(), 7, 1, body, &[NEW, OLD])
}

/// The names of the fields of the one reading.
fn names(catalogue: &Catalogue, body: &[u8]) -> Vec<String> {
    match describe(catalogue, body) {
        Found::One(device) => {
            let node = device.decode(body, 0, &Limits::default()).unwrap();
            let mut names = Vec::new();
            node.leaves(&mut |path, _| names.push(path.strip_prefix("bus/0/x.").unwrap().to_owned()));
            names
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_embedded_catalogue_can_be_read_and_written() {
    let text = include_str!("layouts.txt");
    let catalogue: Catalogue = text.parse().unwrap();
    assert_eq!(&catalogue, Catalogue::embedded());
    let facts: String = text.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect();
    assert_eq!(catalogue.to_string(), facts);
    assert_eq!(catalogue.releases.len(), 4);
    // Every structure inside a field is there, in a form that was seen inside a field.
    for structure in catalogue.structures.values() {
        for inner in structure.layouts.iter().flat_map(|l| &l.fields).flat_map(|f| &f.nested) {
            let layout = &catalogue.structures[&inner.name].layouts[inner.layout];
            assert!(layout.version == inner.version && layout.roles.nested, "{inner:?}");
        }
        for subsection in &structure.subsections {
            assert!(catalogue.structures[subsection].layouts.iter().any(|l| l.roles.subsection), "{subsection}");
        }
    }
}

#[test]
fn what_was_learnt_is_found_again() {
    let element = structure("element", vec![field("a", "uint8", 1), field("b", "uint16", 2)]);
    let numbered = |index| FieldDescription { index, ..inside("elements", "struct", vec![element.clone()]) };
    let mut x = structure(
        "x",
        vec![
            FieldDescription { array_len: Some(3), ..field("numbers", "uint16", 2) },
            numbered(Some(0)),
            numbered(None),
            FieldDescription { size: 9, ..inside("list", "qtailq", vec![element.clone(), element.clone()]) },
            field("pointer", "ptr-marker", 1),
            inside("pointer", "struct", vec![element]),
            field("pointer", "ptr-marker", 1),
        ],
    );
    x.subsections.push(structure("x/more", vec![field("c", "bool", 1)]));
    let body =
        [&[0; 12][..], &[1, 0, 0, 0, 1, 0, 0, 0, 0], &[0x31, 0, 0, 0, 0x30], b"\x05\x06x/more\0\0\0\x01\x01"].concat();
    let catalogue = learnt(&[(NEW, x.clone())]);
    let Found::One(found) = describe(&catalogue, &body) else { panic!("{:?}", describe(&catalogue, &body)) };
    let DeviceBody::Struct(description) = &found.body else { panic!() };
    assert_eq!((found.name.as_str(), found.instance_id, description.fields.len()), ("bus/0/x", 7, x.fields.len()));
    let decode = |device: &DeviceDescription| device.decode(&body, 0, &Limits::default()).unwrap();
    assert_eq!(decode(&found).value, decode(&device(x)).value);
    // Without the subsection, with a shorter list, with other pointers.
    let body = [&[0; 12][..], &[0], &[0x30, 0x31, 0, 0, 0]].concat();
    let found = names(&catalogue, &body);
    assert_eq!(found[found.len() - 2..], ["pointer[1].a", "pointer[1].b"]);
}

#[test]
fn what_does_not_fit_to_the_last_byte_is_not_read() {
    let catalogue = learnt(&[(NEW, structure("x", vec![field("a", "uint32", 4), field("flag", "bool", 1)]))]);
    assert_eq!(names(&catalogue, &[9, 9, 9, 9, 1]), ["a", "flag"]);
    for body in [&[9, 9, 9, 9][..], &[9, 9, 9, 9, 1, 0], &[9, 9, 9, 9, 2], &[]] {
        assert_eq!(describe(&catalogue, body), Found::NoReading, "{body:?}");
    }
    let other = CountedString::new("y").unwrap();
    assert_eq!(catalogue.describe(&other, 0, 1, &[0; 5], &[NEW]), Found::Unknown);
    let x = CountedString::new("x").unwrap();
    assert_eq!(catalogue.describe(&x, 0, 2, &[0; 5], &[NEW]), Found::Unknown);
}

#[test]
fn the_likelier_release_decides_between_equal_sizes_and_nothing_else_does() {
    let old = (OLD, structure("x", vec![field("old", "uint32", 4)]));
    let new = (NEW, structure("x", vec![field("new", "uint32", 4)]));
    let catalogue = learnt(&[old.clone(), new.clone()]);
    assert_eq!(names(&catalogue, &[0; 4]), ["new"]);
    let x = CountedString::new("x").unwrap();
    assert!(
        matches!(catalogue.describe(&x, 0, 1, &[0; 4], &[OLD, NEW]), Found::One(device) if device.decode(&[0; 4], 0, &Limits::default()).unwrap().find("old").is_some())
    );
    // One release that has both forms, or no release that is known.
    assert_eq!(describe(&learnt(&[(NEW, old.1), new]), &[0; 4]), Found::Ambiguous);
    assert_eq!(catalogue.describe(&x, 0, 1, &[0; 4], &[QemuVersion::new(1, 0)]), Found::Ambiguous);
}

#[test]
fn lengths_of_arrays_that_vary_are_found() {
    let array = |n| FieldDescription { array_len: Some(n), ..field("numbers", "uint16", 2) };
    let x = |n| (NEW, structure("x", vec![field("id", "uint8", 1), array(n)]));
    // One length was seen, so others mean another layout; two were seen, so there may be more.
    assert_eq!(describe(&learnt(&[x(2)]), &[0; 7]), Found::NoReading);
    let catalogue = learnt(&[x(2), x(5)]);
    assert_eq!(names(&catalogue, &[0; 11]), ["id", "numbers"]);
    assert_eq!(names(&catalogue, &[0; 7]), ["id", "numbers"]);
    assert_eq!(describe(&catalogue, &[0; 8]), Found::NoReading);
}

#[test]
fn forms_of_inner_structures_stay_with_their_fields() {
    let buffer = |len| structure("fifo", vec![field("data", "buffer", len)]);
    let fields = vec![inside("short", "struct", vec![buffer(2)]), inside("long", "struct", vec![buffer(6)])];
    let catalogue = learnt(&[(NEW, structure("x", fields))]);
    assert_eq!(names(&catalogue, &[0; 8]), ["short.data", "long.data"]);
    // Where no form that was seen fits, others of the same structure may: here one.
    assert_eq!(names(&catalogue, &[0; 4]), ["short.data", "long.data"]);
    assert_eq!(describe(&catalogue, &[0; 5]), Found::NoReading);
}

#[test]
fn a_schema_adds_what_was_not_seen() {
    let mut catalogue = learnt(&[(NEW, structure("x", vec![field("a", "int8", 1)]))]);
    let dump = br#"{"x": {"Description": {"name": "x", "version_id": 1, "minimum_version_id": 1,
        "Fields": [{"field": "a", "version_id": 0, "field_exists": false, "size": 1}],
        "Subsections": [{"name": "x/late", "version_id": 3, "minimum_version_id": 1, "Fields": [
            {"field": "b", "version_id": 0, "field_exists": false, "num": 2, "size": 4}]}]}},
        "other": {"Description": {"name": "other", "version_id": 4, "minimum_version_id": 1, "Fields": [
            {"field": "c", "version_id": 0, "field_exists": false, "size": 2},
            {"field": "unused", "version_id": 0, "field_exists": false, "size": 3}]}},
        "unsure": {"Description": {"name": "unsure", "version_id": 4, "minimum_version_id": 1, "Fields": [
            {"field": "c", "version_id": 0, "field_exists": true, "size": 2}]}}}"#;
    let schema = Schema::parse(dump, &Limits::default()).unwrap();
    catalogue.learn_schema(&schema.descriptions(), NEW);
    assert_eq!(catalogue.to_string().parse(), Ok(catalogue.clone()));
    assert_eq!(names(&catalogue, b"\x09\x05\x06x/late\0\0\0\x03........"), ["a", "x/late.b"]);
    let read = |name: &str, body: &[u8]| catalogue.describe(&CountedString::new(name).unwrap(), 0, 4, body, &[NEW]);
    assert!(matches!(read("other", &[0; 5]), Found::One(_)));
    assert_eq!((read("other", &[0; 4]), read("unsure", &[0; 2])), (Found::NoReading, Found::Unknown));
}

#[test]
fn the_search_ends() {
    let array = |name: &str, n| FieldDescription { array_len: Some(n), ..field(name, "uint8", 1) };
    let x = |n| {
        let arrays = (0..40).map(|i| array(&format!("a{i}"), n)).collect();
        (NEW, structure("x", arrays))
    };
    let catalogue = learnt(&[x(2), x(3)]);
    assert_eq!(describe(&catalogue, &[0; 20_000]), Found::Ambiguous);
    // A structure that was seen inside itself is read once.
    let fields = |inner| vec![inside("x", "struct", vec![inner])];
    let inner = structure("x", vec![field("a", "uint8", 1)]);
    let catalogue = learnt(&[(NEW, structure("x", fields(inner)))]);
    assert_eq!(names(&catalogue, &[0]), ["x.a"]);
}

#[test]
fn lines_without_meaning_are_named() {
    let bad = |text: &str| text.parse::<Catalogue>().unwrap_err().line;
    assert_eq!(bad("releases\t10.0\nx\n 1\ts\n"), 3);
    assert_eq!(bad("# comment\n\n  a\tuint8\t1\n"), 3);
    assert_eq!(bad("x\n 1\ts\ta\n  a\tuint8\tlong\n"), 3);
    assert_eq!(bad("x\n 1\ts\ta\n  a\tstruct\t-\t1\ty@1\n"), 3);
    assert_eq!(bad("releases\tten\n"), 1);
}

/// Structures of numbers, arrays and structures, and how many bytes they take.
fn any_structure() -> impl Strategy<Value = StructDescription> {
    let number = prop_oneof![Just(("uint8", 1)), Just(("uint16", 2)), Just(("uint32", 4)), Just(("int64", 8))];
    let number = (number, 1..4u64).prop_map(|((type_name, size), count)| FieldDescription {
        array_len: (count > 1).then_some(count),
        ..field("", type_name, size)
    });
    let fields = |field: BoxedStrategy<FieldDescription>| {
        proptest::collection::vec(field, 1..5).prop_map(|mut fields| {
            for (i, field) in fields.iter_mut().enumerate() {
                field.name = format!("f{i}");
                field.nested.iter_mut().for_each(|nested| nested.vmsd_name = format!("inner{i}"));
            }
            fields
        })
    };
    let inner = fields(number.clone().boxed()).prop_map(|fields| structure("inner", fields));
    let nested = inner.prop_map(|inner| inside("", "struct", vec![inner]));
    fields(prop_oneof![3 => number, 1 => nested].boxed()).prop_map(|fields| structure("x", fields))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_section_is_described_as_it_was_written(x in any_structure(), other in any_structure(), byte: u8) {
        let body = vec![byte; x.wire_size() as usize];
        prop_assert_eq!(describe(&learnt(&[(NEW, x.clone())]), &body), Found::One(DeviceDescription {
            name: "bus/0/x".into(), instance_id: 7, body: DeviceBody::Struct(x.clone())
        }));
        // Whatever else is known, no other description is made up unless it fits, too.
        let both = learnt(&[(NEW, x.clone()), (NEW, other)]);
        match describe(&both, &body) {
            Found::One(found) => prop_assert_eq!(found.body, DeviceBody::Struct(x)),
            found => prop_assert_eq!(found, Found::Ambiguous),
        }
    }
}
