use super::*;
use crate::{Cursor, Reader, Step, WireError};
use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;
use proptest::prelude::*;
use std::io::ErrorKind;

/// Records of a be16 length of payload, an event that borrows one byte, and the payload.
#[derive(Default)]
pub(super) struct Records(Cursor);

impl Decode for Records {
    type Event<'a> = (&'a [u8], u64);
    type Payload = ();
    type Kind = WireError;

    fn next<'a>(&mut self, input: &'a [u8]) -> Result<Step<Self::Event<'a>>, Located<WireError>> {
        let at_end = self.0.has_ended();
        if let Some(step) = self.0.pending(input.len() as u64, at_end) {
            return step;
        }
        if at_end && input.is_empty() {
            return Ok(Step::End);
        }
        let mut reader: Reader<'a, WireError> = Reader::at(input, self.0.offset());
        let record = (|| {
            let payload = u64::from(reader.be16()?);
            Ok((reader.take(1)?, payload))
        })();
        match record {
            Ok(event) => {
                self.0.move_to(reader.offset());
                self.0.expect(event.1, ());
                Ok(Step::Event { consumed: reader.position(), event })
            }
            Err(error) => match self.0.need_more(&error, at_end) {
                Some(at_least) => Ok(Step::NeedMore { at_least }),
                None => Err(error),
            },
        }
    }

    fn payload_remaining(&self) -> u64 {
        self.0.payload()
    }

    fn payload_of(&self) -> Option<&()> {
        self.0.payload_of()
    }

    fn skip_payload(&mut self, count: u64) -> Result<(), Located<WireError>> {
        self.0.skip(count)
    }

    fn end_of_input(&mut self) {
        self.0.end();
    }

    fn offset(&self) -> u64 {
        self.0.offset()
    }
}

/// Gives its bytes in pieces of these sizes, by turns, with an interruption before each.
struct Pieces<'b> {
    bytes: &'b [u8],
    sizes: Vec<usize>,
    turn: usize,
    interrupted: bool,
}

impl<'b> Pieces<'b> {
    fn new(bytes: &'b [u8], sizes: Vec<usize>) -> Self {
        Pieces { bytes, sizes, turn: 0, interrupted: false }
    }
}

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.interrupted = !self.interrupted;
        if self.interrupted {
            return Err(ErrorKind::Interrupted.into());
        }
        let size = self.sizes[self.turn % self.sizes.len()].min(into.len());
        self.turn += 1;
        self.bytes.read(&mut into[..size])
    }
}

pub(super) fn stream(records: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (mark, payload) in records {
        bytes.extend((payload.len() as u16).to_be_bytes());
        bytes.push(*mark);
        bytes.extend(payload);
    }
    bytes
}

proptest! {
    #[test]
    fn events_and_payload_are_the_same_however_the_bytes_come(
        records in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..300)), 0..20),
        sizes in prop::collection::vec(1..200usize, 1..5),
        read in prop::collection::vec(0..400usize, 20),
    ) {
        let bytes = stream(&records);
        let mut driver = Driver::new(Pieces::new(&bytes, sizes), Records::default());
        for ((mark, payload), read) in records.iter().zip(read) {
            let event = driver.next().unwrap().map(|(mark, len)| (mark.to_vec(), len));
            prop_assert_eq!(event, Some((vec![*mark], payload.len() as u64)));
            // Some of it is read, whatever that is; the next event comes all the same.
            let mut some = Vec::new();
            driver.payload().take(read as u64).read_to_end(&mut some).unwrap();
            prop_assert_eq!(&some[..], &payload[..read.min(payload.len())]);
        }
        prop_assert!(driver.next().unwrap().is_none());
        prop_assert!(driver.next().unwrap().is_none());
    }

    #[test]
    fn a_stream_that_is_cut_says_where(cut in 0..23usize, sizes in prop::collection::vec(1..9usize, 1..3)) {
        let bytes = stream(&[(7, vec![1; 10]), (8, vec![2; 7])]);
        let mut driver = Driver::new(Pieces::new(&bytes[..cut], sizes), Records::default());
        let error = loop {
            match driver.next() {
                Ok(Some(_)) => {}
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        match error {
            None => prop_assert!(cut == 0 || cut == 13),
            Some(DriveError::Stream(error)) => {
                let at = [0, 3, 13, 16].into_iter().rfind(|at| *at < cut).unwrap();
                prop_assert!(error.is_truncated());
                // Of a record that is cut in its two words, the word at fault.
                prop_assert!(error.offset >= at as u64 && error.offset <= cut as u64, "{}", error);
            }
            Some(error) => prop_assert!(false, "{}", error),
        }
    }
}

#[test]
fn what_the_peer_announces_is_not_allocated_before_it_comes() {
    /// Asks for a terabyte.
    struct Greedy;
    impl Decode for Greedy {
        type Event<'a> = ();
        type Payload = ();
        type Kind = WireError;
        fn next(&mut self, _: &[u8]) -> Result<Step<()>, Located<WireError>> {
            Ok(Step::NeedMore { at_least: 1 << 40 })
        }
        fn payload_remaining(&self) -> u64 {
            0
        }
        fn payload_of(&self) -> Option<&()> {
            None
        }
        fn skip_payload(&mut self, _: u64) -> Result<(), Located<WireError>> {
            Ok(())
        }
        fn end_of_input(&mut self) {}
        fn offset(&self) -> u64 {
            0
        }
    }
    let mut driver = Driver::new(&[0; 100][..], Greedy);
    let Err(DriveError::Io(error)) = driver.next() else { panic!("it ends nowhere") };
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    assert!(driver.window.buffer.capacity() < 4 * CHUNK);
}

#[test]
fn what_the_caller_reads_from_the_buffer_is_not_read_again() {
    let bytes = stream(&[(7, vec![]), (8, vec![])]);
    let mut driver = Driver::new(&bytes[..], Records::default());
    driver.next().unwrap();
    driver.fill(3).unwrap();
    assert_eq!(driver.buffered(), &bytes[3..]);
    driver.decoder_mut().0.move_to(6);
    driver.consume(3);
    assert!(driver.next().unwrap().is_none());
    assert_eq!(driver.decoder().offset(), 6);
}

/// What the decoder would say of the bytes that are next would blame the peer.
#[test]
fn bytes_that_are_taken_out_of_step_are_the_callers_fault() {
    let bytes = stream(&[(7, vec![1; 10]), (8, vec![])]);
    type Wrong = fn(&mut Driver<&[u8], Records>);
    let wrongs: [Wrong; 4] = [
        |driver| driver.consume(1),
        |driver| driver.consume(usize::MAX),
        |driver| driver.decoder_mut().skip_payload(10).unwrap(),
        |driver| driver.decoder_mut().0.move_to(5),
    ];
    for (number, wrong) in wrongs.into_iter().enumerate() {
        let mut driver = Driver::new(&bytes[..], Records::default());
        assert!(driver.next().unwrap().is_some());
        wrong(&mut driver);
        for _ in 0..2 {
            let error = driver.next().unwrap_err();
            assert!(matches!(error, DriveError::OutOfStep { .. }), "{number}: {error}");
            assert_eq!(error.fault(), Some(Fault::Misuse));
        }
    }
    // Taken in step, or skipped too far, which does nothing, it goes on.
    let mut driver = Driver::new(&bytes[..], Records::default());
    assert!(driver.next().unwrap().is_some());
    assert_eq!(driver.decoder_mut().skip_payload(11).unwrap_err().fault(), Fault::Misuse);
    driver.decoder_mut().skip_payload(4).unwrap();
    driver.consume(4);
    assert_eq!(driver.next().unwrap(), Some((&[8][..], 0)));
    assert!(driver.next().unwrap().is_none() && driver.next().unwrap().is_none());
}

#[test]
fn after_an_error_the_same_error_comes_again() {
    let bytes = stream(&[(7, vec![1; 10])]);
    let mut driver = Driver::new(&bytes[..8], Records::default());
    assert!(driver.next().unwrap().is_some());
    let [first, second] = [(); 2].map(|()| driver.next().unwrap_err());
    assert_eq!((first.fault(), first.to_string()), (Some(Fault::Truncated), second.to_string()));
    let failed = DriveError::<WireError>::from(io::Error::from(ErrorKind::ConnectionReset));
    assert_eq!(failed.fault(), None);
}
