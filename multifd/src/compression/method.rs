//! The methods and their names.

use crate::layout::COMPRESSION_MASK;
use core::fmt;
use core::str::FromStr;
use qevm_wire::QemuVersion;

/// Parameter `multifd-compression`, equal on both sides.
///
/// ```
/// use qevm_multifd::Compression;
///
/// assert_eq!("zstd".parse(), Ok(Compression::Zstd));
/// assert_eq!(Compression::Zstd.flag(), 0x04);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Compression {
    /// The pages as they are.
    None,
    /// One deflate stream for the whole channel.
    Zlib,
    /// One Zstandard frame for the whole channel.
    Zstd,
    /// Pages one by one, by Intel's Query Processing Library.
    Qpl,
    /// Pages one by one, by Huawei's Unified Accelerator Framework.
    Uadk,
    /// Packets one by one, by Intel QuickAssist.
    Qatzip,
}

impl Compression {
    /// Every method, in the order of QEMU's documentation.
    pub const ALL: [Compression; 6] = [
        Compression::None,
        Compression::Zlib,
        Compression::Zstd,
        Compression::Qatzip,
        Compression::Qpl,
        Compression::Uadk,
    ];

    /// QEMU's name of the method.
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// The flag of packets with pages.
    pub fn flag(self) -> u32 {
        self.row().1
    }

    /// The first release with the method.
    pub fn since(self) -> QemuVersion {
        self.row().2
    }

    /// The method in a packet's flags; `None` if the bits are no known method.
    pub fn from_flags(flags: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.flag() == flags & COMPRESSION_MASK)
    }

    fn row(self) -> (&'static str, u32, QemuVersion) {
        match self {
            Compression::None => ("none", 0, QemuVersion::new(4, 0)),
            Compression::Zlib => ("zlib", 0x02, QemuVersion::new(5, 0)),
            Compression::Zstd => ("zstd", 0x04, QemuVersion::new(5, 0)),
            Compression::Qpl => ("qpl", 0x08, QemuVersion::new(9, 1)),
            Compression::Uadk => ("uadk", 0x10, QemuVersion::new(9, 1)),
            Compression::Qatzip => ("qatzip", 0x20, QemuVersion::new(9, 2)),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text is none of QEMU's names of compression methods.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown multifd-compression, expected none, zlib, zstd, qatzip, qpl or uadk")]
pub struct UnknownCompression;

impl FromStr for Compression {
    type Err = UnknownCompression;

    fn from_str(name: &str) -> Result<Self, UnknownCompression> {
        Self::ALL.into_iter().find(|method| method.name() == name).ok_or(UnknownCompression)
    }
}
