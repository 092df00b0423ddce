//! The header of libvirt's save images.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 16 | `LibvirtQemudSave`, or `LibvirtQemudPart` while the save is under way |
//! | 16 | 4 | version: 1 or 2; 3 with format `sparse` |
//! | 20 | 4 | length of what follows the header: domain XML with its NUL, then the cookie |
//! | 24 | 4 | 1 if the domain was running |
//! | 28 | 4 | format: 0 raw, 1 gzip, 2 bzip2, 3 xz, 4 lzop, 5 zstd, 6 sparse |
//! | 32 | 4 | offset of the cookie in that data; 0 if there is none |
//! | 36 | 56 | unused |
//!
//! The integers are in the byte order of the host that wrote the file; the version tells which that is. The stream
//! follows directly after the data. In format `sparse` it is a mapped-ram stream, whose offsets count from the start
//! of the file.

use super::{Compression, ContainerError, LIBVIRT_COMPLETE, LIBVIRT_PARTIAL};
use crate::{Error, Reader};
use qevm_wire::{Limits, Located};

/// Bytes of the header in front of the XML.
pub const HEADER_LEN: usize = 92;

/// How the stream is stored in a save image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SaveFormat {
    /// As it is.
    Raw,
    /// Compressed as a whole.
    Compressed(Compression),
    /// As a mapped-ram stream.
    Sparse,
}

/// The header of a save image, and what follows from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveImage {
    /// False while libvirt has not finished the save: the stream may end anywhere.
    pub complete: bool,
    /// Version of the header.
    pub version: u32,
    /// The domain was running when it was saved, and will be started when it is restored.
    pub was_running: bool,
    /// How the stream is stored.
    pub format: SaveFormat,
    /// Bytes of the domain XML, which starts at [`HEADER_LEN`]; without its NUL and the cookie.
    pub xml_len: u64,
    /// File offset of the stream.
    pub stream_offset: u64,
}

impl SaveImage {
    /// Reads the header from the first [`HEADER_LEN`] bytes of the file.
    ///
    /// # Errors
    /// [`ContainerError`] for a file that is no save image, an unknown version or format, or lengths that cannot be;
    /// a limit error for more XML than `limits.vmdesc`.
    ///
    /// ```
    /// use qevm_savevm::container::libvirt::{SaveFormat, SaveImage};
    ///
    /// let mut file = b"LibvirtQemudSave".to_vec();
    /// for word in [2u32, 1000, 1, 5, 0] {
    ///     file.extend(word.to_le_bytes());
    /// }
    /// file.resize(92, 0);
    /// let image = SaveImage::parse(&file, &Default::default())?;
    /// assert!(image.complete && image.was_running);
    /// assert_eq!(image.stream_offset, 1092);
    /// # Ok::<(), qevm_savevm::Error>(())
    /// ```
    pub fn parse(header: &[u8], limits: &Limits) -> Result<SaveImage, Error> {
        let mut reader = Reader::new(header);
        let magic: [u8; 16] = reader.array()?;
        let complete = match &magic {
            LIBVIRT_COMPLETE => true,
            LIBVIRT_PARTIAL => false,
            other => {
                let error = ContainerError::Magic { container: "libvirt save image", found: other.to_vec() };
                return Err(Located::new(error.into(), 0));
            }
        };
        let version_bytes: [u8; 4] = reader.clone().array()?;
        let swapped = u32::from_le_bytes(version_bytes) > MAX_VERSION;
        let mut word = || -> Result<(u64, u32), Error> {
            let at = reader.offset();
            let bytes = reader.array()?;
            Ok((at, if swapped { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }))
        };
        let fail = |at, error: ContainerError| Err(Located::new(error.into(), at));

        let (at, version) = word()?;
        if !(1..=MAX_VERSION).contains(&version) {
            let found = u32::from_le_bytes(version_bytes);
            return fail(at, ContainerError::Version { container: "libvirt save image", found, expected: "1, 2, 3" });
        }
        let (data_at, data_len) = word()?;
        let (_, was_running) = word()?;
        let (at, format) = word()?;
        let format = match format {
            0 => SaveFormat::Raw,
            1 => SaveFormat::Compressed(Compression::Gzip),
            2 => SaveFormat::Compressed(Compression::Bzip2),
            3 => SaveFormat::Compressed(Compression::Xz),
            4 => SaveFormat::Compressed(Compression::Lzop),
            5 => SaveFormat::Compressed(Compression::Zstd),
            6 => SaveFormat::Sparse,
            found => return fail(at, ContainerError::SaveFormat { found }),
        };
        let (cookie_at, cookie_offset) = word()?;
        reader.take(UNUSED_LEN)?;

        let data_len = u64::from(data_len);
        if data_len > limits.vmdesc {
            let (what, found, limit) = ("length of the domain XML", data_len, limits.vmdesc);
            return Err(Located::new(qevm_wire::WireError::LimitExceeded { what, found, limit }.into(), data_at));
        }
        let xml_and_nul = if cookie_offset == 0 { data_len } else { cookie_offset.into() };
        if xml_and_nul > data_len {
            let (what, expected) = ("offset of the cookie", "an offset inside the data after the header");
            return fail(cookie_at, ContainerError::Field { what, found: xml_and_nul, expected });
        }
        Ok(SaveImage {
            complete,
            version,
            was_running: was_running != 0,
            format,
            xml_len: xml_and_nul.saturating_sub(1),
            stream_offset: HEADER_LEN as u64 + data_len,
        })
    }
}

const MAX_VERSION: u32 = 3;
const UNUSED_LEN: u64 = 14 * 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use qevm_wire::{Fault, WireError};

    fn header(magic: &[u8], words: [u32; 5], order: fn(u32) -> [u8; 4]) -> Vec<u8> {
        let mut bytes = magic.to_vec();
        words.iter().for_each(|&word| bytes.extend(order(word)));
        bytes.resize(HEADER_LEN, 0);
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<SaveImage, Error> {
        SaveImage::parse(bytes, &Limits::default())
    }

    #[test]
    fn both_byte_orders_are_read() {
        let words = [2, 0x1000, 0, 3, 0xf00];
        for order in [u32::to_le_bytes, u32::to_be_bytes] {
            let image = parse(&header(LIBVIRT_PARTIAL, words, order)).unwrap();
            assert_eq!(
                image,
                SaveImage {
                    complete: false,
                    version: 2,
                    was_running: false,
                    format: SaveFormat::Compressed(Compression::Xz),
                    xml_len: 0xeff,
                    stream_offset: 0x1000 + 92,
                }
            );
        }
    }

    #[test]
    fn what_cannot_be_is_refused_at_its_offset() {
        let kind = |words| {
            let error = parse(&header(LIBVIRT_COMPLETE, words, u32::to_le_bytes)).unwrap_err();
            (error.offset, error.kind)
        };
        assert!(matches!(kind([4, 0, 0, 0, 0]), (16, ErrorKind::Container(ContainerError::Version { found: 4, .. }))));
        assert!(matches!(kind([0, 0, 0, 0, 0]), (16, ErrorKind::Container(ContainerError::Version { found: 0, .. }))));
        let format = kind([2, 0, 0, 7, 0]);
        assert!(matches!(format, (28, ErrorKind::Container(ContainerError::SaveFormat { found: 7 }))));
        assert!(matches!(kind([2, 8, 0, 0, 9]), (32, ErrorKind::Container(ContainerError::Field { found: 9, .. }))));
        let limit = kind([2, u32::MAX, 0, 0, 0]);
        assert!(matches!(limit, (20, ErrorKind::Wire(WireError::LimitExceeded { .. }))));
        let magic = parse(&[b'x'; 92]).unwrap_err();
        assert!(matches!(magic.kind, ErrorKind::Container(ContainerError::Magic { .. })));
    }

    #[test]
    fn every_cut_is_truncated() {
        let whole = header(LIBVIRT_COMPLETE, [2, 0, 0, 0, 0], u32::to_le_bytes);
        for end in 0..HEADER_LEN {
            assert_eq!(parse(&whole[..end]).unwrap_err().fault(), Fault::Truncated, "{end}");
        }
    }
}
