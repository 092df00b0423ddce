use super::*;
use crate::drive::tests::{Records, stream};
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::future::Future;
use core::pin::pin;
use core::task::Waker;
use proptest::prelude::*;
use std::io::Read;

/// Gives its bytes in pieces of these sizes, by turns, and makes the reader wait before each.
struct Pieces<'b> {
    bytes: &'b [u8],
    sizes: Vec<usize>,
    turn: usize,
    waited: bool,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.waited = !self.waited;
        if self.waited {
            return Poll::Pending;
        }
        let size = self.sizes[self.turn % self.sizes.len()].min(into.remaining()).min(self.bytes.len());
        self.turn += 1;
        let (now, later) = self.bytes.split_at(size);
        into.put_slice(now);
        self.bytes = later;
        Poll::Ready(Ok(()))
    }
}

fn once<F: Future>(future: F) -> Poll<F::Output> {
    pin!(future).poll(&mut Context::from_waker(Waker::noop()))
}

/// What is read: the marks with what was read of their payloads, and how it ends.
type Seen = (Vec<(u8, u64, Vec<u8>)>, Result<(), String>);

fn blocking(bytes: &[u8], read: &[usize]) -> Seen {
    let mut driver = Driver::new(bytes, Records::default());
    let (mut seen, mut read) = (Vec::new(), read.iter().cycle());
    loop {
        let (mark, len) = match driver.next() {
            Ok(Some((mark, len))) => (mark[0], len),
            Ok(None) => return (seen, Ok(())),
            Err(error) => return (seen, Err(error.to_string())),
        };
        let mut some = Vec::new();
        Read::take(driver.payload(), *read.next().unwrap() as u64).read_to_end(&mut some).unwrap();
        seen.push((mark, len, some));
    }
}

/// Every future is dropped as soon as it has to wait.
fn cancelled(bytes: &[u8], read: &[usize], sizes: Vec<usize>) -> Seen {
    let mut driver = AsyncDriver::new(Pieces { bytes, sizes, turn: 0, waited: false }, Records::default());
    let (mut seen, mut read) = (Vec::new(), read.iter().cycle());
    loop {
        let (mark, len) = loop {
            match once(driver.next()) {
                Poll::Pending => {}
                Poll::Ready(Ok(Some((mark, len)))) => break (mark[0], len),
                Poll::Ready(Ok(None)) => return (seen, Ok(())),
                Poll::Ready(Err(error)) => return (seen, Err(error.to_string())),
            }
        };
        let mut some = vec![0; *read.next().unwrap()];
        let mut have = 0;
        while have < some.len() {
            match once(driver.payload().read(&mut some[have..])) {
                Poll::Pending => {}
                Poll::Ready(Ok(0)) => break,
                Poll::Ready(Ok(count)) => have += count,
                Poll::Ready(Err(error)) => panic!("{error}"),
            }
        }
        some.truncate(have);
        seen.push((mark, len, some));
    }
}

proptest! {
    /// In whatever pieces the bytes come, wherever the stream is cut, and whatever of the payload is in the buffer
    /// already: dropped futures lose nothing, and all is as with the blocking driver.
    #[test]
    fn a_driver_that_is_cancelled_at_every_wait_reads_what_the_blocking_one_reads(
        records in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..300)), 0..12),
        sizes in prop_oneof![Just(vec![1]), prop::collection::vec(1..400usize, 1..5)],
        read in prop::collection::vec(0..400usize, 1..12),
        cut in any::<prop::sample::Index>(),
        whole in any::<bool>(),
    ) {
        let bytes = stream(&records);
        let bytes = if whole { &bytes[..] } else { &bytes[..cut.index(bytes.len() + 1)] };
        let expected = blocking(bytes, &read);
        prop_assert!(!whole || expected.0.len() == records.len() && expected.1.is_ok());
        prop_assert_eq!(cancelled(bytes, &read, sizes), expected);
    }
}

/// On a runtime, over what is written while it is read.
#[test]
fn payload_comes_from_the_buffer_and_then_from_the_input() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let payload = vec![7; 60_000];
        let bytes = stream(&[(1, payload.clone()), (2, vec![])]);
        let (mut near, far) = tokio::io::duplex(1000);
        let write = async {
            tokio::io::AsyncWriteExt::write_all(&mut near, &bytes).await.unwrap();
            drop(near);
        };
        let read = async {
            let mut driver = AsyncDriver::new(far, Records::default());
            assert_eq!(driver.next().await.unwrap(), Some((&[1][..], 60_000)));
            let there = driver.buffered().len();
            assert!(there > 0 && there < 60_000, "{there}");
            let mut read = Vec::new();
            driver.payload().read_to_end(&mut read).await.unwrap();
            assert_eq!(read, payload);
            assert_eq!(driver.next().await.unwrap(), Some((&[2][..], 0)));
            assert!(driver.next().await.unwrap().is_none());
        };
        tokio::join!(write, read);
    });
}

#[test]
fn bytes_that_are_taken_out_of_step_are_the_callers_fault() {
    let bytes = stream(&[(7, vec![1; 10]), (8, vec![])]);
    for told in [false, true] {
        let mut driver = AsyncDriver::new(&bytes[..], Records::default());
        assert!(matches!(once(driver.next()), Poll::Ready(Ok(Some(_)))));
        match told {
            true => driver.decoder_mut().skip_payload(10).unwrap(),
            false => driver.consume(1),
        }
        for _ in 0..2 {
            let Poll::Ready(Err(error)) = once(driver.next()) else { panic!("it goes on") };
            assert!(matches!(error, DriveError::OutOfStep { .. }), "{error}");
            assert_eq!(error.fault(), Some(crate::Fault::Misuse));
        }
    }
}
