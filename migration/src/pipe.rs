//! Channels that are no sockets: commands, pipes and files.

use super::Channel;
use super::channel::{MAX_PARTS, ReadSlice, WriteSlice};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{ioctl_fionread, write};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// How long a command may take to end when it has everything, and what it does then is not known any more.
const COMMAND_PATIENCE: Duration = Duration::from_secs(5);
/// How long a command may take to tell why it has ended.
const STATUS_PATIENCE: Duration = Duration::from_millis(500);
/// How often a pipe is looked at that is to be read.
const READ_POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
/// How often a command is asked for its status.
const STATUS_POLL: Duration = Duration::from_millis(2);

/// A channel over one or two descriptors that are no sockets.
#[derive(Debug)]
pub struct Pipe {
    reader: Mutex<Option<Arc<OwnedFd>>>,
    writer: Mutex<Option<Arc<OwnedFd>>>,
    /// Readable when there is nothing more to be read.
    reading_ends: OwnedFd,
    /// Readable when nothing more may be written.
    writing_ends: OwnedFd,
    command: Mutex<Option<Child>>,
    /// What was written can be told from what was read.
    fifo: bool,
    /// How long a read or a write waits before it is told so.
    patience: OnceLock<Duration>,
}

impl Pipe {
    /// A pipe, a file or a device, for what it is open for. Waiting for a pipe can be ended, for which it is made
    /// non-blocking.
    ///
    /// # Errors
    /// The system's.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let fd = Arc::new(fd);
        let access = fcntl_getfl(&fd)? & OFlags::ACCMODE;
        let file_type = File::from(fd.try_clone()?).metadata()?.file_type();
        if file_type.is_fifo() || file_type.is_char_device() {
            do_not_block(&fd)?;
        }
        let reader = (access != OFlags::WRONLY).then(|| fd.clone());
        let writer = (access != OFlags::RDONLY).then_some(fd);
        Self::over(reader, writer, None, file_type.is_fifo())
    }

    /// Starts a command: what is written goes to its standard input, what is read comes from its standard output.
    ///
    /// # Errors
    /// The system's.
    pub fn command(words: &[String]) -> io::Result<Self> {
        let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let writer = child.stdin.take().map(|stdin| Arc::new(OwnedFd::from(stdin)));
        let reader = child.stdout.take().map(|stdout| Arc::new(OwnedFd::from(stdout)));
        for end in [&reader, &writer].into_iter().flatten() {
            do_not_block(end)?;
        }
        Self::over(reader, writer, Some(child), true)
    }

    fn over(
        reader: Option<Arc<OwnedFd>>,
        writer: Option<Arc<OwnedFd>>,
        command: Option<Child>,
        fifo: bool,
    ) -> io::Result<Self> {
        Ok(Pipe {
            reader: Mutex::new(reader),
            writer: Mutex::new(writer),
            reading_ends: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            writing_ends: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            command: Mutex::new(command),
            fifo,
            patience: OnceLock::new(),
        })
    }

    /// Whether it can be read from, and written to.
    pub(crate) fn directions(&self) -> (bool, bool) {
        (self.reader.lock().is_some(), self.writer.lock().is_some())
    }

    /// Waits until the pipe is empty.
    fn wait_until_read(&self) -> io::Result<()> {
        let Some(fd) = self.writer.lock().clone() else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let deadline = self.patience.get().map(|patience| Instant::now() + *patience);
        while self.backlog()? > 0 {
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            // That the reader has gone is told unasked.
            let mut entries = [PollFd::new(&self.writing_ends, PollFlags::IN), PollFd::new(&*fd, PollFlags::empty())];
            match poll(&mut entries, Some(&READ_POLL)) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) if !entries[0].revents().is_empty() => return Err(io::ErrorKind::ConnectionAborted.into()),
                Ok(_) if entries[1].revents().contains(PollFlags::ERR) && self.backlog()? > 0 => {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// How the command has ended, if there is one and it has or does within `patience`.
    fn status(&self, patience: Duration) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + patience;
        loop {
            let status = match &mut *self.command.lock() {
                None => return Ok(None),
                Some(child) => child.try_wait()?,
            };
            if status.is_some() || Instant::now() >= deadline {
                return Ok(status);
            }
            thread::sleep(STATUS_POLL);
        }
    }

    /// An error that says how the command has ended, if it has failed.
    fn failure(&self, patience: Duration) -> Option<io::Error> {
        let status = self.status(patience).ok().flatten().filter(|status| !status.success())?;
        Some(io::Error::other(format!("the command has ended with {status}")))
    }
}

impl Channel for Pipe {
    fn write(&self, parts: &[WriteSlice<'_>]) -> io::Result<usize> {
        let Some(fd) = self.writer.lock().clone() else { return Err(io::ErrorKind::BrokenPipe.into()) };
        loop {
            if wait(fd.as_fd(), PollFlags::OUT, &self.writing_ends, self.patience.get())? {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let count = parts.len().min(MAX_PARTS) as libc::c_int;
            // SAFETY: `WriteSlice` is a transparent iovec whose memory lives as long as its lifetime says; the kernel
            // only reads it.
            let written = unsafe { libc::writev(fd.as_raw_fd(), parts.as_ptr().cast(), count) };
            match usize::try_from(written) {
                Ok(written) => return Ok(written),
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::WouldBlock => {}
                    error if error.kind() == io::ErrorKind::BrokenPipe => {
                        return Err(self.failure(STATUS_PATIENCE).unwrap_or(error));
                    }
                    error => return Err(error),
                },
            }
        }
    }

    fn read(&self, parts: &mut [ReadSlice<'_>]) -> io::Result<usize> {
        let Some(fd) = self.reader.lock().clone() else { return Err(io::Error::from_raw_os_error(libc::EBADF)) };
        loop {
            if wait(fd.as_fd(), PollFlags::IN, &self.reading_ends, self.patience.get())? {
                return Ok(0);
            }
            let count = parts.len().min(MAX_PARTS) as libc::c_int;
            // SAFETY: `ReadSlice` is a transparent iovec over memory that is writable as long as its lifetime says,
            // borrowed exclusively or, for guest memory, open to changes at any time.
            let read = unsafe { libc::readv(fd.as_raw_fd(), parts.as_mut_ptr().cast(), count) };
            match usize::try_from(read) {
                Ok(0) => return self.failure(STATUS_PATIENCE).map_or(Ok(0), Err),
                Ok(read) => return Ok(read),
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::WouldBlock => {}
                    error => return Err(error),
                },
            }
        }
    }

    fn backlog(&self) -> io::Result<u64> {
        let Some(fd) = self.writer.lock().clone().filter(|_| self.fifo) else { return Ok(0) };
        Ok(ioctl_fionread(&fd)?)
    }

    fn limit_waits(&self, each: Duration, _: Option<Duration>) -> io::Result<()> {
        // The first one counts.
        self.patience.get_or_init(|| each);
        Ok(())
    }

    fn settle(&self) -> io::Result<()> {
        if self.command.lock().is_none() {
            self.wait_until_read()?;
        }
        self.finish_writing();
        match self.status(COMMAND_PATIENCE)? {
            Some(status) if !status.success() => Err(io::Error::other(format!("the command has ended with {status}"))),
            None if self.command.lock().is_some() => {
                tracing::warn!("the command has everything and goes on; whether it succeeds is not known");
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn answers(&self) -> bool {
        self.directions().1
    }

    fn finish_writing(&self) {
        // The descriptor is closed when it is not written to any more, and the other end reads to the end.
        *self.writer.lock() = None;
    }

    fn stop_reading(&self) {
        signal(&self.reading_ends);
    }

    fn close(&self) {
        signal(&self.reading_ends);
        signal(&self.writing_ends);
        *self.writer.lock() = None;
        *self.reader.lock() = None;
        if let Some(child) = &mut *self.command.lock()
            && matches!(child.try_wait(), Ok(None))
        {
            // It has not been waited for, so its number is not another's. It may have ended already.
            let _ = kill_process(Pid::from_child(child), Signal::TERM);
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        *self.writer.lock() = None;
        *self.reader.lock() = None;
        if let Some(mut child) = self.command.lock().take()
            && matches!(child.try_wait(), Ok(None))
        {
            // It ends when it likes to, and leaves no zombie.
            thread::spawn(move || child.wait());
        }
    }
}

fn signal(event: &OwnedFd) {
    if let Err(error) = write(event, &1_u64.to_ne_bytes()) {
        tracing::error!(%error, "a channel cannot be ended");
    }
}

/// Waits until `fd` is ready, or says that `end` was signalled.
fn wait(fd: BorrowedFd<'_>, events: PollFlags, end: &OwnedFd, patience: Option<&Duration>) -> io::Result<bool> {
    let mut entries = [PollFd::new(end, PollFlags::IN), PollFd::from_borrowed_fd(fd, events)];
    let time = patience.map(|time| Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() });
    match poll(&mut entries, time.as_ref())? {
        0 => Err(io::ErrorKind::WouldBlock.into()),
        _ => Ok(!entries[0].revents().is_empty()),
    }
}

fn do_not_block(fd: &OwnedFd) -> io::Result<()> {
    Ok(fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::{read_at_least, write_all};

    fn shell(command: &str) -> Pipe {
        Pipe::command(&["/bin/sh", "-c", command].map(String::from)).unwrap()
    }

    #[test]
    fn a_command_is_written_to_and_read_from() {
        let cat = shell("cat");
        write_all(&cat, &mut [WriteSlice::bytes(b"hello")]).unwrap();
        cat.settle().unwrap();
        let mut answer = [0; 8];
        assert_eq!(read_at_least(&cat, &mut [ReadSlice::bytes(&mut answer)], 8).unwrap(), 5);
        assert_eq!(&answer[..5], b"hello");
    }

    #[test]
    fn a_command_that_fails_says_how() {
        let failing = shell("cat > /dev/null; exit 3");
        write_all(&failing, &mut [WriteSlice::bytes(b"hello")]).unwrap();
        assert!(failing.settle().unwrap_err().to_string().contains("exit status: 3"));
        let gone = shell("exit 4");
        // A command may close its ends before it ends, and a busy machine may take its time between.
        while gone.status(Duration::ZERO).unwrap().is_none() {
            thread::yield_now();
        }
        let mut byte = [0];
        let error = gone.read(&mut [ReadSlice::bytes(&mut byte)]).unwrap_err();
        assert!(error.to_string().contains("exit status: 4"), "{error}");
        let error = loop {
            // The first bytes may find room in the pipe.
            if let Err(error) = write_all(&gone, &mut [WriteSlice::bytes(&[0; 1 << 17])]) {
                break error;
            }
        };
        assert!(error.to_string().contains("exit status: 4"), "{error}");
    }

    #[test]
    fn closing_wakes_a_thread_that_waits() {
        let silent = shell("sleep 60");
        thread::scope(|scope| {
            let reader = scope.spawn(|| silent.read(&mut [ReadSlice::bytes(&mut [0])]));
            let writer = scope.spawn(|| write_all(&silent, &mut [WriteSlice::bytes(&vec![0; 1 << 20])]));
            thread::sleep(Duration::from_millis(20));
            silent.close();
            assert_eq!(reader.join().unwrap().unwrap(), 0);
            assert_eq!(writer.join().unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        });
        assert!(silent.status(COMMAND_PATIENCE).unwrap().is_some(), "the command was ended");
    }

    #[test]
    fn a_device_is_used_as_it_was_opened() {
        let full = Pipe::new(File::options().write(true).open("/dev/full").unwrap().into()).unwrap();
        let error = write_all(&full, &mut [WriteSlice::bytes(b"x")]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(full.read(&mut [ReadSlice::bytes(&mut [0])]).is_err());
    }
}
