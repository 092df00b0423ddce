//! Pages over the preempt channel, and callers that are not it.

use super::*;
use crate::listener::Caller;
use crate::postcopy::PreemptListener;
use crate::{Incoming, Socket};
use qevm_savevm::StreamWriter;
use std::os::unix::net::UnixListener;

/// The source's end of the preempt channel.
struct Urgent {
    stream: StreamWriter,
    socket: UnixStream,
}

impl Urgent {
    fn call(peer: &Peer, path: &Path) -> Urgent {
        Urgent { stream: peer.stream.preempt_writer(), socket: UnixStream::connect(path).unwrap() }
    }

    fn pages(&mut self, pages: &[(u64, u8)]) {
        self.put(pages);
        self.send();
    }

    fn put(&mut self, pages: &[(u64, u8)]) {
        for (page, content) in pages {
            match content {
                0 => self.stream.zero_page(BlockId(0), page * PAGE).unwrap(),
                content => self.stream.page(BlockId(0), page * PAGE, &[*content; PAGE as usize]).unwrap(),
            }
        }
    }

    fn send(&mut self) {
        self.socket.write_all(&self.stream.take()).unwrap();
    }
}

/// As [`arrive`], where others may call at `listener`, and `waiting` have.
fn arrive_with(
    guest: &Late,
    there: Arc<dyn Channel>,
    listener: Listener,
    waiting: Vec<UnixStream>,
    job: &Job,
) -> Result<Arrival, MigrationError> {
    let both = [("postcopy-ram", true), ("postcopy-preempt", true), ("return-path", true)];
    job.set_capabilities(Capabilities::default().with(both).unwrap()).unwrap();
    job.begin().unwrap();
    let waiting = waiting.into_iter().map(|socket| (Socket::Unix(socket), None, Caller::Unix));
    listener.set_nonblocking().unwrap();
    let preempt = Some(PreemptListener::new(listener, Caller::Unix, waiting, None, Arc::default()));
    let profile = Profile::new(QemuVersion::NEWEST, "microvm");
    receive(guest, Incoming { preempt, ..there.into() }, job, &profile)
}

/// Whether the destination has dropped a connection.
fn is_dropped(mut socket: &UnixStream) {
    socket.set_read_timeout(Some(LONG)).unwrap();
    // One that was dropped with something unread is reset.
    let read = io::Read::read(&mut socket, &mut [0]);
    assert!(
        matches!(&read, Ok(0)) || read.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset),
        "{read:?}"
    );
}

/// The rest of the pages, which come in the background.
fn others(here: &[u64]) -> Vec<(u64, u8)> {
    (0..PAGES).filter(|page| !here.contains(page)).map(|page| (page, 1)).collect()
}

/// Both orders: a 7.2 calls before its main channel says anything, and ends with EOS; a newer source calls when the
/// guest goes.
#[test]
fn pages_come_over_either_channel_and_strangers_count_for_nothing() {
    for early in [true, false] {
        let guest = Late { looks_at: vec![9], ..Late::new(PAGE) };
        let (mut peer, there) = Peer::new();
        let (job, folder) = (Job::default(), tempfile::tempdir().unwrap());
        let path = folder.path().join("socket");
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            let (guest, job, at) = (&guest, &job, listener(&path));
            let arriving = scope.spawn(move || at_source(arrive_with(guest, there, at, vec![theirs], job).unwrap()));
            let strangers: Vec<_> = [&b""[..], b"GET / HTTP/1.1\r\n\r\n", b"QEVM\0\0\0\x03\x07", &[0; 300], &[0xff; 9]]
                .map(|said| {
                    let mut socket = UnixStream::connect(&path).unwrap();
                    socket.write_all(said).unwrap();
                    socket
                })
                .into();
            peer.begin(&[(5, 5)], &[6]);
            let mut urgent = match early {
                true => Urgent { stream: peer.stream.preempt_writer(), socket: ours },
                false => Urgent::call(&peer, &path),
            };
            // A connection that only ends is not it, nor one that sends a page of another block, nor one that comes
            // after it.
            let (mut ended, mut other) = (UnixStream::connect(&path).unwrap(), UnixStream::connect(&path).unwrap());
            ended.write_all(&0x10_u64.to_be_bytes()).unwrap();
            other.write_all(b"\0\0\0\0\0\0\x10\x08\x04disk").unwrap();
            peer.package();
            peer.hear_both(4, 9);
            urgent.pages(&[(9, 90)]);
            let rest = arriving.join().unwrap();
            assert_eq!(*guest.found.lock(), [Some(90)]);
            strangers.iter().chain([&ended, &other]).for_each(is_dropped);
            assert!(UnixStream::connect(&path).is_err(), "no connection is waited for any more");

            // Each channel knows its own last block, and a page counts once, over whichever it comes first.
            peer.pages(&[(20, 20), (21, 21)]);
            urgent.pages(&[(22, 22), (23, 0)]);
            guest.memory.wait_for(23);
            peer.pages(&[(22, 99), (24, 24)]);
            guest.memory.wait_for(24);
            urgent.pages(&[(24, 99), (20, 99), (25, 25)]);
            guest.memory.wait_for(25);
            // The main channel may end before the last of them is there.
            peer.pages(&others(&[5, 9, 20, 21, 22, 23, 24, 25, 40, 41]));
            peer.end();
            guest.memory.wait_for(63);
            urgent.put(&[(40, 40), (41, 41)]);
            if early {
                // With the last pages: a destination that has all of them may have closed.
                urgent.stream.eos().unwrap();
            }
            urgent.send();
            if early {
                drop(urgent);
            }
            rest.load(job).unwrap();
            while !matches!(peer.hear(), Some(Message::Shut { status })  if status == 0) {}
            let found = [20, 21, 22, 23, 24, 25, 40, 41].map(|page| guest.memory.wait_for(page));
            assert_eq!(found, [20, 21, 22, 0, 24, 25, 40, 41].map(Some));
        });
    }
}

/// What was on it is lost, and only the source knows what that was.
#[test]
fn a_preempt_channel_that_fails_pauses_the_postcopy_and_the_next_source_has_another() {
    let guest = Late::new(PAGE);
    let (mut peer, there) = Peer::new();
    let (job, folder) = (Job::default(), tempfile::tempdir().unwrap());
    let path = folder.path().join("socket");
    thread::scope(|scope| {
        let (guest, job, at) = (&guest, &job, listener(&path));
        let arriving = scope.spawn(move || at_source(arrive_with(guest, there, at, Vec::new(), job).unwrap()));
        peer.begin(&[(5, 5)], &[6]);
        let mut urgent = Urgent::call(&peer, &path);
        peer.package();
        let rest = arriving.join().unwrap();
        let recovery = rest.recovery();
        let loading = scope.spawn(|| rest.load(job));
        urgent.pages(&[(9, 9)]);
        guest.memory.wait_for(9);
        let mut here = vec![5, 9];
        for (cut, page) in [(0, 30), (1, 31), (2, 32), (3, 33)] {
            match cut {
                // Half a page.
                0 => {
                    urgent.stream.page(BlockId(0), 50 * PAGE, &[50; PAGE as usize]).unwrap();
                    urgent.socket.write_all(&urgent.stream.take()[..2000]).unwrap();
                    urgent.socket.shutdown(Shutdown::Both).unwrap();
                }
                // Nonsense.
                1 => urgent.socket.write_all(&[0x77; 9]).unwrap(),
                2 => recovery.pause().unwrap(),
                // The source says that it has sent everything, and ends both.
                _ => {
                    peer.pages(&others(&[&here[..], &[50]].concat()));
                    peer.end();
                    urgent.socket.shutdown(Shutdown::Both).unwrap();
                    here = (0..PAGES).filter(|page| *page != 50).collect();
                }
            }
            // The source's other connection is closed, too.
            while peer.hear().is_some() {}
            while !recovery.is_paused() {
                thread::yield_now();
            }
            let path = folder.path().join(format!("again{cut}"));
            recovery.accept(super::listener(&path), None).unwrap();
            let (back, bitmap) = peer.come_back(UnixStream::connect(&path).unwrap());
            let expected = here.iter().fold(0_u64, |bits, page| bits | 1 << page);
            assert_eq!(bitmap, expected.to_le_bytes(), "cut {cut}");
            peer = back;
            urgent = Urgent::call(&peer, &path);
            peer.stream.command(Command::PostcopyResume).unwrap();
            peer.flush();
            assert_eq!(peer.hear(), Some(Message::ResumeAck));
            if cut < 3 {
                urgent.pages(&[(page, 3)]);
                guest.memory.wait_for(page);
                here.push(page);
            }
        }
        urgent.pages(&[(50, 55)]);
        peer.end();
        loading.join().unwrap().unwrap();
        assert_eq!(peer.hear(), Some(Message::Shut { status: 0 }));
        assert_eq!(guest.memory.wait_for(50), Some(55));
    });
}

/// A guest whose migration does not get as far leaves no listener.
#[test]
fn there_is_no_listener_when_the_migration_is_over() {
    let guest = Late::new(PAGE);
    let (mut peer, there) = Peer::new();
    let (job, folder) = (Job::default(), tempfile::tempdir().unwrap());
    let path = folder.path().join("socket");
    let (mut first, theirs) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let (guest, job, at) = (&guest, &job, listener(&path));
        let arriving = scope.spawn(move || arrive_with(guest, there, at, vec![theirs], job));
        peer.begin(&[(5, 5)], &[6]);
        let second = UnixStream::connect(&path).unwrap();
        first.write_all(b"what it says was not heard").unwrap();
        drop(peer);
        arriving.join().unwrap().unwrap_err();
        [&first, &second].into_iter().for_each(is_dropped);
        assert!(!path.exists());
        // The port is free again.
        UnixListener::bind(&path).unwrap();
    });
}
