//! Connections of callers that are no migration.

use super::scene::PATIENCE;
use crate::network::{Network, PORT};
use crate::process::run;
use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::io::Write;
use std::net::TcpStream;
use std::process::Command;
use std::thread;
use std::time::Duration;

/// First bytes of what calls at a port that is open.
const GARBAGE: [&[u8]; 6] = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
    b"LibvirtQemudSave\x02\x00\x00\x00",
    b"garbage",
    b"Q",
];

/// Runs `body` with the network of the source.
pub(super) fn at_source<T: Send>(network: &Network, body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = format!("/run/netns/{}", network.source());
    // A thread of its own, as a thread cannot be trusted to come back.
    thread::scope(|scope| {
        let entered = scope.spawn(|| {
            let file = File::open(&namespace).with_context(|| format!("opening {namespace}"))?;
            setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("entering {namespace}"))?;
            body()
        });
        entered.join().map_err(|_| anyhow!("a thread panicked"))?
    })
}

/// Callers that say nothing, and stay for as long as they are kept.
pub(super) fn idle(network: &Network, count: usize) -> Result<Vec<TcpStream>> {
    let address = (network.address(), PORT);
    at_source(network, || {
        let connect = |n| TcpStream::connect(address).with_context(|| format!("idle connection {n} of {count}"));
        (0..count).map(connect).collect()
    })
}

/// Callers that come and go, one after the other, as a port scan does.
pub(super) fn scan(network: &Network, count: usize) -> Result<()> {
    idle(network, 1)?;
    for _ in 1..count {
        // A destination that ends at the first one is not there for the second.
        let _ = idle(network, 1);
    }
    Ok(())
}

/// One caller for every kind of wrong first bytes; they stay for as long as they are kept.
pub(super) fn garbage(network: &Network) -> Result<Vec<TcpStream>> {
    let address = (network.address(), PORT);
    at_source(network, || {
        let mut callers = Vec::new();
        for bytes in GARBAGE {
            let Ok(mut caller) = TcpStream::connect(address) else { break };
            // It may be thrown out while it speaks.
            let _ = caller.write_all(bytes);
            callers.push(caller);
        }
        ensure!(!callers.is_empty(), "it does not listen");
        Ok(callers)
    })
}

/// A caller that begins as a source does, and stops there.
pub(super) fn second_source(network: &Network) -> Result<Option<TcpStream>> {
    let address = (network.address(), PORT);
    at_source(network, || {
        let caller = TcpStream::connect_timeout(&address_of(address)?, Duration::from_secs(3));
        // A destination that listens no more is as good.
        let Ok(mut caller) = caller else { return Ok(None) };
        let _ = caller.write_all(b"QEVM\x00\x00\x00\x03");
        Ok(Some(caller))
    })
}

fn address_of((host, port): (&str, u16)) -> Result<std::net::SocketAddr> {
    format!("{host}:{port}").parse().context("an address")
}

/// A destination that reads, says nothing and resets the connection after some seconds.
pub(super) fn reads_and_resets(network: &Network, port: u16) -> Result<thread::JoinHandle<Result<u64>>> {
    use std::io::Read;
    let namespace = format!("/run/netns/{}", network.destination());
    let (tell, told) = std::sync::mpsc::channel();
    let reader = thread::spawn(move || {
        let file = File::open(&namespace).with_context(|| format!("opening {namespace}"))?;
        setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("entering {namespace}"))?;
        let listener = std::net::TcpListener::bind(("0.0.0.0", port))?;
        let _ = tell.send(());
        let (mut source, _) = listener.accept()?;
        let (mut count, mut chunk) = (0, vec![0; 1 << 20]);
        source.set_read_timeout(Some(Duration::from_secs(3)))?;
        let until = std::time::Instant::now() + Duration::from_secs(5);
        while std::time::Instant::now() < until
            && let Ok(read @ 1..) = source.read(&mut chunk)
        {
            count += read as u64;
        }
        nix::sys::socket::setsockopt(
            &source,
            nix::sys::socket::sockopt::Linger,
            &nix::libc::linger { l_onoff: 1, l_linger: 0 },
        )?;
        Ok(count)
    });
    told.recv_timeout(PATIENCE).context("the listener did not come up")?;
    Ok(reader)
}

/// Leaves a process no more descriptors than it has, and `spare`.
pub(super) fn limit_descriptors(pid: u32, spare: usize) -> Result<()> {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    let limit = format!("--nofile={0}:{0}", open + spare);
    run(Command::new("prlimit").args(["--pid", &pid.to_string(), &limit]), PATIENCE).map(drop)
}

/// Leaves a process no more memory than it has.
pub(super) fn limit_memory(pid: u32) -> Result<()> {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages: u64 = statm.split(' ').next().and_then(|pages| pages.parse().ok()).context("no size in statm")?;
    let limit = format!("--as={0}:{0}", pages * 4096);
    run(Command::new("prlimit").args(["--pid", &pid.to_string(), &limit]), PATIENCE).map(drop)
}
