//! Device states.

/// One 8259, with the fields of QEMU's section `i8259`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of the section's fields
pub struct PicState {
    pub last_irr: u8,
    pub irr: u8,
    pub imr: u8,
    pub isr: u8,
    pub priority_add: u8,
    pub irq_base: u8,
    pub read_reg_select: u8,
    pub poll: u8,
    pub special_mask: u8,
    pub init_state: u8,
    pub auto_eoi: u8,
    pub rotate_on_auto_eoi: u8,
    pub special_fully_nested_mode: u8,
    pub init4: u8,
    /// Only where the 8259s are in the monitor; KVM's have no such field.
    pub single_mode: u8,
    pub elcr: u8,
    pub elcr_mask: u8,
}

/// The IOAPIC, with the fields of QEMU's section `ioapic`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoapicState {
    /// Where the guest sees it.
    pub base_address: u64,
    /// APIC id.
    pub id: u8,
    /// Selected register.
    pub ioregsel: u8,
    /// Interrupt requests, one bit for each pin.
    pub irr: u32,
    /// Redirection table.
    pub redirtbl: [u64; 24],
}

/// One channel of the i8254, with the fields of QEMU's section `i8254`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of the section's fields
pub struct PitChannelState {
    pub count: u32,
    pub latched_count: u16,
    pub count_latched: u8,
    pub status_latched: u8,
    pub status: u8,
    pub read_state: u8,
    pub write_state: u8,
    pub write_latch: u8,
    pub rw_mode: u8,
    pub mode: u8,
    pub bcd: u8,
    pub gate: u8,
    /// When the count was loaded, in ns of the machine's virtual clock.
    pub count_load_time: i64,
}

/// The i8254.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PitState {
    /// Its three channels.
    pub channels: [PitChannelState; 3],
    /// KVM's flags: HPET legacy, speaker data on.
    pub flags: u32,
}

/// The paravirtual clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClockState {
    /// Nanoseconds.
    pub clock: u64,
    /// Whether the value was taken so that guest clock and TSC agree (KVM_CLOCK_TSC_STABLE).
    pub reliable: bool,
}

/// The serial port, with the fields of QEMU's section `serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of the section's fields
pub struct SerialState {
    pub divider: u16,
    pub rbr: u8,
    pub ier: u8,
    pub iir: u8,
    pub lcr: u8,
    pub mcr: u8,
    pub lsr: u8,
    pub msr: u8,
    pub scr: u8,
    pub fcr: u8,
    /// The transmitter's interrupt has not been taken yet.
    pub thr_ipending: bool,
    /// Bytes received and not yet read, oldest first, at most 16.
    pub recv_fifo: Vec<u8>,
    /// Bytes that the guest has written and that are not taken yet, oldest first.
    pub unsent: Vec<u8>,
}

/// The real-time clock, with the fields of QEMU's section `mc146818rtc`. Times are in ns of the host's clock
/// since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RtcState {
    /// CMOS memory, the registers of the clock first.
    pub cmos: [u8; 128],
    /// The byte that the data port means.
    pub cmos_index: u8,
    /// The guest's time at `last_update`, in whole seconds since 1970.
    pub base_rtc: u64,
    /// When the guest's time was `base_rtc` and `offset`.
    pub last_update: u64,
    /// Added to the guest's time, ns.
    pub offset: i64,
    /// Period of the periodic interrupt in ticks of 32.768 kHz, 0 if it is off. Follows from the registers.
    pub period: u32,
    /// When it is due next. Follows from the registers.
    pub next_periodic: Option<u64>,
    /// When the next update ends. Follows from the registers.
    pub next_update: Option<u64>,
    /// When the alarm is due, 0 if it never is. Follows from the registers.
    pub next_alarm: u64,
}

impl Default for RtcState {
    fn default() -> RtcState {
        RtcState {
            cmos: [0; 128],
            cmos_index: 0,
            base_rtc: 0,
            last_update: 0,
            offset: 0,
            period: 0,
            next_periodic: None,
            next_update: None,
            next_alarm: 0,
        }
    }
}

/// The firmware configuration device, with the fields of QEMU's section `fw_cfg`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FwCfgState {
    /// Selected key.
    pub cur_entry: u16,
    /// Bytes of the item read.
    pub cur_offset: u32,
    /// DMA address, half of it written.
    pub dma_addr: u64,
}

/// The generic event device, with the field of QEMU's section `acpi-ged`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GedState {
    /// Pending events.
    pub sel: u32,
}
