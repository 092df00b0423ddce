//! What the payload of a packet with pages is: parameter `multifd-compression`.
//!
//! `zlib`, `qpl` and `qatzip` need feature `zlib` of this crate, `zstd` needs feature `zstd`; both are on by default.
//! Without them the methods keep their names and rules, and [`Compressor::new`] and [`Decompressor`] refuse them
//! ([`CompressionError::NotBuilt`]).

#[cfg(not(all(feature = "zlib", feature = "zstd")))]
mod absent;
mod compress;
mod decompress;
mod error;
#[cfg(feature = "zlib")]
mod gzip;
#[cfg(feature = "zlib")]
mod incompressible;
mod lengths;
mod method;
#[cfg(all(test, feature = "zlib", feature = "zstd"))]
mod tests;
#[cfg(feature = "zlib")]
mod zlib;
#[cfg(feature = "zstd")]
mod zstd;

#[cfg(not(feature = "zstd"))]
use absent::zstd;
#[cfg(not(feature = "zlib"))]
use absent::{gzip, zlib};

pub use compress::Compressor;
pub use decompress::{Decompressor, PacketPages};
pub use error::CompressionError;
pub use method::{Compression, UnknownCompression};
