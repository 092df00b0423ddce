//! Sending on the main channel.

use super::{Doing, Source, broken};
use crate::core::source::Sent;
use crate::multifd::Batch;
use crate::testing::memory::PAGE;
use crate::testing::page_sender::Work;
use crate::testing::{Fault, Link, Plant};
use crate::{MigrationError, handover};
use qevm_returnpath::Message;
use qevm_savevm::ram::BlockId;
use std::io;
use std::time::Duration;

/// Bytes that are put on the main channel in one go.
const PIECE: usize = 2 * PAGE;

/// What follows when everything on the main channel was sent.
pub(super) enum FollowUp {
    Sent(Sent),
    /// That was the end of the stream, before which this many bytes had been sent.
    Ended {
        before: u64,
    },
    Confirmed,
}

/// A page of the main channel.
pub(super) struct Page {
    block: usize,
    number: u64,
    /// It was a page of zeroes when its turn was near.
    zero: bool,
    content: Option<Vec<u8>>,
}

impl Source {
    /// Sends pages of guest memory, with their content where it was read already.
    pub(super) fn pages(
        &mut self,
        pages: Vec<(usize, u64)>,
        contents: Vec<Option<Vec<u8>>>,
    ) -> Result<(), MigrationError> {
        let is_zero = |block, page| self.memory.page(self.memory.index(block, page)).iter().all(|byte| *byte == 0);
        if self.channels == 0 {
            self.batch.extend(pages.into_iter().zip(contents).map(|((block, number), content)| {
                let zero = is_zero(block, number) && content.is_none();
                Page { block, number, zero, content }
            }));
            let zero = self.batch.iter().filter(|page| page.zero).count() as u64;
            let sent = Sent { bytes: 0, normal: self.batch.len() as u64 - zero, zero, ..Sent::default() };
            self.doing = Doing::Sending(FollowUp::Sent(sent));
            return Ok(());
        }
        let block = pages.first().map_or(0, |(block, _)| *block);
        let (mut work, mut zero) = (Work { batch: Batch { block, pages: Vec::new() }, content: Vec::new() }, 0);
        for ((block, page), content) in pages.into_iter().zip(contents) {
            if self.pages.is_legacy() && content.is_none() && is_zero(block, page) {
                self.core.stream().zero_page(BlockId(block as u32), page * PAGE as u64)?;
                zero += 1;
            } else {
                work.batch.pages.push(page * PAGE as u64);
                work.content.push(content);
            }
        }
        self.core.sent(Sent { zero, ..Sent::default() });
        if !work.batch.pages.is_empty() {
            self.doing = Doing::Pushing(work);
        }
        Ok(())
    }

    /// Sends on the main channel what there is room for.
    pub(super) fn send(&mut self, then: FollowUp, now: Duration, links: &mut [Link]) -> Result<(), MigrationError> {
        let link = &mut links[0];
        if !link.has_room() && !self.closed {
            self.doing = Doing::Sending(then);
            return Ok(());
        }
        let flip = self.plan.fault_of(0).and_then(Fault::flips);
        let mut stream = self.core.stream().take();
        self.heed_greeting(&mut stream);
        self.queue.bytes(&stream);
        let mut sent = stream.len() as u64;
        while self.queue.len() < PIECE
            && let Some(page) = self.batch.pop_front()
        {
            let (id, offset) = (BlockId(page.block as u32), page.number * PAGE as u64);
            let index = self.memory.index(page.block, page.number);
            if page.zero {
                self.core.stream().zero_page(id, offset)?;
            } else {
                self.core.stream().page_header(id, offset)?;
            }
            let record = self.core.stream().take();
            self.queue.bytes(&record);
            sent += record.len() as u64;
            if !page.zero {
                let begin = link.sent() + self.queue.len() as u64;
                if flip.is_some_and(|flip| (begin..begin + PAGE as u64).contains(&flip)) {
                    self.struck = Some(index);
                }
                let content = page.content.as_deref().unwrap_or(self.memory.page(index));
                self.queue.bytes(content);
                sent += PAGE as u64;
            }
        }
        self.core.sent(Sent { bytes: sent, ..Sent::default() });
        let stands = (self.queue.is_empty() && !self.closed) || link.send(now, self.queue.as_bytes());
        self.queue.clear();
        let rest = !self.batch.is_empty();
        match then {
            then if rest && stands => self.doing = Doing::Sending(then),
            FollowUp::Sent(counts) if stands => self.core.sent(counts),
            FollowUp::Sent(_) => self.fail("anything", now),
            FollowUp::Ended { before } => {
                self.ended = link.sent() > before;
                match self.ended {
                    true => self.core.end_sent(if stands { Ok(()) } else { Err(broken("the end of the stream")) }, now),
                    false => self.fail("the end of the stream", now),
                }
            }
            FollowUp::Confirmed if stands || self.plan.plant == Plant::Silent => self.core.confirmed(Ok(())),
            FollowUp::Confirmed => self.core.confirmed(Err(io::ErrorKind::BrokenPipe.into())),
        }
        Ok(())
    }

    /// Two QEMUs know nothing of the handover's confirmation: a destination gets none, and answers as one that
    /// knows none.
    fn heed_greeting(&mut self, stream: &mut Vec<u8>) {
        if self.plan.confirmed {
            return;
        }
        // MIG_CMD_PING: section type 8, command 2, length 4, value.
        let announcement = [&[8, 0, 2, 0, 4], &handover::ANNOUNCE.to_be_bytes()[..]].concat();
        let at = stream.windows(announcement.len()).position(|bytes| bytes == announcement);
        if let Some((at, answers)) = at.zip(self.answers.as_mut()) {
            stream.drain(at..at + announcement.len());
            answers.message(Message::Pong { value: handover::ANNOUNCE }, 0);
        }
    }
}
