//! The PCI Express bus of QEMU's `-M microvm,pcie=on`: the generic host bridge, its memory-mapped configuration space,
//! the two windows for memory BARs, and the four interrupt lines. Addresses are those of `info mtree -f` of QEMU 10.0
//! and 11.1, interrupts those of the tables that they give to their firmware.
//!
//! There is no I/O window and no port 0xcf8: a guest cannot reach I/O BARs. [`ConfigSpace`], [`Msi`] and [`MsixTable`]
//! do no I/O.

mod config;
mod error;
mod host;
mod msi;
mod msix;
mod pages;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use config::{BarKind, Changes, ConfigSpace, Identity, command, register};
pub use error::PciError;
pub use msi::{Msi, PciMessage};
pub use msix::{Control as MsixControl, Layout as MsixLayout, Table as MsixTable};
pub use pages::{BarPages, Window};

use self::pages::Shown;
use qevm_microvm::state::{PciFunctionState, PciState};

/// Where the configuration space of every function is: 4 KiB each.
pub const ECAM: Range<u64> = 0xe000_0000..0xf000_0000;
/// The window for memory BARs below 4 GiB.
pub const LOW_WINDOW: Range<u64> = 0xc000_0000..0xe000_0000;
/// Interrupt lines: INTA to INTD.
pub const LINES: usize = 4;
/// The interrupt of the first line; the others follow.
pub const FIRST_GSI: u32 = 16;
/// Devices that a bus can have, each with one function here.
pub const MOST_DEVICES: usize = 32;

/// Red Hat's "PCIe Host bridge", with the subsystem of all of QEMU's devices. (`docs/format/vfio.md`)
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x06_0000,
    revision: 0,
    interrupt_pin: 0,
};

/// A device of the bus, with one function.
pub trait Function: Send {
    /// Its configuration space.
    fn config(&self) -> &ConfigSpace;

    /// The same, to be changed.
    fn config_mut(&mut self) -> &mut ConfigSpace;

    /// The guest is about to read `len` bytes of the configuration space at `offset`.
    fn refresh(&mut self, _offset: usize, _len: usize) {}

    /// The guest writes this to the configuration space, whether the bits can be written or not.
    fn written(&mut self, _offset: usize, _data: &[u8]) {}

    /// The guest has written to the configuration space, and this is other than it was.
    fn changed(&mut self, _changes: Changes) {}

    /// Pages of its BARs that the guest reaches without the monitor.
    fn pages(&self) -> &[BarPages] {
        &[]
    }

    /// The guest reads from a BAR, other than from its [pages](Function::pages) while they are shown. `data` is all
    /// ones.
    fn bar_read(&mut self, _bar: usize, _offset: u64, _data: &mut [u8]) {}

    /// The guest writes to a BAR, likewise.
    fn bar_write(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}

    /// The configuration space as it goes on the wire.
    fn config_state(&self) -> Vec<u8> {
        self.config().bytes().to_vec()
    }

    /// MSI-X table and pending bits, as they go on the wire; empty without MSI-X.
    fn msix_state(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The level of its interrupt pin, which an access to a BAR may have changed; `None` if accesses do not.
    fn pin(&self) -> Option<bool> {
        None
    }

    /// Its interrupt pin gets to the guest without the bus, which does not hold a line up for it.
    fn has_own_line(&self) -> bool {
        false
    }

    /// Takes over configuration space and MSI-X state of a guest that has come, or has been reset. The machine is
    /// paused.
    ///
    /// # Errors
    /// [`PciError`] when they are another device's.
    fn restore(&mut self, state: &PciFunctionState) -> Result<(), PciError> {
        self.config_mut().load(&state.config)
    }
}

/// A function that has a configuration space and nothing else, as the host bridge has.
#[derive(Debug)]
pub struct ConfigOnly(pub ConfigSpace);

impl Function for ConfigOnly {
    fn config(&self) -> &ConfigSpace {
        &self.0
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.0
    }
}

struct Device {
    /// Its device number.
    number: usize,
    /// What it is on the command line.
    name: String,
    function: Box<dyn Function>,
    /// Whether its INTx is up, by pin, whatever the command register says.
    levels: [bool; LINES],
}

/// What an interrupt line of the bus drives.
pub type Line = Box<dyn FnMut(bool) + Send>;

/// The bus, with the host bridge at 00:00.0.
pub struct PciBus {
    /// Goes before the devices whose pages they are.
    shown: Shown,
    /// The host bridge, and the others in the order in which they were added.
    devices: Vec<Device>,
    lines: [Line; LINES],
    /// For each line, how many devices hold it up.
    counts: [i32; LINES],
    high_window: Range<u64>,
    /// Of port 0xcf8, which microvm does not have: it is kept for the peer.
    config_reg: u32,
}

impl PciBus {
    /// A bus in a guest that has this many bits of physical address, with nothing on it but the host bridge.
    pub fn new(physical_bits: u8, lines: [Line; LINES]) -> PciBus {
        let bridge = ConfigOnly(ConfigSpace::new(&HOST_BRIDGE, false));
        let name = "gpex-root,id=(null)".to_owned();
        let devices = vec![Device { number: 0, name, function: Box::new(bridge), levels: [false; LINES] }];
        let (counts, high_window) = ([0; LINES], high_window(physical_bits));
        PciBus { shown: Shown::default(), devices, lines, counts, high_window, config_reg: 0 }
    }

    /// Lets the guest see the pages of its devices' BARs through this, from now on.
    pub fn show_by(&mut self, window: Box<dyn Window>) {
        self.shown = Shown::by(window);
        self.show();
    }

    /// The number of a device that is to have this one, or the lowest that is free.
    ///
    /// # Errors
    /// [`PciError::Taken`] or [`PciError::Full`].
    pub fn free(&self, wanted: Option<usize>) -> Result<usize, PciError> {
        let at = |number: usize| self.devices.iter().find(|device| device.number == number);
        match wanted {
            None => (0..MOST_DEVICES).find(|number| at(*number).is_none()).ok_or(PciError::Full),
            Some(number) if number >= MOST_DEVICES => Err(PciError::Full),
            Some(number) => match at(number) {
                None => Ok(number),
                Some(other) => Err(PciError::Taken { number, by: other.name.clone() }),
            },
        }
    }

    /// Adds a device at this number, or at the lowest that is free; the number is given back. `id` is its name on the
    /// command line.
    ///
    /// # Errors
    /// As [`free`](PciBus::free).
    pub fn add(
        &mut self,
        wanted: Option<usize>,
        id: Option<&str>,
        function: Box<dyn Function>,
    ) -> Result<usize, PciError> {
        let number = self.free(wanted)?;
        let name = format!("vfio-pci,id={}", id.unwrap_or("(null)"));
        self.devices.push(Device { number, name, function, levels: [false; LINES] });
        Ok(number)
    }

    /// The numbers of the devices beside the host bridge, in the order in which they were added.
    pub fn slots(&self) -> Vec<usize> {
        self.devices[1..].iter().map(|device| device.number).collect()
    }

    /// The window for memory BARs above 4 GiB.
    pub fn high_window(&self) -> Range<u64> {
        self.high_window.clone()
    }

    /// A read of an address; false if it is none of the bus's. What nothing answers is all ones.
    pub fn read(&mut self, gpa: u64, data: &mut [u8]) -> bool {
        if ECAM.contains(&gpa) {
            data.fill(0xff);
            if let Some((function, offset)) = self.function_at(gpa) {
                function.refresh(offset, data.len());
                function.config().read(offset, data);
            }
            return true;
        }
        if !self.in_window(gpa) {
            return false;
        }
        data.fill(0xff);
        if let Some((place, bar, offset)) = self.decode(gpa) {
            self.devices[place].function.bar_read(bar, offset, data);
            self.follow_pin(place);
        }
        true
    }

    /// A write to an address; false if it is none of the bus's.
    pub fn write(&mut self, gpa: u64, data: &[u8]) -> bool {
        if ECAM.contains(&gpa) {
            let changes = self.function_at(gpa).map(|(function, offset)| function.config_mut().write(offset, data));
            if changes.is_some_and(|changes| changes.command || changes.bars) {
                // Before the device knows: what it does not decode any more must not be reached.
                self.show();
            }
            if let Some(((function, offset), changes)) = self.function_at(gpa).zip(changes) {
                function.written(offset, data);
                if changes != Changes::default() {
                    function.changed(changes);
                }
                if changes.command {
                    self.drive();
                }
            }
            return true;
        }
        if !self.in_window(gpa) {
            return false;
        }
        if let Some((place, bar, offset)) = self.decode(gpa) {
            self.devices[place].function.bar_write(bar, offset, data);
            self.follow_pin(place);
        }
        true
    }

    fn follow_pin(&mut self, place: usize) {
        if let Some(level) = self.devices[place].function.pin() {
            self.set_intx(self.devices[place].number, level);
        }
    }

    /// Shows the guest the pages of BARs where it has put them.
    fn show(&mut self) {
        let mut wanted = Vec::new();
        for (place, device) in self.devices.iter().enumerate() {
            for BarPages { bar, offset, pages } in device.function.pages() {
                let at = device.function.config().bar(*bar).and_then(|range| range.start.checked_add(*offset));
                // Where two BARs are at one address, the first one answers.
                let at = at.filter(|gpa| self.decode(*gpa) == Some((place, *bar, *offset)));
                let last = |gpa: u64| gpa.checked_add(pages.len() - 1);
                if let Some(gpa) = at.filter(|gpa| last(*gpa).is_some_and(|last| self.windows(*gpa, last))) {
                    wanted.push((gpa, pages.clone()));
                }
            }
        }
        self.shown.set(wanted);
    }

    /// Whether all of this lies in one window.
    fn windows(&self, first: u64, last: u64) -> bool {
        [&LOW_WINDOW, &self.high_window].iter().any(|window| window.contains(&first) && window.contains(&last))
    }

    /// A device raises or lowers its interrupt pin; one without a pin has none to raise.
    pub fn set_intx(&mut self, number: usize, level: bool) {
        let Some(device) = self.devices.iter_mut().find(|device| device.number == number) else { return };
        let mut pin = [0];
        device.function.config().read(register::INTERRUPT_PIN, &mut pin);
        let Some(at) = usize::from(pin[0]).checked_sub(1).and_then(|pin| device.levels.get_mut(pin)) else { return };
        *at = level;
        device.function.config_mut().set_interrupt_status(level);
        self.drive();
    }

    /// Counts who holds the lines up, and drives those that change.
    fn drive(&mut self) {
        let counts = self.count();
        for (line, (now, before)) in self.lines.iter_mut().zip(counts.iter().zip(self.counts)) {
            if (*now > 0) != (before > 0) {
                line(*now > 0);
            }
        }
        self.counts = counts;
    }

    fn count(&self) -> [i32; LINES] {
        let mut counts = [0; LINES];
        for device in &self.devices {
            if device.function.config().command() & command::INTX_DISABLE != 0 {
                continue;
            }
            let up = device.levels.iter().enumerate().filter(|(_, level)| **level);
            up.for_each(|(pin, _)| counts[line_of(device.number, pin)] += 1);
        }
        counts
    }

    fn in_window(&self, gpa: u64) -> bool {
        self.windows(gpa, gpa)
    }

    /// The place of the device, its BAR and the offset in it that an address is.
    fn decode(&self, gpa: u64) -> Option<(usize, usize, u64)> {
        self.devices.iter().enumerate().find_map(|(place, device)| {
            let (bar, offset) = device.function.config().decode(gpa)?;
            Some((place, bar, offset))
        })
    }

    /// The function whose configuration space is at an address, if there is one, and where in it that is.
    fn function_at(&mut self, gpa: u64) -> Option<(&mut dyn Function, usize)> {
        let offset = (gpa - ECAM.start) as usize;
        let (bus, number, function) = (offset >> 20, offset >> 15 & 31, offset >> 12 & 7);
        let here = |device: &&mut Device| bus == 0 && function == 0 && device.number == number;
        let device = self.devices.iter_mut().find(here)?;
        Some((&mut *device.function, offset & 0xfff))
    }

    /// The functions, and what the lines count.
    pub fn save(&self) -> PciState {
        let save = |Device { number, function, levels, .. }: &Device| PciFunctionState {
            slot: *number,
            config: function.config_state(),
            levels: *levels,
            msix: function.msix_state(),
        };
        PciState {
            bridge: save(&self.devices[0]),
            functions: self.devices[1..].iter().map(save).collect(),
            config_reg: self.config_reg,
            counts: self.counts,
        }
    }

    /// Takes over the functions, after the interrupt controllers.
    ///
    /// # Errors
    /// [`PciError`] when it is another device's state, or the counts do not agree with the levels.
    pub fn load(&mut self, state: &PciState) -> Result<(), PciError> {
        let states = std::iter::once(&state.bridge).chain(&state.functions);
        for (device, state) in self.devices.iter_mut().zip(states) {
            device.function.restore(state)?;
            device.levels = state.levels;
        }
        self.config_reg = state.config_reg;
        self.counts = self.count();
        let mut counts = self.counts.into_iter().zip(state.counts).enumerate();
        if let Some((line, (expected, found))) = counts.find(|(_, (expected, found))| expected != found) {
            return Err(PciError::Count { line, found, expected });
        }
        // Such a device raises its interrupt by itself, if it still has one.
        let own = self.devices.iter_mut().filter(|device| device.function.has_own_line());
        own.for_each(|device| device.levels = [false; LINES]);
        self.counts = self.count();
        // The controllers know nothing of what their pins were before.
        self.lines.iter_mut().zip(self.counts).for_each(|(line, count)| line(count > 0));
        self.show();
        Ok(())
    }
}

/// The topmost quarter of the physical addresses.
fn high_window(physical_bits: u8) -> Range<u64> {
    let end = 1 << physical_bits.clamp(34, 52);
    end / 4 * 3..end
}

/// The line of a device's pin; 0 is INTA.
pub(crate) fn line_of(device: usize, pin: usize) -> usize {
    (device + pin) % LINES
}
