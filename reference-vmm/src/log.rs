//! The log, on standard error or in a file. It never holds its writers up, and cannot be flooded.
//!
//! Lines go through a bounded buffer; an output that is not read costs lines, which are counted. Of the lines of one
//! place in the code [`LINES`] are shown in a second, and the rest are counted: a guest or a peer can cause most of
//! them as often as it likes.

use crate::non_blocking::NonBlockingWriter;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};
use tracing::callsite::Identifier;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Context, Filter, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// Lines of one place in the code that are shown in a second.
const LINES: u32 = 10;
const SECOND: Duration = Duration::from_secs(1);
/// Bytes that wait for a slow reader.
const BUFFER: usize = 256 << 10;
/// How long the end of the program waits for one.
const PATIENCE: Duration = Duration::from_millis(500);

static OUTPUT: OnceLock<Output> = OnceLock::new();

/// What is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Level {
    /// Nothing; what ends the program is told on standard error all the same
    Off,
    /// A guest that is lost or needs the operator
    Error,
    /// What went wrong and is not lost
    Warn,
    /// Guests that are waited for, arrive and leave, too
    Info,
    /// What helps to find a mistake in the program, too
    Debug,
}

impl Level {
    fn filter(self) -> LevelFilter {
        match self {
            Level::Off => LevelFilter::OFF,
            Level::Error => LevelFilter::ERROR,
            Level::Warn => LevelFilter::WARN,
            Level::Info => LevelFilter::INFO,
            Level::Debug => LevelFilter::DEBUG,
        }
    }
}

/// Writes out what still waits when the program ends.
pub(crate) struct Log;

impl Drop for Log {
    fn drop(&mut self) {
        if let Some(output) = OUTPUT.get() {
            output.writer.flush(PATIENCE);
        }
    }
}

/// Starts to log, at the end of `file` or on standard error.
///
/// # Errors
/// The file cannot be written; the host has no thread for it.
pub(crate) fn init(level: Level, file: Option<&Path>) -> io::Result<Log> {
    let (sink, terminal): (Box<dyn Write + Send>, bool) = match file {
        None => (Box::new(io::stderr()), io::stderr().is_terminal()),
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path);
            let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
            (Box::new(file.map_err(named)?), false)
        }
    };
    let writer = NonBlockingWriter::start(BUFFER, sink, |_| (), || ())?;
    let output = OUTPUT.get_or_init(|| Output { writer, lost: Arc::default(), file: file.is_some() });
    let lines = tracing_subscriber::fmt::layer().with_writer(output.clone()).with_ansi(terminal);
    tracing_subscriber::registry().with(lines.with_filter(RateLimit::new(level.filter()))).init();
    Ok(Log)
}

/// Says something in the program's own name on standard error, in its place among the lines of the log; a file of the
/// log has it, too.
pub(crate) fn say(text: &str) {
    let line = format!("reference-vmm: {text}\n");
    let output = OUTPUT.get();
    if let Some(output) = output {
        output.line(line.as_bytes());
    }
    if output.is_none_or(|output| output.file) {
        eprint!("{line}");
    }
}

/// Where the log goes, which may lose lines.
#[derive(Clone)]
struct Output {
    writer: NonBlockingWriter,
    lost: Arc<AtomicU64>,
    /// It is not standard error.
    file: bool,
}

impl Output {
    fn line(&self, line: &[u8]) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0
            && !self.writer.write_whole(format!("{lost} lines of the log are lost: they were not read\n").as_bytes())
        {
            self.lost.fetch_add(lost + 1, Ordering::Relaxed);
        } else if !self.writer.write_whole(line) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl<'a> MakeWriter<'a> for Output {
    type Writer = &'a Output;

    fn make_writer(&'a self) -> &'a Output {
        self
    }
}

/// Each call has a whole line.
impl Write for &Output {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.line(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lets [`LINES`] events of a place pass in a second, and tells how many more there were.
#[derive(Clone)]
struct RateLimit {
    windows: Arc<Mutex<Windows>>,
    /// What is shown at all.
    level: LevelFilter,
}

#[derive(Default)]
struct Windows {
    places: HashMap<Identifier, Window>,
    /// The thread that tells of suppressed lines is there.
    telling: bool,
}

struct Window {
    metadata: &'static Metadata<'static>,
    since: Instant,
    events: u32,
    suppressed: u64,
}

impl RateLimit {
    fn new(level: LevelFilter) -> RateLimit {
        RateLimit { windows: Arc::default(), level }
    }

    /// Whether an event of this place may pass.
    fn passes(&self, metadata: &'static Metadata<'static>, now: Instant) -> bool {
        let mut windows = self.windows.lock();
        let fresh = || Window { metadata, since: now, events: 0, suppressed: 0 };
        let window = windows.places.entry(metadata.callsite()).or_insert_with(fresh);
        if now.saturating_duration_since(window.since) >= SECOND {
            (window.since, window.events) = (now, 0);
        }
        window.events = window.events.saturating_add(1);
        if window.events <= LINES {
            return true;
        }
        window.suppressed += 1;
        if !std::mem::replace(&mut windows.telling, true) {
            let limit = self.clone();
            let thread = thread::Builder::new().name("log".into()).spawn(move || limit.tell());
            windows.telling = thread.is_ok();
        }
        false
    }

    /// Takes what was suppressed, by place.
    fn take_suppressed(&self) -> Vec<(&'static Metadata<'static>, u64)> {
        let mut windows = self.windows.lock();
        let suppressed = windows.places.values_mut().filter(|window| window.suppressed > 0);
        let suppressed: Vec<_> = suppressed.map(|w| (w.metadata, std::mem::take(&mut w.suppressed))).collect();
        windows.telling = !suppressed.is_empty();
        suppressed
    }

    /// Tells once a second what was suppressed, until nothing is.
    fn tell(&self) {
        loop {
            thread::sleep(SECOND);
            let suppressed = self.take_suppressed();
            if suppressed.is_empty() {
                return;
            }
            for (metadata, lines) in suppressed {
                let (target, line) = (metadata.target(), metadata.line().unwrap_or_default());
                tracing::warn!("{lines} more lines like those of {target}, line {line}, were suppressed");
            }
        }
    }
}

impl<S: Subscriber> Filter<S> for RateLimit {
    fn enabled(&self, metadata: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        self.passes(event.metadata(), Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<String>>>);

    impl Write for Lines {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            self.0.lock().push(String::from_utf8(line.to_vec()).unwrap());
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_place_has_ten_lines_a_second_and_the_rest_is_counted() {
        let (lines, limit) = (Lines::default(), RateLimit::new(LevelFilter::INFO));
        let writer = lines.clone();
        let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone()).with_ansi(false);
        let subscriber = tracing_subscriber::registry().with(layer.with_filter(limit.clone()));
        tracing::subscriber::with_default(subscriber, || {
            // However long it takes, a window has ten lines at most.
            let start = Instant::now();
            (0..1000).for_each(|number| tracing::warn!(number, "again"));
            tracing::info!("another place");
            let windows = start.elapsed().as_secs() as usize + 1;
            let shown = lines.0.lock().iter().filter(|line| line.contains("again")).count();
            assert!((10..=10 * windows).contains(&shown), "{shown}");
            assert!(lines.0.lock().last().unwrap().contains("another place"));
            let suppressed: u64 = limit.take_suppressed().iter().map(|(_, lines)| lines).sum();
            assert!(suppressed as usize <= 1000 - shown, "the thread may have told of some");
        });
    }

    #[test]
    fn lines_that_are_not_read_are_counted() {
        let (reader, pipe) = io::pipe().unwrap();
        let writer = NonBlockingWriter::start(1000, Box::new(pipe), |_| (), || ()).unwrap();
        let output = Output { writer, lost: Arc::default(), file: false };
        let line = [&[b'x'; 99][..], b"\n"].concat();
        while output.lost.load(Ordering::Relaxed) < 5 {
            output.line(&line);
        }
        let reading = thread::spawn(move || io::read_to_string(reader).unwrap());
        assert!(output.writer.flush(Duration::from_secs(60)));
        output.line(b"end\n");
        drop(output);
        let text = reading.join().unwrap();
        assert!(text.contains(" lines of the log are lost") && text.ends_with("end\n"), "{text}");
    }
}
