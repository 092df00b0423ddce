//! RAM packets: which pages the payload after them holds, and where the channels synchronise.

use crate::chunk::chunk;
use crate::compression::Compression;
use crate::layout::{self, FLAG_DEVICE_STATE, FLAG_SYNC, RAM_HEADER_LEN, RamHeader};
use crate::runs::{Run, Runs};
use crate::{Error, PacketError, Reader};
use core::fmt;
use core::mem::offset_of;
use qevm_wire::{CountedString, Limits, Located, PageGeometry, WireError, Writer};
use zerocopy::{IntoBytes, transmute_ref};

/// How QEMU lays RAM packets out, which the wire does not tell.
///
/// The two layouts need no detection to be *read*: the `zero_pages` field of 9.0 is a word that older releases always
/// wrote as zero, and the payload of a packet without normal pages is empty in both, whatever its `next_packet_size`
/// says. [`RamPacket`] therefore reads both in one way. They differ in what a source *writes*.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PacketLayout {
    /// QEMU up to 8.2: no zero pages; the SYNC flag may be on a packet with pages; a packet without pages keeps the
    /// fields of the packet before it.
    Pages,
    /// QEMU 9.0 and later: zero pages are listed after the normal ones; SYNC is a blank packet of its own.
    ZeroPages,
}

impl PacketLayout {
    /// The layout of [`Profile::multifd_zero_pages`](qevm_wire::Profile::multifd_zero_pages).
    ///
    /// ```
    /// use qevm_multifd::PacketLayout;
    /// use qevm_wire::{Profile, QemuVersion};
    ///
    /// let profile = Profile::new(QemuVersion::new(7, 2), "microvm");
    /// assert_eq!(PacketLayout::of(&profile), PacketLayout::Pages);
    /// ```
    pub fn of(profile: &qevm_wire::Profile) -> Self {
        if profile.multifd_zero_pages { PacketLayout::ZeroPages } else { PacketLayout::Pages }
    }
}

/// Number of offset slots of a packet: 128 for pages of 4096 bytes, so that every RAM packet is 1344 bytes long.
pub fn slots(pages: PageGeometry) -> u32 {
    (layout::PACKET_DATA >> pages.bits()) as u32
}

/// Length in bytes of a RAM packet with its offset slots, without its payload.
///
/// ```
/// assert_eq!(qevm_multifd::packet::packet_len(qevm_wire::PageGeometry::X86), 1344);
/// ```
pub fn packet_len(pages: PageGeometry) -> usize {
    RAM_HEADER_LEN + 8 * slots(pages) as usize
}

/// A RAM packet, read in place: nothing is copied, every count was checked.
///
/// What QEMU left in unused fields is still there (names and offsets of the packet before, up to 8.2), so that a packet
/// encodes to the bytes it was read from.
#[derive(Clone, Copy)]
pub struct RamPacket<'a> {
    header: &'a RamHeader,
    slots: &'a [[u8; 8]],
    pages: PageGeometry,
    compression: Compression,
}

/// Offsets of pages in their RAM block, in bytes.
pub type Offsets<'a> = core::iter::Map<core::iter::Copied<core::slice::Iter<'a, [u8; 8]>>, fn([u8; 8]) -> u64>;

impl<'a> RamPacket<'a> {
    /// Reads a packet without its payload.
    ///
    /// # Errors
    /// A [`PacketError`] at the field at fault; [`WireError::Truncated`] if there are fewer bytes than
    /// [`packet_len`].
    pub fn decode(bytes: &'a [u8], pages: PageGeometry, limits: &Limits) -> Result<Self, Error> {
        Self::read(&mut Reader::new(bytes), pages, limits)
    }

    pub(crate) fn read(reader: &mut Reader<'a>, pages: PageGeometry, limits: &Limits) -> Result<Self, Error> {
        let start = reader.offset();
        let mut packet = reader.sub(packet_len(pages) as u64)?;
        let header: &RamHeader = transmute_ref!(chunk::<RAM_HEADER_LEN>(&mut packet)?);
        let (slots, _) = packet.rest().as_chunks();
        let compression = prefix(header.magic.get(), header.version.get(), header.flags.get(), start)?;
        if header.flags.get() & FLAG_DEVICE_STATE != 0 {
            let kind = PacketError::Flags { found: header.flags.get(), what: "device state in a RAM packet" };
            return Err(Located::new(kind.into(), start + FLAGS_AT));
        }
        let packet = RamPacket { header, slots, pages, compression };
        packet.check_counts(start)?;
        packet.check_offsets(start)?;
        packet.check_payload(start, limits)?;
        Ok(packet)
    }

    /// True if the channels synchronise here, after the pages of this packet.
    pub fn is_sync(&self) -> bool {
        self.header.flags.get() & FLAG_SYNC != 0
    }

    /// The compression method in the flags; means nothing in a packet without pages.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Number of the packet among those of all channels. It orders nothing.
    pub fn packet_num(&self) -> u64 {
        self.header.packet_num.get()
    }

    /// True if the packet lists pages, normal ones or zero pages.
    pub fn has_pages(&self) -> bool {
        self.header.normal_pages.get() > 0 || self.header.zero_pages.get() > 0
    }

    /// Name of the RAM block of all pages: 1 to 255 bytes, or `None` in a packet without pages.
    pub fn block(&self) -> Option<CountedString> {
        self.has_pages().then(|| CountedString::new(self.block_bytes())).flatten()
    }

    /// The bytes of [`block`](Self::block), without copying them; whatever is in the field in a packet without pages.
    pub fn block_bytes(&self) -> &'a [u8] {
        layout::name(&self.header.ramblock)
    }

    /// Number of pages with data in the payload.
    pub fn normal_count(&self) -> u32 {
        self.header.normal_pages.get()
    }

    /// Number of pages that are to be zero.
    pub fn zero_count(&self) -> u32 {
        self.header.zero_pages.get()
    }

    /// Offsets of the pages with data, in the order of the payload.
    pub fn normal(&self) -> Offsets<'a> {
        offsets(self.slots.get(..self.normal_count() as usize))
    }

    /// Offsets of the pages that are to be zero (QEMU 9.0; none before).
    pub fn zero(&self) -> Offsets<'a> {
        let normal = self.normal_count() as usize;
        offsets(self.slots.get(normal..normal + self.zero_count() as usize))
    }

    /// The pages with data as runs of adjacent pages, in the order of the payload. With method `none`, the payload is
    /// the content of these runs one after the other, so that a receiver can read it straight into guest memory.
    pub fn normal_runs(&self) -> Runs<Offsets<'a>> {
        Runs::new(self.normal(), self.pages)
    }

    /// The zero pages as runs of adjacent pages.
    pub fn zero_runs(&self) -> Runs<Offsets<'a>> {
        Runs::new(self.zero(), self.pages)
    }

    /// Length in bytes of the payload after the packet: 0 without normal pages, whatever `next_packet_size` says.
    pub fn payload_len(&self) -> u64 {
        if self.normal_count() > 0 { self.header.next_packet_size.get().into() } else { 0 }
    }

    /// Length in bytes of the pages in the payload once they are no longer compressed.
    pub fn pages_len(&self) -> u64 {
        u64::from(self.normal_count()) << self.pages.bits()
    }

    /// The runs that are outside of a RAM block of `used_length` bytes; empty if the packet fits the block.
    pub(crate) fn outside(&self, used_length: u64) -> Option<(u32, u64)> {
        let last = used_length.checked_sub(self.pages.size());
        let mut offsets = self.normal().chain(self.zero()).zip(0..);
        offsets.find(|(offset, _)| last.is_none_or(|last| *offset > last)).map(|(offset, index)| (index, offset))
    }

    /// Appends the packet with every field as it was read.
    pub fn encode(&self, writer: &mut Writer) {
        writer.bytes(self.header.as_bytes()).bytes(self.slots.as_flattened());
    }

    fn check_counts(&self, start: u64) -> Result<(), Error> {
        let slots = slots(self.pages);
        let alloc = self.header.pages_alloc.get();
        let (normal, zero) = (self.normal_count(), self.zero_count());
        let at_most = |what, found: u32, max: u32, at: usize| {
            let kind = PacketError::PageCount { what, found: found.into(), max: max.into() };
            if found <= max { Ok(()) } else { Err(Located::new(kind.into(), start + at as u64)) }
        };
        at_most("pages_alloc", alloc, slots, offset_of!(RamHeader, pages_alloc))?;
        at_most("normal_pages", normal, alloc, offset_of!(RamHeader, normal_pages))?;
        at_most("zero_pages", zero, alloc - normal, offset_of!(RamHeader, zero_pages))
    }

    fn check_offsets(&self, start: u64) -> Result<(), Error> {
        if self.has_pages() && self.block_bytes().is_empty() {
            return Err(Located::new(WireError::Empty { what: "RAM block name" }.into(), start + BLOCK_AT));
        }
        for (index, found) in (0..).zip(self.normal().chain(self.zero())) {
            if self.pages.count(found).is_none() {
                let kind = PacketError::Unaligned { index, found, page_size: self.pages.size() };
                return Err(Located::new(kind.into(), slot_at(start, index)));
            }
        }
        Ok(())
    }

    fn check_payload(&self, start: u64, limits: &Limits) -> Result<(), Error> {
        let found: u64 = self.header.next_packet_size.get().into();
        let pages = self.normal_count();
        let kind = match (pages, self.compression) {
            // Zero pages came with 9.0, where nothing is stale.
            (0, _) if self.zero_count() > 0 && found != 0 => {
                PacketError::PayloadLength { found, expected: 0, pages }.into()
            }
            (0, _) => return Ok(()),
            (_, Compression::None) if found != self.pages_len() => {
                PacketError::PayloadLength { found, expected: self.pages_len(), pages }.into()
            }
            (_, Compression::None) => return Ok(()),
            (_, _) if found == 0 => PacketError::EmptyPayload.into(),
            (_, _) if found > limits.compressed => {
                WireError::LimitExceeded { what: "next_packet_size", found, limit: limits.compressed }.into()
            }
            _ => return Ok(()),
        };
        Err(Located::new(kind, start + PAYLOAD_LENGTH_AT))
    }
}

impl PartialEq for RamPacket<'_> {
    fn eq(&self, other: &Self) -> bool {
        (self.header, self.slots, self.pages) == (other.header, other.slots, other.pages)
    }
}

impl Eq for RamPacket<'_> {}

impl fmt::Debug for RamPacket<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamPacket")
            .field("sync", &self.is_sync())
            .field("compression", &self.compression)
            .field("packet_num", &self.packet_num())
            .field("block", &self.block())
            .field("normal", &self.normal_runs().collect::<Vec<Run>>())
            .field("zero", &self.zero_runs().collect::<Vec<Run>>())
            .field("payload_len", &self.payload_len())
            .finish_non_exhaustive()
    }
}

/// Offset in a packet of its flags.
pub(crate) const FLAGS_AT: u64 = offset_of!(RamHeader, flags) as u64;
const PAYLOAD_LENGTH_AT: u64 = offset_of!(RamHeader, next_packet_size) as u64;
/// Offset in a RAM packet of its block name.
pub(crate) const BLOCK_AT: u64 = offset_of!(RamHeader, ramblock) as u64;

/// Stream offset of an offset slot in the packet at `start`.
pub(crate) fn slot_at(start: u64, index: u32) -> u64 {
    start + RAM_HEADER_LEN as u64 + 8 * u64::from(index)
}

/// Checks what every RAM packet starts with.
pub(crate) fn prefix(magic: u32, version: u32, flags: u32, start: u64) -> Result<Compression, Error> {
    let fail = |kind: PacketError, at| Err(Located::new(kind.into(), start + at));
    if magic != layout::MAGIC {
        return fail(PacketError::Magic { found: magic }, 0);
    }
    if version != layout::VERSION {
        return fail(PacketError::Version { found: version }, offset_of!(RamHeader, version) as u64);
    }
    if flags & !(FLAG_SYNC | layout::COMPRESSION_MASK | FLAG_DEVICE_STATE) != 0 {
        return fail(PacketError::Flags { found: flags, what: "unknown bits are set" }, FLAGS_AT);
    }
    if flags & FLAG_DEVICE_STATE != 0 && flags != FLAG_DEVICE_STATE {
        let what = "device state excludes SYNC and compression";
        return fail(PacketError::Flags { found: flags, what }, FLAGS_AT);
    }
    match Compression::from_flags(flags) {
        Some(compression) => Ok(compression),
        None => fail(PacketError::Flags { found: flags, what: "no known compression method" }, FLAGS_AT),
    }
}

fn offsets<'a>(slots: Option<&'a [[u8; 8]]>) -> Offsets<'a> {
    slots.unwrap_or_default().iter().copied().map(u64::from_be_bytes)
}
