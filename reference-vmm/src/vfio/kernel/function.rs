//! What the guest sees of a device: its configuration space with BARs and interrupts of its own, and all else as the
//! device has it.

use super::HostDeviceError;
use super::ioctl::{self, Region};
use super::irq::{Interrupts, Kind};
use crate::devices::pci::{
    BarKind, BarPages, Changes, ConfigSpace, Function, MsixLayout, MsixTable, PciError, PciMessage, register,
};
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, PAGE_SIZE, SharedPages};
use qevm_microvm::state::PciFunctionState;
use rustix::io::Errno;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;
use vfio_ioctls::VfioDevice;

/// Bytes of a function's configuration space.
const EXPRESS: u64 = 4096;
const BARS: usize = 6;
const BAR_IO: u32 = 1 << 0;
const BAR_64_BIT: u32 = 1 << 2;
const BAR_PREFETCHABLE: u32 = 1 << 3;
const CONFIG: usize = VFIO_PCI_CONFIG_REGION_INDEX as usize;

/// A device of the host on the bus.
pub(super) struct KernelFunction {
    name: String,
    config: ConfigSpace,
    msix: Option<(MsixLayout, MsixTable)>,
    /// What was on when the guest last wrote: messages of this kind, and how many.
    on: Option<(Kind, usize)>,
    /// A failed access was told of.
    told: bool,
    /// Goes before the device, whose file it keeps open.
    pages: Vec<BarPages>,
    interrupts: Interrupts,
    regions: Regions,
    /// Goes after the device, which reaches it.
    _memory: Arc<GuestMemory>,
}

impl KernelFunction {
    /// `interrupts` gets to know whether the device has a pin.
    pub(super) fn new(
        name: String,
        device: Arc<VfioDevice>,
        memory: Arc<GuestMemory>,
        interrupts: impl FnOnce(Option<usize>) -> Interrupts,
    ) -> Result<KernelFunction, HostDeviceError> {
        let regions = Regions::new(device)?;
        let mut bytes = vec![0; regions.of(CONFIG).size.min(EXPRESS) as usize];
        let refused = |errno| HostDeviceError::Refused { what: "show its configuration space", errno };
        regions.read(CONFIG, 0, &mut bytes).map_err(refused)?;
        let mut config = ConfigSpace::of_device(&bytes)?;
        bytes.resize(bytes.len().max(register::BARS + 4 * BARS), 0);
        let mut memory_bars = Vec::new();
        for bar in 0..BARS {
            let size = regions.of(bar).size;
            if size == 0 {
                continue;
            }
            let at = register::BARS + 4 * bar;
            let flags = bytes[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
            let prefetchable = flags & BAR_PREFETCHABLE != 0;
            let kind = match flags {
                flags if flags & BAR_IO != 0 => BarKind::Io,
                flags if flags & BAR_64_BIT != 0 => BarKind::Memory64 { prefetchable },
                _ => BarKind::Memory32 { prefetchable },
            };
            config.add_bar(bar, kind, size)?;
            if kind != BarKind::Io {
                memory_bars.push(bar);
            }
        }
        let msix = match config.msix_layout() {
            Some(layout) => Some((layout, MsixTable::new(layout.vectors())?)),
            None => None,
        };
        let pin = usize::from(config.bytes()[register::INTERRUPT_PIN]).checked_sub(1);
        let mut interrupts = interrupts(pin);
        interrupts.begin_intx().map_err(|error| HostDeviceError::Interrupts(Box::new(error)))?;
        let layout = msix.as_ref().map(|(layout, _)| *layout);
        let pages = memory_bars.into_iter().flat_map(|bar| regions.pages(bar, &name, layout)).collect();
        Ok(KernelFunction { name, config, msix, on: None, told: false, pages, interrupts, regions, _memory: memory })
    }

    fn tell(&mut self, what: &str, errno: Errno) {
        if !std::mem::replace(&mut self.told, true) {
            tracing::error!(device = self.name, %errno, "the device refuses to {what}; this is told once");
        }
    }

    /// Brings the kernel's interrupts to what the guest has turned on.
    fn interrupt_by(&mut self) {
        if let Err(error) = self.try_interrupt_by() {
            tracing::error!(device = self.name, %error, "the device's interrupts are lost");
        }
    }

    fn try_interrupt_by(&mut self) -> Result<(), Error> {
        let msix = self.config.msix_control().filter(|control| control.enabled).zip(self.msix.as_ref());
        let (kind, messages): (_, Vec<Option<PciMessage>>) = if let Some((control, (_, table))) = msix {
            let message = |vector| (!table.is_masked(vector, control)).then(|| table.message(vector));
            (Some(Kind::MsiX), (0..table.vectors()).map(message).collect())
        } else if let Some((msi, bytes)) = self.config.msi().filter(|(msi, bytes)| msi.is_enabled(bytes)) {
            let message = |vector| msi.message(bytes, vector).filter(|_| !msi.is_masked(bytes, vector));
            (Some(Kind::Msi), (0..msi.used(bytes)).map(message).collect())
        } else {
            (None, Vec::new())
        };
        let wanted = kind.map(|kind| (kind, messages.len()));
        if wanted != self.on {
            self.on = None;
            match wanted {
                Some((kind, count)) => self.interrupts.begin(kind, count)?,
                None => {
                    self.interrupts.end()?;
                    self.interrupts.begin_intx()?;
                }
            }
            self.on = wanted;
        }
        messages.into_iter().enumerate().try_for_each(|(vector, message)| self.interrupts.set(vector, message))
    }

    /// The table of vectors with what waits in the kernel, too.
    fn table(&self) -> Option<MsixTable> {
        let (_, table) = self.msix.as_ref()?;
        let mut table = table.clone();
        let Some((Kind::MsiX, count)) = self.on else { return Some(table) };
        for vector in (0..count).filter(|vector| self.interrupts.is_pending(*vector)) {
            table.set_pending(vector);
        }
        Some(table)
    }

    /// Which part of the table of vectors or of their pending bits an access to a BAR is for.
    fn table_at(&self, bar: usize, offset: u64, len: usize) -> Option<(Part, u64)> {
        let (layout, _) = self.msix.as_ref()?;
        let end = offset.checked_add(len as u64)?;
        let within = |(of, range): (usize, Range<u64>)| {
            (of == bar && offset >= range.start && end <= range.end).then(|| offset - range.start)
        };
        let [entries, pending] = tables(*layout);
        let entries = within(entries).map(|at| (Part::Entries, at));
        entries.or_else(|| within(pending).map(|at| (Part::Pending, at)))
    }
}

/// The table of vectors and their pending bits: the BAR, and where in it.
fn tables(layout: MsixLayout) -> [(usize, Range<u64>); 2] {
    let vectors = u64::from(layout.vectors());
    let range = |(bar, start): (u8, u32), len: u64| (usize::from(bar), u64::from(start)..u64::from(start) + len);
    [range(layout.table(), vectors * 16), range(layout.pending(), vectors.div_ceil(64) * 8)]
}

/// Parts of what MSI-X has in BARs.
enum Part {
    Entries,
    Pending,
}

impl Function for KernelFunction {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn refresh(&mut self, offset: usize, len: usize) {
        let there = self.regions.of(CONFIG).size.saturating_sub(offset as u64).min(len as u64);
        if there == 0 {
            return;
        }
        let mut bytes = vec![0; there as usize];
        match self.regions.read(CONFIG, offset as u64, &mut bytes) {
            Ok(()) => self.config.show(offset, &bytes),
            Err(errno) => self.tell("show its configuration space", errno),
        }
    }

    fn written(&mut self, offset: usize, data: &[u8]) {
        let there = self.regions.of(CONFIG).size.saturating_sub(offset as u64).min(data.len() as u64);
        if there == 0 {
            return;
        }
        // The kernel's driver keeps from the device what is not for a guest to write.
        if let Err(errno) = self.regions.write(CONFIG, offset as u64, &data[..there as usize]) {
            self.tell("take what is written to its configuration space", errno);
        }
    }

    fn changed(&mut self, changes: Changes) {
        if changes.msi || changes.msix {
            self.interrupt_by();
        }
    }

    fn pages(&self) -> &[BarPages] {
        &self.pages
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        if let Some(((part, at), table)) = self.table_at(bar, offset, data.len()).zip(self.table()) {
            return match part {
                Part::Entries => table.read(at, data),
                Part::Pending => table.read_pending(at, data),
            };
        }
        if let Err(errno) = self.regions.read(bar, offset, data) {
            data.fill(0xff);
            self.tell("be read", errno);
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        match self.table_at(bar, offset, data.len()) {
            Some((Part::Entries, at)) => {
                if let Some(((_, table), control)) = self.msix.as_mut().zip(self.config.msix_control()) {
                    // What waits does so in the kernel.
                    table.write(at, data, control);
                    self.interrupt_by();
                }
            }
            Some((Part::Pending, _)) => {}
            None => {
                if let Err(errno) = self.regions.write(bar, offset, data) {
                    self.tell("be written to", errno);
                }
            }
        }
    }

    fn has_own_line(&self) -> bool {
        true
    }

    fn config_state(&self) -> Vec<u8> {
        let mut config = self.config.clone();
        if let Some((Kind::Msi, count)) = self.on {
            let pending = (0..count).filter(|vector| self.interrupts.is_pending(*vector));
            config.set_msi_pending(pending.fold(0, |bits, vector| bits | 1 << vector));
        }
        config.bytes().to_vec()
    }

    fn msix_state(&self) -> Vec<u8> {
        self.table().map(|table| table.save()).unwrap_or_default()
    }

    fn restore(&mut self, state: &PciFunctionState) -> Result<(), PciError> {
        self.config.load(&state.config)?;
        let mut pending = Vec::new();
        if let Some((_, table)) = &mut self.msix {
            table.load(&state.msix)?;
            pending = table.take_pending();
        }
        if let Some((msi, bytes)) = self.config.msi().filter(|(msi, bytes)| msi.is_enabled(bytes)) {
            let bits = msi.pending(bytes);
            pending = (0..msi.used(bytes) as usize).filter(|vector| bits & 1 << vector != 0).collect();
        }
        self.config.set_msi_pending(0);
        let command = self.config.command().to_le_bytes();
        self.written(register::COMMAND, &command);
        self.interrupt_by();
        pending.into_iter().for_each(|vector| self.interrupts.raise(vector));
        self.interrupts.unmask();
        Ok(())
    }
}

/// The regions of a device, by number.
struct Regions {
    regions: [Region; CONFIG + 1],
    device: Arc<VfioDevice>,
}

impl Regions {
    fn new(device: Arc<VfioDevice>) -> Result<Regions, HostDeviceError> {
        let mut regions = std::array::from_fn(|_| Region::default());
        for (index, region) in (0..).zip(&mut regions) {
            let refused = |errno| HostDeviceError::Refused { what: "describe a region of its", errno };
            *region = ioctl::region(&*device, index).map_err(refused)?;
        }
        Ok(Regions { regions, device })
    }

    fn of(&self, index: usize) -> &Region {
        &self.regions[index]
    }

    /// The pages of a BAR that the guest may reach by itself.
    fn pages(&self, bar: usize, name: &str, msix: Option<MsixLayout>) -> Vec<BarPages> {
        let region = self.of(bar);
        let tables = msix.into_iter().flat_map(tables).filter(|(of, _)| *of == bar).map(|(_, range)| range);
        let mut mapped = Vec::new();
        for area in whole_pages(region, &tables.collect::<Vec<_>>()) {
            let Range { start: offset, end } = area;
            let file = self.fd().try_clone_to_owned().map(File::from);
            match file.and_then(|file| SharedPages::map(&file, region.offset.saturating_add(offset), end - offset)) {
                Ok(pages) => mapped.push(BarPages { bar, offset, pages: Arc::new(pages) }),
                Err(error) => {
                    tracing::warn!(device = name, bar, %error, "a BAR cannot be mapped, accesses are trapped")
                }
            }
        }
        mapped
    }

    fn read(&self, index: usize, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let at = place(self.of(index), offset, data.len())?;
        whole(rustix::io::pread(self.fd(), &mut *data, at)?, data.len())
    }

    fn write(&self, index: usize, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let at = place(self.of(index), offset, data.len())?;
        whole(rustix::io::pwrite(self.fd(), data, at)?, data.len())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the device has the descriptor open as long as it lives, and the result borrows it.
        unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) }
    }
}

fn whole(done: usize, wanted: usize) -> Result<(), Errno> {
    if done == wanted { Ok(()) } else { Err(Errno::IO) }
}

/// The whole pages of what can be mapped of a region, without those that have tables of MSI-X in them.
fn whole_pages(region: &Region, tables: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut pieces = Vec::new();
    let mut tables: Vec<_> = tables.iter().collect();
    tables.sort_by_key(|table| table.start);
    for area in &region.mappable {
        let Some(mut start) = area.start.checked_next_multiple_of(PAGE_SIZE) else { continue };
        let end = area.end.min(region.size) / PAGE_SIZE * PAGE_SIZE;
        for table in &tables {
            let (first, after) = (table.start / PAGE_SIZE * PAGE_SIZE, table.end.next_multiple_of(PAGE_SIZE));
            pieces.push(start..first.min(end));
            start = start.max(after);
        }
        pieces.push(start..end);
    }
    pieces.retain(|piece| piece.start < piece.end);
    pieces
}

/// Where in the device's file a piece of a region is.
fn place(region: &Region, offset: u64, len: usize) -> Result<u64, Errno> {
    let end = offset.checked_add(len as u64).filter(|end| *end <= region.size);
    end.and_then(|_| region.offset.checked_add(offset)).ok_or(Errno::RANGE)
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // pieces of a region, of which there may be one
mod tests {
    use super::*;

    #[test]
    fn an_access_stays_within_its_region() {
        let region = |size: u64, offset: u64| Region { size, offset, mappable: Vec::new() };
        let (page, all) = (region(0x1000, 3 << 40), region(u64::MAX, 16));
        assert_eq!(place(&page, 0xffc, 4), Ok((3 << 40) + 0xffc));
        for (offset, len) in [(0xffd, 4), (0x1000, 1), (u64::MAX, 1), (u64::MAX - 1, 4)] {
            assert_eq!(place(&page, offset, len), Err(Errno::RANGE), "{offset:#x}");
        }
        assert_eq!(place(&all, u64::MAX - 8, 4), Err(Errno::RANGE));
        assert_eq!((whole(4, 4), whole(3, 4)), (Ok(()), Err(Errno::IO)));
    }

    #[test]
    fn pages_with_tables_of_msix_are_left_out() {
        let pages = |mappable: &[Range<u64>], tables: &[Range<u64>]| {
            whole_pages(&Region { size: 0x8000, offset: 0, mappable: mappable.to_vec() }, tables)
        };
        assert_eq!(pages(&[0..0x8000], &[]), [0..0x8000]);
        assert_eq!(pages(&[0..0x8000], &[0x5800..0x5808, 0x2000..0x2040]), [0..0x2000, 0x3000..0x5000, 0x6000..0x8000]);
        assert_eq!(pages(&[0..0x8000], &[0..0x10, 0x7ff0..0x8010]), [0x1000..0x7000]);
        assert_eq!(pages(&[0..0x1000], &[0..0x40, 0x800..0x808]), []);
        // Beyond its end, and no whole pages.
        assert_eq!(
            pages(&[0..0x1000, 0x2100..0x4fff, 0x7000..0x9000], &[]),
            [0..0x1000, 0x3000..0x4000, 0x7000..0x8000]
        );
        assert_eq!(pages(&[0x2100..0x2f00, u64::MAX - 1..u64::MAX], &[]), []);
    }
}
