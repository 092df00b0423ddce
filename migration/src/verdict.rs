//! The destination's last word, and whether the source has it.
//!
//! A source with a return path runs the guest on unless it is told, by SHUT 0, that the guest has arrived. If that
//! message is lost, the guest runs at the source; a destination that has started it all the same runs it a second time.
//! So the guest is started only when the message was written without error, the peer's kernel has acknowledged it, and
//! the connection was not reset. That takes one round trip. In every other case the guest stays paused here, and the
//! operator is told what to look at: [`Doubt`].
//!
//! An acknowledgement comes from what is at the other end of the connection. A proxy that acknowledges the message
//! and dies with it cannot be told from a source that has read it: see `docs/peer.md`.

use super::Channel;
use super::channel::{WriteSlice, write_all};
use qevm_returnpath::Message;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// How long the source's host may take to acknowledge the last word, and the source to confirm it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How often the kernel is asked whether the last word was acknowledged: at first as often as a short round trip is
/// long…
const FIRST_POLL: Duration = Duration::from_micros(20);
/// …and then less and less.
const LONGEST_POLL: Duration = Duration::from_millis(2);

/// Why it is not certain that the source leaves the guest to the destination, which has all of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Doubt {
    /// The source closed the connection, or reset it, before it was told.
    #[error("the source has closed the connection before it was told that the guest has arrived")]
    SourceLeft,
    /// The last word could not be sent, or the connection was reset under way.
    #[error("the source could not be told that the guest has arrived: {0}")]
    NotTold(io::Error),
    /// The last word was sent, and the source's host has not acknowledged it.
    #[error("the source's host has not acknowledged within {} s that the guest has arrived", .0.as_secs())]
    NotAcknowledged(Duration),
    /// The source, a reference-vmm, was told, and has not confirmed that it will not run the guest again.
    #[error("the source did not confirm the handover")]
    NotConfirmed,
}

/// Sends the last word and waits until the source has it, as far as that can be seen.
pub(crate) fn deliver(channel: &dyn Channel, message: &Message, patience: Duration) -> Result<(), Doubt> {
    send(channel, message)?;
    let deadline = Instant::now() + patience;
    let mut poll = FIRST_POLL;
    loop {
        let on_its_way = channel.backlog().map_err(Doubt::NotTold)?;
        // After the backlog: a reset may have emptied it. An end of the connection in order is the source's answer.
        channel.is_open().map_err(Doubt::NotTold)?;
        if on_its_way == 0 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Doubt::NotAcknowledged(patience));
        }
        thread::sleep(poll);
        poll = (2 * poll).min(LONGEST_POLL);
    }
}

/// Sends the last word, to a source that is still there.
pub(crate) fn send(channel: &dyn Channel, message: &Message) -> Result<(), Doubt> {
    if !channel.is_open().map_err(Doubt::NotTold)? {
        return Err(Doubt::SourceLeft);
    }
    let bytes = message.to_bytes();
    // In two segments: a kernel acknowledges a second one as soon as it was read, but may keep the acknowledgement of a
    // single small one back for 40 ms in the hope of an answer to send along. The guest is paused for that time.
    let (head, status) = bytes.split_at(bytes.len() / 2);
    [head, status]
        .into_iter()
        .try_for_each(|part| write_all(channel, &mut [WriteSlice::bytes(part)]))
        .map_err(Doubt::NotTold)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Socket;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    const SHUT: Message = Message::Shut { status: 0 };
    const SHORT: Duration = Duration::from_millis(300);

    fn tcp() -> (TcpStream, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let source = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (source, Socket::Tcp(listener.accept().unwrap().0))
    }

    #[test]
    fn a_source_that_is_there_has_it() {
        let (mut source, destination) = tcp();
        deliver(&destination, &SHUT, PATIENCE).unwrap();
        let mut heard = [0; 8];
        source.read_exact(&mut heard).unwrap();
        assert_eq!(heard, [0, 1, 0, 4, 0, 0, 0, 0]);

        let (mut source, destination) = UnixStream::pair().unwrap();
        let reader = thread::spawn(move || {
            source.read_exact(&mut heard).unwrap();
            drop(source);
        });
        deliver(&Socket::Unix(destination), &SHUT, PATIENCE).unwrap();
        reader.join().unwrap();
    }

    /// As the answers of a source that sends most of the time: its kernel holds acknowledgements back.
    #[test]
    fn an_acknowledgement_is_not_held_back() {
        const TIMES: usize = 15;
        let mut prompt = 0;
        for _ in 0..TIMES {
            let (mut source, destination) = tcp();
            source.set_nodelay(true).unwrap();
            destination.prepare().unwrap();
            let mut heard = [0; 8];
            for _ in 0..4 {
                write_all(&destination, &mut [WriteSlice::bytes(&heard)]).unwrap();
                source.read_exact(&mut heard).unwrap();
                source.write_all(&heard).unwrap();
                destination.receive(&mut heard).unwrap();
            }
            let reader = thread::spawn(move || {
                source.read_exact(&mut heard).unwrap();
                source
            });
            let start = Instant::now();
            deliver(&destination, &SHUT, PATIENCE).unwrap();
            // Held back it takes 40 ms each time, however fast the machine is.
            prompt += usize::from(start.elapsed() < Duration::from_millis(30));
            reader.join().unwrap();
        }
        assert!(prompt > 0, "each of {TIMES} acknowledgements came late");
    }

    #[test]
    fn a_source_that_has_closed_or_shut_down_has_not() {
        let (source, destination) = tcp();
        drop(source);
        while destination.is_open().unwrap() {}
        assert!(matches!(deliver(&destination, &SHUT, SHORT), Err(Doubt::SourceLeft)));
        // As a QEMU that was cancelled: shut down, but not closed yet.
        let (source, destination) = tcp();
        source.shutdown(Shutdown::Both).unwrap();
        while destination.is_open().unwrap() {}
        assert!(matches!(deliver(&destination, &SHUT, SHORT), Err(Doubt::SourceLeft)));

        let (source, destination) = UnixStream::pair().unwrap();
        drop(source);
        assert!(matches!(deliver(&Socket::Unix(destination), &SHUT, SHORT), Err(Doubt::SourceLeft)));
    }

    #[test]
    fn a_source_that_resets_has_not() {
        let (source, destination) = tcp();
        // Closing with unread bytes is a reset.
        write_all(&destination, &mut [WriteSlice::bytes(b"unread")]).unwrap();
        while destination.backlog().unwrap() > 0 {}
        drop(source);
        let doubt = deliver(&destination, &SHUT, SHORT).unwrap_err();
        assert!(matches!(doubt, Doubt::NotTold(_) | Doubt::SourceLeft), "{doubt}");

        // The same after the last word was written, and before it was read.
        let (source, destination) = UnixStream::pair().unwrap();
        let closer = thread::spawn(move || {
            thread::sleep(SHORT / 3);
            drop(source);
        });
        let doubt = deliver(&Socket::Unix(destination), &SHUT, PATIENCE).unwrap_err();
        assert!(matches!(doubt, Doubt::NotTold(_)), "{doubt}");
        closer.join().unwrap();
    }

    #[test]
    fn a_source_that_does_not_take_it_is_waited_for_within_bounds() {
        let (_source, destination) = UnixStream::pair().unwrap();
        assert!(matches!(deliver(&Socket::Unix(destination), &SHUT, SHORT), Err(Doubt::NotAcknowledged(SHORT))));
    }
}
