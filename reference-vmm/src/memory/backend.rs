//! Memory backends: what the machine's RAM is made of, where that is said (QEMU's `--object memory-backend-…`).

use super::error::BackendError;
use super::host::{HostMemory, PAGE_SIZE, Wanted};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstatfs, ftruncate, memfd_create};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// Memory that the machine's RAM is made of. Without one it is private, anonymous memory of the name `microvm.ram`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryBackend {
    /// By what the machine finds it, and what the RAM block is called in a stream.
    pub id: String,
    /// Bytes; rounded up to whole pages of 4096 bytes.
    pub size: u64,
    /// Where the memory is.
    pub kind: BackendKind,
    /// Other processes that have the file can see the guest's memory, and userfaultfd takes it for shared memory.
    pub share: bool,
    /// The host backs all of it at once.
    pub prealloc: bool,
    /// The host sets aside swap space, or huge pages, for all of it, or refuses.
    pub reserve: bool,
    /// The host may keep pages of the same content once (KSM).
    pub merge: bool,
    /// In a stream the block is called `/objects/ID`, as by machine types up to QEMU 4.0.
    pub canonical_path: bool,
}

/// Where the memory is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackendKind {
    /// Anonymous: `memory-backend-ram`.
    Ram,
    /// A file without a name: `memory-backend-memfd`.
    Memfd {
        /// In huge pages of this many bytes, or of the host's usual size if that is 0.
        hugetlb: Option<u64>,
        /// The file's length cannot be changed.
        seal: bool,
    },
    /// A file: `memory-backend-file`.
    File {
        /// The file, which is made if it is not there, or a folder for one without a name.
        path: PathBuf,
        /// Where in the file the memory begins.
        offset: u64,
    },
}

/// Memory that was made.
#[derive(Debug)]
pub(super) struct Backing {
    pub(super) memory: HostMemory,
    /// Bytes of a page of the host's.
    pub(super) page_size: u64,
    /// It was not written to.
    pub(super) fresh: bool,
    /// It is a file of a file system that is not in memory.
    pub(super) on_disk: bool,
    /// It is a file that others can map, and what is written here is there.
    pub(super) shared_file: bool,
    /// The file, where it has no name and is shared: a successor gets it.
    pub(super) passable: Option<File>,
}

impl MemoryBackend {
    /// The name of the RAM block in a stream.
    pub fn block_name(&self) -> String {
        if self.canonical_path { format!("/objects/{}", self.id) } else { self.id.clone() }
    }

    /// Bytes, in whole pages.
    pub fn len(&self) -> u64 {
        self.size.checked_next_multiple_of(PAGE_SIZE).unwrap_or(self.size)
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// Makes it, of a predecessor's file if there is one.
    pub(super) fn make(&self, passed: Option<File>) -> Result<Backing, BackendError> {
        let (file, offset, fresh) = match (&self.kind, passed) {
            (_, Some(file)) => (Some(file), 0, false),
            // QEMU's is such a file since 10.0.
            (BackendKind::Ram, None) if self.share => (Some(memfd(&self.block_name(), self.len())?), 0, true),
            (BackendKind::Ram, None) => (None, 0, true),
            (BackendKind::Memfd { hugetlb, seal }, None) => (Some(self.memfd(*hugetlb, *seal)?), 0, true),
            (BackendKind::File { path, offset }, None) => {
                let (file, fresh) = self.open(path, *offset)?;
                (Some(file), *offset, fresh)
            }
        };
        let page_size = file.as_ref().map_or(PAGE_SIZE, page_size);
        let wanted = Wanted {
            file: file.as_ref().map(|file| (file, offset)),
            share: self.share,
            reserve: self.reserve,
            page_size: page_size as usize,
        };
        let len = usize::try_from(self.len()).map_err(|_| BackendError::Map(io::ErrorKind::OutOfMemory.into()))?;
        let memory = HostMemory::new(len, wanted).map_err(BackendError::Map)?;
        if self.merge {
            memory.merge();
        }
        if self.prealloc {
            memory.populate().map_err(BackendError::Preallocate)?;
        }
        // No other process finds a file without a name, and a QEMU sends a memfd like any other memory.
        let named = self.is_named();
        let shared_file = named && self.share;
        let on_disk = file.as_ref().is_some_and(is_on_disk);
        let passable = file.filter(|_| self.share && !named);
        Ok(Backing { memory, page_size, fresh, shared_file, on_disk, passable })
    }

    /// Whether another process has the memory where it has the same backend, without being passed it.
    pub(super) fn is_named(&self) -> bool {
        matches!(&self.kind, BackendKind::File { path, .. } if !path.is_dir())
    }

    fn memfd(&self, hugetlb: Option<u64>, seal: bool) -> Result<File, BackendError> {
        let mut flags = MemfdFlags::CLOEXEC;
        if seal {
            flags |= MemfdFlags::ALLOW_SEALING;
        }
        if let Some(page_size) = hugetlb {
            flags |= MemfdFlags::HUGETLB;
            flags |= match page_size {
                0 => MemfdFlags::empty(),
                size if !size.is_power_of_two() => return Err(BackendError::HugePageSize),
                // The kernel's encoding: the binary logarithm in the upper bits.
                size => MemfdFlags::from_bits_retain(size.trailing_zeros() << libc::MFD_HUGE_SHIFT),
            };
        }
        let file = memfd_create("memory-backend-memfd", flags).map_err(|error| BackendError::Create(error.into()))?;
        let resize = |error: rustix::io::Errno| BackendError::Resize { size: self.len(), cause: error.into() };
        ftruncate(&file, self.len()).map_err(resize)?;
        if seal {
            let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
            fcntl_add_seals(&file, seals).map_err(|error| BackendError::Create(error.into()))?;
        }
        Ok(file.into())
    }

    /// The file, and whether it holds nothing yet.
    fn open(&self, path: &Path, offset: u64) -> Result<(File, bool), BackendError> {
        let failed = |cause| BackendError::Open { path: path.to_owned(), cause };
        let (file, made) = if path.is_dir() {
            (tempfile::tempfile_in(path).map_err(failed)?, false)
        } else {
            let there = OpenOptions::new().read(true).write(true).open(path);
            match there {
                Ok(file) => (file, false),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let new = OpenOptions::new().read(true).write(true).create_new(true).open(path);
                    (new.map_err(failed)?, true)
                }
                Err(error) => return Err(failed(error)),
            }
        };
        let len = file.metadata().map_err(failed)?.len();
        let size = self.len();
        if len > 0 {
            return match offset.checked_add(size).is_some_and(|end| end <= len) {
                true => Ok((file, false)),
                false => Err(BackendError::Short { id: self.id.clone(), len, size, offset }),
            };
        }
        let resized = file.set_len(offset.saturating_add(size));
        if let Err(cause) = resized {
            if made {
                // It would be in the way of the next try.
                let _ = fs::remove_file(path);
            }
            return Err(failed(cause));
        }
        Ok((file, true))
    }
}

/// A file without a name, which is called that in `/proc`.
pub(super) fn memfd(name: &str, len: u64) -> Result<File, BackendError> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC).map_err(|error| BackendError::Create(error.into()))?;
    ftruncate(&file, len).map_err(|error| BackendError::Resize { size: len, cause: error.into() })?;
    Ok(file.into())
}

const HUGETLBFS_MAGIC: i64 = 0x958458f6;
const TMPFS_MAGIC: i64 = 0x01021994;

/// Whether a file is in a file system that is not in memory. What cannot be told is not.
fn is_on_disk(file: &File) -> bool {
    fstatfs(file).is_ok_and(|system| ![HUGETLBFS_MAGIC, TMPFS_MAGIC].contains(&system.f_type))
}

/// Bytes of the pages in which a file is mapped: more than usual for `hugetlbfs`.
fn page_size(file: &File) -> u64 {
    match fstatfs(file) {
        Ok(system) if system.f_type == HUGETLBFS_MAGIC => system.f_bsize as u64,
        _ => PAGE_SIZE,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{GuestMemory, RamBlock};
    use super::*;
    use crate::error::Error;

    const SIZE: u64 = 4 << 20;

    fn backend(kind: BackendKind) -> MemoryBackend {
        let share = !matches!(kind, BackendKind::Ram);
        MemoryBackend {
            id: "mem".into(),
            size: SIZE,
            kind,
            share,
            prealloc: false,
            reserve: true,
            merge: false,
            canonical_path: false,
        }
    }

    fn file(path: &Path, offset: u64) -> MemoryBackend {
        backend(BackendKind::File { path: path.to_owned(), offset })
    }

    fn refused(backend: &MemoryBackend) -> String {
        match RamBlock::of(backend) {
            Err(Error::MemoryBackend(error)) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    /// What the kernel says of the mapping that begins at `block`.
    fn mapping(block: &RamBlock) -> String {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let start = format!("{:x}-", block.host_address() as usize);
        maps.lines().find(|line| line.starts_with(&start)).unwrap().to_owned()
    }

    #[test]
    fn every_kind_is_zeroed_memory_of_its_name() {
        let memfd = |hugetlb| backend(BackendKind::Memfd { hugetlb, seal: true });
        let folder = tempfile::tempdir().unwrap();
        for (given, shared, what) in [
            (backend(BackendKind::Ram), false, ""),
            (MemoryBackend { share: true, ..backend(BackendKind::Ram) }, true, "/memfd:mem (deleted)"),
            (memfd(None), true, "/memfd:memory-backend-memfd (deleted)"),
            (
                MemoryBackend { share: false, merge: true, ..memfd(None) },
                false,
                "/memfd:memory-backend-memfd (deleted)",
            ),
            (file(&folder.path().join("new"), 0), true, "/new"),
            (file(folder.path(), 8192), true, "(deleted)"),
        ] {
            let block = RamBlock::of(&given).unwrap();
            assert_eq!((block.name(), block.used_length(), block.max_length()), ("mem", SIZE, SIZE));
            assert!(block.is_fresh() && block.page_is_zero(SIZE / 4096 - 1).unwrap());
            block.write(SIZE - 4, b"QEVM").unwrap();
            let mapping = mapping(&block);
            assert!(mapping.contains(if shared { "rw-s" } else { "rw-p" }), "{mapping}");
            assert!(mapping.ends_with(what), "{mapping}, not {what}");
            assert_eq!(block.host_page_size(), 4096);
        }
        let long = RamBlock::of(&MemoryBackend { canonical_path: true, ..backend(BackendKind::Ram) }).unwrap();
        // `info ramblock` of QEMU 10.0 and 11.1 with x-use-canonical-path-for-ramblock-id=on.
        assert_eq!(long.name(), "/objects/mem");
    }

    #[test]
    fn a_shared_file_is_what_the_guest_wrote_and_a_private_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        for (share, found) in [(false, *b"\0\0\0\0"), (true, *b"QEVM")] {
            let given = MemoryBackend { share, ..file(&path, 4096) };
            let block = RamBlock::of(&given).unwrap();
            // What the round before has left is there, and is not taken for fresh memory.
            assert_eq!(block.is_fresh(), !share);
            block.write(0, b"QEVM").unwrap();
            drop(block);
            let bytes = fs::read(&path).unwrap();
            assert_eq!((bytes.len() as u64, &bytes[4096..4100]), (4096 + SIZE, &found[..]));
        }
    }

    #[test]
    fn a_sealed_file_keeps_its_length() {
        for (seal, kept) in [(true, true), (false, false)] {
            let file = backend(BackendKind::Ram).memfd(None, seal).unwrap();
            assert_eq!(file.set_len(SIZE / 2).is_err(), kept);
        }
    }

    #[test]
    fn preallocated_memory_is_there() {
        let given = MemoryBackend { prealloc: true, ..backend(BackendKind::Memfd { hugetlb: None, seal: false }) };
        let block = RamBlock::of(&given).unwrap();
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", block.host_address() as usize);
        let resident = smaps.lines().skip_while(|line| !line.starts_with(&start)).find(|line| line.starts_with("Rss:"));
        assert_eq!(resident.unwrap().split_whitespace().nth(1), Some("4096"));
    }

    /// The texts are QEMU 11.1's.
    #[test]
    fn what_cannot_be_had_is_refused_in_qemus_words() {
        let huge = |size| backend(BackendKind::Memfd { hugetlb: Some(size), seal: true });
        assert_eq!(refused(&huge(3 << 20)), "Hugepage size must be a power of 2");
        assert_eq!(refused(&huge(1 << 30)), "failed to resize memfd to 4194304: Invalid argument");
        let folder = tempfile::tempdir().unwrap();
        let nowhere = Path::new("/nonexistent/x");
        let why = "can't open backing store /nonexistent/x for guest RAM: No such file or directory";
        assert_eq!(refused(&file(nowhere, 0)), why);
        let short = folder.path().join("short");
        fs::write(&short, [0; 4096]).unwrap();
        let why = "mem backing store size 0x1000 is too small for 'size' option 0x400000 plus 'offset' option 0x0";
        assert_eq!(refused(&file(&short, 0)), why);
        let name = MemoryBackend { id: "pc.bios".into(), ..backend(BackendKind::Ram) };
        let error = GuestMemory::of(&name, &[0; 64 << 10]).unwrap_err();
        assert_eq!(error.to_string(), "RAMBlock \"pc.bios\" already registered");
    }
}
