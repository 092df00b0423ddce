//! What the destination says while a guest is sent to it, and after.

use super::HINT;
use crate::socket::Socket;
use qevm_returnpath::{Decoder, Event, Message};
use qevm_wire::{DriveError, Driver};
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const CLOSED: &str = "it closed the connection";

/// How often it is looked whether everything has been sent.
pub(super) const POLL: Duration = Duration::from_millis(100);

/// How far the main channel is sent.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// Bytes that were given to the operating system, or are being given to it.
    pub(super) bytes: AtomicU64,
    /// There are no more, so that the last answer is due.
    pub(super) all: AtomicBool,
}

/// The destination's last word.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// SHUT with this status, when this many bytes of the main channel had been sent.
    Shut {
        /// 0 if the guest was loaded.
        status: u32,
        /// Bytes.
        sent: u64,
    },
    /// None came, for this reason.
    Missing(String),
    /// It ended the TLS session, for this reason.
    Refused(String),
    /// It said what no destination may say.
    Wrong(String),
}

/// The return path.
pub(super) struct ReturnPathReader {
    pub(super) socket: Arc<Socket>,
    pub(super) sent: Arc<Sent>,
    pub(super) patience: Duration,
    /// When everything had been sent.
    pub(super) waiting_since: Option<Instant>,
}

impl ReturnPathReader {
    /// Reads the destination's answers up to its last one. If it says something wrong, the connection is closed, so
    /// that nothing more is sent.
    pub(super) fn last(mut self) -> Answer {
        let answer = self.answer();
        if let Answer::Wrong(_) = &answer {
            self.socket.close();
        }
        answer
    }

    fn answer(&mut self) -> Answer {
        let sent = self.sent.clone();
        let mut acknowledged = false;
        let mut answers = Driver::new(self, Decoder::default());
        loop {
            let message = match answers.next() {
                Ok(Some(Event::Message(message))) => message,
                // Follows a message that was refused.
                Ok(Some(_)) => continue,
                Ok(None) => return Answer::Missing(CLOSED.into()),
                Err(DriveError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
                    return Answer::Refused(error.to_string());
                }
                Err(DriveError::Io(error)) => return Answer::Missing(error.to_string()),
                Err(DriveError::Stream(error)) if error.is_truncated() => return Answer::Missing(CLOSED.into()),
                Err(error) => return Answer::Wrong(error.to_string()),
            };
            match message {
                Message::Shut { status } => return Answer::Shut { status, sent: sent.bytes.load(Ordering::SeqCst) },
                // Its own capability may make it say that once; it changes nothing here.
                Message::SwitchoverAck if !acknowledged => acknowledged = true,
                message => {
                    let name = message.message_type().name();
                    return Answer::Wrong(match message {
                        Message::Pong { value } => format!("PONG {value:#x}, but no PING was sent"),
                        Message::SwitchoverAck => format!("{name} for the second time"),
                        _ => format!("{name}, which only belongs to postcopy"),
                    });
                }
            }
        }
    }
}

impl Read for ReturnPathReader {
    /// Reads what has come, if that is in time.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            // While there is more to send, the destination need not say anything. From then on the time counts,
            // whatever it says.
            if self.sent.all.load(Ordering::SeqCst)
                && self.waiting_since.get_or_insert_with(Instant::now).elapsed() > self.patience
            {
                let seconds = self.patience.as_secs();
                return Err(io::Error::other(format!("no answer within {seconds} s (--timeout); {HINT}")));
            }
            match (&*self.socket).read(into) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
                    ) => {}
                read => return read,
            }
        }
    }
}
