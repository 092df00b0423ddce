//! What a caller does wrong is never reported as the peer's fault, and what a peer sends never as misuse.

use qevm_returnpath::requests::{PageFaults, PageRequests, RequestBlock, RequestBlocks, RequestError};
use qevm_returnpath::session::SourceSession;
use qevm_returnpath::switchover::{DestinationGate, SourceGate, SwitchoverAckFlow, SwitchoverError};
use qevm_returnpath::{Decoder, Encoder, Message, MessageError, SessionError};
use qevm_wire::{Blame, CountedString, Decode, DriveError, Driver, Fault, Limits, PageGeometry, WireError, Writer};

fn name() -> CountedString {
    CountedString::new("pc.ram").unwrap()
}

fn shut(status: u32) -> Message {
    Message::Shut { status }
}

#[test]
fn a_decoder_is_told_of_what_was_taken() {
    let mut writer = Writer::new();
    Encoder::default().message(&Message::RecvBitmap { block: name(), len: 8 }, &mut writer).unwrap();
    writer.bytes(&[0xff; 8]);
    let mut driver = Driver::new(writer.as_bytes(), Decoder::new(Limits::default()));
    let error = driver.decoder_mut().skip_payload(1).unwrap_err();
    assert_eq!((error.fault(), error.kind), (Fault::Misuse, WireError::SkipTooFar { found: 1, remaining: 0 }.into()));
    driver.next().unwrap();
    let error = driver.decoder_mut().skip_payload(9).unwrap_err();
    assert_eq!((error.fault(), error.kind), (Fault::Misuse, WireError::SkipTooFar { found: 9, remaining: 8 }.into()));
    driver.decoder_mut().skip_payload(8).unwrap();
    let error = driver.next().unwrap_err();
    assert!(matches!(error, DriveError::OutOfStep { .. }) && error.fault() == Some(Fault::Misuse), "{error}");
    // The peer's error stays the peer's.
    let mut decoder = Decoder::default();
    let first = decoder.next(&[0; 4]).unwrap_err();
    assert_eq!((first.fault(), Err(first)), (Fault::Unsupported, decoder.next(&[0; 4])));
}

#[test]
fn an_encoder_refuses_what_its_caller_may_not_write() {
    let mut writer = Writer::new();
    let mut after_shut = Encoder::default();
    after_shut.message(&shut(0), &mut writer).unwrap();
    let mut in_bitmap = Encoder::default();
    in_bitmap.message(&Message::RecvBitmap { block: name(), len: 8 }, &mut writer).unwrap();
    for error in [
        after_shut.message(&Message::ResumeAck, &mut writer).unwrap_err(),
        in_bitmap.message(&Message::ResumeAck, &mut writer).unwrap_err(),
        Encoder::default().bitmap_end(&mut writer).unwrap_err(),
    ] {
        assert!(matches!(error.kind, qevm_returnpath::ErrorKind::Message(MessageError::Order { .. })), "{error}");
        assert_eq!(error.fault(), Fault::Misuse);
    }
}

/// Steps of a source, each told right, and one that is not.
#[test]
fn a_source_that_takes_a_step_out_of_order_is_the_callers() {
    type Step = fn(&mut SourceSession) -> Result<(), SessionError>;
    let ask: Step = |session| session.ask_bitmap(name(), 0x10000, PageGeometry::X86);
    let fails: Step = |session| session.message(&shut(1)).map(drop);
    let (precopy, recovery) = (SourceSession::new(None), SourceSession::recovery());
    let wrong: [(&SourceSession, &[Step]); 9] = [
        (&precopy, &[fails, |session| session.ping(1)]),
        (&precopy, &[fails, SourceSession::everything_sent]),
        (&precopy, &[fails, SourceSession::postcopy_starts]),
        (&precopy, &[SourceSession::postcopy_starts, SourceSession::postcopy_starts]),
        (&recovery, &[SourceSession::postcopy_starts]),
        (&precopy, &[ask]),
        (&precopy, &[SourceSession::ask_resume]),
        (&recovery, &[ask, ask]),
        (&recovery, &[ask, SourceSession::ask_resume]),
    ];
    for (number, (session, steps)) in wrong.into_iter().enumerate() {
        let mut session = session.clone();
        let (last, before) = steps.split_last().unwrap();
        before.iter().for_each(|step| step(&mut session).unwrap());
        let error = last(&mut session).unwrap_err();
        assert!(
            matches!(error, SessionError::Order { .. }) && error.fault() == Fault::Misuse,
            "case {number}: {error}"
        );
    }
}

/// Every message at every stage, from the first to the last.
#[test]
fn no_message_is_misuse() {
    let messages = [
        Message::Pong { value: 1 },
        Message::ReqPages { block: Some(name()), start: 0, len: 0x1000 },
        Message::ReqPages { block: None, start: 1, len: 0 },
        Message::RecvBitmap { block: name(), len: 9 },
        Message::ResumeAck,
        Message::SwitchoverAck,
        shut(0),
        shut(1),
    ];
    let mut postcopy = SourceSession::new(None);
    postcopy.postcopy_starts().unwrap();
    let counted = SourceSession::new(Some(SwitchoverAckFlow::Counted));
    let mut over = SourceSession::new(None);
    over.message(&shut(1)).map(drop).unwrap();
    for session in [SourceSession::new(None), counted, postcopy, SourceSession::recovery(), over] {
        let mut refused = 0;
        for message in &messages {
            if let Err(error) = session.clone().message(message) {
                assert_ne!(error.fault(), Fault::Misuse, "{message:?}: {error}");
                refused += 1;
            }
        }
        assert!(refused > 2, "{session:?}");
    }
}

#[test]
fn a_switchover_gate_knows_whose_a_step_is() {
    let legacy = Some(SwitchoverAckFlow::Legacy);
    let mut source = SourceGate::new(Some(SwitchoverAckFlow::Counted));
    source.guest_stopped();
    assert_eq!(source.request("vfio").unwrap_err().fault(), Fault::Misuse);
    assert_eq!(source.ack().unwrap_err().fault(), Fault::Mismatch);
    let mut gate = DestinationGate::new(legacy);
    gate.announce("vfio").unwrap();
    // The stream tells a device to agree, before it has opened a return path.
    let error = gate.agree("vfio").unwrap_err();
    assert_eq!((error.fault(), error), (Fault::Mismatch, SwitchoverError::NoReturnPath { device: "vfio".into() }));
    let _ = gate.return_path_opened().unwrap();
    assert_eq!(gate.announce("late").unwrap_err().fault(), Fault::Misuse);
    assert_eq!(gate.return_path_opened().unwrap_err().fault(), Fault::Malformed);
    let _ = gate.agree("vfio").unwrap();
    assert_eq!(gate.agree("vfio").unwrap_err().fault(), Fault::Malformed);
}

#[test]
fn page_requests_and_faults_know_whose_a_place_is() {
    let block = |page_size| RequestBlock { name: name(), used_length: 0x10000, page_size };
    for wrong in [vec![block(0)], vec![block(0x1800)], vec![block(0x1000), block(0x1000)]] {
        assert_eq!(RequestBlocks::new(wrong).unwrap_err().fault(), Fault::Misuse);
    }
    let blocks = RequestBlocks::new(vec![block(0x1000)]).unwrap();
    let mut faults = PageFaults::new(blocks.clone());
    for (place, offset) in [(1, 0), (0, 0x10000), (0, u64::MAX)] {
        assert_eq!(faults.fault(place, offset).unwrap_err().fault(), Fault::Misuse, "{place} {offset:#x}");
    }
    for size in [0, 0x1800] {
        let error = PageRequests::new(blocks.clone(), size).request(Some(&name()), 0, 0x1000).unwrap_err();
        assert_eq!((error.fault(), error), (Fault::Misuse, RequestError::HostPageSize { found: size }));
    }
    let mut requests = PageRequests::new(blocks, 0x1000);
    let other = CountedString::new("other").unwrap();
    let known = name();
    for (block, start, len) in [
        (None, 0, 0x1000),
        (Some(&other), 0, 0x1000),
        (Some(&known), 1, 0x1000),
        (Some(&known), 0, 1),
        (Some(&known), 0, 0),
        (Some(&known), 0x10000, 0x1000),
        (Some(&known), u64::MAX - 0xfff, 0x1000),
    ] {
        let error = requests.request(block, start, len).unwrap_err();
        assert_ne!(error.fault(), Fault::Misuse, "{error}");
    }
}
