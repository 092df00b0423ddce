//! Mode `cpr-transfer`: a guest goes to another process of the same host, and its memory stays where it is.
//!
//! The memory is in files without a name. A source passes their descriptors on a channel of its own ([`Successor`]) and
//! waits until the destination, which makes its machine of them ([`Predecessor`]), has closed that: then it waits on
//! the main channel. The guest is stopped before the stream begins, and the stream has no pages. The parameter
//! [`mode`](crate::Mode::CprTransfer) of both jobs says so to the engines.

use crate::channel::{WriteSlice, write_all};
use crate::socket::Socket;
use crate::{Address, Channel, GuestError, Job, Listener, MigrationError, Mode, Refused, Timeouts};
use qevm_savevm::cpr::{CprDecoder, CprEncoder, CprEvent, PassedDescriptor};
use qevm_wire::{CountedString, Driver, Profile, QemuVersion};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a wait checks whether it is still wanted.
const POLL: Duration = Duration::from_millis(20);
/// How long a socket that takes no connection is tried.
const PATIENCE: Duration = Duration::from_secs(1);
/// Most descriptors that the system lets go with one message (`SCM_MAX_FD`).
const MOST: usize = 253;
/// The first release that is known to write of VFIO devices, even where there are none.
const TELLS_OF_DEVICES: QemuVersion = QemuVersion::new(11, 1);

/// A descriptor and what it is: for memory the name of the RAM block and 0.
#[derive(Debug)]
pub struct Passed<F> {
    /// Its name.
    pub name: String,
    /// Which of that name.
    pub id: u32,
    /// The descriptor.
    pub descriptor: F,
}

/// Refuses what does not go with the parameter `mode`, at the moment and in the words of QEMU 11.1: a migration with
/// this main channel and this one for descriptors, of a guest whose RAM blocks of these names cannot be passed.
///
/// # Errors
/// [`Refused::Blocked`].
pub fn check(main: &Address, cpr: Option<&Address>, job: &Job, private: &[&str]) -> Result<(), Refused> {
    let (mode, capabilities) = (job.parameters().mode, job.capabilities());
    if mode == Mode::Normal {
        return Ok(());
    }
    let transfer = mode == Mode::CprTransfer;
    let private = private.last().filter(|_| transfer).map(|name| not_compatible(name));
    let is = |what: bool, why: &str| what.then(|| why.to_owned());
    let file = matches!(main, Address::File { .. });
    let unix = matches!(cpr, Some(Address::Unix(_) | Address::Abstract { .. }));
    let why = is(transfer && cpr.is_none(), "missing 'cpr' migration channel")
        .or(is(transfer && file, "Migration requires streamable transport (eg unix)"))
        // QEMU's does not begin before the descriptors are there, but it cannot know what the command connects to.
        .or(is(transfer && matches!(main, Address::Exec(_)), "mode 'cpr-transfer' is not supported over exec: here"))
        .or(private)
        .or(is(capabilities.postcopy_ram, "Cannot use postcopy with CPR"))
        .or(is(capabilities.background_snapshot, "Cannot use background snapshot with CPR"))
        .or(is(transfer && !unix, "bad cpr channel address; must be unix"));
    why.map_or(Ok(()), |why| Err(Refused::Blocked(why)))
}

/// What QEMU 11.1 says of memory that no other process can have.
pub fn not_compatible(block: &str) -> String {
    format!(
        "Memory region {block} is not compatible with CPR. share=on is required for memory-backend objects, and aux-ram-share=on is required."
    )
}

/// The process that a guest goes to, before it has the guest's memory.
#[derive(Debug)]
pub struct Successor {
    address: Address,
    socket: Arc<Socket>,
}

impl Successor {
    /// Connects to a destination's side channel, a UNIX socket.
    ///
    /// # Errors
    /// [`MigrationError::Connect`].
    pub fn connect(address: &Address) -> Result<Self, MigrationError> {
        let since = Instant::now();
        let socket = Socket::connect_to(address, &[], &|| since.elapsed() < PATIENCE);
        let failed = |source| MigrationError::Connect { address: address.clone(), source };
        Ok(Successor { address: address.clone(), socket: Arc::new(socket.map_err(failed)?) })
    }

    /// Passes the descriptors, and waits until the destination has made its machine of them. Nothing has happened to
    /// the guest by then.
    ///
    /// # Errors
    /// [`MigrationError::Send`]; [`MigrationError::Cancelled`]; [`MigrationError::Connect`] for a destination that does
    /// not close the channel in time (`x-idle-timeout`).
    pub fn pass(
        self,
        descriptors: &[Passed<BorrowedFd<'_>>],
        job: &Job,
        profile: &Profile,
    ) -> Result<(), MigrationError> {
        let channel: Arc<dyn Channel> = self.socket.clone();
        job.attach([&channel])?;
        let failed = |source| MigrationError::Send { doing: "descriptors on the CPR channel", source };
        channel.limit_waits(POLL, None).map_err(failed)?;
        let cancelled = |error| job.check().err().unwrap_or(error);
        let mut encoder = CprEncoder::default();
        for Passed { name, id, descriptor } in descriptors {
            let name = CountedString::try_from(name.as_str()).map_err(|bad| failed(io::Error::other(bad)))?;
            let bytes = encoder.descriptor(&PassedDescriptor { name, id: *id });
            self.send(&bytes, Some(*descriptor), job).map_err(failed).map_err(cancelled)?;
        }
        let end = if profile.qemu < TELLS_OF_DEVICES { encoder.end() } else { encoder.end_with(&[]) };
        self.send(&end, None, job).map_err(failed).map_err(cancelled)?;
        self.socket.finish_writing();
        let waited = self.wait(job);
        channel.close();
        waited
    }

    /// Sends bytes, and with the last of them a descriptor.
    fn send(&self, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>, job: &Job) -> io::Result<()> {
        let (before, last) = bytes.split_at(bytes.len() - usize::from(descriptor.is_some()));
        write_all(&*self.socket, &mut [WriteSlice::bytes(before)])?;
        let Some(descriptor) = descriptor else { return Ok(()) };
        let rights = [descriptor];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&rights));
        loop {
            match sendmsg(self.socket.as_fd(), &[IoSlice::new(last)], &mut control, SendFlags::NOSIGNAL) {
                // There is no room, or the limit of descriptors on their way is reached.
                Err(Errno::AGAIN | Errno::TOOMANYREFS) if job.check().is_ok() => std::thread::sleep(POLL),
                Err(Errno::INTR) => {}
                sent => return sent.map(drop).map_err(Into::into),
            }
        }
    }

    /// Waits until the destination has closed. What it says before means nothing.
    fn wait(&self, job: &Job) -> Result<(), MigrationError> {
        let (since, mut bytes) = (Instant::now(), [0; 64]);
        loop {
            job.check()?;
            match self.socket.receive(&mut bytes) {
                Ok(0) => return job.check(),
                Ok(_) => {}
                Err(error) if [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind()) => {}
                // It has closed without having read everything.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return job.check(),
                Err(source) => return Err(MigrationError::Connect { address: self.address.clone(), source }),
            }
            if let Some(limit) = job.parameters().timeouts.idle().filter(|limit| since.elapsed() >= *limit) {
                let seconds = limit.as_secs_f64();
                let why = format!(
                    "it has the descriptors, and has not closed the CPR channel for {seconds} s (x-idle-timeout)"
                );
                let source = io::Error::new(io::ErrorKind::TimedOut, why);
                return Err(MigrationError::Connect { address: self.address.clone(), source });
            }
        }
    }
}

/// The process that a guest comes from, which waits for this one to take over its memory. It goes on, and begins the
/// migration, when this is dropped.
#[derive(Debug)]
pub struct Predecessor {
    _connection: Socket,
    descriptors: Vec<Passed<OwnedFd>>,
}

impl Predecessor {
    /// Waits for a source, as long as `wanted` says so, and for its descriptors. Any other connection is dropped, with
    /// a line in the log, and so is one that does not send everything in time (`x-handshake-timeout`).
    ///
    /// # Errors
    /// [`MigrationError::Listen`], when the listener is of no more use; [`MigrationError::Cancelled`].
    pub fn wait(listener: &Listener, timeouts: &Timeouts, wanted: &dyn Fn() -> bool) -> Result<Self, MigrationError> {
        listener.set_nonblocking().map_err(|error| listener.failed(error))?;
        loop {
            if !wanted() {
                return Err(MigrationError::Cancelled);
            }
            let Some((socket, _)) = listener.try_accept().map_err(|error| listener.failed(error))? else {
                wait_for(listener.as_fd()).map_err(|error| listener.failed(error))?;
                continue;
            };
            match receive(&socket, timeouts.handshake(), wanted) {
                Ok(descriptors) => return Ok(Predecessor { _connection: socket, descriptors }),
                Err(error) => tracing::warn!("a connection to the CPR channel is dropped: {error}"),
            }
        }
    }

    /// What it has passed.
    pub fn take(&mut self) -> Vec<Passed<OwnedFd>> {
        std::mem::take(&mut self.descriptors)
    }
}

/// Reads a side channel to its end.
fn receive(
    socket: &Socket,
    limit: Option<Duration>,
    wanted: &dyn Fn() -> bool,
) -> Result<Vec<Passed<OwnedFd>>, GuestError> {
    socket.set_nonblocking(true)?;
    let came = RefCell::default();
    let reader = Receiving { socket, came: &came, since: Instant::now(), limit, wanted };
    let mut driver = Driver::new(reader, CprDecoder::default());
    let mut passed = Vec::new();
    while let Some(event) = driver.next()? {
        let CprEvent::Descriptor(PassedDescriptor { name, id }) = event else {
            return Err("it passes a VFIO device, and none can be taken over".into());
        };
        let descriptor = came.borrow_mut().pop_front();
        let descriptor = descriptor.ok_or_else(|| format!("descriptor '{name}' is named and has not come"))?;
        passed.push(Passed { name: name.to_string(), id, descriptor });
    }
    match came.borrow().len() {
        0 => Ok(passed),
        more => Err(format!("{more} descriptors have come that it does not name").into()),
    }
}

/// Reads bytes, and keeps the descriptors that come with them.
struct Receiving<'s> {
    socket: &'s Socket,
    came: &'s RefCell<VecDeque<OwnedFd>>,
    since: Instant,
    limit: Option<Duration>,
    wanted: &'s dyn Fn() -> bool,
}

impl Read for Receiving<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut part = [IoSliceMut::new(bytes)];
            let read = retry_on_intr(|| recvmsg(self.socket.as_fd(), &mut part, &mut control, RecvFlags::CMSG_CLOEXEC));
            match read {
                Err(Errno::AGAIN) => {}
                read => {
                    let rights = control.drain().filter_map(|message| match message {
                        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                        _ => None,
                    });
                    let mut came = self.came.borrow_mut();
                    came.extend(rights.flatten());
                    // A source sends one with the byte that stands for it.
                    if came.len() > MOST {
                        return Err(io::Error::other("descriptors come that it does not name"));
                    }
                    return Ok(read?.bytes);
                }
            }
            if !(self.wanted)() {
                return Err(io::Error::other("it is not waited for any longer"));
            }
            if let Some(limit) = self.limit.filter(|limit| self.since.elapsed() >= *limit) {
                let why = format!("it has not said everything for {} s (x-handshake-timeout)", limit.as_secs_f64());
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
            wait_for(self.socket.as_fd())?;
        }
    }
}

/// Waits a moment for something to read.
fn wait_for(fd: BorrowedFd<'_>) -> io::Result<()> {
    let moment = Timespec { tv_sec: 0, tv_nsec: POLL.subsec_nanos().into() };
    match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&moment)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
