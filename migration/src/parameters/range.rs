//! The ranges (answers of QEMU 11.1).

use super::{BadParameter, Parameters};

/// Largest `downtime-limit` in milliseconds.
const MAX_DOWNTIME_LIMIT_MS: u64 = 2_000_000;
/// Smallest `xbzrle-cache-size`: a page.
const MIN_CACHE_SIZE: u64 = 4096;

/// Finds the first value out of range.
pub(super) fn check(p: &Parameters) -> Result<(), BadParameter> {
    let per_cent = 1..=99;
    let rows: [(bool, &'static str, &'static str); 16] = [
        (
            (1..=100).contains(&p.throttle_trigger_threshold),
            "throttle-trigger-threshold",
            "an integer in the range of 1 to 100",
        ),
        (per_cent.contains(&p.cpu_throttle_initial), "cpu-throttle-initial", "an integer in the range of 1 to 99"),
        (per_cent.contains(&p.cpu_throttle_increment), "cpu-throttle-increment", "an integer in the range of 1 to 99"),
        (
            (p.cpu_throttle_initial..=99).contains(&p.max_cpu_throttle),
            "max-cpu-throttle",
            "an integer in the range of cpu-throttle-initial to 99",
        ),
        (
            p.downtime_limit_ms <= MAX_DOWNTIME_LIMIT_MS,
            "downtime-limit",
            "an integer in the range of 0 to (2000 * 1000) ms",
        ),
        (p.multifd_channels >= 1, "multifd-channels", "a value between 1 and 255"),
        (p.multifd_zlib_level <= 9, "multifd-zlib-level", "a value between 0 and 9"),
        ((1..=9).contains(&p.multifd_qatzip_level), "multifd-qatzip-level", "a value between 1 and 9"),
        (p.multifd_zstd_level <= 20, "multifd-zstd-level", "a value between 0 and 20"),
        (
            p.xbzrle_cache_size >= MIN_CACHE_SIZE && p.xbzrle_cache_size.is_power_of_two(),
            "xbzrle-cache-size",
            "a power of two no less than the target page size",
        ),
        (p.announce_initial_ms <= 100_000, "announce-initial", "a value between 0 and 100000"),
        (p.announce_max_ms <= 100_000, "announce-max", "a value between 0 and 100000"),
        (p.announce_rounds <= 1000, "announce-rounds", "a value between 0 and 1000"),
        // QEMU says 0, and refuses 0.
        ((1..=10_000).contains(&p.announce_step_ms), "announce-step", "a value between 0 and 10000"),
        ((1..=1000).contains(&p.vcpu_dirty_limit_period_ms), "x-vcpu-dirty-limit-period", "a value between 1 and 1000"),
        (
            p.rdma_chunk_size.is_power_of_two() && (1 << 20..=1 << 30).contains(&p.rdma_chunk_size),
            // Spelt so by QEMU.
            "x_rdma_chunk_size",
            "a power of 2 in the range 1MiB to 1024MiB",
        ),
    ];
    if let Some((_, name, expected)) = rows.into_iter().find(|(in_range, ..)| !in_range) {
        return Err(BadParameter::Range { name, expected });
    }
    if p.vcpu_dirty_limit == 0 {
        return Err(BadParameter::TooSmall("vcpu-dirty-limit"));
    }
    Ok(())
}
