//! What stands in for a compression library that was left out: streams that cannot be made.

use super::{Compression, CompressionError};
use core::convert::Infallible;

fn not_built(method: Compression) -> CompressionError {
    let feature = if method == Compression::Zstd { "zstd" } else { "zlib" };
    CompressionError::NotBuilt { method, feature }
}

/// An encoder of this method, which takes a level of this type.
macro_rules! encoder {
    ($name:ident, $level:ty, $method:ident) => {
        pub(crate) struct $name(Infallible);

        impl $name {
            pub(crate) fn new(_: $level) -> Result<Self, CompressionError> {
                Err(not_built(Compression::$method))
            }

            pub(crate) fn page(&mut self, _: &[u8], _: bool, _: &mut Vec<u8>) -> Result<(), CompressionError> {
                match self.0 {}
            }
        }
    };
}

#[cfg(not(feature = "zlib"))]
pub(super) mod zlib {
    use super::{Compression, CompressionError, Infallible, not_built};

    pub(crate) const MAX_LEVEL: i32 = 9;

    pub(crate) struct Inflate(Infallible);

    impl Inflate {
        pub(crate) fn zlib() -> Result<Self, CompressionError> {
            Err(not_built(Compression::Zlib))
        }

        pub(crate) fn raw() -> Result<Self, CompressionError> {
            Err(not_built(Compression::Qpl))
        }

        pub(crate) fn restart(&mut self) {
            match self.0 {}
        }

        pub(crate) fn fill(&mut self, _: &mut &[u8], _: &mut [u8]) -> Result<usize, CompressionError> {
            match self.0 {}
        }
    }

    encoder!(Deflate, u32, Zlib);
}

#[cfg(not(feature = "zlib"))]
pub(super) mod gzip {
    use super::{Compression, CompressionError, Infallible, not_built};

    pub(crate) struct GzipPacket<'a>(Infallible, core::marker::PhantomData<&'a [u8]>);

    impl<'a> GzipPacket<'a> {
        pub(crate) fn new(_: &'a [u8]) -> Result<Self, CompressionError> {
            Err(not_built(Compression::Qatzip))
        }

        pub(crate) fn fill(&mut self, _: &mut [u8]) -> Result<usize, CompressionError> {
            match self.0 {}
        }
    }
}

#[cfg(not(feature = "zstd"))]
pub(super) mod zstd {
    use super::{Compression, CompressionError, Infallible, not_built};

    pub(crate) const MAX_LEVEL: i32 = 20;

    pub(crate) struct ZstdStream(Infallible);

    impl ZstdStream {
        pub(crate) fn new() -> Result<Self, CompressionError> {
            Err(not_built(Compression::Zstd))
        }

        pub(crate) fn fill(&mut self, _: &mut &[u8], _: &mut [u8]) -> Result<usize, CompressionError> {
            match self.0 {}
        }
    }

    encoder!(ZstdEncoder, i32, Zstd);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Compressor, Decompressor};
    use qevm_wire::{Blame, Fault, PageGeometry};

    fn refuses<T>(result: Result<T, CompressionError>, method: Compression, feature: &'static str) {
        let error = result.map(drop).unwrap_err();
        assert_eq!(error, CompressionError::NotBuilt { method, feature });
        assert_eq!(error.fault(), Fault::Unsupported);
        assert!(error.to_string().contains(feature), "{error}");
    }

    #[test]
    fn methods_without_their_library_are_refused_by_name() {
        if cfg!(not(feature = "zlib")) {
            refuses(Compressor::new(Compression::Zlib, None), Compression::Zlib, "zlib");
            refuses(Decompressor::new(Compression::Zlib, PageGeometry::X86), Compression::Zlib, "zlib");
            refuses(Decompressor::new(Compression::Qpl, PageGeometry::X86), Compression::Qpl, "zlib");
            let mut blocks = Decompressor::new(Compression::Qatzip, PageGeometry::X86).unwrap();
            refuses(blocks.packet(&[0x1f, 0x8b], 1), Compression::Qatzip, "zlib");
        }
        if cfg!(not(feature = "zstd")) {
            refuses(Compressor::new(Compression::Zstd, None), Compression::Zstd, "zstd");
            refuses(Decompressor::new(Compression::Zstd, PageGeometry::X86), Compression::Zstd, "zstd");
        }
    }

    #[test]
    fn pages_as_they_are_need_no_library() {
        let mut payload = Vec::new();
        Compressor::new(Compression::None, None).unwrap().packet([&[7; 4096][..]], &mut payload).unwrap();
        let mut decompressor = Decompressor::new(Compression::None, PageGeometry::X86).unwrap();
        let (mut packet, mut memory) = (decompressor.packet(&payload, 1).unwrap(), [0; 4096]);
        packet.fill(&mut memory).unwrap();
        packet.finish().unwrap();
        assert_eq!(memory, [7; 4096]);
    }
}
