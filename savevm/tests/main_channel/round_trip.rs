//! Whatever is decoded is encoded to the same bytes, in whatever pieces the decoder was shown it.

use crate::pump::pump;
use crate::streams::{configuration, items, write};
use proptest::collection::vec;
use proptest::prelude::*;
use qevm_savevm::{Decoder, DecoderOptions, Step};
use qevm_wire::{Decode, Fault};

fn decoder() -> Decoder {
    Decoder::new(DecoderOptions::default())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn pieces_make_no_difference(
        configuration in configuration(),
        items in items(),
        description in prop::option::of("\\{[a-z\":, ]{0,60}\\}"),
        pieces in vec(1usize..200, 1..20),
    ) {
        let stream = write(configuration.as_ref(), &items, description.as_deref());
        let whole = pump(&mut decoder(), &stream, || usize::MAX)?;
        prop_assert_eq!(&whole.bytes, &stream);
        let mut pieces = pieces.into_iter().cycle();
        let pieced = pump(&mut decoder(), &stream, || pieces.next().unwrap_or(1))?;
        prop_assert_eq!(&pieced, &whole);
        // Payloads, above all a disk's blocks, are the caller's: byte by byte they would only be slow.
        if stream.len() < 20_000 {
            prop_assert_eq!(&pump(&mut decoder(), &stream, || 1)?, &whole);
        }
    }

    #[test]
    fn a_stream_that_ends_early_is_truncated(configuration in configuration(), items in items(), cut: prop::sample::Index) {
        let stream = write(configuration.as_ref(), &items, Some("{}"));
        // After the end of the stream a missing description is no error.
        let end = stream.len() - b"\x06\0\0\0\x02{}".len();
        let cut = cut.index(end);
        let error = pump(&mut decoder(), &stream[..cut], || 777).unwrap_err();
        prop_assert!(matches!(error.fault(), Fault::Truncated | Fault::Malformed), "{}", error);
        prop_assert!(error.offset <= cut as u64);
        if error.fault() == Fault::Malformed {
            // Only the search for a footer cannot tell the end of the input from an end that is not there.
            prop_assert!(error.to_string().contains("no end of the section's content"), "{}", error);
        }
    }

    #[test]
    fn broken_streams_are_refused_or_read(
        items in items(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        piece in 1usize..5000,
    ) {
        let mut stream = write(None, &items, Some("{}"));
        for (at, value) in damage {
            let at = at.index(stream.len());
            stream[at] = value;
        }
        if let Ok(pumped) = pump(&mut decoder(), &stream, || piece) {
            prop_assert_eq!(pumped.bytes, stream);
        }
    }

    /// A reader of a live connection that waits for what it is asked for never waits for what does not come.
    #[test]
    fn no_more_is_asked_for_than_comes(configuration in configuration(), items in items()) {
        let stream = write(configuration.as_ref(), &items, Some("{}"));
        let mut decoder = decoder();
        let (mut position, mut shown) = (0, 0);
        while position < stream.len() {
            match decoder.next(&stream[position..shown])? {
                Step::Event { consumed, .. } => position += consumed,
                Step::Payload { remaining, .. } => {
                    decoder.skip_payload(remaining)?;
                    position += remaining as usize;
                    shown = shown.max(position);
                }
                Step::NeedMore { at_least } => {
                    prop_assert!(at_least > shown - position);
                    shown = position + at_least;
                    prop_assert!(shown <= stream.len(), "asks for {} bytes at {}", at_least, position);
                }
                Step::End => break,
            }
        }
        prop_assert_eq!(position, stream.len());
        prop_assert!(decoder.is_complete());
    }

    #[test]
    fn any_bytes_are_refused_or_read(bytes in vec(any::<u8>(), 0..200), start in 0usize..4) {
        let starts = [&b""[..], b"QEVM\0\0\0\x03", b"QEVM\0\0\0\x03\x07", b"QEVM\0\0\0\x03\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04"];
        let stream = [starts[start], &bytes].concat();
        if let Ok(pumped) = pump(&mut decoder(), &stream, || 7) {
            prop_assert_eq!(pumped.bytes, stream);
        }
    }
}
