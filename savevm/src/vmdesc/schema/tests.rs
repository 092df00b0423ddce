use super::*;
use crate::ErrorKind;
use crate::vmdesc::VmdescError;

fn schema(fields: &str, subsections: &str) -> Schema {
    let json = format!(
        r#"{{"x": {{"Name": "x", "version_id": 2, "minimum_version_id": 1, "Description": {{"name": "x", "version_id": 2,
            "minimum_version_id": 1, "Fields": [{fields}], "Subsections": [{subsections}]}}}}}}"#
    );
    Schema::parse(json.as_bytes(), &Limits::default()).unwrap()
}

fn field(name: &str, size: u64, more: &str) -> String {
    format!(r#"{{"field": "{name}", "size": {size}, "version_id": 0{more}}}"#)
}

const OPTIONAL: &str = r#", "field_exists": true"#;

/// Decodes and checks that the tree encodes to the bytes, and that it is opaque unless the reading is unique.
fn decode(schema: &Schema, idstr: &str, version: u32, body: &[u8]) -> (Node, Verdict) {
    let idstr = CountedString::new(idstr).unwrap();
    let (node, verdict) = schema.decode(&idstr, version, body, 100, &Limits::default()).unwrap();
    let mut copy = Vec::new();
    node.encode(&mut copy).unwrap();
    assert_eq!(copy, body);
    assert_eq!(node.opaque_bytes() == 0, verdict == Verdict::Unique || body.is_empty());
    (node, verdict)
}

fn number(node: &Node, path: &str) -> u64 {
    node.find(path).and_then(Node::scalar).unwrap_or_else(|| panic!("no number {path}")).as_u64()
}

#[test]
fn a_dump_of_qemu_reads_sections_of_qemu() {
    // From `-dump-vmstate` of QEMU 10.0.13, and streams of the same.
    let schema = Schema::parse(include_bytes!("../golden/schema.json"), &Limits::default()).unwrap();
    assert_eq!(schema.machine.as_deref(), Some("microvm"));
    // Both lengths of a PCI configuration space are conditional in the dump.
    let mut pvpanic = vec![0; 276];
    pvpanic[..8].copy_from_slice(&[0, 0, 0, 2, 0x36, 0x1b, 0x11, 0]);
    let (node, verdict) = decode(&schema, "0000:00:02.0/pvpanic-pci", 1, &pvpanic);
    assert_eq!((verdict, number(&node, "dev.version_id")), (Verdict::Unique, 2));
    assert_eq!(node.find("dev.config").unwrap().len, 256);
    let mut rtc = vec![0; 245];
    rtc[128..130].copy_from_slice(&[0x8f, 0]);
    let (node, verdict) = decode(&schema, "mc146818rtc", 3, &rtc);
    assert_eq!((verdict, number(&node, "cmos_index")), (Verdict::Unique, 0x8f));
    rtc.extend(b"\x05\x25mc146818rtc/irq_reinject_on_ack_count\0\0\0\x01\x00\x07");
    let (node, verdict) = decode(&schema, "mc146818rtc", 3, &rtc);
    let path = "mc146818rtc/irq_reinject_on_ack_count.irq_reinject_on_ack_count";
    assert_eq!((verdict, number(&node, path)), (Verdict::Unique, 7));
    assert_eq!(decode(&schema, "mc146818rtc", 4, &rtc).1, Verdict::NotInSchema);
    assert_eq!(decode(&schema, "cpu", 12, &rtc).1, Verdict::NotInSchema);
}

#[test]
fn fields_of_later_versions_are_not_in_older_sections() {
    let schema = schema(&[field("a", 1, ""), r#"{"field": "b", "size": 4, "version_id": 2}"#.into()].join(","), "");
    assert_eq!(decode(&schema, "x", 2, &[1, 0, 0, 0, 2]).1, Verdict::Unique);
    let (node, verdict) = decode(&schema, "x", 1, &[1]);
    assert_eq!((verdict, node.children().len()), (Verdict::Unique, 1));
    assert_eq!(decode(&schema, "x", 1, &[1, 0, 0, 0, 2]).1, Verdict::Contradiction);
}

#[test]
fn only_one_reading_counts() {
    let arrays = field("array", 2, r#", "num": 3"#);
    let optional = |a, b| {
        let fields = [arrays.clone(), field("a", a, OPTIONAL), field("b", b, OPTIONAL)].join(",");
        schema(&fields, "")
    };
    let (node, verdict) = decode(&optional(4, 8), "x", 2, &[7; 14]);
    assert_eq!((verdict, node.find("a").is_none()), (Verdict::Unique, true));
    assert_eq!(node.find("array").unwrap().len, 6);
    assert_eq!(decode(&optional(4, 8), "x", 2, &[7; 18]).1, Verdict::Unique);
    assert_eq!(decode(&optional(4, 4), "x", 2, &[7; 10]).1, Verdict::Ambiguous);
    assert_eq!(decode(&optional(4, 4), "x", 2, &[7; 11]).1, Verdict::Contradiction);
}

#[test]
fn without_lengths_of_arrays_conditions_prove_nothing() {
    let fields = [field("a", 4, ""), field("b", 4, OPTIONAL)].join(",");
    // Two elements of `a`, or `a` and `b`?
    assert_eq!(decode(&schema(&fields, ""), "x", 2, &[0; 8]).1, Verdict::Ambiguous);
    assert_eq!(decode(&schema(&fields, ""), "x", 2, &[0; 4]).1, Verdict::Unique);
}

#[test]
fn arrays_of_structures_and_msix_tables_have_their_names() {
    let element = r#", "num": 2, "Description": {"name": "e", "version_id": 1, "Fields": [
        {"field": "f", "size": 2, "version_id": 0}, {"field": "g", "size": 1, "version_id": 2}]}"#;
    let (node, verdict) = decode(&schema(&field("s", 24, element), ""), "bus/x", 2, &[0, 1, 0, 2]);
    assert_eq!((verdict, number(&node, "s[1].f")), (Verdict::Unique, 2));

    let pci = r#", "Description": {"name": "PCIDevice", "version_id": 2, "Fields": [
        {"field": "version_id", "size": 4}, {"field": "config", "size": 256}, {"field": "irq_state", "size": 16}]}"#;
    let schema = schema(&[field("parent_obj", 2000, pci), field("msix", 0, "")].join(","), "");
    let mut body = vec![0; 276 + 33];
    body[4 + 0x06] = 0x10; // has a capability list
    body[4 + 0x34] = 0x40;
    body[4 + 0x40..4 + 0x44].copy_from_slice(&[0x11, 0, 1, 0]); // MSI-X with two vectors
    let (node, verdict) = decode(&schema, "x", 2, &body);
    assert_eq!((verdict, node.find("msix.table").unwrap().len), (Verdict::Unique, 32));
}

#[test]
fn the_search_ends() {
    let many: Vec<String> = (0..60).map(|i| field(&format!("f{i}"), 1, OPTIONAL)).collect();
    assert_eq!(decode(&schema(&many.join(","), ""), "x", 2, &[0; 61]).1, Verdict::TooManyChoices);
    let chain: Vec<String> = (0..2000).map(|i| field(&format!("f{i}"), 1, OPTIONAL)).collect();
    assert_eq!(decode(&schema(&chain.join(","), ""), "x", 2, &[0; 2000]).1, Verdict::TooManyChoices);
    let empty = r#", "num": 18446744073709551615, "Description": {"name": "e", "version_id": 1, "Fields": []}"#;
    assert_eq!(decode(&schema(&field("s", 0, empty), ""), "x", 2, &[1]).1, Verdict::TooManyChoices);
}

#[test]
fn damage_has_its_kind() {
    let kind = |json: &str| Schema::parse(json.as_bytes(), &Limits::default()).unwrap_err().kind;
    let missing = |json: &str| match kind(json) {
        ErrorKind::Vmdesc(VmdescError::MissingKey { object, key }) => (object, key),
        other => panic!("{other:?}"),
    };
    assert!(matches!(kind("{"), ErrorKind::Vmdesc(VmdescError::Json { .. })));
    assert_eq!(missing("{}"), ("schema", "Description"));
    assert_eq!(missing(r#"{"x": {}}"#), ("device", "Description"));
    assert_eq!(missing(r#"{"x": {"Description": {"version_id": 1}}}"#), ("structure", "name"));
    assert_eq!(missing(r#"{"x": {"Description": {"name": "x"}}}"#), ("structure", "version_id"));
    let with =
        |field: &str| format!(r#"{{"x": {{"Description": {{"name": "x", "version_id": 1, "Fields": [{field}]}}}}}}"#);
    assert_eq!(missing(&with(r#"{"size": 1}"#)), ("field", "field"));
    assert_eq!(missing(&with(r#"{"field": "f"}"#)), ("field", "size"));
    let limits = Limits { schema: 10, ..Limits::default() };
    let error = Schema::parse(with("").as_bytes(), &limits).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Wire(qevm_wire::WireError::LimitExceeded { .. })));
}
