//! A progress bar, only where a person looks: standard error is a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::Duration;

/// Bytes between two updates, so that telling the bar costs nothing.
const STEP: u64 = 4 << 20;

/// Progress over the bytes of one input.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    next: u64,
}

impl Progress {
    /// A bar for an input of `len` bytes, or of unknown length, labelled with what is being done.
    pub fn new(what: &str, len: Option<u64>) -> Self {
        let hidden = !std::io::stderr().is_terminal();
        let bar = match len {
            Some(len) => ProgressBar::new(len),
            None => ProgressBar::no_length(),
        };
        bar.set_draw_target(if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() });
        let template = match len {
            Some(_) => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} eta {eta}",
            None => "{msg} {spinner} {bytes} {bytes_per_sec}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what.to_owned());
        if !hidden && len.is_none() {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Progress { bar, next: STEP }
    }

    /// A bar that is never drawn.
    pub fn hidden() -> Self {
        Progress { bar: ProgressBar::hidden(), next: u64::MAX }
    }

    /// The input was read up to `position`.
    pub fn at(&mut self, position: u64) {
        if position >= self.next {
            self.bar.set_position(position);
            self.next = position.saturating_add(STEP);
        }
    }

    /// Says something above the bar; nothing without one.
    pub fn say(&self, line: &str) {
        self.bar.println(line);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::hidden()
    }
}
