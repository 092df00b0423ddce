use super::*;
use Capability::*;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// What `query-migrate-capabilities` of each release lists, in its order.
const LISTED: [((u16, u16), &str); 4] = [
    (
        (5, 2),
        "xbzrle rdma-pin-all auto-converge zero-blocks compress events postcopy-ram x-colo release-ram block return-path pause-before-switchover multifd dirty-bitmaps postcopy-blocktime late-block-activate x-ignore-shared validate-uuid",
    ),
    (
        (7, 2),
        "xbzrle rdma-pin-all auto-converge zero-blocks compress events postcopy-ram x-colo release-ram block return-path pause-before-switchover multifd dirty-bitmaps postcopy-blocktime late-block-activate x-ignore-shared validate-uuid background-snapshot zero-copy-send postcopy-preempt",
    ),
    (
        (10, 0),
        "xbzrle rdma-pin-all auto-converge zero-blocks events postcopy-ram x-colo release-ram return-path pause-before-switchover multifd dirty-bitmaps postcopy-blocktime late-block-activate x-ignore-shared validate-uuid background-snapshot zero-copy-send postcopy-preempt switchover-ack dirty-limit mapped-ram",
    ),
    (
        (11, 1),
        "xbzrle rdma-pin-all auto-converge events postcopy-ram x-colo release-ram return-path pause-before-switchover multifd dirty-bitmaps postcopy-blocktime late-block-activate x-ignore-shared validate-uuid background-snapshot zero-copy-send postcopy-preempt switchover-ack dirty-limit mapped-ram",
    ),
];

/// What `migrate-set-capabilities` of each release answered to every pair of capabilities, where it refused the pair
/// although it takes both alone (`+`), or refuses one alone (single names), or takes a pair although it refuses one of
/// both alone (`ok`). Machine `none` under TCG. Pairs with `dirty-limit` but for auto-converge, which needs KVM, follow
/// from the single refusal.
const ANSWERS: &[(u16, u16, &str, &str)] = &[
    (5, 2, "postcopy-ram+x-ignore-shared", "Postcopy is not compatible with ignore-shared"),
    (7, 2, "zero-copy-send", "Zero copy only available for non-compressed non-TLS multifd migration"),
    (7, 2, "postcopy-preempt", "Postcopy preempt requires postcopy-ram"),
    (7, 2, "xbzrle+background-snapshot", "Background-snapshot is not compatible with xbzrle"),
    (7, 2, "rdma-pin-all+background-snapshot", "Background-snapshot is not compatible with rdma-pin-all"),
    (7, 2, "auto-converge+background-snapshot", "Background-snapshot is not compatible with auto-converge"),
    (7, 2, "compress+multifd", "Multifd is not compatible with compress"),
    (7, 2, "compress+background-snapshot", "Background-snapshot is not compatible with compress"),
    (7, 2, "postcopy-ram+x-ignore-shared", "Postcopy is not compatible with ignore-shared"),
    (7, 2, "postcopy-ram+background-snapshot", "Background-snapshot is not compatible with postcopy-ram"),
    (7, 2, "postcopy-ram+postcopy-preempt", ""),
    (7, 2, "x-colo+background-snapshot", "Background-snapshot is not compatible with x-colo"),
    (7, 2, "release-ram+background-snapshot", "Background-snapshot is not compatible with release-ram"),
    (7, 2, "return-path+background-snapshot", "Background-snapshot is not compatible with return-path"),
    (
        7,
        2,
        "pause-before-switchover+background-snapshot",
        "Background-snapshot is not compatible with pause-before-switchover",
    ),
    (7, 2, "multifd+background-snapshot", "Background-snapshot is not compatible with multifd"),
    (7, 2, "multifd+zero-copy-send", ""),
    (7, 2, "dirty-bitmaps+background-snapshot", "Background-snapshot is not compatible with dirty-bitmaps"),
    (7, 2, "postcopy-blocktime+background-snapshot", "Background-snapshot is not compatible with postcopy-blocktime"),
    (7, 2, "late-block-activate+background-snapshot", "Background-snapshot is not compatible with late-block-activate"),
    (7, 2, "validate-uuid+background-snapshot", "Background-snapshot is not compatible with validate-uuid"),
    (7, 2, "background-snapshot+zero-copy-send", "Background-snapshot is not compatible with zero-copy-send"),
    (10, 0, "zero-copy-send", "Zero copy only available for non-compressed non-TLS multifd migration"),
    (10, 0, "postcopy-preempt", "Postcopy preempt requires postcopy-ram"),
    (10, 0, "switchover-ack", "Capability 'switchover-ack' requires capability 'return-path'"),
    (10, 0, "dirty-limit", "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set"),
    (10, 0, "xbzrle+multifd", "Multifd is not compatible with xbzrle"),
    (10, 0, "xbzrle+background-snapshot", "Background-snapshot is not compatible with xbzrle"),
    (10, 0, "xbzrle+mapped-ram", "Mapped-ram migration is incompatible with xbzrle"),
    (10, 0, "rdma-pin-all+background-snapshot", "Background-snapshot is not compatible with rdma-pin-all"),
    (10, 0, "auto-converge+background-snapshot", "Background-snapshot is not compatible with auto-converge"),
    (10, 0, "auto-converge+dirty-limit", "dirty-limit conflicts with auto-converge either of then available currently"),
    (10, 0, "postcopy-ram+multifd", "Postcopy is not yet compatible with multifd"),
    (10, 0, "postcopy-ram+x-ignore-shared", "Postcopy is not compatible with ignore-shared"),
    (10, 0, "postcopy-ram+background-snapshot", "Background-snapshot is not compatible with postcopy-ram"),
    (10, 0, "postcopy-ram+postcopy-preempt", ""),
    (10, 0, "postcopy-ram+mapped-ram", "Mapped-ram migration is incompatible with postcopy"),
    (10, 0, "x-colo+background-snapshot", "Background-snapshot is not compatible with x-colo"),
    (10, 0, "release-ram+background-snapshot", "Background-snapshot is not compatible with release-ram"),
    (10, 0, "return-path+background-snapshot", "Background-snapshot is not compatible with return-path"),
    (10, 0, "return-path+switchover-ack", ""),
    (
        10,
        0,
        "pause-before-switchover+background-snapshot",
        "Background-snapshot is not compatible with pause-before-switchover",
    ),
    (10, 0, "multifd+background-snapshot", "Background-snapshot is not compatible with multifd"),
    (10, 0, "multifd+zero-copy-send", ""),
    (10, 0, "dirty-bitmaps+background-snapshot", "Background-snapshot is not compatible with dirty-bitmaps"),
    (10, 0, "postcopy-blocktime+background-snapshot", "Background-snapshot is not compatible with postcopy-blocktime"),
    (
        10,
        0,
        "late-block-activate+background-snapshot",
        "Background-snapshot is not compatible with late-block-activate",
    ),
    (10, 0, "validate-uuid+background-snapshot", "Background-snapshot is not compatible with validate-uuid"),
    (10, 0, "background-snapshot+zero-copy-send", "Background-snapshot is not compatible with zero-copy-send"),
    (11, 1, "x-colo", "Capability 'x-colo' requires capability 'return-path'"),
    (11, 1, "zero-copy-send", "Zero copy only available for non-compressed non-TLS multifd migration"),
    (11, 1, "postcopy-preempt", "Postcopy preempt requires postcopy-ram"),
    (11, 1, "switchover-ack", "Capability 'switchover-ack' requires capability 'return-path'"),
    (11, 1, "dirty-limit", "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set"),
    (11, 1, "xbzrle+multifd", "Multifd is not compatible with xbzrle"),
    (11, 1, "xbzrle+background-snapshot", "Background-snapshot is not compatible with xbzrle"),
    (11, 1, "xbzrle+mapped-ram", "Mapped-ram migration is incompatible with xbzrle"),
    (11, 1, "rdma-pin-all+background-snapshot", "Background-snapshot is not compatible with rdma-pin-all"),
    (11, 1, "auto-converge+background-snapshot", "Background-snapshot is not compatible with auto-converge"),
    (11, 1, "auto-converge+dirty-limit", "dirty-limit conflicts with auto-converge either of then available currently"),
    (11, 1, "postcopy-ram+x-ignore-shared", "Postcopy is not compatible with ignore-shared"),
    (11, 1, "postcopy-ram+background-snapshot", "Background-snapshot is not compatible with postcopy-ram"),
    (11, 1, "postcopy-ram+postcopy-preempt", ""),
    (11, 1, "postcopy-ram+mapped-ram", "Mapped-ram migration is incompatible with postcopy"),
    (11, 1, "x-colo+return-path", ""),
    (11, 1, "release-ram+background-snapshot", "Background-snapshot is not compatible with release-ram"),
    (11, 1, "return-path+background-snapshot", "Background-snapshot is not compatible with return-path"),
    (11, 1, "return-path+switchover-ack", ""),
    (
        11,
        1,
        "pause-before-switchover+background-snapshot",
        "Background-snapshot is not compatible with pause-before-switchover",
    ),
    (11, 1, "multifd+background-snapshot", "Background-snapshot is not compatible with multifd"),
    (11, 1, "multifd+zero-copy-send", ""),
    (11, 1, "dirty-bitmaps+background-snapshot", "Background-snapshot is not compatible with dirty-bitmaps"),
    (11, 1, "postcopy-blocktime+background-snapshot", "Background-snapshot is not compatible with postcopy-blocktime"),
    (
        11,
        1,
        "late-block-activate+background-snapshot",
        "Background-snapshot is not compatible with late-block-activate",
    ),
    (11, 1, "validate-uuid+background-snapshot", "Background-snapshot is not compatible with validate-uuid"),
    (11, 1, "background-snapshot+zero-copy-send", "Background-snapshot is not compatible with zero-copy-send"),
];

fn set(names: &str) -> Capabilities {
    names.split('+').map(|name| name.parse::<Capability>().unwrap()).collect()
}

fn answer(qemu: QemuVersion, on: Capabilities) -> String {
    let context = Context { dirty_ring: false, ..Context::new(qemu) };
    check(on, &context).map_or_else(|rejection| rejection.to_string(), |()| String::new())
}

#[test]
fn every_release_has_its_capabilities() {
    for ((major, minor), listed) in LISTED {
        let qemu = QemuVersion::new(major, minor);
        let ours: Vec<&str> =
            Capability::ALL.iter().filter(|capability| capability.exists_in(qemu)).map(|c| c.name()).collect();
        assert_eq!(ours, listed.split(' ').collect::<Vec<_>>(), "{qemu}");
    }
    assert_eq!("lz4".parse::<Capability>(), Err(UnknownCapability));
}

/// Each single capability and each pair, in each release: refused with the reason that QEMU gives, or taken as there.
#[test]
fn every_pair_is_answered_as_by_qemu() {
    let mut pairs = 0;
    for ((major, minor), listed) in LISTED {
        let qemu = QemuVersion::new(major, minor);
        let golden =
            |names: &str| ANSWERS.iter().find(|row| (row.0, row.1, row.2) == (major, minor, names)).map(|row| row.3);
        let names: Vec<&str> = listed.split(' ').collect();
        for (i, first) in names.iter().enumerate() {
            let alone = |name| golden(name).unwrap_or_default();
            assert_eq!(answer(qemu, set(first)), alone(first), "{qemu} {first}");
            for second in &names[i + 1..] {
                let pair = [*first, "+", second].concat();
                let ours = answer(qemu, set(&pair));
                pairs += 1;
                match golden(&pair) {
                    Some(expected) => assert_eq!(ours, expected, "{qemu} {pair}"),
                    // If one or both are refused alone, the pair is, for one of the reasons that hold for it.
                    None => {
                        assert_eq!(ours.is_empty(), (alone(first), alone(second)) == ("", ""), "{qemu} {pair}: {ours}")
                    }
                }
            }
        }
    }
    assert_eq!(pairs, 804);
}

/// Three capabilities, where a pair is refused for lack of the third. The answers are those of the releases.
#[test]
fn what_zero_copy_and_preempt_exclude() {
    let v = QemuVersion::new;
    let zero_copy = "Zero copy only available for non-compressed non-TLS multifd migration";
    assert_eq!(answer(v(7, 2), set("zero-copy-send+multifd+xbzrle")), zero_copy);
    assert_eq!(
        answer(v(7, 2), set("postcopy-preempt+postcopy-ram+compress")),
        "Postcopy preempt not compatible with compress"
    );
    assert_eq!(answer(v(7, 2), set("postcopy-preempt+postcopy-ram+multifd")), "");
}

#[test]
fn parameters_and_the_state_of_the_machine_count() {
    let refuse = |on: &str, change: fn(&mut Context)| {
        let mut context = Context::new(QemuVersion::NEWEST);
        assert_eq!(check(set(on), &context), Ok(()), "{on}");
        change(&mut context);
        match check(set(on), &context) {
            Err(Rejection::Setting { capability, .. }) => capability,
            other => panic!("{on}: {other:?}"),
        }
    };
    assert_eq!(refuse("zero-copy-send+multifd", |c| c.compressed = true), ZeroCopySend);
    assert_eq!(refuse("zero-copy-send+multifd", |c| c.tls = true), ZeroCopySend);
    assert_eq!(refuse("mapped-ram+multifd", |c| c.compressed = true), MappedRam);
    assert_eq!(refuse("mapped-ram", |c| c.tls = true), MappedRam);
    assert_eq!(refuse("mapped-ram", |c| c.seekable = false), MappedRam);
    assert_eq!(refuse("dirty-limit", |c| c.dirty_ring = false), DirtyLimit);
    assert_eq!(refuse("multifd", |c| c.incoming_started = true), Multifd);
    assert_eq!(refuse("postcopy-ram+postcopy-preempt", |c| c.incoming_started = true), PostcopyPreempt);
    assert_eq!(refuse("postcopy-ram", |c| c.cpr = true), PostcopyRam);
    assert_eq!(refuse("background-snapshot", |c| c.cpr = true), BackgroundSnapshot);
    assert_eq!(refuse("x-colo+return-path", |c| c.cpr = true), XColo);
    // Even without multifd, for which alone the parameter has a meaning.
    assert_eq!(refuse("mapped-ram", |c| c.compressed = true), MappedRam);
    assert_eq!(refuse("multifd", |c| c.multi_channel = false), Multifd);
    let single = Context { multi_channel: false, ..Context::new(QemuVersion::NEWEST) };
    assert_eq!(check(set("multifd+mapped-ram"), &single), Ok(()), "page channels write to the file by themselves");
    let old = Context { incoming_started: true, ..Context::new(QemuVersion::new(7, 2)) };
    assert_eq!(check(set("multifd"), &old), Ok(()), "7.2 does not mind");
    let late = Context { incoming_started: true, before: set("multifd"), ..Context::new(QemuVersion::NEWEST) };
    assert_eq!(check(set("multifd+return-path"), &late), Ok(()));
}

#[test]
fn capabilities_of_other_releases_are_named() {
    let qemu = QemuVersion::new(10, 0);
    let missing = check(set("compress"), &Context::new(qemu));
    assert_eq!(missing, Err(Rejection::Missing { capability: Compress, qemu }));
}

#[test]
fn a_set_holds_what_was_put_in() {
    let on = set("multifd+return-path").with(Multifd, false).with(Events, true);
    assert_eq!(on.iter().collect::<Vec<_>>(), [Events, ReturnPath]);
}
