//! Output that never blocks its writer: a bounded buffer, and a thread that empties it.
//!
//! What a guest or a peer causes to be written (a serial port, the log) goes to a pipe that may not be read, or to a
//! disk that hangs. The descriptor itself stays blocking: `O_NONBLOCK` would belong to every process that shares it, a
//! terminal's shell too.

use parking_lot::{Condvar, Mutex, MutexGuard};
use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// A bounded buffer that a thread writes out. Clones share it; the thread ends with the last of them, when all is
/// written.
#[derive(Clone)]
pub(crate) struct NonBlockingWriter(Arc<Handle>);

struct Handle(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    capacity: usize,
}

#[derive(Default)]
struct State {
    buffer: Vec<u8>,
    /// The thread is writing what was in the buffer before.
    writing: bool,
    /// A reader found too little room.
    room_wanted: bool,
    /// There are no writers any more.
    closed: bool,
}

impl NonBlockingWriter {
    /// Starts the thread. `failed` is told what the sink refuses, and `room` when there is room again after
    /// [`write`](Self::write) has not taken everything. Both are called by the thread, which holds no lock then.
    ///
    /// # Errors
    /// The host has no thread for it.
    pub(crate) fn start(
        capacity: usize,
        sink: Box<dyn Write + Send>,
        failed: impl Fn(io::Error) + Send + 'static,
        room: impl Fn() + Send + 'static,
    ) -> io::Result<NonBlockingWriter> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), capacity });
        let theirs = Arc::clone(&shared);
        thread::Builder::new().name("writer".into()).spawn(move || theirs.write_out(sink, failed, room))?;
        Ok(NonBlockingWriter(Arc::new(Handle(shared))))
    }

    fn shared(&self) -> &Shared {
        &self.0.0
    }

    /// Bytes that are taken at once. Where there are fewer than `wanted`, the writer is told when there is room again.
    pub(crate) fn room(&self, wanted: usize) -> usize {
        let mut state = self.shared().lock();
        let room = self.shared().capacity.saturating_sub(state.buffer.len());
        state.room_wanted |= room < wanted;
        room
    }

    /// Takes as many bytes as there is room for, and says how many.
    pub(crate) fn write(&self, bytes: &[u8]) -> usize {
        let mut state = self.shared().lock();
        let taken = bytes.len().min(self.shared().capacity.saturating_sub(state.buffer.len()));
        state.room_wanted |= taken < bytes.len();
        state.buffer.extend_from_slice(&bytes[..taken]);
        self.shared().changed.notify_all();
        taken
    }

    /// Takes all of the bytes or, if there is no room for them, none.
    pub(crate) fn write_whole(&self, bytes: &[u8]) -> bool {
        let mut state = self.shared().lock();
        let fits = state.buffer.len() + bytes.len() <= self.shared().capacity;
        if fits {
            state.buffer.extend_from_slice(bytes);
            self.shared().changed.notify_all();
        }
        fits
    }

    /// Waits until all is written, at most that long. False: it is not.
    pub(crate) fn flush(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut state = self.shared().lock();
        while state.writing || !state.buffer.is_empty() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            self.shared().changed.wait_for(&mut state, left);
        }
        true
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn write_out(&self, mut sink: Box<dyn Write + Send>, failed: impl Fn(io::Error), room: impl Fn()) {
        let mut state = self.lock();
        loop {
            while state.buffer.is_empty() && !state.closed {
                self.changed.wait(&mut state);
            }
            let bytes = std::mem::take(&mut state.buffer);
            if bytes.is_empty() {
                return;
            }
            state.writing = true;
            let room_wanted = std::mem::take(&mut state.room_wanted);
            drop(state);
            if room_wanted {
                room();
            }
            if let Err(error) = sink.write_all(&bytes).and_then(|()| sink.flush()) {
                failed(error);
            }
            state = self.lock();
            state.writing = false;
            self.changed.notify_all();
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.changed.notify_all();
    }
}

impl fmt::Debug for NonBlockingWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NonBlockingWriter({} bytes)", self.shared().capacity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::sync::mpsc;

    #[test]
    fn output_that_is_not_read_is_not_waited_for() {
        let (mut reader, pipe) = io::pipe().unwrap();
        let (told, room) = mpsc::channel();
        let writer =
            NonBlockingWriter::start(100, Box::new(pipe), |_| (), move || told.send(()).unwrap_or_default()).unwrap();
        // The pipe takes 64 KiB; then the buffer fills, and then nothing is taken any more.
        let mut taken = 0;
        while taken < 32 << 10 || writer.flush(Duration::from_millis(20)) {
            taken += writer.write(&[b'a'; 100]);
        }
        while let count @ 1.. = writer.write(&[b'a'; 100]) {
            taken += count;
        }
        assert_eq!((writer.room(1), writer.write_whole(b"x")), (0, false));
        while room.try_recv().is_ok() {}
        let mut all = Vec::new();
        let reading = thread::spawn(move || reader.read_to_end(&mut all).map(|_| all));
        room.recv_timeout(Duration::from_secs(60)).expect("it is told of the room");
        assert!(writer.flush(Duration::from_secs(60)));
        assert!(writer.write_whole(b"end"));
        drop(writer);
        let all = reading.join().unwrap().unwrap();
        assert_eq!((all.len(), &all[taken..]), (taken + 3, &b"end"[..]));
    }

    #[test]
    fn a_sink_that_fails_is_told_of() {
        let (reader, pipe) = io::pipe().unwrap();
        drop(reader);
        let (told, errors) = mpsc::channel();
        let writer =
            NonBlockingWriter::start(100, Box::new(pipe), move |error| told.send(error.kind()).unwrap(), || ())
                .unwrap();
        writer.write(b"x");
        assert_eq!(errors.recv_timeout(Duration::from_secs(60)), Ok(io::ErrorKind::BrokenPipe));
        assert!(writer.flush(Duration::from_secs(60)));
    }
}
