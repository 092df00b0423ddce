//! The page channels (multifd) of a QEMU migration, sans-IO: bytes in, events out, and back.
//!
//! # Contents, in reading order
//!
//! | module | what |
//! |---|---|
//! | [`layout`] | the numbers of the wire: magic, version, lengths, flags |
//! | [`init`] | [`Init`], the first packet of a channel; [`ChannelSet`], who has arrived |
//! | [`packet`] | [`RamPacket`]: which pages the payload holds, and SYNC |
//! | [`device_state`] | [`DeviceState`]: devices beside the pages |
//! | [`runs`] | [`Runs`]: adjacent pages as one range |
//! | [`event`], [`decode`], [`encode`] | [`Event`], [`ChannelDecoder`], [`ChannelEncoder`] |
//! | [`compression`] | what payloads are |
//! | [`sync`] | who waits for whom: main channel and page channels |
//! | [`zero_page`] | how zero pages travel |
//! | [`rules`] | which parameters which release takes |
//! | [`mapped_ram`] | the same pages in a file |
//! | [`error`] | [`Error`]: kind, offset, path |
//!
//! # Features
//!
//! Both are on by default; a monitor that migrates without compression can leave them out, and compiles no library
//! then.
//!
//! | feature | what |
//! |---|---|
//! | `zlib` | payloads of methods `zlib`, `qpl` and `qatzip` |
//! | `zstd` | payloads of method `zstd`; compiles a library in C |
//!
//! # Promises
//!
//! * Nothing here does I/O, and nothing panics or loops without consuming input, on any input.
//! * A decoder holds no bytes of the channel and allocates nothing per page; page data never passes through it.
//! * Whatever is decoded is encoded to the same bytes.
//!
//! # Example
//!
//! ```
//! use qevm_multifd::{ChannelDecoder, ChannelEncoder, ChannelOptions, EncoderOptions, Event, Init, Pages, Uuid};
//! use qevm_wire::{CountedString, Driver, Writer};
//! use std::io::Read;
//!
//! // A channel with one page at 0x5000 and a page of zeroes at 0x8000.
//! let mut encoder = ChannelEncoder::new(EncoderOptions::default());
//! let mut sent = Writer::new();
//! encoder.init(&Init::new(Uuid::default(), 0), &mut sent)?;
//! let block = CountedString::new("pc.ram").unwrap();
//! encoder.pages(&Pages { block: &block, normal: &[0x5000], zero: &[0x8000], packet_num: 1 }, 4096, &mut sent)?;
//! sent.bytes(&[0xaa; 4096]);
//!
//! let mut driver = Driver::new(sent.as_bytes(), ChannelDecoder::new(ChannelOptions::default()));
//! let mut memory = vec![0x55; 0x10000];
//! while let Some(event) = driver.next()? {
//!     let Event::Ram(packet) = &event else { continue };
//!     let (normal, zero): (Vec<_>, Vec<_>) = (packet.normal_runs().collect(), packet.zero_runs().collect());
//!     for run in zero {
//!         memory[run.offset as usize..][..run.len as usize].fill(0);
//!     }
//!     // Page data goes from the connection to its place.
//!     for run in normal {
//!         driver.payload().read_exact(&mut memory[run.offset as usize..][..run.len as usize])?;
//!     }
//! }
//! assert_eq!((memory[0x5000], memory[0x8000], memory[0x9000]), (0xaa, 0, 0x55));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod chunk;
pub mod compression;
pub mod decode;
pub mod device_state;
pub mod encode;
pub mod error;
pub mod event;
pub mod init;
pub mod layout;
pub mod mapped_ram;
pub mod packet;
pub mod rules;
pub mod runs;
pub mod sync;
#[cfg(test)]
mod tests;
mod uuid;
pub mod zero_page;

pub use compression::{Compression, CompressionError, Compressor, Decompressor};
pub use decode::{ChannelDecoder, ChannelOptions, Ending, is_page_channel};
pub use device_state::{DeviceState, VfioDeviceState};
pub use encode::{ChannelEncoder, EncoderOptions, Pages};
pub use error::{Error, ErrorKind, HandshakeError, PacketError, Reader};
pub use event::{Event, PayloadKind};
pub use init::{ChannelSet, Init};
pub use packet::{PacketLayout, RamPacket};
pub use runs::{Run, Runs};
pub use sync::{FlushMode, Progress, SourceSync, SyncBarrier, SyncError, SyncStep, Waiting};
pub use uuid::{BadUuid, Uuid};
