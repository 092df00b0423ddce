//! RAM blocks.

use super::{Expectations, Finding, Outcome, Subject, Summary, cause};
use crate::ram::RamBlock;
use std::collections::{HashMap, HashSet};

pub(super) fn compare(stream: &Summary, destination: &Expectations, findings: &mut Vec<Finding>) {
    let Some(local) = &destination.ram else { return };
    let at_destination: HashMap<_, _> = local.iter().map(|block| (&block.name, block)).collect();
    for block in &stream.ram {
        match at_destination.get(&block.name) {
            Some(local) => one(block, local, findings),
            None => findings.push(Finding {
                subject: subject(block),
                found: bytes(block.used_length),
                expected: "no such block".into(),
                outcome: Outcome::Fails,
                cause: Some("the destination lacks the block's device, or has it at another place"),
            }),
        }
    }
    let sent: HashSet<_> = stream.ram.iter().map(|block| &block.name).collect();
    for block in local.iter().filter(|l| !sent.contains(&l.name)) {
        findings.push(Finding {
            subject: subject(block),
            found: "no such block".into(),
            expected: bytes(block.used_length),
            outcome: Outcome::Loads,
            cause: Some("QEMU leaves blocks alone that are only at the destination"),
        });
    }
}

fn one(block: &RamBlock, local: &RamBlock, findings: &mut Vec<Finding>) {
    let name = block.name.to_string();
    if block.used_length != local.used_length {
        // Tables that firmware gets through fw_cfg are blocks that can be resized, up to a length no stream tells.
        let resizable = name.starts_with("/rom@etc/");
        findings.push(Finding {
            subject: subject(block),
            found: bytes(block.used_length),
            expected: bytes(local.used_length),
            outcome: if resizable { Outcome::Loads } else { Outcome::Fails },
            cause: Some(if resizable { "QEMU resizes this block" } else { cause::of_block_size(&name) }),
        });
    }
    if block.page_size != local.page_size && block.page_size.is_some() {
        let size = |size: Option<u64>| {
            size.map_or_else(|| "the default page size".to_owned(), |s| format!("pages of {s} bytes"))
        };
        findings.push(Finding {
            subject: subject(block),
            found: size(block.page_size),
            expected: size(local.page_size),
            outcome: Outcome::Fails,
            cause: Some("postcopy needs the same huge pages on both sides"),
        });
    }
    let addresses = block.address.zip(local.address);
    if let Some((found, expected)) = addresses.filter(|(found, expected)| found != expected) {
        findings.push(Finding {
            subject: subject(block),
            found: format!("address {found:#x}"),
            expected: format!("address {expected:#x}"),
            outcome: Outcome::MayFail,
            cause: Some("with x-ignore-shared, the addresses of shared blocks are compared"),
        });
    }
}

fn subject(block: &RamBlock) -> Subject {
    Subject::RamBlock(block.name.to_string())
}

fn bytes(len: u64) -> String {
    format!("{len:#x} bytes")
}
