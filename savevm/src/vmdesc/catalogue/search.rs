//! The search for the one way to read a section with the layouts of a catalogue.
//!
//! All ways are followed at once, field by field. Ways that meet at the same byte go on as one, so that the work grows
//! with the section and not with the number of ways; that there were several is remembered.

use super::{Catalogue, FieldLayout, Inner, Layout, Structure};
use crate::vmdesc::value::{NULL_POINTER, VALID_POINTER};
use crate::vmdesc::virtio::{self, msix_vectors};
use crate::vmdesc::{FieldDescription, ScalarKind, StructDescription, msix, scsi, tree};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::rc::Rc;

/// Fields read before the search gives up, at most: some 20 ms, and as many MiB of descriptions.
const BUDGET: u32 = 1 << 16;
/// Fields read in any section, and for each of its bytes: the work follows the section's length.
const BUDGET_BASE: u32 = 1 << 13;
const BUDGET_PER_BYTE: u32 = 1 << 6;
/// Places that ways can be at, at a time.
const MAX_WAYS: usize = 1 << 9;
/// Elements of an array whose length the catalogue does not tell.
const MAX_ELEMENTS: u64 = 1 << 8;

pub(super) enum Outcome {
    One(StructDescription),
    Unknown,
    None,
    Several,
}

/// The one reading of the section that ends where `accept` says, in the release that comes first in `preferred`.
pub(super) fn one(
    catalogue: &Catalogue,
    name: &str,
    version: u32,
    body: &[u8],
    accept: &dyn Fn(usize) -> bool,
    preferred: &[u8],
) -> Outcome {
    let known = catalogue.structures.get(name).is_some_and(|structure| structure.is_section(version));
    if !known {
        return Outcome::Unknown;
    }
    for inferred in [false, true] {
        let mut search = Search::new(catalogue, body, accept, inferred);
        let readings = search.section(name, version);
        if search.spent {
            return Outcome::Several;
        }
        let rank = |reading: &Reading| {
            let seen = preferred.iter().position(|bit| reading.way.releases & bit != 0);
            seen.unwrap_or(preferred.len() + usize::from(reading.way.releases == 0))
        };
        let Some(best) = readings.iter().map(rank).min() else { continue };
        let mut best = readings.into_iter().filter(|reading| rank(reading) == best);
        return match (best.next(), best.next()) {
            (Some(reading), None) if !reading.way.several => Outcome::One(reading.description),
            _ => Outcome::Several,
        };
    }
    Outcome::None
}

struct Search<'c, 'b> {
    catalogue: &'c Catalogue,
    body: &'b [u8],
    /// Where the section may end.
    accept: &'b dyn Fn(usize) -> bool,
    /// Also layouts from schemas, and arrays of lengths that were not seen.
    inferred: bool,
    budget: u32,
    /// The budget is spent, or there were too many ways.
    spent: bool,
    /// The layouts that the search is inside of: none contains itself.
    open: Vec<*const Layout>,
}

/// One way to read the bytes up to `position`.
#[derive(Clone)]
struct Way {
    position: usize,
    /// Vectors of the MSI-X table that the last PCI configuration space announces.
    vectors: u64,
    /// The releases in which all layouts on the way were seen.
    releases: u8,
    /// Other layouts give the same bytes another meaning, in the same releases.
    several: bool,
    /// What was read of the structure, last step first.
    last: Option<Rc<Step>>,
}

struct Step {
    part: Part,
    before: Option<Rc<Step>>,
}

impl Drop for Step {
    /// A long way must not be dropped by recursion.
    fn drop(&mut self) {
        let mut before = self.before.take();
        while let Some(mut step) = before.and_then(Rc::into_inner) {
            before = step.before.take();
        }
    }
}

enum Part {
    Field(FieldDescription),
    Subsection(StructDescription),
}

/// A structure that was read.
struct Reading {
    way: Way,
    description: StructDescription,
}

#[derive(Clone, Copy)]
enum Role {
    Section,
    /// Inside a field, in which this layout was seen.
    Nested(usize),
    Subsection,
}

impl Structure {
    pub(super) fn is_section(&self, version: u32) -> bool {
        self.layouts.iter().any(|layout| layout.version == version && layout.roles.section)
    }
}

impl<'c, 'b> Search<'c, 'b> {
    fn new(catalogue: &'c Catalogue, body: &'b [u8], accept: &'b dyn Fn(usize) -> bool, inferred: bool) -> Self {
        let per_byte = BUDGET_PER_BYTE.saturating_mul(u32::try_from(body.len()).unwrap_or(u32::MAX));
        let budget = BUDGET.min(BUDGET_BASE.saturating_add(per_byte));
        Search { catalogue, body, accept, inferred, budget, spent: false, open: Vec::new() }
    }

    fn section(&mut self, name: &str, version: u32) -> Vec<Reading> {
        let start = Way { position: 0, vectors: 0, releases: u8::MAX, several: false, last: None };
        self.structure(name, version, Role::Section, &start)
    }

    /// All readings of the structure from the end of `start` on.
    fn structure(&mut self, name: &str, version: u32, role: Role, start: &Way) -> Vec<Reading> {
        let Some(structure) = self.catalogue.structures.get(name) else { return Vec::new() };
        let mut readings = Vec::new();
        for (number, layout) in structure.layouts.iter().enumerate() {
            let fits = match role {
                Role::Section => layout.roles.section,
                Role::Nested(seen) => layout.roles.nested && (self.inferred || number == seen),
                Role::Subsection => layout.roles.subsection,
            };
            let wanted = fits && layout.version == version && (self.inferred || !layout.inferred);
            if !wanted || self.open.contains(&std::ptr::from_ref(layout)) {
                continue;
            }
            self.open.push(layout);
            let releases = start.releases & layout.releases;
            let mut ways = vec![Way { releases, last: None, ..start.clone() }];
            for field in &layout.fields {
                ways = self.field(field, layout, ways);
                if ways.is_empty() {
                    break;
                }
            }
            let ways = self.subsections(structure, ways);
            self.open.pop();
            // Only what is a whole reading is worth writing down.
            let accept = |way: &Way| !matches!(role, Role::Section) || (self.accept)(way.position);
            readings.extend(ways.into_iter().filter(accept).map(|way| way.finish(name, version)));
        }
        readings
    }

    /// All readings of one of the structures that can be in the field.
    fn inner(&mut self, field: &FieldLayout, start: &Way) -> Vec<Reading> {
        let mut readings = Vec::new();
        let mut before = None;
        for Inner { name, version, layout } in &field.nested {
            // Where every layout counts, they are tried once.
            if !self.inferred || before.replace((name, version)) != Some((name, version)) {
                readings.extend(self.structure(name, *version, Role::Nested(*layout), start));
            }
        }
        readings
    }

    /// Follows the ways into the subsections that come next.
    fn subsections(&mut self, structure: &Structure, mut ways: Vec<Way>) -> Vec<Way> {
        let mut done = Vec::new();
        while let Some(way) = ways.pop() {
            let Some((name, version, header)) = subsection_at(&self.body[way.position..], structure) else {
                done.push(way);
                continue;
            };
            let inside = Way { position: way.position + header, ..way.clone() };
            for Reading { way: end, description } in self.structure(name, version, Role::Subsection, &inside) {
                ways.push(end.with(way.last.clone(), Part::Subsection(description)));
            }
            if self.is_spent(ways.len() + done.len()) {
                return Vec::new();
            }
        }
        self.merge(done)
    }

    fn field(&mut self, field: &FieldLayout, layout: &Layout, ways: Vec<Way>) -> Vec<Way> {
        let guard = layout.guard.as_ref().filter(|(name, _)| *name == field.name);
        let mut after = Vec::new();
        for way in ways {
            if self.is_spent(after.len()) {
                return Vec::new();
            }
            let start = way.position;
            let first = after.len();
            self.elements(field, way, &mut after);
            if let Some((_, set)) = guard {
                let is_set = |way: &Way| self.body[start..way.position].iter().any(|byte| *byte != 0);
                let kept: Vec<Way> = after.drain(first..).filter(|way| is_set(way) == *set).collect();
                after.extend(kept);
            }
        }
        self.merge(after)
    }

    /// Reads all elements of a field.
    fn elements(&mut self, field: &FieldLayout, way: Way, after: &mut Vec<Way>) {
        let free = self.inferred && field.any_count;
        if let Some(size) = field.size.filter(|_| !field.marked && field.nested.is_empty()) {
            let left = (self.body.len() - way.position) as u64;
            let counts: Box<dyn Iterator<Item = u64>> = match free {
                true => Box::new(1..=left.checked_div(size).unwrap_or(0).min(MAX_ELEMENTS)),
                false => Box::new(field.counts.iter().copied()),
            };
            for count in counts.filter(|count| count.checked_mul(size).is_some_and(|len| len <= left)) {
                let end = way.position + (count * size) as usize;
                if is_plausible(&field.type_name, &self.body[way.position..end]) {
                    let array_len = (count != 1).then_some(count);
                    let vectors = match field.type_name.as_str() {
                        "pci config" => msix_vectors(&self.body[way.position..end]),
                        _ => way.vectors,
                    };
                    let description = FieldDescription { array_len, ..field.describe(size) };
                    after.push(Way { vectors, ..way.step(end, description) });
                }
            }
            return;
        }
        let most = if free { MAX_ELEMENTS } else { field.counts.last().copied().unwrap_or(1) };
        let most = if most > 1 { most } else { 0 };
        if free || field.counts.contains(&1) {
            self.element(field, None, &way, after);
        }
        let mut ways = vec![way];
        for index in 0..most {
            let before = std::mem::take(&mut ways);
            for way in before {
                self.element(field, Some(index), &way, &mut ways);
            }
            ways = self.merge(ways);
            if ways.is_empty() {
                return;
            }
            if index > 0 && (free || field.counts.contains(&(index + 1))) {
                after.extend(ways.iter().cloned());
            }
        }
    }

    /// Reads one element whose content tells how long it is.
    fn element(&mut self, field: &FieldLayout, index: Option<u64>, way: &Way, after: &mut Vec<Way>) {
        let rest = &self.body[way.position..];
        let named = |field: &FieldLayout, size: usize| FieldDescription { index, ..field.describe(size as u64) };
        let of_type = |name: &str| FieldDescription { type_name: name.into(), ..named(field, 1) };
        if field.marked {
            let marked = |way: &Way| way.step(way.position + 1, of_type("ptr-marker"));
            match rest.first() {
                Some(&NULL_POINTER) => after.push(marked(way)),
                Some(&VALID_POINTER) => {
                    let way = marked(way);
                    let present = FieldLayout { marked: false, ..field.clone() };
                    self.element(&present, index, &way, after);
                }
                _ => {}
            }
            return;
        }
        if field.nullable && rest.first() == Some(&NULL_POINTER) {
            after.push(way.step(way.position + 1, of_type("nullptr")));
        }
        let lens = match field.type_name.as_str() {
            "qtailq" | "qlist" => return self.list(field, way, after),
            "virtio" => virtio::lengths(rest),
            "virtio-gpu" => virtio::gpu::lengths(rest),
            "scsi-requests" => scsi::lengths(rest),
            "msix state" => vec![msix::msix_len(way.vectors)],
            _ => Vec::new(),
        };
        for len in lens.into_iter().filter(|len| *len <= rest.len()) {
            after.push(way.step(way.position + len, named(field, len)));
        }
        for Reading { way: end, description } in self.inner(field, way) {
            let size = end.position - way.position;
            let described = FieldDescription { nested: vec![description], ..named(field, size) };
            after.push(end.with(way.last.clone(), Part::Field(described)));
        }
    }

    /// Reads a list: a marker before each element, and one after the last.
    fn list(&mut self, field: &FieldLayout, start: &Way, after: &mut Vec<Way>) {
        let mut ways: Vec<(Way, Option<Rc<Element>>)> = vec![(start.clone(), None)];
        while let Some((way, last)) = ways.pop() {
            if self.is_spent(ways.len()) {
                return;
            }
            match self.body.get(way.position) {
                Some(0) => {
                    let end = way.position + 1;
                    let nested = Element::all(last.as_deref());
                    let described = FieldDescription { nested, ..field.describe((end - start.position) as u64) };
                    let way = Way { position: end, ..way };
                    after.push(way.with(start.last.clone(), Part::Field(described)));
                }
                Some(1) => {
                    let inside = Way { position: way.position + 1, ..way.clone() };
                    for reading in self.inner(field, &inside) {
                        let element = Element { description: reading.description, before: last.clone() };
                        ways.push((Way { last: None, ..reading.way }, Some(Rc::new(element))));
                    }
                }
                _ => {}
            }
        }
    }

    /// Ways at the same place become one. Of several that were seen in the same releases the first is kept.
    fn merge(&mut self, ways: Vec<Way>) -> Vec<Way> {
        let mut merged: BTreeMap<(usize, u64, u8), Way> = BTreeMap::new();
        for way in ways {
            match merged.entry((way.position, way.vectors, way.releases)) {
                Entry::Occupied(mut known) => known.get_mut().several = true,
                Entry::Vacant(free) => drop(free.insert(way)),
            }
        }
        if self.is_spent(merged.len()) { Vec::new() } else { merged.into_values().collect() }
    }

    fn is_spent(&mut self, ways: usize) -> bool {
        // What is done next is done for each of them.
        self.budget = self.budget.saturating_sub(1 + ways as u32);
        self.spent |= self.budget == 0 || ways > MAX_WAYS;
        self.spent
    }
}

impl Way {
    /// The way, continued by a field.
    fn step(&self, position: usize, field: FieldDescription) -> Way {
        Way { position, ..self.clone() }.with(self.last.clone(), Part::Field(field))
    }

    fn with(self, before: Option<Rc<Step>>, part: Part) -> Way {
        Way { last: Some(Rc::new(Step { part, before })), ..self }
    }

    fn finish(mut self, name: &str, version: u32) -> Reading {
        let (mut fields, mut subsections) = (Vec::new(), Vec::new());
        let mut last = self.last.take();
        while let Some(step) = last {
            match &step.part {
                Part::Field(field) => fields.push(field.clone()),
                Part::Subsection(subsection) => subsections.push(subsection.clone()),
            }
            last = step.before.clone();
        }
        fields.reverse();
        subsections.reverse();
        let description = StructDescription { vmsd_name: name.to_owned(), version, fields, subsections };
        Reading { way: self, description }
    }
}

/// An element of a list and those before it, which the ways that go on from there share.
struct Element {
    description: StructDescription,
    before: Option<Rc<Element>>,
}

impl Element {
    /// The elements in order.
    fn all(last: Option<&Element>) -> Vec<StructDescription> {
        let backwards = std::iter::successors(last, |element| element.before.as_deref());
        let mut all: Vec<_> = backwards.map(|element| element.description.clone()).collect();
        all.reverse();
        all
    }
}

impl Drop for Element {
    /// A long list must not be dropped by recursion.
    fn drop(&mut self) {
        let mut before = self.before.take();
        while let Some(mut element) = before.and_then(Rc::into_inner) {
            before = element.before.take();
        }
    }
}

impl FieldLayout {
    fn describe(&self, size: u64) -> FieldDescription {
        let (name, type_name) = (self.name.clone(), self.type_name.clone());
        FieldDescription { name, type_name, size, ..FieldDescription::default() }
    }
}

/// False for bytes that QEMU never writes for a field of this type.
fn is_plausible(type_name: &str, bytes: &[u8]) -> bool {
    match ScalarKind::of_type(type_name) {
        Some(ScalarKind::Bool) => bytes.iter().all(|byte| *byte <= 1),
        Some(ScalarKind::PointerMarker) => bytes.iter().all(|byte| [NULL_POINTER, VALID_POINTER].contains(byte)),
        _ => true,
    }
}

/// The subsection of `structure` whose header `rest` starts with, its version, and the header's length.
fn subsection_at<'s>(rest: &[u8], structure: &'s Structure) -> Option<(&'s str, u32, usize)> {
    let (&[tree::SUBSECTION, length], rest) = rest.split_first_chunk()? else { return None };
    let (name, rest) = rest.split_at_checked(length.into())?;
    let version = u32::from_be_bytes(*rest.first_chunk()?);
    let name = structure.subsections.get(std::str::from_utf8(name).ok()?)?;
    Some((name, version, 6 + name.len()))
}
