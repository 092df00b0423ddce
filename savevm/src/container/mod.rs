//! Files that have a migration stream inside: libvirt save images, qcow2 internal snapshots, compressed files.
//!
//! [`recognise`] tells from the first bytes what a file is; `libvirt` and `qcow2` (feature `containers`) say where in
//! the file the stream is. Decompression is left to the caller: these modules only say which format to expect. Nothing
//! here does I/O or panics, and only tables whose sizes were checked against [`Limits`](qevm_wire::Limits) are held.
//!
//! Sources: `docs/format/containers.md`.

#[cfg(feature = "containers")]
pub mod libvirt;
#[cfg(feature = "containers")]
pub mod qcow2;

use qevm_wire::{Blame, Fault};

/// A libvirt save image, and one that libvirt has not finished.
const LIBVIRT_COMPLETE: &[u8; 16] = b"LibvirtQemudSave";
const LIBVIRT_PARTIAL: &[u8; 16] = b"LibvirtQemudPart";
const QCOW2: &[u8; 4] = b"QFI\xfb";

/// How many bytes from the start of a file [`recognise`] wants to see; fewer are enough for a short file.
pub const RECOGNISE_LEN: usize = 16;

/// What a file is, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FileKind {
    /// A migration stream: starts with `QEVM`.
    Stream,
    /// One page channel of a multifd migration; the main stream is another file.
    MultifdChannel,
    /// A libvirt save image (`virsh save`, `virsh managedsave`, memory of external snapshots).
    Libvirt,
    /// A qcow2 disk image, which may have internal snapshots (`savevm`, `snapshot-save`).
    Qcow2,
    /// A compressed file.
    Compressed(Compression),
    /// A file that has a guest in it and no stream.
    Foreign(Foreign),
}

/// What else holds a guest. Its text says what the file is and what opens it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Foreign {
    /// An ELF file.
    Elf,
    /// A kdump-compressed dump.
    Kdump,
    /// A kdump-compressed dump in makedumpfile's flattened form.
    FlattenedKdump,
    /// The channel of `cpr-transfer`.
    Cpr,
    /// A saved Xen domain.
    Xen,
    /// A suspended guest of VMware.
    VMware,
    /// A saved state of VirtualBox.
    VirtualBox,
    /// The legacy format of lz4 (`lz4 -l`), which has no mark at its end.
    LegacyLz4,
}

impl core::fmt::Display for Foreign {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Foreign::Elf => {
                "is an ELF core, as dump-guest-memory and virsh dump --memory-only write, and no migration stream: open it with gdb or crash"
            }
            Foreign::Kdump => "is a kdump-compressed dump and no migration stream: open it with crash",
            Foreign::FlattenedKdump => {
                "is a flattened kdump-compressed dump and no migration stream: `makedumpfile -R` makes a dump of it for crash"
            }
            Foreign::Cpr => "is the CPR channel of cpr-transfer, which passes descriptors: the stream is on the main channel",
            Foreign::Xen => "is a saved Xen domain and no QEMU migration stream: xl restore reads it",
            Foreign::VMware => "is a suspended VMware guest and no QEMU migration stream: vmss2core makes a core of it",
            Foreign::VirtualBox => "is a saved state of VirtualBox and no QEMU migration stream",
            Foreign::LegacyLz4 => {
                "is compressed in the legacy format of lz4, which is not supported: decompress it with `lz4 -dc` first"
            }
        })
    }
}

/// A compression format around a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Compression {
    /// RFC 1952.
    Gzip,
    /// bzip2.
    Bzip2,
    /// xz.
    Xz,
    /// lzop.
    Lzop,
    /// RFC 8878.
    Zstd,
    /// lz4, in its frame format.
    Lz4,
}

impl Compression {
    /// The name of the program that handles it.
    pub fn as_str(self) -> &'static str {
        match self {
            Compression::Gzip => "gzip",
            Compression::Bzip2 => "bzip2",
            Compression::Xz => "xz",
            Compression::Lzop => "lzop",
            Compression::Zstd => "zstd",
            Compression::Lz4 => "lz4",
        }
    }
}

/// Says what a file is that starts with these bytes; `None` if it is nothing known.
///
/// ```
/// use qevm_savevm::container::{Compression, FileKind, recognise};
///
/// assert_eq!(recognise(b"QEVM\0\0\0\x03"), Some(FileKind::Stream));
/// assert_eq!(recognise(&[0x28, 0xb5, 0x2f, 0xfd, 0x04]), Some(FileKind::Compressed(Compression::Zstd)));
/// assert_eq!(recognise(b"GIF89a"), None);
/// ```
pub fn recognise(first: &[u8]) -> Option<FileKind> {
    use Compression::{Bzip2, Gzip, Lz4, Lzop, Xz, Zstd};
    let magics: [(&[u8], FileKind); 24] = [
        (b"QEVM", FileKind::Stream),
        (&[0x11, 0x22, 0x33, 0x44], FileKind::MultifdChannel),
        (LIBVIRT_COMPLETE, FileKind::Libvirt),
        (LIBVIRT_PARTIAL, FileKind::Libvirt),
        (QCOW2, FileKind::Qcow2),
        (&[0x1f, 0x8b, 8], FileKind::Compressed(Gzip)),
        (b"BZh", FileKind::Compressed(Bzip2)),
        (b"\xfd7zXZ\0", FileKind::Compressed(Xz)),
        (b"\x89LZO\0\r\n\x1a\n", FileKind::Compressed(Lzop)),
        (&[0x28, 0xb5, 0x2f, 0xfd], FileKind::Compressed(Zstd)),
        // A frame to be skipped, with which pzstd begins.
        (&[0x50, 0x2a, 0x4d, 0x18], FileKind::Compressed(Zstd)),
        (b"\x7fELF", FileKind::Foreign(Foreign::Elf)),
        (b"KDUMP   ", FileKind::Foreign(Foreign::Kdump)),
        (b"makedumpfile", FileKind::Foreign(Foreign::FlattenedKdump)),
        (b"QCPR", FileKind::Foreign(Foreign::Cpr)),
        (b"Xen saved domain", FileKind::Foreign(Foreign::Xen)),
        (b"LinuxGuestRecord", FileKind::Foreign(Foreign::Xen)),
        (&[0xd0, 0xbe, 0xd2, 0xbe], FileKind::Foreign(Foreign::VMware)),
        (&[0xd1, 0xba, 0xd1, 0xba], FileKind::Foreign(Foreign::VMware)),
        (&[0xd2, 0xbe, 0xd2, 0xbe], FileKind::Foreign(Foreign::VMware)),
        (&[0xd3, 0xbe, 0xd3, 0xbe], FileKind::Foreign(Foreign::VMware)),
        (b"\x7fVirtualBox Saved", FileKind::Foreign(Foreign::VirtualBox)),
        (&[0x04, 0x22, 0x4d, 0x18], FileKind::Compressed(Lz4)),
        (&[0x02, 0x21, 0x4c, 0x18], FileKind::Foreign(Foreign::LegacyLz4)),
    ];
    magics.into_iter().find(|(magic, _)| first.starts_with(magic)).map(|(_, kind)| kind)
}

/// What can be wrong with a container.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ContainerError {
    /// The file does not start with the container's magic.
    #[error("not a {container}: its first bytes are {found:02x?}")]
    Magic {
        /// The container that was expected.
        container: &'static str,
        /// The bytes found.
        found: Vec<u8>,
    },
    /// libvirt had not finished writing the image (`LibvirtQemudPart`).
    #[error("the save image is incomplete: libvirt marks it so until the save has succeeded")]
    Incomplete,
    /// A version of the container that is not known.
    #[error("{container} version {found}, expected one of {expected}")]
    Version {
        /// The container.
        container: &'static str,
        /// The version found.
        found: u32,
        /// The versions known.
        expected: &'static str,
    },
    /// A compression format that the container's format does not have.
    #[error("save image format {found}, expected 0 (raw) to 6 (sparse)")]
    SaveFormat {
        /// The number found.
        found: u32,
    },
    /// A field whose value cannot be.
    #[error("{what} is {found:#x}, expected {expected}")]
    Field {
        /// Which field.
        what: &'static str,
        /// Its value.
        found: u64,
        /// What it should be.
        expected: &'static str,
    },
    /// A feature of the container that is not supported.
    #[error("{what} is not supported")]
    Feature {
        /// Which feature.
        what: &'static str,
    },
}

impl Blame for ContainerError {
    fn fault(&self) -> Fault {
        match self {
            ContainerError::Magic { .. } | ContainerError::Field { .. } => Fault::Malformed,
            ContainerError::Incomplete => Fault::Truncated,
            ContainerError::Version { .. } | ContainerError::SaveFormat { .. } | ContainerError::Feature { .. } => {
                Fault::Unsupported
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_unknown_files_are_nothing() {
        for first in [&b""[..], b"Q", b"QEV", b"QFI", b"LibvirtQemud", b"LibvirtQemudXxxx"] {
            assert_eq!(recognise(first), None, "{first:?}");
        }
    }

    #[test]
    fn every_magic_is_recognised() {
        assert_eq!(recognise(b"LibvirtQemudPart"), Some(FileKind::Libvirt));
        assert_eq!(recognise(b"LibvirtQemudSave"), Some(FileKind::Libvirt));
        assert_eq!(recognise(b"QFI\xfb\0\0\0\x03"), Some(FileKind::Qcow2));
        assert_eq!(recognise(&[0x11, 0x22, 0x33, 0x44, 0]), Some(FileKind::MultifdChannel));
        assert_eq!(recognise(b"BZh91AY&SY"), Some(FileKind::Compressed(Compression::Bzip2)));
        assert_eq!(recognise(b"\xfd7zXZ\0\0"), Some(FileKind::Compressed(Compression::Xz)));
    }
}
