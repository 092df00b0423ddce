use qevm_nbd::{ClientDecoder, ClientEvent, Export, Negotiation, Outcome};
use qevm_wire::{Blame, Decode, Fault, Step, Writer};

/// Reads the input as what a client sends, shown in pieces, answers its options, and writes everything again.
pub fn nbd_client(data: &[u8]) {
    let export = Export { description: "a guest".into(), len: 200 << 10 };
    let (mut decoder, mut negotiation) = (ClientDecoder::default(), Negotiation::default());
    let mut again = Writer::new();
    let (mut position, mut shown) = (0, 0);
    loop {
        if shown == data.len() {
            decoder.end_of_input();
        }
        match decoder.next(&data[position..shown]) {
            Ok(Step::Event { consumed, event }) => {
                event.encode(&mut again);
                if let ClientEvent::Option { option, data } = event {
                    let mut answer = Writer::new();
                    let outcome = negotiation.option(&export, option, data, &mut answer);
                    assert!(answer.len() <= 1024 + 4 * data.len(), "an answer of {} bytes", answer.len());
                    if outcome == Outcome::Begin {
                        decoder.begin();
                    }
                }
                position += consumed;
            }
            Ok(Step::Payload { remaining, .. }) => {
                let count = remaining.min((data.len() - position) as u64) as usize;
                again.bytes(&data[position..position + count]);
                decoder.skip_payload(count as u64).expect("no more than remains");
                position += count;
                shown = shown.max(position);
            }
            Ok(Step::NeedMore { at_least }) => {
                assert!(position + at_least > shown, "asks for what it has");
                shown = (position + at_least).min(data.len());
            }
            Ok(Step::End) => break assert_eq!(again.as_bytes(), data),
            Err(error) => {
                assert!(error.offset <= data.len() as u64, "{error}");
                assert_ne!(error.kind.fault(), Fault::Misuse, "a peer cannot misuse a decoder: {error}");
                break assert_eq!(again.as_bytes(), &data[..position]);
            }
        }
    }
}
