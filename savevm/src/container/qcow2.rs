//! The VM state of qcow2 internal snapshots: where `savevm` and `snapshot-save` put the stream.
//!
//! The state lies in the snapshot's own view of the virtual disk, past the disk's end, rounded up to what one L2
//! table maps. To read it: [`Header::parse`], [`Snapshot::parse`] for each entry of the table, the snapshot's L1 table
//! into [`VmState::new`], then for each position [`VmState::l2_table`] and [`VmState::cluster`].
//!
//! Source: the public qcow2 format description; checked on images that `savevm` of QEMU 5.2 to 11.1 made.

use super::{ContainerError, QCOW2};
use crate::{Error, Reader};
use qevm_wire::{Limits, Located, WireError};

/// How many bytes from the start of the file [`Header::parse`] needs.
pub const HEADER_LEN: usize = 104;

const VERSION_2: u32 = 2;
const VERSION_3: u32 = 3;
const MIN_CLUSTER_BITS: u32 = 9;
const MAX_CLUSTER_BITS: u32 = 21;
const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
/// log2 of the parts of a cluster that an extended L2 entry tells of.
const SUBCLUSTER_BITS: u32 = 5;
/// Incompatible feature bits that are understood: dirty refcounts and compression type, which do not change how
/// snapshots are read, and extended L2 entries.
const KNOWN_FEATURES: u64 = 1 << 0 | 1 << 3 | FEATURE_EXTENDED_L2;
const FEATURE_CORRUPT: u64 = 1 << 1;
const FEATURE_EXTERNAL_DATA: u64 = 1 << 2;
const FEATURE_EXTENDED_L2: u64 = 1 << 4;
/// Bits 9 to 55 of an L1 or L2 entry.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const L2_COMPRESSED: u64 = 1 << 62;
const L2_ZERO: u64 = 1;
const ENTRY_LEN: u64 = 8;
/// Entries of an L1 table that QEMU accepts (32 MiB of them).
const MAX_L1_LEN: u64 = 32 << 20;

/// Most snapshots one image can have (QEMU), and so a bound on how much of the table to read.
pub const MAX_SNAPSHOTS: u32 = 65_536;

/// What the header of a qcow2 image says about its snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// log2 of the cluster size in bytes.
    pub cluster_bits: u32,
    /// L2 entries have 16 bytes and tell of each 32nd part of a cluster (`extended_l2=on`).
    pub extended_l2: bool,
    /// Size of the virtual disk in bytes.
    pub disk_size: u64,
    /// How many snapshots the table has.
    pub snapshots: u32,
    /// File offset of the snapshot table.
    pub snapshots_offset: u64,
}

impl Header {
    /// Reads the header from the first [`HEADER_LEN`] bytes of the file (72 are enough for version 2).
    ///
    /// # Errors
    /// [`ContainerError`] for a file that is no qcow2 image, or one with a version or feature that is not supported.
    pub fn parse(bytes: &[u8]) -> Result<Header, Error> {
        let mut reader = Reader::new(bytes);
        let magic: [u8; 4] = reader.array()?;
        let fail = |at, error: ContainerError| Err(Located::new(error.into(), at));
        if magic != *QCOW2 {
            return fail(0, ContainerError::Magic { container: "qcow2 image", found: magic.to_vec() });
        }
        let (at, version) = (reader.offset(), reader.be32()?);
        if ![VERSION_2, VERSION_3].contains(&version) {
            return fail(at, ContainerError::Version { container: "qcow2", found: version, expected: "2, 3" });
        }
        reader.take(12)?; // backing file
        let (cluster_bits_at, cluster_bits) = (reader.offset(), reader.be32()?);
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            let (what, expected) = ("cluster_bits", "9 to 21");
            return fail(cluster_bits_at, ContainerError::Field { what, found: cluster_bits.into(), expected });
        }
        let disk_size = reader.be64()?;
        let (at, encryption) = (reader.offset(), reader.be32()?);
        if encryption != 0 {
            return fail(at, ContainerError::Feature { what: "an encrypted qcow2 image" });
        }
        reader.take(24)?; // active L1 table, refcount table
        let snapshots = reader.be32()?;
        let snapshots_offset = reader.be64()?;
        let mut extended_l2 = false;
        if version >= VERSION_3 {
            let (at, features) = (reader.offset(), reader.be64()?);
            extended_l2 = features & FEATURE_EXTENDED_L2 != 0;
            for (bit, what) in [
                (FEATURE_CORRUPT, "a qcow2 image that is marked corrupt"),
                (FEATURE_EXTERNAL_DATA, "a qcow2 image with an external data file"),
                (!KNOWN_FEATURES, "a qcow2 image with an unknown incompatible feature"),
            ] {
                if features & bit != 0 {
                    return fail(at, ContainerError::Feature { what });
                }
            }
            if extended_l2 && cluster_bits < MIN_EXTENDED_CLUSTER_BITS {
                let (what, expected) = ("cluster_bits", "14 to 21 with extended L2 entries");
                return fail(cluster_bits_at, ContainerError::Field { what, found: cluster_bits.into(), expected });
            }
        }
        Ok(Header { cluster_bits, extended_l2, disk_size, snapshots, snapshots_offset })
    }

    /// Checks the number of snapshots against QEMU's own bound and `limits.elements`.
    ///
    /// # Errors
    /// A limit error naming the count.
    pub fn check_snapshots(&self, limits: &Limits) -> Result<(), Error> {
        let (found, limit) = (u64::from(self.snapshots), u64::from(MAX_SNAPSHOTS).min(limits.elements));
        if found > limit {
            let error = WireError::LimitExceeded { what: "number of snapshots", found, limit };
            return Err(Located::new(error.into(), 60));
        }
        Ok(())
    }

    /// Cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }
}

/// An entry of the snapshot table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The unique ID, a decimal number in practice. Not checked to be text.
    pub id: Vec<u8>,
    /// The name that `savevm` was given.
    pub name: Vec<u8>,
    /// Seconds since 1970, in UTC, when it was made.
    pub date_sec: u32,
    /// Guest clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state; 0 for a snapshot of the disk alone (`qemu-img snapshot`).
    pub vm_state_size: u64,
    /// Size of the virtual disk when it was made, where the table says so.
    pub disk_size: Option<u64>,
    /// File offset of the snapshot's L1 table.
    pub l1_offset: u64,
    /// Bytes of the snapshot's L1 table.
    pub l1_len: u64,
}

impl Snapshot {
    /// Reads one entry, and the padding before it: entries start at multiples of 8 bytes of the file, from which the
    /// reader's offsets count. Nothing follows the last one.
    ///
    /// # Errors
    /// Truncated if the entry goes on past the reader's end (read more of the file and try again), a limit error for
    /// tables larger than QEMU itself accepts.
    pub fn parse(reader: &mut Reader<'_>) -> Result<Snapshot, Error> {
        reader.take(reader.offset().wrapping_neg() % 8)?;
        let l1_offset = reader.be64()?;
        let (at, l1_entries) = (reader.offset(), reader.be32()?);
        let l1_len = u64::from(l1_entries) * ENTRY_LEN;
        if l1_len > MAX_L1_LEN {
            let error = WireError::LimitExceeded { what: "snapshot L1 table", found: l1_len, limit: MAX_L1_LEN };
            return Err(Located::new(error.into(), at));
        }
        let id_len = reader.be16()?;
        let name_len = reader.be16()?;
        let date_sec = reader.be32()?;
        reader.take(4)?; // nanoseconds of the date
        let vm_clock_nsec = reader.be64()?;
        let vm_state_size = reader.be32()?;
        let (at, extra_len) = (reader.offset(), reader.be32()?);
        if extra_len > MAX_EXTRA_LEN {
            let (what, found, limit) = ("snapshot extra data", extra_len.into(), MAX_EXTRA_LEN.into());
            return Err(Located::new(WireError::LimitExceeded { what, found, limit }.into(), at));
        }
        let mut extra = reader.sub(extra_len.into())?;
        let vm_state_size_large = extra.be64().ok();
        let disk_size = extra.be64().ok();
        let id = reader.take(id_len.into())?.to_vec();
        let name = reader.take(name_len.into())?.to_vec();
        let vm_state_size = vm_state_size_large.unwrap_or(vm_state_size.into());
        Ok(Snapshot { id, name, date_sec, vm_clock_nsec, vm_state_size, disk_size, l1_offset, l1_len })
    }
}

/// QEMU refuses snapshots with more extra data than this.
const MAX_EXTRA_LEN: u32 = 1024;

/// Where the VM state of one snapshot is.
#[derive(Debug, Clone)]
pub struct VmState {
    cluster_bits: u32,
    extended_l2: bool,
    /// Where the state starts in the snapshot's view of the disk.
    start: u64,
    len: u64,
    l1_offset: u64,
    l1: Vec<u64>,
}

/// Where the bytes of one cluster of VM state are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    /// At this file offset.
    At(u64),
    /// Nowhere: they are zero.
    Zero,
}

impl VmState {
    /// The VM state of `snapshot`, whose L1 table (bytes `l1_offset` to `l1_offset + l1_len` of the file) is `l1`.
    ///
    /// # Errors
    /// [`ContainerError::Field`] if the L1 table does not reach to the end of the state, [`ContainerError::Feature`] if
    /// the snapshot has no VM state.
    pub fn new(header: &Header, snapshot: &Snapshot, l1: &[u8]) -> Result<VmState, Error> {
        let fail = |error: ContainerError| Err(Located::new(error.into(), snapshot.l1_offset));
        if snapshot.vm_state_size == 0 {
            return fail(ContainerError::Feature { what: "reading a snapshot without VM state" });
        }
        let (entries, _) = l1.as_chunks::<8>();
        let l1: Vec<u64> = entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect();
        let (cluster_bits, extended_l2, l1_offset) = (header.cluster_bits, header.extended_l2, snapshot.l1_offset);
        // What one L2 table maps: a cluster of entries, each for one cluster.
        let per_l2 = 1u64 << (2 * cluster_bits - entry_bits(extended_l2));
        let disk_size = snapshot.disk_size.unwrap_or(header.disk_size);
        let start = disk_size.checked_next_multiple_of(per_l2);
        let end = start.and_then(|start| start.checked_add(snapshot.vm_state_size));
        match (start, end) {
            (Some(start), Some(end)) if end.div_ceil(per_l2) <= l1.len() as u64 => {
                Ok(VmState { cluster_bits, extended_l2, start, len: snapshot.vm_state_size, l1_offset, l1 })
            }
            _ => fail(ContainerError::Field {
                what: "entries of the snapshot's L1 table",
                found: l1.len() as u64,
                expected: "enough to map the disk and the VM state",
            }),
        }
    }

    /// Bytes of VM state.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if there is no VM state; [`VmState::new`] refuses that.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many bytes from `position` on are in the same cluster (the same part of it, with extended L2 entries), and
    /// inside the state.
    pub fn contiguous(&self, position: u64) -> u64 {
        let unit = 1 << (self.cluster_bits - if self.extended_l2 { SUBCLUSTER_BITS } else { 0 });
        (unit - self.address(position) % unit).min(self.len.saturating_sub(position))
    }

    /// File offset of the L2 table (one cluster long) that maps byte `position` of the state; `None` if that byte is
    /// zero without one.
    ///
    /// # Errors
    /// [`ContainerError::Field`] if the table is not at a cluster boundary.
    pub fn l2_table(&self, position: u64) -> Result<Option<u64>, Error> {
        let index = self.address(position) >> (2 * self.cluster_bits - entry_bits(self.extended_l2));
        let entry = usize::try_from(index).ok().and_then(|i| self.l1.get(i)).copied().unwrap_or(0);
        let offset = self.aligned(entry, "offset of an L2 table", self.l1_offset.saturating_add(index * ENTRY_LEN))?;
        Ok((offset != 0).then_some(offset))
    }

    /// Where the cluster with byte `position` of the state starts, according to the L2 table `l2`, which is at file
    /// offset `l2_offset`.
    ///
    /// # Errors
    /// [`ContainerError::Feature`] for a compressed cluster (QEMU never writes VM state so), [`ContainerError::Field`]
    /// for an offset that is not at a cluster boundary, truncated if `l2` is shorter than a cluster.
    pub fn cluster(&self, position: u64, l2: &[u8], l2_offset: u64) -> Result<Cluster, Error> {
        let bits = entry_bits(self.extended_l2);
        let index = (self.address(position) >> self.cluster_bits) & ((1 << (self.cluster_bits - bits)) - 1);
        let at = l2_offset.saturating_add(index << bits);
        let mut reader = Reader::at(l2, l2_offset);
        reader.take(index << bits)?;
        let entry = reader.be64()?;
        if entry & L2_COMPRESSED != 0 {
            return Err(Located::new(ContainerError::Feature { what: "compressed VM state in qcow2" }.into(), at));
        }
        let offset = self.aligned(entry, "offset of a cluster", at)?;
        if self.extended_l2 {
            // The low half of the second word tells which parts are in the cluster; the others are zero.
            let part = (self.address(position) >> (self.cluster_bits - SUBCLUSTER_BITS)) & ((1 << SUBCLUSTER_BITS) - 1);
            let is_there = offset != 0 && reader.be64()? & (1 << part) != 0;
            return Ok(if is_there { Cluster::At(offset) } else { Cluster::Zero });
        }
        Ok(if offset == 0 || entry & L2_ZERO != 0 { Cluster::Zero } else { Cluster::At(offset) })
    }

    /// The place of byte `position` of the state in the snapshot's view of the disk.
    fn address(&self, position: u64) -> u64 {
        self.start.saturating_add(position)
    }

    fn aligned(&self, entry: u64, what: &'static str, at: u64) -> Result<u64, Error> {
        let found = entry & OFFSET_MASK;
        if found.is_multiple_of(1 << self.cluster_bits) {
            return Ok(found);
        }
        Err(Located::new(ContainerError::Field { what, found, expected: "a multiple of the cluster size" }.into(), at))
    }
}

/// log2 of the bytes of an L2 entry.
fn entry_bits(extended: bool) -> u32 {
    if extended { 4 } else { 3 }
}

#[cfg(test)]
mod tests;
