//! A connection that breaks at a chosen place.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

/// Where the connection breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// This many bytes went from source to destination.
    After(u64),
    /// This many bytes went past the first occurrence of a text, e.g. a section's name, on the way to the destination.
    Behind(&'static str, u64),
    /// This many bytes of the return path came back.
    Back(u64),
}

/// Hands one connection on to `destination`, listening at `path`, and breaks it at `cut`. The thread says whether it
/// got there.
pub(super) fn broken(path: &Path, destination: PathBuf, cut: Cut) -> io::Result<JoinHandle<bool>> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    Ok(thread::spawn(move || {
        let Ok((source, _)) = listener.accept() else { return false };
        let Ok(destination) = UnixStream::connect(destination) else { return false };
        let back = match cut {
            Cut::Back(bytes) => Watch::after(bytes),
            _ => Watch::never(),
        };
        let forth = match cut {
            Cut::After(bytes) => Watch::after(bytes),
            Cut::Behind(text, bytes) => Watch::behind(text.as_bytes(), bytes),
            Cut::Back(_) => Watch::never(),
        };
        thread::scope(|scope| {
            let returning = scope.spawn(|| pass_on(&destination, &source, back));
            let cut = pass_on(&source, &destination, forth);
            returning.join().unwrap_or(false) | cut
        })
    }))
}

/// Copies until the end or the cut. True if it was the cut, which breaks both directions.
fn pass_on(mut from: &UnixStream, mut to: &UnixStream, mut watch: Watch) -> bool {
    let mut chunk = [0; 16 << 10];
    loop {
        let count = match from.read(&mut chunk) {
            Ok(count) if count > 0 => count,
            _ => break,
        };
        let allowed = watch.allow(&chunk[..count]);
        let sent = to.write_all(&chunk[..allowed]);
        if allowed < count || watch.reached() {
            for end in [from, to] {
                // It may be broken already.
                let _ = end.shutdown(Shutdown::Both);
            }
            return true;
        }
        if sent.is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
    false
}

/// Counts bytes down, from the beginning or from a text on.
struct Watch {
    text: &'static [u8],
    /// How much of the text the last bytes were.
    matched: usize,
    left: Option<u64>,
}

impl Watch {
    fn never() -> Watch {
        Watch { text: &[], matched: 0, left: None }
    }
    fn after(bytes: u64) -> Watch {
        Watch { text: &[], matched: 0, left: Some(bytes) }
    }
    fn behind(text: &'static [u8], bytes: u64) -> Watch {
        Watch { text, matched: 0, left: Some(bytes) }
    }

    fn reached(&self) -> bool {
        self.matched == self.text.len() && self.left == Some(0)
    }

    /// How many of these bytes may still pass.
    fn allow(&mut self, bytes: &[u8]) -> usize {
        let Some(left) = &mut self.left else { return bytes.len() };
        let mut passed = 0;
        for byte in bytes {
            if self.matched == self.text.len() {
                if *left == 0 {
                    break;
                }
                *left -= 1;
            } else if *byte == self.text[self.matched] {
                self.matched += 1;
            } else {
                self.matched = usize::from(*byte == self.text[0]);
            }
            passed += 1;
        }
        passed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cut_is_where_it_is_asked_for_however_the_bytes_come() {
        for chunk in 1..8 {
            for (mut watch, expected) in [
                (Watch::after(0), 0),
                (Watch::after(5), 5),
                (Watch::after(14), 14),
                (Watch::never(), 14),
                (Watch::behind(b"apic", 0), 8),
                (Watch::behind(b"apic", 3), 11),
            ] {
                let passed: usize = b"aaapapicioapic".chunks(chunk).map(|bytes| watch.allow(bytes)).sum();
                assert_eq!(passed, expected, "chunks of {chunk}");
            }
        }
    }
}
