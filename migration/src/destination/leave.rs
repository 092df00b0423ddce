//! Letting go of a source.

use crate::channel::ReadSlice;
use crate::core::destination::{Action, Destination, Turn};
use crate::{Channel, MigrationError};
use qevm_returnpath::Message;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Tells the source of a failure, and gives it time to read that and to close: a socket that is closed while something
/// unread arrives takes back what it has said, and the source would know of a broken pipe only.
pub(crate) fn leave(
    core: &mut Destination,
    channel: &dyn Channel,
    start: Instant,
    error: &MigrationError,
    send: impl Fn(&Message),
) {
    core.time(start.elapsed());
    core.fail(error);
    while let Ok(Turn { action, .. }) = core.next(&[]) {
        match action {
            Action::Send(message) => send(&message),
            Action::Linger { until } => {
                channel.finish_writing();
                let patience = until.saturating_sub(start.elapsed());
                within(patience, channel, || {
                    let mut unread = vec![0; 64 << 10];
                    while channel.read(&mut [ReadSlice::bytes(&mut unread)]).is_ok_and(|count| count > 0) {}
                });
                core.end_of_input();
            }
            _ => break,
        }
    }
    if !matches!(error, MigrationError::Undecided(_)) {
        channel.finish_writing();
    }
}

/// Does something that reads from `main`, which reads no more when `patience` is over.
pub(crate) fn within<T>(patience: Duration, main: &dyn Channel, read: impl FnOnce() -> T) -> T {
    let (done, wait) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watch = thread::Builder::new().spawn_scoped(scope, move || {
            if wait.recv_timeout(patience) == Err(mpsc::RecvTimeoutError::Timeout) {
                main.stop_reading();
            }
        });
        if watch.is_err() {
            // Without a thread that watches, this one may not wait.
            main.stop_reading();
        }
        let result = read();
        drop(done);
        result
    })
}
