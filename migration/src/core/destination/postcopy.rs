//! The guest runs here before its memory has come.

use super::{Action, FollowUp, Phase};
use crate::{LoadError, PAGE_SIZE};
use qevm_savevm::command::{Command, PostcopyAdvise};
use qevm_savevm::ram::BlockId;
use qevm_wire::CountedString;
use std::collections::VecDeque;

/// What the source has said about it.
#[derive(Debug, Default)]
pub(super) struct Postcopy {
    /// Capability `postcopy-ram` is on.
    pub(super) allowed: bool,
    /// The page sizes of the host's memory, one bit each.
    page_sizes: u64,
    /// Lengths of the listed blocks in bytes.
    pub(super) lengths: Vec<u64>,
    /// The source may let the guest go before its memory.
    pub(super) advised: bool,
    /// The guest runs here, or is about to.
    pub(super) runs: bool,
    /// Pages are missing until they are placed.
    pub(super) listens: bool,
    /// All of the package is here.
    packaged: bool,
    /// PINGs of the package: the answers say that the devices are loaded (10.2).
    pub(super) held: VecDeque<u32>,
    /// The connection was replaced, and the source has not gone on.
    pub(super) recovers: bool,
}

/// How far the start of the guest is, which goes on beside the stream: pages that its devices need are there.
#[derive(Debug, Clone, Copy)]
pub(super) enum Start {
    /// The guest takes over the state of its devices.
    Loading,
    /// The guest takes over its disks.
    Activating { running: bool },
    /// The source is told that it may not run the guest any more.
    Answering { running: bool },
}

impl Postcopy {
    pub(super) fn new(allowed: bool, page_sizes: u64) -> Self {
        let page_sizes = if page_sizes == 0 { PAGE_SIZE } else { page_sizes };
        Postcopy { allowed, page_sizes, ..Postcopy::default() }
    }

    /// Whether a PING is one that is answered when the devices are loaded.
    pub(super) fn holds(&mut self, ping: u32) -> bool {
        let inside = self.listens && !self.packaged;
        if inside {
            self.held.push_back(ping);
        }
        inside
    }

    /// Takes a command in, and says what follows.
    pub(super) fn command(
        &mut self,
        command: Command,
        listed: &[CountedString],
    ) -> Result<FollowUp<'static>, LoadError> {
        let misplaced = |name: &str, place: &str| Err(LoadError::Unsupported(format!("command {name} {place}")));
        let name = command.name();
        match command {
            Command::PostcopyAdvise(Some(advise)) => {
                let PostcopyAdvise { page_size_summary, target_page_size } = advise;
                if target_page_size != PAGE_SIZE {
                    return Err(LoadError::PageSize { found: target_page_size, expected: PAGE_SIZE });
                }
                if page_size_summary != self.page_sizes {
                    let (found, expected) = (page_size_summary, self.page_sizes);
                    return Err(LoadError::HostPageSizes { found, expected });
                }
                self.advised = true;
            }
            Command::RecvBitmap(_) | Command::PostcopyResume if !self.recovers => {
                return misplaced(name, "without a postcopy that was interrupted");
            }
            Command::RecvBitmap(block) => match listed.iter().position(|name| *name == block) {
                Some(index) => return Ok(FollowUp::Do(Action::SendBitmap(BlockId(index as u32)))),
                None => return Err(unknown(block, listed)),
            },
            Command::PostcopyResume => {
                self.recovers = false;
                return Ok(FollowUp::Do(Action::Resume));
            }
            _ if self.packaged => return misplaced(name, "after POSTCOPY_RUN"),
            _ if !self.advised => return misplaced(name, "without POSTCOPY_ADVISE"),
            Command::RamDiscard(_) | Command::Packaged { .. } | Command::PostcopyListen if self.listens => {
                return misplaced(name, "after POSTCOPY_LISTEN");
            }
            Command::RamDiscard(discard) => {
                let Some(index) = listed.iter().position(|name| *name == discard.block) else {
                    return Err(unknown(discard.block, listed));
                };
                let mut ranges = Vec::with_capacity(discard.ranges.len());
                for range in &discard.ranges {
                    let end = range.start.checked_add(range.len).filter(|end| *end <= self.lengths[index]);
                    match end.filter(|_| (range.start | range.len).is_multiple_of(PAGE_SIZE)) {
                        Some(end) => ranges.push(range.start..end),
                        None => return misplaced(name, "of bytes that are no pages of the block"),
                    }
                }
                return Ok(FollowUp::Do(Action::Discard { block: BlockId(index as u32), ranges }));
            }
            Command::Packaged { len } => return Ok(FollowUp::Ask(Phase::Package { len: len.into() })),
            Command::PostcopyListen => {
                self.listens = true;
                return Ok(FollowUp::Do(Action::Listen));
            }
            Command::PostcopyRun if !self.listens => return misplaced(name, "without POSTCOPY_LISTEN"),
            Command::PostcopyRun => {
                self.packaged = true;
                return Ok(FollowUp::Start);
            }
            _ => {}
        }
        Ok(FollowUp::Do(Action::Continue))
    }
}

fn unknown(found: CountedString, listed: &[CountedString]) -> LoadError {
    let expected = listed.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
    LoadError::UnknownRamBlock { found, expected }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qevm_savevm::command::{DiscardRange, RamDiscard};

    #[test]
    fn commands_have_their_order_and_discards_their_bounds() {
        let size = PAGE_SIZE;
        let advise = |target_page_size, page_size_summary| {
            Command::PostcopyAdvise(Some(PostcopyAdvise { page_size_summary, target_page_size }))
        };
        let name = |name: &str| CountedString::new(name).unwrap();
        let discard = |block, start, len| {
            Command::RamDiscard(RamDiscard { block: name(block), ranges: vec![DiscardRange { start, len }] })
        };
        let (listen, run, package) = (Command::PostcopyListen, Command::PostcopyRun, Command::Packaged { len: 100 });
        let good = || vec![advise(size, size), discard("pc.ram", 0, 3 * size), package.clone(), listen.clone()];
        let with = |more: Command| good().into_iter().chain([more]).collect::<Vec<_>>();
        let advised = |more: Command| vec![advise(size, size), more];
        for (commands, expected) in [
            (vec![listen.clone()], "POSTCOPY_LISTEN without POSTCOPY_ADVISE"),
            (vec![package.clone()], "PACKAGED without POSTCOPY_ADVISE"),
            (vec![run.clone()], "POSTCOPY_RUN without POSTCOPY_ADVISE"),
            (vec![discard("pc.ram", 0, size)], "RAM_DISCARD without POSTCOPY_ADVISE"),
            (vec![advise(2 * size, size)], "target pages of 8192 bytes, 4096 expected"),
            (vec![advise(size, 0x20_1000)], "matching RAM page sizes (0x201000 at the source, 0x1000 here"),
            (advised(run.clone()), "POSTCOPY_RUN without POSTCOPY_LISTEN"),
            (advised(discard("vga.vram", 0, size)), "unknown ramblock \"vga.vram\""),
            (advised(discard("pc.ram", size, 3 * size)), "no pages of the block"),
            (advised(discard("pc.ram", 1, size)), "no pages of the block"),
            (advised(discard("pc.ram", 0, size - 1)), "no pages of the block"),
            (advised(discard("pc.ram", u64::MAX - size + 1, size)), "no pages of the block"),
            (with(listen.clone()), "POSTCOPY_LISTEN after POSTCOPY_LISTEN"),
            (with(package.clone()), "PACKAGED after POSTCOPY_LISTEN"),
            (with(discard("pc.ram", 0, size)), "RAM_DISCARD after POSTCOPY_LISTEN"),
        ] {
            let mut postcopy = Postcopy { lengths: vec![3 * size], ..Postcopy::new(true, 0) };
            let mut errors = Vec::new();
            for command in &commands {
                errors.push(postcopy.command(command.clone(), &[name("pc.ram")]).err().map(|error| error.to_string()));
            }
            let last = errors.pop().flatten().unwrap_or_else(|| panic!("{commands:?}"));
            assert!(errors.iter().all(Option::is_none) && last.contains(expected), "{errors:?} {last}");
        }
    }

    #[test]
    fn a_source_has_huge_pages_where_the_destination_has_them() {
        let advise = |sizes| {
            Command::PostcopyAdvise(Some(PostcopyAdvise { page_size_summary: sizes, target_page_size: PAGE_SIZE }))
        };
        let huge = PAGE_SIZE | 2 << 20;
        let advised = |here, there| Postcopy::new(true, here).command(advise(there), &[]).map(drop);
        assert!(advised(huge, huge).is_ok() && advised(0, PAGE_SIZE).is_ok());
        for (here, there) in [(huge, PAGE_SIZE), (0, huge), (huge, 2 << 20)] {
            assert!(matches!(advised(here, there), Err(LoadError::HostPageSizes { found, .. }) if found == there));
        }
    }
}
