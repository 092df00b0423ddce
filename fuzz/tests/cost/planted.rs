//! The judge is judged: what costs too much must be found.

use crate::cost::Verdicts;
use crate::drivers::{Files, measure};
use crate::families::judge;

fn any(count: u64) -> Files {
    Files::main(vec![1; count as usize])
}

/// A decoder that looks for the end of an item from its start again for every byte that comes.
fn quadratic(files: &Files) -> u64 {
    (1..=files.main.len() as u64).sum()
}

/// The same, in bytes moved.
fn quadratic_copies(files: &Files) -> u64 {
    (0..files.main.len()).map(|end| files.main[..end].to_vec().len()).max().unwrap_or(0) as u64
}

/// A decoder that believes a length.
fn bomb(_: &Files) -> u64 {
    let claimed: Vec<u8> = Vec::with_capacity(200 << 20);
    claimed.capacity() as u64
}

/// A decoder that makes a hundred small things of every byte, one after the other.
fn busy(files: &Files) -> u64 {
    files.main.iter().map(|byte| (0..100).map(|_| vec![*byte; 4096].len()).sum::<usize>()).sum::<usize>() as u64
}

#[test]
fn a_quadratic_decoder_is_found() {
    let found = judge("planted", 4000, any, quadratic).expect("a finding");
    assert!(found.contains("calls: 8002000, and 32004000"), "{found}");
    let found = judge("planted", 4000, any, quadratic_copies).expect("a finding");
    assert!(found.contains("bytes moved"), "{found}");
    assert_eq!(judge("linear", 4000, any, |files| files.main.len() as u64), None);
}

#[test]
fn a_bomb_is_found() {
    let judged = |read: fn(&Files) -> u64, count| {
        let (files, mut verdicts) = (any(count), Verdicts::default());
        verdicts.add(|| "planted".into(), files.len(), measure(|| read(&files)));
        verdicts.beyond.pop()
    };
    assert!(judged(bomb, 100).expect("a finding").contains("bytes of memory"));
    assert!(judged(busy, 1000).expect("a finding").contains("bytes allocated"));
    assert_eq!(judged(|files| files.main.to_vec().len() as u64, 1000), None);
}
