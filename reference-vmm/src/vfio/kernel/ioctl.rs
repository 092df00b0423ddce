//! The calls of `linux/vfio.h` that crate `vfio-ioctls` does not have, or whose answers it does not give.

use rustix::io::Errno;
use std::mem;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_SET, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_TYPE, vfio_precopy_info,
};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};

vmm_sys_util::ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO_TYPE.into(), VFIO_BASE + 8);
vmm_sys_util::ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE.into(), VFIO_BASE + 10);
vmm_sys_util::ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE.into(), VFIO_BASE + 11);
vmm_sys_util::ioctl_io_nr!(VFIO_DEVICE_FEATURE, VFIO_TYPE.into(), VFIO_BASE + 17);
vmm_sys_util::ioctl_io_nr!(VFIO_IOMMU_DIRTY_PAGES, VFIO_TYPE.into(), VFIO_BASE + 17);
vmm_sys_util::ioctl_io_nr!(VFIO_MIG_GET_PRECOPY_INFO, VFIO_TYPE.into(), VFIO_BASE + 21);

/// A feature's data, as the kernel lays it out: words of 64 bits, of which the first may be two of 32.
#[repr(C)]
struct Feature<const WORDS: usize> {
    argsz: u32,
    flags: u32,
    data: [u64; WORDS],
}

fn checked(result: i32) -> Result<(), Errno> {
    if result < 0 { Err(last()) } else { Ok(()) }
}

fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn feature<const WORDS: usize>(device: &impl AsRawFd, flags: u32, data: [u64; WORDS]) -> Result<[u64; WORDS], Errno> {
    let argsz = mem::size_of::<Feature<WORDS>>() as u32;
    let mut feature = Feature { argsz, flags, data };
    // SAFETY: the kernel reads and writes `argsz` bytes there; where the data have an address, who gave it says what is
    // there.
    checked(unsafe { ioctl_with_mut_ref(device, VFIO_DEVICE_FEATURE(), &mut feature) })?;
    Ok(feature.data)
}

/// Asks a feature.
pub(super) fn get<const WORDS: usize>(device: &impl AsRawFd, id: u32) -> Result<[u64; WORDS], Errno> {
    feature(device, VFIO_DEVICE_FEATURE_GET | id, [0; WORDS])
}

/// Sets a feature whose data have no address in them.
pub(super) fn set<const WORDS: usize>(
    device: &impl AsRawFd,
    id: u32,
    data: [u64; WORDS],
) -> Result<[u64; WORDS], Errno> {
    feature(device, VFIO_DEVICE_FEATURE_SET | id, data)
}

/// The descriptor that a call gave; -1 is none.
pub(super) fn owned(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: the kernel has just opened it for the caller, and no other code knows of it.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// DMA_LOGGING_START for these ranges of addresses, `(start, length)`.
pub(super) fn start_log(device: &impl AsRawFd, id: u32, page: u64, ranges: &[(u64, u64)]) -> Result<(), Errno> {
    let ranges: Vec<[u64; 2]> = ranges.iter().map(|(start, length)| [*start, *length]).collect();
    // The kernel reads as many ranges as the vector has.
    let data = [page, ranges.len() as u64, ranges.as_ptr() as u64];
    feature(device, VFIO_DEVICE_FEATURE_SET | id, data).map(drop)
}

/// DMA_LOGGING_REPORT of a range: a bit for each page, from the first on.
pub(super) fn report(
    device: &impl AsRawFd,
    id: u32,
    page: u64,
    (start, length): (u64, u64),
) -> Result<Vec<u64>, Errno> {
    let mut bitmap = vec![0_u64; words(page, length)];
    // The kernel sets bits of the vector, which has one for each page.
    feature(device, VFIO_DEVICE_FEATURE_GET | id, [start, length, page, bitmap.as_mut_ptr() as u64])?;
    Ok(bitmap)
}

fn words(page: u64, length: u64) -> usize {
    (length / page).div_ceil(64) as usize
}

/// VFIO_MIG_GET_PRECOPY_INFO: flags, initial bytes, dirty bytes.
pub(super) fn precopy_info(data: &impl AsRawFd) -> Result<(u32, u64, u64), Errno> {
    let mut info = vfio_precopy_info { argsz: mem::size_of::<vfio_precopy_info>() as u32, ..Default::default() };
    // SAFETY: the kernel writes one structure.
    checked(unsafe { ioctl_with_mut_ref(data, VFIO_MIG_GET_PRECOPY_INFO(), &mut info) })?;
    Ok((info.flags, info.initial_bytes, info.dirty_bytes))
}

/// A region of a device's file.
#[derive(Clone, Debug, Default)]
pub(super) struct Region {
    pub(super) size: u64,
    pub(super) offset: u64,
    /// What of it can be mapped.
    pub(super) mappable: Vec<Range<u64>>,
}

/// Words of struct vfio_region_info: length and flags, number of the region and place of the capabilities, size,
/// offset.
const INFO_WORDS: usize = 4;
/// The most that a kernel may want for its capabilities.
const MOST_WORDS: usize = 1 << 13;

/// VFIO_DEVICE_GET_REGION_INFO.
pub(super) fn region(device: &impl AsRawFd, index: u32) -> Result<Region, Errno> {
    let mut words = vec![0_u64; INFO_WORDS];
    loop {
        let len = mem::size_of_val(&words[..]);
        (words[0], words[1]) = (len as u64, index.into());
        // SAFETY: the kernel reads and writes as many bytes as the first word says, which are the vector's.
        checked(unsafe { ioctl_with_mut_ptr(device, VFIO_DEVICE_GET_REGION_INFO(), words.as_mut_ptr()) })?;
        // It says how long all of it is.
        let wanted = (words[0] as u32 as usize).div_ceil(mem::size_of::<u64>());
        if wanted <= words.len() || wanted > MOST_WORDS {
            return Ok(described(&words));
        }
        words = vec![0; wanted];
    }
}

fn described(words: &[u64]) -> Region {
    let (size, offset) = (words[2], words[3]);
    let whole = 0..size;
    let mappable = match words[0] >> 32 & u64::from(VFIO_REGION_INFO_FLAG_MMAP) {
        0 => Vec::new(),
        _ => sparse(words, (words[1] >> 32) as usize).unwrap_or_else(|| vec![whole]),
    };
    Region { size, offset, mappable }
}

/// The areas of a region that can be mapped, where a capability says that not all of it can.
fn sparse(words: &[u64], mut at: usize) -> Option<Vec<Range<u64>>> {
    let word = |at: usize| words.get(at / 8).filter(|_| at.is_multiple_of(8)).copied();
    // Each has a header: what it is, its version, and where the next is. Those that go round end.
    for _ in 0..words.len() {
        let header = word(at).filter(|_| at != 0)?;
        if header & 0xffff == u64::from(VFIO_REGION_INFO_CAP_SPARSE_MMAP) {
            let areas = word(at + 8)? as u32 as usize;
            let area = |index: usize| {
                let start = word(at + 16 + 16 * index)?;
                Some(start..start.checked_add(word(at + 24 + 16 * index)?)?)
            };
            return (0..areas.min(words.len())).map(area).collect();
        }
        at = (header >> 32) as usize;
    }
    None
}

/// VFIO_DEVICE_RESET.
pub(super) fn reset(device: &impl AsRawFd) -> Result<(), Errno> {
    // SAFETY: the call has no argument.
    checked(unsafe { ioctl(device, VFIO_DEVICE_RESET()) })
}

/// VFIO_DEVICE_SET_IRQS of vectors from 0 on: without descriptors `flags` say all, and `count` 0 disables.
pub(super) fn set_irqs(
    device: &impl AsRawFd,
    flags: u32,
    index: u32,
    count: u32,
    events: &[RawFd],
) -> Result<(), Errno> {
    // struct vfio_irq_set, whose data are descriptors.
    let mut words = vec![0, flags, index, 0, count];
    words.extend(events.iter().map(|event| *event as u32));
    words[0] = (words.len() * mem::size_of::<u32>()) as u32;
    // SAFETY: the kernel reads as many bytes as the first word says, which are the vector's.
    checked(unsafe { ioctl_with_ptr(device, VFIO_DEVICE_SET_IRQS(), words.as_ptr()) })
}

/// VFIO_IOMMU_DIRTY_PAGES without a bitmap: the container begins or ends to track.
pub(super) fn track(container: &impl AsRawFd, flags: u32) -> Result<(), Errno> {
    // struct vfio_iommu_type1_dirty_bitmap without data: its length, flags.
    let request = [mem::size_of::<[u32; 2]>() as u32, flags];
    // SAFETY: the kernel reads as many bytes as the first word says.
    checked(unsafe { ioctl_with_ref(container, VFIO_IOMMU_DIRTY_PAGES(), &request) })
}

/// VFIO_IOMMU_DIRTY_PAGES: a bit for each page of a range that was mapped as one.
pub(super) fn dirty_pages(
    container: &impl AsRawFd,
    flags: u32,
    page: u64,
    (start, length): (u64, u64),
) -> Result<Vec<u64>, Errno> {
    let mut bitmap = vec![0_u64; words(page, length)];
    // struct vfio_iommu_type1_dirty_bitmap (length and flags in one word), and after it
    // vfio_iommu_type1_dirty_bitmap_get.
    let argsz = mem::size_of::<[u64; 6]>() as u64;
    let bytes = mem::size_of_val(&bitmap[..]) as u64;
    let mut request = [argsz | u64::from(flags) << 32, start, length, page, bytes, bitmap.as_mut_ptr() as u64];
    // SAFETY: the kernel reads as many bytes as the first word says, and sets bits of the vector, whose length it is
    // told.
    checked(unsafe { ioctl_with_mut_ref(container, VFIO_IOMMU_DIRTY_PAGES(), &mut request) })?;
    Ok(bitmap)
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // pieces of a region, of which there may be one
mod tests {
    use super::*;

    /// As the kernel lays it out (`linux/vfio.h`): MSI-X can be mapped (3), and sparse areas (1), in either order.
    #[test]
    fn what_can_be_mapped_is_what_the_kernel_says() {
        const FLAGS: u64 = 0xf;
        let header = |id: u64, next: u64| id | 1 << 16 | next << 32;
        let info = |flags: u64, caps: &[u64]| [&[32 | flags << 32, 32 << 32, 0x4000, 1 << 40], caps].concat();
        let region = described(&info(3, &[]));
        assert_eq!((region.size, region.offset, region.mappable.len()), (0x4000, 1 << 40, 0));
        // No capabilities at all.
        let mut plain = info(FLAGS, &[]);
        plain[1] = 0;
        assert_eq!(described(&plain).mappable, [0..0x4000]);
        assert_eq!(described(&info(FLAGS, &[header(3, 0)])).mappable, [0..0x4000]);
        let areas = [2, 0, 0x1000, 0x2000, 0x2000];
        for caps in [
            [&[header(3, 40)], &[header(1, 0)][..], &areas].concat(),
            [&[header(1, 80)][..], &areas, &[header(3, 0)]].concat(),
        ] {
            assert_eq!(described(&info(FLAGS, &caps)).mappable, [0..0x1000, 0x2000..0x4000]);
            // Less than it promises, or a list that goes round: nothing of that counts.
            for len in 0..caps.len() {
                let mappable = described(&info(FLAGS, &caps[..len])).mappable;
                assert!(mappable == [0..0x4000] || mappable.len() == 2, "{mappable:?}");
            }
        }
        assert_eq!(described(&info(FLAGS, &[header(3, 32)])).mappable, [0..0x4000]);
        assert_eq!(described(&info(FLAGS, &[header(3, 33)])).mappable, [0..0x4000]);
        assert_eq!(described(&info(FLAGS, &[header(1, 0), u64::MAX, 0, u64::MAX])).mappable, [0..0x4000]);
    }
}
