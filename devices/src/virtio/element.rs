//! Requests in flight: QEMU's in-memory structure of a descriptor chain, in the host's byte order (little-endian here).

use qevm_savevm::Error;
use qevm_savevm::vmstate::{Context, Element, ElementDescription, Layout, Loader, Saver, Table, VmState};

/// Descriptors that a chain can have.
pub const MAX_DESCRIPTORS: usize = 1024;

/// A request in flight: 49168 bytes, preceded by `ndescs` if the device offers packed rings.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "virtqueue element", version = 1)]
pub struct VirtQueueElement {
    /// Descriptors that the chain takes in a packed ring.
    #[vmstate(exists = ctx.virtio.packed_ring)]
    pub ndescs: Option<u32>,
    /// Index of the chain's head.
    #[vmstate(name = "index")]
    pub head: Le<u32>,
    /// Buffers that the device reads.
    pub out_num: Le<u32>,
    /// Buffers that the device writes.
    pub in_num: Le<u32>,
    /// Padding of the structure.
    pub padding: Le<u32>,
    /// Guest-physical addresses of the buffers that the device writes.
    pub in_addr: Table<Le<u64>, MAX_DESCRIPTORS>,
    /// Guest-physical addresses of the buffers that the device reads.
    pub out_addr: Table<Le<u64>, MAX_DESCRIPTORS>,
    /// Lengths of the buffers that the device writes.
    pub in_sg: Table<IoVec, MAX_DESCRIPTORS>,
    /// Lengths of the buffers that the device reads.
    pub out_sg: Table<IoVec, MAX_DESCRIPTORS>,
}

/// A `struct iovec`.
#[derive(VmState, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[vmstate(name = "iovec", version = 1)]
pub struct IoVec {
    /// An address that means nothing to another process; QEMU writes 0.
    pub base: Le<u64>,
    /// Length in bytes.
    pub len: Le<u64>,
}

/// A little-endian number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Le<T>(pub T);

macro_rules! little_endian {
    ($($type:ty, $name:literal;)*) => {$(
        impl Element for Le<$type> {
            const TYPE: &'static str = $name;
            fn put(&self, out: &mut Saver<'_>) -> Result<(), Error> {
                out.writer().bytes(&self.0.to_le_bytes());
                Ok(())
            }
            fn take(input: &mut Loader<'_, '_, '_>) -> Result<Self, Error> {
                Ok(Le(<$type>::from_le_bytes(input.reader().array()?)))
            }
            fn describe(_: &Context) -> ElementDescription {
                let layout = Layout::Bytes(size_of::<$type>() as u64);
                ElementDescription { type_name: Some(Self::TYPE.into()), layout }
            }
        }
        qevm_savevm::element_is_field!([] Le<$type>);
    )*};
}

little_endian! {
    u32, "little-endian uint32";
    u64, "little-endian uint64";
}
