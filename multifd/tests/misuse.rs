//! What a caller does wrong is never reported as the peer's fault, and what a peer sends never as misuse.

use qevm_multifd::compression::{CompressionError, Compressor, Decompressor};
use qevm_multifd::{
    ChannelDecoder, ChannelEncoder, ChannelOptions, Compression, DeviceState, EncoderOptions, ErrorKind, FlushMode,
    HandshakeError, Init, PacketLayout, Pages, SourceSync, SyncBarrier, SyncError, Uuid,
};
use qevm_wire::{
    Blame, CountedString, Decode, DriveError, Driver, Fault, PageGeometry, Profile, QemuVersion, WireError, Writer,
};

const PAGE: u64 = 4096;

fn block() -> CountedString {
    CountedString::new("pc.ram").unwrap()
}

/// A channel with one packet of one page.
fn channel() -> Vec<u8> {
    let mut writer = Writer::new();
    let mut encoder = ChannelEncoder::new(EncoderOptions::default());
    encoder.init(&Init::new(Uuid::default(), 0), &mut writer).unwrap();
    let pages = Pages { block: &block(), normal: &[0], zero: &[], packet_num: 0 };
    encoder.pages(&pages, PAGE, &mut writer).unwrap();
    writer.bytes(&[1; PAGE as usize]);
    writer.into_bytes()
}

#[test]
fn a_decoder_is_told_of_what_was_taken() {
    let bytes = channel();
    let mut driver = Driver::new(&bytes[..], ChannelDecoder::new(ChannelOptions::default()));
    let error = driver.decoder_mut().skip_payload(1).unwrap_err();
    assert_eq!((error.fault(), error.kind), (Fault::Misuse, WireError::SkipTooFar { found: 1, remaining: 0 }.into()));
    driver.next().unwrap();
    driver.next().unwrap();
    let error = driver.decoder_mut().skip_payload(PAGE + 1).unwrap_err();
    assert_eq!(error.kind, WireError::SkipTooFar { found: PAGE + 1, remaining: PAGE }.into());
    driver.decoder().clone().next(&[]).unwrap();
    assert_eq!(driver.decoder().payload_remaining(), PAGE);
    // Read by the caller, and the decoder not told: the page would be taken for a packet.
    driver.consume(PAGE as usize);
    let error = driver.next().unwrap_err();
    assert!(matches!(error, DriveError::OutOfStep { .. }) && error.fault() == Some(Fault::Misuse), "{error}");
    // The peer's error stays the peer's.
    let mut decoder = ChannelDecoder::new(ChannelOptions::default());
    let first = decoder.next(&[0; 64]).unwrap_err();
    assert_eq!((first.fault(), Err(first)), (Fault::Malformed, decoder.next(&[0; 64])));
}

#[test]
fn an_encoder_refuses_what_its_caller_may_not_write() {
    let block = block();
    let many = [0; 129];
    let pages = |normal, zero| Pages { block: &block, normal, zero, packet_num: 0 };
    let mut writer = Writer::new();
    let fresh = ChannelEncoder::new(EncoderOptions::default());
    let order = |error: qevm_multifd::Error| {
        assert!(matches!(error.kind, ErrorKind::Handshake(HandshakeError::Order { .. })), "{error}");
        assert_eq!(error.fault(), Fault::Misuse);
    };
    order(fresh.clone().sync(0, &mut writer).unwrap_err());
    order(fresh.clone().pages(&pages(&[], &[0]), 0, &mut writer).unwrap_err());
    order(fresh.clone().device_state(&DeviceState::new(block.clone(), 0, 1), &mut writer).unwrap_err());
    for layout in [PacketLayout::Pages, PacketLayout::ZeroPages] {
        for compression in [Compression::None, Compression::Zlib] {
            let mut encoder = ChannelEncoder::new(EncoderOptions { layout, compression, ..EncoderOptions::default() });
            encoder.init(&Init::new(Uuid::default(), 0), &mut writer).unwrap();
            order(encoder.init(&Init::new(Uuid::default(), 0), &mut writer).unwrap_err());
            let before = writer.len();
            let wrong: [(&[u64], &[u64], u64); 5] =
                [(&many, &[], 129 * PAGE), (&[1], &[], PAGE), (&[0], &[], 0), (&[], &[0], 1), (&[], &many, 0)];
            for (normal, zero, payload) in wrong {
                let error = encoder.pages(&pages(normal, zero), payload, &mut writer).unwrap_err();
                assert_eq!(error.fault(), Fault::Misuse, "{error}");
            }
            let error = encoder.device_state(&DeviceState::new(block.clone(), 0, 0), &mut writer).unwrap_err();
            assert_eq!((error.fault(), writer.len()), (Fault::Misuse, before), "{error}");
        }
    }
}

#[test]
fn payloads_are_taken_as_they_are_to_be() {
    assert_eq!(Compressor::new(Compression::Zlib, Some(10)).unwrap_err().fault(), Fault::Misuse);
    let built = [
        (Compression::None, true),
        (Compression::Zlib, cfg!(feature = "zlib")),
        (Compression::Zstd, cfg!(feature = "zstd")),
    ];
    for (method, _) in built.into_iter().filter(|(_, built)| *built) {
        let page = [7; PAGE as usize];
        let mut payload = Vec::new();
        Compressor::new(method, None).unwrap().packet([&page[..], &page[..]], &mut payload).unwrap();
        let reader = || Decompressor::new(method, PageGeometry::X86).unwrap();
        let order = |result: Result<(), CompressionError>| {
            let error = result.unwrap_err();
            assert!(matches!(error, CompressionError::Order { .. }) && error.fault() == Fault::Misuse, "{error}");
        };
        let mut memory = [0; 3 * PAGE as usize];
        order(reader().packet(&payload, 2).unwrap().fill(&mut memory)); // more than there is
        order(reader().packet(&payload, 2).unwrap().fill(&mut memory[..100])); // not a page
        order(reader().packet(&payload, 2).unwrap().finish()); // not taken
        let mut unfinished = reader();
        unfinished.packet(&payload, 2).unwrap().fill(&mut memory[..PAGE as usize]).unwrap();
        order(unfinished.packet(&payload, 2).map(drop));
        // A payload that is too short for its pages is the peer's.
        let mut short = reader();
        let mut packet = short.packet(&payload, 3).unwrap();
        let error = packet.fill(&mut memory).unwrap_err();
        assert_eq!((error.fault(), Err(error.clone())), (Fault::Malformed, packet.finish()), "{error}");
    }
}

#[test]
fn readers_that_go_on_although_they_wait_are_the_callers() {
    type Step = fn(&mut SyncBarrier) -> Result<(), SyncError>;
    let sync: Step = |barrier| barrier.channel_sync(0).map(drop);
    let flush: Step = |barrier| barrier.main_flush().map(drop);
    let end: Step = SyncBarrier::main_end;
    let wrong: [&[Step]; 10] = [
        &[|barrier| barrier.channel_sync(2).map(drop)],
        &[|barrier| barrier.channel_end(2)],
        &[|barrier| barrier.join(1)],
        &[|barrier| barrier.join(255)],
        &[sync, sync],
        &[|barrier| barrier.channel_end(0), sync],
        &[flush, flush],
        &[flush, |barrier| barrier.main_eos().map(drop)],
        &[flush, end],
        &[|barrier| barrier.join(2), |barrier| barrier.join(2)],
    ];
    for (number, steps) in wrong.into_iter().enumerate() {
        let mut barrier = SyncBarrier::new(2, None);
        let (last, before) = steps.split_last().unwrap();
        before.iter().for_each(|step| step(&mut barrier).unwrap());
        assert_eq!(last(&mut barrier).unwrap_err().fault(), Fault::Misuse, "case {number}");
    }
    // What a peer brings about, whatever its caller does right.
    let sent: [&[Step]; 5] = [
        &[end, sync],
        &[end, flush],
        &[sync, end],
        &[flush, |barrier| barrier.channel_end(1)],
        &[|barrier| barrier.channel_end(1), flush],
    ];
    for (number, steps) in sent.into_iter().enumerate() {
        let mut barrier = SyncBarrier::new(2, Some(FlushMode::PerRound));
        let (last, before) = steps.split_last().unwrap();
        before.iter().for_each(|step| step(&mut barrier).unwrap());
        let error = last(&mut barrier).unwrap_err();
        assert_ne!(error.fault(), Fault::Misuse, "case {number}");
        assert_eq!(barrier.healthy(), Err(error), "and it stays so");
    }
}

#[test]
fn a_source_that_takes_a_step_out_of_order_is_the_callers() {
    type Step = fn(&mut SourceSync) -> Result<(), SyncError>;
    let setup: Step = |sync| sync.setup().map(drop);
    let complete: Step = |sync| sync.completion().map(drop);
    let postcopy: Step = |sync| sync.before_postcopy().map(drop);
    let others: [Step; 3] = [SourceSync::pages, |sync| sync.round_end().map(drop), |sync| sync.section_end().map(drop)];
    let mut wrong = vec![vec![complete], vec![postcopy], vec![setup, setup], vec![setup, complete, complete]];
    wrong.extend([vec![setup, postcopy, postcopy], vec![setup, postcopy, SourceSync::pages]]);
    wrong.extend(others.iter().flat_map(|step| [vec![*step], vec![setup, complete, *step]]));
    for (number, steps) in wrong.iter().enumerate() {
        let mut sync = SourceSync::new(&Profile::new(QemuVersion::new(10, 0), "microvm"));
        let (last, before) = steps.split_last().unwrap();
        before.iter().for_each(|step| step(&mut sync).unwrap());
        assert_eq!(last(&mut sync).unwrap_err().fault(), Fault::Misuse, "case {number}");
    }
}
