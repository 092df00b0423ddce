//! Numbers of device sections that decide whether they load.

use super::rules::{self, Rule, SCANOUTS};
use super::{Expectations, Finding, Outcome, Subject, Summary, virtio_features};
use crate::framing::SectionHeader;
use crate::vmdesc::{Node, Value};
use qevm_wire::QemuVersion;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Most numbers, and most bytes of their paths, that are kept of a stream: many times what a real one has.
const MOST: usize = 1 << 16;
const MOST_TEXT: usize = 4 << 20;

/// The numbers of a stream's device sections that a comparison needs: those that are not in arrays, those that a
/// destination compares itself, and the queues of virtio devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Values {
    sections: HashMap<(String, u32), Section>,
    kept: usize,
    text: usize,
}

/// The numbers of one section by their paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Section(BTreeMap<String, Number>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Number {
    value: i128,
    rule: Rule,
}

impl Values {
    /// Takes note of the fields of a section.
    ///
    /// ```
    /// use qevm_savevm::check::Values;
    /// use qevm_savevm::framing::SectionHeader;
    /// use qevm_savevm::vmdesc::{Node, Scalar, ScalarKind, Value};
    /// use qevm_wire::CountedString;
    ///
    /// let value = Value::Scalar(Scalar::new(ScalarKind::U32, 4));
    /// let node = Node { name: "ports".into(), type_name: "uint32 equal".into(), offset: 0, len: 4, value };
    /// let header = SectionHeader { section_id: 1, idstr: CountedString::new("xhci").unwrap(), instance_id: 0, version_id: 1 };
    /// let mut values = Values::default();
    /// values.note(&header, &node);
    /// assert!(!values.is_empty());
    /// ```
    pub fn note(&mut self, header: &SectionHeader, fields: &Node) {
        let Values { sections, kept, text } = self;
        let idstr = header.idstr.to_string();
        let section = sections.entry((idstr.clone(), header.instance_id)).or_default();
        let mut keep = |path: &str, type_name: &str, value: i128| {
            let rule = Rule::of(&idstr, path, type_name);
            let wanted = rule != Rule::Takes || !path.contains('[') || Queue::parse(path).is_some();
            if wanted && *kept < MOST && *text + path.len() <= MOST_TEXT {
                *kept += 1;
                *text += path.len();
                section.0.insert(path.to_owned(), Number { value, rule });
            }
        };
        let mut scanouts = None;
        fields.leaves(&mut |path, leaf| {
            // The section's own name comes first.
            let path = path.get(fields.name.len() + 1..).unwrap_or(path);
            match &leaf.value {
                Value::Scalar(number) => keep(path, &leaf.type_name, number.as_i128()),
                Value::Scalars(words) if path.ends_with(".ports_map") => {
                    for (index, word) in words.iter().enumerate() {
                        keep(&format!("{path}[{index}]"), &leaf.type_name, word.as_i128());
                    }
                }
                _ => {}
            }
            if path.starts_with("virtio-gpu.scanout[") {
                *scanouts.get_or_insert(0) += i128::from(leaf.len);
            }
        });
        scanouts.into_iter().for_each(|bytes| keep(SCANOUTS, "", bytes));
    }

    /// Nothing was noted: the stream has no fields, or was not read.
    pub fn is_empty(&self) -> bool {
        self.sections.is_empty()
    }

    pub(super) fn section(&self, idstr: &str, instance_id: u32) -> Option<&Section> {
        self.sections.get(&(idstr.to_owned(), instance_id))
    }
}

impl Section {
    /// What the numbers of this section and those of the other one at the same places are.
    pub(super) fn pairs(&self, other: &Section) -> HashSet<(i128, i128)> {
        self.0.iter().filter_map(|(path, number)| Some((number.value, other.value(path)?))).collect()
    }

    fn value(&self, path: &str) -> Option<i128> {
        self.0.get(path).map(|number| number.value)
    }
}

/// A field of a virtqueue, by its path in a section.
struct Queue<'p> {
    /// The path up to the index.
    queues: &'p str,
    index: u32,
}

impl<'p> Queue<'p> {
    fn parse(path: &'p str) -> Option<Self> {
        let (queues, rest) = path.rsplit_once("vq[")?;
        let (index, field) = rest.split_once("].")?;
        (queues.ends_with("virtio.") || queues.is_empty()).then_some(())?;
        let index = index.parse().ok().filter(|_| matches!(field, "num" | "desc"))?;
        Some(Queue { queues, index })
    }

    /// Entries of the queue; `None` without such a queue.
    fn len(&self, section: &Section) -> Option<i128> {
        section.value(&format!("{}vq[{}].num", self.queues, self.index))
    }

    /// A driver has set the queue up, and may have made it shorter.
    fn driven(&self, section: &Section) -> bool {
        section.value(&format!("{}vq[{}].desc", self.queues, self.index)).is_some_and(|address| address != 0)
    }
}

const FEATURES: &str = "a stream shows what its guest has accepted and not what the device offers: give the device the same \
                        properties on both sides; `x-query-virtio-status` of the destination (QMP) tells what it offers";

/// From this release on a queue must not be longer than the destination's own; up to the one before, any length loads.
const QUEUES_ARE_BOUNDED: QemuVersion = QemuVersion::new(11, 1);
/// The newest release that was seen to take queues of any length.
const QUEUES_ARE_FREE: QemuVersion = QemuVersion::new(10, 0);

pub(super) fn compare(stream: &Summary, destination: &Expectations, findings: &mut Vec<Finding>) {
    let mut seen = HashSet::new();
    for header in stream.sections.iter().filter(|header| seen.insert((&header.idstr, header.instance_id))) {
        let (idstr, instance_id) = (header.idstr.to_string(), header.instance_id);
        let Some(sent) = stream.values.section(&idstr, instance_id) else { continue };
        let own = destination.values.section(&idstr, instance_id);
        let mut report = |path: &str, found: String, expected: String, outcome, cause| {
            let subject = Subject::Fields { idstr: idstr.clone(), instance_id, path: path.to_owned() };
            findings.push(Finding { subject, found, expected, outcome, cause: Some(cause) });
        };
        for (path, number) in &sent.0 {
            let local = own.and_then(|own| own.value(path));
            match (number.rule, local) {
                (Rule::Equal, Some(local)) if number.value != local => report(
                    path,
                    number.value.to_string(),
                    format!("exactly {local}"),
                    Outcome::Fails,
                    rules::cause(&idstr, path),
                ),
                // Those that its own guest has accepted it offers; of the others its stream tells nothing.
                (Rule::Features, Some(local)) if number.value & !local != 0 => report(
                    path,
                    format!("accepted by the guest: {}", virtio_features(&idstr, (number.value & !local) as u64)),
                    "not known to be offered".into(),
                    Outcome::MayFail,
                    FEATURES,
                ),
                (Rule::AtMost, Some(local)) if !(0..=local).contains(&number.value) => report(
                    path,
                    number.value.to_string(),
                    format!("0 to {local}"),
                    Outcome::Fails,
                    rules::cause_of_more(path),
                ),
                _ => {}
            }
        }
        let bounded = destination.qemu.filter(|release| *release > QUEUES_ARE_FREE);
        if let Some((release, (found, expected, outcome, cause, path))) =
            bounded.and_then(|release| Some((release, longest_queue(sent, own)?)))
        {
            let outcome = if release < QUEUES_ARE_BOUNDED { Outcome::MayFail } else { outcome };
            report(&path, found, expected, outcome, cause);
        }
    }
}

/// The first queue that is longer than the destination's.
fn longest_queue(sent: &Section, own: Option<&Section>) -> Option<(String, String, Outcome, &'static str, String)> {
    const UNDRIVEN: &str = "QEMU 10.0 gives a queue that no driver has set up 1024 entries: let the guest drive the device \
                            first, or compare with a stream of the destination (--against)";
    const SIZE: &str = "give the device the same queue-size=, virtqueue_size= and number of queues on both sides; a queue \
                        of 1024 that no driver has set up comes from QEMU 10.0";
    let mut queues: Vec<_> =
        sent.0.keys().filter(|path| path.ends_with("].num")).filter_map(|path| Queue::parse(path)).collect();
    queues.sort_by_key(|queue| queue.index);
    queues.into_iter().find_map(|queue| {
        let len = queue.len(sent).filter(|len| *len > 0)?;
        let path = format!("{}vq[{}].num", queue.queues, queue.index);
        let found = format!("{len} entries");
        let Some(own) = own else {
            // Nothing is known of the destination's device.
            let doubtful = len == 1024 && !queue.driven(sent);
            return doubtful.then(|| (found, "not known".into(), Outcome::MayFail, UNDRIVEN, path));
        };
        let local = queue.len(own).unwrap_or(0);
        if len <= local {
            return None;
        }
        let outcome = if queue.driven(own) { Outcome::MayFail } else { Outcome::Fails };
        Some((found, format!("at most {local}"), outcome, SIZE, path))
    })
}
