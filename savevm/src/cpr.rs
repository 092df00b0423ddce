//! The side channel of `cpr-transfer` (QEMU 10.0): what a source passes to its successor on the same host before the
//! migration itself begins.
//!
//! The bytes name descriptors, and the descriptors travel beside them (`SCM_RIGHTS`): each comes with the byte that
//! stands for it, the last one of its record. Where the memory of a guest is in files that are passed so, no page of it
//! is on the main channel.

mod error;

pub use error::{CprError, VFIO_DEVICES};

use crate::{Error, ErrorKind, Reader, Step};
use qevm_wire::{CountedString, Cursor, Decode, Limits, Located, WireError, Within, Writer};

/// First 32 bits: `QCPR`.
pub const MAGIC: u32 = 0x5143_5052;
/// The version after them.
pub const VERSION: u32 = 1;

/// Stands for a descriptor.
const DESCRIPTOR: u8 = 0x20;
const SUBSECTION: u8 = 0x05;
const SUBSECTION_VERSION: u32 = 1;
/// What precedes an element of a list, and what ends it.
const ELEMENT: u8 = 1;
const LIST_END: u8 = 0;

/// A piece of the side channel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CprEvent {
    /// A descriptor, which comes with the last byte of this.
    Descriptor(PassedDescriptor),
    /// A VFIO device that is attached to an iommufd.
    VfioDevice(PassedDevice),
}

/// What a descriptor is: for guest memory the name of the RAM block and 0.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PassedDescriptor {
    /// Its name.
    pub name: CountedString,
    /// Which of that name.
    pub id: u32,
}

/// A VFIO device that is attached to an iommufd.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PassedDevice {
    /// Its name.
    pub name: CountedString,
    /// Its number in the iommufd.
    pub device: i32,
    /// The I/O address space.
    pub ioas: u32,
    /// The page table of the hardware.
    pub page_table: u32,
}

/// Where a decoder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Header,
    Descriptors,
    /// After the descriptors, or after the subsection.
    Subsections {
        seen: bool,
    },
    Devices,
}

/// Reads a side channel, whose end is that of the input.
///
/// ```
/// use qevm_savevm::{Step, cpr::{CprDecoder, CprEvent}};
/// use qevm_wire::Decode;
///
/// let bytes = b"QCPR\0\0\0\x01\x01\0\0\0\x08pc.bios\0\0\0\0\0\x20\0";
/// let mut decoder = CprDecoder::default();
/// let Step::Event { consumed: 26, event: CprEvent::Descriptor(found) } = decoder.next(bytes)? else { panic!() };
/// assert_eq!((found.name.as_str(), found.id), (Some("pc.bios"), 0));
/// decoder.end_of_input();
/// assert_eq!(decoder.next(&bytes[26..])?, Step::End);
/// # Ok::<(), qevm_savevm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct CprDecoder {
    cursor: Cursor,
    place: Place,
    elements: u64,
    limits: Limits,
}

impl Default for CprDecoder {
    fn default() -> Self {
        CprDecoder { cursor: Cursor::default(), place: Place::Header, elements: 0, limits: Limits::default() }
    }
}

impl Decode for CprDecoder {
    type Event<'a> = CprEvent;
    type Payload = ();
    type Kind = ErrorKind;

    fn next(&mut self, input: &[u8]) -> Result<Step<CprEvent>, Error> {
        let (mut place, mut elements) = (self.place, self.elements);
        let mut reader = Reader::at(input, self.cursor.offset());
        match self.advance(&mut reader, &mut place, &mut elements) {
            Ok(event) => {
                (self.place, self.elements) = (place, elements);
                self.cursor.move_to(reader.offset());
                Ok(event.map_or(Step::End, |event| Step::Event { consumed: reader.position(), event }))
            }
            Err(error) => match self.cursor.need_more(&error, self.cursor.has_ended()) {
                Some(at_least) => Ok(Step::NeedMore { at_least }),
                None => Err(error.within("CPR channel")),
            },
        }
    }

    fn payload_remaining(&self) -> u64 {
        0
    }

    fn payload_of(&self) -> Option<&()> {
        None
    }

    fn skip_payload(&mut self, count: u64) -> Result<(), Error> {
        self.cursor.skip(count)
    }

    fn end_of_input(&mut self) {
        self.cursor.end();
    }

    fn offset(&self) -> u64 {
        self.cursor.offset()
    }
}

impl CprDecoder {
    /// The next event, or none at the end. What is no event is read with the event after it.
    fn advance(
        &self,
        reader: &mut Reader<'_>,
        place: &mut Place,
        elements: &mut u64,
    ) -> Result<Option<CprEvent>, Error> {
        loop {
            match *place {
                Place::Header => {
                    reader.expect_be32("CPR magic", MAGIC)?;
                    reader.expect_be32("CPR version", VERSION)?;
                    *place = Place::Descriptors;
                }
                Place::Subsections { .. } if reader.is_empty() && self.cursor.has_ended() => return Ok(None),
                Place::Subsections { seen } => {
                    byte(reader, "what follows the descriptors", SUBSECTION)?;
                    let at = reader.offset();
                    let name = reader.counted_string("subsection name")?;
                    if seen || name != VFIO_DEVICES {
                        return Err(Located::new(CprError::Subsection { found: name }.into(), at));
                    }
                    reader.expect_be32("version of the subsection", SUBSECTION_VERSION)?;
                    *place = Place::Devices;
                }
                Place::Descriptors | Place::Devices => {
                    if self.element(reader, elements)? {
                        let descriptors = *place == Place::Descriptors;
                        return if descriptors { descriptor(reader) } else { device(reader) }.map(Some);
                    }
                    *place = Place::Subsections { seen: *place == Place::Devices };
                }
            }
        }
    }

    /// Whether an element of a list follows.
    fn element(&self, reader: &mut Reader<'_>, elements: &mut u64) -> Result<bool, Error> {
        let at = reader.offset();
        match reader.u8()? {
            ELEMENT => {
                *elements += 1;
                let limit = self.limits.ram_blocks;
                let over = WireError::LimitExceeded { what: "number of descriptors", found: *elements, limit };
                if *elements > limit { Err(Located::new(over.into(), at)) } else { Ok(true) }
            }
            LIST_END => Ok(false),
            found => Err(Located::new(CprError::List { found }.into(), at)),
        }
    }
}

fn byte(reader: &mut Reader<'_>, what: &'static str, expected: u8) -> Result<(), Error> {
    let at = reader.offset();
    match reader.u8()? {
        found if found == expected => Ok(()),
        found => Err(Located::new(CprError::Byte { what, found, expected }.into(), at)),
    }
}

fn descriptor(reader: &mut Reader<'_>) -> Result<CprEvent, Error> {
    let name = name(reader)?;
    let mut read = || {
        let id = reader.be32()?;
        byte(reader, "the byte of a descriptor", DESCRIPTOR)?;
        Ok(id)
    };
    let id = read().within(|| format!("descriptor '{name}'"))?;
    Ok(CprEvent::Descriptor(PassedDescriptor { name, id }))
}

fn device(reader: &mut Reader<'_>) -> Result<CprEvent, Error> {
    let name = name(reader)?;
    let (device, ioas, page_table) = (reader.be_i32()?, reader.be32()?, reader.be32()?);
    Ok(CprEvent::VfioDevice(PassedDevice { name, device, ioas, page_table }))
}

/// A name with its length in front, which counts the zero byte at its end.
fn name(reader: &mut Reader<'_>) -> Result<CountedString, Error> {
    let at = reader.offset();
    let len = reader.be32()?;
    let limit = CountedString::MAX_LEN as u64 + 1;
    if u64::from(len) > limit {
        let what = "length of a name";
        return Err(Located::new(WireError::LimitExceeded { what, found: len.into(), limit }.into(), at));
    }
    let name = match reader.take(len.into())? {
        [name @ .., 0] if !name.contains(&0) => CountedString::new(name),
        _ => None,
    };
    name.ok_or_else(|| Located::new(CprError::Name { len }.into(), at))
}

/// Writes a side channel. The descriptors are the caller's to pass: each has to go with the last byte that its
/// [`descriptor`](Self::descriptor) has written, so that it is on its way when the byte that stands for it is read.
///
/// ```
/// use qevm_savevm::cpr::{CprEncoder, PassedDescriptor};
/// let name = qevm_wire::CountedString::new("pc.bios").unwrap();
/// let mut encoder = CprEncoder::default();
/// let with_descriptor = encoder.descriptor(&PassedDescriptor { name, id: 0 });
/// assert_eq!(with_descriptor, b"QCPR\0\0\0\x01\x01\0\0\0\x08pc.bios\0\0\0\0\0\x20");
/// assert_eq!(encoder.end(), b"\0");
/// ```
#[derive(Debug, Clone, Default)]
pub struct CprEncoder {
    writer: Writer,
    begun: bool,
}

impl CprEncoder {
    /// The bytes of a descriptor, with what comes before them.
    pub fn descriptor(&mut self, descriptor: &PassedDescriptor) -> Vec<u8> {
        self.begin();
        self.writer.u8(ELEMENT);
        self.name(&descriptor.name);
        self.writer.be32(descriptor.id).u8(DESCRIPTOR);
        self.take()
    }

    /// The last bytes, behind all descriptors, as releases write them that know of no devices.
    pub fn end(mut self) -> Vec<u8> {
        self.begin();
        self.writer.u8(LIST_END);
        self.take()
    }

    /// The last bytes, behind all descriptors: the VFIO devices, of which there may be none.
    pub fn end_with(mut self, devices: &[PassedDevice]) -> Vec<u8> {
        self.begin();
        self.writer.u8(LIST_END).u8(SUBSECTION).u8(VFIO_DEVICES.len() as u8).bytes(VFIO_DEVICES.as_bytes());
        self.writer.be32(SUBSECTION_VERSION);
        for device in devices {
            self.writer.u8(ELEMENT);
            self.name(&device.name);
            self.writer.be_i32(device.device).be32(device.ioas).be32(device.page_table);
        }
        self.writer.u8(LIST_END);
        self.take()
    }

    fn begin(&mut self) {
        if !std::mem::replace(&mut self.begun, true) {
            self.writer.be32(MAGIC).be32(VERSION);
        }
    }

    fn name(&mut self, name: &CountedString) {
        let bytes = name.as_bytes();
        self.writer.be32(bytes.len() as u32 + 1).bytes(bytes).u8(0);
    }

    fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.writer).into_bytes()
    }
}

#[cfg(test)]
mod tests;
