//! The source's return-path thread: reads messages while another thread sends, and lets that one wait for them.

use super::channel::{ReadSlice, Reading};
use super::core::source::Answers;
use super::{Channel, MigrationError, ReturnPathError};
use parking_lot::{Condvar, Mutex, MutexGuard};
use qevm_returnpath::{Decoder, Event, Message, MessageError};
use qevm_wire::{Decode, DriveError, Driver, Located};
use std::io::{self, Read};
use std::time::Duration;

/// Bytes that a destination may send after its verdict, which are not looked at.
const MOST_BEHIND_VERDICT: usize = 64 << 10;

/// Reads the return path in a thread of its own, and lets the sending thread wait for what comes.
#[derive(Debug)]
pub(crate) struct ReturnPath {
    answers: Mutex<Answers>,
    changed: Condvar,
}

impl ReturnPath {
    pub(crate) fn new(answers: Answers) -> Self {
        ReturnPath { answers: Mutex::new(answers), changed: Condvar::new() }
    }

    /// What has come so far.
    pub(crate) fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock()
    }

    /// Waits until something comes, or for `time` at most. What has come must have been looked at with the lock that is
    /// given up here.
    pub(crate) fn wait(&self, mut answers: MutexGuard<'_, Answers>, time: Option<Duration>) {
        match time {
            None => self.changed.wait(&mut answers),
            Some(time) => drop(self.changed.wait_for(&mut answers, time)),
        }
    }

    /// Reads messages until the peer closes. A failure closes the channel, so that the sending thread does not stay
    /// blocked in a write that the peer does not read. Pages that are asked for are given to `serve`; if that says
    /// true, none else has to learn of it.
    pub(crate) fn listen(&self, channel: &dyn Channel, serve: impl Fn(&ReturnPath) -> Result<bool, MigrationError>) {
        if let Err(error) = self.messages(channel, serve) {
            self.answers().fail(error);
        }
        self.changed.notify_all();
        if self.answers().has_failed() {
            channel.close();
        } else {
            let ended = drain(channel);
            self.answers().end(ended);
            self.changed.notify_all();
        }
    }

    /// Reads up to the last message that matters.
    fn messages(
        &self,
        channel: &dyn Channel,
        serve: impl Fn(&ReturnPath) -> Result<bool, MigrationError>,
    ) -> Result<(), MigrationError> {
        let mut messages = Driver::new(Reading(channel), Decoder::default());
        // The block whose bitmap comes, and its bytes.
        let mut bitmap = None;
        loop {
            let offset = messages.decoder().offset();
            match messages.next() {
                Ok(Some(Event::Message(message))) => {
                    let block = match &message {
                        Message::RecvBitmap { block, .. } => Some(block.clone()),
                        _ => None,
                    };
                    let asks = matches!(message, Message::ReqPages { .. });
                    if self.answers().message(message, offset) {
                        return Ok(());
                    }
                    match asks.then(|| serve(self)) {
                        Some(Ok(true)) => continue,
                        // The destination may say why: its words are read on.
                        Some(Err(error)) => self.answers().urgent_failed(error),
                        Some(Ok(false)) | None => {}
                    }
                    self.changed.notify_all();
                    if let Some(block) = block {
                        // It is as long as was asked for.
                        let mut bytes = Vec::new();
                        messages.payload().read_to_end(&mut bytes).map_err(MigrationError::ReturnPath)?;
                        bitmap = Some((block, bytes));
                    }
                }
                Ok(Some(_)) => {
                    if let Some((block, bytes)) = bitmap.take() {
                        self.answers().bitmap(block, bytes);
                        self.changed.notify_all();
                    }
                }
                // SHUT ends the loop. Whatever was cut off, the verdict was after it.
                Ok(None) => return Err(MigrationError::NoVerdict),
                Err(DriveError::Stream(error)) if error.is_truncated() => return Err(MigrationError::NoVerdict),
                Err(DriveError::Stream(error)) => return Err(named(error).into()),
                Err(DriveError::Io(error)) => return Err(MigrationError::ReturnPath(error)),
                Err(error) => return Err(MigrationError::ReturnPath(io::Error::other(error.to_string()))),
            }
        }
    }
}

/// An alert of TLS (content type 21, version 3.x) begins as a message of a type that there is not.
fn named(error: qevm_returnpath::Error) -> Located<ReturnPathError> {
    const ALERT: u16 = 0x1503;
    match error.kind {
        qevm_returnpath::ErrorKind::Message(MessageError::Type { found: ALERT }) if error.offset < 2 => {
            Located::new(ReturnPathError::TlsAlert, 0)
        }
        _ => error.map(ReturnPathError::from),
    }
}

/// Reads what still comes, so that closing the socket does not destroy what the peer has yet to read.
fn drain(channel: &dyn Channel) -> io::Result<()> {
    let (mut rest, mut total) = ([0; 512], 0);
    while total <= MOST_BEHIND_VERDICT {
        match channel.read(&mut [ReadSlice::bytes(&mut rest)]) {
            Ok(0) => return Ok(()),
            Ok(count) => total += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    // It would go on for ever.
    channel.close();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Socket;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    /// What a QEMU 11.1 whose `tls-creds` are set answers to a stream (GnuTLS), and what a rustls does.
    #[test]
    fn an_alert_of_tls_is_called_so() {
        for alert in [[0x15, 3, 3, 0, 2, 2, 10], [0x15, 3, 3, 0, 2, 2, 50]] {
            let (here, mut there) = UnixStream::pair().unwrap();
            there.write_all(&alert).unwrap();
            drop(there);
            let path = ReturnPath::new(Answers::new(None, true));
            path.listen(&Socket::Unix(here), |_| Ok(false));
            let error = path.answers().explanation();
            match &error {
                Some(MigrationError::ReturnPathMessage(located)) => assert_eq!(located.kind, ReturnPathError::TlsAlert),
                other => panic!("{other:?}"),
            }
            assert!(error.unwrap().to_string().contains("set 'tls-creds' at both sides, or at neither"));
        }
    }

    /// The destination closes what it has not read: the system resets the connection, and forgets the alert.
    #[test]
    fn a_reset_before_any_answer_may_be_for_want_of_tls() {
        let (here, there) = UnixStream::pair().unwrap();
        let here = Socket::Unix(here);
        here.write(&[crate::WriteSlice::bytes(b"QEVM")]).unwrap();
        drop(there);
        let path = ReturnPath::new(Answers::new(None, true));
        let broken = path.messages(&here, |_| Ok(false)).unwrap_err();
        assert!(matches!(&broken, MigrationError::ReturnPath(error) if error.kind() == io::ErrorKind::ConnectionReset));
        let pipe = || MigrationError::Send { doing: "a page", source: io::ErrorKind::BrokenPipe.into() };
        for error in [broken, pipe()] {
            let error = error.unheard(false);
            assert!(matches!(error, MigrationError::HungUp { .. }), "{error:?}");
            assert!(error.to_string().ends_with("(set 'tls-creds' at both sides, or at neither)"), "{error}");
        }
        assert!(matches!(pipe().unheard(true), MigrationError::SessionEnded { .. }));
        // Only the destination breaks a connection.
        let full = MigrationError::Send { doing: "a page", source: io::ErrorKind::StorageFull.into() };
        assert!(matches!(full.unheard(false), MigrationError::Send { .. }));
        assert!(matches!(MigrationError::NoVerdict.unheard(false), MigrationError::NoVerdict));
    }
}
