//! Seeds of devices' state on page channels. A recording of it would need a device that can migrate, and holds payloads
//! of a megabyte; so real page channels are continued here as QEMU 10.0 and 11.1 were seen to continue them.

use crate::{Recording, Seeds, parts};
use qevm_multifd::{ChannelDecoder, ChannelOptions, DeviceState, Ending, VfioDeviceState, is_page_channel};
use qevm_wire::{CountedString, Decode, Step, Writer};
use std::io;

/// Bytes of a payload after its header; QEMU's have 1 MiB.
const DATA: usize = 300;

pub(crate) fn seeds(recordings: &[Recording]) -> io::Result<()> {
    let mut seeds = Seeds::of("multifd_device_state")?;
    let new = |recording: &&Recording| ["10.0", "11.1"].iter().any(|release| recording.name.starts_with(release));
    for (i, recording) in recordings.iter().filter(|recording| recording.is_stream()).filter(new).enumerate() {
        let mut channels: Vec<Vec<u8>> = recording.files("channels")?.iter().filter_map(|file| start(file)).collect();
        if channels.is_empty() {
            continue;
        }
        // One device or two, with one to five payloads of data and one of configuration, in turns over the channels.
        let (devices, payloads) = (1 + i % 2, 2 + i % 5);
        for device in 0..devices {
            for index in 0..payloads {
                let config = index + 1 == payloads;
                let channel = (index + device + i) % channels.len();
                channels[channel].extend(packet(device, index as u32, config));
            }
        }
        let seed = parts(channels.iter().map(|channel| (1, &channel[..])));
        seeds.add(&format!("{}-{devices}x{payloads}", recording.name), seed)?;
    }
    Ok(())
}

/// The first packet of a page channel.
fn start(channel: &[u8]) -> Option<Vec<u8>> {
    if is_page_channel(&channel[..channel.len().min(8)]) != Some(true) {
        return None;
    }
    let mut decoder = ChannelDecoder::new(ChannelOptions::default());
    decoder.ended(Ending::Closed);
    match decoder.next(channel) {
        Ok(Step::Event { consumed, .. }) => Some(channel[..consumed].to_vec()),
        _ => None,
    }
}

fn packet(device: usize, index: u32, config: bool) -> Vec<u8> {
    let name = CountedString::new(format!("0000:00:0{}.0/vfio", device + 1).as_bytes()).expect("a name");
    let payload = VfioDeviceState::LEN + DATA;
    let mut writer = Writer::new();
    DeviceState::new(name, 0, payload as u32).encode(&mut writer).expect("a payload");
    VfioDeviceState { index, config }.encode(&mut writer);
    writer.zeroes(DATA);
    writer.as_bytes().to_vec()
}
