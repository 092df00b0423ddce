//! Section `i8254`: the interval timer (PIT).

use qevm_savevm::vmstate::VmState;

/// The PIT, section `i8254` version 3; emulated or in the kernel. (`docs/format/microvm-devices.md`, i8254)
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "i8254", version = 3, minimum_version = 2)]
pub struct I8254 {
    /// Not 0: channel 0 raises no interrupt (the HPET does).
    #[vmstate(name = "channels[0].irq_disabled", since = 3)]
    pub irq_disabled: u32,
    /// The three channels.
    #[vmstate(since = 2)]
    pub channels: [PitChannel; 3],
    /// When channel 0 changes its output next, ns of the virtual clock; -1 if it does not.
    #[vmstate(name = "channels[0].next_transition_time")]
    pub next_transition_time: i64,
}

/// A channel of the PIT, structure `pit channel`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "pit channel", version = 2)]
pub struct PitChannel {
    /// Reload value, 1 to 65536.
    pub count: i32,
    /// Count at the time of the latch command.
    pub latched_count: u16,
    /// What is latched: 0, or the access mode of the latch.
    pub count_latched: u8,
    /// Not 0: the status is latched.
    pub status_latched: u8,
    /// The latched status.
    pub status: u8,
    /// Which byte a read gives.
    pub read_state: u8,
    /// Which byte a write sets.
    pub write_state: u8,
    /// The low byte while the high byte is awaited.
    pub write_latch: u8,
    /// Access mode.
    pub rw_mode: u8,
    /// Counting mode, 0 to 5.
    pub mode: u8,
    /// Counts in BCD (never honoured).
    pub bcd: u8,
    /// Level of the gate input.
    pub gate: u8,
    /// When `count` was loaded, ns of the virtual clock.
    pub count_load_time: i64,
    /// When the output changes next, ns of the virtual clock; -1 if it does not.
    pub next_transition_time: i64,
}
