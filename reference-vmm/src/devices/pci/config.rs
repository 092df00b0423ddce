//! The configuration space of a PCI function (PCI Local Bus Specification 3.0, chapter 6), without I/O: what a guest
//! reads and can write, where that puts the BARs, and which kind of interrupt it has turned on.

use super::PciError;
use super::msi::Msi;
use std::ops::Range;

/// Offsets in the header of a function.
pub mod register {
    /// Vendor, 2 bytes.
    pub const VENDOR_ID: usize = 0x00;
    /// Device, 2 bytes.
    pub const DEVICE_ID: usize = 0x02;
    /// Command, 2 bytes: see [`command`](super::command).
    pub const COMMAND: usize = 0x04;
    /// Status, 2 bytes.
    pub const STATUS: usize = 0x06;
    /// Revision, 1 byte.
    pub const REVISION: usize = 0x08;
    /// Programming interface, sub-class, class: 3 bytes.
    pub const CLASS: usize = 0x09;
    /// Cache line size, 1 byte.
    pub const CACHE_LINE: usize = 0x0c;
    /// Kind of header, 1 byte: bit 7 says that there are more functions.
    pub const HEADER_TYPE: usize = 0x0e;
    /// First of six BARs of 4 bytes.
    pub const BARS: usize = 0x10;
    /// Vendor of the subsystem, 2 bytes.
    pub const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
    /// Subsystem, 2 bytes.
    pub const SUBSYSTEM_ID: usize = 0x2e;
    /// Address of the option ROM, 4 bytes.
    pub const ROM: usize = 0x30;
    /// Offset of the first capability, 1 byte.
    pub const CAPABILITIES: usize = 0x34;
    /// Where the interrupt goes, for the guest to remember: 1 byte.
    pub const INTERRUPT_LINE: usize = 0x3c;
    /// Interrupt pin, 1 byte: 0 is none, 1 INTA.
    pub const INTERRUPT_PIN: usize = 0x3d;
}

/// Bits of the command register.
pub mod command {
    /// I/O BARs are decoded.
    pub const IO: u16 = 1 << 0;
    /// Memory BARs are decoded.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may write to memory, and so send messages.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// System errors are reported.
    pub const SERR: u16 = 1 << 8;
    /// INTx is not driven.
    pub const INTX_DISABLE: u16 = 1 << 10;
    /// What a guest can write.
    pub const WRITABLE: u16 = IO | MEMORY | BUS_MASTER | SERR | INTX_DISABLE;
}

/// Status: the function's INTx line is up.
pub(super) const STATUS_INTERRUPT: u16 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Bytes of the header; what follows is the function's own.
pub(super) const HEADER: usize = 0x40;
pub(super) const CONVENTIONAL: usize = 256;
pub(super) const EXPRESS: usize = 4096;
pub(super) const BARS: usize = 6;
/// Smallest memory BAR and I/O BAR.
const SMALLEST_MEMORY: u64 = 16;
const SMALLEST_IO: u64 = 4;
const BAR_IO: u32 = 1 << 0;
const BAR_64_BIT: u32 = 1 << 2;
const BAR_PREFETCHABLE: u32 = 1 << 3;

/// Who a function says it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of the specification
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
    /// Class, sub-class, programming interface, in this order from the most significant byte.
    pub class: u32,
    pub revision: u8,
    /// 0 for none, 1 to 4 for INTA to INTD.
    pub interrupt_pin: u8,
}

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32 {
        /// Reading has no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere; takes the BAR after it, too.
    Memory64 {
        /// Reading has no side effects.
        prefetchable: bool,
    },
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    kind: BarKind,
    size: u64,
}

/// What a write to the configuration space may have changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The command register: what is decoded, bus mastering, INTx.
    pub command: bool,
    /// The address of a BAR.
    pub bars: bool,
    /// The MSI capability: control, address, data or mask.
    pub msi: bool,
    /// Control of the MSI-X capability.
    pub msix: bool,
}

/// A function's configuration space.
///
/// ```
/// use reference_vmm::devices::pci::{BarKind, ConfigSpace, Identity, command, register};
/// let mut config = ConfigSpace::new(&Identity { vendor: 0x1234, device: 0x11e8, ..Identity::default() }, true);
/// config.add_bar(0, BarKind::Memory32 { prefetchable: false }, 4096)?;
/// config.write(register::BARS, &u32::MAX.to_le_bytes()); // a guest asks for the size
/// assert_eq!(config.u32(register::BARS), 0xffff_f000);
/// config.write(register::BARS, &0xc000_0000_u32.to_le_bytes());
/// assert_eq!(config.bar(0), None); // not decoded yet
/// let changes = config.write(register::COMMAND, &command::MEMORY.to_le_bytes());
/// assert!(changes.command);
/// assert_eq!(config.bar(0), Some(0xc000_0000..0xc000_1000));
/// # Ok::<(), reference_vmm::devices::pci::PciError>(())
/// ```
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    pub(super) bytes: Vec<u8>,
    /// Bits that the guest can write.
    pub(super) writable: Vec<u8>,
    bars: [Option<Bar>; BARS],
    /// Where the capabilities are.
    pub(super) capabilities: Vec<Range<usize>>,
    pub(super) msi: Option<Msi>,
    /// Where the MSI-X capability is.
    pub(super) msix: Option<usize>,
}

impl ConfigSpace {
    /// That of a function with one header of type 0 and no capabilities: 4096 bytes if it is PCI Express, 256 if not.
    /// As in QEMU, what is after the header and in no capability of the first 256 bytes keeps what the guest writes
    /// there.
    pub fn new(identity: &Identity, express: bool) -> ConfigSpace {
        use register::{CACHE_LINE, CLASS, COMMAND, DEVICE_ID, INTERRUPT_LINE, INTERRUPT_PIN};
        use register::{REVISION, SUBSYSTEM_ID, SUBSYSTEM_VENDOR_ID, VENDOR_ID};
        let size = if express { EXPRESS } else { CONVENTIONAL };
        let (mut bytes, mut writable) = (vec![0; size], vec![0; size]);
        let words = [
            (VENDOR_ID, identity.vendor),
            (DEVICE_ID, identity.device),
            (SUBSYSTEM_VENDOR_ID, identity.subsystem_vendor),
            (SUBSYSTEM_ID, identity.subsystem),
        ];
        words.iter().for_each(|(at, word)| bytes[*at..at + 2].copy_from_slice(&word.to_le_bytes()));
        bytes[REVISION] = identity.revision;
        bytes[CLASS..CLASS + 3].copy_from_slice(&identity.class.to_le_bytes()[..3]);
        bytes[INTERRUPT_PIN] = identity.interrupt_pin;
        writable[COMMAND..COMMAND + 2].copy_from_slice(&command::WRITABLE.to_le_bytes());
        (writable[CACHE_LINE], writable[INTERRUPT_LINE]) = (0xff, 0xff);
        writable[HEADER..CONVENTIONAL].fill(0xff);
        ConfigSpace { bytes, writable, bars: [None; BARS], capabilities: Vec::new(), msi: None, msix: None }
    }

    /// Adds a BAR of `size` bytes.
    ///
    /// # Errors
    /// [`PciError::Bar`] when there is no such BAR, it is taken, or `size` is not a power of two that such a BAR can
    /// have.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) -> Result<(), PciError> {
        let wide = matches!(kind, BarKind::Memory64 { .. });
        let (smallest, largest) = match kind {
            BarKind::Io => (SMALLEST_IO, 1 << 8),
            BarKind::Memory32 { .. } => (SMALLEST_MEMORY, 1 << 31),
            BarKind::Memory64 { .. } => (SMALLEST_MEMORY, 1 << 63),
        };
        let indices = index..index.saturating_add(1 + usize::from(wide));
        let taken = |at: usize| self.bars.get(at).is_none_or(Option::is_some) || self.is_upper_half(at);
        if index >= BARS
            || indices.clone().any(taken)
            || !size.is_power_of_two()
            || !(smallest..=largest).contains(&size)
        {
            return Err(PciError::Bar { index, size });
        }
        self.bars[index] = Some(Bar { kind, size });
        let at = register::BARS + 4 * index;
        let flags = match kind {
            BarKind::Io => BAR_IO,
            BarKind::Memory32 { prefetchable } => prefetchable_flag(prefetchable),
            BarKind::Memory64 { prefetchable } => BAR_64_BIT | prefetchable_flag(prefetchable),
        };
        self.bytes[at..at + 4].copy_from_slice(&flags.to_le_bytes());
        let mask = (!(size - 1)).to_le_bytes();
        let len = 4 * indices.len();
        self.writable[at..at + len].copy_from_slice(&mask[..len]);
        Ok(())
    }

    /// Whether it is the second half of a BAR of 64 bits.
    fn is_upper_half(&self, index: usize) -> bool {
        let below = index.checked_sub(1).and_then(|below| self.bars.get(below).copied().flatten());
        below.is_some_and(|bar| matches!(bar.kind, BarKind::Memory64 { .. }))
    }

    /// Adds a capability at `at`, a multiple of 4, before those that are there: its bytes without identifier and link.
    /// The guest can write none of them.
    ///
    /// # Errors
    /// [`PciError::Capability`] when there is no room: it lies in the header, beyond the first 256 bytes, or over
    /// another one.
    pub fn add_capability(&mut self, at: usize, id: u8, body: &[u8]) -> Result<(), PciError> {
        let range = at..at.saturating_add(2 + body.len());
        let refused = PciError::Capability { at, id };
        if !at.is_multiple_of(4) || at < HEADER || range.end > CONVENTIONAL {
            return Err(refused);
        }
        let taken = |other: &Range<usize>| other.start < range.end && range.start < other.end;
        if self.capabilities.iter().any(taken) {
            return Err(refused);
        }
        let first = self.bytes[register::CAPABILITIES];
        self.bytes[at..at + 2].copy_from_slice(&[id, first]);
        self.bytes[at + 2..range.end].copy_from_slice(body);
        self.writable[range.clone()].fill(0);
        self.capabilities.push(range);
        self.bytes[register::CAPABILITIES] = at as u8;
        self.bytes[register::STATUS] |= STATUS_CAPABILITIES;
        Ok(())
    }

    /// Adds the MSI capability.
    ///
    /// # Errors
    /// [`PciError::Vectors`] unless there are 1, 2, 4, 8, 16 or 32 vectors; [`PciError::Capability`] when there is no
    /// room, or one already.
    pub fn add_msi(&mut self, msi: Msi) -> Result<(), PciError> {
        if self.msi.is_some() {
            return Err(PciError::Capability { at: msi.at(), id: Msi::ID });
        }
        self.add_capability(msi.at(), Msi::ID, &msi.body())?;
        msi.writable().iter().for_each(|(at, mask)| self.writable[*at] = *mask);
        self.msi = Some(msi);
        Ok(())
    }

    /// Adds the MSI-X capability of a table.
    ///
    /// # Errors
    /// [`PciError::Capability`] when there is no room, or one already.
    pub fn add_msix(&mut self, at: usize, layout: &super::msix::Layout) -> Result<(), PciError> {
        let id = super::msix::ID;
        if self.msix.is_some() {
            return Err(PciError::Capability { at, id });
        }
        self.add_capability(at, id, &layout.body())?;
        self.writable[at + 3] = super::msix::CONTROL_WRITABLE;
        self.msix = Some(at);
        Ok(())
    }

    /// Reads; what is beyond its end is all ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Two bytes; all ones beyond its end.
    pub fn u16(&self, offset: usize) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Four bytes; all ones beyond its end.
    pub fn u32(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// What a write of the guest does. What it cannot write, and what is beyond the end, stays.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Changes {
        let mut changes = Changes::default();
        for (at, new) in (offset..).zip(data) {
            let Some((byte, mask)) = self.bytes.get_mut(at).zip(self.writable.get(at)) else { break };
            let before = *byte;
            *byte = before & !mask | new & mask;
            if *byte == before {
                continue;
            }
            changes.command |= (register::COMMAND..register::STATUS).contains(&at);
            changes.bars |= (register::BARS..register::BARS + 4 * BARS).contains(&at);
            changes.msi |= self.msi.as_ref().is_some_and(|msi| (msi.at()..msi.at() + msi.length()).contains(&at));
            changes.msix |= self.msix.is_some_and(|msix| (msix..msix + super::msix::CAPABILITY).contains(&at));
        }
        changes
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.u16(register::COMMAND)
    }

    /// Shows in the status register whether the INTx line is up.
    pub fn set_interrupt_status(&mut self, level: bool) {
        let others = self.u16(register::STATUS) & !STATUS_INTERRUPT;
        let status = if level { others | STATUS_INTERRUPT } else { others };
        self.bytes[register::STATUS..register::STATUS + 2].copy_from_slice(&status.to_le_bytes());
    }

    /// What a memory BAR decodes; `None` when it is turned off, was given no address, or there is none. One at 0 is not
    /// decoded, nor one that ends at the top of its address space, which is what a guest writes to ask for the size.
    pub fn bar(&self, index: usize) -> Option<Range<u64>> {
        let bar = self.bars.get(index).copied().flatten()?;
        let at = register::BARS + 4 * index;
        let low = u64::from(self.u32(at)) & !0xf;
        let (address, top) = match bar.kind {
            BarKind::Io => return None,
            BarKind::Memory32 { .. } => (low, u64::from(u32::MAX)),
            BarKind::Memory64 { .. } => (low | u64::from(self.u32(at + 4)) << 32, u64::MAX),
        };
        let last = address.checked_add(bar.size - 1)?;
        (self.command() & command::MEMORY != 0 && address != 0 && last < top).then_some(address..last + 1)
    }

    /// Which BAR decodes an address, and where in it that is.
    pub fn decode(&self, address: u64) -> Option<(usize, u64)> {
        let inside = |index: usize| Some((index, self.bar(index).filter(|bar| bar.contains(&address))?));
        (0..BARS).find_map(inside).map(|(index, bar)| (index, address - bar.start))
    }

    /// The MSI capability, and the state that the guest has given it.
    pub fn msi(&self) -> Option<(&Msi, &[u8])> {
        self.msi.as_ref().map(|msi| (msi, &self.bytes[msi.at()..msi.at() + msi.length()]))
    }

    /// Marks vectors of an MSI capability with masks as pending, or no longer.
    pub fn set_msi_pending(&mut self, pending: u32) {
        if let Some(at) = self.msi.as_ref().and_then(Msi::pending_at) {
            self.bytes[at..at + 4].copy_from_slice(&pending.to_le_bytes());
        }
    }

    /// Control of the MSI-X capability: enabled, and all vectors masked; `None` without one.
    pub fn msix_control(&self) -> Option<super::msix::Control> {
        self.msix.map(|at| super::msix::Control::of(self.u16(at + 2)))
    }

    /// Offsets and identifiers of the capabilities, from the first on. A list that goes round ends.
    pub fn capabilities(&self) -> impl Iterator<Item = (usize, u8)> + '_ {
        let next = |at: u8| Some(usize::from(at & !3)).filter(|at| (HEADER..CONVENTIONAL).contains(at));
        let first =
            (self.bytes[register::STATUS] & STATUS_CAPABILITIES != 0).then(|| self.bytes[register::CAPABILITIES]);
        std::iter::successors(first.and_then(next), move |at| next(self.bytes[at + 1]))
            .take((CONVENTIONAL - HEADER) / 4)
            .map(|at| (at, self.bytes[at]))
    }

    /// All of it, as it goes on the wire.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes over what was saved elsewhere.
    ///
    /// # Errors
    /// [`PciError::Size`] when it has another length; [`PciError::ReadOnly`] when it differs where no guest can write,
    /// so that it is another device's. Then nothing has changed.
    pub fn load(&mut self, bytes: &[u8]) -> Result<(), PciError> {
        if bytes.len() != self.bytes.len() {
            return Err(PciError::Size { found: bytes.len(), expected: self.bytes.len() });
        }
        // The status register shows what happens.
        let fixed = |at: usize| match at {
            register::STATUS => STATUS_CAPABILITIES,
            0x07 => 0,
            _ => !self.writable[at],
        };
        let pending = self.msi.as_ref().and_then(Msi::pending_at).map_or(0..0, |at| at..at + 4);
        let differs = |at: &usize| !pending.contains(at) && (bytes[*at] ^ self.bytes[*at]) & fixed(*at) != 0;
        if let Some(at) = (0..bytes.len()).find(differs) {
            return Err(PciError::ReadOnly { at, found: bytes[at], expected: self.bytes[at], mask: fixed(at) });
        }
        self.bytes.copy_from_slice(bytes);
        Ok(())
    }
}

fn prefetchable_flag(prefetchable: bool) -> u32 {
    if prefetchable { BAR_PREFETCHABLE } else { 0 }
}
