//! The error kinds of this crate. Each module has its own enum next to the code that raises it; [`ErrorKind`] is their
//! union, and every function reports it as [`Error`], with offset and path.

use crate::block_migration::BlockMigrationError;
use crate::command::CommandError;
use crate::configuration::ConfigurationError;
use crate::container::ContainerError;
use crate::cpr::CprError;
use crate::decode::StreamError;
use crate::dirty_bitmap::DirtyBitmapError;
use crate::encode::WriteError;
use crate::hash_table::HashTableError;
use crate::mapped_ram::MappedRamError;
use crate::ram::RamError;
use crate::storage_attributes::StorageAttributesError;
use crate::vfio::VfioError;
use crate::vmdesc::VmdescError;
use crate::vmstate::VmStateError;
use crate::xbzrle::XbzrleError;
use qevm_wire::{Blame, Fault, Located, WireError};

/// An error of this crate: what, at which byte, in which nested things.
pub type Error = Located<ErrorKind>;

/// The bounded reader of this crate's decoders.
pub type Reader<'a> = qevm_wire::Reader<'a, ErrorKind>;

/// What can go wrong on the main channel, one variant for each module that raises errors.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A primitive could not be read or written.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The framing of the stream.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The configuration section.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// A command.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The `ram` section.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// A page as difference.
    #[error(transparent)]
    Xbzrle(#[from] XbzrleError),
    /// The section of a VFIO device.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// The `dirty-bitmap` section.
    #[error(transparent)]
    DirtyBitmap(#[from] DirtyBitmapError),
    /// The `spapr/htab` section.
    #[error(transparent)]
    HashTable(#[from] HashTableError),
    /// The `s390-storage_attributes` section.
    #[error(transparent)]
    StorageAttributes(#[from] StorageAttributesError),
    /// A file with a stream inside.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// The bitmap or pages of a mapped-ram file.
    #[error(transparent)]
    MappedRam(#[from] MappedRamError),
    /// The `block` section.
    #[error(transparent)]
    BlockMigration(#[from] BlockMigrationError),
    /// The side channel of `cpr-transfer`.
    #[error(transparent)]
    Cpr(#[from] CprError),
    /// Declared device state is not as declared.
    #[error(transparent)]
    VmState(#[from] VmStateError),
    /// The description, or a device section read with it.
    #[error(transparent)]
    Vmdesc(#[from] VmdescError),
    /// What is written here, no decoder takes. The caller's fault.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl Blame for ErrorKind {
    fn fault(&self) -> Fault {
        match self {
            ErrorKind::Wire(kind) => kind.fault(),
            ErrorKind::Stream(kind) => kind.fault(),
            ErrorKind::Configuration(kind) => kind.fault(),
            ErrorKind::Command(kind) => kind.fault(),
            ErrorKind::Ram(kind) => kind.fault(),
            ErrorKind::Xbzrle(kind) => kind.fault(),
            ErrorKind::Vfio(kind) => kind.fault(),
            ErrorKind::DirtyBitmap(kind) => kind.fault(),
            ErrorKind::HashTable(kind) => kind.fault(),
            ErrorKind::StorageAttributes(kind) => kind.fault(),
            ErrorKind::Container(kind) => kind.fault(),
            ErrorKind::MappedRam(kind) => kind.fault(),
            ErrorKind::BlockMigration(kind) => kind.fault(),
            ErrorKind::Cpr(kind) => kind.fault(),
            ErrorKind::VmState(kind) => kind.fault(),
            ErrorKind::Vmdesc(kind) => kind.fault(),
            ErrorKind::Write(kind) => kind.fault(),
        }
    }

    fn needed(&self) -> Option<u64> {
        match self {
            ErrorKind::Wire(kind) => kind.needed(),
            _ => None,
        }
    }
}
