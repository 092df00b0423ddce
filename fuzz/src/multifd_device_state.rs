use crate::parts::parts;
use qevm_multifd::{
    ChannelDecoder, ChannelEncoder, ChannelOptions, DeviceState, EncoderOptions, Event, PacketLayout, VfioDeviceState,
};
use qevm_wire::{Decode, DriveError, Fault, Limits, Window, Writer, next_event};
use std::collections::BTreeMap;

/// The parts are page channels of one migration over which the state of devices travels: each device's payloads are
/// numbered, and may come on any channel in any order.
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
    let (mut encoder, mut again, mut rest) = (ChannelEncoder::new(options), Writer::new(), channel);
    loop {
        let (event, read) = match next_event(&mut rest, &mut decoder) {
            Ok(Some(next)) => next,
            Ok(None) => return,
            Err(DriveError::Stream(error)) => {
                return assert_ne!(error.fault(), Fault::Misuse, "a peer cannot misuse a decoder: {error}");
            }
            Err(error) => panic!("bytes in memory can be read: {error}"),
        };
        again.clear();
        encoder.event(&event, &mut again).expect("what was decoded can be encoded");
        assert_eq!(again.as_bytes(), read);
        let following = &channel[decoder.offset() as usize..];
        if let Event::DeviceState(packet) = &event
            && let Some(payload) = following.get(..packet.payload_len as usize)
        {
            let place = VfioDeviceState::decode(payload).ok();
            if let Some(place) = place {
                let mut header = Writer::new();
                place.encode(&mut header);
                assert_eq!(header.as_bytes(), &payload[..VfioDeviceState::LEN]);
            }
            let device = devices.entry((packet.idstr.as_bytes().to_vec(), packet.instance_id)).or_default();
            device.push((place.map(|place| (place.index, place.config)), payload));
        }
        let consumed = read.len();
        rest.consume(consumed);
    }
}
