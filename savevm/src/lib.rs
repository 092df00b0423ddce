//! The main channel of a QEMU migration stream, sans-IO: bytes in, events out, and back.
//!
//! # Contents, in reading order
//!
//! | module | what |
//! |---|---|
//! | [`framing`] | the numbers that frame a stream, section headers |
//! | [`event`] | [`Event`]: what a stream consists of; [`Step`]: what a decoder answers |
//! | [`decode`] | [`Decoder`]: bytes to events |
//! | [`encode`] | [`Encoder`]: events to bytes; [`StreamWriter`] for a source that writes step by step |
//! | [`configuration`] | the configuration section |
//! | [`command`] | commands between sections |
//! | [`ram`] | RAM blocks and page records; the preempt channel |
//! | [`xbzrle`] | pages as differences: decoder, encoder, and the source's cache |
//! | [`vfio`], [`dirty_bitmap`], [`block_migration`], [`hash_table`], [`storage_attributes`] | the records of the other iterable handlers |
//! | [`mapped_ram`] | files in which every page has its place |
//! | [`first_bytes`] | what a connection is that may be no source |
//! | [`cpr`] | the side channel of `cpr-transfer`: which descriptors a source passes to its successor |
//! | [`container`] | files with a stream inside: libvirt save images, qcow2 snapshots |
//! | [`vmdesc`] | the JSON description, and device sections decoded to their last field with it or without |
//! | `check` | whether a destination will load a stream, and if not, why |
//! | [`guest_memory`] | where guest memory lies in RAM blocks, for each machine type |
//! | [`vmstate`] | device state, declared once for codec, description and schema; `qevm-devices` has declarations |
//! | [`error`] | [`Error`]: kind, offset, path |
//!
//! # Features
//!
//! All are on by default; a monitor that only needs the codec can leave them out.
//!
//! | feature | what |
//! |---|---|
//! | `derive` | `#[derive(VmState)]` |
//! | `catalogue` | `vmdesc::Catalogue`: layouts of QEMU's device sections for streams without a description, 82 KB of text |
//! | `check` | module `check` |
//! | `containers` | modules `container::libvirt` and `container::qcow2` |
//!
//! # Promises
//!
//! * Nothing here does I/O, and nothing panics or loops without consuming input, on any input.
//! * A decoder allocates per section, RAM block and command, within [`Limits`](qevm_wire::Limits), and nothing per
//!   page. It never copies a page and never holds bytes of the stream.
//! * Whatever is decoded is encoded to the same bytes.
//!
//! # Example: read a stream and write it again
//!
//! ```
//! use qevm_savevm::{Decoder, DecoderOptions, Encoder};
//! use qevm_wire::{Driver, Writer};
//! use std::io::Read;
//! # use qevm_savevm::{StreamWriter, command::Command, configuration::Configuration, framing::SectionHeader, ram::{BlockId, RamBlock}};
//! # use qevm_wire::CountedString;
//! # fn sample() -> Result<Vec<u8>, qevm_savevm::Error> {
//! #     let name = |name: &str| CountedString::new(name).unwrap();
//! #     let section = |section_id, idstr, version_id| SectionHeader { section_id, idstr: name(idstr), instance_id: 0, version_id };
//! #     let mut stream = StreamWriter::default();
//! #     stream.header(Some(&Configuration::new("microvm")))?;
//! #     stream.section_start(&section(2, "ram", 4))?;
//! #     stream.ram_setup([RamBlock::new(name("microvm.ram"), 0x2000)])?;
//! #     stream.page_header(BlockId(0), 0)?;
//! #     stream.payload(&[0xaa; 4096])?;
//! #     stream.zero_page(BlockId(0), 0x1000)?;
//! #     stream.eos()?;
//! #     stream.footer()?;
//! #     stream.section_full(&section(7, "timer", 2), &[0; 24])?;
//! #     stream.eof()?;
//! #     stream.vmdesc("{}")?;
//! #     Ok(stream.take())
//! # }
//!
//! let stream: Vec<u8> = sample()?; // in real life: from a file or socket, piece by piece
//!
//! let mut driver = Driver::new(&stream[..], Decoder::new(DecoderOptions::default()));
//! let mut encoder = Encoder::default();
//! let mut copy = Writer::new();
//! while let Some(event) = driver.next()? {
//!     // Here a receiver acts on the event: enters a section, prepares guest memory, loads a device…
//!     encoder.encode(&event, &mut copy)?;
//!     // A receiver reads these bytes where the event said. They need not go through a buffer at all.
//!     let mut payload = Vec::new();
//!     driver.payload().read_to_end(&mut payload)?;
//!     copy.bytes(&payload);
//! }
//! assert_eq!(copy.as_bytes(), stream);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

// The page on embedding is compiled and run as a test of this crate, which needs all that the page does.
#[cfg(all(doctest, feature = "derive"))]
#[doc = include_str!("../docs/embedding.md")]
struct Embedding;

// The code that the derive macro writes names this crate from the outside.
#[cfg(all(test, feature = "derive"))]
extern crate self as qevm_savevm;

pub mod block_migration;
#[cfg(feature = "check")]
pub mod check;
pub mod command;
pub mod configuration;
pub mod container;
pub mod cpr;
pub mod decode;
pub mod dirty_bitmap;
pub mod encode;
pub mod error;
pub mod event;
pub mod first_bytes;
pub mod framing;
pub mod guest_memory;
pub mod hash_table;
pub mod mapped_ram;
pub mod ram;
pub mod storage_attributes;
pub mod vfio;
pub mod vmdesc;
pub mod vmstate;
pub mod xbzrle;

pub use decode::{BodyEnds, Decoder, DecoderOptions, Footers, Sections, StreamError};
pub use encode::{Encoder, StreamWriter, WriteError};
pub use error::{Error, ErrorKind, Reader};
pub use event::{Event, PayloadKind, Step};
