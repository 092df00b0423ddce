use super::*;
use crate::Message;
use crate::switchover::SwitchoverAckFlow;
use qevm_wire::{CountedString, PageGeometry};

const X86: PageGeometry = PageGeometry::X86;

fn name(name: &str) -> CountedString {
    CountedString::new(name).unwrap()
}

fn request() -> Message {
    Message::ReqPages { block: Some(name("pc.ram")), start: 0, len: 4096 }
}

/// The order of messages that QEMU 11.1 and 10.0 were seen to send in postcopy: PONGs of two threads in any order.
#[test]
fn pongs_come_in_any_order_but_once_each() {
    for order in [[1, 2, 4, 3, 0x42], [1, 2, 3, 0x42, 4]] {
        let mut session = SourceSession::new(None);
        (1..=4).chain([0x42]).for_each(|value| session.ping(value).unwrap());
        for value in order {
            assert_eq!(session.message(&Message::Pong { value }), Ok(Action::Pong { value }));
        }
        assert_eq!(session.message(&Message::Pong { value: 4 }), Err(SessionError::Pong { value: 4 }));
        assert_eq!(session.waiting(), "SHUT is missing");
    }
    let mut session = SourceSession::new(None);
    assert_eq!(session.message(&Message::Pong { value: 1 }), Err(SessionError::Pong { value: 1 }));
    session.ping(7).unwrap();
    session.ping(7).unwrap();
    assert!(
        session.message(&Message::Pong { value: 7 }).is_ok() && session.message(&Message::Pong { value: 7 }).is_ok()
    );
}

#[test]
fn pages_are_requested_in_postcopy_only() {
    let mut session = SourceSession::new(None);
    assert_eq!(session.message(&request()), Err(SessionError::RequestInPrecopy));
    session.postcopy_starts().unwrap();
    assert_eq!(session.message(&request()), Ok(Action::Request));
    assert!(matches!(session.postcopy_starts(), Err(SessionError::Order { .. })));
    assert!(matches!(session.ask_resume(), Err(SessionError::Order { .. })));
    assert!(matches!(session.ask_bitmap(name("a"), 1, X86), Err(SessionError::Order { .. })));
}

#[test]
fn recovery_is_bitmaps_then_resume() {
    let mut session = SourceSession::recovery();
    let bitmap = |block: &str, len| Message::RecvBitmap { block: name(block), len };
    session.ask_bitmap(name("pc.ram"), 32 << 20, X86).unwrap();
    session.ask_bitmap(name("pc.bios"), 0x10000, X86).unwrap();
    assert!(matches!(session.ask_bitmap(name("pc.ram"), 1, X86), Err(SessionError::Order { .. })));
    assert!(matches!(session.ask_resume(), Err(SessionError::Order { .. })));
    assert_eq!(session.message(&bitmap("pc.rom", 8)), Err(SessionError::BitmapNotAsked { block: name("pc.rom") }));
    assert_eq!(session.message(&bitmap("pc.bios", 8)), Ok(Action::Bitmap));
    assert_eq!(session.message(&bitmap("pc.bios", 8)), Err(SessionError::BitmapNotAsked { block: name("pc.bios") }));
    let (found, expected) = (1016, 1024);
    let wrong = SessionError::BitmapLength { block: name("pc.ram"), found, expected };
    assert_eq!(session.clone().message(&bitmap("pc.ram", found)), Err(wrong));
    assert_eq!(session.waiting(), "1 received bitmaps are missing, the first of 'pc.ram'");
    assert_eq!(session.message(&bitmap("pc.ram", expected)), Ok(Action::Bitmap));
    assert_eq!(session.message(&Message::ResumeAck), Err(SessionError::ResumeAck));
    session.ask_resume().unwrap();
    assert_eq!(session.waiting(), "RESUME_ACK is missing");
    assert_eq!(session.message(&Message::ResumeAck), Ok(Action::Resume));
    assert_eq!(session.stage(), Stage::Postcopy);
    assert_eq!(session.message(&Message::ResumeAck), Err(SessionError::ResumeAck), "repeated");
    assert_eq!(session.message(&request()), Ok(Action::Request));
}

#[test]
fn shut_is_the_last_message() {
    let shut = |status| Message::Shut { status };
    let mut session = SourceSession::new(None);
    assert_eq!(session.clone().message(&shut(0)), Err(SessionError::EarlyShut));
    assert_eq!(session.clone().message(&shut(1)), Ok(Action::Failed { status: 1 }));
    session.everything_sent().unwrap();
    assert_eq!(session.ended(), Err(SessionError::Ended { waiting: session.waiting() }));
    assert_eq!(session.message(&shut(0)), Ok(Action::Complete));
    assert_eq!((session.ended(), session.waiting().as_str()), (Ok(()), "nothing is missing"));
    assert_eq!(session.message(&shut(0)), Err(SessionError::AfterShut { message: "SHUT" }));
    assert!(matches!(session.ping(1), Err(SessionError::Order { .. })));
    assert!(matches!(session.everything_sent(), Err(SessionError::Order { .. })));
}

#[test]
fn an_early_end_names_what_is_missing() {
    let mut session = SourceSession::new(Some(SwitchoverAckFlow::Legacy));
    session.ping(1).unwrap();
    let waiting = "0 of 1 switchover acks came (the destination counts its devices); PONG 0x1 is missing";
    assert_eq!(session.ended(), Err(SessionError::Ended { waiting: waiting.into() }));
    assert_eq!(session.timed_out(), SessionError::TimedOut { waiting: waiting.into() });
}

#[test]
fn switchover_acks_reach_the_gate() {
    let mut session = SourceSession::new(Some(SwitchoverAckFlow::Counted));
    let error = session.message(&Message::SwitchoverAck);
    assert_eq!(error, Err(SessionError::Switchover(SwitchoverError::BeforeRequest)));
    session.gate_mut().request("vfio").unwrap();
    assert!(!session.gate().is_open());
    assert_eq!(session.message(&Message::SwitchoverAck), Ok(Action::SwitchoverAck));
    assert!(session.gate().is_open());
}
