use crate::parts::parts;
use qevm_savevm::check::{Expectations, Outcome, Summary, check};
use qevm_savevm::vmdesc::{Description, Schema};
use qevm_savevm::{Decoder, DecoderOptions, Event};
use qevm_wire::{DriveError, Driver, Fault, Limits};
use std::collections::BTreeSet;
use std::io::Read;

/// The input has two parts: a stream, and what is known of its destination, which is another stream or the output of
/// `-dump-vmstate`.
///
/// A stream must load where it was written, unless it has a section twice, which no machine writes; findings must be
/// text.
pub fn savevm_check(data: &[u8]) {
    let limits = Limits { depth: 8, elements: 1 << 16, ..Limits::default() };
    let mut parts = parts(data).map(|(_, part)| part);
    let (Some(stream), Some(destination)) = (parts.next(), parts.next()) else { return };
    let Some(stream) = summarize(stream, &limits) else { return };
    let own = check(&stream, &stream.clone().into());
    let bad = own.iter().find(|finding| finding.outcome == Outcome::Fails);
    let mut names = BTreeSet::new();
    let once = stream.sections.iter().all(|section| names.insert((&section.idstr, section.instance_id)));
    assert!(!once || bad.is_none(), "a stream does not load where it was written: {bad:?}");
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
    let options = DecoderOptions { limits: limits.clone(), ..DecoderOptions::default() };
    let (mut driver, mut summary) = (Driver::new(stream, Decoder::new(options)), Summary::default());
    loop {
        let described = match driver.next() {
            Ok(Some(event)) => {
                summary.event(&event);
                matches!(event, Event::VmDescription { .. })
            }
            Ok(None) => return Some(summary),
            Err(DriveError::Stream(error)) => {
                assert_ne!(error.fault(), Fault::Misuse, "a peer cannot misuse a decoder: {error}");
                return Some(summary);
            }
            Err(error) => panic!("memory can be read: {error}"),
        };
        if described {
            let mut text = Vec::new();
            driver.payload().read_to_end(&mut text).expect("memory can be read");
            if driver.payload().remaining() > 0 {
                return None;
            }
            summary.description = Some(Description::parse(&text, limits).ok()?);
        }
    }
}
