//! The connections of one migration: the main channel, and the page channels if capability `multifd` is on; or a file.

mod connecting;
mod incoming;
mod outgoing;

pub use incoming::Incoming;
pub use outgoing::{Outgoing, Reader};

use super::arrivals::{Seen, gather};
use super::multifd::{PageStream, Settings};
use super::page_file::PageFile;
use super::page_server::{PageServer, ServedStream};
use super::patience::Patience;
use super::watch::{Brings, Watched};
use super::{Address, BadCapability, Channel, ChannelName, Job, Listener, MigrationError, Mode, Pipe, RULES, Socket};
use crate::descriptors::Descriptors;
use connecting::{Names, connect};
use qevm_multifd::compression::Compression;
use qevm_wire::capability::{Context, check};
use qevm_wire::{Capability, Profile};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

/// Permissions of a file that a guest goes to (QEMU 8.2): it holds all of the guest's secrets.
const FILE_MODE: u32 = 0o600;

impl Outgoing {
    /// Connects to a destination, with as many page channels as `job` has settings for, or opens what else the guest
    /// goes to. A postcopy that was interrupted goes on without page channels.
    ///
    /// # Errors
    /// [`MigrationError::Connect`] with the system's reason, or at once when `job` is cancelled meanwhile;
    /// [`MigrationError::Create`] and [`MigrationError::Open`] with the system's reason,
    /// [`MigrationError::Descriptor`], and [`MigrationError::Capability`] for capabilities that do not go with the
    /// transport.
    pub fn open(address: &Address, job: &Job, descriptors: &mut dyn Descriptors) -> Result<Self, MigrationError> {
        check_transport(address, job)?;
        let failed = |source| MigrationError::Open { address: address.clone(), source };
        match address {
            Address::Tcp { .. } | Address::Unix(_) | Address::Abstract { .. } => {
                let wanted = job.capabilities().multifd && !job.status().is_postcopy();
                let channels = if wanted { job.parameters().multifd_channels } else { 0 };
                connect(address, job, Names::Pages(channels))
            }
            Address::Nbd { .. } => {
                let why = "guests come from a page server, and none goes to one";
                Err(failed(io::Error::new(io::ErrorKind::Unsupported, why)))
            }
            Address::Exec(words) => {
                let main: Arc<dyn Channel> = Arc::new(Pipe::command(words).map_err(failed)?);
                Outgoing::from(main).watched(job)
            }
            Address::Fd(name) => {
                let (main, two_way) =
                    channel(descriptors.take(name).map_err(MigrationError::Descriptor)?, true).map_err(failed)?;
                if !two_way {
                    one_way(job)?;
                }
                let reader = if two_way { Reader::Answers } else { Reader::Silent };
                Outgoing { reader, ..main.into() }.watched(job)
            }
            Address::File { path, offset } => {
                if job.capabilities().postcopy_ram && job.capabilities().mapped_ram {
                    let both = [Capability::MappedRam, Capability::PostcopyRam].into_iter().collect();
                    check(both, &Context::new(RULES)).map_err(BadCapability::from)?;
                }
                one_way(job)?;
                let failed = |source| MigrationError::Create { path: path.clone(), source };
                let open = |flags| match descriptors.of_set(path, true) {
                    None => create(path, flags).map_err(failed),
                    // Flags belong to what was opened, and others may use it, too.
                    Some(descriptor) => Ok(File::from(descriptor.map_err(MigrationError::Descriptor)?)),
                };
                let mut file = open(0)?;
                truncate_and_seek(&mut file, *offset).map_err(failed)?;
                let pages = page_file(&file, job, open, failed)?;
                let main: Arc<dyn Channel> = Arc::new(Pipe::new(file.into()).map_err(failed)?);
                Ok(Outgoing { reader: Reader::Nobody, file: pages, watched: true, ..main.into() })
            }
        }
    }

    /// Connects the preempt channel, as [`open`](Self::open) does the others.
    ///
    /// # Errors
    /// [`MigrationError::Connect`]; [`MigrationError::Capability`] if the transport has one connection.
    pub(crate) fn open_preempt(&self, job: &Job) -> Result<(), MigrationError> {
        let Some(address) = &self.address else {
            let context = Context { multi_channel: false, ..Context::new(RULES) };
            let both = [Capability::PostcopyRam, Capability::PostcopyPreempt].into_iter().collect();
            return Ok(check(both, &context).map_err(BadCapability::from)?);
        };
        let channel = connect(address, job, Names::Preempt)?.main;
        self.preempt.get_or_init(|| channel);
        Ok(())
    }

    /// The same with deadlines for the waits on the main channel, if it has none: that of another caller, which has
    /// no page channels.
    pub(crate) fn watched(self, job: &Job) -> Result<Self, MigrationError> {
        if self.watched {
            return Ok(self);
        }
        let failed = |source| MigrationError::Send { doing: "anything", source };
        let main = Watched::new(self.main, ChannelName::Main, &job.waits(), Brings::Answers, None).map_err(failed)?;
        Ok(Outgoing { main: Arc::new(main), watched: true, ..self })
    }
}

impl Incoming {
    /// Waits for a source, and for all of its page channels if `job` has capability `multifd`, as long as it takes.
    /// Any other connection is dropped, with a line in the log; so is a source whose channels do not all come in time
    /// (`x-handshake-timeout`). With capability `postcopy-preempt` the listener stays open until the source has opened
    /// that channel, too, or the migration is over.
    ///
    /// # Errors
    /// [`MigrationError::Listen`] with the system's reason, when the listener is of no more use.
    pub fn accept(listener: &Listener, job: &Job, profile: &Profile) -> Result<Self, MigrationError> {
        let capabilities = job.capabilities();
        let settings = Settings::of(capabilities, &job.parameters(), profile)
            .map(|settings| Settings { uuid: job.uuid().unwrap_or_default(), ..settings });
        gather(
            listener,
            settings.as_ref(),
            capabilities.postcopy_preempt,
            job.tls(),
            Patience::of(job.waits()),
            &mut |seen| match seen {
                Seen::Dropped(dropped) => tracing::warn!("{dropped}"),
                Seen::Incomplete(error) => tracing::warn!("a source has come without all of its channels: {error}"),
            },
        )
    }

    /// Opens what a guest comes from without a caller: a command, a descriptor or a file.
    ///
    /// # Errors
    /// As [`Outgoing::open`]; [`MigrationError::Open`] also for an address that is to be listened at.
    pub fn open(address: &Address, job: &Job, descriptors: &mut dyn Descriptors) -> Result<Self, MigrationError> {
        check_transport(address, job)?;
        let failed = |source| MigrationError::Open { address: address.clone(), source };
        match address {
            Address::Tcp { .. } | Address::Unix(_) | Address::Abstract { .. } => {
                Err(failed(io::ErrorKind::InvalidInput.into()))
            }
            Address::Exec(words) => {
                let main: Arc<dyn Channel> = Arc::new(Pipe::command(words).map_err(failed)?);
                Incoming::from(main).watched(job)
            }
            Address::Nbd { server, export } => {
                let server = Arc::new(PageServer::new((**server).clone(), export.clone()));
                let main: Arc<dyn Channel> = Arc::new(ServedStream(server.clone()));
                let file = job.capabilities().mapped_ram.then_some(PageFile::Served(server));
                Ok(Incoming { file, watched: true, ..main.into() })
            }
            Address::Fd(name) => {
                let fd = descriptors.take(name).map_err(MigrationError::Descriptor)?;
                Incoming::from(channel(fd, false).map_err(failed)?.0).watched(job)
            }
            Address::File { path, offset } => {
                let open = |flags| match descriptors.of_set(path, false) {
                    None => OpenOptions::new().read(true).custom_flags(flags | AT_ONCE).open(path).map_err(failed),
                    Some(descriptor) => Ok(File::from(descriptor.map_err(MigrationError::Descriptor)?)),
                };
                let mut file = open(0)?;
                if file.metadata().map_err(failed)?.is_dir() {
                    return Err(failed(io::ErrorKind::IsADirectory.into()));
                }
                if *offset > 0 || job.capabilities().mapped_ram {
                    file.seek(SeekFrom::Start(*offset)).map_err(failed)?;
                }
                let pages = page_file(&file, job, open, failed)?;
                let main: Arc<dyn Channel> = Arc::new(Pipe::new(file.into()).map_err(failed)?);
                Ok(Incoming { offset: *offset, file: pages, watched: true, ..main.into() })
            }
        }
    }

    /// The same with deadlines for the waits on the main channel, if it has none: that of another caller, which has
    /// no page channels.
    pub(crate) fn watched(self, job: &Job) -> Result<Self, MigrationError> {
        if self.watched {
            return Ok(self);
        }
        let failed = |source| MigrationError::Receive { offset: 0, source };
        let main = Watched::new(self.main, ChannelName::Main, &job.waits(), Brings::Guest, None).map_err(failed)?;
        Ok(Incoming { main: Arc::new(main), watched: true, ..self })
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<dyn Channel>> {
        std::iter::once(&self.main).chain(self.pages.iter().map(PageStream::channel))
    }
}

/// Where pages have their places in `file`, which `open` opens again with other flags (`direct-io`); without
/// `mapped-ram` nowhere.
fn page_file(
    file: &File,
    job: &Job,
    open: impl FnOnce(libc::c_int) -> Result<File, MigrationError>,
    failed: impl FnOnce(io::Error) -> MigrationError,
) -> Result<Option<PageFile>, MigrationError> {
    let capabilities = job.capabilities();
    if !capabilities.mapped_ram {
        return Ok(None);
    }
    let direct = job.parameters().direct_io && capabilities.multifd;
    Ok(Some(PageFile::new(file.try_clone().map_err(failed)?, direct.then(|| open(libc::O_DIRECT)).transpose()?)))
}

/// Refuses capabilities and credentials that do not go with the transport, as QEMU does before it opens anything.
///
/// # Errors
/// [`MigrationError::Capability`], [`MigrationError::Tls`].
pub fn check_transport(address: &Address, job: &Job) -> Result<(), MigrationError> {
    let parameters = job.parameters();
    let context = Context {
        seekable: matches!(address, Address::File { .. } | Address::Nbd { .. }),
        multi_channel: address.is_socket(),
        cpr: parameters.mode != Mode::Normal,
        ..Context::new(RULES)
    };
    // In QEMU's order.
    job.capabilities().with_in([], &context)?;
    let compressed = parameters.multifd_compression != Compression::None;
    let tls = !parameters.tls_creds.is_empty();
    job.capabilities().with_in([], &Context { compressed, tls, ..context })?;
    if job.tls().is_some() && !context.multi_channel {
        let why = match job.capabilities().mapped_ram {
            true => "Cannot use TLS with mapped-ram".to_owned(),
            false => format!("TLS is for tcp: and unix:, and {address} is neither: unset 'tls-creds'"),
        };
        return Err(MigrationError::Tls(why.into()));
    }
    Ok(())
}

/// No answer is possible here.
fn one_way(job: &Job) -> Result<(), BadCapability> {
    let capabilities = job.capabilities();
    match (capabilities.return_path, capabilities.postcopy_ram) {
        (true, _) => Err(BadCapability::OneWay("return-path")),
        (_, true) => Err(BadCapability::OneWay("postcopy-ram")),
        _ => Ok(()),
    }
}

/// A FIFO without another end is no reason to wait: the monitor opens it while it serves QMP. To a file it makes no
/// difference.
const AT_ONCE: libc::c_int = libc::O_NONBLOCK;

fn create(path: &Path, flags: libc::c_int) -> io::Result<File> {
    let mut options = OpenOptions::new();
    // What lies in front of the stream in the file stays.
    options.write(true).create(true).truncate(false).mode(FILE_MODE);
    match options.custom_flags(flags | AT_ONCE | libc::O_NOFOLLOW).open(path) {
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            // Disks and standard output are named by links. A link to a file may be any user's, and so may the file.
            let file = options.create(false).custom_flags(flags | AT_ONCE).open(path)?;
            match file.metadata()?.is_file() {
                true => Err(io::Error::other("it is a symbolic link to a file, which guest memory does not follow")),
                false => Ok(file),
            }
        }
        opened => opened,
    }
}

/// Cuts a file where the stream begins, and goes there. A device is as long as it is.
fn truncate_and_seek(file: &mut File, offset: u64) -> io::Result<()> {
    let file_type = file.metadata()?.file_type();
    if file_type.is_file() {
        file.set_len(offset)?;
    }
    if file_type.is_file() || file_type.is_block_device() {
        file.seek(SeekFrom::Start(offset))?;
    }
    Ok(())
}

/// A channel over a descriptor of unknown kind, and whether it goes both ways.
fn channel(fd: OwnedFd, write: bool) -> io::Result<(Arc<dyn Channel>, bool)> {
    if File::from(fd.try_clone()?).metadata()?.file_type().is_socket() {
        return Ok((Arc::new(Socket::adopt(fd)?), true));
    }
    let pipe = Pipe::new(fd)?;
    let (reads, writes) = pipe.directions();
    if if write { writes } else { reads } {
        return Ok((Arc::new(pipe), false));
    }
    let missing = if write { "writing" } else { "reading" };
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is not open for {missing}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::{ReadSlice, WriteSlice, read_at_least, write_all};
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    /// The QMP server opens them.
    #[test]
    fn a_fifo_without_another_end_does_not_make_the_monitor_wait() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let address = Address::File { path, offset: 0 };
        let (job, mut none) = (Job::default(), crate::NoDescriptors);
        match Outgoing::open(&address, &job, &mut none) {
            Err(MigrationError::Create { source, .. }) => assert_eq!(source.raw_os_error(), Some(libc::ENXIO)),
            other => panic!("{other:?}"),
        }
        // A reader waits for the first byte, and not for its end, when there was no writer yet.
        let incoming = Incoming::open(&address, &job, &mut none).unwrap();
        let reading = std::thread::spawn(move || {
            let mut bytes = [0; 5];
            read_at_least(&*incoming.main, &mut [ReadSlice::bytes(&mut bytes)], 5).map(|_| bytes)
        });
        let outgoing = Outgoing::open(&address, &job, &mut none).unwrap();
        write_all(&*outgoing.main, &mut [WriteSlice::bytes(b"hello")]).unwrap();
        assert_eq!(&reading.join().unwrap().unwrap(), b"hello");
    }
}
