//! One multifd channel.

use crate::failure::Failure;
use crate::ram::Keep;
use crate::source::Source;
use crate::stream::halt::Halt;
use crate::stream::memory::Memory;
use crate::stream::reencode::compare;
use qevm_multifd::compression::Decompressor;
use qevm_multifd::device_state::DeviceState;
use qevm_multifd::{ChannelDecoder, ChannelEncoder, ChannelOptions, EncoderOptions, Ending, Event, Init};
use qevm_savevm::framing::{Content, SectionHeader};
use qevm_savevm::vmdesc::{Node, vfio_configuration};
use qevm_savevm::{Decoder, vfio};
use qevm_wire::{Decode, Limits, PageGeometry, Writer, next_event};

/// One multifd channel.
pub(super) struct MultifdChannel {
    pub(super) name: String,
    source: Source,
    decoder: Option<ChannelDecoder>,
    encoder: Option<ChannelEncoder>,
    writer: Writer,
    decompressor: Option<Decompressor>,
    init: Option<Init>,
    pages: u64,
    zero_pages: u64,
    syncs: u64,
    /// How many numbers of packets were used up.
    numbered: u64,
    /// Smallest and largest packet number.
    packet_nums: Option<(u64, u64)>,
    device_bytes: u64,
    configurations: Vec<(SectionHeader, Node)>,
    notes: Vec<String>,
    page: Vec<u8>,
}

/// What reading stopped at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stopped {
    Sync,
    End,
}

/// The packet whose payload is next.
struct Packet {
    block: usize,
    offsets: Vec<u64>,
    sync: bool,
}

impl MultifdChannel {
    pub(super) fn new(name: String, source: Source, reencode: bool) -> Self {
        MultifdChannel {
            name,
            source,
            decoder: None,
            encoder: reencode.then(|| ChannelEncoder::new(EncoderOptions::default())),
            writer: Writer::new(),
            decompressor: None,
            init: None,
            pages: 0,
            zero_pages: 0,
            syncs: 0,
            numbered: 0,
            packet_nums: None,
            device_bytes: 0,
            configurations: Vec::new(),
            notes: Vec::new(),
            page: Vec::new(),
        }
    }

    pub(super) fn offset(&self) -> u64 {
        self.source.offset()
    }

    pub(super) fn device_bytes(&self) -> u64 {
        self.device_bytes
    }

    /// The configurations of VFIO devices that came, and remarks on those that could not be read.
    pub(super) fn take_configurations(&mut self) -> (Vec<(SectionHeader, Node)>, Vec<String>) {
        (std::mem::take(&mut self.configurations), std::mem::take(&mut self.notes))
    }

    pub(super) fn init(&self) -> Option<&Init> {
        self.init.as_ref()
    }

    /// How many numbers the packets used up, and the smallest and largest of those they have.
    pub(super) fn packet_numbers(&self) -> (u64, Option<(u64, u64)>) {
        (self.numbered, self.packet_nums)
    }

    pub(super) fn describe(&self) -> String {
        let number = self.init.as_ref().map_or("?".into(), |init| init.channel.to_string());
        let method = self.decoder.as_ref().and_then(ChannelDecoder::compression);
        let method = method.map_or(String::new(), |method| format!(", compression {method}"));
        let device = match self.device_bytes {
            0 => String::new(),
            bytes => format!(", {bytes} bytes of devices' own data"),
        };
        format!(
            "{}: multifd channel {number}{method}, {} pages, {} zero pages, {} syncs{device}",
            self.name, self.pages, self.zero_pages, self.syncs
        )
    }

    /// Applies packets up to and with the next SYNC; false if the channel ends before one.
    pub(super) fn until_sync(&mut self, memory: &mut Memory, main: &Decoder) -> Result<bool, Halt> {
        Ok(self.run(memory, main)? == Stopped::Sync)
    }

    /// Applies what is left after the main channel has waited `waits` times and is over.
    pub(super) fn rest(&mut self, memory: &mut Memory, main: &Decoder, waits: u64) -> Result<(), Halt> {
        let pages = self.pages + self.zero_pages;
        let stopped = self.run(memory, main)?;
        let path = self.path();
        if stopped == Stopped::Sync {
            let message = format!("SYNC number {}, but the main channel waits for {waits} only", self.syncs);
            return Err(Failure::mismatch(&self.name, self.offset(), path, message).into());
        }
        if self.pages + self.zero_pages > pages {
            let message = "pages after the last SYNC, for which the main channel does not wait";
            return Err(Failure::mismatch(&self.name, self.offset(), path, message).into());
        }
        Ok(())
    }

    /// The main channel waits for a SYNC that the channel does not have.
    pub(super) fn missing_sync(&self, waits: u64, at: u64) -> Failure {
        let message = format!(
            "the channel ends after {} SYNCs, but the main channel waits for number {waits} at byte {at}",
            self.syncs
        );
        let kind = "truncated";
        Failure { file: self.name.clone(), kind, offset: self.offset(), path: self.path(), message }
    }

    fn path(&self) -> String {
        self.init.as_ref().map_or("multifd channel".into(), |init| format!("channel {}", init.channel))
    }

    fn run(&mut self, memory: &mut Memory, main: &Decoder) -> Result<Stopped, Halt> {
        let geometry = main.page_geometry();
        let mut decoder = self
            .decoder
            .take()
            .unwrap_or_else(|| ChannelDecoder::new(ChannelOptions { pages: geometry, ..ChannelOptions::default() }));
        let result = self.apply(&mut decoder, memory, main, geometry);
        self.decoder = Some(decoder);
        result
    }

    fn apply(
        &mut self,
        decoder: &mut ChannelDecoder,
        memory: &mut Memory,
        main: &Decoder,
        geometry: PageGeometry,
    ) -> Result<Stopped, Halt> {
        loop {
            let at = decoder.offset();
            let next = next_event(&mut self.source, decoder).map_err(|error| Failure::driven(&self.name, at, error))?;
            let Some((event, read)) = next else { return Ok(Stopped::End) };
            if let Some(encoder) = &mut self.encoder {
                self.writer.clear();
                encoder.event(&event, &mut self.writer).map_err(|error| Failure::located(&self.name, error))?;
                compare(self.writer.as_bytes(), read, at, &self.name)?;
            }
            let (mut packet, mut device) = (None, None);
            match &event {
                Event::Init(init) => self.init = Some(init.clone()),
                Event::Ram(ram) => {
                    // A SYNC that is put on a packet with pages gives it a further number, in place of its own.
                    self.numbered += 1 + u64::from(ram.is_sync() && ram.has_pages());
                    let num = ram.packet_num();
                    let (first, last) = self.packet_nums.unwrap_or((num, num));
                    self.packet_nums = Some((first.min(num), last.max(num)));
                    let block = main.ram_blocks().find(ram.block_bytes());
                    let length = block.and_then(|id| main.ram_blocks().get(id)).map(|b| b.used_length);
                    decoder.check_block(ram, length).map_err(|error| Failure::located(&self.name, error))?;
                    let index = block.map_or(0, |id| id.index());
                    if ram.has_pages() {
                        self.zero_pages += u64::from(ram.zero_count());
                        for offset in ram.zero() {
                            memory.ram.put_zero(index, offset).map_err(|error| Failure::io(&self.name, at, &error))?;
                        }
                    }
                    let offsets = if ram.has_pages() { ram.normal().collect() } else { Vec::new() };
                    packet = Some(Packet { block: index, offsets, sync: ram.is_sync() });
                }
                Event::DeviceState(state) => device = Some(state.clone()),
                _ => {}
            }
            let consumed = read.len();
            self.source.consume(consumed);
            if let Some(device) = device {
                self.device_state(decoder, device)?;
            }
            if let Some(packet) = packet {
                self.payload(decoder, &packet, memory, geometry)?;
                if packet.sync {
                    self.syncs += 1;
                    return Ok(Stopped::Sync);
                }
            }
        }
    }

    /// Applies the normal pages of a packet.
    fn payload(
        &mut self,
        decoder: &mut ChannelDecoder,
        packet: &Packet,
        memory: &mut Memory,
        geometry: PageGeometry,
    ) -> Result<(), Halt> {
        let at = decoder.offset();
        let len = decoder.payload_remaining();
        self.pages += packet.offsets.len() as u64;
        let io = |name: &str, error: std::io::Error| Failure::io(name, at, &error);
        if memory.ram.keep() == Keep::Nothing {
            for offset in &packet.offsets {
                memory.ram.put_unread(packet.block, *offset).map_err(|error| io(&self.name, error))?;
            }
            return self.skip(decoder, len);
        }
        if packet.offsets.is_empty() {
            return self.skip(decoder, len);
        }
        let as_they_are = decoder.compression().is_none_or(|method| method == qevm_multifd::Compression::None);
        if memory.ram.keep().is_by_place() && self.source.is_seekable() && self.source.holds(len) && as_they_are {
            let size = geometry.size();
            for (offset, place) in packet.offsets.iter().zip((self.source.offset()..).step_by(size as usize)) {
                let kept = memory.ram.put_place(packet.block, *offset, size, (&self.name, &self.source, place));
                kept.map_err(|error| io(&self.name, error))?;
            }
            return self.skip(decoder, len);
        }
        self.more(decoder, len as usize)?;
        let Some(payload) = self.source.window().get(..len as usize) else {
            return self.skip(decoder, len);
        };
        let method = decoder.compression().unwrap_or(qevm_multifd::Compression::None);
        let fail = |error: qevm_multifd::CompressionError| Failure::located(&self.name, decoder.fail(error));
        let decompressor = match &mut self.decompressor {
            Some(decompressor) => decompressor,
            none => none.insert(Decompressor::new(method, geometry).map_err(fail)?),
        };
        let mut pages = decompressor.packet(payload, packet.offsets.len() as u32).map_err(fail)?;
        self.page.resize(geometry.size() as usize, 0);
        for offset in &packet.offsets {
            pages.fill(&mut self.page).map_err(fail)?;
            memory.ram.put(packet.block, *offset, &self.page).map_err(|error| io(&self.name, error))?;
        }
        pages.finish().map_err(fail)?;
        self.skip(decoder, len)
    }

    /// Takes a VFIO device's configuration apart, and counts everything else as the device's own.
    fn device_state(&mut self, decoder: &mut ChannelDecoder, state: DeviceState) -> Result<(), Halt> {
        let (at, len) = (decoder.offset(), u64::from(state.payload_len));
        let header = SectionHeader { section_id: 0, idstr: state.idstr, instance_id: state.instance_id, version_id: 1 };
        if header.content() == Content::Vfio && len <= MOST_CONFIGURATION {
            self.more(decoder, len as usize)?;
            if let Some(body) = self.source.window().get(..len as usize).and_then(configuration) {
                match vfio_configuration(body, at + CONFIGURATION_AT as u64, &Limits::default()) {
                    Ok(fields) => {
                        self.configurations.push((header, fields));
                        return self.skip(decoder, len);
                    }
                    Err(error) => self.notes.push(format!("{}: '{}' is not read: {error}", self.name, header.idstr)),
                }
            }
        }
        // The number of the packet is the protocol's.
        self.device_bytes +=
            len.saturating_sub(if header.content() == Content::Vfio { PACKET_HEADER } else { 0 } as u64);
        self.skip(decoder, len)
    }

    fn skip(&mut self, decoder: &mut ChannelDecoder, bytes: u64) -> Result<(), Halt> {
        let at = self.source.offset();
        let skipped = self.source.skip(bytes).map_err(|error| Failure::io(&self.name, at, &error))?;
        decoder.skip_payload(skipped).map_err(|error| Failure::located(&self.name, error))?;
        if skipped < bytes {
            decoder.ended(Ending::Closed);
            // The decoder knows what is missing, and says it as an error.
            decoder.next(&[]).map_err(|error| Failure::located(&self.name, error))?;
        }
        Ok(())
    }

    fn more(&mut self, decoder: &mut ChannelDecoder, bytes: usize) -> Result<(), Halt> {
        let at = self.source.offset();
        self.source.fill(bytes).map_err(|error| Failure::io(&self.name, at, &error))?;
        if self.source.at_end() {
            decoder.ended(Ending::Closed);
        }
        Ok(())
    }
}

/// What a VFIO device's packet begins with: version, number, flags, of four bytes each. (`docs/format/vfio.md`)
const PACKET_HEADER: usize = 12;
/// The record CONFIG comes first.
const CONFIGURATION_AT: usize = PACKET_HEADER + 8;
/// The flag of a packet with the configuration.
const CONFIGURATION: [u8; 4] = 1_u32.to_be_bytes();
/// With 2,048 vectors: what is longer is no configuration.
const MOST_CONFIGURATION: u64 = 64 << 10;

/// The configuration in a packet of a VFIO device, if that has it.
fn configuration(payload: &[u8]) -> Option<&[u8]> {
    let records = payload.get(PACKET_HEADER..).filter(|_| payload[8..PACKET_HEADER] == CONFIGURATION)?;
    let body = records.strip_prefix(&vfio::flag::DEV_CONFIG_STATE.to_be_bytes())?;
    body.strip_suffix(&vfio::flag::END_OF_STATE.to_be_bytes())
}
