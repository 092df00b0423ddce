use qevm_savevm::command::Command;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::ram::{PageAt, RamBlock, RamRecord};
use qevm_savevm::{Decoder, DecoderOptions, Encoder, Event, Footers, Step, StreamWriter};
use qevm_wire::{CountedString, Decode, Fault, Limits, Writer};

/// Reads the input as a main channel, all at once and in pieces, and writes every event again.
///
/// The first byte chooses options of the decoder, the second the length of the pieces; the stream follows. Both ways
/// must give the same events, and the events the bytes that they came from. Pages that could be had by the run come one
/// by one.
pub fn savevm_decoder(data: &[u8]) {
    let [choice, piece, stream @ ..] = data else { return };
    let whole = run(*choice, stream, stream.len());
    let pieced = run(*choice, stream, usize::from(*piece) + 1);
    assert_eq!(whole, pieced, "what was shown in pieces was read in another way");
}

/// The events with their offsets, and whether the stream was legal to its end.
fn run(choice: u8, stream: &[u8], piece: usize) -> (Vec<(u64, String)>, bool) {
    let options = DecoderOptions {
        limits: Limits { depth: 4, ..Limits::default() },
        footers: [Footers::Detect, Footers::Present, Footers::Absent][usize::from(choice) % 3],
        x_ignore_shared: choice & 0x10 != 0,
        mapped_ram: choice & 0x20 != 0,
        vmdesc: choice & 0x40 == 0,
        allow_trailing: choice & 0x80 != 0,
        ..DecoderOptions::default()
    };
    let (mut decoder, mut encoder) = (Decoder::new(options), Encoder::default());
    if choice & 0x08 != 0 {
        (decoder, encoder) = resumed(decoder, encoder);
    }
    let mut pump = Pump { stream, position: 0, shown: piece.min(stream.len()), piece, events: Vec::new(), run: None };
    let ended = pump.run(&mut decoder, &mut encoder);
    // Bytes after the end are only reported if they were shown.
    let legal = ended && (choice & 0x80 != 0 || pump.position == stream.len());
    (pump.events, legal)
}

/// A decoder and an encoder for the second connection of a broken postcopy.
fn resumed(mut decoder: Decoder, mut encoder: Encoder) -> (Decoder, Encoder) {
    let name = |name: &str| CountedString::new(name).expect("a name");
    let mut first = StreamWriter::default();
    first.header(None).expect("a header");
    let ram = SectionHeader { section_id: 1, idstr: name("ram"), instance_id: 0, version_id: 4 };
    first.section_start(&ram).expect("a section");
    first.ram_setup([RamBlock::new(name("pc.ram"), 0x8000), RamBlock::new(name("vga"), 0x2000)]).expect("blocks");
    first.eos().expect("an end");
    first.footer().expect("a footer");
    let stream = first.take();
    let mut pump = Pump { stream: &stream, position: 0, shown: stream.len(), piece: 1, events: Vec::new(), run: None };
    pump.run(&mut decoder, &mut encoder);
    (decoder.recovery(), encoder.recovery())
}

struct Pump<'a> {
    stream: &'a [u8],
    position: usize,
    shown: usize,
    piece: usize,
    events: Vec<(u64, String)>,
    /// The last page, and how many are known to follow it.
    run: Option<(PageAt, u64)>,
}

impl Pump<'_> {
    /// The run after `event`, which may be none but the next page as long as some are known to follow.
    fn follow(&self, event: &Event<'_>, decoder: &Decoder) -> Option<(PageAt, u64)> {
        let page = match event {
            Event::Ram(RamRecord::Page(page)) => Some(*page),
            _ => None,
        };
        let Some((last, pages @ 1..)) = &self.run else { return page.map(|page| (page, 0)) };
        let next = PageAt { offset: last.offset + decoder.page_geometry().size(), named: false, ..*last };
        assert_eq!(page, Some(next), "a page of a run");
        Some((next, pages - 1))
    }

    fn run(&mut self, decoder: &mut Decoder, encoder: &mut Encoder) -> bool {
        let mut writer = Writer::new();
        loop {
            if self.shown == self.stream.len() {
                decoder.end_of_input();
            }
            let offset = decoder.offset();
            match decoder.next(&self.stream[self.position..self.shown]) {
                Ok(Step::Event { consumed, event }) => {
                    writer.clear();
                    encoder.encode(&event, &mut writer).expect("what was read can be written");
                    assert_eq!(writer.as_bytes(), &self.stream[self.position..self.position + consumed], "{event:?}");
                    self.events.push((offset, format!("{event:?}")));
                    self.run = self.follow(&event, decoder);
                    let package = matches!(event, Event::Command(Command::Packaged { .. }));
                    self.position += consumed;
                    if package {
                        let Ok(mut inner) = decoder.nested() else { return false };
                        let legal = self.run(&mut inner, &mut encoder.recovery());
                        if !legal || decoder.skip_payload(decoder.payload_remaining()).is_err() {
                            return false;
                        }
                        assert_eq!(inner.offset(), decoder.offset(), "a package ends where it says");
                    }
                }
                Ok(Step::Payload { remaining, .. }) => {
                    let left = (self.shown - self.position) as u64;
                    if left == 0 {
                        self.shown = (self.shown + self.piece).min(self.stream.len());
                        if self.position == self.shown {
                            return false;
                        }
                        continue;
                    }
                    let count = left.min(remaining);
                    if decoder.skip_payload(count).is_err() {
                        return false;
                    }
                    self.position += count as usize;
                    if let Some((page, pages @ 0)) = &mut self.run
                        && decoder.payload_remaining() == 0
                    {
                        let next = page.offset + decoder.page_geometry().size();
                        *pages = decoder.ahead().take_pages(next, &self.stream[self.position..self.shown]);
                    }
                }
                Ok(Step::NeedMore { at_least }) => {
                    assert!(at_least > self.shown - self.position, "asks for what it was shown");
                    assert!(self.shown < self.stream.len(), "asks for more at the end of the input");
                    self.shown = (self.shown + self.piece).min(self.stream.len());
                }
                Ok(Step::End) => return true,
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    assert!(self.run.is_none_or(|(_, pages)| pages == 0), "a run ends in {error}");
                    assert_ne!(error.fault(), Fault::Misuse, "a peer cannot misuse a decoder: {error}");
                    return false;
                }
            }
        }
    }
}
