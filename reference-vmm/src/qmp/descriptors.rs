//! The commands for descriptors that a client sends along (`SCM_RIGHTS`), and their way through the socket.

use super::arguments::{Arguments, empty, finish};
use super::protocol::Failure;
use crate::descriptors::BadDescriptor;
use crate::vmm::Vmm;
use rustix::io::retry_on_intr;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// Most descriptors that are taken with one piece of what a client says (QEMU 11.1).
const MOST: usize = 16;

impl From<BadDescriptor> for Failure {
    fn from(bad: BadDescriptor) -> Failure {
        Failure::generic(bad.to_string())
    }
}

pub(super) fn getfd(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let name = arguments.text("fdname")?;
    finish(arguments)?;
    vmm.descriptors().name(&name)?;
    Ok(empty())
}

pub(super) fn closefd(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let name = arguments.text("fdname")?;
    finish(arguments)?;
    vmm.descriptors().close(&name)?;
    Ok(empty())
}

pub(super) fn add_fd(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let (set, opaque) = (arguments.optional_integer("fdset-id")?, arguments.optional_text("opaque")?);
    finish(arguments)?;
    let (set, fd) = vmm.descriptors().add(set, opaque)?;
    Ok(json!({ "fdset-id": set, "fd": fd }))
}

pub(super) fn remove_fd(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let (set, fd) = (arguments.integer("fdset-id")?, arguments.optional_integer("fd")?);
    finish(arguments)?;
    vmm.descriptors().remove(set, fd)?;
    Ok(empty())
}

pub(super) fn query_fdsets(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
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
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut part = [IoSliceMut::new(buffer)];
    let count = retry_on_intr(|| recvmsg(client, &mut part, &mut control, RecvFlags::CMSG_CLOEXEC))?.bytes;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
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
