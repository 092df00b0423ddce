//! A caller of the decoder that shows it input in pieces, and writes every event again.

use qevm_savevm::command::Command;
use qevm_savevm::ram::RamRecord;
use qevm_savevm::vfio::VfioRecord;
use qevm_savevm::{Decoder, Encoder, Error, Event, PayloadKind, Step};
use qevm_wire::{Decode, Writer};

/// What became of a stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pumped {
    /// Every event with its offset, those of packages between them, as text.
    pub(crate) events: Vec<(u64, String)>,
    /// The events, encoded, with their payloads.
    pub(crate) bytes: Vec<u8>,
}

/// Decodes all of `input` and encodes it again. `piece` says how many bytes the decoder is shown more of when it asks,
/// which can be fewer than it asked for.
pub(crate) fn pump(decoder: &mut Decoder, input: &[u8], piece: impl FnMut() -> usize) -> Result<Pumped, Error> {
    pump_with(decoder, &mut Encoder::default(), input, piece)
}

/// The same with an encoder that knows RAM blocks already.
pub(crate) fn pump_with(
    decoder: &mut Decoder,
    encoder: &mut Encoder,
    input: &[u8],
    piece: impl FnMut() -> usize,
) -> Result<Pumped, Error> {
    let pumped = Pumped { events: Vec::new(), bytes: Vec::new() };
    let mut pump = Pump { input, position: 0, shown: 0, piece, pumped };
    pump.run(decoder, encoder)?;
    Ok(pump.pumped)
}

struct Pump<'a, P> {
    input: &'a [u8],
    position: usize,
    shown: usize,
    piece: P,
    pumped: Pumped,
}

impl<P: FnMut() -> usize> Pump<'_, P> {
    fn run(&mut self, decoder: &mut Decoder, encoder: &mut Encoder) -> Result<(), Error> {
        loop {
            if self.shown == self.input.len() {
                decoder.end_of_input();
            }
            let offset = decoder.offset();
            let section = decoder.current_section().map_or(0, |header| header.section_id);
            match decoder.next(&self.input[self.position..self.shown])? {
                Step::Event { consumed, event } => {
                    let mut writer = Writer::new();
                    encoder.encode(&event, &mut writer)?;
                    assert_eq!(writer.as_bytes(), &self.input[self.position..self.position + consumed], "{event:?}");
                    self.pumped.bytes.extend_from_slice(writer.as_bytes());
                    self.pumped.events.push((offset, format!("{event:?}")));
                    let package = matches!(event, Event::Command(Command::Packaged { .. }));
                    self.position += consumed;
                    let of = decoder.payload_of().copied();
                    assert_eq!(of.is_some(), decoder.payload_remaining() > 0);
                    assert!(of.is_none_or(|of| of == payload_of(&event, section)), "{event:?}: {of:?}");
                    if package {
                        let mut inner = decoder.nested()?;
                        self.run(&mut inner, &mut encoder.recovery())?;
                        let len = decoder.payload_remaining();
                        assert_eq!(inner.offset(), decoder.offset() + len);
                        decoder.skip_payload(len)?;
                    }
                }
                Step::Payload { of, remaining } => {
                    assert_eq!(Some(&of), decoder.payload_of());
                    // Payload need not have been shown to the decoder at all.
                    let left = self.input.len() - self.position;
                    let count = (self.piece)().min(left).min(usize::try_from(remaining).unwrap_or(usize::MAX));
                    self.pumped.bytes.extend_from_slice(&self.input[self.position..self.position + count]);
                    self.position += count;
                    self.shown = self.shown.max(self.position);
                    decoder.skip_payload(count as u64)?;
                }
                Step::NeedMore { at_least } => {
                    assert!(at_least > self.shown - self.position, "asks for what it was shown at {offset}");
                    let piece = (self.piece)().min(self.input.len() - self.shown);
                    self.shown += piece;
                }
                Step::End => return Ok(()),
            }
        }
    }
}

/// What the payload of `event` must be said to be, in this section.
fn payload_of(event: &Event<'_>, section_id: u32) -> PayloadKind {
    match event {
        Event::Ram(RamRecord::Page(page)) => PayloadKind::Page { block: page.block, offset: page.offset },
        Event::Ram(RamRecord::Block(_)) => PayloadKind::MappedPages,
        Event::Vfio(VfioRecord::Data { .. }) => PayloadKind::DeviceData { section_id },
        Event::DirtyBitmap(_) => PayloadKind::DirtyBitmap,
        Event::BlockMigration(_) => PayloadKind::DiskSectors,
        Event::HashTable(_) => PayloadKind::HashTableEntries,
        Event::StorageAttributes(_) => PayloadKind::StorageAttributes,
        Event::Command(Command::Packaged { .. }) => PayloadKind::Package,
        Event::VmDescription { .. } => PayloadKind::Description,
        event => panic!("{event:?} has no payload"),
    }
}
