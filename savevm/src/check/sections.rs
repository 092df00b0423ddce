//! Sections: which there are, and in which version.

use super::{Expectations, Finding, Outcome, Subject, Summary, cause};
use crate::framing::SectionHeader;
use crate::vmdesc::Schema;

pub(super) fn compare(stream: &Summary, destination: &Expectations, findings: &mut Vec<Finding>) {
    if let Some(local) = &destination.sections {
        for section in &stream.sections {
            against(section, local, findings);
        }
        for section in local.iter().filter(|l| !stream.sections.iter().any(|s| s.is_same_handler(l))) {
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
        for section in &stream.sections {
            against_schema(section, schema, findings);
        }
    }
}

fn against(section: &SectionHeader, local: &[SectionHeader], findings: &mut Vec<Finding>) {
    let idstr = section.idstr.to_string();
    let Some(local) = local.iter().find(|l| l.is_same_handler(section)) else {
        findings.push(Finding {
            subject: subject(section),
            found: version(section.version_id),
            expected: "no such section".into(),
            outcome: Outcome::Fails,
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
            // How old a version still loads is the device's choice, which only a schema tells.
            outcome: if found > expected { Outcome::Fails } else { Outcome::MayFail },
            cause: Some("another release, or another machine version, wrote the stream"),
        });
    }
}

fn against_schema(section: &SectionHeader, schema: &Schema, findings: &mut Vec<Finding>) {
    let Some(versions) = schema.versions(&section.idstr) else {
        // Parts of the machine are in no schema; what has a place on a bus is a device.
        if section.idstr.as_bytes().contains(&b'/') {
            findings.push(Finding {
                subject: subject(section),
                found: version(section.version_id),
                expected: "no device of this name".into(),
                outcome: Outcome::Fails,
                cause: Some("the destination's QEMU does not have this device model, or not under this name"),
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
