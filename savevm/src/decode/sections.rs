//! The sections that a stream has opened, by id.

use crate::framing::{SectionHeader, SectionKind};
use std::collections::HashMap;
use std::sync::Arc;

/// The sections that a stream has opened, by id.
///
/// A package sees those of the stream around it, and keeps its own to itself. Tables are shared, not copied.
#[derive(Debug, Clone, Default)]
pub struct Sections {
    outer: Vec<Arc<Table>>,
    own: Arc<Table>,
    /// Of a part of a checkpoint, which follows the stream.
    in_checkpoint: bool,
}

type Table = HashMap<u32, Opened>;

#[derive(Debug, Clone)]
struct Opened {
    header: SectionHeader,
    /// By a START, so that PART and END are legal. A FULL of the same handler takes nothing back.
    started: bool,
}

impl Sections {
    /// The section of this id.
    pub fn get(&self, section_id: u32) -> Option<&SectionHeader> {
        self.opened(section_id).map(|opened| &opened.header)
    }

    /// The section of this id, if a START opened it.
    pub(crate) fn started(&self, section_id: u32) -> Option<&SectionHeader> {
        self.opened(section_id).filter(|opened| opened.started).map(|opened| &opened.header)
    }

    pub(crate) fn open(&mut self, kind: SectionKind, header: SectionHeader) {
        let started = kind == SectionKind::Start || self.started(header.section_id).is_some();
        Arc::make_mut(&mut self.own).insert(header.section_id, Opened { header, started });
    }

    /// The table that a package inside this stream starts with.
    pub(crate) fn nested(&self) -> Self {
        let outer = self.outer.iter().chain([&self.own]).cloned().collect();
        Sections { outer, own: Arc::default(), in_checkpoint: false }
    }

    /// The table that a part of a checkpoint starts with: that of the stream before. What an earlier part has opened is
    /// forgotten, so that a part costs nothing of what the others have.
    pub(crate) fn after_end(&self) -> Self {
        let outer = if self.in_checkpoint { self.outer.clone() } else { self.nested().outer };
        Sections { outer, own: Arc::default(), in_checkpoint: true }
    }

    fn opened(&self, section_id: u32) -> Option<&Opened> {
        self.own.get(&section_id).or_else(|| self.outer.iter().rev().find_map(|table| table.get(&section_id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_checkpoints_see_the_stream_and_not_one_another() {
        let header = |id| SectionHeader::new(id, "timer".try_into().unwrap(), 2);
        let mut stream = Sections::default();
        stream.open(SectionKind::Start, header(1));
        let mut part = stream.after_end();
        for id in 2..1000 {
            part.open(SectionKind::Full, header(id));
            part = part.after_end();
            assert!(part.started(1).is_some() && part.get(id).is_none());
            assert_eq!((part.outer.len(), part.own.len()), (1, 0), "no part keeps what came before");
        }
    }
}
