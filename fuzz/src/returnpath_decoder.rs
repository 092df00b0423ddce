use qevm_returnpath::requests::{PageRequests, RequestBlock, RequestBlocks};
use qevm_returnpath::session::SourceSession;
use qevm_returnpath::{Decoder, Encoder, Event, Message};
use qevm_wire::{Blame, CountedString, Decode, Fault, Limits, Step, Writer};

/// Reads the input as a return path, shown in pieces, and writes it again; every message also goes through the source's
/// session and page requests.
pub fn returnpath_decoder(data: &[u8]) {
    let mut decoder = Decoder::new(Limits::default());
    let (mut encoder, mut again) = (Encoder::default(), Writer::new());
    let mut session = SourceSession::new(None);
    session.postcopy_starts().expect("the first step");
    let name = CountedString::new("pc.ram").expect("a name");
    let block = RequestBlock { name, used_length: 32 << 20, page_size: 0x1000 };
    let mut requests = PageRequests::new(RequestBlocks::new(vec![block]).expect("one block"), 0x1000);
    let (mut position, mut shown) = (0, 0);
    loop {
        if shown == data.len() {
            decoder.end_of_input();
        }
        match decoder.next(&data[position..shown]) {
            Ok(Step::Event { consumed, event }) => {
                encoder.event(&event, &mut again).expect("what was decoded can be encoded");
                position += consumed;
                let Event::Message(message) = event else { continue };
                if let Err(error) = session.message(&message) {
                    assert_ne!(error.fault(), Fault::Misuse, "a peer cannot misuse a session: {error}");
                }
                if let Message::ReqPages { block, start, len } = message {
                    if let Err(error) = requests.request(block.as_ref(), start, len) {
                        assert_ne!(error.fault(), Fault::Misuse, "a peer cannot misuse the queue: {error}");
                    }
                    assert!(requests.waiting() <= 8192);
                }
            }
            Ok(Step::Payload { remaining, .. }) => {
                let count = remaining.min((data.len() - position) as u64);
                again.bytes(&data[position..position + count as usize]);
                decoder.skip_payload(count).expect("no more than remains");
                position += count as usize;
                shown = shown.max(position);
            }
            Ok(Step::NeedMore { at_least }) => {
                assert!(position + at_least > shown, "asks for what it has");
                shown = (position + at_least).min(data.len());
            }
            // SHUT is the end, whatever follows.
            Ok(Step::End) if shown < data.len() => shown = data.len(),
            Ok(Step::End) => break assert_eq!(again.as_bytes(), data),
            Err(error) => {
                assert!(error.offset <= data.len() as u64, "{error}");
                assert_ne!(error.fault(), Fault::Misuse, "a peer cannot misuse a decoder: {error}");
                break assert_eq!(again.as_bytes(), &data[..position]);
            }
        }
    }
    let waiting = requests.waiting();
    assert_eq!(std::iter::from_fn(|| requests.next_page()).count() as u64, waiting);
}
