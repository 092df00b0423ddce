//! Section `i8259`: an interrupt controller of the PC's pair.

use qevm_savevm::vmstate::VmState;

/// One 8259, section `i8259` version 1: instance 0 is the master, 1 the slave. (`docs/format/microvm-devices.md`,
/// i8259)
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "i8259", version = 1)]
pub struct I8259 {
    /// Levels of the input lines when they were last seen, for edge detection.
    pub last_irr: u8,
    /// Interrupt requests.
    pub irr: u8,
    /// Interrupt mask.
    pub imr: u8,
    /// In-service bits.
    pub isr: u8,
    /// The line with the highest priority.
    pub priority_add: u8,
    /// Vector of line 0.
    pub irq_base: u8,
    /// Which register a read gives.
    pub read_reg_select: u8,
    /// Poll mode.
    pub poll: u8,
    /// Special mask mode.
    pub special_mask: u8,
    /// Which initialisation word comes next.
    pub init_state: u8,
    /// Automatic end of interrupt.
    pub auto_eoi: u8,
    /// Rotate on automatic end of interrupt.
    pub rotate_on_auto_eoi: u8,
    /// Special fully nested mode.
    pub special_fully_nested_mode: u8,
    /// A fourth initialisation word comes.
    pub init4: u8,
    /// A single 8259, no cascade.
    pub single_mode: u8,
    /// Edge or level, a bit for each line.
    pub elcr: u8,
    /// Subsection `i8259/ltim`; seen in 10.0 and 11.1, not in 7.2.
    #[vmstate(subsection, since_release = "8.0")]
    pub ltim: Option<Ltim>,
}

/// Subsection `i8259/ltim`: all lines are level triggered.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "i8259/ltim", version = 1, needed = |ltim, _| ltim.ltim != 0)]
pub struct Ltim {
    /// Bit LTIM of the first initialisation word.
    pub ltim: u8,
}
