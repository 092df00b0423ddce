//! Sockets that only the owner of the process can reach, for guest memory and whatever leads to it.

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;

/// Connections that may wait to be accepted, as std has it.
const BACKLOG: i32 = 128;

/// A socket at `path` to which only its owner can connect, whatever the umask is.
///
/// # Errors
/// The system's.
pub fn listener(path: &Path) -> io::Result<UnixListener> {
    let socket = bound(path, SocketType::STREAM)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// A socket at `path` to which only its owner can send, whatever the umask is.
///
/// # Errors
/// The system's.
pub fn datagram(path: &Path) -> io::Result<UnixDatagram> {
    Ok(bound(path, SocketType::DGRAM)?.into())
}

fn bound(path: &Path, kind: SocketType) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    // The file takes over the mode that the socket has now: it never has another.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::umask;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn sockets_are_their_owners_alone() {
        let directory = tempfile::tempdir().unwrap();
        let (stream, frames) = (directory.path().join("s"), directory.path().join("d"));
        // Other tests make files in directories of their own, which no other test sees.
        let before = umask(Mode::empty());
        let (listener, datagram) = (listener(&stream), datagram(&frames));
        umask(before);
        let (_listener, _datagram) = (listener.unwrap(), datagram.unwrap());
        for path in [stream, frames] {
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
        }
    }
}
