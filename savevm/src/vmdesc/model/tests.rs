use super::*;
use crate::ErrorKind;

fn parse(json: &str) -> Result<Description, Error> {
    Description::parse(json.as_bytes(), &Limits::default())
}

/// A description with one device that has these fields and subsections.
fn with_fields(fields: &str, subsections: &str) -> String {
    format!(
        r#"{{"page_size": 4096, "devices": [{{"name": "x", "instance_id": 1, "vmsd_name": "x", "version": 2,
            "fields": [{fields}], "subsections": [{subsections}]}}]}}"#
    )
}

#[test]
fn arrays_structs_and_subsection_headers_add_up() {
    let json = with_fields(
        r#"{"name": "a", "array_len": 24, "type": "uint64", "size": 8},
           {"name": "s", "index": 0, "type": "struct", "struct": {"vmsd_name": "s", "version": 1, "fields": []}, "size": 20},
           {"name": "none", "type": "buffer", "size": 0}"#,
        r#"{"vmsd_name": "x/sub", "version": 1, "fields": [{"name": "f", "type": "bool", "size": 1}]}"#,
    );
    let description = parse(&json).unwrap();
    // 24 × 8, 20, 0; then marker, length byte, five letters, version, and the one byte of the subsection.
    assert_eq!(description.device(b"x", 1).unwrap().wire_size(), 192 + 20 + 1 + 1 + 5 + 4 + 1);
    assert_eq!(description.devices[0].version(), Some(2));
    assert!(description.device(b"x", 0).is_none());
}

#[test]
fn old_style_sections_have_their_size_and_no_fields() {
    // As QEMU 10.0.13 writes it for `-netdev user`.
    let json = r#"{"page_size": 4096, "devices": [{"name": "slirp", "instance_id": 0, "size": 131,
        "fields": [{"name": "data", "size": 131, "type": "buffer"}]}]}"#;
    let slirp = &parse(json).unwrap().devices[0];
    assert_eq!((&slirp.body, slirp.wire_size()), (&DeviceBody::OldStyle { size: 131 }, 131));
    assert_eq!(slirp.version(), None);
}

#[test]
fn duplicate_keys_are_one_structure_each() {
    let json = with_fields(
        r#"{"name": "queue", "type": "qtailq", "vmsd_name": "e", "version": 1, "fields": [],
            "vmsd_name": "e", "version": 1, "fields": [{"name": "f", "type": "bool", "size": 1}], "size": 4}"#,
        "",
    );
    let DeviceBody::Struct(device) = parse(&json).unwrap().devices.remove(0).body else { panic!("not a struct") };
    let nested = &device.fields[0].nested;
    assert_eq!(nested.iter().map(|s| s.fields.len()).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn text_style_and_unknown_keys_do_not_matter() {
    let wide =
        "{ \"page_size\" : 4096,\n\t\"new\" : [ { \"a\" : -1.5e3 }, null, true, \"\\u00e9\\\"\" ], \"devices\" : [ ] }";
    assert_eq!(parse(wide).unwrap(), parse(r#"{"page_size":4096,"devices":[]}"#).unwrap());
}

#[test]
fn escapes_are_characters() {
    let json = with_fields(r#"{"name": "\u0041\n\"\\\/", "type": "bool", "size": 1}"#, "");
    let DeviceBody::Struct(device) = parse(&json).unwrap().devices.remove(0).body else { panic!("not a struct") };
    assert_eq!(device.fields[0].name, "A\n\"\\/");
}

#[test]
fn every_damage_has_its_kind() {
    let json = |e: Error| matches!(e.kind, ErrorKind::Vmdesc(VmdescError::Json { .. }));
    for bad in ["", "{", "[]", "{\"devices\": [}", "{\"devices\": []} x", "{\"page_size\": -1, \"devices\": []}"] {
        assert!(json(parse(bad).unwrap_err()), "{bad}");
    }
    for bad in [r#"{"page_size": 1.5}"#, r#"{"page_size": 18446744073709551616}"#, r#"{"x": "\q"}"#, r#"{"x": "\u12"}"#]
    {
        assert!(json(parse(bad).unwrap_err()), "{bad}");
    }
    assert!(json(Description::parse(b"{\"\xff\": 1, \"devices\": []}", &Limits::default()).unwrap_err()));

    let missing = |json: &str| match parse(json).unwrap_err().kind {
        ErrorKind::Vmdesc(VmdescError::MissingKey { object, key }) => (object, key),
        other => panic!("{other:?}"),
    };
    assert_eq!(missing("{}"), ("description", "devices"));
    assert_eq!(missing(r#"{"devices": [{"instance_id": 0, "size": 1}]}"#), ("device", "name"));
    assert_eq!(missing(r#"{"devices": [{"name": "x", "size": 1}]}"#), ("device", "instance_id"));
    assert_eq!(missing(r#"{"devices": [{"name": "x", "instance_id": 0}]}"#), ("device", "vmsd_name"));
    assert_eq!(missing(r#"{"devices": [{"name": "x", "instance_id": 0, "version": 1}]}"#), ("structure", "vmsd_name"));
    assert_eq!(missing(r#"{"devices": [{"name": "x", "instance_id": 0, "vmsd_name": "x"}]}"#), ("device", "version"));
    assert_eq!(missing(&with_fields(r#"{"name": "f", "type": "bool"}"#, "")), ("field", "size"));
    assert_eq!(missing(&with_fields(r#"{"name": "f", "size": 1}"#, "")), ("field", "type"));
    assert_eq!(missing(&with_fields(r#"{"type": "bool", "size": 1}"#, "")), ("field", "name"));
    assert_eq!(missing(&with_fields("", r#"{"version": 1}"#)), ("structure", "vmsd_name"));
}

#[test]
fn an_error_says_where_and_in_what() {
    let json = with_fields(r#"{"name": "f", "type": "bool", "size": x}"#, "");
    let error = Description::parse_at(json.as_bytes(), 1000, &Limits::default()).unwrap_err();
    assert_eq!(error.offset, 1000 + json.find(": x}").unwrap() as u64 + 2);
    assert_eq!(error.path.to_string(), "description › device 'x' › f");
}

#[test]
fn limits_hold() {
    let what = |json: &str, limits: &Limits| match Description::parse(json.as_bytes(), limits).unwrap_err().kind {
        ErrorKind::Wire(WireError::LimitExceeded { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    let limits = Limits::default();
    let deep = format!("{{\"x\": {}", "[".repeat(1_000_000));
    assert_eq!(what(&deep, &limits), "JSON nesting depth");
    assert_eq!(what(&deep, &Limits { depth: u32::MAX, ..Limits::default() }), "JSON nesting depth");
    let huge = with_fields(r#"{"name": "f", "array_len": 18446744073709551615, "type": "bool", "size": 2}"#, "");
    assert_eq!(what(&huge, &limits), "length of a described section");
    let two =
        r#"{"devices": [{"name": "x", "instance_id": 0, "size": 1}, {"name": "x", "instance_id": 1, "size": 1}]}"#;
    assert_eq!(what(two, &Limits { sections: 1, ..Limits::default() }), "number of described sections");
    assert_eq!(what(two, &Limits { vmdesc: 10, ..Limits::default() }), "length of the description");
    let id = r#"{"devices": [{"name": "x", "instance_id": 4294967296, "size": 1}]}"#;
    assert_eq!(what(id, &limits), "instance_id");
    let name = format!(r#"{{"devices": [{{"name": "{}", "instance_id": 0, "size": 1}}]}}"#, "x".repeat(256));
    assert_eq!(what(&name, &limits), "length of a name");
}
