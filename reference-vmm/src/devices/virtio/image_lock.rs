//! Locks on a disk's image, as QEMU takes them (`locking=auto`), so that neither a QEMU nor another monitor on the same
//! host uses it at the same time.
//!
//! They are open file description locks on single bytes, always for reading: one byte says that a right is used,
//! another that no other process may use it. Seen in `/proc/locks` of QEMU 11.1: 100, 101 and 201 for a disk that
//! can be written, 100 and 201 for one that is read.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// The byte of a right that is used, and that of one which no other process may use, are this many bytes after these.
const USED: i64 = 100;
const REFUSED: i64 = 200;
const READ: i64 = 0;
const WRITE: i64 = 1;

/// Why an image cannot be locked. The texts are QEMU 11.1's.
#[derive(Debug, thiserror::Error)]
pub(super) enum LockError {
    #[error("Failed to get \"{0}\" lock. Is another process using the image?")]
    Refused(&'static str),
    #[error("Failed to get shared \"write\" lock. Is another process using the image?")]
    Written,
    #[error("cannot lock the image: {0}")]
    Host(#[from] io::Error),
}

/// Takes the locks; other owners of the descriptor have them, too. On failure none is left.
pub(super) fn take(file: &File, readonly: bool) -> Result<(), LockError> {
    let used: &[(i64, &str)] =
        if readonly { &[(READ, "consistent read")] } else { &[(READ, "consistent read"), (WRITE, "write")] };
    let taken = used.iter().map(|(right, _)| USED + right).chain([REFUSED + WRITE]);
    let result = (|| {
        for byte in taken {
            if !set(file, byte, libc::F_RDLCK)? {
                // A file system without locks: QEMU goes without them, too.
                return Ok(());
            }
        }
        // First say what is used, then look at what others say: of two who do so at once, one at least sees the other.
        for (right, name) in used {
            if is_taken(file, REFUSED + right)? {
                return Err(LockError::Refused(name));
            }
        }
        if is_taken(file, USED + WRITE)? { Err(LockError::Written) } else { Ok(()) }
    })();
    if result.is_err() {
        release(file);
    }
    result
}

/// Lets go of all locks.
pub(super) fn release(file: &File) {
    for byte in [USED + READ, USED + WRITE, REFUSED + WRITE] {
        if let Err(error) = set(file, byte, libc::F_UNLCK) {
            tracing::error!(%error, byte, "the lock on an image stays");
        }
    }
}

fn lock_of(byte: i64, kind: i32) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

/// False where the file system has no such locks.
fn set(file: &File, byte: i64, kind: i32) -> io::Result<bool> {
    let lock = lock_of(byte, kind);
    // SAFETY: the descriptor is open, and the call reads the lock that it is given.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP) => Ok(false),
        _ => Err(error),
    }
}

/// Whether another process has a lock there.
fn is_taken(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = lock_of(byte, libc::F_WRLCK);
    // SAFETY: the descriptor is open, and the call reads and writes the lock that it is given.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    /// The same image, opened twice.
    fn image() -> (tempfile::NamedTempFile, File, File) {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(image.path()).unwrap();
        let (one, other) = (open(), open());
        (image, one, other)
    }

    #[test]
    fn a_disk_that_is_written_is_used_by_one_alone() {
        let (_image, one, other) = image();
        take(&one, false).unwrap();
        take(&one, false).unwrap();
        assert!(matches!(take(&other, false), Err(LockError::Refused("write"))));
        assert!(matches!(take(&other, true), Err(LockError::Written)));
        // One that was refused has left nothing behind.
        release(&one);
        take(&other, false).unwrap();
        assert!(take(&one, true).is_err());
        drop(other);
        take(&one, false).unwrap();
    }

    #[test]
    fn a_disk_that_is_read_is_shared_with_readers_alone() {
        let (_image, one, other) = image();
        take(&one, true).unwrap();
        take(&other, true).unwrap();
        assert!(matches!(take(&other, false), Err(LockError::Refused("write"))));
        // What it had before is gone: it asks for all or nothing.
        take(&other, true).unwrap();
    }

    /// As in `/proc/locks` of QEMU 11.1.
    #[test]
    fn the_bytes_are_qemus() {
        for (readonly, expected) in [(false, vec![100, 101, 201]), (true, vec![100, 201])] {
            let (_image, one, other) = image();
            take(&one, readonly).unwrap();
            let taken: Vec<_> = (0..300).filter(|byte| is_taken(&other, *byte).unwrap()).collect();
            assert_eq!(taken, expected);
            release(&one);
            assert!((0..300).all(|byte| !is_taken(&other, byte).unwrap()));
        }
    }
}
