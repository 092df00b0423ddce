use super::*;
use serde_json::json;

fn side() -> Facts {
    let device = |kind: &str, properties: Value| Device {
        kind: kind.to_owned(),
        pci: true,
        properties: properties.as_object().unwrap().clone().into_iter().collect(),
        ..Device::default()
    };
    let net = device("virtio-net-pci", json!({"vectors": 3, "csum": true, "mac": "52:54:00:12:34:56", "id": "net0"}));
    Facts {
        arch: Some("x86_64".into()),
        machine: Some("pc-q35-10.0".into()),
        cpu: Some(Cpu {
            model: "qemu64-x86_64-cpu".into(),
            count: 2,
            max: Some(2),
            properties: [("avx".to_owned(), json!(true)), ("family".to_owned(), json!(15))].into(),
        }),
        devices: Some([("pcie.0 03.0".to_owned(), net)].into()),
        ram: Some([("pc.ram".to_owned(), 64 << 20), ("/rom@etc/acpi/tables".to_owned(), 0x2_0000)].into()),
        capabilities: Some([("multifd".to_owned(), true), ("postcopy-ram".to_owned(), false)].into()),
        parameters: Some([("multifd-channels".to_owned(), json!(2)), ("tls-creds".to_owned(), json!(""))].into()),
        ..Facts::default()
    }
}

/// What comes of one change at the destination: outcome and subject of each difference.
fn found(change: impl FnOnce(&mut Facts)) -> Vec<(Outcome, String)> {
    let mut destination = side();
    change(&mut destination);
    let differences = compare(&side(), &destination);
    assert!(differences.iter().all(|difference| !difference.advice.is_empty()));
    differences.into_iter().map(|difference| (difference.outcome, difference.subject)).collect()
}

fn net(facts: &mut Facts) -> &mut Device {
    facts.devices.as_mut().unwrap().get_mut("pcie.0 03.0").unwrap()
}

#[test]
fn alike_sides_differ_in_nothing() {
    assert_eq!(found(|_| {}), []);
    // What belongs to the host, what QEMU resizes, what only the destination has.
    let harmless = |facts: &mut Facts| {
        net(facts).properties.insert("mac".into(), json!("52:54:00:00:00:01"));
        facts.ram.as_mut().unwrap().insert("/rom@etc/acpi/tables".into(), 0x4_0000);
        facts.devices.as_mut().unwrap().insert("pcie.0 04.0".into(), Device { pci: true, ..Device::default() });
        facts.capabilities.as_mut().unwrap().insert("postcopy-ram".into(), true);
        facts.cpu.as_mut().unwrap().properties.insert("avx2".into(), json!(true));
    };
    assert_eq!(found(harmless), []);
}

#[test]
fn what_qemu_refuses_is_refused_and_what_it_does_not_compare_is_not_decidable() {
    use Outcome::{Fails, MayFail};
    type Change = fn(&mut Facts);
    let changes: [(Change, Outcome, &str); 14] = [
        (|f| f.machine = Some("pc-q35-11.1".into()), Fails, "machine type"),
        (|f| f.machine = Some("q35".into()), MayFail, "machine type"),
        (|f| f.arch = Some("aarch64".into()), Fails, "target"),
        (|f| f.cpu.as_mut().unwrap().count = 1, Fails, "processors"),
        (|f| f.cpu.as_mut().unwrap().max = Some(8), Fails, "possible processors"),
        (
            |f| {
                f.cpu.as_mut().unwrap().properties.insert("avx".into(), json!(false));
            },
            MayFail,
            "flags",
        ),
        (
            |f| {
                f.cpu.as_mut().unwrap().properties.insert("family".into(), json!(6));
            },
            MayFail,
            "family",
        ),
        (
            |f| {
                f.ram.as_mut().unwrap().insert("pc.ram".into(), 32 << 20);
            },
            Fails,
            "RAM block 'pc.ram'",
        ),
        (
            |f| {
                f.devices.as_mut().unwrap().clear();
            },
            Fails,
            "device virtio-net-pci at pcie.0 03.0",
        ),
        (|f| net(f).kind = "e1000e".into(), Fails, "device at pcie.0 03.0"),
        (
            |f| {
                net(f).properties.insert("vectors".into(), json!(5));
            },
            Fails,
            "property vectors",
        ),
        (
            |f| {
                net(f).properties.insert("csum".into(), json!(false));
            },
            MayFail,
            "property csum",
        ),
        (
            |f| {
                f.capabilities.as_mut().unwrap().insert("multifd".into(), false);
            },
            Fails,
            "capability multifd",
        ),
        (
            |f| drop(f.parameters.as_mut().unwrap().insert("multifd-channels".into(), json!(4))),
            Fails,
            "multifd-channels",
        ),
    ];
    for (change, outcome, subject) in changes {
        let found = found(change);
        assert_eq!(found.len(), 1, "{subject}: {found:?}");
        assert!(found[0].0 == outcome && found[0].1.contains(subject), "{subject}: {found:?}");
    }
}

#[test]
fn what_only_the_source_tells_is_not_compared() {
    let only_placed = |facts: &mut Facts| {
        *facts = Facts { devices: Some(BTreeMap::new()), only_placed: true, ..Facts::default() };
    };
    assert_eq!(found(only_placed), [(Outcome::Fails, "device virtio-net-pci at pcie.0 03.0".to_owned())]);
    assert_eq!(found(|facts| *facts = Facts::default()), []);
}
