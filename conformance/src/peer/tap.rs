//! Tap interfaces for the monitors of a journey, and what guests send through them.

use crate::patience::PATIENCE;
use crate::process::run;
use anyhow::{Context, Result};
use nix::net::if_::if_indextoname;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Characters of a scratch folder's name that tell journeys apart; a name of an interface has 15 at most.
const MARK: usize = 6;
/// Frames may wait here while this process does something else.
const ROOM: usize = 16 << 20;

/// What all interfaces of a journey begin with.
fn prefix(scratch: &Path) -> String {
    let name = scratch.file_name().unwrap_or_default().to_string_lossy();
    let letters: Vec<char> = name.chars().filter(char::is_ascii_alphanumeric).collect();
    format!("q{}", letters[letters.len().saturating_sub(MARK)..].iter().collect::<String>())
}

/// Makes the interface for a monitor and says its name.
///
/// # Errors
/// This is not root, or there is no `/dev/net/tun`.
pub(super) fn add(scratch: &Path, monitor: &str) -> Result<String> {
    let name = format!("{}{monitor}", prefix(scratch));
    for words in [&["tuntap", "add", "dev", &name, "mode", "tap"][..], &["link", "set", &name, "up"]] {
        run(Command::new("ip").args(words), PATIENCE).context("a tap interface needs root and /dev/net/tun")?;
    }
    Ok(name)
}

/// Hears what arrives through the interfaces of a journey, and removes them when it is dropped.
#[derive(Debug)]
pub(super) struct Taps {
    socket: OwnedFd,
    prefix: String,
    /// Numbers of its interfaces that are known.
    known: Vec<usize>,
}

impl Taps {
    /// Begins to listen, before the first interface is there; `timeout` is for [`receive`](Self::receive).
    ///
    /// # Errors
    /// This is not root.
    pub(super) fn listen(scratch: &Path, timeout: Duration) -> Result<Taps> {
        let opened = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll);
        let socket = opened.context("listening to tap interfaces needs root")?;
        setsockopt(&socket, sockopt::RcvBufForce, &ROOM)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(i64::try_from(timeout.as_millis())?))?;
        Ok(Taps { socket, prefix: prefix(scratch), known: Vec::new() })
    }

    /// A frame from one of the interfaces.
    ///
    /// # Errors
    /// There is none in time, or the next is another guest's.
    pub(super) fn receive(&mut self, frame: &mut [u8]) -> std::io::Result<usize> {
        let (len, from) = recvfrom::<LinkAddr>(self.socket.as_raw_fd(), frame)?;
        let number = from.map_or(0, |address| address.ifindex());
        if !self.known.contains(&number) {
            let name = if_indextoname(u32::try_from(number).unwrap_or(0))?;
            if !name.to_bytes().starts_with(self.prefix.as_bytes()) {
                return Err(ErrorKind::WouldBlock.into());
            }
            self.known.push(number);
        }
        Ok(len)
    }
}

impl Drop for Taps {
    fn drop(&mut self) {
        let all = std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
        for name in all.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().starts_with(&self.prefix)) {
            // It goes with the monitor if that has made it.
            let _ = run(Command::new("ip").args(["link", "delete"]).arg(name), PATIENCE);
        }
    }
}
