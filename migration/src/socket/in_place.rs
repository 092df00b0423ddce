//! Memory that the kernel sends without copying it first (`MSG_ZEROCOPY`, Linux 4.14), and its word that it has.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use socket2::SockRef;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// The word comes from `MSG_ZEROCOPY` (`SO_EE_ORIGIN_ZEROCOPY` of `linux/errqueue.h`)…
const ORIGIN_ZEROCOPY: u8 = 5;
/// …and what was sent had been copied (`SO_EE_CODE_ZEROCOPY_COPIED`).
const ZEROCOPY_COPIED: u8 = 1;

/// Lets a socket take [`MSG_ZEROCOPY`](libc::MSG_ZEROCOPY).
pub(super) fn turn_on(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    let len = mem::size_of_val(&on) as libc::socklen_t;
    // SAFETY: the value is an int of that length, which the kernel reads.
    match unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, (&raw const on).cast(), len)
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What the kernel says of calls that it is done with, in the control part of a message.
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    error: libc::sock_extended_err,
    /// The address after it, which says nothing here.
    rest: [u64; 8],
}

/// Waits at most `patience` until the kernel is done with some calls: how many, and whether it copied what they sent.
pub(super) fn completed(socket: BorrowedFd<'_>, patience: Duration) -> io::Result<(u32, bool)> {
    loop {
        // SAFETY: integers alone, of which all zeroes is a value.
        let mut control: Control = unsafe { mem::zeroed() };
        let mut message = libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: std::ptr::null_mut(),
            msg_iovlen: 0,
            msg_control: (&raw mut control).cast(),
            msg_controllen: mem::size_of::<Control>(),
            msg_flags: 0,
        };
        // SAFETY: the control part is as long as it says, and there is no other.
        let received =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) };
        if received >= 0 {
            let error = &control.error;
            let of_zerocopy = message.msg_controllen >= mem::size_of::<libc::cmsghdr>() + mem::size_of_val(error)
                && error.ee_origin == ORIGIN_ZEROCOPY;
            if !of_zerocopy {
                // Some other message, which was not asked for.
                continue;
            }
            let count = error.ee_data.wrapping_sub(error.ee_info).wrapping_add(1);
            return Ok((count, error.ee_code == ZEROCOPY_COPIED));
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => continue,
            error if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
        // The queue of errors is polled for whatever is asked. A connection that broke has nothing in it.
        let mut entries = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
        let patience = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: patience.subsec_nanos().into() };
        match poll(&mut entries, Some(&patience)) {
            Ok(0) => return Err(io::ErrorKind::WouldBlock.into()),
            Ok(_) => {
                if let Some(error) = SockRef::from(&socket).take_error()? {
                    return Err(error);
                }
                if entries[0].revents().contains(PollFlags::HUP) {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Socket;
    use crate::Channel;
    use crate::channel::WriteSlice;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::{Duration, Instant};

    fn pair() -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Socket::Tcp(here), listener.accept().unwrap().0)
    }

    #[test]
    fn every_call_is_told_of_once() {
        let (here, mut there) = pair();
        here.send_in_place().unwrap();
        let bytes: Vec<u8> = (0..1 << 20).map(|i: u32| (i * 7 / 3) as u8).collect();
        let reader = thread::spawn(move || {
            let mut all = Vec::new();
            there.read_to_end(&mut all).unwrap();
            all
        });
        let (mut at, mut calls, mut done, mut copied) = (0, 0, 0, false);
        while at < bytes.len() {
            at += here.write_in_place(&[WriteSlice::bytes(&bytes[at..])]).unwrap();
            calls += 1;
        }
        while done < calls {
            match here.sent_in_place() {
                Ok((count, was_copied)) => {
                    done += count;
                    copied |= was_copied;
                }
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
        assert_eq!(done, calls);
        // Within a host there is no device to hand memory over to.
        assert!(copied);
        here.finish_writing();
        assert!(reader.join().unwrap() == bytes);
    }

    #[test]
    fn a_thread_that_waits_for_a_connection_that_breaks_is_told() {
        let (here, there) = pair();
        here.send_in_place().unwrap();
        let start = Instant::now();
        assert_eq!(here.sent_in_place().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        assert!(start.elapsed() >= Duration::from_millis(200));
        here.close();
        drop(there);
        let error = (0..20).find_map(|_| match here.sent_in_place() {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
            other => Some(other.unwrap_err()),
        });
        assert_eq!(error.unwrap().kind(), std::io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_unix_socket_copies() {
        let (here, _there) = UnixStream::pair().unwrap();
        assert!(Socket::Unix(here).send_in_place().is_err());
    }
}
