//! Files that a command writes. They hold guest memory and device state, that is passwords, keys and other people's
//! data.
//!
//! An [`OutputFile`] can be read and written by its owner alone, whatever the umask is. It has no name until it is
//! whole: a command that fails, or is killed, leaves nothing behind. It never goes through a symbolic link, and takes
//! the place of what has its name only if that is asked for.

use crate::failure::Error;
use parking_lot::Mutex;
use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::borrow::Borrow;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tempfile::TempPath;

/// A file on its way to a name.
#[derive(Debug)]
pub struct OutputFile {
    file: File,
    /// What it is called meanwhile, on a file system that has no files without a name.
    temporary: Mutex<Option<TempPath>>,
    path: PathBuf,
    replace: bool,
}

impl OutputFile {
    /// Makes a file that is to be called `path`. If something is called so already, that is an error, unless it is to
    /// be replaced (`replace`) and is a file or a symbolic link; what a link points to is never touched.
    ///
    /// # Errors
    /// [`Error::Usage`] if the name is taken or its directory cannot be written to.
    pub fn create(path: &Path, replace: bool) -> Result<Self, Error> {
        check_free(path, replace)?;
        Self::make(path, replace)
            .map_err(|error| Error::Usage(format!("{}: cannot be created: {error}", path.display())))
    }

    /// As [`create`](Self::create), for a name of which it is known that it can be had.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn make(path: &Path, replace: bool) -> io::Result<Self> {
        let (file, temporary) = match unnamed(path) {
            Ok(file) => (file, None),
            // What the kernel says for file systems, and kernels, that have no such files.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => named(path)?,
            Err(error) => return Err(error.into()),
        };
        Ok(OutputFile { file, temporary: Mutex::new(temporary), path: path.to_owned(), replace })
    }

    /// What is written.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The name that it gets.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its name, now that it is whole.
    ///
    /// # Errors
    /// `AlreadyExists` if the name was taken meanwhile; what else the operating system says.
    pub fn publish(&self) -> io::Result<()> {
        self.publish_as(&self.path)
    }

    /// Gives it another name than it was made for, in the same directory.
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    pub fn publish_as(&self, path: &Path) -> io::Result<()> {
        let temporary = self.temporary.lock().take();
        let named = match temporary {
            Some(named) => named,
            None if !self.replace => return link(&self.file, path),
            // A link does not replace anything; a rename does.
            None => builder().make_in(directory(path), |free| link(&self.file, free))?.into_temp_path(),
        };
        match self.replace {
            true => named.persist(path).map_err(|error| error.error),
            false => {
                rustix::fs::renameat_with(CWD, &*named, CWD, path, RenameFlags::NOREPLACE)?;
                // It is called otherwise now.
                let _ = named.keep();
                Ok(())
            }
        }
    }

    /// Waits until the content is on the disk.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

/// Writes what follows one another in one go.
#[derive(Debug)]
pub struct Runs<F> {
    file: F,
    start: u64,
    held: Vec<u8>,
}

impl<F: Borrow<File>> Runs<F> {
    /// Bytes of one write. Little enough to be in a processor's cache when it is written.
    const WRITE: usize = 64 << 10;
    /// How far after a multiple of [`WRITE`](Self::WRITE) in the file a write ends. The kernel takes memory in
    /// stretches that lie at multiples of their length and are no longer than the write. Those up to 32 KiB it takes
    /// from what each processor has at hand, which this leads to. It has to look for one of 64 KiB: where the host
    /// takes back what is free, that took two to four times as long (Linux 6.18, ext4).
    const SHIFT: u64 = 16 << 10;

    /// Nothing is held so far.
    pub fn new(file: F) -> Self {
        Runs { file, start: 0, held: Vec::new() }
    }

    /// Puts `bytes` at `offset` of the file, which they may not have reached yet when this returns.
    ///
    /// # Errors
    /// What the operating system says, with where in the file.
    pub fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<(), (u64, io::Error)> {
        if self.start + self.held.len() as u64 != offset {
            self.flush()?;
            self.start = offset;
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let end = self.start + self.held.len() as u64;
            let room = Self::WRITE - (end.wrapping_sub(Self::SHIFT) % Self::WRITE as u64) as usize;
            let (piece, later) = rest.split_at(room.min(rest.len()));
            rest = later;
            if piece.len() == Self::WRITE {
                self.file().write_all_at(piece, end).map_err(|error| (end, error))?;
                self.start += piece.len() as u64;
                continue;
            }
            self.held.extend_from_slice(piece);
            if piece.len() == room {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Writes what is held.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn flush(&mut self) -> Result<(), (u64, io::Error)> {
        let (start, len) = (self.start, self.held.len() as u64);
        let written = self.file().write_all_at(&self.held, start).map_err(|error| (start, error));
        self.held.clear();
        self.start += len;
        written
    }

    /// Makes a hole of `len` bytes from `offset` on.
    ///
    /// # Errors
    /// As [`put`](Self::put); of kind `Unsupported` if the file system has no holes.
    pub fn clear(&mut self, offset: u64, len: u64) -> Result<(), (u64, io::Error)> {
        self.flush()?;
        rustix::fs::fallocate(self.file(), FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
            .map_err(|error| (offset, error.into()))
    }

    /// What is written to.
    pub fn file(&self) -> &File {
        self.file.borrow()
    }
}

/// Empties a file. One that is empty is left alone: when a file is closed that was emptied once, ext4 has all of it
/// written to the disk, which is waited for.
pub(crate) fn empty(file: &File) -> io::Result<()> {
    if file.metadata()?.len() > 0 { file.set_len(0) } else { Ok(()) }
}

/// Waits until the names in `path`'s directory are on the disk.
///
/// # Errors
/// What the operating system says.
pub fn sync_names(path: &Path) -> io::Result<()> {
    File::open(directory(path))?.sync_all()
}

/// Refuses a name at which nothing can, or may, be written.
///
/// # Errors
/// [`Error::Usage`].
pub fn check_free(path: &Path, replace: bool) -> Result<(), Error> {
    let refused = |reason: &str| Err(Error::Usage(format!("{}: {reason}", path.display())));
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => refused(&format!("cannot be created: {error}")),
        Ok(_) if !replace => refused("exists; --force replaces it"),
        Ok(found) if found.is_file() || found.is_symlink() => Ok(()),
        Ok(_) => refused("is there and is no file, which --force would replace"),
    }
}

fn unnamed(path: &Path) -> Result<File, Errno> {
    // Without /proc it could never be given a name.
    rustix::fs::stat("/proc/self/fd").map_err(|_| Errno::OPNOTSUPP)?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(directory(path), flags, Mode::RUSR | Mode::WUSR)?;
    Ok(file.into())
}

fn named(path: &Path) -> io::Result<(File, Option<TempPath>)> {
    // The crate's files are created new, and their owner's alone.
    let (file, path) = builder().tempfile_in(directory(path))?.into_parts();
    Ok((file, Some(path)))
}

fn builder() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".qevm-").suffix(".partial");
    builder
}

fn link(file: &File, path: &Path) -> io::Result<()> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

/// The directory that `path` is in.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str() != OsStr::new("") => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::{MetadataExt, symlink};

    const WAYS: [fn(&Path) -> OutputFile; 2] = [
        |path| output(path, (unnamed(path).unwrap(), None)),
        // Few file systems need it.
        |path| output(path, named(path).unwrap()),
    ];

    fn output(path: &Path, (file, temporary): (File, Option<TempPath>)) -> OutputFile {
        OutputFile { file, temporary: Mutex::new(temporary), path: path.to_owned(), replace: false }
    }

    fn names(dir: &tempfile::TempDir) -> Vec<String> {
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_appears_whole_and_for_its_owner_alone() {
        for way in WAYS {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("out");
            for replace in [false, true] {
                let output = OutputFile { replace, ..way(&path) };
                output.file().write_all(b"secret").unwrap();
                output.publish().unwrap();
                assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
                assert_eq!(fs::read(&path).unwrap(), b"secret");
                assert_eq!(names(&dir), ["out"], "{replace}");
            }
        }
    }

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for way in WAYS {
            way(&dir.path().join("out")).file().write_all(b"half").unwrap();
            assert!(names(&dir).is_empty());
        }
    }

    #[test]
    fn a_name_that_is_taken_meanwhile_is_not_overwritten() {
        for way in WAYS {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("out");
            let output = way(&path);
            fs::write(&path, "other").unwrap();
            assert_eq!(output.publish().unwrap_err().kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(fs::read(&path).unwrap(), b"other");
            assert_eq!(names(&dir), ["out"]);
        }
    }

    #[test]
    fn a_link_is_replaced_and_not_followed() {
        for way in WAYS {
            let dir = tempfile::tempdir().unwrap();
            let (path, victim) = (dir.path().join("out"), dir.path().join("victim"));
            fs::write(&victim, "precious").unwrap();
            symlink(&victim, &path).unwrap();
            assert!(OutputFile::create(&path, false).is_err());
            let output = OutputFile { replace: true, ..way(&path) };
            output.file().write_all(b"new").unwrap();
            output.publish().unwrap();
            assert_eq!(fs::read(&victim).unwrap(), b"precious");
            assert!(fs::symlink_metadata(&path).unwrap().is_file());
        }
    }

    #[test]
    fn only_files_are_replaced() {
        for taken in ["/dev/null", "/"] {
            assert!(matches!(OutputFile::create(Path::new(taken), true), Err(Error::Usage(_))), "{taken}");
        }
        assert!(OutputFile::create(Path::new("/nonexistent/out"), true).is_err());
    }
}
