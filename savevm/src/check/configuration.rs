//! Machine type, page size, capabilities, UUID and commands.

use super::summary::COMPARED_CAPABILITIES;
use super::{Expectations, Finding, Outcome, Subject, Summary};
use crate::configuration::{Configuration, ConfigurationSubsection};
use qevm_wire::{PageGeometry, QemuVersion};

/// The release from which on SWITCHOVER_START is known.
const SWITCHOVER_START_SINCE: QemuVersion = QemuVersion::new(10, 0);

pub(super) fn compare(stream: &Summary, destination: &Expectations, findings: &mut Vec<Finding>) {
    match &stream.configuration {
        Some(configuration) => in_section(configuration, destination, findings),
        None if destination.machine.is_some() => findings.push(Finding {
            subject: Subject::Configuration,
            found: "no configuration section".into(),
            expected: "one, unless migration.send-configuration=off".into(),
            outcome: Outcome::MayFail,
            cause: Some("machine types before 2.4 send none"),
        }),
        None => {}
    }
    commands(stream, destination, findings);
}

fn in_section(configuration: &Configuration, destination: &Expectations, findings: &mut Vec<Finding>) {
    let machine = &configuration.machine;
    // A destination compares as many bytes as were sent.
    if let Some(local) = destination.machine.as_ref().filter(|local| *local != machine) {
        let prefix = local.starts_with(machine);
        findings.push(Finding {
            subject: Subject::MachineType,
            found: machine.escape_ascii().to_string(),
            expected: local.escape_ascii().to_string(),
            outcome: if prefix { Outcome::Loads } else { Outcome::Fails },
            cause: Some(match prefix {
                true => "only as many letters as were sent are compared",
                false => "give -machine the full name: aliases such as q35 mean another type in each release",
            }),
        });
    }
    let page_size = configuration.page_geometry().unwrap_or(PageGeometry::X86).size();
    if let Some(local) = destination.page_size.filter(|local| *local != page_size) {
        findings.push(Finding {
            subject: Subject::PageSize,
            found: page_size.to_string(),
            expected: local.to_string(),
            outcome: Outcome::Fails,
            cause: None,
        });
    }
    for name in COMPARED_CAPABILITIES {
        let Some(&local) = destination.capabilities.get(name) else { continue };
        let sent = configuration.has_capability(name);
        if sent != local {
            findings.push(Finding {
                subject: Subject::Capability(name),
                found: on_off(sent),
                expected: on_off(local),
                outcome: Outcome::Fails,
                cause: Some("set the capability on both sides"),
            });
        }
    }
    for subsection in &configuration.subsections {
        let ConfigurationSubsection::Uuid(uuid) = subsection else { continue };
        if let Some(local) = destination.uuid.filter(|local| local != uuid) {
            findings.push(Finding {
                subject: Subject::Uuid,
                found: uuid_text(uuid),
                expected: uuid_text(&local),
                outcome: Outcome::Fails,
                cause: Some("capability validate-uuid is on at the source: give both sides the same -uuid"),
            });
        }
    }
}

fn commands(stream: &Summary, destination: &Expectations, findings: &mut Vec<Finding>) {
    if let Some(qemu) = destination.qemu.filter(|qemu| stream.switchover_start && *qemu < SWITCHOVER_START_SINCE) {
        findings.push(Finding {
            subject: Subject::Command("SWITCHOVER_START"),
            found: "sent".into(),
            expected: format!("unknown to QEMU {qemu}"),
            outcome: Outcome::Fails,
            cause: Some("start the source with -global migration.send-switchover-start=off"),
        });
    }
    for (name, sent) in [("postcopy-ram", stream.postcopy_ram), ("multifd", stream.multifd)] {
        if sent && destination.capabilities.get(name) == Some(&false) {
            findings.push(Finding {
                subject: Subject::Capability(name),
                found: on_off(true),
                expected: on_off(false),
                outcome: Outcome::Fails,
                cause: Some("set the capability at the destination, too"),
            });
        }
    }
}

/// As QEMU writes it: 8, 4, 4, 4 and 12 digits.
fn uuid_text(uuid: &[u8; 16]) -> String {
    let digits = |range: std::ops::Range<usize>| uuid[range].iter().map(|b| format!("{b:02x}")).collect::<String>();
    [digits(0..4), digits(4..6), digits(6..8), digits(8..10), digits(10..16)].join("-")
}

fn on_off(on: bool) -> String {
    (if on { "on" } else { "off" }).to_owned()
}
