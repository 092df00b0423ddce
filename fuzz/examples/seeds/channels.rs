//! Seeds from the other channels, and from all files of a migration together.

use crate::stream::contents;
use crate::{Recording, Seeds, parts};
use qevm_multifd::{ChannelDecoder, ChannelOptions, Event, is_page_channel};
use qevm_wire::{Decode, Driver};
use std::io;

/// Bytes of a channel that are kept.
const KEPT: usize = 10_000;
const PAGE: usize = 4096;

pub(crate) fn seeds(recordings: &[Recording]) -> io::Result<()> {
    let (mut channels, mut preempt) = (Seeds::of("multifd_channel")?, Seeds::of("savevm_preempt")?);
    let (mut answers, mut walk) = (Seeds::of("returnpath_decoder")?, Seeds::of("cli_walk")?);
    for recording in recordings.iter().filter(|recording| recording.is_stream()) {
        let mut files = vec![(0, contents(&recording.main()?, false, 1).whole())];
        for (i, channel) in recording.files("channels")?.iter().enumerate() {
            let name = format!("{}-channel-{}", recording.name, i + 1);
            if is_page_channel(&channel[..channel.len().min(8)]) == Some(true) {
                let (cut, pages) = packets(channel);
                // A channel of long packets alone is cut off in the first.
                let seed = if pages { cut.clone() } else { channel[..channel.len().min(KEPT)].to_vec() };
                channels.add(&name, seed)?;
                files.push((1, cut));
            } else {
                let records = records(channel);
                // Each seed has the first record, which names the block, and two others.
                for (j, pair) in records.get(1..).unwrap_or_default().chunks(2).enumerate().step_by(7).take(4) {
                    let seed = [&[0x40], records[0], &pair.concat()[..]].concat();
                    preempt.add(&format!("{name}-{j}"), seed)?;
                }
                files.push((1, records.iter().take(2).copied().collect::<Vec<_>>().concat()));
            }
        }
        for (kind, key) in [(3, "return_path"), (2, "recovery"), (3, "recovery_return_path")] {
            let Some(file) = recording.file(key)? else { continue };
            if kind == 3 {
                answers.add(&format!("{}-{key}", recording.name), file[..file.len().min(4096)].to_vec())?;
            }
            files.push((kind, file));
        }
        let seed = parts(files.iter().map(|(kind, file)| (*kind, &file[..])));
        if files.len() > 1 && seed.len() < 64_000 {
            walk.add(&recording.name, [&[0b10001 + 2 * (seed.len() as u8 & 1)], &seed[..]].concat())?;
        }
    }
    Ok(())
}

/// The first packet of a page channel, those with pages up to the first one for which there is no room, and every SYNC;
/// and whether there is any with pages.
fn packets(channel: &[u8]) -> (Vec<u8>, bool) {
    let mut driver = Driver::new(channel, ChannelDecoder::new(ChannelOptions::default()));
    let (mut kept, mut pages, mut room, mut start) = (Vec::new(), false, true, 0);
    while let Ok(Some(event)) = driver.next() {
        let payload = event.payload_len() as usize;
        let always = match &event {
            Event::Ram(packet) => packet.is_sync(),
            _ => true,
        };
        // Of an event the decoder is past it, and not past its payload.
        let position = driver.decoder().offset() as usize;
        room &= payload > 0 || always || kept.len() + position - start <= KEPT;
        if payload == 0 && (room || always) {
            kept.extend_from_slice(&channel[start..position]);
        }
        let end = position + payload;
        if payload > 0 {
            let Some(packet) = channel.get(start..end) else { break };
            room &= kept.len() + packet.len() <= KEPT;
            if room {
                kept.extend_from_slice(packet);
                pages = true;
            }
        }
        start = end;
    }
    (kept, pages)
}

/// The records of a preempt channel: address and flags, the block's name unless it is that of the record before, and a
/// page.
fn records(channel: &[u8]) -> Vec<&[u8]> {
    const ZERO: u64 = 0x02;
    const PAGES: u64 = 0x08;
    const CONTINUE: u64 = 0x20;
    let (mut records, mut rest) = (Vec::new(), channel);
    while let Some((word, behind)) = rest.split_first_chunk::<8>() {
        let flags = u64::from_be_bytes(*word) & (PAGE as u64 - 1);
        let name = if flags & CONTINUE != 0 { 0 } else { 1 + usize::from(behind.first().copied().unwrap_or(0)) };
        let body = if flags & ZERO != 0 { 1 } else { PAGE };
        if flags & (ZERO | PAGES) == 0 || rest.len() < 8 + name + body {
            break;
        }
        let (record, behind) = rest.split_at(8 + name + body);
        records.push(record);
        rest = behind;
    }
    records
}
