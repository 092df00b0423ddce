//! The places at which the content of a device section may end.

use super::scan::Around;
use super::{Decoder, Footers, State, StreamError};
use crate::event::{PayloadKind, Step};
use crate::{Error, ErrorKind};
use qevm_wire::{Decode, Located};

/// The places at which the content of a device section may end, from [`Decoder::body_ends`].
///
/// It is a decoder that is shown the content from its first byte and consumes nothing of it. Each event is the
/// content's length in bytes if it ends at the next such place: where a footer of the section comes that a plausible
/// item follows. In a stream without footers (machine types of QEMU 2.3 and before) it is every place that the header
/// of another section or the end of the stream follows, so the caller must know the device's layout to choose.
///
/// After the last place [`next`](Decode::next) fails with [`StreamError::EndNotFound`], and if no content is next with
/// [`StreamError::NoBody`]; other errors are those of the decoder.
///
/// ```
/// use qevm_savevm::{Decoder, DecoderOptions};
/// use qevm_wire::{Driver, next_event};
///
/// # use qevm_savevm::{StreamWriter, framing::SectionHeader};
/// # let idstr = qevm_wire::CountedString::new("timer").unwrap();
/// # let mut stream = StreamWriter::default();
/// # stream.header(None)?;
/// # let footer_and_end = [0x7e, 0, 0, 0, 7, 0];
/// # let content = [&[1; 24][..], &footer_and_end].concat();
/// # stream.section_full(&SectionHeader { section_id: 7, idstr, instance_id: 0, version_id: 2 }, &content)?;
/// # stream.eof()?;
/// # let stream = stream.take();
/// // The content of this section has in it what could be its end and that of the stream.
/// let mut driver = Driver::new(&stream[..], Decoder::new(DecoderOptions { vmdesc: false, ..DecoderOptions::default() }));
/// while !driver.decoder().expects_body() {
///     driver.next()?;
/// }
/// driver.fill(1024)?;
/// let (mut ends, mut content) = (driver.decoder().body_ends(), driver.buffered());
/// let mut next = || next_event(&mut content, &mut ends).map(|found| found.map(|(length, _)| length));
/// assert_eq!((next()?, next()?), (Some(24), Some(30)));
/// assert!(next().is_err());
/// driver.decoder_mut().body(30)?; // chosen by what is known of the device
/// driver.consume(30);
/// assert!(driver.next()?.is_some()); // the footer
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct BodyEnds(Decoder);

impl BodyEnds {
    pub(super) fn new(decoder: &Decoder) -> Self {
        BodyEnds(decoder.clone())
    }

    fn find(&mut self, content: &[u8], at_end: bool) -> Result<usize, Error> {
        let decoder = &mut self.0;
        if decoder.footers != Footers::Absent {
            return decoder.find_body_end(content, at_end);
        }
        let State::Body { scan, .. } = &mut decoder.state else {
            return Err(Located::new(StreamError::NoBody.into(), decoder.cursor.offset()));
        };
        let around = Around {
            sections: &decoder.sections,
            options: &decoder.options,
            at_end,
            in_package: decoder.package.is_some(),
        };
        scan.next_start(content, decoder.cursor.offset(), &around)
    }
}

impl Decode for BodyEnds {
    type Event<'a> = u64;
    type Payload = PayloadKind;
    type Kind = ErrorKind;

    fn next(&mut self, content: &[u8]) -> Result<Step<u64, PayloadKind>, Error> {
        let (content, at_end) = self.0.bounded(content);
        match self.find(content, at_end) {
            Ok(length) => Ok(Step::Event { consumed: 0, event: length as u64 }),
            Err(error) => match self.0.cursor.need_more(&error, at_end) {
                Some(at_least) => Ok(Step::NeedMore { at_least }),
                None => Err(self.0.locate(error)),
            },
        }
    }

    fn payload_remaining(&self) -> u64 {
        self.0.payload_remaining()
    }

    fn payload_of(&self) -> Option<&PayloadKind> {
        self.0.payload_of()
    }

    fn skip_payload(&mut self, count: u64) -> Result<(), Error> {
        self.0.skip_payload(count)
    }

    fn end_of_input(&mut self) {
        self.0.end_of_input();
    }

    fn offset(&self) -> u64 {
        self.0.offset()
    }
}
