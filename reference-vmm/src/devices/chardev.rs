//! Where a character device's bytes go and come from: QEMU's `-chardev`.

use crate::error::{Error, Result};
use crate::non_blocking::NonBlockingWriter;
use qevm_migration::private;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What to open.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChardevOptions {
    /// Nothing: output is thrown away.
    Null,
    /// The monitor's standard input and output.
    Stdio,
    /// A file for output.
    File {
        /// Its path.
        path: PathBuf,
        /// Write after what it holds, and do not empty it.
        append: bool,
    },
    /// A UNIX socket.
    Socket {
        /// Its path.
        path: PathBuf,
        /// Wait for clients there, one after the other, and do not connect.
        server: bool,
    },
}

/// An open character device.
#[derive(Debug)]
pub struct Chardev {
    end: End,
    /// The stream's other side is gone; it is closed when it is not polled.
    dead: bool,
}

#[derive(Debug)]
enum End {
    Null,
    /// Files may block: a pipe that is not read, a disk that hangs. So the output has a thread, and the input is only
    /// read when there is some.
    Files {
        output: NonBlockingWriter,
        room: Arc<EventFd>,
        input: Option<File>,
    },
    Socket {
        listener: Option<UnixListener>,
        stream: Option<UnixStream>,
    },
}

/// Bytes of output to files that wait for a slow one.
const OUTPUT: usize = 64 << 10;

impl End {
    fn files(output: File, input: Option<File>) -> io::Result<End> {
        let room = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let told = Arc::clone(&room);
        let failed = |error| tracing::warn!(%error, "output of a character device is lost");
        // The counter is full only when it is noticed anyway.
        let output = NonBlockingWriter::start(OUTPUT, Box::new(output), failed, move || _ = told.write(1))?;
        Ok(End::Files { output, room, input })
    }
}

impl Chardev {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::Config`] naming what cannot be opened.
    pub fn open(options: &ChardevOptions) -> Result<Chardev> {
        let failed = |what: String| move |cause: io::Error| Error::Config(format!("cannot {what}: {cause}"));
        let end = match options {
            ChardevOptions::Null => End::Null,
            ChardevOptions::Stdio => {
                let open = || -> io::Result<End> {
                    let output = io::stdout().as_fd().try_clone_to_owned()?;
                    End::files(output.into(), Some(io::stdin().as_fd().try_clone_to_owned()?.into()))
                };
                open().map_err(failed("use standard input and output".into()))?
            }
            ChardevOptions::File { path, append } => {
                let mut open = OpenOptions::new();
                open.create(true).write(true).append(*append).truncate(!append);
                let end = open.open(path).and_then(|output| End::files(output, None));
                end.map_err(failed(format!("write {}", path.display())))?
            }
            ChardevOptions::Socket { path, server } => {
                let open = || -> io::Result<End> {
                    if *server {
                        let _ = std::fs::remove_file(path);
                        let listener = private::listener(path)?;
                        listener.set_nonblocking(true)?;
                        return Ok(End::Socket { listener: Some(listener), stream: None });
                    }
                    let stream = UnixStream::connect(path)?;
                    stream.set_nonblocking(true)?;
                    Ok(End::Socket { listener: None, stream: Some(stream) })
                };
                open().map_err(failed(format!("use the socket {}", path.display())))?
            }
        };
        Ok(Chardev { end, dead: false })
    }

    /// Whether what is written is read.
    pub(crate) fn is_connected(&self) -> bool {
        match &self.end {
            End::Null | End::Files { .. } => true,
            End::Socket { stream, .. } => stream.is_some() && !self.dead,
        }
    }

    /// Writes what can be written at once. `WouldBlock`: nothing for now. Without a taker the bytes are thrown away.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match &mut self.end {
            End::Null => Ok(bytes.len()),
            End::Files { output, .. } => match output.write(bytes) {
                0 if !bytes.is_empty() => Err(io::ErrorKind::WouldBlock.into()),
                taken => Ok(taken),
            },
            End::Socket { stream: Some(stream), .. } if !self.dead => stream.write(bytes),
            End::Socket { .. } => Ok(bytes.len()),
        };
        match written {
            Err(error) if !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                tracing::warn!(%error, "a character device takes no more output");
                self.dead = true;
                Ok(bytes.len())
            }
            other => other,
        }
    }

    /// Waits until the output is written, at most that long.
    pub(crate) fn flush(&self, patience: Duration) {
        if let End::Files { output, .. } = &self.end {
            output.flush(patience);
        }
    }

    /// Whether [`read`](Chardev::read) may be called: it would wait where nothing has come.
    pub(crate) fn may_read(&self, ready: &[(RawFd, i16)]) -> bool {
        match &self.end {
            End::Files { input: Some(input), .. } => ready.iter().any(|(fd, _)| *fd == input.as_raw_fd()),
            _ => true,
        }
    }

    /// Reads what is there; 0 bytes when there is nothing for now, or nothing more.
    pub(crate) fn read(&mut self, into: &mut [u8]) -> usize {
        let read = match &mut self.end {
            End::Files { input: Some(input), .. } => input.read(into),
            End::Socket { stream: Some(stream), .. } => stream.read(into),
            _ => return 0,
        };
        match read {
            Ok(count) if count > 0 => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            _ => {
                match &mut self.end {
                    End::Files { input, .. } => *input = None,
                    _ => self.dead = true,
                }
                0
            }
        }
    }

    /// What to poll it for, when input is wanted and when output waits.
    pub(crate) fn interest(&self, input_wanted: bool, output_waits: bool) -> Vec<(RawFd, i16)> {
        let mut interest = Vec::new();
        let mut add = |fd: RawFd, wanted: bool, events: i16| {
            if wanted {
                interest.push((fd, events));
            }
        };
        match &self.end {
            End::Null => {}
            End::Files { room, input, .. } => {
                add(room.as_raw_fd(), output_waits, libc::POLLIN);
                if let Some(input) = input {
                    add(input.as_raw_fd(), input_wanted, libc::POLLIN);
                }
            }
            End::Socket { stream: Some(stream), .. } => {
                add(stream.as_raw_fd(), input_wanted, libc::POLLIN);
                add(stream.as_raw_fd(), output_waits, libc::POLLOUT);
                // Its end is told in any case.
                add(stream.as_raw_fd(), true, 0);
            }
            End::Socket { listener: Some(listener), stream: None } => add(listener.as_raw_fd(), true, libc::POLLIN),
            End::Socket { .. } => {}
        }
        interest
    }

    /// After a poll: takes a client, and drops one that is gone.
    pub(crate) fn settle(&mut self, ready: &[(RawFd, i16)]) {
        let (listener, stream) = match &mut self.end {
            End::Socket { listener, stream } => (listener, stream),
            End::Files { room, .. } => {
                let _ = room.read();
                return;
            }
            End::Null => return,
        };
        if let Some(open) = stream {
            let fd = open.as_raw_fd();
            let gone = libc::POLLERR | libc::POLLHUP;
            let hung_up =
                ready.iter().any(|(other, events)| *other == fd && events & gone != 0 && events & libc::POLLIN == 0);
            if self.dead || hung_up {
                *stream = None;
                self.dead = false;
            }
        }
        if let (Some(listener), None) = (listener, &stream)
            && let Ok((client, _)) = listener.accept()
            && client.set_nonblocking(true).is_ok()
        {
            *stream = Some(client);
        }
    }
}
