//! File descriptors that others open for the monitor: `getfd`, `add-fd`, and inheritance.
//!
//! A manager that runs the monitor without rights of its own opens what it migrates over, and passes it along: by name
//! (`getfd`, for `fd:NAME`), in a set (`add-fd`, for `file:/dev/fdset/N`), or by number at the start (`fd:N`).

use qevm_migration::GuestError;
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

/// The folder whose files are the sets of `add-fd`.
const SETS: &str = "/dev/fdset/";

/// Why a descriptor is not there, in QEMU's words (11.1).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadDescriptor {
    /// `getfd` or `add-fd` came without one.
    #[error("No file descriptor supplied via SCM_RIGHTS")]
    NoneSupplied,
    /// A name that could be taken for a number.
    #[error("Parameter 'fdname' expects a name not starting with a digit")]
    NameStartsWithDigit,
    /// `closefd` of something else.
    #[error("File descriptor named '{0}' not found")]
    NothingToClose(String),
    /// `fd:` of something that neither was given nor inherited.
    #[error("File descriptor named '{0}' has not been found")]
    Unknown(String),
    /// A set that does not exist, or a descriptor that is not in it.
    #[error("File descriptor named 'fdset-id:{0}' not found")]
    UnknownSet(String),
    /// A set without a descriptor that could be used so.
    #[error("fdset {0} has no descriptor that is open for {1}")]
    WrongAccess(u32, &'static str),
    /// A number of a set that is none.
    #[error("Parameter 'fdset-id' expects a non-negative value")]
    NegativeSet,
    /// The system has no more.
    #[error("cannot duplicate a descriptor: {0}")]
    Duplicate(String),
}

/// A descriptor in a set.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) fd: OwnedFd,
    pub(crate) opaque: Option<String>,
}

/// The descriptors that the monitor was given and has not used.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// Came with what a QMP client has sent, and no command has asked for it.
    received: VecDeque<OwnedFd>,
    named: BTreeMap<String, OwnedFd>,
    inherited: BTreeMap<RawFd, OwnedFd>,
    sets: BTreeMap<u32, Vec<Member>>,
}

/// Standard input, output and error, which the process goes on to use.
const STANDARD: std::ops::RangeInclusive<RawFd> = 0..=2;

impl Descriptors {
    /// Takes over what the process has inherited, beside standard input, output and error: all descriptors that stay
    /// open on execution (`exec`), which those that this process opens by itself do not.
    ///
    /// # Errors
    /// The system's.
    ///
    /// # Safety
    /// Nothing in this process may own a descriptor above 2 that stays open on execution, or come to own one meanwhile.
    /// That is so at the start of `main`, before there are other threads, and nowhere else.
    pub unsafe fn inherit() -> io::Result<Self> {
        let entries = fs::read_dir("/proc/self/fd")?.collect::<io::Result<Vec<_>>>()?;
        let numbers = entries.iter().filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok());
        let mut inherited = BTreeMap::new();
        for number in numbers.filter(|number| !STANDARD.contains(number)) {
            // SAFETY: only its flags are asked for and set; one that does not exist any more has none.
            let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
            // What this process has opened itself is closed on execution; what was inherited cannot be.
            let Ok(flags) = fcntl_getfd(descriptor) else { continue };
            if flags.contains(FdFlags::CLOEXEC) {
                continue;
            }
            // Commands of `exec:` do not get it.
            fcntl_setfd(descriptor, flags | FdFlags::CLOEXEC)?;
            // SAFETY: it is open; by the contract nothing in this process owns it; and it is taken once: the flag is
            // set now.
            inherited.insert(number, unsafe { OwnedFd::from_raw_fd(number) });
        }
        Ok(Descriptors { inherited, ..Descriptors::default() })
    }

    /// A QMP client has sent these.
    pub(crate) fn receive(&mut self, descriptors: impl IntoIterator<Item = OwnedFd>) {
        let mut descriptors = descriptors.into_iter().peekable();
        if descriptors.peek().is_some() {
            // Those before came with a command that did not want them.
            self.received.clear();
        }
        self.received.extend(descriptors);
    }

    /// The QMP client is gone, and what it has sent for nothing goes with it.
    pub(crate) fn forget_received(&mut self) {
        self.received.clear();
    }

    /// `getfd`: names what came last. What had the name is closed.
    ///
    /// # Errors
    /// [`BadDescriptor`].
    pub(crate) fn name(&mut self, name: &str) -> Result<(), BadDescriptor> {
        let received = self.received.pop_front().ok_or(BadDescriptor::NoneSupplied)?;
        if name.starts_with(|first: char| first.is_ascii_digit()) {
            return Err(BadDescriptor::NameStartsWithDigit);
        }
        self.named.insert(name.into(), received);
        Ok(())
    }

    /// `closefd`.
    ///
    /// # Errors
    /// [`BadDescriptor::NothingToClose`].
    pub(crate) fn close(&mut self, name: &str) -> Result<(), BadDescriptor> {
        self.named.remove(name).map(drop).ok_or_else(|| BadDescriptor::NothingToClose(name.into()))
    }

    /// Hands out a descriptor by its name or number; it is the caller's from then on.
    ///
    /// # Errors
    /// [`BadDescriptor::Unknown`].
    pub fn take(&mut self, name: &str) -> Result<OwnedFd, BadDescriptor> {
        if let Some(named) = self.named.remove(name) {
            return Ok(named);
        }
        let unknown = || BadDescriptor::Unknown(name.into());
        let number: RawFd = name.parse().map_err(|_| unknown())?;
        match self.inherited.remove(&number) {
            Some(inherited) => Ok(inherited),
            None => match number {
                0 => duplicate(io::stdin().as_fd()),
                1 => duplicate(io::stdout().as_fd()),
                2 => duplicate(io::stderr().as_fd()),
                _ => Err(unknown()),
            },
        }
    }

    /// `add-fd`: puts what came last into a set, a new one if none is named, and says which and as what number.
    ///
    /// # Errors
    /// [`BadDescriptor`].
    pub(crate) fn add(&mut self, set: Option<i64>, opaque: Option<String>) -> Result<(u32, RawFd), BadDescriptor> {
        let fd = self.received.pop_front().ok_or(BadDescriptor::NoneSupplied)?;
        let set = match set {
            Some(set) => u32::try_from(set).map_err(|_| BadDescriptor::NegativeSet)?,
            None => (0..).find(|free| !self.sets.contains_key(free)).unwrap_or_default(),
        };
        let number = fd.as_raw_fd();
        self.sets.entry(set).or_default().push(Member { fd, opaque });
        Ok((set, number))
    }

    /// `remove-fd`: closes a descriptor of a set, or all of them.
    ///
    /// # Errors
    /// [`BadDescriptor::UnknownSet`].
    pub(crate) fn remove(&mut self, set: i64, fd: Option<i64>) -> Result<(), BadDescriptor> {
        let unknown = || {
            let fd = fd.map_or(String::new(), |fd| format!(", fd:{fd}"));
            BadDescriptor::UnknownSet(format!("{set}{fd}"))
        };
        let key = u32::try_from(set).map_err(|_| unknown())?;
        let members = self.sets.get_mut(&key).ok_or_else(unknown)?;
        let before = members.len();
        members.retain(|member| fd.is_some_and(|fd| i64::from(member.fd.as_raw_fd()) != fd));
        let (left, removed) = (members.len(), members.len() < before);
        if left == 0 {
            self.sets.remove(&key);
        }
        if removed { Ok(()) } else { Err(unknown()) }
    }

    /// `query-fdsets`.
    pub(crate) fn sets(&self) -> impl Iterator<Item = (u32, &[Member])> {
        self.sets.iter().map(|(set, members)| (*set, members.as_slice()))
    }

    /// The descriptor that stands for a file of `/dev/fdset/`, with a place of its own in the table of descriptors;
    /// `None` for other files.
    ///
    /// # Errors
    /// [`BadDescriptor`] for a set that does not exist or has nothing that is open for writing (or reading).
    pub fn of_set(&self, path: &Path, write: bool) -> Option<Result<OwnedFd, BadDescriptor>> {
        let number = path.to_str()?.strip_prefix(SETS)?;
        let find = || {
            let unknown = || BadDescriptor::UnknownSet(number.into());
            let set: u32 = number.parse().map_err(|_| unknown())?;
            let members = self.sets.get(&set).ok_or_else(unknown)?;
            let fits = |member: &&Member| {
                let access = fcntl_getfl(&member.fd).map(|flags| flags & OFlags::ACCMODE);
                access == Ok(OFlags::RDWR) || access == Ok(if write { OFlags::WRONLY } else { OFlags::RDONLY })
            };
            let wrong = BadDescriptor::WrongAccess(set, if write { "writing" } else { "reading" });
            duplicate(members.iter().find(fits).ok_or(wrong)?.fd.as_fd())
        };
        Some(find())
    }
}

impl qevm_migration::Descriptors for Descriptors {
    fn take(&mut self, name: &str) -> Result<OwnedFd, GuestError> {
        Ok(Descriptors::take(self, name)?)
    }

    fn of_set(&self, path: &Path, write: bool) -> Option<Result<OwnedFd, GuestError>> {
        Some(Descriptors::of_set(self, path, write)?.map_err(Into::into))
    }
}

fn duplicate(descriptor: BorrowedFd<'_>) -> Result<OwnedFd, BadDescriptor> {
    descriptor.try_clone_to_owned().map_err(|error| BadDescriptor::Duplicate(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn with(files: usize) -> Descriptors {
        let mut descriptors = Descriptors::default();
        descriptors.receive((0..files).map(|_| File::open("/dev/null").unwrap().into()));
        descriptors
    }

    #[test]
    fn a_name_is_given_once_and_used_once() {
        let mut descriptors = with(1);
        descriptors.name("x").unwrap();
        assert_eq!(descriptors.name("y"), Err(BadDescriptor::NoneSupplied));
        descriptors.take("x").unwrap();
        assert!(matches!(descriptors.take("x"), Err(BadDescriptor::Unknown(_))));
        assert!(matches!(descriptors.close("x"), Err(BadDescriptor::NothingToClose(_))));
    }

    #[test]
    fn a_name_is_no_number() {
        let mut descriptors = with(2);
        assert_eq!(descriptors.name("1x"), Err(BadDescriptor::NameStartsWithDigit));
        descriptors.name("x").unwrap();
        descriptors.close("x").unwrap();
    }

    #[test]
    fn a_number_that_was_not_inherited_is_not_touched() {
        let file = File::open("/dev/null").unwrap();
        let mut descriptors = Descriptors::default();
        assert!(matches!(descriptors.take(&file.as_raw_fd().to_string()), Err(BadDescriptor::Unknown(_))));
        assert!(descriptors.take("2").is_ok_and(|duplicate| duplicate.as_raw_fd() > 2));
    }

    #[test]
    fn sets_are_files() {
        let mut descriptors = with(2);
        assert_eq!(descriptors.add(Some(-1), None), Err(BadDescriptor::NegativeSet));
        let (set, fd) = descriptors.add(None, Some("image".into())).unwrap();
        let path = format!("/dev/fdset/{set}");
        assert!(descriptors.of_set(Path::new("/dev/null"), false).is_none());
        assert!(descriptors.of_set(Path::new(&path), false).unwrap().is_ok());
        let wrong = descriptors.of_set(Path::new(&path), true).unwrap();
        assert!(matches!(wrong, Err(BadDescriptor::WrongAccess(0, "writing"))), "{wrong:?}");
        assert!(matches!(descriptors.remove(set.into(), Some(-1)), Err(BadDescriptor::UnknownSet(_))));
        descriptors.remove(set.into(), Some(fd.into())).unwrap();
        assert!(descriptors.of_set(Path::new(&path), false).unwrap().is_err());
    }
}
