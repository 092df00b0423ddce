use crate::parts::parts;
use qevm_nbd::{Chunk, ClientDecoder, ClientEvent, Request, ServerDecoder, ServerEvent, number};
use qevm_wire::{Blame, Decode, Fault, Step, Writer};
use std::collections::VecDeque;

/// The requests that a client made.
fn requests(mut data: &[u8]) -> VecDeque<Request> {
    let (mut decoder, mut requests) = (ClientDecoder::default(), VecDeque::new());
    while let Ok(step) = decoder.next(data) {
        let count = match step {
            Step::Event { consumed, event } => {
                match event {
                    ClientEvent::Option { option: number::option::GO, .. } => decoder.begin(),
                    ClientEvent::Request(request) => requests.push_back(request),
                    _ => {}
                }
                consumed
            }
            Step::Payload { remaining, .. } => {
                let count = remaining.min(data.len() as u64);
                decoder.skip_payload(count).expect("no more than remains");
                if count < remaining {
                    return requests;
                }
                count as usize
            }
            _ => return requests,
        };
        data = &data[count..];
    }
    requests
}

/// Reads the second part of the input as what a server sends to the client whose bytes are the first, shown in pieces,
/// and writes it again.
pub fn nbd_server(data: &[u8]) {
    let mut parts = parts(data);
    let (Some((_, client)), Some((_, data))) = (parts.next(), parts.next()) else { return };
    let mut requests = requests(client);
    let (mut decoder, mut again) = (ServerDecoder::default(), Writer::new());
    let (mut position, mut shown) = (0, 0);
    let expect_next = |decoder: &mut ServerDecoder, requests: &mut VecDeque<Request>| {
        if let Some(Request { cookie, offset, len, .. }) = requests.pop_front() {
            decoder.expect(cookie, offset, len);
        }
    };
    loop {
        if shown == data.len() {
            decoder.end_of_input();
        }
        match decoder.next(&data[position..shown]) {
            Ok(Step::Event { consumed, event }) => {
                event.encode(&mut again);
                let done = match event {
                    ServerEvent::OptionReply { option: number::option::GO, reply: number::reply::ACK, .. } => {
                        decoder.begin();
                        true
                    }
                    ServerEvent::Simple { .. } | ServerEvent::Chunk(Chunk { done: true, .. }) => true,
                    _ => false,
                };
                // Its payload is counted already.
                if done {
                    expect_next(&mut decoder, &mut requests);
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
