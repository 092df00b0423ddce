//! Migration parameters, with QEMU's names, defaults and ranges (QMP reference and answers of QEMU 11.1).
//!
//! A parameter whose feature is not built in can be set and read back, as in a QEMU that does not use it. Where doing
//! nothing would mislead (other modes), there is none.

mod range;
mod timeouts;

pub use timeouts::Timeouts;

use qevm_multifd::compression::Compression;
use qevm_multifd::zero_page::ZeroPageDetection;
use std::time::Duration;

/// What `migrate-set-parameters` sets. It may change while a migration runs.
///
/// ```
/// use qevm_migration::Parameters;
///
/// let mut parameters = Parameters::default();
/// assert_eq!(parameters.max_bandwidth, 128 << 20);
/// parameters.downtime_limit_ms = 50;
/// assert_eq!(parameters.downtime_limit().as_millis(), 50);
/// parameters.downtime_limit_ms = 3_000_000;
/// assert!(parameters.check().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Parameters {
    /// `announce-initial`: milliseconds before the first announcement of the network's new place.
    pub announce_initial_ms: u64,
    /// `announce-max`: longest time between two announcements, in milliseconds.
    pub announce_max_ms: u64,
    /// `announce-rounds`: how many announcements.
    pub announce_rounds: u64,
    /// `announce-step`: by how much the time between two grows, in milliseconds.
    pub announce_step_ms: u64,
    /// `throttle-trigger-threshold`: dirtied in per cent of sent, above which `auto-converge` slows vCPUs down (5.0).
    pub throttle_trigger_threshold: u8,
    /// `cpu-throttle-initial`: per cent of their time for which vCPUs are paused first under `auto-converge`.
    pub cpu_throttle_initial: u8,
    /// `cpu-throttle-increment`: by how many per cent more each time.
    pub cpu_throttle_increment: u8,
    /// `cpu-throttle-tailslow`: smaller steps near the end (5.1).
    pub cpu_throttle_tailslow: bool,
    /// `max-cpu-throttle`: the most, in per cent.
    pub max_cpu_throttle: u8,
    /// `tls-creds`: the name of the credentials that secure the connections; empty is none. What it names is the
    /// monitor's ([`Job::set_tls`](crate::Job::set_tls)).
    pub tls_creds: String,
    /// `tls-hostname`: what the destination's certificate has to name; empty is the host of its address.
    pub tls_hostname: String,
    /// `tls-authz`: the name of what decides whose guests are taken; empty takes every source with a certificate.
    pub tls_authz: String,
    /// `max-bandwidth`: bytes per second while the guest runs; 0 is unlimited.
    pub max_bandwidth: u64,
    /// `avail-switchover-bandwidth`: bytes per second to reckon with for the switchover; 0 takes what is measured
    /// (8.2).
    pub avail_switchover_bandwidth: u64,
    /// `downtime-limit`: the longest the guest may be paused, in milliseconds.
    pub downtime_limit_ms: u64,
    /// `x-checkpoint-delay`: milliseconds between the checkpoints of COLO, which is not built in.
    pub checkpoint_delay_ms: u64,
    /// `multifd-channels`: page channels, 1 to 255, the same on both sides.
    pub multifd_channels: u8,
    /// `multifd-compression`: `none`, `zlib` or `zstd`, the same on both sides.
    pub multifd_compression: Compression,
    /// `multifd-zlib-level`.
    pub multifd_zlib_level: u8,
    /// `multifd-zstd-level`.
    pub multifd_zstd_level: u8,
    /// `multifd-qatzip-level`, for a method that is not built in.
    pub multifd_qatzip_level: u8,
    /// `xbzrle-cache-size` in bytes.
    pub xbzrle_cache_size: u64,
    /// `max-postcopy-bandwidth`: bytes per second; 0 is unlimited.
    pub max_postcopy_bandwidth: u64,
    /// `vcpu-dirty-limit`: megabytes per second that each vCPU may dirty under `dirty-limit` (8.1).
    pub vcpu_dirty_limit: u64,
    /// `x-vcpu-dirty-limit-period`: milliseconds over which a vCPU's dirty rate is measured (8.1).
    pub vcpu_dirty_limit_period_ms: u64,
    /// `mode` (8.2).
    pub mode: Mode,
    /// `zero-page-detection` (9.0).
    pub zero_page_detection: ZeroPageDetection,
    /// `direct-io`: files are written past the page cache, where `mapped-ram` and `multifd` are on (9.1).
    pub direct_io: bool,
    /// `cpr-exec-command`, for a mode that is not built in (10.2).
    pub cpr_exec_command: Vec<String>,
    /// `x-rdma-chunk-size` in bytes, for a transport that is not built in (11.1).
    pub rdma_chunk_size: u64,
    /// `x-…-timeout`: how long who waits for what. No parameters of QEMU's.
    pub timeouts: Timeouts,
}

/// Parameter `mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Mode {
    /// The guest runs on while it is copied.
    #[default]
    Normal,
    /// `cpr-reboot`: the guest is stopped first, and its state goes to a file over a reboot of the host.
    CprReboot,
    /// `cpr-transfer` (10.0): the guest is stopped first, and goes to another process of the host, which has its memory
    /// already; see [`cpr`](crate::cpr).
    CprTransfer,
}

impl Mode {
    /// QEMU's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Normal => "normal",
            Mode::CprReboot => "cpr-reboot",
            Mode::CprTransfer => "cpr-transfer",
        }
    }
}

/// A value that a parameter cannot have. The texts are those of QEMU 11.1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadParameter {
    /// The value is outside the parameter's range.
    #[error("Option {name} expects {expected}")]
    Range {
        /// The parameter.
        name: &'static str,
        /// What values there are.
        expected: &'static str,
    },
    /// A limit of no megabytes per second.
    #[error("Parameter '{0}' must be greater than 1 MB/s")]
    TooSmall(&'static str),
}

impl Default for Parameters {
    fn default() -> Self {
        Parameters {
            announce_initial_ms: 50,
            announce_max_ms: 550,
            announce_rounds: 5,
            announce_step_ms: 100,
            throttle_trigger_threshold: 50,
            cpu_throttle_initial: 20,
            cpu_throttle_increment: 10,
            cpu_throttle_tailslow: false,
            max_cpu_throttle: 99,
            tls_creds: String::new(),
            tls_hostname: String::new(),
            tls_authz: String::new(),
            max_bandwidth: 128 << 20,
            avail_switchover_bandwidth: 0,
            downtime_limit_ms: 300,
            checkpoint_delay_ms: 20_000,
            multifd_channels: 2,
            multifd_compression: Compression::None,
            multifd_zlib_level: 1,
            multifd_zstd_level: 1,
            multifd_qatzip_level: 1,
            xbzrle_cache_size: 64 << 20,
            max_postcopy_bandwidth: 0,
            vcpu_dirty_limit: 1,
            vcpu_dirty_limit_period_ms: 1000,
            mode: Mode::Normal,
            zero_page_detection: ZeroPageDetection::Multifd,
            direct_io: false,
            cpr_exec_command: Vec::new(),
            rdma_chunk_size: 1 << 20,
            timeouts: Timeouts::default(),
        }
    }
}

impl Parameters {
    /// Checks every value.
    ///
    /// # Errors
    /// [`BadParameter`], for the first one that is out of range.
    pub fn check(&self) -> Result<(), BadParameter> {
        range::check(self)
    }

    /// `downtime-limit` as a duration.
    pub fn downtime_limit(&self) -> Duration {
        Duration::from_millis(self.downtime_limit_ms)
    }
}
