//! Migrations over a channel that is no socket and sees every byte before it goes out.

use super::*;
use crate::testing::Sealed;
use std::io;

/// Migrates over sealed channels, of which the source's is above one with faults.
fn run(pair: &Pair, faults: Faults) -> (Outcome, Arc<Tap>) {
    let (a, b) = UnixStream::pair().unwrap();
    let writer = pair.source.clone();
    let faulty = Arc::new(Faulty::new(Socket::Unix(a), faults, move || writer.work()));
    let tap = Arc::new(Tap { inner: faulty.clone(), seen: Mutex::default() });
    let sending: Arc<dyn Channel> = Arc::new(Sealed::new(tap.clone(), 4711));
    let receiving: Arc<dyn Channel> = Arc::new(Sealed::new(Arc::new(Socket::Unix(b)), 4711));
    let (source, destination) = pair.play(sending.into(), |_| Ok(receiving.into()));
    (Outcome { source, destination, statistics: pair.job.statistics(), written: faulty.written() }, tap)
}

/// Keeps what goes over the wire.
#[derive(Debug)]
struct Tap {
    inner: Arc<Faulty>,
    seen: Mutex<Vec<u8>>,
}

impl Channel for Tap {
    fn write(&self, parts: &[WriteSlice<'_>]) -> io::Result<usize> {
        let count = self.inner.write(parts)?;
        let mut bytes = vec![0; count];
        parts[0].copy_to(&mut bytes);
        self.seen.lock().extend(bytes);
        Ok(count)
    }

    fn read(&self, parts: &mut [ReadSlice<'_>]) -> io::Result<usize> {
        self.inner.read(parts)
    }

    fn finish_writing(&self) {
        self.inner.finish_writing();
    }

    fn stop_reading(&self) {
        self.inner.stop_reading();
    }

    fn close(&self) {
        self.inner.close();
    }
}

#[test]
fn a_working_guest_moves_sealed_and_the_wire_shows_nothing_of_it() {
    for return_path in [true, false] {
        let pair = Pair::new(300).return_path(return_path);
        let (outcome, tap) = run(&pair, Faults::default());
        pair.assert_moved(&outcome);
        let seen = tap.seen.lock();
        assert!(seen.len() as u64 > outcome.statistics.ram.normal * 4096);
        for secret in [&b"microvm.ram"[..], b"QEVM", &[0; 32]] {
            assert!(!seen.windows(secret.len()).any(|bytes| bytes == secret), "{}", secret.escape_ascii());
        }
    }
}

#[test]
fn a_byte_changed_under_the_seal_leaves_the_guest_at_the_source() {
    // In the head of a record, in its sum, in what the stream begins with, and in a page.
    for place in [0, 1, 4, 9, 60_000, 200_001] {
        let pair = Pair::new(200);
        let (outcome, _) = run(&pair, Faults { flip: Some((place, 0x20)), ..Faults::default() });
        pair.assert_stayed(&outcome);
    }
}

#[test]
fn a_cut_under_the_seal_leaves_the_guest_at_the_source() {
    for place in [0, 3, 7, 60_000, 200_001] {
        let pair = Pair::new(200);
        let (outcome, _) = run(&pair, Faults { cut_at: Some(place), ..Faults::default() });
        pair.assert_stayed(&outcome);
    }
}
