use super::*;
use qevm_migration::BadParameter;
use serde_json::json;

fn set(parameters: &mut Parameters, name: &str, value: impl Into<Value>) -> Result<(), Refusal> {
    *parameters = with(parameters, &Map::from_iter([(name.to_owned(), value.into())]))?;
    Ok(())
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        other => panic!("{other} is no object"),
    }
}

/// Parameters that QEMU has not, with their defaults in milliseconds.
const OURS: [(&str, u64); 6] = [
    ("x-connect-timeout", 30_000),
    ("x-handshake-timeout", 10_000),
    ("x-idle-timeout", 300_000),
    ("x-switchover-timeout", 120_000),
    ("x-handover-timeout", 10_000),
    ("x-tcp-user-timeout", 0),
];

/// What QEMU 11.1.3 answered to `query-migrate-parameters` just after its start.
#[test]
fn the_defaults_are_those_of_qemu() {
    let qemu = json!({
        "cpu-throttle-tailslow": false, "xbzrle-cache-size": 67108864, "cpu-throttle-initial": 20, "announce-max": 550,
        "direct-io": false, "avail-switchover-bandwidth": 0, "zero-page-detection": "multifd", "multifd-qatzip-level": 1,
        "x-rdma-chunk-size": 1048576, "multifd-channels": 2, "mode": "normal", "multifd-zstd-level": 1,
        "announce-initial": 50, "downtime-limit": 300, "tls-authz": "", "cpr-exec-command": [], "vcpu-dirty-limit": 1,
        "multifd-compression": "none", "announce-rounds": 5, "announce-step": 100, "tls-creds": "",
        "x-vcpu-dirty-limit-period": 1000, "multifd-zlib-level": 1, "max-cpu-throttle": 99, "max-postcopy-bandwidth": 0,
        "tls-hostname": "", "throttle-trigger-threshold": 50, "max-bandwidth": 134217728, "x-checkpoint-delay": 20000,
        "cpu-throttle-increment": 10,
    });
    let mut listed = list(&Parameters::default());
    for (name, default) in OURS {
        assert_eq!(listed.remove(name), Some(json!(default)), "{name}");
    }
    assert_eq!(Value::Object(listed), qemu);
}

#[test]
fn names_set_what_they_list() {
    let changes = object(json!({
        "announce-initial": 1, "announce-max": 2, "announce-rounds": 3, "announce-step": 4,
        "throttle-trigger-threshold": 5, "cpu-throttle-initial": 6, "cpu-throttle-increment": 7,
        "cpu-throttle-tailslow": true, "tls-creds": "", "tls-hostname": "", "tls-authz": "", "max-bandwidth": 8,
        "avail-switchover-bandwidth": 9, "downtime-limit": 10, "x-checkpoint-delay": 11, "multifd-channels": 12,
        "xbzrle-cache-size": 8192, "max-postcopy-bandwidth": 13, "max-cpu-throttle": 14, "multifd-compression": "zstd",
        "multifd-zlib-level": 0, "multifd-qatzip-level": 9, "multifd-zstd-level": 15, "x-vcpu-dirty-limit-period": 16,
        "vcpu-dirty-limit": 17, "mode": "cpr-reboot", "zero-page-detection": "legacy", "direct-io": true,
        "cpr-exec-command": ["a", "b"], "x-rdma-chunk-size": 2097152, "x-connect-timeout": 18, "x-handshake-timeout": 19,
        "x-idle-timeout": 20, "x-switchover-timeout": 21, "x-handover-timeout": 22, "x-tcp-user-timeout": 23,
    }));
    let set = with(&Parameters::default(), &changes).unwrap();
    assert_eq!(Value::Object(list(&set)), Value::Object(changes));
}

#[test]
fn a_bad_value_changes_nothing() {
    let mut parameters = Parameters::default();
    let bad = [
        ("downtime-limit", json!(2_000_001)),
        ("downtime-limit", json!(-1)),
        ("cpu-throttle-initial", json!(0)),
        ("cpu-throttle-increment", json!(100)),
        ("max-cpu-throttle", json!(19)),
        ("throttle-trigger-threshold", json!(101)),
        ("multifd-channels", json!(0)),
        ("multifd-zlib-level", json!(10)),
        ("multifd-zstd-level", json!(21)),
        ("multifd-qatzip-level", json!(0)),
        ("xbzrle-cache-size", json!(4097)),
        ("announce-initial", json!(100_001)),
        ("announce-max", json!(100_001)),
        ("announce-rounds", json!(1001)),
        ("announce-step", json!(0)),
        ("x-vcpu-dirty-limit-period", json!(1001)),
    ];
    for (name, value) in bad {
        let refused = set(&mut parameters, name, value);
        assert!(
            matches!(refused, Err(Refusal::Range(BadParameter::Range { name: said, .. })) if said == name),
            "{name}: {refused:?}"
        );
    }
    assert!(matches!(set(&mut parameters, "x-rdma-chunk-size", 5), Err(Refusal::Range(BadParameter::Range { .. }))));
    assert_eq!(
        set(&mut parameters, "vcpu-dirty-limit", 0),
        Err(Refusal::Range(BadParameter::TooSmall("vcpu-dirty-limit")))
    );
    assert!(matches!(set(&mut parameters, "multifd-channels", 256), Err(Refusal::Integer { expected: "uint8_t", .. })));
    assert!(matches!(set(&mut parameters, "downtime-limit", 1.5), Err(Refusal::Integer { expected: "uint64", .. })));
    assert!(matches!(set(&mut parameters, "cpu-throttle-tailslow", 1), Err(Refusal::Type { .. })));
    assert!(matches!(set(&mut parameters, "multifd-compression", "qpl"), Err(Refusal::Choice { .. })));
    assert!(matches!(set(&mut parameters, "mode", "cpr-exec"), Err(Refusal::Unsupported { .. })));
    assert!(matches!(set(&mut parameters, "tls-creds", 5), Err(Refusal::Type { .. })));
    assert!(matches!(set(&mut parameters, "block-bitmap-mapping", json!([])), Err(Refusal::Unsupported { .. })));
    assert_eq!(set(&mut parameters, "max-bandwith", 1), Err(Refusal::Unknown("max-bandwith".into())));
    // One bad value among good ones.
    let changes = object(json!({ "max-bandwidth": 7, "cpu-throttle-initial": 50, "max-cpu-throttle": 40 }));
    assert!(matches!(
        with(&parameters, &changes),
        Err(Refusal::Range(BadParameter::Range { name: "max-cpu-throttle", .. }))
    ));
    assert_eq!(parameters, Parameters::default());
}

#[test]
fn negative_sizes_are_large_ones_and_null_is_no_text() {
    let mut parameters = Parameters::default();
    set(&mut parameters, "max-bandwidth", -1).unwrap();
    set(&mut parameters, "tls-creds", "tls0").unwrap();
    assert_eq!(parameters.tls_creds, "tls0");
    set(&mut parameters, "tls-creds", Value::Null).unwrap();
    let mut expected = Parameters::default();
    expected.max_bandwidth = u64::MAX;
    assert_eq!(parameters, expected);
}
