//! Reading inputs in this process, with every call counted.

use crate::cost::Cost;
use qevm_inspect::bounds::Spool;
use qevm_inspect::ram::{Keep, RamDigest};
use qevm_inspect::source::Source;
use qevm_inspect::stream::{Inputs, Layouts, Named, Observer, Settings, analyze};
use qevm_multifd::{ChannelDecoder, ChannelOptions};
use qevm_savevm::command::Command;
use qevm_savevm::{Decoder, DecoderOptions, Event, Step};
use qevm_wire::{Decode, Limits};
use std::sync::Arc;

/// The files of one migration.
#[derive(Debug, Clone, Default)]
pub(crate) struct Files {
    pub(crate) main: Vec<u8>,
    pub(crate) channel: Option<Vec<u8>>,
    pub(crate) return_path: Option<Vec<u8>>,
}

impl Files {
    pub(crate) fn main(main: Vec<u8>) -> Self {
        Files { main, ..Files::default() }
    }

    pub(crate) fn len(&self) -> u64 {
        let others = [&self.channel, &self.return_path].into_iter().flatten().map(Vec::len);
        (self.main.len() + others.sum::<usize>()) as u64
    }
}

/// Runs `read`, which says how many calls it made, and measures.
pub(crate) fn measure(read: impl FnOnce() -> u64) -> Cost {
    let mut calls = 0;
    let info = allocation_counter::measure(|| calls = read());
    Cost { peak: info.bytes_max, calls, allocations: info.count_total, moved: info.bytes_total }
}

/// The main channel, shown in small pieces.
pub(crate) fn main_channel(files: &Files) -> u64 {
    let mut decoder = Decoder::new(DecoderOptions::default());
    pump(&files.main, &mut decoder, 0).0
}

/// Calls, and where the decoder stopped.
fn pump(input: &[u8], decoder: &mut Decoder, start: usize) -> (u64, usize) {
    const PIECE: usize = 64;
    let (mut calls, mut position, mut shown) = (0, start, (start + PIECE).min(input.len()));
    loop {
        if shown == input.len() {
            decoder.end_of_input();
        }
        calls += 1;
        match decoder.next(&input[position..shown]) {
            Ok(Step::Event { consumed, event }) => {
                let package = matches!(event, Event::Command(Command::Packaged { .. }));
                position += consumed;
                if package {
                    let Ok(mut inner) = decoder.nested() else { return (calls, position) };
                    let (more, end) = pump(input, &mut inner, position);
                    calls += more;
                    if decoder.skip_payload((end - position) as u64).is_err() {
                        return (calls, position);
                    }
                    position = end;
                    shown = shown.max(position);
                }
            }
            Ok(Step::Payload { remaining, .. }) => {
                let count = remaining.min((input.len() - position) as u64) as usize;
                if count == 0 || decoder.skip_payload(count as u64).is_err() {
                    return (calls, position);
                }
                position += count;
                shown = shown.max(position);
            }
            Ok(Step::NeedMore { at_least }) => {
                shown = (position + at_least).max(shown + PIECE).min(input.len());
            }
            Ok(Step::End) | Err(_) => return (calls, position),
        }
    }
}

/// One page channel.
pub(crate) fn page_channel(files: &Files) -> u64 {
    let (input, mut decoder) =
        (files.channel.as_deref().unwrap_or_default(), ChannelDecoder::new(ChannelOptions::default()));
    decoder.end_of_input();
    let (mut calls, mut position) = (0, 0);
    loop {
        calls += 1;
        match decoder.next(&input[position..]) {
            Ok(Step::Event { consumed, event }) => {
                position += consumed;
                if let qevm_multifd::Event::Ram(packet) = &event {
                    calls += (packet.zero_runs().count() + packet.normal_runs().count()) as u64;
                }
            }
            Ok(Step::Payload { remaining, .. }) => {
                let count = remaining.min((input.len() - position) as u64);
                if count == 0 || decoder.skip_payload(count).is_err() {
                    return calls;
                }
                position += count as usize;
            }
            Ok(Step::NeedMore { .. } | Step::End) | Err(_) => return calls,
        }
    }
}

/// The return path.
pub(crate) fn return_path(files: &Files) -> u64 {
    let mut decoder = qevm_returnpath::Decoder::new(Limits::default());
    let (input, mut calls, mut position) = (files.return_path.as_deref().unwrap_or_default(), 0, 0);
    decoder.end_of_input();
    loop {
        calls += 1;
        match decoder.next(&input[position..]) {
            Ok(Step::Event { consumed, .. }) => position += consumed,
            Ok(Step::Payload { remaining, .. }) => {
                let count = remaining.min((input.len() - position) as u64);
                if count == 0 || decoder.skip_payload(count).is_err() {
                    return calls;
                }
                position += count as usize;
            }
            Ok(Step::NeedMore { .. } | Step::End) | Err(_) => return calls,
        }
    }
}

/// All files, as the commands of `qevm` walk over them.
pub(crate) fn walk(files: &Files, keep: Keep) -> u64 {
    let source = |bytes: &Vec<u8>| Source::seekable(Arc::new(bytes.clone()), bytes.len() as u64);
    let named = |(number, bytes): (usize, &Vec<u8>)| Named { name: format!("file {number}"), source: source(bytes) };
    let mut inputs = Inputs::single("main", source(&files.main));
    inputs.channels = files.channel.iter().enumerate().map(named).collect();
    inputs.return_path = files.return_path.iter().enumerate().map(named).collect();
    let settings = Settings {
        keep,
        reencode: true,
        complete: false,
        strict: true,
        live: false,
        layouts: Layouts::default(),
        spool: Spool::new(1 << 30),
        max_ram: u64::MAX,
    };
    let mut events = Events::default();
    let mut analysis = analyze(&mut inputs, &settings, &mut events);
    drop(analysis.report(RamDigest::Crc32));
    events.0
}

/// Counts what comes.
#[derive(Default)]
struct Events(u64);

impl Observer for Events {
    fn event(&mut self, _event: &Event<'_>) {
        self.0 += 1;
    }

    fn fields(&mut self, _header: &qevm_savevm::framing::SectionHeader, fields: &qevm_savevm::vmdesc::Node) {
        fields.leaves(&mut |_, _| self.0 += 1);
    }
}
