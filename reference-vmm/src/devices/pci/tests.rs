use super::*;
use crate::memory::SharedPages;
use parking_lot::Mutex;
use proptest::prelude::*;
use std::sync::Arc;

/// The section `gpex_root` of QEMU 10.0.13 and 11.1.3 for `-M microvm,pcie=on`, as far as it is not zero.
const QEMU_BRIDGE: [(usize, &[u8]); 2] =
    [(0, &[0x36, 0x1b, 8, 0, 0, 0, 0, 0, 0, 0, 0, 6]), (0x2c, &[0xf4, 0x1a, 0, 0x11])];

/// A device with memory BARs of both sizes, whose registers are what was written last.
struct Registers {
    config: ConfigSpace,
    pages: Vec<BarPages>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Function for Registers {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }
    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn pages(&self) -> &[BarPages] {
        &self.pages
    }
    fn changed(&mut self, changes: Changes) {
        self.log.lock().push(format!("{changes:?}"));
    }
    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(bar as u8 ^ offset as u8);
    }
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        self.log.lock().push(format!("{bar}+{offset:#x}={data:?}"));
    }
}

fn space(pin: u8) -> ConfigSpace {
    let identity =
        Identity { vendor: 0x1234, device: 0x11e8, class: 0xff_0000, interrupt_pin: pin, ..Identity::default() };
    let mut config = ConfigSpace::new(&identity, true);
    config.add_bar(0, BarKind::Memory32 { prefetchable: false }, 0x1000).unwrap();
    config.add_bar(2, BarKind::Memory64 { prefetchable: true }, 1 << 33).unwrap();
    config
}

type Levels = Arc<Mutex<[bool; LINES]>>;

fn bus() -> (PciBus, Levels) {
    let levels = Levels::default();
    let lines = std::array::from_fn(|line| {
        let levels = levels.clone();
        Box::new(move |level| levels.lock()[line] = level) as Line
    });
    (PciBus::new(40, lines), levels)
}

fn add(
    bus: &mut PciBus,
    wanted: Option<usize>,
    id: Option<&str>,
    config: ConfigSpace,
    log: &Arc<Mutex<Vec<String>>>,
) -> Result<usize, PciError> {
    bus.add(wanted, id, Box::new(Registers { config, pages: Vec::new(), log: log.clone() }))
}

fn read(bus: &mut PciBus, gpa: u64) -> u32 {
    let mut data = [0; 4];
    assert!(bus.read(gpa, &mut data), "{gpa:#x} is not the bus's");
    u32::from_le_bytes(data)
}

fn config_of(device: u64) -> u64 {
    ECAM.start + (device << 15)
}

#[test]
fn the_bridge_is_qemus() {
    let (bus, _) = bus();
    let mut expected = vec![0; 256];
    QEMU_BRIDGE.iter().for_each(|(at, bytes)| expected[*at..at + bytes.len()].copy_from_slice(bytes));
    assert_eq!(bus.save().bridge.config, expected);
}

/// As read and written by qtest in QEMU 10.0.13 and 11.1.3.
#[test]
fn the_bridges_registers_behave_as_qemus() {
    let (mut bus, _) = bus();
    let base = config_of(0);
    let ones_then_zeros = |bus: &mut PciBus, at: u64| {
        bus.write(base + at, &u32::MAX.to_le_bytes());
        let ones = read(bus, base + at);
        bus.write(base + at, &[0; 4]);
        (ones, read(bus, base + at))
    };
    for (at, expected) in [
        (0x00, (0x0008_1b36, 0x0008_1b36)),
        (0x04, (0x0000_0507, 0)),
        (0x08, (0x0600_0000, 0x0600_0000)),
        (0x0c, (0x0000_00ff, 0)),
        (0x10, (0, 0)),
        (0x2c, (0x1100_1af4, 0x1100_1af4)),
        (0x30, (0, 0)),
        (0x34, (0, 0)),
        (0x3c, (0x0000_00ff, 0)),
        (0x40, (u32::MAX, 0)),
        (0xfc, (u32::MAX, 0)),
        (0x100, (u32::MAX, u32::MAX)),
    ] {
        assert_eq!(ones_then_zeros(&mut bus, at), expected, "{at:#x}");
    }
    // Parts of registers, unaligned, and 8 bytes at once.
    let mut byte = [0];
    bus.read(base + 1, &mut byte);
    assert_eq!((byte, read(&mut bus, base + 1)), ([0x1b], 0x0000_081b));
    let mut eight = [0; 8];
    bus.read(base, &mut eight);
    assert_eq!(u64::from_le_bytes(eight), 0x0008_1b36);
    // No such device, function or bus; nothing in the windows.
    for nothing in [config_of(5), base + 0x1000, base + 0x10_0000, LOW_WINDOW.start, 0xc0_0000_0000, 0xff_ffff_fffc] {
        assert_eq!(read(&mut bus, nothing), u32::MAX, "{nothing:#x}");
    }
    for other in [LOW_WINDOW.start - 4, ECAM.end, 0xbf_ffff_fffc, 0x100_0000_0000] {
        assert!(!bus.read(other, &mut [0; 4]) && !bus.write(other, &[0; 4]), "{other:#x}");
    }
}

#[test]
fn bars_move_and_are_reached_where_the_guest_has_put_them() {
    let (mut bus, _) = bus();
    let log = Arc::new(Mutex::new(Vec::new()));
    assert_eq!(add(&mut bus, None, None, space(1), &log), Ok(1));
    let base = config_of(1);
    let set = |bus: &mut PciBus, at: u64, value: u32| bus.write(base + at, &value.to_le_bytes());
    assert_eq!((read(&mut bus, base + 0x10), read(&mut bus, base + 0x18)), (0, 0xc));
    set(&mut bus, 0x18, u32::MAX);
    set(&mut bus, 0x1c, u32::MAX);
    assert_eq!((read(&mut bus, base + 0x18), read(&mut bus, base + 0x1c)), (0xc, 0xffff_fffe));
    set(&mut bus, 0x10, 0xc000_2000);
    set(&mut bus, 0x18, 0);
    set(&mut bus, 0x1c, 0xc0);
    assert_eq!(read(&mut bus, 0xc000_2004), u32::MAX, "memory is not decoded");
    set(&mut bus, 0x04, command::MEMORY.into());
    assert_eq!(read(&mut bus, 0xc000_2004), 0x0404_0404);
    assert_eq!(read(&mut bus, 0xc1_ffff_fff0), 0xf2f2_f2f2);
    assert_eq!(read(&mut bus, 0xc2_0000_0000), u32::MAX);
    set(&mut bus, 0x10, 0xd000_0000);
    assert_eq!((read(&mut bus, 0xc000_2004), read(&mut bus, 0xd000_0004)), (u32::MAX, 0x0404_0404));
    log.lock().clear();
    bus.write(0xd000_0008, &[1, 2]);
    set(&mut bus, 0x10, 0xd000_0000);
    assert_eq!(*log.lock(), ["0+0x8=[1, 2]"], "a write that changes nothing is not told");
    // Outside of the windows nothing is decoded.
    set(&mut bus, 0x10, 0xf000_0000);
    assert!(!bus.read(0xf000_0004, &mut [0; 4]));
}

#[test]
fn levels_reach_the_lines_that_slot_and_pin_make() {
    let (mut bus, levels) = bus();
    for pin in [1, 4, 1, 0] {
        add(&mut bus, None, None, space(pin), &Arc::default()).unwrap();
    }
    let now = || *levels.lock();
    bus.set_intx(1, true); // INTA of device 1: (1 + 0) mod 4
    assert_eq!(now(), [false, true, false, false]);
    bus.set_intx(2, true); // INTD of device 2: (2 + 3) mod 4
    assert_eq!((now(), bus.save().counts), ([false, true, false, false], [0, 2, 0, 0]));
    bus.set_intx(1, false);
    assert_eq!(now(), [false, true, false, false], "device 2 holds it");
    bus.set_intx(3, true);
    bus.set_intx(4, true);
    bus.set_intx(9, true);
    assert_eq!(now(), [false, true, false, true], "no pin, no line; no device, no line");
    assert_eq!(read(&mut bus, config_of(2) + 4) >> 16 & 8, 8, "the status register shows it");
    // A guest that uses messages turns it off, and it comes back with its level.
    bus.write(config_of(2) + 4, &command::INTX_DISABLE.to_le_bytes());
    assert_eq!((now(), bus.save().counts), ([false, false, false, true], [0, 0, 0, 1]));
    bus.write(config_of(2) + 4, &[0; 2]);
    assert_eq!(now(), [false, true, false, true]);
}

/// As `info pci` of QEMU 10.0.13 and 11.1.3 shows such devices, and as both refuse them (`edu` in the place of
/// `vfio-pci`).
#[test]
fn a_device_is_at_its_address_or_at_the_lowest_that_is_free() {
    let (mut bus, levels) = bus();
    let log = Arc::default();
    let mut add = |wanted, id| self::add(&mut bus, wanted, id, space(1), &log);
    assert_eq!([add(Some(5), Some("x")), add(None, None), add(Some(2), None), add(None, None)], [5, 1, 2, 3].map(Ok));
    let refused = |result: Result<usize, PciError>| result.unwrap_err().to_string();
    let taken = "not available for vfio-pci, in use by";
    assert_eq!(refused(add(Some(5), None)), format!("PCI: slot 5 function 0 {taken} vfio-pci,id=x"));
    assert_eq!(refused(add(Some(1), None)), format!("PCI: slot 1 function 0 {taken} vfio-pci,id=(null)"));
    assert_eq!(refused(add(Some(0), None)), format!("PCI: slot 0 function 0 {taken} gpex-root,id=(null)"));
    assert_eq!(add(Some(32), None), Err(PciError::Full));
    // Sections follow the command line, not the addresses.
    assert_eq!(bus.slots(), [5, 1, 2, 3]);
    let state = bus.save();
    assert_eq!(state.functions.iter().map(|function| function.slot).collect::<Vec<_>>(), [5, 1, 2, 3]);
    assert_eq!((read(&mut bus, config_of(5)), read(&mut bus, config_of(4))), (0x11e8_1234, u32::MAX));
    bus.set_intx(5, true); // INTA of device 5: (5 + 0) mod 4
    assert_eq!(*levels.lock(), [false, true, false, false]);
    for _ in 5..MOST_DEVICES {
        self::add(&mut bus, None, None, space(1), &log).unwrap();
    }
    assert_eq!(
        refused(self::add(&mut bus, None, None, space(1), &log)),
        "PCI: no slot/function available for vfio-pci, all in use or reserved"
    );
}

/// Where pages are shown, by their first address; some addresses are refused.
struct Slots {
    shown: Arc<Mutex<Vec<Option<u64>>>>,
    refused: u64,
}

impl Window for Slots {
    fn show(&mut self, gpa: u64, _pages: &Arc<SharedPages>) -> crate::error::Result<u32> {
        if gpa == self.refused {
            return Err(crate::Error::Config("another slot is there".to_owned()));
        }
        let mut shown = self.shown.lock();
        assert!(!shown.contains(&Some(gpa)), "{gpa:#x} is shown twice");
        shown.push(Some(gpa));
        Ok(shown.len() as u32 - 1)
    }
    fn hide(&mut self, number: u32) {
        assert!(self.shown.lock()[number as usize].take().is_some(), "{number} is not shown");
    }
}

#[test]
fn pages_of_bars_are_shown_where_the_guest_has_put_them() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x2000).unwrap();
    let (mut bus, _) = bus();
    let shown = Arc::new(Mutex::new(Vec::new()));
    bus.show_by(Box::new(Slots { shown: shown.clone(), refused: 0xc700_1000 }));
    let pages = |bar: usize, offset: u64| {
        let pages = Arc::new(SharedPages::map(&file, 0, 0x1000).unwrap());
        BarPages { bar, offset, pages }
    };
    let device = |pages: Vec<BarPages>| {
        let mut config = ConfigSpace::new(&Identity { vendor: 0x1234, ..Identity::default() }, true);
        config.add_bar(0, BarKind::Memory32 { prefetchable: false }, 0x4000).unwrap();
        config.add_bar(2, BarKind::Memory64 { prefetchable: true }, 0x1000).unwrap();
        Box::new(Registers { config, pages, log: Arc::default() })
    };
    bus.add(None, None, device(vec![pages(0, 0x1000), pages(0, 0x3000), pages(2, 0)])).unwrap();
    bus.add(None, None, device(vec![pages(0, 0x1000)])).unwrap();
    let set = |bus: &mut PciBus, number: u64, at: u64, value: u32| {
        bus.write(config_of(number) + at, &value.to_le_bytes());
        let mut now: Vec<u64> = shown.lock().iter().flatten().copied().collect();
        now.sort_unstable();
        now
    };
    assert!(set(&mut bus, 1, 0x10, 0xc100_0000).is_empty(), "memory is not decoded");
    assert_eq!(set(&mut bus, 1, 0x04, command::MEMORY.into()), [0xc100_1000, 0xc100_3000], "BAR 2 has no address");
    assert_eq!(set(&mut bus, 1, 0x1c, 0xc0), [0xc100_1000, 0xc100_3000, 0xc0_0000_0000]);
    assert_eq!(set(&mut bus, 1, 0x10, 0xc200_0000), [0xc200_1000, 0xc200_3000, 0xc0_0000_0000], "they move");
    // A state that comes has them where it says.
    let state = bus.save();
    assert!(set(&mut bus, 1, 0x04, 0).is_empty(), "switched off");
    bus.load(&state).unwrap();
    assert_eq!(set(&mut bus, 1, 0x0c, 0), [0xc200_1000, 0xc200_3000, 0xc0_0000_0000]);
    // One that is not in a window is not seen, nor one over another device's.
    assert_eq!(set(&mut bus, 1, 0x10, 0xf000_0000), [0xc0_0000_0000]);
    set(&mut bus, 1, 0x10, 0xc200_0000);
    set(&mut bus, 2, 0x10, 0xc200_0000);
    let both = [0xc200_1000, 0xc200_3000, 0xc0_0000_0000];
    assert_eq!(set(&mut bus, 2, 0x04, command::MEMORY.into()), both, "the first one answers");
    assert_eq!(set(&mut bus, 1, 0x10, 0xc300_0000), [0xc200_1000, 0xc300_1000, 0xc300_3000, 0xc0_0000_0000]);
    // What cannot be shown is trapped, and the others are seen.
    assert_eq!(set(&mut bus, 1, 0x10, 0xc700_0000), [0xc200_1000, 0xc700_3000, 0xc0_0000_0000]);
    assert_eq!(read(&mut bus, 0xc700_1004), 0x0404_0404);
}

#[test]
fn a_state_is_taken_or_refused_whole() {
    let (mut source, _) = bus();
    source.write(config_of(0) + 0x3c, &[7]);
    source.write(config_of(0) + 0x40, &0x1234_5678_u32.to_le_bytes());
    let state = PciState { config_reg: 0x8000_0000, ..source.save() };
    let (mut bus, levels) = bus();
    *levels.lock() = [true; LINES];
    bus.load(&state).unwrap();
    assert_eq!(bus.save(), state);
    assert_eq!(*levels.lock(), [false; LINES], "every line is driven anew");
    let refused = |change: &dyn Fn(&mut PciState)| {
        let mut state = state.clone();
        change(&mut state);
        self::bus().0.load(&state).unwrap_err()
    };
    let other = refused(&|state| state.bridge.config[2] = 9);
    assert_eq!(other, PciError::ReadOnly { at: 2, found: 9, expected: 8, mask: 0xff });
    let short = refused(&|state| state.bridge.config.truncate(255));
    assert_eq!(short, PciError::Size { found: 255, expected: 256 });
    let count = refused(&|state| state.counts[1] = 1);
    assert_eq!(count, PciError::Count { line: 1, found: 1, expected: 0 });
}

#[test]
fn bars_and_capabilities_that_cannot_be_are_refused() {
    let mut config = space(0);
    let memory = BarKind::Memory32 { prefetchable: false };
    for (index, size) in [(0, 16), (3, 16), (6, 16), (usize::MAX, 16), (1, 24), (1, 8), (1, 1 << 32), (1, 0)] {
        assert_eq!(config.add_bar(index, memory, size), Err(PciError::Bar { index, size }));
    }
    let wide = BarKind::Memory64 { prefetchable: false };
    assert_eq!(config.add_bar(5, wide, 16), Err(PciError::Bar { index: 5, size: 16 }), "there is no upper half");
    assert_eq!(config.add_bar(1, wide, 16), Err(PciError::Bar { index: 1, size: 16 }), "the upper half is taken");
    config.add_capability(0x40, 9, &[1; 6]).unwrap();
    config.add_capability(0x48, 9, &[2; 6]).unwrap();
    for at in [0x3c, 0x42, 0x44, 0xfc, usize::MAX - 3] {
        assert_eq!(config.add_capability(at, 9, &[0; 6]), Err(PciError::Capability { at, id: 9 }), "{at:#x}");
    }
    assert_eq!(config.capabilities().collect::<Vec<_>>(), [(0x48, 9), (0x40, 9)]);
    assert_eq!(Msi::new(0x50, 3, true, true), Err(PciError::Vectors(3)));
    assert_eq!(Msi::new(0x50, 64, true, true), Err(PciError::Vectors(64)));
    assert_eq!(MsixTable::new(0), Err(PciError::Vectors(0)));
    assert_eq!(MsixLayout::new(8, (6, 0), (0, 0)), Err(PciError::Bar { index: 6, size: 0 }));
    assert_eq!(MsixLayout::new(8, (0, 0), (0, 4)), Err(PciError::Bar { index: 0, size: 4 }));
}

/// The capability of QEMU's `edu` as qtest reads it, before and after writing all ones: one vector, an address of 64
/// bits.
#[test]
fn the_msi_capability_is_edus() {
    let mut config = space(1);
    config.add_msi(Msi::new(0x40, 1, true, false).unwrap()).unwrap();
    assert_eq!((config.u32(0x40), config.u32(0x04)), (0x0080_0005, 0x0010_0000));
    let before = config.clone();
    let mut changes = Vec::new();
    for at in (0x40..0x50).step_by(4) {
        changes.push(config.write(at, &u32::MAX.to_le_bytes()).msi);
    }
    assert_eq!(changes, [true; 4]);
    let words = [0x40, 0x44, 0x48, 0x4c].map(|at| config.u32(at));
    assert_eq!(words, [0x0081_0005, 0xffff_fffc, u32::MAX, u32::MAX]);
    let (msi, bytes) = config.msi().unwrap();
    let message = PciMessage { address: 0xffff_ffff_ffff_fffc, data: 0xffff };
    assert_eq!((msi.message(bytes, 0), msi.message(bytes, 1)), (Some(message), None));
    let (msi, bytes) = before.msi().unwrap();
    assert_eq!(msi.message(bytes, 0), None, "it is off");
    assert_eq!(config.add_msi(Msi::new(0x60, 1, true, false).unwrap()), Err(PciError::Capability { at: 0x60, id: 5 }));
}

#[test]
fn several_vectors_differ_in_the_lowest_bits_and_have_masks() {
    let mut config = space(1);
    config.add_msi(Msi::new(0x50, 8, false, true).unwrap()).unwrap();
    // Control: on, four of the eight.
    config.write(0x52, &0x0021_u16.to_le_bytes());
    config.write(0x54, &0xfee0_1000_u32.to_le_bytes());
    config.write(0x58, &0x4047_u16.to_le_bytes());
    config.write(0x5c, &u32::MAX.to_le_bytes());
    assert_eq!(config.u32(0x5c), 0xff, "there are eight masks");
    config.write(0x5c, &2_u32.to_le_bytes());
    config.set_msi_pending(2);
    config.write(0x60, &[0; 4]);
    let (msi, bytes) = config.msi().unwrap();
    let data = |vector| msi.message(bytes, vector).map(|message| message.data);
    assert_eq!((0..5).map(data).collect::<Vec<_>>(), [Some(0x4044), Some(0x4045), Some(0x4046), Some(0x4047), None]);
    assert_eq!((0..4).map(|vector| msi.is_masked(bytes, vector)).collect::<Vec<_>>(), [false, true, false, false]);
    assert_eq!(msi.pending(bytes), 2, "the guest cannot write it");
    // More than there are cannot be used.
    config.write(0x52, &0x0071_u16.to_le_bytes());
    let (msi, bytes) = config.msi().unwrap();
    assert_eq!(msi.used(bytes), 8);
}

#[test]
fn a_masked_vector_waits_and_is_sent_once() {
    let mut config = space(1);
    config.add_msix(0x40, &MsixLayout::new(3, (0, 0), (0, 0x800)).unwrap()).unwrap();
    assert_eq!([0x40, 0x44, 0x48].map(|at| config.u32(at)), [0x0002_0011, 0, 0x800]);
    let changes = config.write(0x40, &u32::MAX.to_le_bytes());
    assert!(changes.msix && config.u32(0x40) == 0xc002_0011);
    let (on, held) = (MsixControl { enabled: true, all_masked: false }, config.msix_control().unwrap());
    assert_eq!(held, MsixControl { enabled: true, all_masked: true });
    let mut table = MsixTable::new(3).unwrap();
    let message = |vector: u32| PciMessage { address: 0xfee0_0000, data: 0x40 + vector };
    for vector in 0..3_u32 {
        let at = u64::from(vector) * 16;
        assert!(table.write(at, &0xfee0_0003_u64.to_le_bytes(), on).is_empty());
        assert!(table.write(at + 8, &(0x40 + vector).to_le_bytes(), on).is_empty());
        assert!(table.write(at + 12, &0xffff_fffe_u32.to_le_bytes(), on).is_empty());
    }
    let mut control = [0xff; 4];
    table.read(12, &mut control);
    assert_eq!(control, [0; 4], "only the mask is there");
    assert_eq!(table.trigger(1, on), Some(message(1)));
    assert_eq!((table.trigger(1, MsixControl::default()), table.trigger(3, on)), (None, None));
    assert_eq!((table.trigger(0, held), table.trigger(2, held), table.trigger(2, held)), (None, None, None));
    let mut pending = [0; 8];
    table.read_pending(0, &mut pending);
    assert_eq!(pending, [0b101, 0, 0, 0, 0, 0, 0, 0]);
    let state = table.save();
    assert_eq!(state.len(), 3 * 16 + 1);
    let mut other = MsixTable::new(3).unwrap();
    other.load(&state).unwrap();
    assert_eq!(other.load(&state[1..]), Err(PciError::Size { found: 48, expected: 49 }));
    assert_eq!(other.control_changed(on), [message(0), message(2)]);
    assert!(other.control_changed(on).is_empty());
    // Anything but whole words is ignored.
    for (offset, len) in [(0, 1), (2, 4), (4, 8), (48, 4), (44, 8), (u64::MAX, 4), (0, 16)] {
        let before = other.clone();
        assert!(other.write(offset, &vec![0xff; len], on).is_empty() && other == before, "{offset} {len}");
    }
}

proptest! {
    /// Whatever a guest writes, read-only bits stay, no BAR leaves its size, the list of capabilities ends, and the
    /// state goes to another device of the kind.
    #[test]
    fn a_guest_can_write_what_it_likes(writes in prop::collection::vec((0usize..4104, any::<[u8; 4]>(), 1usize..5), 0..200)) {
        let device = || {
            let mut config = space(1);
            config.add_msi(Msi::new(0x40, 4, true, true).unwrap()).unwrap();
            config.add_msix(0x60, &MsixLayout::new(9, (0, 0), (0, 0x800)).unwrap()).unwrap();
            config
        };
        let (mut config, fresh) = (device(), device());
        for (at, data, len) in writes {
            config.write(at, &data[..len]);
        }
        for at in [0, 2, 8, 10, 0x2c, 0x2e, 0x34, 0x60] {
            prop_assert_eq!(config.u16(at), fresh.u16(at), "{:#x}", at);
        }
        prop_assert_eq!(config.capabilities().collect::<Vec<_>>(), [(0x60, 0x11), (0x40, 5)]);
        for (index, size) in [(0, 0x1000), (2, 1 << 33)] {
            if let Some(bar) = config.bar(index) {
                prop_assert_eq!((bar.end - bar.start, bar.start % size), (size, 0));
            }
        }
        let mut other = device();
        other.load(config.bytes()).unwrap();
        prop_assert_eq!(other.bytes(), config.bytes());
    }

    /// Any state is taken or refused, and what is refused changes nothing.
    #[test]
    fn any_state_is_survived(at in 0usize..256, flip in 1u8..) {
        let mut config = space(1);
        let mut state = config.bytes().to_vec();
        state[at] ^= flip;
        let before = config.bytes().to_vec();
        match config.load(&state) {
            Ok(()) => prop_assert_eq!(config.bytes(), &state),
            Err(PciError::ReadOnly { at: found, mask, .. }) => {
                prop_assert_eq!(found, at);
                prop_assert!(flip & mask != 0);
                prop_assert_eq!(config.bytes(), &before);
            }
            Err(error) => prop_assert!(false, "{error}"),
        }
        let _ = (config.bar(0), config.bar(2), config.capabilities().count());
    }

    /// Each trigger is sent once, at once or when it may go, or stands pending.
    #[test]
    fn no_interrupt_is_lost_or_doubled(steps in prop::collection::vec((0usize..5, any::<bool>(), any::<bool>()), 1..100)) {
        let mut table = MsixTable::new(4).unwrap();
        let mut control = MsixControl { enabled: true, all_masked: false };
        let mut owed = [false; 4];
        for (vector, action, value) in steps {
            let sent = match vector {
                4 => {
                    control.all_masked = value;
                    table.control_changed(control)
                }
                _ if action => {
                    owed[vector] = true;
                    table.trigger(vector, control).into_iter().collect()
                }
                _ => {
                    let entry = u64::from(value) << 32 | vector as u64;
                    table.write(vector as u64 * 16 + 8, &entry.to_le_bytes(), control)
                }
            };
            for message in sent {
                // A vector's first data is 0 whatever its number: only written ones can be sent.
                let vector = message.data as usize;
                prop_assert!(std::mem::take(&mut owed[vector]), "{vector} was sent without a cause");
                prop_assert!(!table.is_masked(vector, control));
            }
            for (vector, owed) in owed.iter().enumerate() {
                prop_assert_eq!(*owed, table.save()[64] & 1 << vector != 0);
            }
        }
    }
}
