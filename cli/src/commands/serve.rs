//! `qevm serve`: give the pages of an image to guests that ask for them.

use super::Output;
use crate::args;
use crate::failure::Stop;
use crate::progress::Progress;
use crate::serve::{Limits, Server};
use crate::socket::{Address, Listener};
use crate::table::count;
use qevm_inspect::bounds::Spool;
use qevm_inspect::rewrite::mapped_file::MappedFile;
use qevm_inspect::size::size;
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Map, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

/// Pause before connections are taken again when the system has no room for more.
const FULL: Duration = Duration::from_millis(200);

/// Runs the command until a signal ends it.
///
/// # Errors
/// [`Stop::Usage`] if an address cannot be used, [`Stop::Bad`] if the image is bad.
pub fn run(serve: &args::Serve) -> Result<(), Stop> {
    let addresses = serve.listen.iter().map(|text| Address::parse(text)).collect::<Result<Vec<_>, _>>()?;
    let mut inputs = serve.input.open()?;
    let mut bar = Progress::new("finding pages", inputs.main.source.total());
    let file = MappedFile::index(&mut inputs, Spool::new(serve.max_spool), &mut |offset| bar.at(offset))?;
    drop(bar);
    let cannot = |text: &str, error: io::Error| Stop::Usage(format!("{text}: cannot listen: {error}"));
    let bind = |(address, text): (&Address, &String)| Listener::bind(address).map_err(|error| cannot(text, error));
    let listeners = addresses.iter().zip(&serve.listen).map(bind).collect::<Result<Vec<_>, _>>()?;
    let limits = Limits { clients: serve.max_clients, patience: Duration::from_secs(serve.timeout) };
    let server = Server::new(file, inputs.main.name.clone(), limits);
    let ended = signals().map_err(|error| Stop::Usage(format!("signals cannot be waited for: {error}")))?;
    let uris: Vec<String> = listeners.iter().map(Listener::nbd_uri).collect();
    print(serve, &server, &uris)?;
    take(&server, &listeners, &ended)?;
    let totals = server.totals();
    let number = |of: &std::sync::atomic::AtomicU64| of.load(Ordering::Relaxed);
    let (reads, bytes) = (number(&totals.reads), number(&totals.bytes));
    eprintln!("{} clients, {} reads, {}", count(number(&totals.clients)), count(reads), size(bytes));
    Ok(())
}

/// Becomes readable when a signal asks the program to end.
fn signals() -> io::Result<UnixStream> {
    let (ended, tell) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM] {
        signal_hook::low_level::pipe::register(signal, tell.try_clone()?)?;
    }
    Ok(ended)
}

/// Accepts connections until a signal ends it.
fn take(server: &Arc<Server>, listeners: &[Listener], ended: &UnixStream) -> Result<(), Stop> {
    loop {
        let mut ready: Vec<PollFd<'_>> = listeners.iter().map(|l| PollFd::new(l, PollFlags::IN)).collect();
        ready.push(PollFd::new(ended, PollFlags::IN));
        match poll(&mut ready, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(Stop::Usage(format!("connections cannot be waited for: {error}"))),
        }
        if ready.last().is_some_and(|ended| !ended.revents().is_empty()) {
            return Ok(());
        }
        let waiting = listeners.iter().zip(&ready).filter(|(_, ready)| !ready.revents().is_empty());
        for (listener, _) in waiting {
            if server.accept(listener).is_err() {
                // A connection that broke before it was taken, or too many of them: those that wait stay.
                thread::sleep(FULL);
            }
        }
    }
}

fn print(serve: &args::Serve, server: &Server, uris: &[String]) -> Result<(), Stop> {
    let (file, mut out) = (server.file(), Output::new());
    let blocks = file.pages().blocks();
    if serve.output.json {
        let block = |block: &qevm_inspect::pages::PageBlock| json!({"name": block.name, "len": block.len});
        let mut object = Map::new();
        object.insert("listening".into(), json!(uris));
        object.insert("len".into(), json!(file.len()));
        object.insert("page_size".into(), json!(file.pages().page_size()));
        object.insert("blocks".into(), blocks.iter().map(block).collect());
        out.json(&object)?;
    } else {
        let memory: u64 = blocks.iter().map(|block| block.len).sum();
        out.line(format!("{} of memory in {} RAM blocks", size(memory), count(blocks.len() as u64)))?;
        uris.iter().try_for_each(|uri| out.line(format!("listening at {uri}")))?;
    }
    out.finish()
}
