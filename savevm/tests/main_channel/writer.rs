//! `StreamWriter` writes what a decoder takes, whatever it is told, and says whose fault it is that it does not.

use crate::streams::{RAM, VFIO, header, name};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use qevm_savevm::command::Command;
use qevm_savevm::configuration::Configuration;
use qevm_savevm::ram::{BlockId, RamBlock, RamError, RamRecord};
use qevm_savevm::vfio::VfioRecord;
use qevm_savevm::{Decoder, DecoderOptions, Encoder, Error, ErrorKind, Event, StreamWriter, WriteError};
use qevm_wire::{Driver, Fault};

const TIMER: u32 = 9;

/// One call of the writer.
#[derive(Debug, Clone)]
enum Call {
    Header { configuration: bool },
    Start { section_id: u32, idstr: &'static str, version_id: u32 },
    Full,
    Part(u32),
    End(u32),
    Footer,
    FooterOf { section_id: u32, present: bool },
    Setup,
    EndOfBlocks,
    Eos,
    Page { block: u32, offset: u64 },
    Zero { block: u32, offset: u64 },
    Difference,
    Flush,
    Body,
    Vfio(VfioRecord),
    Command(Command),
    Package(Vec<Call>),
    Eof,
    Description,
    Payload(usize),
}

fn call() -> impl Strategy<Value = Call> {
    let section = || prop::sample::select(vec![RAM, VFIO, TIMER]);
    let handler = prop::sample::select(vec![
        (RAM, "ram", 4),
        (RAM, "timer", 2),
        (VFIO, "0000:00:04.0/vfio", 1),
        (TIMER, "timer", 2),
        (RAM, "ram", 3),
    ]);
    let place = || (0u32..3, 0u64..4).prop_map(|(block, page)| (block, page << 11));
    let vfio = prop::sample::select(vec![
        VfioRecord::Setup,
        VfioRecord::EndOfState,
        VfioRecord::Data { len: 7 },
        VfioRecord::Config,
        VfioRecord::InitDataSent,
    ]);
    let command = prop::sample::select(vec![
        Command::Ping(1),
        Command::OpenReturnPath,
        Command::RecvBitmap(name("pc.ram")),
        Command::SwitchoverStart,
    ]);
    let flat = prop_oneof![
        2 => any::<bool>().prop_map(|configuration| Call::Header { configuration }),
        3 => handler.prop_map(|(section_id, idstr, version_id)| Call::Start { section_id, idstr, version_id }),
        1 => Just(Call::Full),
        2 => section().prop_map(Call::Part),
        2 => section().prop_map(Call::End),
        3 => Just(Call::Footer),
        1 => (section(), any::<bool>()).prop_map(|(section_id, present)| Call::FooterOf { section_id, present }),
        2 => Just(Call::Setup),
        1 => Just(Call::EndOfBlocks),
        3 => Just(Call::Eos),
        2 => place().prop_map(|(block, offset)| Call::Page { block, offset }),
        2 => place().prop_map(|(block, offset)| Call::Zero { block, offset }),
        1 => Just(Call::Difference),
        1 => Just(Call::Flush),
        1 => Just(Call::Body),
        2 => vfio.prop_map(Call::Vfio),
        1 => command.prop_map(Call::Command),
        1 => Just(Call::Eof),
        1 => Just(Call::Description),
        1 => (1usize..4097).prop_map(Call::Payload),
    ];
    flat.prop_recursive(2, 20, 6, |inner| vec(inner, 0..6).prop_map(Call::Package))
}

fn make(stream: &mut StreamWriter, call: &Call) -> Result<(), Error> {
    match call {
        Call::Header { configuration } => stream.header(configuration.then(|| Configuration::new("microvm")).as_ref()),
        Call::Start { section_id, idstr, version_id } => stream.section_start(&header(*section_id, idstr, *version_id)),
        Call::Full => stream.section_full(&header(TIMER, "timer", 2), b"opaque"),
        Call::Part(section_id) => stream.section_part(*section_id),
        Call::End(section_id) => stream.section_end(*section_id),
        Call::Footer => stream.footer(),
        Call::FooterOf { section_id, present } => {
            stream.event(&Event::SectionFooter { section_id: *section_id, present: *present })
        }
        Call::Setup => stream.ram_setup([RamBlock::new(name("pc.ram"), 0x2000), RamBlock::new(name("vga"), 0x1000)]),
        Call::EndOfBlocks => stream.event(&Event::Ram(RamRecord::EndOfBlocks)),
        Call::Eos => stream.eos(),
        Call::Page { block, offset } => {
            stream.page_header(BlockId(*block), *offset)?;
            stream.payload(&[7; 4096])
        }
        Call::Zero { block, offset } => stream.zero_page(BlockId(*block), *offset),
        Call::Difference => stream.xbzrle_page(BlockId(0), 0, &[1, 1, 1]),
        Call::Flush => stream.multifd_flush(),
        Call::Body => stream.event(&Event::Body(b"opaque")),
        Call::Vfio(record) => {
            stream.event(&Event::Vfio(*record))?;
            match record {
                VfioRecord::Data { len } => stream.payload(&vec![1; *len as usize]),
                _ => Ok(()),
            }
        }
        Call::Command(command) => stream.command(command.clone()),
        Call::Package(calls) => {
            let mut package = stream.package_writer();
            calls.iter().for_each(|call| drop(make(&mut package, call)));
            finish(&mut package);
            stream.package(&package.take())
        }
        Call::Eof => stream.eof(),
        Call::Description => stream.vmdesc("{}"),
        Call::Payload(len) => stream.payload(&vec![1; *len]),
    }
}

/// Ends whatever is open.
fn finish(stream: &mut StreamWriter) {
    for call in
        [Call::Header { configuration: false }, Call::Eos, Call::Vfio(VfioRecord::EndOfState), Call::Footer, Call::Eof]
    {
        drop(make(stream, &call));
    }
}

/// Reads a whole stream with its packages, and says how many events it has.
fn read(decoder: Decoder, stream: &[u8]) -> Result<usize, String> {
    let mut driver = Driver::new(stream, decoder);
    let mut events = 0;
    loop {
        let package = match driver.next().map_err(|error| error.to_string())? {
            Some(event) => matches!(event, Event::Command(Command::Packaged { .. })),
            None => return Ok(events),
        };
        events += 1;
        if package {
            let nested = driver.decoder().nested().map_err(|error| error.to_string())?;
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut driver.payload(), &mut content).map_err(|error| error.to_string())?;
            events += read(nested, &content)?;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn any_calls_are_refused_or_give_a_stream_that_a_decoder_takes(
        set_up in any::<bool>(),
        calls in vec(call(), 0..40),
    ) {
        let mut stream = StreamWriter::default();
        if set_up {
            for call in [
                Call::Header { configuration: true },
                Call::Start { section_id: RAM, idstr: "ram", version_id: 4 },
                Call::Setup,
            ] {
                make(&mut stream, &call).unwrap();
            }
        }
        for call in &calls {
            let before = stream.bytes().to_vec();
            if let Err(error) = make(&mut stream, call) {
                prop_assert_eq!(error.fault(), Fault::Misuse, "{:?}: {}", call, error);
                // What is made of several calls may have got some way.
                prop_assert!(stream.bytes().starts_with(&before));
            }
        }
        finish(&mut stream);
        let events = read(Decoder::new(DecoderOptions::default()), stream.bytes());
        prop_assert!(events.is_ok(), "{:?}", events);
        prop_assert!(events.unwrap() >= 2);
    }
}

/// The property can fail: a writer that checks nothing gives streams that no decoder takes.
#[test]
fn without_the_check_most_calls_give_what_no_decoder_takes() {
    let mut runner = TestRunner::deterministic();
    let mut refused = 0;
    for _ in 0..100 {
        let calls = vec(call(), 5..40).new_tree(&mut runner).unwrap().current();
        let mut stream = StreamWriter::unchecked(Encoder::default(), true);
        calls.iter().for_each(|call| drop(make(&mut stream, call)));
        finish(&mut stream);
        refused += usize::from(read(Decoder::new(DecoderOptions::default()), stream.bytes()).is_err());
    }
    assert!(refused > 50, "{refused} of 100");
}

/// What a source gets wrong that knows no more than the names of the calls.
#[test]
fn what_no_decoder_takes_is_refused_where_it_is_written() {
    let refused = |before: &[Call], call: Call| {
        let mut stream = StreamWriter::default();
        before.iter().for_each(|call| make(&mut stream, call).unwrap());
        let written = stream.bytes().to_vec();
        let error = make(&mut stream, &call).unwrap_err();
        assert_eq!((error.fault(), error.offset), (Fault::Misuse, written.len() as u64), "{call:?}: {error}");
        assert_eq!(stream.bytes(), written, "{call:?}");
        error.kind
    };
    let is_refused = |kind| assert!(matches!(kind, ErrorKind::Write(WriteError::Refused { .. })), "{kind:?}");
    let head = Call::Header { configuration: false };
    let ram = Call::Start { section_id: RAM, idstr: "ram", version_id: 4 };
    // Before the header.
    is_refused(refused(&[], Call::Part(9)));
    is_refused(refused(&[], Call::Eof));
    is_refused(refused(&[], ram.clone()));
    let begun = [head.clone()];
    is_refused(refused(&begun, head.clone()));
    is_refused(refused(&begun, Call::Part(RAM)));
    is_refused(refused(&begun, Call::Description));
    is_refused(refused(&begun, Call::Start { section_id: RAM, idstr: "ram", version_id: 3 }));
    assert_eq!(refused(&begun, Call::Body), WriteError::Content.into());
    // A section of known content.
    let open = [head.clone(), ram.clone(), Call::Setup];
    is_refused(refused(&open, Call::Footer));
    is_refused(refused(&open, Call::Eof));
    assert!(matches!(refused(&open, Call::Page { block: 2, offset: 0 }), ErrorKind::Ram(RamError::NoSuchBlock { .. })));
    is_refused(refused(&open, Call::Page { block: 1, offset: 0x1000 }));
    assert_eq!(refused(&open, Call::Body), WriteError::Content.into());
    let closed = [&open[..], &[Call::Eos, Call::Footer]].concat();
    // Its first byte is the end of the stream.
    assert_eq!(refused(&closed, Call::Page { block: 0, offset: 0 }), WriteError::TakenForElse.into());
    is_refused(refused(&closed, Call::Start { section_id: RAM, idstr: "timer", version_id: 2 }));
    // After the end.
    let ended = [&closed[..], &[Call::Eof]].concat();
    is_refused(refused(&ended, Call::Eof));
    is_refused(refused(&ended, Call::End(RAM)));
    is_refused(refused(&[&ended[..], &[Call::Description]].concat(), Call::Description));
}

/// Payload goes through the writer as a whole or not at all.
#[test]
fn payload_is_counted() {
    let mut stream = StreamWriter::default();
    for call in [
        Call::Header { configuration: false },
        Call::Start { section_id: RAM, idstr: "ram", version_id: 4 },
        Call::Setup,
    ] {
        make(&mut stream, &call).unwrap();
    }
    let kind = |result: Result<(), Error>| match result.unwrap_err().kind {
        ErrorKind::Write(kind) => kind,
        kind => panic!("{kind:?}"),
    };
    assert_eq!(kind(stream.payload(&[0])), WriteError::PayloadInExcess { found: 1, remaining: 0 });
    stream.page_header(BlockId(0), 0).unwrap();
    stream.payload(&[1; 4000]).unwrap();
    assert_eq!(kind(stream.zero_page(BlockId(0), 0x1000)), WriteError::PayloadMissing { remaining: 96 });
    assert_eq!(kind(stream.payload(&[1; 97])), WriteError::PayloadInExcess { found: 97, remaining: 96 });
    stream.payload(&[1; 96]).unwrap();
    // This one is sent from guest memory.
    stream.page_header(BlockId(0), 0x1000).unwrap();
    stream.zero_page(BlockId(1), 0).unwrap();
}
