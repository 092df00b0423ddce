//! Capabilities, parameters and channels.

use super::verdict::Row;
use super::verdict::Verdict::{Refused, Stored, Works};

/// A capability that reference-vmm does not have, and the text that it is refused with.
macro_rules! unsupported {
    ($name:literal, $why:literal) => {
        ($name, Refused { why: $why, text: concat!("capability '", $name, "' is not supported here") })
    };
}

/// Values of `MigrationCapability`.
pub const CAPABILITIES: &[Row] = &[
    ("auto-converge", Works("reference-vmm/tests/kvm/qmp.rs::auto_converge")),
    ("background-snapshot", Works("peer ref>11.1/background-snapshot/file")),
    unsupported!("dirty-bitmaps", "the machine has no block nodes with bitmaps"),
    ("dirty-limit", Works("reference-vmm/tests/kvm/dirty_ring.rs::limit_lets_a_fast_guest_migrate")),
    ("events", Works("conformance/tests/qmp.rs::reference_vmm_answers_as_qemu_does")),
    ("late-block-activate", Works("reference-vmm/tests/kvm/drives.rs::stay_free_until_cont")),
    ("mapped-ram", Works("peer ref>11.1/mapped-ram+multifd")),
    ("multifd", Works("peer ref>11.1/multifd/zstd/4")),
    (
        "pause-before-switchover",
        Works("migration/src/pair/tests.rs::pause_before_switchover_waits_and_can_be_cancelled"),
    ),
    ("postcopy-blocktime", Works("peer 11.1>ref/postcopy/blocktime")),
    ("postcopy-preempt", Works("peer 11.1>ref/postcopy/unix/preempt")),
    ("postcopy-ram", Works("peer ref>11.1/postcopy/tcp/at-once")),
    unsupported!("rdma-pin-all", "there is no RDMA"),
    ("release-ram", Works("peer ref>11.1/postcopy/release-ram")),
    ("return-path", Works("peer 11.1>ref/tcp/return-path")),
    ("switchover-ack", Works("peer 11.1>ref/tcp/return-path+switchover-ack")),
    ("validate-uuid", Works("conformance/tests/operations.rs::guests_go_to_machines_of_the_same_uuid")),
    unsupported!("x-colo", "there are no checkpoints"),
    ("x-ignore-shared", Works("peer ref>11.1/ignore-shared")),
    ("xbzrle", Works("peer ref>11.1/xbzrle")),
    ("zero-copy-send", Works("peer ref>11.1/zero-copy")),
];

/// Members of what `migrate-set-parameters` takes.
pub const PARAMETERS: &[Row] = &[
    ("announce-initial", Works("conformance/tests/operations.rs::the_network_hears_of_a_guest_as_from_a_qemu")),
    ("announce-max", Works("conformance/tests/operations.rs::the_network_hears_of_a_guest_as_from_a_qemu")),
    ("announce-rounds", Works("conformance/tests/operations.rs::the_network_hears_of_a_guest_as_from_a_qemu")),
    ("announce-step", Works("conformance/tests/operations.rs::the_network_hears_of_a_guest_as_from_a_qemu")),
    (
        "avail-switchover-bandwidth",
        Works("migration/src/switchover.rs::the_switchover_bandwidth_replaces_the_measured_one_for_the_limit"),
    ),
    (
        "block-bitmap-mapping",
        Refused {
            why: "the machine has no block nodes with bitmaps",
            text: "Parameter 'block-bitmap-mapping': '[]' is not supported here",
        },
    ),
    ("cpr-exec-command", Stored("it is for mode `cpr-exec`")),
    ("cpu-throttle-increment", Works("migration/src/converge.rs::it_ends_at_the_most_that_is_allowed")),
    ("cpu-throttle-initial", Works("migration/src/converge.rs::every_second_bad_period_slows_the_guest_down_further")),
    ("cpu-throttle-tailslow", Works("migration/src/converge.rs::near_the_goal_the_steps_may_be_smaller")),
    ("direct-io", Works("peer ring/mapped-ram")),
    (
        "downtime-limit",
        Works("migration/src/switchover.rs::a_guest_faster_than_the_link_is_never_stopped_and_the_stall_is_named"),
    ),
    ("max-bandwidth", Works("migration/src/pair/tests.rs::the_rate_limit_holds_while_the_guest_runs")),
    ("max-cpu-throttle", Works("migration/src/converge.rs::it_ends_at_the_most_that_is_allowed")),
    (
        "max-postcopy-bandwidth",
        Works("migration/src/pair/postcopy.rs::the_rate_limit_of_postcopy_holds_for_what_was_not_requested"),
    ),
    ("mode", Works("migration/src/pair/tests.rs::mode_cpr_reboot_stops_the_guest_before_the_first_page")),
    (
        "mode=cpr-exec",
        Refused {
            why: "the monitor does not replace itself",
            text: "Parameter 'mode': 'cpr-exec' is not supported here",
        },
    ),
    ("mode=cpr-reboot", Works("migration/src/pair/tests.rs::mode_cpr_reboot_stops_the_guest_before_the_first_page")),
    ("mode=cpr-transfer", Works("peer ref>11.1/cpr-transfer")),
    ("mode=normal", Works("peer 11.1>ref/tcp/return-path")),
    ("multifd-channels", Works("migration/src/pair/multifd.rs::the_largest_number_of_channels_works")),
    ("multifd-compression", Works("peer ref>11.1/multifd/zstd/4")),
    ("multifd-compression=none", Works("peer 11.1>ref/multifd/none/2")),
    ("multifd-compression=zlib", Works("peer ref>11.1/multifd/zlib/2")),
    ("multifd-compression=zstd", Works("peer ref>11.1/multifd/zstd/4")),
    ("multifd-qatzip-level", Stored("the method is not built in, nor is it in this QEMU")),
    ("multifd-zlib-level", Works("migration/src/multifd/settings.rs::methods_have_their_levels")),
    ("multifd-zstd-level", Works("migration/src/multifd/settings.rs::methods_have_their_levels")),
    (
        "throttle-trigger-threshold",
        Works("migration/src/converge.rs::every_second_bad_period_slows_the_guest_down_further"),
    ),
    ("tls-authz", Works("peer 11.1>ref/tls1.3/authz-refused")),
    ("tls-creds", Works("peer 11.1>ref/tls1.3/multifd/4")),
    ("tls-hostname", Works("peer ref>11.1/tls1.3/wrong-host")),
    ("vcpu-dirty-limit", Works("reference-vmm/tests/kvm/dirty_ring.rs::limit_lets_a_fast_guest_migrate")),
    ("x-checkpoint-delay", Stored("there are no checkpoints")),
    ("x-rdma-chunk-size", Stored("there is no RDMA")),
    (
        "x-vcpu-dirty-limit-period",
        Works("migration/src/core/source/tests.rs::the_dirty_limit_is_that_of_the_parameters_and_so_is_its_period"),
    ),
    ("xbzrle-cache-size", Works("migration/src/pair/differences.rs::the_cache_may_be_resized_meanwhile")),
    (
        "zero-page-detection",
        Works("migration/src/pair/multifd.rs::the_packets_follow_the_release_and_the_zero_page_detection"),
    ),
    (
        "zero-page-detection=legacy",
        Works("migration/src/pair/multifd.rs::the_packets_follow_the_release_and_the_zero_page_detection"),
    ),
    (
        "zero-page-detection=multifd",
        Works("migration/src/pair/multifd.rs::the_packets_follow_the_release_and_the_zero_page_detection"),
    ),
    (
        "zero-page-detection=none",
        Works("migration/src/pair/multifd.rs::the_packets_follow_the_release_and_the_zero_page_detection"),
    ),
];

/// Kinds of channels and of their addresses.
pub const CHANNELS: &[Row] = &[
    ("cpr", Works("peer 11.1>ref/cpr-transfer")),
    ("exec", Works("migration/src/pair/files.rs::a_guest_goes_through_commands")),
    ("file", Works("reference-vmm/tests/kvm/transports.rs::files")),
    ("main", Works("reference-vmm/tests/kvm/qmp.rs::migrates_a_guest")),
    ("rdma", Refused { why: "there is no RDMA", text: "transport 'rdma' is not supported here" }),
    ("socket fd", Works("reference-vmm/tests/kvm/transports.rs::descriptors")),
    ("socket inet", Works("reference-vmm/tests/kvm/migration.rs::over_tcp")),
    ("socket unix", Works("reference-vmm/tests/kvm/migration.rs::over_unix_without_return_path")),
    (
        "socket vsock",
        Refused {
            why: "no kernel of the tests has it",
            text: "migration protocol 'vsock' is not supported here; use tcp:, unix:, exec:, fd:, file: or nbd:",
        },
    ),
];
