//! A model of a whole migration over page channels: a guest that dirties pages, a source that sends rounds, channels
//! that deliver in any order, and a destination. It shows that the barrier keeps older copies from newer ones, and that
//! nothing but the barrier does.

use super::{FlushMode, Progress, SourceSync, SyncBarrier, SyncStep, Waiting};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use qevm_wire::{Profile, QemuVersion};
use std::collections::VecDeque;

/// What travels. A page is its number and the version of its content.
#[derive(Debug, Clone, Copy)]
enum Item {
    Page {
        page: usize,
        version: u64,
    },
    /// A SYNC packet of 9.0, or (with pages in front of it) the SYNC flag of older releases.
    Sync,
    Flush,
    Eos,
    End,
    /// The reader fails here.
    Death,
}

/// One decision of the source for one page: on which channel its copy travels; 0 is the main channel, where zero pages
/// of mode `legacy` do.
type Route = u8;

#[derive(Debug, Clone)]
struct Plan {
    qemu: QemuVersion,
    machine: &'static str,
    channels: u8,
    /// For each round, for each page: whether it is dirty, and its route.
    rounds: Vec<Vec<(bool, Route)>>,
    /// How many pages go into a section.
    section: usize,
    postcopy: bool,
}

fn plan() -> impl Strategy<Value = Plan> {
    let sources =
        [((5, 2), "microvm"), ((8, 2), "microvm"), ((10, 0), "pc-q35-8.0"), ((10, 0), "microvm"), ((11, 1), "microvm")];
    let pages = prop::collection::vec((any::<bool>(), any::<u8>()), 5);
    (prop::sample::select(sources.to_vec()), 1u8..5, prop::collection::vec(pages, 1..6), 1usize..6, any::<bool>())
        .prop_map(|((qemu, machine), channels, rounds, section, postcopy)| Plan {
            qemu: QemuVersion::new(qemu.0, qemu.1),
            machine,
            channels,
            rounds,
            section,
            postcopy,
        })
}

impl Plan {
    /// What the source puts on the main channel (first) and on each page channel, and the final versions of all pages.
    fn send(&self) -> (Vec<VecDeque<Item>>, Vec<u64>) {
        let mut sync = SourceSync::new(&Profile::new(self.qemu, self.machine));
        let mut queues = vec![VecDeque::new(); 1 + usize::from(self.channels)];
        let mut versions = vec![0; self.rounds[0].len()];
        put(&mut queues, sync.setup().unwrap());
        for (number, round) in self.rounds.iter().enumerate() {
            let last = number + 1 == self.rounds.len();
            let mut in_section = 0;
            for (page, (dirty, route)) in round.iter().enumerate() {
                // The first round sends every page.
                if !dirty && number > 0 {
                    continue;
                }
                versions[page] = number as u64 + 1;
                let route = usize::from(route % (self.channels + 1));
                sync.pages().unwrap();
                queues[route].push_back(Item::Page { page, version: versions[page] });
                in_section += 1;
                if in_section == self.section {
                    put(&mut queues, sync.section_end().unwrap());
                    in_section = 0;
                }
            }
            put(&mut queues, sync.round_end().unwrap());
            if !last {
                put(&mut queues, sync.section_end().unwrap());
            }
        }
        put(&mut queues, if self.postcopy { sync.before_postcopy() } else { sync.completion() }.unwrap());
        queues.iter_mut().for_each(|queue| queue.push_back(Item::End));
        (queues, versions)
    }
}

fn put(queues: &mut [VecDeque<Item>], steps: &[SyncStep]) {
    for step in steps {
        match step {
            SyncStep::SyncChannels => queues[1..].iter_mut().for_each(|queue| queue.push_back(Item::Sync)),
            SyncStep::Flush => queues[0].push_back(Item::Flush),
            SyncStep::Eos => queues[0].push_back(Item::Eos),
        }
    }
}

/// Delivers everything in the order that `choices` picks. `Err` says what went wrong.
fn deliver(
    mut queues: Vec<VecDeque<Item>>,
    versions: &[u64],
    mode: Option<FlushMode>,
    choices: &[u8],
    with_barrier: bool,
) -> Result<(), String> {
    let mut barrier = SyncBarrier::new(queues.len() as u8 - 1, mode);
    let mut memory = vec![0; versions.len()];
    let mut choices = choices.iter().cycle();
    loop {
        let waits = |queue: usize| match queue {
            0 => barrier.main_waits(),
            channel => barrier.channel_waits(channel as u8 - 1),
        };
        let ready: Vec<usize> =
            (0..queues.len()).filter(|q| !(queues[*q].is_empty() || with_barrier && waits(*q))).collect();
        if ready.is_empty() {
            break;
        }
        let queue = ready[usize::from(*choices.next().unwrap()) % ready.len()];
        let channel = (queue as u8).wrapping_sub(1);
        let fail = |error: super::SyncError| error.to_string();
        match queues[queue].pop_front().unwrap() {
            Item::Page { page, version } if memory[page] > version => {
                return Err(format!("version {version} of page {page} over version {}", memory[page]));
            }
            Item::Page { page, version } => memory[page] = version,
            _ if !with_barrier => {}
            Item::Sync => drop(barrier.channel_sync(channel).map_err(fail)?),
            Item::Flush => drop(barrier.main_flush().map_err(fail)?),
            Item::Eos => drop(barrier.main_eos().map_err(fail)?),
            Item::Death => {
                let error = barrier.abort("it died");
                assert_eq!((barrier.healthy(), barrier.timed_out()), (Err(error.clone()), error.clone()));
                assert_eq!(barrier.clone().main_flush(), Err(error.clone()));
                assert_eq!(barrier.clone().channel_sync(0), Err(error.clone()));
                return Err(error.to_string());
            }
            Item::End if queue == 0 => barrier.main_end().map_err(fail)?,
            Item::End => barrier.channel_end(channel).map_err(fail)?,
        }
    }
    if queues.iter().any(|queue| !queue.is_empty()) {
        return Err(format!("no reader may go on: {}", barrier.waiting()));
    }
    if memory != versions { Err("a page was lost".into()) } else { Ok(()) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_older_copy_is_ever_loaded_over_a_newer_one(
        plan in plan(),
        known in any::<bool>(),
        choices in prop::collection::vec(any::<u8>(), 1..200),
    ) {
        let (queues, versions) = plan.send();
        let mode = FlushMode::of(&Profile::new(plan.qemu, plan.machine));
        let result = deliver(queues, &versions, known.then_some(mode), &choices, true);
        prop_assert_eq!(result, Ok(()));
    }

    /// One SYNC packet lost or repeated on one channel ends in an error that names it, in any order of delivery.
    #[test]
    fn a_wrong_number_of_sync_packets_is_never_a_silent_stop(
        plan in plan(),
        which in any::<prop::sample::Index>(),
        channel in any::<prop::sample::Index>(),
        more in any::<bool>(),
        choices in prop::collection::vec(any::<u8>(), 1..200),
    ) {
        let (mut queues, versions) = plan.send();
        let queue = &mut queues[1 + channel.index(usize::from(plan.channels))];
        let syncs: Vec<usize> = (0..queue.len()).filter(|i| matches!(queue[*i], Item::Sync)).collect();
        let at = syncs[which.index(syncs.len())];
        if more {
            queue.insert(at, Item::Sync);
        } else {
            queue.remove(at);
        }
        let error = deliver(queues, &versions, None, &choices, true).unwrap_err();
        prop_assert!(!error.starts_with("no reader may go on"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// A reader that dies anywhere, in any order of delivery, leaves no other waiting: unless memory was
    /// complete before, all get its reason.
    #[test]
    fn a_reader_that_dies_leaves_none_waiting(
        plan in plan(),
        who in any::<prop::sample::Index>(),
        place in any::<prop::sample::Index>(),
        choices in prop::collection::vec(any::<u8>(), 1..200),
    ) {
        let (mut queues, versions) = plan.send();
        let queues_len = queues.len();
        let queue = &mut queues[who.index(queues_len)];
        queue.truncate(place.index(queue.len()));
        queue.push_back(Item::Death);
        let error = deliver(queues, &versions, None, &choices, true).unwrap_err();
        prop_assert_eq!(error, "a reader has given up: it died");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Channels come when they like, to a destination that has not counted them: every SYNC packet is taken for the
    /// synchronisation that it belongs to, and no wait is endless.
    #[test]
    fn channels_that_come_late_leave_none_waiting(
        plan in plan(),
        choices in prop::collection::vec(any::<u8>(), 1..200),
    ) {
        let (mut queues, _) = plan.send();
        let mut barrier = SyncBarrier::new(0, None);
        let mut here = vec![false; queues.len()];
        for choice in choices.iter().cycle() {
            let waits = |queue: usize| match queue {
                0 => barrier.main_waits(),
                channel => barrier.channel_waits(channel as u8 - 1),
            };
            let ready: Vec<usize> = (0..queues.len()).filter(|q| !queues[*q].is_empty() && !waits(*q)).collect();
            if ready.is_empty() {
                break;
            }
            let queue = ready[usize::from(*choice) % ready.len()];
            let channel = (queue as u8).wrapping_sub(1);
            let result = match queues[queue].front().unwrap() {
                _ if queue > 0 && !std::mem::replace(&mut here[queue], true) => {
                    barrier.join(channel).unwrap();
                    continue;
                }
                Item::Page { .. } | Item::Death => Ok(()),
                Item::Sync => barrier.channel_sync(channel).map(drop),
                Item::Flush => barrier.main_flush().map(drop),
                Item::Eos => barrier.main_eos().map(drop),
                Item::End if queue == 0 => barrier.main_end(),
                Item::End => barrier.channel_end(channel),
            };
            prop_assert_eq!(result, Ok(()));
            queues[queue].pop_front();
        }
        prop_assert!(queues.iter().all(VecDeque::is_empty), "no reader may go on: {}", barrier.waiting());
        prop_assert_eq!(barrier.waiting(), Waiting::Nobody);
    }
}

/// The model can fail: without the barrier some order of delivery loads an older copy.
#[test]
fn without_the_barrier_pages_go_stale() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut stale = 0;
    for _ in 0..200 {
        let input = (plan(), prop::collection::vec(any::<u8>(), 1..200));
        let (plan, choices) = input.new_tree(&mut runner).unwrap().current();
        let (queues, versions) = plan.send();
        stale += usize::from(deliver(queues, &versions, None, &choices, false).is_err());
    }
    assert!(stale > 20, "{stale} of 200");
}

#[test]
fn one_round_on_one_channel_before_another_is_the_smallest_stale_page() {
    let page = |version| Item::Page { page: 0, version };
    let queues = || {
        vec![
            VecDeque::from([Item::Flush, Item::Eos, Item::End]),
            VecDeque::from([page(1), Item::Sync, Item::End]),
            VecDeque::from([Item::Sync, page(2), Item::End]),
        ]
    };
    // Always the last that may go on: the second page channel comes first.
    let stale = deliver(queues(), &[2], None, &[2], false);
    assert_eq!(stale, Err("version 1 of page 0 over version 2".into()));
    assert_eq!(deliver(queues(), &[2], None, &[2], true), Ok(()));
    assert_eq!(SyncBarrier::new(1, None).main_flush(), Ok(Progress::Wait));
}
