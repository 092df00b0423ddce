use crate::parts::parts;
use qevm_savevm::check::{Expectations, Outcome, Summary, check};
use qevm_savevm::vmdesc::{Description, Schema};
use qevm_savevm::{Decoder, DecoderOptions, Event, Step};
use qevm_wire::{Decode, Limits};

/// The input has two parts: a stream, and what is known of its destination, which is another stream or the output of
/// `-dump-vmstate`.
///
/// A stream must load where it was written; findings must be text.
pub fn savevm_check(data: &[u8]) {
    let limits = Limits { depth: 8, elements: 1 << 16, ..Limits::default() };
    let mut parts = parts(data).map(|(_, part)| part);
    let (Some(stream), Some(destination)) = (parts.next(), parts.next()) else { return };
    let Some(stream) = summarize(stream, &limits) else { return };
    let own = check(&stream, &stream.clone().into());
    let bad = own.iter().find(|finding| finding.outcome == Outcome::Fails);
    assert!(bad.is_none(), "a stream does not load where it was written: {bad:?}");
    let destination = match destination {
        [b'{', ..] => {
            let Ok(schema) = Schema::parse(destination, &limits) else { return };
            Expectations { schema: Some(schema), ..Expectations::default() }
        }
        _ => {
            let Some(summary) = summarize(destination, &limits) else { return };
            summary.into()
        }
    };
    for finding in check(&stream, &destination) {
        assert!(!finding.to_string().is_empty());
    }
}

/// What of a stream matters, up to where it is damaged or ends; `None` if its description is none.
fn summarize(stream: &[u8], limits: &Limits) -> Option<Summary> {
    let mut decoder = Decoder::new(DecoderOptions { limits: limits.clone(), ..DecoderOptions::default() });
    let (mut summary, mut position) = (Summary::default(), 0);
    decoder.end_of_input();
    loop {
        match decoder.next(&stream[position..]) {
            Ok(Step::Event { consumed, event }) => {
                position += consumed;
                summary.event(&event);
                if let Event::VmDescription { len } = event {
                    let text = stream[position..].get(..len as usize)?;
                    summary.description = Some(Description::parse(text, limits).ok()?);
                }
            }
            Ok(Step::Payload { remaining, .. }) => {
                let count = remaining.min((stream.len() - position) as u64);
                if count == 0 {
                    return Some(summary);
                }
                decoder.skip_payload(count).expect("no more than remains");
                position += count as usize;
            }
            Ok(Step::NeedMore { .. } | Step::End) | Err(_) => return Some(summary),
        }
    }
}
