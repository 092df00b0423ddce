//! What has called at a port where a migration is waited for, by its first bytes.
//!
//! A port is found by others than sources: by scanners, by browsers, by a source with TLS, by a file that was meant to
//! be unpacked first. A destination that drops such a connection can say in a word what it was.

use crate::container::{FileKind, recognise};
use core::fmt;

/// How many bytes from the start of a connection [`FirstBytes::of`] wants to see; fewer may be enough.
pub const FIRST_BYTES_LEN: usize = crate::container::RECOGNISE_LEN;

/// What the first bytes of a connection are.
///
/// ```
/// use qevm_savevm::first_bytes::FirstBytes;
///
/// assert_eq!(FirstBytes::of(b"GET / HTTP/1.1\r\n").to_string(), "an HTTP request");
/// assert_eq!(FirstBytes::of(&[0x16, 3, 1, 2, 0, 1]).to_string(), "a TLS ClientHello");
/// assert_eq!(FirstBytes::of(b"").to_string(), "nothing");
/// assert_eq!(FirstBytes::of(b"GIF8").to_string(), "bytes of no kind known here (47 49 46 38)");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FirstBytes {
    /// There are none.
    Nothing,
    /// A migration stream, a page channel, or the start of a file.
    File(FileKind),
    /// A TLS handshake: the source has `tls-creds`.
    Tls,
    /// An HTTP request.
    Http,
    /// The greeting of an SSH client.
    Ssh,
    /// Something else.
    Unknown {
        /// The first bytes; those beyond `len` are zero.
        bytes: [u8; 8],
        /// How many of them came.
        len: u8,
    },
}

impl FirstBytes {
    /// Says what `bytes` are, with which a connection starts.
    pub fn of(bytes: &[u8]) -> FirstBytes {
        const HTTP: [&[u8]; 9] =
            [b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"CONNECT ", b"PATCH ", b"PRI * HTTP"];
        if bytes.is_empty() {
            return FirstBytes::Nothing;
        }
        if let Some(kind) = recognise(bytes) {
            return FirstBytes::File(kind);
        }
        match bytes {
            [0x16, 3, ..] => FirstBytes::Tls,
            [b'S', b'S', b'H', b'-', ..] => FirstBytes::Ssh,
            _ if HTTP.iter().any(|method| bytes.starts_with(method)) => FirstBytes::Http,
            // The name has sixteen bytes, and a connection may begin with fewer.
            _ if bytes.starts_with(b"Libvirt") => FirstBytes::File(FileKind::Libvirt),
            _ => {
                let mut first = [0; 8];
                let len = bytes.len().min(first.len());
                first[..len].copy_from_slice(&bytes[..len]);
                FirstBytes::Unknown { bytes: first, len: len as u8 }
            }
        }
    }
}

/// With its article, to go after "it sent".
impl fmt::Display for FirstBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FirstBytes::Nothing => f.write_str("nothing"),
            FirstBytes::File(FileKind::Stream) => f.write_str("the start of a migration stream"),
            FirstBytes::File(FileKind::MultifdChannel) => f.write_str("the start of a page channel (multifd)"),
            FirstBytes::File(FileKind::Libvirt) => f.write_str("a libvirt save image"),
            FirstBytes::File(FileKind::Qcow2) => f.write_str("a qcow2 image"),
            FirstBytes::File(FileKind::Compressed(method)) => write!(f, "a file compressed with {}", method.as_str()),
            FirstBytes::File(FileKind::Foreign(_)) => f.write_str("the start of a file that is no migration stream"),
            FirstBytes::Tls => f.write_str("a TLS ClientHello"),
            FirstBytes::Http => f.write_str("an HTTP request"),
            FirstBytes::Ssh => f.write_str("an SSH greeting"),
            FirstBytes::Unknown { bytes, len } => {
                f.write_str("bytes of no kind known here (")?;
                for (i, byte) in bytes.iter().take((*len).into()).enumerate() {
                    write!(f, "{}{byte:02x}", if i > 0 { " " } else { "" })?;
                }
                f.write_str(")")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_are_named() {
        let table: [(&[u8], &str); 12] = [
            (b"", "nothing"),
            (b"QEVM\0\0\0\x03", "the start of a migration stream"),
            (&[0x11, 0x22, 0x33, 0x44], "the start of a page channel (multifd)"),
            (&[0x16, 3, 1], "a TLS ClientHello"),
            (b"POST /x HTTP/1.1", "an HTTP request"),
            (b"PRI * HTTP/2.0\r\n", "an HTTP request"),
            (b"SSH-2.0-OpenSSH", "an SSH greeting"),
            (&[0x1f, 0x8b, 8, 0], "a file compressed with gzip"),
            (b"LibvirtQemudSave", "a libvirt save image"),
            (b"LibvirtQ", "a libvirt save image"),
            (b"QFI\xfb", "a qcow2 image"),
            (b"garbage and more", "bytes of no kind known here (67 61 72 62 61 67 65 20)"),
        ];
        for (bytes, name) in table {
            assert_eq!(FirstBytes::of(bytes).to_string(), name, "{bytes:?}");
        }
    }
}
