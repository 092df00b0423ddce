//! The thread that receives requests sends pages beside the core.

use super::*;
use std::collections::BTreeSet;

/// The numbers of all pages of a batch, none of which was sent before.
fn note(batch: &Batch, sent: &mut BTreeSet<(usize, u64)>) {
    for BlockRange { block, pages } in &batch.runs {
        for page in pages.clone() {
            assert!(sent.insert((*block, page)), "page {page} of block {block} goes twice");
        }
    }
}

#[test]
fn a_page_goes_once_by_either_channel_and_the_end_waits_for_all_of_them() {
    let mut simulation = Simulation::new(Peer::Answers, 23);
    simulation.core.options.capabilities.postcopy_ram = true;
    simulation.core.options.capabilities.postcopy_preempt = true;
    simulation.core.start_postcopy().unwrap();
    let (mut sent, mut held, mut serves, mut urgent) = (BTreeSet::new(), None::<(Batch, u32)>, false, 0);
    let mut asked = (0..BLOCKS[0]).rev().step_by(20).peekable();
    let (mut waits, mut result) = (0, None);
    let blocks = BLOCKS.iter().zip(0..).flat_map(|(pages, block)| (0..*pages).map(move |page| (block, page)));
    while result.is_none() {
        let action = simulation.core.poll(simulation.now, simulation.answers.as_mut());
        match &action {
            Action::ServeRequests => {
                serves = true;
                (2..=3).chain([0x42]).for_each(|value| simulation.hear(Message::Pong { value }));
            }
            Action::Pages(batch) if serves => note(batch, &mut sent),
            Action::UrgentPages(batch) => note(batch, &mut sent),
            Action::SendEnd => assert!(held.is_none() && blocks.clone().all(|page| sent.contains(&page) || !serves)),
            Action::Wait { until: None, wake: Wake::Answers } => {
                assert!(held.is_some(), "nothing is waited for");
                waits += 1;
                held.iter_mut().for_each(|(_, left)| *left = 1);
            }
            _ => {}
        }
        match action {
            Action::End(end) => result = Some(end),
            Action::Wait { until: None, .. } => {}
            Action::UrgentPages(batch) => simulation.pages(&batch),
            action => simulation.perform(action),
        }
        let answers = simulation.answers.as_mut().unwrap();
        if !serves {
            continue;
        }
        if let Some(page) = asked.next_if(|_| result.is_none() && !simulation.end.0) {
            let block = CountedString::new("microvm.ram");
            assert!(!answers.message(Message::ReqPages { block, start: page * 4096, len: 4096 }, 0));
        }
        match &mut held {
            // It takes its time, the last longer than all the rest.
            Some((_, left)) if *left > 1 => *left -= 1,
            Some((batch, _)) => {
                let BlockRange { block, pages } = &batch.runs[0];
                for page in pages.clone() {
                    simulation.there[*block][page as usize] = simulation.here[*block][page as usize];
                }
                answers.urgent_sent(Sent { bytes: 4104, normal: 1, zero: 0, ..Sent::default() });
                held = None;
            }
            None => {
                held = answers.next_urgent().map(|batch| (batch, if urgent < 5 { 10 } else { 1000 }));
                if let Some((batch, _)) = &held {
                    note(batch, &mut sent);
                    urgent += 1;
                    assert!(answers.next_urgent().is_none(), "one at a time");
                }
            }
        }
    }
    assert!(matches!(result, Some(Ok(()))), "{result:?}");
    assert_eq!(simulation.here, simulation.there);
    assert!(urgent > 3 && waits > 0, "{urgent} pages, {waits} waits");
}

/// The preempt channel breaks because the destination fails, which it says on the return path.
#[test]
fn a_preempt_channel_that_fails_leaves_the_last_word_to_the_destination() {
    for (loaded, goes_on) in [(false, true), (true, false)] {
        let mut simulation = Simulation::new(Peer::Answers, 29);
        simulation.core.options.capabilities.postcopy_ram = true;
        simulation.core.options.capabilities.postcopy_preempt = true;
        simulation.core.start_postcopy().unwrap();
        let mut result = None;
        while result.is_none() {
            let action = simulation.core.poll(simulation.now, simulation.answers.as_mut());
            let (serves, waits) = (matches!(action, Action::ServeRequests), matches!(action, Action::Wait { .. }));
            match action {
                Action::End(end) => result = Some(end),
                // No other connection comes.
                Action::AwaitConnection { .. } => break,
                action => simulation.perform(action),
            }
            if serves {
                let values: &[u32] = if loaded { &[2, 3, 0x42] } else { &[2] };
                values.iter().for_each(|value| simulation.hear(Message::Pong { value: *value }));
                let source = io::ErrorKind::BrokenPipe.into();
                simulation.answers.as_mut().unwrap().urgent_failed(MigrationError::Send { doing: "pages", source });
            } else if waits && simulation.core.departed {
                simulation.hear(Message::Shut { status: 1 });
            }
        }
        let failed = matches!(result, Some(Err(MigrationError::PeerFailed { status: 1 })));
        assert_eq!((failed, simulation.running), (goes_on, goes_on), "loaded {loaded}: {result:?}");
    }
}
