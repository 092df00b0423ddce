//! Seeds from main channels.

use crate::{Recording, Seeds, parts};
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::mapped_ram::MappedBlock;
use qevm_savevm::ram::RamRecord;
use qevm_savevm::vmdesc::{Catalogue, Found};
use qevm_savevm::{Decoder, DecoderOptions, Encoder, Event};
use qevm_wire::{Decode, Driver, QemuVersion, Writer};
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// Records of pages that are kept of each section.
const RECORDS: usize = 2;

/// What is in a main channel.
#[derive(Default)]
pub(crate) struct Contents {
    /// The stream without most of its page records, and without the description.
    pub(crate) thin: Vec<u8>,
    /// The description, with its event.
    pub(crate) description: Vec<u8>,
    text: Vec<u8>,
    sections: Vec<(SectionHeader, Vec<u8>)>,
    differences: Vec<Vec<u8>>,
    mapped: Vec<MappedBlock>,
}

/// Takes a stream apart; of each section, at most this many records of pages are kept. Whole items are left out,
/// nothing else changes.
pub(crate) fn contents(stream: &[u8], mapped_ram: bool, most: usize) -> Contents {
    let decoder = Decoder::new(DecoderOptions { mapped_ram, allow_trailing: true, ..DecoderOptions::default() });
    let (mut encoder, mut found) = (Encoder::default(), Contents::default());
    let (mut records, mut header, mut block) = (0, None, None);
    let mut driver = Driver::new(stream, decoder);
    while let Ok(Some(event)) = driver.next() {
        let mut keep = true;
        match &event {
            Event::Section { header: opened, .. } => (header, records) = (Some(opened.clone()), 0),
            Event::SectionPart { .. } => records = 0,
            Event::Body(body) => found.sections.extend(header.clone().map(|header| (header, body.to_vec()))),
            Event::Ram(RamRecord::Block(mapped)) if mapped.mapped_ram.is_some() => {
                let header = mapped.mapped_ram.expect("it is there");
                found.mapped.push(MappedBlock { header, used_length: mapped.used_length });
            }
            Event::Ram(RamRecord::Page(page) | RamRecord::Zero(page)) => {
                // A record without a name is about the block of the one before, which must be kept for it.
                keep = records < most && (page.named || block == Some(page.block));
                if keep {
                    (records, block) = (records + 1, Some(page.block));
                }
            }
            Event::Ram(RamRecord::Xbzrle { data, .. }) => {
                found.differences.push(data.to_vec());
                keep = false;
            }
            Event::Ram(RamRecord::Compressed { .. }) => keep = false,
            _ => {}
        }
        if matches!(event, Event::Ram(RamRecord::EndOfSection)) {
            block = None;
        }
        let mut item = Writer::new();
        if keep && encoder.encode(&event, &mut item).is_err() {
            return found;
        }
        match &event {
            Event::VmDescription { .. } => found.description = item.as_bytes().to_vec(),
            _ => found.thin.extend_from_slice(item.as_bytes()),
        }
        // Of an event the decoder is past it, and not past its payload.
        let position = driver.decoder().offset() as usize;
        let payload = driver.decoder().payload_remaining().min((stream.len() - position) as u64) as usize;
        let bytes = &stream[position..position + payload];
        match found.description.is_empty() {
            false => found.text.extend_from_slice(bytes),
            true if keep && !mapped_ram => found.thin.extend_from_slice(bytes),
            true => {}
        }
    }
    found
}

impl Contents {
    /// With its description.
    pub(crate) fn whole(&self) -> Vec<u8> {
        [&self.thin[..], &self.description, &self.text].concat()
    }
}

pub(crate) fn seeds(recordings: &[Recording]) -> io::Result<()> {
    let mut decoder = Seeds::of("savevm_decoder")?;
    let mut xbzrle = Seeds::of("savevm_xbzrle")?;
    let mut catalogue = Catalogued { seeds: Seeds::of("savevm_catalogue")?, seen: BTreeSet::new() };
    let mut vmdesc = Seeds::of("savevm_vmdesc")?;
    let mut reader = Seeds::of("wire_reader")?;
    let mut schemas = Schemas { seeds: Seeds::of("savevm_schema")?, seen: BTreeSet::new() };
    let mut small = Vec::new();
    for recording in recordings.iter().filter(|recording| recording.is_stream()) {
        let stream = recording.main()?;
        let found = contents(&stream, false, RECORDS);
        if (64..12_000).contains(&found.thin.len()) {
            decoder.add(&recording.name, [&[0x80, 0x1f], &found.thin[..]].concat())?;
        }
        reader.add(&recording.name, found.thin[..found.thin.len().min(512)].to_vec())?;
        let apart = (found.differences.len() / 4).max(1);
        for (i, difference) in found.differences.iter().enumerate().step_by(apart) {
            xbzrle.add(&format!("{}-{i}", recording.name), difference.clone())?;
        }
        catalogue.add(recording, &found)?;
        if let Some(described) = described(&found) {
            vmdesc.add(&recording.name, described)?;
        }
        let whole = contents(&stream, false, 0).whole();
        if !found.text.is_empty() && whole.len() < 20_000 {
            small.push((recording, whole));
        }
        schemas.add(recording, &found)?;
    }
    let mut check = Seeds::of("savevm_check")?;
    for (i, (recording, stream)) in small.iter().enumerate().take(24) {
        let (other, destination) = &small[(i + 1) % small.len()];
        let name = format!("{}-to-{}", recording.name, other.name);
        check.add(&name, parts([(0, &stream[..]), (0, &destination[..])]))?;
    }
    mapped(recordings)
}

/// Sections that the catalogue knows, each of them once a release.
struct Catalogued {
    seeds: Seeds,
    seen: BTreeSet<Vec<u8>>,
}

impl Catalogued {
    fn add(&mut self, recording: &Recording, found: &Contents) -> io::Result<()> {
        let releases = [QemuVersion::NEWEST, QemuVersion::new(7, 2)];
        for (header, body) in found.sections.iter().filter(|(_, body)| body.len() < 1500) {
            let known = Catalogue::embedded().describe(&header.idstr, 0, header.version_id, body, &releases);
            if matches!(known, Found::One(_)) && self.seen.insert(header.idstr.as_bytes().to_vec()) {
                let name = format!("{}-{}", recording.name, header.idstr.to_string().replace(['/', ':'], "-"));
                let version = header.version_id as u8;
                self.seeds.add(&name, [header.idstr.as_bytes(), &[0, version], &body[..]].concat())?;
            }
        }
        Ok(())
    }
}

/// Sections with what `-dump-vmstate` of the machine type says about their device, each of them once a release.
struct Schemas {
    seeds: Seeds,
    seen: BTreeSet<String>,
}

impl Schemas {
    fn add(&mut self, recording: &Recording, found: &Contents) -> io::Result<()> {
        let Some(dump) = recording.dump() else { return Ok(()) };
        let (release, _) = recording.name.split_once('-').unwrap_or_default();
        for (header, body) in found.sections.iter().filter(|(_, body)| body.len() < 1500) {
            let idstr = header.idstr.to_string();
            let device = idstr.rsplit('/').next().unwrap_or_default().to_owned();
            // The entry's own description begins with the name that the section has.
            let name = format!("\"Description\": {{\n      \"name\": \"{device}\"");
            let Some(entry) = entries(&dump).find(|entry| entry.contains(&name) && entry.len() < 6000) else {
                continue;
            };
            if self.seen.insert(format!("{release}-{device}")) {
                let schema = format!(
                    "{{\n  \"vmschkmachine\": {{\n    \"Name\": \"{}\"\n  }},\n  {entry}\n}}",
                    recording.machine()
                );
                let seed = [idstr.as_bytes(), &[0], schema.as_bytes(), &[0, header.version_id as u8], body].concat();
                self.seeds.add(&format!("{release}-{device}"), seed)?;
            }
        }
        Ok(())
    }
}

/// The entries of `-dump-vmstate`, with their names, as they are written.
fn entries(dump: &str) -> impl Iterator<Item = &str> {
    let inner = dump.trim().strip_prefix('{').unwrap_or(dump);
    let mut from = 0;
    objects(inner).map(move |object| {
        let end = object.as_ptr() as usize - inner.as_ptr() as usize + object.len();
        let entry = inner[from..end].trim_start_matches([',', ' ', '\n']);
        from = end;
        entry
    })
}

/// A description of the first few sections that are not long, and those sections.
fn described(found: &Contents) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(&found.text).ok()?;
    let (head, devices) = text.split_at(text.find('[')? + 1);
    let bodies: BTreeMap<_, _> =
        found.sections.iter().map(|(header, body)| ((header.idstr.to_string(), header.instance_id), body)).collect();
    let (mut json, mut sections, mut count) = (head.to_owned(), Vec::new(), 0);
    for device in objects(devices) {
        let value: serde_json::Value = serde_json::from_str(device).ok()?;
        let key = (value["name"].as_str()?.to_owned(), value["instance_id"].as_u64()? as u32);
        let Some(body) = bodies.get(&key).filter(|body| body.len() + device.len() < 3000) else { continue };
        json += if count == 0 { "" } else { ", " };
        json += device;
        sections.extend_from_slice(body);
        count += 1;
        if count == 4 {
            break;
        }
    }
    json += "]}";
    (count > 0).then(|| [json.as_bytes(), &[0], &sections].concat())
}

/// The objects of a JSON array as they are written.
fn objects(text: &str) -> impl Iterator<Item = &str> {
    let (mut depth, mut start) = (0, 0);
    text.char_indices().filter_map(move |(at, character)| {
        match character {
            '{' if depth == 0 => (start, depth) = (at, 1),
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => return None,
        }
        (character == '}' && depth == 0).then(|| &text[start..=at])
    })
}

/// Blocks of mapped-ram files: where they are, and which pages.
fn mapped(recordings: &[Recording]) -> io::Result<()> {
    let (mut blocks, mut areas) = (Seeds::of("savevm_mapped_ram")?, Seeds::of("multifd_page_area")?);
    for recording in recordings.iter().filter(|recording| recording.has_capability("mapped-ram")) {
        let file = recording.main()?;
        for (i, block) in contents(&file, true, 0).mapped.iter().enumerate() {
            let header = block.header;
            let len = block.pages().div_ceil(64) as usize * 8;
            let start = header.bitmap_offset as usize;
            let Some(bitmap) = file.get(start..start + len).filter(|bitmap| bitmap.len() < 2100) else { continue };
            let name = format!("{}-block-{}", recording.name, i + 1);
            let numbers =
                [header.page_size, header.bitmap_offset, header.pages_offset, block.used_length, file.len() as u64];
            blocks.add(&name, [&numbers.map(u64::to_be_bytes).concat()[..], bitmap].concat())?;
            let threads = 1 + (i as u8 % 4);
            let numbers = [header.page_size, header.pages_offset, block.used_length].map(u64::to_be_bytes).concat();
            let present = |page: &u64| bitmap[(page / 8) as usize] >> (page % 8) & 1 == 1;
            let offsets =
                (0..block.pages()).filter(present).take(128).map(|page| (page * header.page_size).to_be_bytes());
            let offsets = offsets.collect::<Vec<_>>().concat();
            areas.add(&name, [&numbers[..], &[threads], &(len as u32).to_be_bytes(), bitmap, &offsets].concat())?;
        }
    }
    Ok(())
}
