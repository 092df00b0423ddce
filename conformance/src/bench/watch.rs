//! What is seen of two monitors from outside: when the guest prints.

use anyhow::{Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often the consoles are looked at: far finer than the guest's progress lines.
const LOOK: Duration = Duration::from_micros(500);

/// Watches the consoles of both ends.
pub(super) struct Silence {
    end: Arc<AtomicBool>,
    thread: JoinHandle<(Option<Instant>, Option<Instant>)>,
}

impl Silence {
    /// Begins to watch, while the guest prints at `source` and nothing at `destination` yet.
    pub(super) fn watch(source: &Path, destination: &Path) -> Silence {
        let [source, destination]: [PathBuf; 2] = [source.into(), destination.into()];
        let end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&end);
        let thread = thread::spawn(move || {
            let (mut seen, mut last) = (size(&source), None);
            while !ended.load(Ordering::Relaxed) {
                let (now, length) = (Instant::now(), size(&source));
                if length != seen {
                    (seen, last) = (length, Some(now));
                }
                if size(&destination) > 0 {
                    return (last, Some(now));
                }
                thread::sleep(LOOK);
            }
            (last, None)
        });
        Silence { end, thread }
    }

    /// When the guest printed for the last time at the source, and for the first time at the destination.
    ///
    /// # Errors
    /// It did not print at either end within `limit`.
    pub(super) fn ends(self, limit: Duration) -> Result<(Instant, Instant)> {
        let deadline = Instant::now() + limit;
        while !self.thread.is_finished() && Instant::now() < deadline {
            thread::sleep(LOOK);
        }
        self.end.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok((Some(last), Some(first))) => Ok((last, first)),
            Ok(_) => bail!("the guest did not print at both ends"),
            Err(_) => bail!("the thread that watches the consoles has panicked"),
        }
    }
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patience::PATIENCE;

    #[test]
    fn silence_is_between_the_last_and_the_first_word() {
        // A watcher that a busy machine lets wait may see both words late, and at once.
        let started = Instant::now();
        loop {
            let folder = tempfile::tempdir().unwrap();
            let [a, b] = ["a", "b"].map(|name| folder.path().join(name));
            let silence = Silence::watch(&a, &b);
            thread::sleep(Duration::from_millis(50));
            fs::write(&a, "x").unwrap();
            thread::sleep(Duration::from_millis(100));
            fs::write(&b, "y").unwrap();
            let (last, first) = match silence.ends(PATIENCE) {
                Ok(ends) => ends,
                Err(_) if started.elapsed() < PATIENCE => continue,
                Err(error) => panic!("{error:#}"),
            };
            assert!(first >= last);
            if first - last >= Duration::from_millis(50) {
                break;
            }
            assert!(started.elapsed() < PATIENCE, "{:?}", first - last);
        }
        let a = Path::new("/nowhere/a");
        assert!(Silence::watch(a, Path::new("/nowhere/b")).ends(Duration::from_millis(20)).is_err());
    }
}
