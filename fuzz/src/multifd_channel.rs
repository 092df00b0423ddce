use qevm_multifd::{
    ChannelDecoder, ChannelEncoder, ChannelOptions, Decompressor, EncoderOptions, Ending, Event, PacketLayout,
};
use qevm_wire::{Blame, Decode, Fault, Step, Writer};

/// Reads the input as a recorded page channel, shown in pieces, and writes it again; payloads of up to 64 KiB of pages
/// are decompressed, too.
pub fn multifd_channel(data: &[u8]) {
    let mut decoder = ChannelDecoder::new(ChannelOptions::default());
    let options = EncoderOptions { layout: PacketLayout::ZeroPages, ..EncoderOptions::default() };
    let (mut encoder, mut again) = (ChannelEncoder::new(options), Writer::new());
    let mut decompressor = None;
    let (mut position, mut shown) = (0, 0);
    loop {
        if shown == data.len() {
            decoder.ended(Ending::Closed);
        }
        match decoder.next(&data[position..shown]) {
            Ok(Step::Event { consumed, event }) => {
                encoder.event(&event, &mut again).expect("what was decoded can be encoded");
                position += consumed;
                let Event::Ram(packet) = &event else { continue };
                assert_eq!(packet.normal_runs().map(|run| run.len).sum::<u64>(), packet.pages_len());
                let behind = &data[position..];
                let payload = usize::try_from(event.payload_len()).ok().and_then(|len| behind.get(..len));
                if let Some(payload) = payload.filter(|_| (1..=16).contains(&packet.normal_count())) {
                    let decompressor = decompressor.get_or_insert_with(|| {
                        Decompressor::new(packet.compression(), decoder.page_geometry()).expect("memory for a context")
                    });
                    let mut pages = vec![0; packet.pages_len() as usize];
                    let result = decompressor
                        .packet(payload, packet.normal_count())
                        .and_then(|mut packet| packet.fill(&mut pages).and_then(|()| packet.finish()));
                    if let Err(error) = result {
                        assert_ne!(error.fault(), Fault::Misuse, "a peer cannot misuse a decompressor: {error}");
                    }
                }
            }
            Ok(Step::Payload { remaining, .. }) => {
                let count = remaining.min((data.len() - position) as u64);
                again.bytes(&data[position..position + count as usize]);
                decoder.skip_payload(count).expect("no more than remains");
                position += count as usize;
                shown = shown.max(position);
            }
            Ok(Step::NeedMore { at_least }) => {
                assert!(position + at_least > shown, "asks for what it has");
                shown = (position + at_least).min(data.len());
            }
            Ok(Step::End) => break assert_eq!(again.as_bytes(), data),
            Err(error) => {
                assert!(error.offset <= data.len() as u64, "{error}");
                assert_ne!(error.fault(), Fault::Misuse, "a peer cannot misuse a decoder: {error}");
                break assert_eq!(again.as_bytes(), &data[..position]);
            }
        }
    }
}
