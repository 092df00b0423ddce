use crate::parts::parts;
use qevm_multifd::{
    ChannelDecoder, ChannelEncoder, ChannelOptions, DeviceState, EncoderOptions, Ending, Event, PacketLayout,
    VfioDeviceState,
};
use qevm_wire::{Decode, Limits, Step, Writer};
use std::collections::BTreeMap;

/// The parts are page channels of one migration over which the state of devices travels: each device's payloads are numbered, and
/// may come on any channel in any order.
///
/// Whatever order the channels are read in, each device must get the same payloads; headers must encode to their bytes.
pub fn multifd_device_state(data: &[u8]) {
    let channels: Vec<&[u8]> = parts(data).map(|(_, part)| part).take(16).collect();
    let mut forth = Devices::default();
    channels.iter().for_each(|channel| read(channel, &mut forth));
    let mut back = Devices::default();
    channels.iter().rev().for_each(|channel| read(channel, &mut back));
    for payloads in forth.values_mut().chain(back.values_mut()) {
        payloads.sort();
    }
    assert_eq!(forth, back);
    // Alone, without a channel around it.
    for channel in channels {
        if let Ok(packet) = DeviceState::decode(channel, &Limits::default()) {
            let mut again = Writer::new();
            packet.encode(&mut again).expect("what was decoded can be encoded");
            assert_eq!(again.as_bytes(), &channel[..again.len()]);
        }
    }
}

/// For each device, by name and instance: the payloads with their places, as far as they are whole.
type Devices<'a> = BTreeMap<(Vec<u8>, u32), Vec<(Option<(u32, bool)>, &'a [u8])>>;

fn read<'a>(channel: &'a [u8], devices: &mut Devices<'a>) {
    let mut decoder = ChannelDecoder::new(ChannelOptions::default());
    let options = EncoderOptions { layout: PacketLayout::ZeroPages, ..EncoderOptions::default() };
    let (mut encoder, mut again, mut position) = (ChannelEncoder::new(options), Writer::new(), 0);
    decoder.ended(Ending::Closed);
    loop {
        match decoder.next(&channel[position..]) {
            Ok(Step::Event { consumed, event }) => {
                let before = again.len();
                encoder.event(&event, &mut again).expect("what was decoded can be encoded");
                assert_eq!(&again.as_bytes()[before..], &channel[position..position + consumed]);
                position += consumed;
                let Event::DeviceState(packet) = event else { continue };
                let Some(payload) = channel[position..].get(..packet.payload_len as usize) else { continue };
                let place = VfioDeviceState::decode(payload).ok();
                if let Some(place) = place {
                    let mut header = Writer::new();
                    place.encode(&mut header);
                    assert_eq!(header.as_bytes(), &payload[..VfioDeviceState::LEN]);
                }
                let device = devices.entry((packet.idstr.as_bytes().to_vec(), packet.instance_id)).or_default();
                device.push((place.map(|place| (place.index, place.config)), payload));
            }
            Ok(Step::Payload { remaining, .. }) => {
                let count = remaining.min((channel.len() - position) as u64);
                if count == 0 {
                    return;
                }
                again.bytes(&channel[position..position + count as usize]);
                decoder.skip_payload(count).expect("no more than remains");
                position += count as usize;
            }
            Ok(Step::NeedMore { .. } | Step::End) | Err(_) => return,
        }
    }
}
