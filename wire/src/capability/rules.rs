//! The combinations that QEMU refuses.

use super::Capability::*;
use super::{Capabilities, Capability};
use crate::QemuVersion;
use core::fmt;

/// What else decides whether capabilities go together. The default refuses nothing by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// The release that is asked.
    pub qemu: QemuVersion,
    /// The capabilities that were on before.
    pub before: Capabilities,
    /// `-incoming` or `migrate-incoming` was given an address already.
    pub incoming_started: bool,
    /// `multifd-compression` is not `none`.
    pub compressed: bool,
    /// `tls-creds` is set.
    pub tls: bool,
    /// The machine runs under KVM with `dirty-ring-size`.
    pub dirty_ring: bool,
    /// `mode` is `cpr-reboot`, `cpr-transfer` or `cpr-exec`.
    pub cpr: bool,
    /// The stream goes to, or comes from, a file in which one can seek.
    pub seekable: bool,
    /// The transport takes several connections: `tcp:`, `unix:` and `vsock:`, not `exec:` and `fd:`, nor `file:`
    /// without `mapped-ram`.
    pub multi_channel: bool,
}

impl Context {
    /// Nothing special, for this release.
    pub fn new(qemu: QemuVersion) -> Self {
        Context {
            qemu,
            before: Capabilities::NONE,
            incoming_started: false,
            compressed: false,
            tls: false,
            dirty_ring: true,
            cpr: false,
            seekable: true,
            multi_channel: true,
        }
    }
}

/// Why capabilities are refused. The text is QEMU's own where QEMU has one for the rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rejection {
    /// The release does not have the capability.
    Missing {
        /// The capability.
        capability: Capability,
        /// The release.
        qemu: QemuVersion,
    },
    /// Two capabilities exclude each other.
    Excludes {
        /// One of them.
        capability: Capability,
        /// The other.
        other: Capability,
        /// QEMU's reason.
        reason: &'static str,
    },
    /// A capability does not go with `background-snapshot`.
    BackgroundSnapshot {
        /// The capability.
        other: Capability,
    },
    /// A capability needs another.
    Requires {
        /// The capability.
        capability: Capability,
        /// What it needs.
        other: Capability,
        /// QEMU's reason.
        reason: &'static str,
    },
    /// A capability does not go with parameters, or with the state of the machine.
    Setting {
        /// The capability.
        capability: Capability,
        /// QEMU's reason.
        reason: &'static str,
    },
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rejection::Missing { capability, qemu } => write!(f, "QEMU {qemu} has no capability '{capability}'"),
            Rejection::BackgroundSnapshot { other } => write!(f, "Background-snapshot is not compatible with {other}"),
            Rejection::Excludes { reason, .. }
            | Rejection::Requires { reason, .. }
            | Rejection::Setting { reason, .. } => f.write_str(reason),
        }
    }
}

impl core::error::Error for Rejection {}

/// Says whether a release takes these capabilities together, and the first reason if not. A set is taken as a whole:
/// if it is refused, everything stays as it was.
///
/// What depends on parameters and transport, QEMU refuses at `migrate` (7.2, 10.0 and 11.1 were asked); here it is
/// refused with the rest.
///
/// # Errors
/// The first rule that is broken.
///
/// ```
/// use qevm_wire::{Capabilities, Capability, QemuVersion, capability::{Context, check}};
///
/// let on: Capabilities = [Capability::Multifd, Capability::PostcopyRam].into_iter().collect();
/// assert!(check(on, &Context::new(QemuVersion::new(11, 1))).is_ok());
/// let refused = check(on, &Context::new(QemuVersion::new(10, 0))).unwrap_err();
/// assert_eq!(refused.to_string(), "Postcopy is not yet compatible with multifd");
/// ```
pub fn check(on: Capabilities, context: &Context) -> Result<(), Rejection> {
    let qemu = context.qemu;
    if let Some(capability) = on.iter().find(|capability| !capability.exists_in(qemu)) {
        return Err(Rejection::Missing { capability, qemu });
    }
    if on.contains(BackgroundSnapshot)
        && let Some(other) = NOT_IN_BACKGROUND.iter().copied().find(|other| on.contains(*other))
    {
        return Err(Rejection::BackgroundSnapshot { other });
    }
    for rule in REQUIRED {
        if on.contains(rule.capability) && !on.contains(rule.other) && rule.holds_in(qemu) {
            let (capability, other, reason) = (rule.capability, rule.other, rule.reason);
            return Err(Rejection::Requires { capability, other, reason });
        }
    }
    for rule in EXCLUDED {
        if on.contains(rule.capability) && on.contains(rule.other) && rule.holds_in(qemu) {
            let (capability, other, reason) = (rule.capability, rule.other, rule.reason);
            return Err(Rejection::Excludes { capability, other, reason });
        }
    }
    let late = |capability| context.incoming_started && !context.before.contains(capability);
    // 7.2 takes capabilities late, and refuses transports with a single connection in other words.
    let old = qemu < QemuVersion::new(8, 0);
    let single = if old { "multifd is not supported by current protocol" } else { MULTI_CHANNEL };
    let settings = [
        (Multifd, late(Multifd) && !old, "Multifd must be set before incoming starts"),
        (PostcopyPreempt, late(PostcopyPreempt) && !old, "Postcopy preempt must be set before incoming starts"),
        (ZeroCopySend, context.compressed || context.tls, ZERO_COPY),
        (MappedRam, context.compressed, "Cannot use compression with mapped-ram"),
        (MappedRam, context.tls, "Cannot use TLS with mapped-ram"),
        (MappedRam, !context.seekable, "Migration requires seekable transport (e.g. file)"),
        (Multifd, !context.multi_channel && !on.contains(MappedRam), single),
        (PostcopyPreempt, !context.multi_channel && !old, MULTI_CHANNEL),
        (DirtyLimit, !context.dirty_ring, "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set"),
        (PostcopyRam, context.cpr, "Cannot use CPR mode with postcopy-ram"),
        (BackgroundSnapshot, context.cpr, "Cannot use CPR mode with background-snapshot"),
        (XColo, context.cpr, "Cannot use CPR mode with x-colo"),
    ];
    for (capability, refused, reason) in settings {
        if refused && on.contains(capability) {
            return Err(Rejection::Setting { capability, reason });
        }
    }
    Ok(())
}

/// A rule about two capabilities.
struct Rule {
    capability: Capability,
    other: Capability,
    /// The first release that has the rule.
    since: (u16, u16),
    /// The first that has it no longer.
    until: Option<(u16, u16)>,
    reason: &'static str,
}

impl Rule {
    fn holds_in(&self, qemu: QemuVersion) -> bool {
        let version = |(major, minor)| QemuVersion::new(major, minor);
        qemu >= version(self.since) && self.until.is_none_or(|until| qemu < version(until))
    }
}

const fn rule(capability: Capability, other: Capability, since: (u16, u16), reason: &'static str) -> Rule {
    Rule { capability, other, since, until: None, reason }
}

const ZERO_COPY: &str = "Zero copy only available for non-compressed non-TLS multifd migration";
const MULTI_CHANNEL: &str = "Migration requires multi-channel URIs (e.g. tcp)";

/// The first needs the second. Where only the releases before and after a change were examined, the rule counts from
/// the first one after the last that is known not to have it.
const REQUIRED: &[Rule] = &[
    rule(PostcopyPreempt, PostcopyRam, (7, 1), "Postcopy preempt requires postcopy-ram"),
    rule(ZeroCopySend, Multifd, (7, 1), ZERO_COPY),
    rule(SwitchoverAck, ReturnPath, (8, 1), "Capability 'switchover-ack' requires capability 'return-path'"),
    // 10.0 does not have it, 11.1 does.
    rule(XColo, ReturnPath, (10, 1), "Capability 'x-colo' requires capability 'return-path'"),
];

/// These exclude each other.
const EXCLUDED: &[Rule] = &[
    rule(PostcopyRam, XIgnoreShared, (4, 0), "Postcopy is not compatible with ignore-shared"),
    // 7.2 takes both (and uses multifd until postcopy starts), 10.0 refuses them, 10.1 allows them again.
    Rule { until: Some((10, 1)), ..rule(PostcopyRam, Multifd, (8, 0), "Postcopy is not yet compatible with multifd") },
    // 7.2 takes both, 10.0 refuses them.
    rule(Multifd, Xbzrle, (8, 0), "Multifd is not compatible with xbzrle"),
    // 5.2 takes both, 7.2 refuses them.
    rule(Multifd, Compress, (6, 0), "Multifd is not compatible with compress"),
    rule(PostcopyPreempt, Compress, (7, 1), "Postcopy preempt not compatible with compress"),
    rule(ZeroCopySend, Xbzrle, (7, 1), ZERO_COPY),
    rule(ZeroCopySend, Compress, (7, 1), ZERO_COPY),
    rule(
        DirtyLimit,
        AutoConverge,
        (8, 1),
        "dirty-limit conflicts with auto-converge either of then available currently",
    ),
    rule(MappedRam, Xbzrle, (9, 0), "Mapped-ram migration is incompatible with xbzrle"),
    rule(MappedRam, PostcopyRam, (9, 0), "Mapped-ram migration is incompatible with postcopy"),
];

/// What does not go with `background-snapshot` (6.0).
const NOT_IN_BACKGROUND: &[Capability] = &[
    PostcopyRam,
    DirtyBitmaps,
    PostcopyBlocktime,
    LateBlockActivate,
    ReturnPath,
    Multifd,
    PauseBeforeSwitchover,
    AutoConverge,
    ReleaseRam,
    RdmaPinAll,
    Compress,
    Xbzrle,
    XColo,
    ValidateUuid,
    ZeroCopySend,
];
