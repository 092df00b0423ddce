//! The journeys.

use super::rows::{PEERS, channels_of, plain};
use super::{
    Case, Cut, Doubt, Doubtful, Journey, Link, LinkCuts, Load, MismatchCase, RoundTrip, Stop, VirtioLoad, cpr, cuts,
    oldest, postcopy, recovery, release, served, shared, snapshot, tls, xbzrle, zero_copy,
};
use crate::roots::Suite;
use crate::scenario::Accel;
use serde_json::Map;

/// What a guest with virtio devices has.
const VIRTIO: [VirtioLoad; 4] = [VirtioLoad::Disk, VirtioLoad::Net, VirtioLoad::Rng, VirtioLoad::Console];
/// Hops of the long ring.
const RING_HOPS: usize = 50;

/// Every case.
pub fn all() -> Vec<Case> {
    let mut cases: Vec<Case> = journeys().into_iter().map(Case::Journey).collect();
    cases.extend(link_cuts().into_iter().chain(release::link_cuts()).map(Case::LinkCuts));
    cases.extend(doubts().into_iter().map(Case::Doubt));
    cases.extend(mismatches().into_iter().chain(oldest::mismatches()).map(Case::MismatchCase));
    cases.extend(round_trips().into_iter().map(Case::RoundTrip));
    cases.extend(tls::distrust().into_iter().map(Case::Distrust));
    cases.extend(snapshot::all().into_iter().map(Case::Snapshot));
    cases.extend(recovery::all().into_iter().chain(oldest::recoveries()).map(Case::Recovery));
    cases.extend(cuts::all().into_iter().map(Case::Cuts));
    cases.extend(served::all().into_iter().map(Case::Served));
    cases
}

fn journeys() -> Vec<Journey> {
    let mut journeys = Vec::new();
    for suite in PEERS {
        let qemu = Stop::Qemu(suite, Accel::Kvm);
        for (link, link_name) in [(Link::Tcp, "tcp"), (Link::Unix, "unix")] {
            for capabilities in capability_sets(suite) {
                let with = if capabilities.is_empty() { "plain".into() } else { capabilities.join("+") };
                // One release for each direction is enough for the quick set.
                let out = link == Link::Tcp && suite == Suite::Sid && capabilities.contains(&"switchover-ack");
                let back = link == Link::Unix && suite == Suite::Bookworm && capabilities == ["return-path"];
                for (stops, quick) in [([qemu, Stop::Reference], out), ([Stop::Reference, qemu], back)] {
                    let name = format!("{}>{}/{link_name}/{with}", stops[0], stops[1]);
                    let capabilities = capabilities.clone();
                    journeys.push(Journey { name, stops: stops.into(), link, capabilities, quick, ..plain() });
                }
            }
        }
        for (compression, channels) in [("none", 2), ("none", 8), ("zlib", 2), ("zstd", 4)] {
            for stops in [[qemu, Stop::Reference], [Stop::Reference, qemu]] {
                let name = format!("{}>{}/multifd/{compression}/{channels}", stops[0], stops[1]);
                let link = if channels == 2 { Link::Tcp } else { Link::Unix };
                let quick = suite == Suite::Trixie && channels == 4;
                let parameters = channels_of(channels, compression);
                let capabilities = vec!["multifd", "return-path"];
                let (stops, load) = (stops.into(), load_of(compression));
                journeys.push(Journey { name, stops, link, capabilities, parameters, load, quick, ..plain() });
            }
        }
        let two = Load { cpus: 2, ..Load::default() };
        let name = format!("{suite_series}>ref>{suite_series}/cpus=2", suite_series = suite.series());
        journeys.push(Journey { name, stops: vec![qemu, Stop::Reference, qemu], load: two, ..plain() });
        let most = Load { cpus: 64, ..Load::default() };
        let name = format!("{0}>ref>{0}/cpus=64", suite.series());
        let quick = suite == Suite::Sid;
        journeys.push(Journey { name, stops: vec![qemu, Stop::Reference, qemu], load: most, quick, ..plain() });
        let split = Load { cpus: 2, split_irqchip: true, ..Load::default() };
        let (name, quick) = (format!("{0}>ref>{0}/split", suite.series()), suite == Suite::Sid);
        journeys.push(Journey { name, stops: vec![qemu, Stop::Reference, qemu], load: split, quick, ..plain() });
    }
    for suite in [Suite::Trixie, Suite::Sid] {
        let stops = vec![Stop::Qemu(suite, Accel::Tcg), Stop::Reference, Stop::Qemu(suite, Accel::Tcg)];
        let name = format!("{suite_series}tcg>ref>{suite_series}tcg", suite_series = suite.series());
        journeys.push(Journey { name, stops, quick: suite == Suite::Sid, ..plain() });
    }
    // 7.2 under TCG loses pages even on the way to itself, so it only takes guests in.
    let stops = [(Suite::Trixie, Accel::Tcg), (Suite::Sid, Accel::Kvm), (Suite::Bookworm, Accel::Tcg)];
    let stops = stops.map(|(suite, accel)| Stop::Qemu(suite, accel));
    let stops = vec![stops[0], Stop::Reference, stops[1], Stop::Reference, stops[2]];
    let two = Load { cpus: 2, ..Load::default() };
    journeys.push(Journey { name: "ring/tcg".into(), stops, load: two, ..plain() });
    journeys.extend(page_channels());
    journeys.extend(devices());
    journeys.extend(with_pci_bus());
    journeys.extend(memory_backends());
    journeys.extend(without_callers());
    journeys.extend(postcopy::all());
    journeys.extend(release::journeys());
    journeys.extend(shared::journeys());
    journeys.extend(cpr::journeys());
    journeys.extend(xbzrle::journeys());
    journeys.extend(zero_copy::journeys());
    journeys.extend(oldest::journeys());
    journeys.extend(tls::journeys());
    let ring = |hops: usize| -> Vec<Stop> {
        let [old, middle, new] = [Suite::Bookworm, Suite::Sid, Suite::Trixie].map(|s| Stop::Qemu(s, Accel::Kvm));
        [old, Stop::Reference, middle, Stop::Reference, new, Stop::Reference]
            .into_iter()
            .cycle()
            .take(hops + 1)
            .collect()
    };
    let capabilities = vec!["return-path"];
    let stops = ring(4);
    journeys.push(Journey { name: "ring/4".into(), stops, capabilities: capabilities.clone(), quick: true, ..plain() });
    let (parameters, multifd) = (channels_of(2, "zstd"), vec!["multifd", "return-path"]);
    let name = "ring/multifd".into();
    journeys.push(Journey { name, stops: ring(6), link: Link::Tcp, capabilities: multifd, parameters, ..plain() });
    journeys.push(Journey { name: "ring/50".into(), stops: ring(RING_HOPS), capabilities, ..plain() });
    journeys
}

/// Guests that keep virtio devices busy: there and back with each release, and round all of them.
fn devices() -> Vec<Journey> {
    let [old, new, middle] = [Suite::Bookworm, Suite::Sid, Suite::Trixie].map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let reference = Stop::Reference;
    let ways = [
        ("7.2", vec![old, reference, old], false),
        ("10.0", vec![middle, reference, middle], false),
        ("11.1", vec![new, reference, new], true),
        ("ref", vec![reference, reference, new, reference], false),
        ("ring", vec![old, reference, new, reference, middle, reference, old], false),
    ];
    // Half of the guests tell and are told of some requests only (VIRTIO_RING_F_EVENT_IDX).
    let events = |name: &str| u8::from(["10.0", "11.1", "ring"].contains(&name));
    let journey = |(name, stops, quick): (&str, Vec<Stop>, bool)| Journey {
        name: format!("virtio/{name}"),
        stops,
        capabilities: vec!["return-path"],
        load: Load {
            virtio: VIRTIO.into(),
            payload: format!("{} events={}", Load::default().payload, events(name)),
            ..Load::default()
        },
        quick,
        ..plain()
    };
    let mut journeys: Vec<_> = ways.map(journey).into();
    let mut tap = journey(("tap", vec![new, reference, old, reference, middle], false));
    tap.load.virtio = vec![VirtioLoad::Tap];
    journeys.push(tap);
    journeys
}

/// Guests whose RAM is a memory backend, by whose id the block is called in the stream: out and back with each release.
fn memory_backends() -> Vec<Journey> {
    let kinds = [("ram", "memory-backend-ram,share=on"), ("memfd", "memory-backend-memfd,seal=off")];
    let mut journeys = Vec::new();
    for suite in PEERS {
        let qemu = Stop::Qemu(suite, Accel::Kvm);
        for (name, backend) in kinds {
            let name = format!("{0}>ref>{0}/memory-backend-{name}", suite.series());
            let load = Load { memory_backend: Some(backend), ..Load::default() };
            let quick = suite == Suite::Sid && backend.contains("memfd");
            journeys.push(Journey { name, stops: vec![qemu, Stop::Reference, qemu], load, quick, ..plain() });
        }
    }
    journeys
}

/// Guests that program the host bridge of their PCI bus, and check what it says in each pass.
fn with_pci_bus() -> Vec<Journey> {
    let [old, new, middle] = [Suite::Bookworm, Suite::Sid, Suite::Trixie].map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let [middle_tcg, new_tcg] = [Suite::Trixie, Suite::Sid].map(|suite| Stop::Qemu(suite, Accel::Tcg));
    let reference = Stop::Reference;
    let load = Load { pcie: true, ..Load::default() };
    let split = Load { cpus: 2, split_irqchip: true, ..load.clone() };
    let ways = [
        ("7.2", vec![old, reference, old], &load, false),
        ("10.0", vec![middle, reference, middle], &load, false),
        ("11.1", vec![new, reference, new], &load, true),
        ("ref", vec![reference, reference, new, reference, middle], &load, false),
        ("split", vec![new, reference, middle], &split, false),
        ("tcg", vec![middle_tcg, reference, new_tcg], &load, false),
    ];
    let journey = |(name, stops, load, quick): (&str, Vec<Stop>, &Load, bool)| {
        let capabilities = vec!["return-path"];
        Journey { name: format!("pcie/{name}"), stops, capabilities, load: load.clone(), quick, ..plain() }
    };
    ways.map(journey).into()
}

/// Links without a connection: commands, descriptors and files, and the files in which each page has its place.
fn without_callers() -> Vec<Journey> {
    let links = [
        ("exec", Link::Exec, vec![]),
        ("fd", Link::Descriptor, vec![]),
        ("fd/return-path", Link::Descriptor, vec!["return-path"]),
        ("file", Link::File, vec![]),
        ("mapped-ram", Link::File, vec!["mapped-ram"]),
        ("mapped-ram+multifd", Link::File, vec!["mapped-ram", "multifd"]),
    ];
    let mut journeys = Vec::new();
    for suite in PEERS {
        let qemu = Stop::Qemu(suite, Accel::Kvm);
        for (with, link, capabilities) in &links {
            // 7.2 has no such capability.
            if suite == Suite::Bookworm && capabilities.contains(&"mapped-ram") {
                continue;
            }
            for (stops, back) in [([qemu, Stop::Reference], false), ([Stop::Reference, qemu], true)] {
                let quick = match (suite, *with) {
                    (Suite::Bookworm, "exec") | (Suite::Trixie, "fd") => back,
                    (Suite::Trixie, "mapped-ram") => !back,
                    (Suite::Sid, "mapped-ram+multifd") => true,
                    _ => false,
                };
                let parameters = match capabilities.contains(&"multifd") {
                    true => channels_of(4, "none"),
                    false => Map::new(),
                };
                let (name, capabilities) = (format!("{}>{}/{with}", stops[0], stops[1]), capabilities.clone());
                journeys.push(Journey {
                    name,
                    stops: stops.into(),
                    link: *link,
                    capabilities,
                    parameters,
                    quick,
                    ..plain()
                });
            }
        }
    }
    // The guest runs before its memory is loaded.
    for suite in [Suite::Trixie, Suite::Sid] {
        let (name, stops) = (
            format!("{}>ref/mapped-ram+postcopy-ram", suite.series()),
            [Stop::Qemu(suite, Accel::Kvm), Stop::Reference],
        );
        let (stops, capabilities) = (stops.into(), vec!["mapped-ram", "postcopy-ram"]);
        journeys.push(Journey { name, stops, link: Link::File, capabilities, quick: suite == Suite::Sid, ..plain() });
    }
    // Threads that write, threads that read, and other numbers of both.
    let stops = [Suite::Trixie, Suite::Sid].map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let stops = vec![stops[0], Stop::Reference, Stop::Reference, stops[1], Stop::Reference, stops[0]];
    let capabilities = vec!["mapped-ram", "multifd"];
    let mut parameters = channels_of(8, "none");
    parameters.insert("direct-io".into(), true.into());
    let (name, two) = ("ring/mapped-ram".into(), Load { cpus: 2, ..Load::default() });
    journeys.push(Journey { name, stops, link: Link::File, capabilities, parameters, load: two, ..plain() });
    journeys
}

/// More page channels: the other numbers and methods, each release in both directions, and the other ways of zero
/// pages.
fn page_channels() -> Vec<Journey> {
    let mut journeys = Vec::new();
    for suite in PEERS {
        let qemu = Stop::Qemu(suite, Accel::Kvm);
        let mut settings: Vec<(u64, &str, Option<&str>)> = Vec::new();
        for method in ["none", "zlib", "zstd"] {
            settings.extend([1, 2, 4, 8].map(|channels| (channels, method, None)));
        }
        // 7.2 has no such parameter.
        if suite >= Suite::Trixie {
            settings.extend(["none", "legacy"].map(|mode| (2, "none", Some(mode))));
        }
        // The mismatches that every release has above.
        settings
            .retain(|row| ![(2, "none", None), (8, "none", None), (2, "zlib", None), (4, "zstd", None)].contains(row));
        for (channels, method, zero_pages) in settings {
            let mut parameters = Map::new();
            parameters.insert("multifd-channels".into(), channels.into());
            parameters.insert("multifd-compression".into(), method.into());
            if let Some(mode) = zero_pages {
                parameters.insert("zero-page-detection".into(), mode.into());
            }
            let with = zero_pages.map_or(String::new(), |mode| format!("/zero={mode}"));
            for stops in [[qemu, Stop::Reference], [Stop::Reference, qemu]] {
                let name = format!("{}>{}/multifd={channels}/{method}{with}", stops[0], stops[1]);
                // 7.2 synchronises after each section.
                let quick = (suite, channels, method) == (Suite::Bookworm, 4, "none");
                let (capabilities, parameters) = (vec!["return-path", "multifd"], parameters.clone());
                journeys.push(Journey {
                    name,
                    stops: stops.into(),
                    link: Link::Tcp,
                    capabilities,
                    parameters,
                    load: load_of(method),
                    quick,
                    ..plain()
                });
            }
        }
    }
    journeys
}

/// A QEMU's deflate takes some 30 MB/s on a core: a guest that dirties more would never leave over one channel.
fn load_of(compression: &str) -> Load {
    let load = Load::default();
    match compression {
        "zlib" => Load { payload: load.payload.replace("rate=48M", "rate=12M"), ..load },
        _ => load,
    }
}

/// The representative subset.
pub fn quick() -> Vec<Case> {
    all().into_iter().filter(|case| case.journey().quick).collect()
}

/// Places in the whole of a stream, up to the end of the device sections.
fn link_cuts() -> Vec<LinkCuts> {
    const SECTIONS: [&str; 9] =
        ["timer", "fw_cfg", "cpu_common", "apic", "ioapic", "kvmclock", "acpi-ged", "i8254", "globalstate"];
    let mut link_cuts = Vec::new();
    for suite in PEERS {
        let qemu = Stop::Qemu(suite, Accel::Kvm);
        for stops in [[qemu, Stop::Reference], [Stop::Reference, qemu]] {
            let row = |name: &str, cuts: Vec<Cut>, quick: bool| {
                let name = format!("{}>{}/{name}", stops[0], stops[1]);
                let capabilities = vec!["return-path"];
                LinkCuts { journey: Journey { name, stops: stops.into(), capabilities, quick, ..plain() }, cuts }
            };
            let few = vec![
                Cut::After(0),
                Cut::After(40),
                Cut::After(1 << 20),
                Cut::After(17 << 20),
                Cut::Behind("timer", 30),
                Cut::Behind("globalstate", 20),
                Cut::Back(3),
            ];
            link_cuts.push(row("cut/few", few, suite == Suite::Trixie));
            let mut many: Vec<Cut> = (0..120).step_by(7).map(Cut::After).collect();
            many.extend((0..40).map(|n| Cut::After(200 + n * n * n * 300)));
            many.extend(SECTIONS.iter().flat_map(|name| [0, 5, 60].map(|bytes| Cut::Behind(name, bytes))));
            many.extend((0..8).step_by(2).map(Cut::Back));
            link_cuts.push(row("cut/many", many, false));
        }
    }
    link_cuts
}

/// The last moments of a handover from reference-vmm, which asks every destination to answer.
fn doubts() -> Vec<Doubt> {
    let peers = PEERS.map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let doubt = |there: Stop, what: Doubtful, name: &str| {
        let name = format!("{}>{there}/{name}", Stop::Reference);
        let quick = [Stop::Reference, Stop::Qemu(Suite::Sid, Accel::Kvm)].contains(&there);
        Doubt { journey: Journey { name, stops: vec![Stop::Reference, there], quick, ..plain() }, what }
    };
    let still = peers.into_iter().chain([Stop::Reference]);
    let still = still.map(|there| doubt(there, Doubtful::Standstill, "doubt/standstill"));
    still.chain(peers.map(|there| doubt(there, Doubtful::LostVerdict, "doubt/verdict"))).collect()
}

fn round_trips() -> Vec<RoundTrip> {
    let round_trip = |(suite, cpus): (Suite, u32)| {
        let stops = vec![Stop::Qemu(suite, Accel::Kvm), Stop::Reference, Stop::Qemu(suite, Accel::Kvm)];
        let name = format!("{}>ref/echo/cpus={cpus}", suite.series());
        let load = Load { cpus, ..Load::default() };
        RoundTrip { journey: Journey { name, stops, load, quick: cpus == 1, ..plain() } }
    };
    let mut round_trips: Vec<RoundTrip> =
        PEERS.into_iter().flat_map(|suite| [(suite, 1), (suite, 2)]).map(round_trip).collect();
    // Byte for byte: what a source says of its devices, through the models and back.
    let stocked = PEERS.into_iter().map(|suite| {
        let mut round_trip = round_trip((suite, 1));
        round_trip.journey.name = format!("{}>ref/echo/virtio", suite.series());
        round_trip.journey.load.virtio = VIRTIO.into();
        round_trip.journey.quick = suite == Suite::Bookworm;
        round_trip
    });
    round_trips.extend(stocked);
    // The host bridge, as the guest has programmed it.
    let with_bus = PEERS.into_iter().map(|suite| {
        let mut round_trip = round_trip((suite, 1));
        round_trip.journey.name = format!("{}>ref/echo/pcie", suite.series());
        round_trip.journey.load.pcie = true;
        round_trip.journey.quick = suite == Suite::Trixie;
        round_trip
    });
    round_trips.extend(with_bus);
    // A request that a source has taken and not answered goes along in its section.
    let failing = PEERS.into_iter().map(|suite| {
        let mut round_trip = round_trip((suite, 1));
        round_trip.journey.name = format!("{}>ref/echo/request", suite.series());
        round_trip.journey.load.virtio = vec![VirtioLoad::FailingDisk];
        round_trip.journey.quick = suite == Suite::Sid;
        round_trip
    });
    round_trips.extend(failing);
    round_trips
}

/// What real machines differ in, and the words that have to explain it.
fn mismatches() -> Vec<MismatchCase> {
    let mut mismatches = Vec::new();
    for suite in PEERS {
        let qemu = Stop::Qemu(suite, Accel::Kvm);
        let quick = suite == Suite::Sid;
        // 7.2 reports no reason at the source, and closes the return path without a word at the destination.
        let (sibling, told) = match suite {
            Suite::Bookworm => ("", ""),
            _ => ("Sibling indicated error", "the destination reported failure"),
        };
        let mismatch = |stops: [Stop; 2], what: &str| {
            let name = format!("{}>{}/wrong/{what}", stops[0], stops[1]);
            let journey = Journey { name, stops: stops.into(), capabilities: vec!["return-path"], quick, ..plain() };
            let (source, destination, capabilities, said) = (vec![], vec![], vec![], vec![]);
            MismatchCase { journey, source, destination, capabilities, said, reported: sibling }
        };
        let into = |what| mismatch([qemu, Stop::Reference], what);
        mismatches.extend([
            MismatchCase {
                source: vec!["-m", "80M"],
                said: vec!["size mismatch: microvm.ram: 0x5000000 != 0x4000000", "the source's memory size"],
                ..into("memory")
            },
            MismatchCase {
                source: vec!["-smp", "2"],
                said: vec!["unknown section or instance '", "' 1: the source has more vCPUs", "--smp"],
                ..into("cpus")
            },
            MismatchCase {
                source: vec!["-device", "virtio-rng-device"],
                said: vec!["unknown section or instance 'virtio-mmio@", "/virtio-rng' 0", "-device"],
                ..into("device")
            },
            MismatchCase {
                source: vec!["-M", "pcie=on"],
                said: vec!["unknown section or instance '0000:00:00.0/gpex_root' 0", "pcie=on", "pcie=off"],
                ..into("pcie")
            },
            MismatchCase {
                source: vec!["-M", "q35,accel=kvm"],
                said: vec!["machine type received is 'pc-q35-", "' and local is 'microvm'"],
                reported: "",
                ..into("machine")
            },
            MismatchCase {
                capabilities: vec!["postcopy-ram"],
                said: vec!["capability 'postcopy-ram'", "turn it off at the source"],
                reported: "",
                ..into("capability")
            },
        ]);
        mismatches.push(MismatchCase {
            capabilities: vec!["multifd"],
            said: vec!["capability 'multifd'", "is on there and off here"],
            reported: "",
            ..into("multifd")
        });
        let back = |what| mismatch([Stop::Reference, qemu], what);
        mismatches.extend([
            MismatchCase {
                destination: vec!["-m", "80M"],
                said: vec!["Size mismatch: microvm.ram: 0x4000000 != 0x5000000"],
                reported: told,
                ..back("memory")
            },
            MismatchCase {
                source: vec!["--smp", "2"],
                said: vec!["nknown", "section or instance", "1"],
                reported: told,
                ..back("cpus")
            },
        ]);
    }
    mismatches
}

fn capability_sets(suite: Suite) -> Vec<Vec<&'static str>> {
    let mut sets = vec![vec![], vec!["return-path"]];
    if suite >= Suite::Trixie {
        sets.push(vec!["return-path", "switchover-ack"]);
    }
    sets
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_every_release_goes_both_ways() {
        let all = all();
        let names: BTreeSet<_> = all.iter().map(|case| &case.journey().name).collect();
        assert_eq!(names.len(), all.len());
        for suite in PEERS {
            let qemu = Stop::Qemu(suite, Accel::Kvm);
            for way in [[qemu, Stop::Reference], [Stop::Reference, qemu]] {
                assert!(journeys().iter().any(|journey| journey.stops == way), "{way:?}");
            }
        }
        let long = all.iter().find(|case| case.journey().name == "ring/50").unwrap();
        assert_eq!(long.journey().stops.len(), RING_HOPS + 1);
        assert!(!quick().is_empty());
    }
}
