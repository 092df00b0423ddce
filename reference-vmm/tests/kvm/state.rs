//! A guest continues from a saved state in another machine.

use crate::Test;
use crate::guest::Guest;
use qevm_microvm::state::MachineState;
use reference_vmm::Error;
use reference_vmm::memory::GuestMemory;
use std::time::Instant;

pub(crate) const TESTS: &[Test] = &[
    ("state_continues_in_another_machine", continues_in_another_machine),
    ("state_survives_many_hops", survives_many_hops),
    ("state_is_the_same_after_a_load", is_the_same_after_a_load),
    ("state_of_a_fresh_machine_boots_elsewhere", of_a_fresh_machine_boots_elsewhere),
    ("state_of_another_machine_is_refused", of_another_machine_is_refused),
];

/// These need a KVM that keeps a TSC of its own for each machine.
pub(crate) const TSC_TESTS: &[Test] = &[("state_sets_the_tsc_exactly", sets_the_tsc_exactly)];

pub(crate) fn tsc_is_virtual() -> bool {
    let guest = Guest::new(32 * MIB, 1, "");
    let state = guest.machine.save_state().unwrap();
    // A new machine's TSC starts at 0, so it has seen no minute yet.
    let tsc = state.vcpus[0].msrs.iter().find(|msr| msr.index == 0x10).expect("the TSC is saved").value;
    tsc < u64::from(state.vcpus[0].tsc_khz) * 60_000
}

const MIB: u64 = 1 << 20;
const SMALL: &str = "dirty=1M hold=1M zero=1M report=20";

pub(crate) fn copy_ram(from: &GuestMemory, to: &GuestMemory) {
    for (from, to) in from.blocks().iter().zip(to.blocks()) {
        assert_eq!(from.name(), to.name());
        let mut bytes = vec![0; from.used_length() as usize];
        from.read(0, &mut bytes).unwrap();
        to.write(0, &bytes).unwrap();
    }
}

/// A second guest that continues where the paused first one stands.
fn hop(guest: &Guest, cpus: usize) -> Guest {
    guest.machine.pause();
    let state = guest.machine.save_state().unwrap();
    let next = Guest::new(32 * MIB, cpus, "");
    copy_ram(guest.machine.memory(), next.machine.memory());
    next.machine.load_state(&state).unwrap();
    next.machine.resume().unwrap();
    next
}

fn continues_in_another_machine() {
    for cpus in 1..=4 {
        let guest = Guest::boot(32 * MIB, cpus, SMALL);
        let before = guest.wait_until(|progress| progress.pass > 2);
        let next = hop(&guest, cpus);
        let after = next.wait_until(|_| true);
        assert!(after.pass >= before.pass && after.ms >= before.ms && after.ticks >= before.ticks);
        next.assert_healthy();
        assert!(!next.console.text().contains("start"), "it booted anew: {}", next.console.text());
    }
}

fn survives_many_hops() {
    let mut guest = Guest::boot(32 * MIB, 2, SMALL);
    let mut before = guest.wait_until(|_| true);
    for _ in 0..20 {
        guest = hop(&guest, 2);
        let after = guest.wait_until(|_| true);
        assert!(after.pass >= before.pass && after.written > before.written && after.ms >= before.ms);
        before = after;
    }
    guest.assert_healthy();
}

/// Without what goes on by itself: clocks and what depends on them.
pub(crate) fn still(mut state: MachineState) -> MachineState {
    state.clock.clock = 0;
    state.clock.reliable = false;
    for vcpu in &mut state.vcpus {
        // TSC and TSC deadline; Hyper-V's run time of the vCPU and its reference counter.
        vcpu.msrs.retain(|msr| !matches!(msr.index, 0x10 | 0x6e0 | 0x4000_0010 | 0x4000_0020));
        // The local APIC's current timer count.
        vcpu.lapic[0x390..0x394].fill(0);
    }
    for channel in &mut state.pit.channels {
        // KVM lets the count begin anew when it is set.
        channel.count_load_time = 0;
    }
    state
}

fn is_the_same_after_a_load() {
    for cpus in [1, 3] {
        let guest = Guest::boot(32 * MIB, cpus, SMALL);
        guest.machine.pause();
        let saved = guest.machine.save_state().unwrap();
        let next = Guest::new(32 * MIB, cpus, "");
        copy_ram(guest.machine.memory(), next.machine.memory());
        next.machine.load_state(&saved).unwrap();
        let loaded = next.machine.save_state().unwrap();
        assert_eq!(saved.virtual_clock, loaded.virtual_clock);
        let (saved, loaded) = (still(saved), still(loaded));
        for (saved, loaded) in saved.vcpus.iter().zip(&loaded.vcpus) {
            // Piece by piece, so that a difference can be read.
            assert_eq!(saved.regs, loaded.regs);
            assert_eq!(saved.sregs, loaded.sregs);
            assert_eq!(saved.lapic, loaded.lapic);
            assert_eq!(saved.events, loaded.events);
            assert_eq!(saved.debug, loaded.debug);
            let msrs = saved.msrs.iter().zip(&loaded.msrs).filter(|(saved, loaded)| saved != loaded);
            assert_eq!(msrs.collect::<Vec<_>>(), [], "MSRs");
            let bytes = (0..).zip(saved.xsave.iter().zip(&loaded.xsave)).filter(|(_, (saved, loaded))| saved != loaded);
            assert_eq!(bytes.collect::<Vec<_>>(), [], "extended state");
        }
        assert_eq!((&saved.pics, &saved.ioapic, &saved.pit), (&loaded.pics, &loaded.ioapic, &loaded.pit));
        assert_eq!(saved, loaded);
    }
}

fn sets_the_tsc_exactly() {
    let guest = Guest::new(32 * MIB, 2, "");
    let mut state = guest.machine.save_state().unwrap();
    let second = u64::from(state.vcpus[0].tsc_khz) * 1000;
    // KVM would take each of the later ones for an attempt to synchronise with the one before, and ignore it.
    for wanted in [second, second + second / 2, second * 5 / 4, second * 1000, 1000] {
        for vcpu in &mut state.vcpus {
            vcpu.msrs.iter_mut().find(|msr| msr.index == 0x10).expect("the TSC is saved").value = wanted;
        }
        let start = Instant::now();
        guest.machine.load_state(&state).unwrap();
        // They are stopped until the machine runs.
        guest.machine.resume().unwrap();
        guest.machine.pause();
        let loaded = guest.machine.save_state().unwrap();
        let passed = (start.elapsed().as_secs_f64() * second as f64) as u64 + second / 1000;
        for vcpu in &loaded.vcpus {
            let tsc = vcpu.msrs.iter().find(|msr| msr.index == 0x10).unwrap().value;
            assert!((wanted..wanted + passed).contains(&tsc), "wanted {wanted}, at most {passed} ago; found {tsc}");
        }
    }
}

fn of_a_fresh_machine_boots_elsewhere() {
    let first = Guest::new(32 * MIB, 2, SMALL);
    let state = first.machine.save_state().unwrap();
    let next = Guest::new(32 * MIB, 2, SMALL);
    next.machine.load_state(&state).unwrap();
    next.machine.resume().unwrap();
    next.assert_healthy();
    assert!(first.console.lines().is_empty());
}

fn of_another_machine_is_refused() {
    let one = Guest::new(32 * MIB, 1, "");
    let two = Guest::new(32 * MIB, 2, "");
    let mut state = one.machine.save_state().unwrap();
    assert!(matches!(two.machine.load_state(&state), Err(Error::State(_))));
    state.vcpus[0].lapic.pop();
    assert!(matches!(one.machine.load_state(&state), Err(Error::State(_))));
    state.vcpus[0].lapic.push(0);
    state.vcpus[0].xsave.truncate(100);
    assert!(matches!(one.machine.load_state(&state), Err(Error::State(_))));
}
