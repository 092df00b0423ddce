//! A machine is reset: what it then is, and that it starts anew.

use crate::Test;
use crate::boot::elf;
use crate::guest::{Console, Guest};
use crate::state::{copy_ram, still};
use qevm_microvm::state::MachineState;
use reference_vmm::Error;
use reference_vmm::boot::Kernel;
use reference_vmm::devices::{Rng, VirtioSlot};
use reference_vmm::machine::{Machine, MachineConfig, RunState, Stop};
use reference_vmm::memory::BIOS;
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("reset_makes_everything_but_time_and_ram_as_it_was", makes_everything_as_it_was),
    ("reset_starts_a_guest_anew_again_and_again", starts_a_guest_anew),
    ("reset_loads_a_kernel_anew", loads_a_kernel_anew),
    ("reset_loads_the_firmware_anew", loads_the_firmware_anew),
];

const MIB: u64 = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

fn guest(split_irqchip: bool, payload: &str) -> Guest {
    Guest::configured(32 * MIB, 3, payload, |config| {
        config.split_irqchip = split_irqchip;
        config.rtc = true;
        config.virtio = vec![VirtioSlot::rng(Rng::open().unwrap())];
    })
}

/// Without the time, which a reset leaves alone.
fn timeless(state: MachineState) -> MachineState {
    MachineState { virtual_clock: 0, rtc: None, ..still(state) }
}

fn makes_everything_as_it_was() {
    for split_irqchip in [false, true] {
        let guest = guest(split_irqchip, "dirty=1M hold=1M zero=1M report=20 virtio=2");
        let fresh = guest.machine.save_state().unwrap();
        guest.machine.resume().unwrap();
        guest.wait_for_passes();
        assert!(matches!(guest.machine.reset(true), Err(Error::NotPaused(_))));
        guest.machine.pause();
        let used = guest.machine.save_state().unwrap();
        assert!(used.virtio_states[0].as_ref().is_some_and(|device| device.status != 0 && device.queues[0].desc != 0));
        guest.machine.press_power_button();
        let mut ram = [0; 64];
        guest.machine.memory().read(5 * MIB, &mut ram).unwrap();

        guest.machine.reset(true).unwrap();
        let reset = guest.machine.save_state().unwrap();
        assert!(reset.virtual_clock >= used.virtual_clock && reset.clock.clock >= used.clock.clock);
        let (reset, fresh) = (timeless(reset), timeless(fresh));
        for (index, (reset, fresh)) in reset.vcpus.iter().zip(&fresh.vcpus).enumerate() {
            assert_eq!(reset, fresh, "vCPU {index}");
        }
        assert_eq!((&reset.pics, &reset.ioapic, &reset.ioapic2), (&fresh.pics, &fresh.ioapic, &fresh.ioapic2));
        assert_eq!((&reset.pit, &reset.serial, &reset.ged), (&fresh.pit, &fresh.serial, &fresh.ged));
        assert_eq!((&reset.fw_cfg, &reset.virtio_states), (&fresh.fw_cfg, &fresh.virtio_states));
        assert!(reset == fresh);
        let mut after = [0; 64];
        guest.machine.memory().read(5 * MIB, &mut after).unwrap();
        assert_eq!(ram, after);
        assert_ne!(ram, [0; 64]);
    }
}

fn starts_a_guest_anew() {
    for (split_irqchip, way) in [(false, 1), (false, 2), (true, 1), (true, 2)] {
        let payload =
            format!("dirty=1M rate=8M hold=1M zero=1M verify=65536 report=20 virtio=2 reset=40 resets=4 way={way}");
        let guest = guest(split_irqchip, &payload);
        for boots in 1..=4 {
            guest.machine.resume().unwrap();
            let stop = guest.machine.wait_stop(60 * SECOND);
            assert!(matches!(stop, Some(Stop::Reset { .. })), "{stop:?}: {}", guest.console.text());
            assert_eq!(guest.machine.run_state(), RunState::Stopped);
            assert!(guest.machine.resume().is_err());
            guest.machine.pause();
            guest.machine.reset(true).unwrap();
            let lines = guest.console.lines();
            assert_eq!(lines.last(), Some(&format!("qevm-payload reset boots={boots}")), "{}", guest.console.text());
        }
        guest.machine.resume().unwrap();
        let before = guest.wait_until(|_| true);
        let after = guest.wait_until(|now| now.rounds > before.rounds + 3 && now.ticks > before.ticks);
        assert_eq!(after.stale, 0, "{}", guest.console.text());
        guest.console.wait_for("a device at work", |lines| {
            let last = lines.iter().rfind(|line| line.starts_with("qevm-payload virtio"))?;
            assert!(last.ends_with(" errors=0"), "{last}");
            (!last.contains("rng=0 ")).then_some(())
        });
        assert!(!guest.console.text().contains("trap"), "{}", guest.console.text());
    }
}

/// A kernel that changes its own data, prints them and resets the machine. There is a byte after those in its file,
/// too.
fn kernel() -> Kernel {
    const DATA: u32 = 0x20_0040;
    let data = DATA.to_le_bytes();
    let reset = 0xfea0_0202_u32.to_le_bytes();
    let mut code = [
        &[0xfe, 0x05][..], // inc byte [DATA]
        &data,
        &[0x66, 0xba, 0xf8, 0x03], // mov dx, 0x3f8
        &[0xa0],                   // mov al, [DATA]
        &data,
        &[0xee, 0xb0, b'\n', 0xee], // out dx, al; mov al, '\n'; out dx, al
        &[0xc6, 0x05],              // mov byte [reset register], 0x42
        &reset,
        &[0x42, 0xf4, 0xeb, 0xfd], // hlt; jmp to hlt
    ]
    .concat();
    code.resize(0x40, 0);
    code.push(b'a');
    Kernel { image: elf(code), ..Kernel::default() }
}

fn loads_a_kernel_anew() {
    let machine = |incoming| {
        let console = Console::default();
        let config = MachineConfig {
            memory: 32 * MIB,
            bios: vec![0; 64 << 10],
            kernel: Some(kernel()),
            incoming,
            serial: Box::new(console.clone()),
            ..MachineConfig::default()
        };
        (Machine::new(config).unwrap(), console)
    };
    let run = |machine: &Machine, console: &Console, letters: &[&str]| {
        machine.resume().unwrap();
        let stop = machine.wait_stop(60 * SECOND);
        assert!(matches!(stop, Some(Stop::Reset { vcpu: 0, .. })), "{stop:?}");
        machine.pause();
        assert_eq!(console.lines(), letters);
    };
    let (source, console) = machine(false);
    run(&source, &console, &["b"]);
    source.reset(true).unwrap();
    run(&source, &console, &["b", "b"]);
    source.reset(false).unwrap();

    // One that waits for a guest leaves its RAM alone until that guest is reset.
    let (destination, console) = machine(true);
    assert!(!destination.has_kernel());
    let mut byte = [0];
    destination.memory().read(0x20_0040, &mut byte).unwrap();
    assert_eq!(byte, [0]);
    copy_ram(source.memory(), destination.memory());
    destination.load_state(&source.save_state().unwrap()).unwrap();
    destination.reset(true).unwrap();
    run(&destination, &console, &["b"]);
}

/// As at a QEMU 11.1: a guest can write to the firmware, and what it wrote is gone after a reset, as is the firmware
/// that a guest has come with.
fn loads_the_firmware_anew() {
    let guest = guest(false, "");
    let bios = guest.machine.memory().block(BIOS).unwrap();
    let mut before = vec![0; 64 << 10];
    bios.read(0, &mut before).unwrap();
    bios.write(0x1234, b"anything else").unwrap();
    guest.machine.reset(false).unwrap();
    let read = |at| {
        let mut bytes = [0; 13];
        bios.read(at, &mut bytes).unwrap();
        bytes
    };
    assert_eq!(&read(0x1234), b"anything else");
    guest.machine.reset(true).unwrap();
    assert_eq!(read(0x1234), before[0x1234..][..13]);
}
