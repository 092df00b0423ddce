//! Prints every event of a migration stream with its offset, and checks that encoding the events gives the stream back.
//!
//! `events FILE [OFFSET] [--recovery FILE]`: OFFSET is where the stream starts in the file; a recovery file is the
//! connection on which a broken postcopy went on. Pages are counted, not printed.

use qevm_savevm::command::Command;
use qevm_savevm::ram::RamRecord;
use qevm_savevm::{Decoder, DecoderOptions, Encoder, Event};
use qevm_wire::{Buffered, Decode, Window, Writer, next_event, skip_payload};
use std::error::Error;
use std::fs::File;
use std::io::{Seek, SeekFrom};

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
    Printer { input: Buffered::new(file), pages: 0 }.print(decoder, encoder, 0)
}

/// The caller's part of the work.
struct Printer {
    input: Buffered<File>,
    pages: u64,
}

impl Printer {
    fn print(&mut self, decoder: &mut Decoder, encoder: &mut Encoder, depth: usize) -> Result<(), Box<dyn Error>> {
        let mut writer = Writer::new();
        loop {
            skip_payload(&mut self.input, decoder)?;
            let offset = decoder.offset();
            let Some((event, read)) = next_event(&mut self.input, decoder)? else {
                println!("{:depth$}{offset}: end", "");
                return Ok(());
            };
            writer.clear();
            encoder.encode(&event, &mut writer)?;
            if writer.as_bytes() != read {
                return Err(format!("{event:?} at {offset} does not encode to the bytes it came from").into());
            }
            if let Event::Ram(
                RamRecord::Page(_) | RamRecord::Zero(_) | RamRecord::Xbzrle { .. } | RamRecord::Compressed { .. },
            ) = event
            {
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
            let consumed = read.len();
            self.input.consume(consumed);
            if package {
                self.print(&mut decoder.nested()?, &mut encoder.recovery(), depth + 2)?;
                decoder.skip_payload(decoder.payload_remaining())?;
            }
        }
    }
}
