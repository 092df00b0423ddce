//! XBZRLE: a page as the difference to what was sent of it before (capability `xbzrle`).
//!
//! The encoded form is a sequence of runs: how many bytes are unchanged, how many are new, and the new bytes. Unchanged
//! bytes at the end of the page are left out. Counts are unsigned LEB128 of one or two bytes.
//!
//! [`decode`] applies it to a page, [`encode`] makes it from two versions of one, and [`Cache`] keeps what a source has
//! sent, so that it has the old versions. The form is the same in every release from 5.2 to 11.1.

mod cache;
#[cfg(test)]
mod tests;

pub use cache::{Cache, CacheError, Outcome};

use qevm_wire::{Blame, Fault, Located};

/// The longest page that two bytes of LEB128 can describe.
pub const MAX_PAGE: usize = 0x3fff + 1;

/// What makes XBZRLE data unreadable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum XbzrleError {
    /// The data end inside a run.
    #[error("XBZRLE data end inside a run: {needed} more bytes expected, {available} left")]
    Incomplete {
        /// How many bytes the run still takes.
        needed: usize,
        /// How many are left.
        available: usize,
    },
    /// A count of more than two bytes.
    #[error("XBZRLE count of more than two bytes")]
    CountTooLong,
    /// A run of no bytes, which is only legal for the unchanged bytes at the start of the page.
    #[error("empty XBZRLE run of {what} bytes")]
    EmptyRun {
        /// `unchanged` or `new`.
        what: &'static str,
    },
    /// A run that goes on past the end of the page.
    #[error("XBZRLE run of {found} bytes, expected at most {left} to the end of the page")]
    OutsidePage {
        /// Length of the run.
        found: usize,
        /// How many bytes the page still has.
        left: usize,
    },
}

impl Blame for XbzrleError {
    fn fault(&self) -> Fault {
        Fault::Malformed
    }
}

/// Applies the difference `data`, which starts at stream offset `at`, to `page`, which holds the version before.
///
/// ```
/// // 4 bytes unchanged, 2 new ones, and the rest of the page unchanged.
/// let mut page = [0u8; 16];
/// qevm_savevm::xbzrle::decode(&[4, 2, 0xaa, 0xbb], 0, &mut page)?;
/// assert_eq!(page, [0, 0, 0, 0, 0xaa, 0xbb, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
/// # Ok::<(), qevm_wire::Located<qevm_savevm::xbzrle::XbzrleError>>(())
/// ```
///
/// # Errors
/// An [`XbzrleError`] at the run at fault. The runs before it have then been applied.
pub fn decode(data: &[u8], at: u64, page: &mut [u8]) -> Result<(), Located<XbzrleError>> {
    let mut runs = Runs { data, position: 0, at };
    let mut end = 0;
    while runs.position < data.len() {
        let start = runs.position;
        let unchanged = runs.count()?;
        if unchanged == 0 && start != 0 {
            return Err(runs.fail(start, XbzrleError::EmptyRun { what: "unchanged" }));
        }
        end = runs.advance(start, end, unchanged, page.len())?;
        let start = runs.position;
        let new = runs.count()?;
        if new == 0 {
            return Err(runs.fail(start, XbzrleError::EmptyRun { what: "new" }));
        }
        let from = end;
        end = runs.advance(start, end, new, page.len())?;
        let bytes = runs.take(new)?;
        page[from..end].copy_from_slice(bytes);
    }
    Ok(())
}

/// Makes the difference that turns `old` into `new`, both of one page, at the end of `data`.
///
/// Returns how many bytes that took; 0 if the versions are the same, and `None` if it took more than the page has, or
/// the page is longer than [`MAX_PAGE`]: then `data` is as it was, and the page is to be sent whole.
///
/// ```
/// use qevm_savevm::xbzrle;
///
/// let (old, new) = ([0u8; 16], [0, 0, 0, 0, 0xaa, 0xbb, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
/// let mut data = Vec::new();
/// assert_eq!(xbzrle::encode(&old, &new, &mut data), Some(4));
/// assert_eq!(data, [4, 2, 0xaa, 0xbb]);
/// ```
pub fn encode(old: &[u8], new: &[u8], data: &mut Vec<u8>) -> Option<usize> {
    let start = data.len();
    let encoded = encode_runs(old, new, data, start);
    if encoded.is_none() {
        data.truncate(start);
    }
    encoded
}

/// Fewer unchanged bytes than this between new ones are sent as new ones: a run costs two bytes.
const SHORTEST_GAP: usize = 3;

fn encode_runs(old: &[u8], new: &[u8], data: &mut Vec<u8>, start: usize) -> Option<usize> {
    if old.len() != new.len() || new.len() > MAX_PAGE {
        return None;
    }
    let mut position = 0;
    loop {
        let changed = position + common_prefix(&old[position..], &new[position..]);
        if changed == new.len() {
            return Some(data.len() - start);
        }
        let mut end = changed;
        let next = loop {
            end += different_prefix(&old[end..], &new[end..]);
            let gap = common_prefix(&old[end..], &new[end..]);
            if gap >= SHORTEST_GAP || end + gap == new.len() {
                break end;
            }
            end += gap;
        };
        write_count(changed - position, data);
        write_count(next - changed, data);
        data.extend_from_slice(&new[changed..next]);
        if data.len() - start > new.len() {
            return None;
        }
        position = next;
    }
}

/// How many bytes at the start of two slices of one length are the same.
fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    const WORD: usize = 8;
    let words = a.chunks_exact(WORD).zip(b.chunks_exact(WORD)).take_while(|(a, b)| a == b).count() * WORD;
    words + a[words..].iter().zip(&b[words..]).take_while(|(a, b)| a == b).count()
}

/// How many bytes at the start of two slices of one length are different.
fn different_prefix(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a != b).count()
}

fn write_count(count: usize, data: &mut Vec<u8>) {
    match count {
        0..0x80 => data.push(count as u8),
        _ => data.extend([count as u8 | 0x80, (count >> 7) as u8]),
    }
}

/// Reads counts and bytes of runs, and words the errors.
struct Runs<'a> {
    data: &'a [u8],
    position: usize,
    at: u64,
}

impl<'a> Runs<'a> {
    fn count(&mut self) -> Result<usize, Located<XbzrleError>> {
        let start = self.position;
        // Something must follow every count: a count of new bytes, or at least one new byte.
        let rest = &self.data[start..];
        if rest.len() < 2 {
            return Err(self.fail(start, XbzrleError::Incomplete { needed: 2, available: rest.len() }));
        }
        let (low, high) = (usize::from(rest[0]), usize::from(rest[1]));
        if low < 0x80 {
            self.position += 1;
            return Ok(low);
        }
        if high >= 0x80 {
            return Err(self.fail(start, XbzrleError::CountTooLong));
        }
        self.position += 2;
        Ok(low & 0x7f | high << 7)
    }

    /// The place in the page after a run of `count` bytes that starts at `from`.
    fn advance(&self, start: usize, from: usize, count: usize, page: usize) -> Result<usize, Located<XbzrleError>> {
        match from + count {
            end if end <= page => Ok(end),
            _ => Err(self.fail(start, XbzrleError::OutsidePage { found: count, left: page - from })),
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Located<XbzrleError>> {
        let rest = &self.data[self.position..];
        let Some(bytes) = rest.get(..count) else {
            return Err(self.fail(self.position, XbzrleError::Incomplete { needed: count, available: rest.len() }));
        };
        self.position += count;
        Ok(bytes)
    }

    fn fail(&self, position: usize, kind: XbzrleError) -> Located<XbzrleError> {
        Located::new(kind, self.at.saturating_add(position as u64))
    }
}
