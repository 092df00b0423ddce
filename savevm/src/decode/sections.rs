//! The sections that a stream has opened, by id.

use crate::framing::SectionHeader;
use std::{collections::HashMap, sync::Arc};

/// The sections that a stream has opened, by id.
///
/// A package sees those of the stream around it, and keeps its own to itself. Tables are shared, not copied.
#[derive(Debug, Clone, Default)]
pub struct Sections {
    outer: Vec<Arc<HashMap<u32, SectionHeader>>>,
    own: Arc<HashMap<u32, SectionHeader>>,
}

impl Sections {
    /// The section of this id.
    pub fn get(&self, section_id: u32) -> Option<&SectionHeader> {
        self.own.get(&section_id).or_else(|| self.outer.iter().rev().find_map(|table| table.get(&section_id)))
    }

    /// How many sections this stream has opened itself.
    pub(crate) fn len(&self) -> usize {
        self.own.len()
    }

    pub(crate) fn insert(&mut self, header: SectionHeader) {
        Arc::make_mut(&mut self.own).insert(header.section_id, header);
    }

    /// The table that a package inside this stream starts with.
    pub(crate) fn nested(&self) -> Self {
        let outer = self.outer.iter().chain([&self.own]).cloned().collect();
        Sections { outer, own: Arc::default() }
    }
}
