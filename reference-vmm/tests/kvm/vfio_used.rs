//! Guests that use their VFIO devices on the way: BARs that they have placed, registers, memory, DMA and interrupts.
//! What the guest says of them is judged, and what gets lost on purpose it has to notice.

use crate::Test;
use crate::guest::{Console, Guest};
use crate::testdev::{Loss, Testdev};
use crate::vfio::{Switches, migrate_between, wait};
use qevm_wire::{Profile, QemuVersion};
use reference_vmm::payload::{PciDevice, Progress};
use reference_vmm::vmm::{RunState, Vmm};
use std::sync::Arc;

pub(crate) const TESTS: &[Test] = &[
    ("vfio_devices_are_used_on_the_way", used_on_the_way),
    ("vfio_devices_of_a_guest_that_is_reset_are_used_again", used_after_a_reset),
    ("vfio_devices_that_lose_something_are_found_out", found_out),
];

const MEMORY: u64 = 32 << 20;
const INTX: u32 = 3;
const MSI: u32 = 4;
const MSIX: u32 = 5;

struct Side {
    vmm: Arc<Vmm>,
    console: Console,
    devices: Vec<Testdev>,
}

impl Side {
    fn new(interrupts: u32, losses: &[Option<Loss>], split_irqchip: bool, incoming: bool) -> Side {
        let devices: Vec<_> = losses.iter().map(|loss| Testdev::new(*loss)).collect();
        let slots = devices.iter().map(Testdev::slot).collect();
        let payload = format!("dirty=512K rate=32M hold=1M zero=1M report=20 dma=16M dmapages=64 pci={interrupts}");
        let Guest { machine, console } = Guest::configured(MEMORY, 1, &payload, |config| {
            (config.pcie, config.vfio, config.split_irqchip) = (true, slots, split_irqchip);
        });
        let vmm = Vmm::new(machine, Profile::new(QemuVersion::NEWEST, "microvm"), incoming);
        devices.iter().for_each(|device| device.connect(&vmm));
        Side { vmm, console, devices }
    }

    fn start(interrupts: u32, devices: usize, split_irqchip: bool) -> Side {
        let side = Side::new(interrupts, &vec![None; devices], split_irqchip, false);
        side.vmm.cont().unwrap();
        side
    }

    /// What the guest said last of each of its `count` devices.
    fn devices(&self, count: usize) -> Vec<PciDevice> {
        self.console.wait_for("devices", |lines| {
            let said: Vec<_> = lines.iter().rev().filter_map(|line| PciDevice::parse(line)).take(count).collect();
            (said.len() == count).then(|| said.into_iter().rev().collect())
        })
    }

    /// All devices go on being used, from what the guest last said of them elsewhere.
    fn run_on(&self, from: &[PciDevice]) -> Vec<PciDevice> {
        let used = |now: &PciDevice, from: &PciDevice| {
            assert!(now.follows(from) && now.slot == from.slot, "{now:?} after {from:?}");
            // Enough to have raised each vector, and to have seen each page more than once.
            now.counter > from.counter + 3 && now.taken > from.taken + 20 && now.dma > from.dma + 130
        };
        let start = self.console.lines().len();
        let now = self.console.wait_for("use of the devices", |lines| {
            assert!(!lines.iter().any(|line| line.contains("stale-page")), "{}", self.console.text());
            let said = lines[start..].iter().filter_map(|line| PciDevice::parse(line));
            let mut last: Vec<_> = from.iter().map(|_| None).collect();
            said.for_each(|device| last[device.slot as usize - 1] = Some(device));
            let last: Vec<PciDevice> = last.into_iter().collect::<Option<_>>()?;
            last.iter().zip(from).all(|(now, from)| used(now, from)).then_some(last)
        });
        for device in &now {
            assert!(device.raised - device.taken <= 1, "{device:?}");
        }
        // The guest counts a word of their memory up, without the monitor.
        assert!(self.devices.iter().all(|device| device.trapped() == 0), "{:?}", self.trapped());
        now
    }

    fn trapped(&self) -> Vec<u64> {
        self.devices.iter().map(Testdev::trapped).collect()
    }
}

fn used_on_the_way() {
    let cases: [(u32, usize, bool, Switches<'_>); 4] =
        [(INTX, 1, false, &[]), (MSI, 1, false, &[]), (MSIX, 2, false, &[("multifd", true)]), (INTX, 2, true, &[])];
    for (interrupts, devices, split, more) in cases {
        let mut here = Side::start(interrupts, devices, split);
        let mut said = here.run_on(&here.devices(devices));
        for _ in 0..2 {
            let there = Side::new(interrupts, &vec![None; devices], split, true);
            assert_eq!(migrate_between(&here.vmm, &there.vmm, more), (None, None), "{interrupts}");
            wait("the guest is not started", || there.vmm.run_state() == RunState::Running);
            said = there.run_on(&said);
            assert!(!there.console.text().contains("qevm-payload start"), "{}", there.console.text());
            here = there;
        }
    }
}

fn used_after_a_reset() {
    for interrupts in [INTX, MSI, MSIX] {
        let side = Side::start(interrupts, 1, false);
        side.run_on(&side.devices(1));
        side.vmm.system_reset();
        // It may have been reset in the middle of a line.
        let starts = |line: &String| line.contains("qevm-payload start");
        side.console
            .wait_for("another start", |lines| (lines.iter().filter(|line| starts(line)).count() == 2).then_some(()));
        let start = side.console.wait_for("the device again", |lines| {
            let from = lines.iter().rposition(starts)?;
            lines[from..].iter().find_map(|line| PciDevice::parse(line))
        });
        side.run_on(&[start]);
    }
}

/// Each of these would be a lost state, page or interrupt of a real device.
fn found_out() {
    let kinds = [
        (Loss::Registers, "pci-register", "page=4"),
        (Loss::Memory, "pci-memory", "page=0"),
        (Loss::Dma, "pci-dma", "page="),
        (Loss::Interrupt, "pci-interrupt", "page=0"),
        (Loss::SecondInterrupt, "pci-interrupt", "page="),
    ];
    for (loss, kind, page) in kinds {
        let interrupts = if loss == Loss::Interrupt { INTX } else { MSI };
        let from = Side::start(interrupts, 1, false);
        from.run_on(&from.devices(1));
        let to = Side::new(interrupts, &[Some(loss)], false, true);
        assert_eq!(migrate_between(&from.vmm, &to.vmm, &[]), (None, None));
        let stale = to.console.wait_for_line("qevm-payload stale-page");
        assert!(stale.contains(&format!("kind={kind} ")) && stale.contains(page), "{loss:?}: {stale}");
        assert!(stale.contains("word=1 "), "{stale}");
        let counted = to.console.wait_for("a count", |lines| {
            lines.iter().filter_map(|line| Progress::parse(line)).find(|progress| progress.stale > 0)
        });
        assert!(counted.stale > 0);
        // Its memory is not mapped here.
        wait("the device's memory is not used", || to.trapped()[0] > 0);
    }
}
