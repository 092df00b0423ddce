//! Every switch that changes bytes on the wire, derived from a QEMU release and a machine type.
//!
//! Code asks a named switch of [`Profile`], never a version number. Each switch names the QEMU release and, where there
//! is one, the compatibility property that it comes from. Versioned machine types (`pc-q35-8.0`) fix a switch whatever
//! binary runs them; unversioned ones (`microvm`, `none`, `isapc`) follow the binary.

use core::fmt;
use core::str::FromStr;

/// A QEMU release, major and minor.
///
/// ```
/// use qevm_wire::QemuVersion;
///
/// assert!(QemuVersion::new(7, 2) < "10.0".parse()?);
/// # Ok::<(), qevm_wire::profile::BadVersion>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QemuVersion {
    /// Major release number.
    pub major: u16,
    /// Minor release number.
    pub minor: u16,
}

impl QemuVersion {
    /// The newest release whose streams were examined for this crate.
    pub const NEWEST: QemuVersion = QemuVersion::new(11, 1);

    /// Release `major.minor`.
    pub const fn new(major: u16, minor: u16) -> Self {
        QemuVersion { major, minor }
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The text is not a QEMU version such as `10.0` or `7.2.22`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a QEMU version: expected MAJOR.MINOR, e.g. 10.0")]
pub struct BadVersion;

impl FromStr for QemuVersion {
    type Err = BadVersion;

    fn from_str(text: &str) -> Result<Self, BadVersion> {
        let mut numbers = text.split('.').map(|n| n.parse().map_err(|_| BadVersion));
        let major = numbers.next().ok_or(BadVersion)??;
        let minor = numbers.next().ok_or(BadVersion)??;
        numbers.try_for_each(|micro: Result<u16, _>| micro.map(drop))?;
        Ok(QemuVersion { major, minor })
    }
}

/// Parameter `zero-page-detection` (since 9.0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ZeroPageDetection {
    /// `none`: zero pages travel like all others.
    None,
    /// `legacy`: the main thread detects them and puts ZERO records on the main channel.
    Legacy,
    /// `multifd`: the channel threads detect them and list them in their packets.
    Multifd,
}

/// Who counts the acks of capability `switchover-ack` (since 8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SwitchoverAckFlow {
    /// The destination counts its devices and sends a single ack (8.1 to 11.0, `migration.switchover-ack-legacy=on`).
    Legacy,
    /// The source counts one ack per request of a device (11.1).
    Counted,
}

/// The switches that change bytes, for one QEMU release running one machine type.
///
/// ```
/// use qevm_wire::{Profile, QemuVersion};
///
/// // SWITCHOVER_START is new in 10.0 and off for older machine types.
/// assert!(Profile::new(QemuVersion::new(10, 0), "microvm").switchover_start);
/// assert!(!Profile::new(QemuVersion::new(10, 0), "pc-q35-7.2").switchover_start);
/// assert!(!Profile::new(QemuVersion::new(7, 2), "microvm").switchover_start);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Profile {
    /// The release that writes or reads the stream.
    pub qemu: QemuVersion,
    /// A configuration section follows the stream version (`migration.send-configuration`; machine types since 2.4).
    pub send_configuration: bool,
    /// Sections end in a footer (`migration.send-section-footer`; machine types since 2.4).
    pub send_section_footer: bool,
    /// A JSON description follows the end of the stream (`suppress-vmdesc=off`; machine types since 2.3).
    pub vmdesc: bool,
    /// The description has a `configuration` object (10.0; absent in 7.2).
    pub vmdesc_configuration: bool,
    /// `MIG_CMD_SWITCHOVER_START` is sent (`migration.send-switchover-start`; 10.0, machine types since 10.0).
    pub switchover_start: bool,
    /// Records of one compressed page exist (capability `compress`; removed in 9.1).
    pub compress_page: bool,
    /// mapped-ram files exist (9.0).
    pub mapped_ram: bool,
    /// Every RAM section ends in a SYNC on every page channel, and no flush record is sent
    /// (`migration.multifd-flush-after-each-section`; always before 8.1, machine types up to 8.0).
    pub multifd_flush_after_each_section: bool,
    /// The last RAM section ends in one SYNC more than its pages need (8.1 to 9.2, flush per round).
    pub multifd_flush_at_end: bool,
    /// Page channel packets have a `zero_pages` count and lone SYNC packets are blank (9.0).
    pub multifd_zero_pages: bool,
    /// Devices may send their state over page channels (`vfio-pci.x-migration-multifd-transfer`; 10.0, machine types
    /// since 10.0).
    pub multifd_device_state: bool,
    /// A page channel over TLS ends in a TLS bye (`migration.multifd-clean-tls-termination`; 10.0, machine types since
    /// 10.0).
    pub multifd_clean_tls_termination: bool,
    /// multifd and postcopy-ram may be used together (10.1; tolerated unchecked up to 7.2, refused between).
    pub multifd_with_postcopy: bool,
    /// Default of `zero-page-detection` (9.0 `multifd`; machine types up to 8.2 and older releases `legacy`).
    pub zero_page_detection: ZeroPageDetection,
    /// How switchover acks are counted; `None` where the capability does not exist (before 8.1).
    pub switchover_ack: Option<SwitchoverAckFlow>,
    /// The preempt channel is opened at the start of the migration and ends in EOS (`x-preempt-pre-7-2`; 7.1, 7.2 and
    /// machine types up to 7.2).
    pub preempt_pre_7_2: bool,
    /// The postcopy package holds a PING 0x42 before its RUN (10.2).
    pub postcopy_package_ping: bool,
    /// `globalstate` has the two `vm_was_suspended` bytes and a 32-byte name (8.2).
    pub globalstate_suspended: bool,
    /// `apic` sections come before all other devices (11.0; seen in 11.1, not in 10.0).
    pub apic_first: bool,
    /// `kvmclock/clock_is_reliable` is always sent (seen in 11.1; conditional in 10.0).
    pub kvmclock_always_reliable: bool,
    /// The other end runs its processors under KVM and has section `kvmclock`; under TCG there is none, and a
    /// destination refuses it (all releases from 7.2 to 11.1). On by [`Profile::new`], off by [`Profile::tcg`].
    pub kvmclock: bool,
    /// microvm has a second IOAPIC by default (seen in 7.2, absent in 5.2).
    pub microvm_second_ioapic: bool,
}

impl Profile {
    /// The switches of release `qemu` running machine type `machine` (a concrete name as the stream carries it, e.g.
    /// `pc-q35-8.0` or `microvm`).
    pub fn new(qemu: QemuVersion, machine: &str) -> Self {
        let v = QemuVersion::new;
        // A compatibility property "machine ≤ X" is on for every versioned machine type up to X; where the type has no
        // version, or one newer than the binary knows, the binary's own behaviour holds.
        let machine = machine_version(machine).unwrap_or(qemu).min(qemu);
        Profile {
            qemu,
            send_configuration: machine >= v(2, 4),
            send_section_footer: machine >= v(2, 4),
            vmdesc: machine >= v(2, 3),
            vmdesc_configuration: qemu >= v(10, 0),
            switchover_start: machine >= v(10, 0),
            compress_page: qemu < v(9, 1),
            mapped_ram: qemu >= v(9, 0),
            multifd_flush_after_each_section: machine < v(8, 1),
            multifd_flush_at_end: (v(8, 1)..v(10, 0)).contains(&qemu) && machine >= v(8, 1),
            multifd_zero_pages: qemu >= v(9, 0),
            multifd_device_state: machine >= v(10, 0),
            multifd_clean_tls_termination: machine >= v(10, 0),
            multifd_with_postcopy: qemu < v(8, 0) || qemu >= v(10, 1),
            zero_page_detection: if machine >= v(9, 0) {
                ZeroPageDetection::Multifd
            } else {
                ZeroPageDetection::Legacy
            },
            switchover_ack: if machine >= v(11, 1) {
                Some(SwitchoverAckFlow::Counted)
            } else if qemu >= v(8, 1) {
                Some(SwitchoverAckFlow::Legacy)
            } else {
                None
            },
            preempt_pre_7_2: qemu >= v(7, 1) && machine < v(8, 0),
            postcopy_package_ping: qemu >= v(10, 2),
            globalstate_suspended: qemu >= v(8, 2),
            apic_first: qemu >= v(11, 0),
            kvmclock_always_reliable: qemu >= v(11, 0),
            kvmclock: true,
            microvm_second_ioapic: qemu >= v(6, 0),
        }
    }

    /// The same for a machine under TCG.
    #[must_use]
    pub fn tcg(self) -> Self {
        Profile { kvmclock: false, ..self }
    }
}

/// The version at the end of a versioned machine type's name; `None` for unversioned types.
///
/// ```
/// use qevm_wire::{profile::machine_version, QemuVersion};
///
/// assert_eq!(machine_version("pc-i440fx-2.12"), Some(QemuVersion::new(2, 12)));
/// assert_eq!(machine_version("microvm"), None);
/// ```
pub fn machine_version(machine: &str) -> Option<QemuVersion> {
    machine.rsplit_once('-').and_then(|(_, version)| version.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(qemu: (u16, u16), machine: &str) -> Profile {
        Profile::new(QemuVersion::new(qemu.0, qemu.1), machine)
    }

    #[test]
    fn versions_parse_and_order() {
        assert_eq!("7.2.22".parse(), Ok(QemuVersion::new(7, 2)));
        assert!(QemuVersion::new(10, 0) > QemuVersion::new(9, 2));
        for bad in ["", "7", "7.", "7.x", "v7.2", "7.2.x"] {
            assert_eq!(bad.parse::<QemuVersion>(), Err(BadVersion), "{bad}");
        }
    }

    /// Rows of the table "Machine-version properties that change bytes" and of the multifd notes.
    #[test]
    fn compatibility_properties_follow_the_machine_version() {
        assert!(!profile((11, 1), "pc-q35-9.2").switchover_start);
        assert!(profile((11, 1), "pc-q35-10.0").switchover_start);
        assert!(profile((10, 0), "pc-q35-8.0").multifd_flush_after_each_section);
        assert!(!profile((10, 0), "pc-q35-8.1").multifd_flush_after_each_section);
        assert!(profile((7, 2), "microvm").multifd_flush_after_each_section);
        assert_eq!(profile((10, 0), "pc-q35-8.2").zero_page_detection, ZeroPageDetection::Legacy);
        assert_eq!(profile((10, 0), "pc-q35-9.0").zero_page_detection, ZeroPageDetection::Multifd);
        assert_eq!(profile((11, 1), "microvm").switchover_ack, Some(SwitchoverAckFlow::Counted));
        assert_eq!(profile((11, 1), "pc-q35-11.0").switchover_ack, Some(SwitchoverAckFlow::Legacy));
        assert_eq!(profile((7, 2), "microvm").switchover_ack, None);
        assert!(!profile((5, 2), "pc-i440fx-2.3").send_section_footer);
        assert!(profile((5, 2), "pc-i440fx-2.4").send_section_footer);
        assert!(profile((11, 1), "pc-q35-7.2").preempt_pre_7_2);
        assert!(!profile((11, 1), "microvm").preempt_pre_7_2);
    }

    #[test]
    fn what_the_binary_decides_ignores_the_machine_version() {
        assert!(profile((10, 0), "pc-q35-5.2").multifd_zero_pages);
        assert!(!profile((7, 2), "pc-q35-5.2").multifd_zero_pages);
        assert!(!profile((10, 0), "pc-q35-5.2").multifd_with_postcopy);
        assert!(profile((11, 1), "pc-q35-5.2").multifd_with_postcopy);
    }
}
