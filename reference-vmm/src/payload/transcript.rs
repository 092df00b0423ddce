//! What the guest has printed on its way, put together.

use super::{PciDevice, Progress};
use std::collections::BTreeMap;

/// Everything a guest printed, on one monitor after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transcript {
    /// The last whole line.
    pub last: Progress,
    /// Whole progress lines.
    pub lines: usize,
    /// Lines that a migration cut: begun at one monitor and ended at the next.
    pub cut: usize,
}

/// Why a transcript is not that of a guest that goes on undisturbed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadTranscript {
    /// It is not the text of a payload.
    #[error("line {number} of the guest's output is damaged: {line}")]
    Damaged {
        /// Counted from 1 over all monitors.
        number: usize,
        /// The line.
        line: String,
    },
    /// A counter is lower than in the line before: an older state of the guest went on.
    #[error("line {number} of the guest's output runs backwards: {line}")]
    Backwards {
        /// Counted from 1 over all monitors.
        number: usize,
        /// The line.
        line: String,
    },
    /// There is no whole progress line.
    #[error("the guest printed no progress")]
    Silent,
    /// The guest found pages with other contents than it had left there.
    #[error("the guest found {pages} stale pages")]
    Stale {
        /// How many.
        pages: u64,
    },
    /// The guest's TSC ran backwards.
    #[error("the guest's clock ran backwards {times} times")]
    Clock {
        /// How often.
        times: u64,
    },
}

impl Transcript {
    /// Puts the output of all monitors that ran the guest together, in the order in which they did: one text, in which
    /// every line is whole, nothing runs backwards and no page is stale. The end of the last line may be missing.
    ///
    /// ```
    /// use reference_vmm::payload::{BadTranscript, Transcript};
    ///
    /// let line = "qevm-payload pass=3 pages=16 stale=0 tsc_back=0 written=48 checked=9 rounds=0 ticks=5 ms=271\n";
    /// let (source, destination) = line.as_bytes().split_at(20);
    /// assert_eq!(Transcript::read(&[source, destination]).map(|t| (t.last.pass, t.cut)), Ok((3, 1)));
    /// assert!(matches!(Transcript::read(&[source, &destination[1..]]), Err(BadTranscript::Damaged { number: 1, .. })));
    /// ```
    ///
    /// # Errors
    /// [`BadTranscript`], for the first thing that is wrong.
    pub fn read(pieces: &[&[u8]]) -> Result<Transcript, BadTranscript> {
        let bytes = pieces.concat();
        let text = String::from_utf8_lossy(&bytes);
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let (mut last, mut lines): (Option<Progress>, _) = (None, 0);
        let mut devices = BTreeMap::new();
        for (number, line) in (1..).zip(whole.lines()) {
            match (Progress::parse(line), &last) {
                (Some(progress), Some(before)) if !in_order(before, &progress) => {
                    return Err(BadTranscript::Backwards { number, line: line.into() });
                }
                (Some(progress), _) => {
                    last = Some(progress);
                    lines += 1;
                }
                (None, _) => match PciDevice::parse(line) {
                    Some(device) => {
                        let before = devices.insert(device.slot, device);
                        if before.is_some_and(|before| !device.follows(&before)) {
                            return Err(BadTranscript::Backwards { number, line: line.into() });
                        }
                    }
                    None if whole_message(line) => {}
                    None => return Err(BadTranscript::Damaged { number, line: line.into() }),
                },
            }
        }
        let last = last.ok_or(BadTranscript::Silent)?;
        match last {
            Progress { stale: pages @ 1.., .. } => return Err(BadTranscript::Stale { pages }),
            Progress { tsc_back: times @ 1.., .. } => return Err(BadTranscript::Clock { times }),
            _ => {}
        }
        let ends_within = |piece: &&&[u8]| piece.last().is_some_and(|byte| *byte != b'\n');
        let cut = pieces.split_last().map_or(0, |(_, before)| before.iter().filter(ends_within).count());
        Ok(Transcript { last, lines, cut })
    }
}

/// The payload's other messages.
fn whole_message(line: &str) -> bool {
    [
        "qevm-payload start cpus=",
        "qevm-payload stale-page kind=",
        "qevm-payload virtio disk=",
        "qevm-payload pci checks=",
        "qevm-payload reads total=",
        "qevm-payload reset boots=",
        "qevm-payload power button",
    ]
    .iter()
    .any(|begin| line.starts_with(begin))
}

fn in_order(before: &Progress, after: &Progress) -> bool {
    after.ms >= before.ms
        && after.pass >= before.pass
        && after.written >= before.written
        && after.checked >= before.checked
        && after.ticks >= before.ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: &str = "qevm-payload start cpus=1\n";

    fn line(pass: u64, stale: u64, ms: u64) -> String {
        format!(
            "qevm-payload pass={pass} pages=16 stale={stale} tsc_back=0 written={pass} checked=9 rounds=0 ticks=5 ms={ms}\n"
        )
    }

    #[test]
    fn lines_cut_by_migrations_are_put_together() {
        let text = [START.to_owned(), line(1, 0, 10), line(2, 0, 20), line(3, 0, 30)].concat();
        for cut in START.len()..text.len() {
            let (a, b) = text.as_bytes().split_at(cut);
            let transcript = Transcript::read(&[a, b, b""]).unwrap();
            assert_eq!((transcript.last.pass, transcript.lines), (3, 3));
            assert_eq!(transcript.cut, usize::from(!a.ends_with(b"\n")));
        }
    }

    #[test]
    fn a_device_does_not_go_back() {
        let device = |slot: u64, counter: u64, taken: u64| {
            format!("qevm-payload pci-device slot={slot} counter={counter} raised=9 taken={taken} spurious=0 dma=64\n")
        };
        let read = |devices: &[String]| {
            let text = [START.to_owned(), line(1, 0, 10), devices.concat()].concat();
            Transcript::read(&[text.as_bytes()]).map(|transcript| transcript.lines)
        };
        assert_eq!(read(&[device(1, 5, 8), device(2, 4, 8), device(1, 5, 9)]), Ok(1));
        for back in [device(1, 4, 9), device(1, 5, 7)] {
            let error = read(&[device(1, 5, 8), back]).unwrap_err();
            assert!(matches!(error, BadTranscript::Backwards { number: 4, .. }), "{error}");
        }
    }

    #[test]
    fn lost_repeated_and_stale_output_is_noticed() {
        let (a, b) = (START.to_owned() + &line(1, 0, 10), line(2, 0, 20));
        let read = |pieces: &[&str]| Transcript::read(&pieces.iter().map(|p| p.as_bytes()).collect::<Vec<_>>());
        assert!(read(&[&a, &b]).is_ok());
        assert!(matches!(read(&[&a, &b[1..]]), Err(BadTranscript::Damaged { number: 3, .. })), "a lost byte");
        let again = read(&[&a, &b, &line(1, 0, 15)]);
        assert!(matches!(again, Err(BadTranscript::Backwards { number: 4, .. })), "an older state: {again:?}");
        assert_eq!(read(&[&a, &line(2, 1, 20)]), Err(BadTranscript::Stale { pages: 1 }));
        assert_eq!(read(&[START]), Err(BadTranscript::Silent));
        assert_eq!(read(&[]), Err(BadTranscript::Silent));
    }
}
