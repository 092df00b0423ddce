use qevm_savevm::Step;
use qevm_savevm::ram::{PreemptDecoder, RamBlock, RamBlocks};
use qevm_wire::{CountedString, Decode, Fault, PageGeometry};
use std::sync::Arc;

/// Reads the input as the second channel of `postcopy-preempt`, all at once and in pieces as long as its first byte
/// says.
pub fn savevm_preempt(data: &[u8]) {
    let [piece, channel @ ..] = data else { return };
    assert_eq!(run(channel, channel.len()), run(channel, usize::from(*piece) + 1));
}

/// The records, and whether the channel was legal to its end.
fn run(channel: &[u8], piece: usize) -> (Vec<String>, bool) {
    let mut blocks = RamBlocks::default();
    for (name, pages) in [("microvm.ram", 8192), ("pc.bios", 16)] {
        let name = CountedString::new(name).expect("a name");
        blocks.push(RamBlock::new(name, pages << 12)).expect("two names");
    }
    let mut decoder = PreemptDecoder::new(Arc::new(blocks), PageGeometry::X86);
    let (mut position, mut shown) = (0, piece.min(channel.len()));
    let mut records = Vec::new();
    loop {
        if shown == channel.len() {
            decoder.end_of_input();
        }
        match decoder.next(&channel[position..shown]) {
            Ok(Step::Event { consumed, event }) => {
                records.push(format!("{event:?}"));
                position += consumed;
            }
            Ok(Step::Payload { remaining, .. }) => {
                let left = (shown - position) as u64;
                if left == 0 {
                    shown = (shown + piece).min(channel.len());
                    continue;
                }
                let count = left.min(remaining);
                decoder.skip_payload(count).expect("no more than remains");
                position += count as usize;
            }
            Ok(Step::NeedMore { at_least }) => {
                assert!(at_least > shown - position && shown < channel.len());
                shown = (shown + piece).min(channel.len());
            }
            Ok(Step::End) => return (records, true),
            Err(error) => {
                assert_ne!(error.fault(), Fault::Misuse, "a peer cannot misuse a decoder: {error}");
                return (records, false);
            }
        }
    }
}
