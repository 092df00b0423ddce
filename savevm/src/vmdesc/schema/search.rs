//! The search for all ways in which a schema can explain the bytes of a section.

use super::super::msix::MSIX_ENTRY;
use super::super::tree::SUBSECTION;
use super::super::virtio::msix_vectors;
use super::structure::{FieldSchema, StructSchema, Verdict};
use std::rc::Rc;

/// Fields looked at before the search gives up, at most: some 10 ms.
const BUDGET: u32 = 1 << 20;
/// Fields looked at in any section, and for each of its bytes: the work follows the section's length.
const BUDGET_BASE: u32 = 1 << 12;
const BUDGET_PER_BYTE: u32 = 1 << 8;

/// Conditional fields of one section that may be in doubt. Real devices have some ten.
const MAX_CHOICES: usize = 1 << 10;

/// The choices (whether each conditional field is there, in wire order) of the only way to read `body`.
pub(super) fn only_way(
    schema: &StructSchema,
    version: u32,
    body: &[u8],
    array_lengths: bool,
) -> Result<Vec<bool>, Verdict> {
    let start = Frame { schema, version, field: 0, element: 0, outer: None };
    let mut open = vec![Path { frame: Some(Rc::new(start)), position: 0, choices: Vec::new() }];
    let per_byte = BUDGET_PER_BYTE.saturating_mul(u32::try_from(body.len()).unwrap_or(u32::MAX));
    let mut budget = BUDGET.min(BUDGET_BASE.saturating_add(per_byte));
    let mut found: Option<Vec<bool>> = None;
    while let Some(path) = open.pop() {
        match path.follow(body, &mut open, &mut budget) {
            End::BudgetSpent => return Err(Verdict::TooManyChoices),
            End::Fits(_) if found.is_some() => return Err(Verdict::Ambiguous),
            End::Fits(choices) => found = Some(choices),
            End::DoesNotFit => {}
        }
    }
    let found = found.ok_or(Verdict::Contradiction)?;
    // Without lengths of arrays, a fit that needs a condition to hold can be an array taken for something else.
    match array_lengths || !found.contains(&true) {
        true => Ok(found),
        false => Err(Verdict::Ambiguous),
    }
}

/// Where the search is in nested structures. Paths share the frames they have in common.
struct Frame<'s> {
    schema: &'s StructSchema,
    version: u32,
    field: usize,
    element: u64,
    outer: Option<Rc<Frame<'s>>>,
}

/// One way to read the bytes up to `position`.
struct Path<'s> {
    frame: Option<Rc<Frame<'s>>>,
    position: usize,
    choices: Vec<bool>,
}

enum End {
    Fits(Vec<bool>),
    DoesNotFit,
    BudgetSpent,
}

impl<'s> Path<'s> {
    /// Follows the path to its end; where there is a choice, the other way goes to `open`.
    fn follow(mut self, body: &[u8], open: &mut Vec<Path<'s>>, budget: &mut u32) -> End {
        while let Some(frame) = self.frame.take() {
            let Some(left) = budget.checked_sub(1) else { return End::BudgetSpent };
            *budget = left;
            let Some(field) = frame.schema.fields.get(frame.field) else {
                self.end_of_structure(&frame, body);
                continue;
            };
            if field.version > frame.version {
                self.frame = Some(frame.next_field());
                continue;
            }
            if field.conditional && frame.element == 0 {
                if self.choices.len() == MAX_CHOICES {
                    return End::BudgetSpent;
                }
                let mut choices = self.choices.clone();
                choices.push(false);
                open.push(Path { frame: Some(frame.next_field()), position: self.position, choices });
                self.choices.push(true);
            }
            if !self.element(&frame, field, body) {
                return End::DoesNotFit;
            }
        }
        if self.position == body.len() { End::Fits(self.choices) } else { End::DoesNotFit }
    }

    /// Goes on after the fields of a structure: into a subsection, or out.
    fn end_of_structure(&mut self, frame: &Rc<Frame<'s>>, body: &[u8]) {
        if let Some((subsection, version, header)) = subsection_at(frame.schema, &body[self.position..]) {
            self.position += header;
            let outer = Some(frame.clone());
            self.frame = Some(Rc::new(Frame { schema: subsection, version, field: 0, element: 0, outer }));
        } else {
            self.frame.clone_from(&frame.outer);
        }
    }

    /// Goes on after an element of a field, or into it.
    fn element(&mut self, frame: &Rc<Frame<'s>>, field: &'s FieldSchema, body: &[u8]) -> bool {
        let count = field.count.unwrap_or(1);
        let Some(nested) = &field.nested else {
            let Some(len) = leaf_len(field, frame.schema, &body[..self.position], body.len()) else { return false };
            let end = count.checked_mul(len).and_then(|len| (self.position as u64).checked_add(len));
            let Some(end) = end.filter(|end| *end <= body.len() as u64) else { return false };
            self.position = end as usize;
            self.frame = Some(frame.next_field());
            return true;
        };
        let outer = if frame.element + 1 < count { frame.next_element() } else { frame.next_field() };
        if count == 0 {
            self.frame = Some(outer);
            return true;
        }
        let (schema, version, outer) = (nested, nested.version, Some(outer));
        self.frame = Some(Rc::new(Frame { schema, version, field: 0, element: 0, outer }));
        true
    }
}

impl<'s> Frame<'s> {
    fn next_field(&self) -> Rc<Self> {
        Rc::new(Frame { field: self.field + 1, element: 0, outer: self.outer.clone(), ..*self })
    }

    fn next_element(&self) -> Rc<Self> {
        Rc::new(Frame { element: self.element + 1, outer: self.outer.clone(), ..*self })
    }
}

/// The subsection of `schema` whose header `rest` starts with, its version, and the header's length.
pub(super) fn subsection_at<'s>(schema: &'s StructSchema, rest: &[u8]) -> Option<(&'s StructSchema, u32, usize)> {
    let (&[SUBSECTION, length], rest) = rest.split_first_chunk()? else { return None };
    let (name, rest) = rest.split_at_checked(length.into())?;
    let version = u32::from_be_bytes(*rest.first_chunk()?);
    let named = schema.subsections.iter().find(|s| s.name.as_bytes() == name)?;
    (named.minimum_version..=named.version).contains(&version).then_some((named, version, 6 + name.len()))
}

/// Bytes of a field without structure. `before` is what the section has before it, `total` the section's length.
pub(super) fn leaf_len(field: &FieldSchema, schema: &StructSchema, before: &[u8], total: usize) -> Option<u64> {
    if field.size > 0 {
        return Some(field.size);
    }
    match field.name.as_str() {
        // Where it is the only field, it is the whole section.
        "virtio" if schema.fields.len() == 1 && before.is_empty() => Some(total as u64),
        "msix" => {
            // After a PCI device, of which configuration space and four interrupt pins are on the wire.
            const IRQ_STATE: usize = 16;
            let config = before.get(..before.len().checked_sub(IRQ_STATE)?)?;
            let vectors = [256, 4096].into_iter().find_map(|len| {
                let config = config.get(config.len().checked_sub(len)?..)?;
                (before.len() == 4 + len + IRQ_STATE).then(|| msix_vectors(config))
            })?;
            Some(vectors * MSIX_ENTRY + vectors.div_ceil(8))
        }
        // Requests in flight: none.
        "requests" => Some(1),
        _ => None,
    }
}
