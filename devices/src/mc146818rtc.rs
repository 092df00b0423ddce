//! Section `mc146818rtc`: the real-time clock.

use qevm_savevm::vmstate::{Buffer, Timer, Unused, VmState};
use qevm_wire::QemuVersion;

/// The RTC, section `mc146818rtc` version 3. 11.1 loads nothing older, releases up to 10.0 load versions 1 and 2 too.
///
/// (`docs/format/microvm-devices.md`, mc146818rtc)
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(
    name = "mc146818rtc",
    version = 3,
    minimum_version = 1,
    release_versions = |ctx| (3, if ctx.profile.qemu >= QemuVersion::new(11, 0) { 3 } else { 1 })
)]
pub struct Mc146818Rtc {
    /// CMOS memory with the clock's registers in its first 14 bytes.
    pub cmos_data: Buffer<128>,
    /// The byte that the next access to the data port means.
    pub cmos_index: u8,
    /// Broken-down time of versions before 3.
    #[vmstate(name = "unused")]
    pub unused_time: Unused<28>,
    /// The periodic interrupt.
    pub periodic_timer: Timer,
    /// When the next periodic interrupt is due, in ticks of 32.768 kHz.
    pub next_periodic_time: i64,
    /// Timers of versions before 3.
    #[vmstate(name = "unused")]
    pub unused_timers: Unused<24>,
    /// Periodic interrupts that are owed.
    #[vmstate(since = 2)]
    pub irq_coalesced: u32,
    /// Period of the periodic interrupt, in ticks of 32.768 kHz.
    #[vmstate(since = 2)]
    pub period: u32,
    /// The guest's time at `last_update`, seconds since 1970.
    #[vmstate(since = 3)]
    pub base_rtc: u64,
    /// When `base_rtc` was valid, ns of the RTC's clock.
    #[vmstate(since = 3)]
    pub last_update: u64,
    /// Offset added to the clock, ns.
    #[vmstate(since = 3)]
    pub offset: i64,
    /// The update-ended interrupt.
    #[vmstate(since = 3)]
    pub update_timer: Timer,
    /// When the alarm is due, ns of the RTC's clock.
    #[vmstate(since = 3)]
    pub next_alarm_time: u64,
    /// Subsection `mc146818rtc/irq_reinject_on_ack_count`.
    #[vmstate(subsection)]
    pub irq_reinject_on_ack_count: Option<IrqReinjectOnAckCount>,
}

/// Subsection `mc146818rtc/irq_reinject_on_ack_count`: interrupts to raise again when one is acknowledged.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(
    name = "mc146818rtc/irq_reinject_on_ack_count",
    version = 1,
    needed = |count, _| count.irq_reinject_on_ack_count != 0
)]
pub struct IrqReinjectOnAckCount {
    /// How many.
    pub irq_reinject_on_ack_count: u16,
}
