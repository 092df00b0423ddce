//! Running, pausing, stopping.

use crate::Test;
use crate::guest::{Guest, PATIENCE};
use reference_vmm::Error;
use reference_vmm::devices::pci::PciMessage;
use reference_vmm::machine::{MAX_CPUS, Machine, MachineConfig, RunState, Stop};
use reference_vmm::payload::Progress;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

pub(crate) const TESTS: &[Test] = &[
    (
        "machine_a_message_interrupts_and_leaves_the_other_interrupts_alone",
        a_message_interrupts_and_leaves_the_other_interrupts_alone,
    ),
    ("machine_runs_as_slowly_as_it_is_told", runs_as_slowly_as_told),
    ("machine_pauses_and_resumes", pauses_and_resumes),
    ("machine_state_needs_a_pause", state_needs_a_pause),
    ("machine_reports_a_triple_fault", reports_a_triple_fault),
    ("machine_reports_the_reset_register", reports_the_reset_register),
    ("machine_names_an_unexpected_exit", names_an_unexpected_exit),
    ("machine_counts_of_vcpus_are_checked", counts_of_vcpus_are_checked),
];

const MIB: u64 = 1 << 20;

/// KVM's table of routes is replaced as a whole.
fn a_message_interrupts_and_leaves_the_other_interrupts_alone() {
    let guest = Guest::boot(32 * MIB, 1, "dirty=1M hold=1M zero=1M report=20 timer=1");
    guest.wait_for_passes();
    let event = EventFd::new(0).unwrap();
    // To the vector of the guest's timer.
    let gsi = guest.machine.add_message(&event, PciMessage { address: 0xfee0_0000, data: 0x40 }).unwrap();
    assert_eq!(gsi, 24, "the first after the pins of the IOAPIC");
    // More than its timer makes in any time.
    guest.wait_until(|now| {
        event.write(1).unwrap();
        now.ticks > 100 + 2 * now.ms / 1000
    });
    guest.machine.press_power_button();
    guest.machine.pause();
    let state = guest.machine.save_state().unwrap();
    assert_eq!(state.pics[1].irr & 2, 2, "interrupt 9 has not reached the second 8259");
}

fn runs_as_slowly_as_told() {
    let boot = || Guest::boot(32 * MIB, 2, "dirty=1M hold=1M zero=1M report=20");
    // A guest beside it is the measure: a busy machine lets both wait.
    let (guest, free) = (boot(), boot());
    let last = |guest: &Guest| {
        let lines = guest.console.lines();
        lines.iter().rev().find_map(|line| Progress::parse(line)).expect("it has printed")
    };
    // What both write in the same two seconds, or more if the free one has no processor in them.
    let written = || {
        let before = (last(&guest), last(&free));
        free.wait_until(|now| now.ms >= before.1.ms + 2000 && now.written >= before.1.written + 1000);
        (last(&guest).written - before.0.written, last(&free).written - before.1.written)
    };
    guest.wait_for_passes();
    guest.machine.throttle(97).unwrap();
    let (slow, measure) = written();
    assert!(slow * 2 < measure, "slowed down by 97 %: {slow} pages written, and {measure} by a free guest");
    // The pauses are no obstacle to stopping.
    guest.machine.throttle(99).unwrap();
    guest.machine.pause();
    guest.machine.resume().unwrap();
    guest.machine.throttle(0).unwrap();
    let start = Instant::now();
    loop {
        let (again, measure) = written();
        if again * 4 > measure {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{again} pages written afterwards, and {measure} by a free guest");
    }
    guest.assert_healthy();
}

fn pauses_and_resumes() {
    let guest = Guest::boot(32 * MIB, 3, "dirty=1M hold=1M zero=1M report=20");
    for _ in 0..50 {
        guest.machine.pause();
        assert_eq!(guest.machine.run_state(), RunState::Paused);
        guest.machine.resume().unwrap();
        assert_eq!(guest.machine.run_state(), RunState::Running);
    }
    guest.machine.pause();
    guest.machine.pause();
    let block = &guest.machine.memory().blocks()[0];
    let read = || {
        let mut bytes = vec![0; 8 << 20];
        block.read(0, &mut bytes).unwrap();
        bytes
    };
    let before = read();
    std::thread::sleep(Duration::from_millis(50));
    assert!(before == read(), "RAM changed while the machine was paused");
    guest.machine.resume().unwrap();
    guest.assert_healthy();
}

fn state_needs_a_pause() {
    let guest = Guest::boot(32 * MIB, 1, "");
    assert!(matches!(guest.machine.save_state(), Err(Error::NotPaused(_))));
    guest.machine.pause();
    let state = guest.machine.save_state().unwrap();
    guest.machine.resume().unwrap();
    assert!(matches!(guest.machine.load_state(&state), Err(Error::NotPaused(_))));
}

/// A firmware with this code at the reset vector and these bytes at the start of the image.
fn firmware(reset_vector: &[u8], start: &[u8]) -> Machine {
    let mut bios = vec![0xf4; 64 << 10];
    bios[..start.len()].copy_from_slice(start);
    // A near jump from the reset vector to offset 0x1000.
    bios[0xfff0..0xfff3].copy_from_slice(&[0xe9, 0x0d, 0x10]);
    bios[0x1000..0x1000 + reset_vector.len()].copy_from_slice(reset_vector);
    Machine::new(MachineConfig { memory: 32 * MIB, bios, ..MachineConfig::default() }).unwrap()
}

fn reports_a_triple_fault() {
    // Without an IDT the next timer interrupt is the end.
    let guest = Guest::boot(32 * MIB, 2, "");
    guest.machine.pause();
    let mut state = guest.machine.save_state().unwrap();
    state.vcpus[1].sregs.idt.limit = 0;
    guest.machine.load_state(&state).unwrap();
    guest.machine.resume().unwrap();
    let stop = guest.machine.wait_stop(PATIENCE);
    assert_eq!(stop, Some(Stop::Reset { vcpu: 1, cause: "triple fault".to_owned() }));
    assert_eq!(guest.machine.run_state(), RunState::Stopped);
    assert!(guest.machine.resume().is_err());
    guest.machine.pause();
}

/// cli; lgdt cs:[0x10]; protected mode; far jump to selector 8.
fn protected_mode(target: u32) -> Vec<u8> {
    let mut code = vec![0xfa, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0x10, 0x00];
    code.extend([0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0x66, 0xea]);
    code.extend(target.to_le_bytes());
    code.extend([8, 0]);
    code
}

/// GDT: null, flat code, then its own limit and address at 0x10, flat data; at 0x20 the code.
fn descriptors(code: &[u8]) -> Vec<u8> {
    let mut start = vec![0; 8];
    start.extend(0x00cf_9b00_0000_ffff_u64.to_le_bytes());
    start.extend([0x1f, 0, 0, 0, 0xff, 0xff, 0, 0]);
    start.extend(0x00cf_9300_0000_ffff_u64.to_le_bytes());
    start.extend(code);
    start
}

fn reports_the_reset_register() {
    let code = [
        0xb8, 0x18, 0, 0, 0, // mov eax, 0x18
        0x8e, 0xd8, // mov ds, ax
        0xc6, 0x05, 0x02, 0x02, 0xa0, 0xfe, 0x42, // mov byte [0xfea00202], 0x42
        0xf4,
    ];
    let machine = firmware(&protected_mode(0xffff_0020), &descriptors(&code));
    machine.resume().unwrap();
    let stop = machine.wait_stop(PATIENCE);
    assert_eq!(stop, Some(Stop::Reset { vcpu: 0, cause: "reset register".to_owned() }));
}

fn names_an_unexpected_exit() {
    // Code cannot be fetched from an address without memory.
    let machine = firmware(&protected_mode(0xfe00_0000), &descriptors(&[]));
    machine.resume().unwrap();
    match machine.wait_stop(PATIENCE) {
        Some(Stop::Failed { vcpu: 0, reason, rip: 0xfe00_0000 }) => {
            assert!(reason.contains("InternalError"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
}

fn counts_of_vcpus_are_checked() {
    for cpus in [0, MAX_CPUS + 1] {
        let config = MachineConfig { cpus, ..MachineConfig::default() };
        assert!(matches!(Machine::new(config), Err(Error::Config(_))));
    }
}
