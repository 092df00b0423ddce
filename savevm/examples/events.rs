//! Prints every event of a migration stream with its offset, and checks that encoding the events gives the stream back.
//!
//! `events FILE [OFFSET] [--recovery FILE]`: OFFSET is where the stream starts in the file; a recovery file is the
//! connection on which a broken postcopy went on. Pages are counted, not printed.

use qevm_savevm::{Decoder, DecoderOptions, Encoder, Event, Step, command::Command, ram::RamRecord};
use qevm_wire::{Decode, Located, Writer};
use std::{
    error::Error,
    fs::File,
    io::{Read, Seek, SeekFrom},
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let recovery = arguments.iter().position(|a| a == "--recovery").map(|i| arguments.drain(i..).nth(1));
    let mut arguments = arguments.into_iter();
    let file = arguments.next().ok_or("usage: events FILE [OFFSET] [--recovery FILE]")?;
    let offset = arguments.next().map_or(Ok(0), |offset| offset.parse())?;

    let mut decoder = Decoder::new(DecoderOptions { offset, ..DecoderOptions::default() });
    let mut encoder = Encoder::default();
    let result = print_stream(&file, offset, &mut decoder, &mut encoder);
    let Some(Some(recovery)) = recovery else { return result };
    if let Err(error) = result {
        println!("{error}"); // the connection broke: that is why there is a second one
    }
    print_stream(&recovery, 0, &mut decoder.recovery(), &mut encoder.recovery())
}

fn print_stream(name: &str, offset: u64, decoder: &mut Decoder, encoder: &mut Encoder) -> Result<(), Box<dyn Error>> {
    let mut file = File::open(name)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut printer = Printer { file, buffer: Vec::new(), position: 0, pages: 0 };
    printer.print(decoder, encoder, 0)
}

/// The caller's part of the work: a buffer in front of a file.
struct Printer {
    file: File,
    buffer: Vec<u8>,
    position: usize,
    pages: u64,
}

impl Printer {
    fn print(&mut self, decoder: &mut Decoder, encoder: &mut Encoder, depth: usize) -> Result<(), Box<dyn Error>> {
        let mut writer = Writer::new();
        loop {
            let offset = decoder.offset();
            match decoder.next(&self.buffer[self.position..])? {
                Step::Event { consumed, event } => {
                    writer.clear();
                    encoder.encode(&event, &mut writer)?;
                    if writer.as_bytes() != &self.buffer[self.position..self.position + consumed] {
                        return Err(format!("{event:?} at {offset} does not encode to the bytes it came from").into());
                    }
                    if matches!(
                        event,
                        Event::Ram(
                            RamRecord::Page(_)
                                | RamRecord::Zero(_)
                                | RamRecord::Xbzrle { .. }
                                | RamRecord::Compressed { .. }
                        )
                    ) {
                        self.pages += 1;
                    } else {
                        if self.pages > 0 {
                            println!("{:depth$}{} page records", "", std::mem::take(&mut self.pages));
                        }
                        match &event {
                            Event::Body(body) => println!("{:depth$}{offset}: body of {} bytes", "", body.len()),
                            event => println!("{:depth$}{offset}: {event:?}", ""),
                        }
                    }
                    let package = matches!(event, Event::Command(Command::Packaged { .. }));
                    self.position += consumed;
                    if package {
                        let mut inner = decoder.nested()?;
                        self.print(&mut inner, &mut encoder.recovery(), depth + 2)?;
                        decoder.skip_payload(decoder.payload_remaining())?;
                    }
                }
                Step::Payload { remaining, .. } => {
                    let buffered = (self.buffer.len() - self.position) as u64;
                    let count = remaining.min(buffered);
                    self.position += count as usize;
                    if count == 0 && !self.read(1)? {
                        decoder.end_of_input();
                    }
                    decoder.skip_payload(count)?;
                }
                Step::NeedMore { at_least } => {
                    if !self.read(at_least - (self.buffer.len() - self.position))? {
                        decoder.end_of_input();
                    }
                }
                Step::End => {
                    println!("{:depth$}{offset}: end", "");
                    return Ok(());
                }
            }
        }
    }

    /// Reads at least `count` bytes more; false if the file ends before.
    fn read(&mut self, count: usize) -> Result<bool, Located<qevm_savevm::ErrorKind>> {
        self.buffer.drain(..self.position);
        self.position = 0;
        let wanted = count.max(1 << 16) as u64;
        let read = self.file.by_ref().take(wanted).read_to_end(&mut self.buffer).unwrap_or(0);
        Ok(read >= count)
    }
}
