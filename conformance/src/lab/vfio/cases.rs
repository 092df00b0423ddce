//! The trips.

use super::case::{Case, Memory, NEW, OLD, Use};
use qevm_lab::Side;

/// Right and wrong.
pub(in crate::lab) fn cases() -> Vec<Case> {
    use Side::{Destination, Source};
    const LARGE: u64 = 4 << 20;
    vec![
        Case::new("vfio-mtty", NEW, NEW).mtty(),
        Case::new("vfio-mtty-ack", NEW, NEW).mtty().ack(),
        Case::new("vfio-plain", NEW, NEW),
        // The source has to wait until the destination has loaded the initial data.
        Case { earliest_stop_ms: 1000, ..Case::new("vfio-ack", NEW, NEW).ack() }.set(
            Destination,
            "load_initial_ms",
            1000,
        ),
        Case { earliest_stop_ms: 2000, ..Case::new("vfio-reinit", NEW, NEW).ack() }
            .set(Destination, "load_initial_ms", 1000)
            // At once after the first ones: QEMU fails a migration whose device asks anew when it has decided to switch
            // over.
            .set(Source, "dirty_rounds", 0)
            .set(Source, "reinits", 1),
        Case { on_channels: LARGE, ..Case::new("vfio-multifd", NEW, NEW).multifd() }.set(Source, "final_size", LARGE),
        Case {
            options: ",x-migration-multifd-transfer=off",
            at_most_on_channels: LARGE - 1,
            ..Case::new("vfio-multifd-off", NEW, NEW).multifd()
        }
        .set(Source, "final_size", LARGE),
        Case { flags: 1, ..Case::new("vfio-stop-copy", NEW, NEW) },
        Case { flags: 3, ..Case::new("vfio-p2p", NEW, NEW) },
        Case { devices: 2, ..Case::new("vfio-two-devices", NEW, NEW).ack() },
        Case::new("vfio-10.0-to-11.1", OLD, NEW).ack(),
        Case::new("vfio-11.1-to-10.0", NEW, OLD).ack(),
        // By way of reference-vmm. Linux's sample device first: nothing but its state.
        Case::visit("vfio-visit-mtty", NEW).mtty(),
        Case::visit("vfio-visit-plain", NEW),
        Case { earliest_stop_ms: 1000, ..Case::visit("vfio-visit-ack", NEW).ack().used(Use::MsiX) }.set(
            Destination,
            "load_initial_ms",
            1000,
        ),
        Case {
            legacy_acks: true,
            earliest_stop_ms: 1000,
            ..Case::visit("vfio-visit-ack-legacy", NEW).ack().used(Use::Intx)
        }
        .set(Destination, "load_initial_ms", 1000),
        // Initial data that come a second time.
        Case { earliest_stop_ms: 2000, ..Case::visit("vfio-visit-reinit", NEW).ack() }
            .set(Destination, "load_initial_ms", 1000)
            .set(Source, "dirty_rounds", 0)
            .set(Source, "reinits", 1),
        Case { on_channels: LARGE, ..Case::visit("vfio-visit-multifd", NEW).multifd().ack() }.set(
            Source,
            "final_size",
            LARGE,
        ),
        Case {
            options: ",x-migration-multifd-transfer=on",
            on_channels: LARGE,
            ..Case::visit("vfio-visit-multifd-on", NEW).multifd().used(Use::Msi)
        }
        .set(Source, "final_size", LARGE),
        Case {
            options: ",x-migration-multifd-transfer=off",
            at_most_on_channels: LARGE - 1,
            ..Case::visit("vfio-visit-multifd-off", NEW).multifd().used(Use::Intx)
        }
        .set(Source, "final_size", LARGE),
        Case { flags: 1, ..Case::visit("vfio-visit-stop-copy", NEW).used(Use::Msi) },
        Case { flags: 3, ..Case::visit("vfio-visit-p2p", NEW).used(Use::Intx) },
        Case { devices: 2, ..Case::visit("vfio-visit-two-devices", NEW).ack() },
        Case { iommufd: true, ..Case::visit("vfio-visit-iommufd", NEW).ack() },
        Case { accel: "kvm,dirty-ring-size=4096", ..Case::visit("vfio-visit-ring", NEW) },
        Case::visit("vfio-visit-10.0", OLD),
        Case::visit("vfio-visit-10.0-ack", OLD).ack().used(Use::MsiX),
        Case { on_channels: LARGE, ..Case::visit("vfio-visit-10.0-multifd", OLD).multifd().used(Use::Msi) }.set(
            Source,
            "final_size",
            LARGE,
        ),
        // The container's log, and none at all.
        Case { devices: 2, ..Case::visit("vfio-visit-10.0-two-devices", OLD).ack() },
        Case::visit("vfio-visit-container-log", NEW).set(Source, "log_offered", 0),
        // The guest uses its devices. As between two QEMUs, so by way of reference-vmm.
        Case::new("vfio-intx", NEW, NEW).used(Use::Intx),
        Case::new("vfio-msi", NEW, NEW).used(Use::Msi),
        Case::new("vfio-msix", NEW, NEW).used(Use::MsiX),
        Case::visit("vfio-visit-intx", NEW).used(Use::Intx),
        Case::visit("vfio-visit-msi", NEW).used(Use::Msi),
        Case::visit("vfio-visit-msix", NEW).used(Use::MsiX),
        Case { devices: 2, ..Case::visit("vfio-visit-intx-two-devices", NEW).ack().used(Use::Intx) },
        Case { iommufd: true, ..Case::visit("vfio-visit-msi-iommufd", NEW).used(Use::Msi) },
        // One at an address of its own, one at the lowest that is free; the payload's devices share no interrupt line.
        Case {
            devices: 2,
            addresses: &[(Some(6), 6), (None, 1)],
            ..Case::visit("vfio-visit-addresses", NEW).used(Use::Intx)
        },
        Case {
            devices: 2,
            on_channels: LARGE,
            ..Case::visit("vfio-visit-msix-multifd", NEW).multifd().used(Use::MsiX)
        }
        .set(Source, "final_size", LARGE),
        Case::visit("vfio-visit-10.0-intx", OLD).used(Use::Intx),
        Case::visit("vfio-visit-10.0-msi", OLD).used(Use::Msi),
        Case::visit("vfio-visit-10.0-msix", OLD).used(Use::MsiX),
        // Linux does the same: it has placed the BARs, and its driver is one of user space.
        Case::visit("vfio-visit-linux", NEW).linux(),
        Case::visit("vfio-visit-10.0-linux", OLD).linux(),
        Case { memory: Memory::Stale, ..Case::visit("vfio-visit-log-off", NEW).ack().used(Use::MsiX) }.set(
            Destination,
            "load_initial_ms",
            1000,
        ),
        // The check of the guest's memory must fail. While the source waits for the ack, every page is written again.
        Case { memory: Memory::Stale, ..Case::new("vfio-log-off", NEW, NEW).ack() }.set(
            Destination,
            "load_initial_ms",
            1000,
        ),
    ]
}

/// What is kept for tests that have no such machine.
pub(in crate::lab) fn recordings() -> Vec<Case> {
    let record = |case: Case| Case { record: true, ..case.mtty() };
    // A few KB of state, and a guest that uses the device.
    let used = |name: &str, release, used| {
        let case = Case { record: true, ..Case::new(name, release, release).ack().used(used) };
        let sizes = [("initial_size", 8192), ("dirty_size", 4096), ("final_size", 8192), ("dirty_rounds", 1)];
        sizes.into_iter().fold(case, |case, (size, bytes)| case.set(Side::Source, size, bytes))
    };
    vec![
        used("record-11.1-testdev", NEW, Use::MsiX),
        used("record-10.0-testdev", OLD, Use::Intx),
        record(Case::new("record-11.1-plain", NEW, NEW)),
        record(Case::new("record-11.1-ack", NEW, NEW).ack()),
        record(Case { devices: 2, ..Case::new("record-11.1-two-devices", NEW, NEW).ack() }),
        record(Case::new("record-11.1-multifd", NEW, NEW).ack().multifd()),
        record(Case::new("record-10.0-ack", OLD, OLD).ack()),
        record(Case::new("record-10.0-multifd", OLD, OLD).multifd()),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::{RECORDING, figures};
    use super::*;

    #[test]
    fn jobs_have_names_of_their_own_and_recordings_are_told_by_them() {
        let all = [cases(), recordings(), figures()].concat();
        let mut names: Vec<_> = all.iter().map(|case| case.name.clone()).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(recordings().iter().all(|case| case.name.starts_with(RECORDING) && case.record));
    }
}
