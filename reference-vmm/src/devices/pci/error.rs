//! What can be wrong with a function of the bus, or with its state.

/// Why a function cannot be made, or cannot take a state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PciError {
    /// There is no such BAR, it is taken, or it cannot have this size or offset.
    #[error("BAR {index} cannot be: it is taken, there is none, or {size:#x} is no size or offset that it can have")]
    Bar {
        /// The BAR.
        index: usize,
        /// Its size, or an offset in it.
        size: u64,
    },
    /// There is no room for a capability.
    #[error("capability {id:#x} cannot be at {at:#x} of the configuration space")]
    Capability {
        /// Its offset.
        at: usize,
        /// Its identifier.
        id: u8,
    },
    /// No function has this many vectors.
    #[error("{0} vectors: wanted 1, 2, 4, 8, 16 or 32 for MSI, 1 to 2048 for MSI-X")]
    Vectors(u32),
    /// All devices of the bus are there. The text is QEMU's.
    #[error("PCI: no slot/function available for vfio-pci, all in use or reserved")]
    Full,
    /// There is another device at this number. The text is QEMU's.
    #[error("PCI: slot {number} function 0 not available for vfio-pci, in use by {by}")]
    Taken {
        /// The number.
        number: usize,
        /// What is there.
        by: String,
    },
    /// A state has another length.
    #[error("the state has {found} bytes: expected {expected}")]
    Size {
        /// Its length.
        found: usize,
        /// The device's.
        expected: usize,
    },
    /// A state is another device's: it differs where no guest can write.
    #[error(
        "the source has another device: byte {at:#x} of its configuration space is {found:#04x}, expected {expected:#04x} in the bits {mask:#04x}"
    )]
    ReadOnly {
        /// Offset in the configuration space.
        at: usize,
        /// What was found there.
        found: u8,
        /// What the device has.
        expected: u8,
        /// The bits that must agree.
        mask: u8,
    },
    /// The count of a line is not what the levels of the devices make.
    #[error("line {line} of the PCI bus is held up by {found} devices: the levels of the devices say {expected}")]
    Count {
        /// 0 for INTA at device 0, and so on.
        line: usize,
        /// What was found.
        found: i32,
        /// What the levels say.
        expected: i32,
    },
}
