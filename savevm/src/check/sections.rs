//! Sections: which there are, and in which version.

use super::{Expectations, Finding, Outcome, Subject, Summary, cause, versions};
use crate::framing::SectionHeader;
use crate::vmdesc::Schema;
use qevm_wire::CountedString;
use std::collections::{HashMap, HashSet};

pub(super) fn compare(stream: &Summary, destination: &Expectations, findings: &mut Vec<Finding>) {
    if let (Some(found), Some(expected)) = (stream.footers, destination.footers)
        && found != expected
    {
        let text = |footers: bool| if footers { "after each section" } else { "none" }.to_owned();
        findings.push(Finding {
            subject: Subject::Footers,
            found: text(found),
            expected: text(expected),
            outcome: Outcome::Fails,
            cause: Some("migration.send-section-footer differs: give both sides the same -global, or machine type"),
        });
    }
    let handlers = |sections: &'_ [SectionHeader]| -> HashSet<(CountedString, u32)> {
        sections.iter().map(|section| (section.idstr.clone(), section.instance_id)).collect()
    };
    if let Some(local) = &destination.sections {
        // Of two sections of one handler the first counts.
        let by_handler: HashMap<_, _> =
            local.iter().rev().map(|section| ((&section.idstr, section.instance_id), section)).collect();
        for section in &stream.sections {
            let local = by_handler.get(&(&section.idstr, section.instance_id)).copied();
            against(section, local, destination, findings);
        }
        let sent = handlers(&stream.sections);
        for section in local.iter().filter(|l| !sent.contains(&(l.idstr.clone(), l.instance_id))) {
            findings.push(Finding {
                subject: subject(section),
                found: "no such section".into(),
                expected: version(section.version_id),
                outcome: Outcome::Loads,
                cause: Some("QEMU leaves devices in their reset state that are only at the destination"),
            });
        }
    }
    if let Some(schema) = &destination.schema {
        let local = handlers(destination.sections.as_deref().unwrap_or_default());
        for section in &stream.sections {
            let written = local.contains(&(section.idstr.clone(), section.instance_id));
            against_schema(section, schema, written, findings);
        }
    }
}

fn against(
    section: &SectionHeader,
    local: Option<&SectionHeader>,
    destination: &Expectations,
    findings: &mut Vec<Finding>,
) {
    let idstr = section.idstr.to_string();
    let Some(local) = local else {
        // Every QEMU since 2.5 reads this section, whether it writes one or not.
        if idstr == "globalstate" {
            return;
        }
        // One that does not migrate its ramfb (`x-migrate=off`) writes no such section, and reads it all the same.
        let outcome = if idstr == "ramfb-dev" { Outcome::MayFail } else { Outcome::Fails };
        findings.push(Finding {
            subject: subject(section),
            found: version(section.version_id),
            expected: "no such section".into(),
            outcome,
            cause: Some(cause::of_missing_section(&idstr, section.instance_id)),
        });
        return;
    };
    let (found, expected) = (section.version_id, local.version_id);
    if found != expected {
        findings.push(Finding {
            subject: subject(section),
            found: version(found),
            expected: version(expected),
            outcome: if found > expected { Outcome::Fails } else { versions::older(section, expected, destination) },
            cause: Some("another release, or another machine version, wrote the stream"),
        });
    }
}

/// `written`: the destination writes the section itself, so that it has the device.
fn against_schema(section: &SectionHeader, schema: &Schema, written: bool, findings: &mut Vec<Finding>) {
    let Some(versions) = schema.versions(&section.idstr) else {
        // Parts of the machine are in no schema; what has a place on a bus is a device. But some devices, such as `ide`
        // up to 7.2, register what they save on their own, which no dump shows.
        if !written && section.idstr.as_bytes().contains(&b'/') {
            findings.push(Finding {
                subject: subject(section),
                found: version(section.version_id),
                expected: "no device of this name".into(),
                outcome: Outcome::MayFail,
                cause: Some("the destination's QEMU lacks the device model, or leaves it out of its -dump-vmstate"),
            });
        }
        return;
    };
    if !versions.iter().any(|range| range.contains(&section.version_id)) {
        let known: Vec<_> = versions.iter().map(|range| format!("{} to {}", range.start(), range.end())).collect();
        findings.push(Finding {
            subject: subject(section),
            found: version(section.version_id),
            expected: format!("versions {}", known.join(" or ")),
            outcome: Outcome::Fails,
            cause: Some("another release, or another machine version, wrote the stream"),
        });
    }
}

fn subject(section: &SectionHeader) -> Subject {
    Subject::Section { idstr: section.idstr.to_string(), instance_id: section.instance_id }
}

fn version(version: u32) -> String {
    format!("version {version}")
}
