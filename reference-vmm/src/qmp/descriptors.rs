//! The commands for descriptors that a client sends along (`SCM_RIGHTS`), and their way through the socket.

use super::{
    arguments::Arguments,
    commands::{empty, only},
    protocol::Failure,
};
use crate::{descriptors::BadDescriptor, vmm::Vmm};
use serde_json::{Value, json};
use std::{
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

/// Most descriptors that are taken with one piece of what a client says (QEMU 11.1).
const MOST: usize = 16;

impl From<BadDescriptor> for Failure {
    fn from(bad: BadDescriptor) -> Failure {
        Failure::generic(bad.to_string())
    }
}

pub(super) fn getfd(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let name = arguments.text("fdname")?;
    only(arguments)?;
    vmm.descriptors().name(&name)?;
    Ok(empty())
}

pub(super) fn closefd(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let name = arguments.text("fdname")?;
    only(arguments)?;
    vmm.descriptors().close(&name)?;
    Ok(empty())
}

pub(super) fn add_fd(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let (set, opaque) = (arguments.optional_integer("fdset-id")?, arguments.optional_text("opaque")?);
    only(arguments)?;
    let (set, fd) = vmm.descriptors().add(set, opaque)?;
    Ok(json!({ "fdset-id": set, "fd": fd }))
}

pub(super) fn remove_fd(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let (set, fd) = (arguments.integer("fdset-id")?, arguments.optional_integer("fd")?);
    only(arguments)?;
    vmm.descriptors().remove(set, fd)?;
    Ok(empty())
}

pub(super) fn query_fdsets(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    let member = |(fd, opaque): (RawFd, Option<&str>)| {
        let mut member = json!({ "fd": fd });
        if let Some(opaque) = opaque {
            member["opaque"] = opaque.into();
        }
        member
    };
    let descriptors = vmm.descriptors();
    let set = |(set, members): (u32, &[crate::descriptors::Member])| {
        let members = members.iter().map(|m| member((m.fd.as_raw_fd(), m.opaque.as_deref())));
        json!({ "fdset-id": set, "fds": members.collect::<Value>() })
    };
    Ok(descriptors.sets().map(set).collect())
}

/// Reads what a client says, and takes the descriptors that it has sent along.
pub(super) fn read(client: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    // In words, for the alignment of the headers.
    let mut control = [0_u64; 32];
    const _: () = assert!(size_of::<libc::cmsghdr>() + MOST * size_of::<RawFd>() <= 32 * size_of::<u64>());
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut message = libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: &raw mut part,
        msg_iovlen: 1,
        msg_control: control.as_mut_ptr().cast(),
        msg_controllen: size_of::<libc::cmsghdr>() + MOST * size_of::<RawFd>(),
        msg_flags: 0,
    };
    let count = loop {
        // SAFETY: all that the message points to is writable, and as long as it says.
        let count = unsafe { libc::recvmsg(client.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        match usize::try_from(count) {
            Ok(count) => break count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    };
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has filled the message in.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: the header lies within the control buffer, which the kernel has filled in.
        let (level, kind, len) = unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len) };
        if (level, kind) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: a number for arithmetic only.
            let bytes = len.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
            for index in 0..bytes / size_of::<RawFd>() {
                // SAFETY: so many descriptors follow the header, each of them new and ours.
                let fd = unsafe {
                    OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().add(index).read_unaligned())
                };
                descriptors.push(fd);
            }
        }
        // SAFETY: as for the first.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok((count, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    #[test]
    fn descriptors_come_with_bytes() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        a.send_with_fds(&[&b"hello"[..]], &[file.as_raw_fd(), a.as_raw_fd()]).unwrap();
        let mut buffer = [0; 16];
        let (count, descriptors) = read(&b, &mut buffer).unwrap();
        assert_eq!((&buffer[..count], descriptors.len()), (&b"hello"[..], 2));
        assert!(descriptors.iter().all(|fd| fd.as_raw_fd() != file.as_raw_fd()));
        drop(a);
        drop(descriptors);
        assert_eq!(read(&b, &mut buffer).unwrap().0, 0);
    }
}
