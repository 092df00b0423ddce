//! Holds what `qevm verify` says about a recording against what QEMU says.

use crate::analyze::Script;
use crate::description;
use crate::fields::{self, Comparison, Place};
use crate::record::Recording;
use crate::subject::Subject;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// `QEMU_VM_SECTION_START`.
const SECTION_START: u8 = 0x01;
/// `QEMU_VM_SECTION_FULL`.
const SECTION_FULL: u8 = 0x04;
/// Machine types up to 2.3 neither write footers nor a description.
const WITHOUT_DESCRIPTION: [&str; 4] = ["pc-i440fx-2.0", "pc-i440fx-2.2", "pc-i440fx-2.3", "pc-q35-2.3"];

/// What was found about one recording. It holds when `problems` is empty.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Judgement {
    /// Everything that disagrees, one line each.
    pub problems: Vec<String>,
    /// Bytes that qevm accounted for.
    pub bytes: u64,
    /// Those of them that belong to no named field.
    pub opaque_bytes: u64,
    /// Sections that qevm found.
    pub sections: usize,
    /// RAM blocks whose digest equals QEMU's.
    pub blocks: usize,
    /// Bytes of them that `pmemsave` confirmed, too.
    pub pmemsave_bytes: u64,
    /// Forms written by qevm that QEMU loaded, with the same RAM, and went on with.
    pub reloads: usize,
    /// What went wrong when QEMU loaded what qevm wrote, and goes wrong as well with the stream that QEMU wrote itself.
    pub own_faults: Vec<String>,
    /// RAM blocks that QEMU shows no way to, so that nothing can be said.
    pub unjudged_blocks: Vec<String>,
}

/// The object that `qevm verify --json` prints last.
#[derive(Debug, Deserialize)]
struct Verified {
    ok: bool,
    bytes: u64,
    opaque_bytes: u64,
    reencoded_identical: bool,
    sections: Vec<Section>,
    ram: Vec<RamBlock>,
    error: Option<Fault>,
}

#[derive(Debug, Deserialize)]
struct Section {
    idstr: String,
    instance_id: u64,
    version_id: u64,
    offset: u64,
    size: u64,
}

#[derive(Debug, Deserialize)]
struct RamBlock {
    name: String,
    used_length: u64,
    pages: u64,
    sha256: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Fault {
    kind: String,
    offset: u64,
    path: String,
    message: String,
}

/// Judges the recording in `folder`.
///
/// # Errors
/// The recording cannot be read or qevm not be started. What qevm gets wrong is no error but a problem in the
/// judgement.
pub fn judge(recording: &Recording, folder: &Path, subject: &Subject) -> Result<Judgement> {
    judge_with_opaque(recording, folder, subject, 0)
}

/// The same for a stream of which this many bytes, no more and no less, belong to no named field.
///
/// # Errors
/// As [`judge`].
pub fn judge_with_opaque(
    recording: &Recording,
    folder: &Path,
    subject: &Subject,
    expected_opaque: u64,
) -> Result<Judgement> {
    let mut judgement = Judgement::default();
    let finished = subject.run(&verify_arguments(recording, folder))?;
    let last = finished.stdout.lines().last().unwrap_or_default();
    let verified: Verified = match serde_json::from_str(last) {
        Ok(verified) => verified,
        Err(e) => {
            let said = finished.stderr.lines().last().unwrap_or("nothing on standard error");
            judgement.problems.push(format!("verify printed no result ({}, {e}): {said}", finished.status));
            return Ok(judgement);
        }
    };
    if let Some(fault) = &verified.error {
        let Fault { kind, offset, path, message } = fault;
        judgement.problems.push(format!("verify: {kind} at byte {offset}, in {path:?}: {message}"));
    }
    if finished.code != Some(0) || !verified.ok {
        judgement.problems.push(format!("verify says ok = {} and ends with {}", verified.ok, finished.status));
    }
    if !verified.reencoded_identical {
        judgement.problems.push("re-encoding gives other bytes".into());
    }
    if verified.opaque_bytes != expected_opaque {
        let opaque = verified.opaque_bytes;
        let not = if expected_opaque > 0 { format!(", not {expected_opaque}") } else { String::new() };
        judgement.problems.push(format!("{opaque} bytes{not} of device sections belong to no named field"));
    }
    judgement.bytes = verified.bytes;
    judgement.opaque_bytes = verified.opaque_bytes;
    judgement.sections = verified.sections.len();
    bytes(recording, folder, &verified, &mut judgement)?;
    sections(recording, folder, &verified, &mut judgement)?;
    ram(recording, &verified, &mut judgement);
    Ok(judgement)
}

/// Compares the fields of a recording with those that QEMU's own script reads. The inner error is what the script says
/// about a stream that it cannot read.
///
/// # Errors
/// The script or qevm cannot be run.
pub fn judge_fields(
    recording: &Recording,
    folder: &Path,
    subject: &Subject,
    script: &Script,
) -> Result<Result<Comparison, String>> {
    let stream = folder.join(&recording.files.main);
    let theirs = match script.read(&stream)? {
        Ok(theirs) => theirs,
        Err(why) => return Ok(Err(why)),
    };
    let finished = subject.run(&verify_arguments(recording, folder))?;
    let last = finished.stdout.lines().last().unwrap_or_default();
    let verified: Verified = serde_json::from_str(last).context("qevm verify printed no result")?;
    let place =
        |s: Section| Place { idstr: s.idstr, instance_id: s.instance_id as u32, offset: s.offset, size: s.size };
    let places: Vec<Place> = verified.sections.into_iter().map(place).collect();
    Ok(Ok(fields::compare(&stream, &places, &theirs)?))
}

/// The command line of `qevm verify` for a recording.
pub fn verify_arguments(recording: &Recording, folder: &Path) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = ["verify", "--json", "--ram-digest", "sha256"].map(OsString::from).to_vec();
    arguments.extend(input_arguments(recording, folder));
    arguments
}

/// A recording's files, as the commands of `qevm` take them.
pub fn input_arguments(recording: &Recording, folder: &Path) -> Vec<OsString> {
    let files = &recording.files;
    let mut arguments: Vec<OsString> = Vec::new();
    if files.offset > 0 {
        arguments.extend(["--offset".into(), files.offset.to_string().into()]);
    }
    let mut option = |name: &str, file: &String| arguments.extend([name.into(), folder.join(file).into_os_string()]);
    files.channels.iter().chain(&files.recovery_channels).for_each(|f| option("--channel", f));
    files.recovery.iter().for_each(|f| option("--recovery", f));
    files.return_path.iter().chain(&files.recovery_return_path).for_each(|f| option("--return-path", f));
    arguments.push(folder.join(&files.main).into_os_string());
    arguments
}

/// Every byte of every file must have been accounted for.
fn bytes(recording: &Recording, folder: &Path, verified: &Verified, judgement: &mut Judgement) -> Result<()> {
    let files = &recording.files;
    if is_container(recording) {
        return Ok(());
    }
    let others = files.channels.iter().chain(&files.recovery_channels).chain(&files.recovery);
    let others = others.chain(&files.return_path).chain(&files.recovery_return_path);
    let mut expected = fs::metadata(folder.join(&files.main))?.len().saturating_sub(files.offset);
    for file in others {
        expected += fs::metadata(folder.join(file))?.len();
    }
    if verified.bytes != expected {
        judgement.problems.push(format!("{} of {expected} bytes are accounted for", verified.bytes));
    }
    Ok(())
}

/// The sections must be where they are said to be, and be those that QEMU's description has, in its order.
fn sections(recording: &Recording, folder: &Path, verified: &Verified, judgement: &mut Judgement) -> Result<()> {
    if is_container(recording) {
        if verified.sections.is_empty() {
            judgement.problems.push("no section was found".into());
        }
        return Ok(());
    }
    let path = folder.join(&recording.files.main);
    let main = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    let mut length = main.metadata()?.len();
    if let Some(recovery) = &recording.files.recovery {
        // A section that goes on after a recovery counts there, too.
        length += fs::metadata(folder.join(recovery))?.len();
    }
    for section in &verified.sections {
        let name = section.idstr.as_bytes();
        let mut header = vec![0; 5 + 1 + name.len() + 8];
        let there = main.read_exact_at(&mut header, section.offset).is_ok()
            && matches!(header[0], SECTION_START | SECTION_FULL)
            && header[5] as usize == name.len()
            && header[6..6 + name.len()] == *name
            && header[6 + name.len()..].starts_with(&(section.instance_id as u32).to_be_bytes())
            && header.ends_with(&(section.version_id as u32).to_be_bytes());
        if !there || section.offset.saturating_add(section.size) > length {
            let Section { idstr, instance_id, offset, size, .. } = section;
            judgement.problems.push(format!("no section '{idstr}' {instance_id} of {size} bytes is at byte {offset}"));
        }
    }
    match description::at_end_of(&path)? {
        Some(json) => compare(&description::devices(&json), verified, judgement),
        None if expects_description(recording) => {
            judgement.problems.push("the stream does not end with QEMU's description".into());
        }
        None => {}
    }
    Ok(())
}

fn compare(described: &[description::Described], verified: &Verified, judgement: &mut Judgement) {
    // Iterable sections (ram, slirp, block, dirty-bitmap) need not be in the description; everything in it must be
    // there.
    let mut found = verified.sections.iter();
    for device in described {
        let same = |s: &&Section| {
            s.idstr == device.idstr
                && s.instance_id == device.instance_id
                && device.version_id.is_none_or(|v| v == s.version_id)
        };
        if !found.any(|s| same(&s)) {
            let (name, instance) = (&device.idstr, device.instance_id);
            judgement.problems.push(format!("'{name}' {instance} of QEMU's description is missing or out of order"));
            return;
        }
    }
    if described.is_empty() {
        judgement.problems.push("QEMU's description names no device".into());
    }
}

/// Each RAM block of the stream must be QEMU's, and each of QEMU's in the stream.
fn ram(recording: &Recording, verified: &Verified, judgement: &mut Judgement) {
    let ignores_shared = recording.capabilities.iter().any(|c| c == "x-ignore-shared");
    for block in &verified.ram {
        let Some(truth) = recording.ram.iter().find(|b| b.name == block.name) else {
            judgement.problems.push(format!("QEMU has no RAM block {}", block.name));
            continue;
        };
        if truth.used_length != block.used_length {
            let (name, ours, theirs) = (&block.name, block.used_length, truth.used_length);
            judgement.problems.push(format!("{name}: {ours} bytes are used instead of {theirs}"));
        }
        if ignores_shared && block.pages == 0 {
            judgement.unjudged_blocks.push(block.name.clone());
            continue;
        }
        match (&truth.sha256, &block.sha256) {
            (None, _) => judgement.unjudged_blocks.push(block.name.clone()),
            (Some(theirs), Some(ours)) if theirs == ours => {
                judgement.blocks += 1;
                judgement.pmemsave_bytes += truth.pmemsave_bytes();
            }
            (Some(_), Some(_)) => judgement.problems.push(format!("{}: contents differ from QEMU's", block.name)),
            (Some(_), None) => judgement.problems.push(format!("{}: no digest", block.name)),
        }
    }
    for block in &recording.ram {
        if !verified.ram.iter().any(|b| b.name == block.name) {
            judgement.problems.push(format!("RAM block {} of QEMU is missing", block.name));
        }
    }
    if judgement.blocks == 0 && !recording.ram.is_empty() {
        judgement.problems.push("not one RAM block could be compared".into());
    }
}

fn expects_description(recording: &Recording) -> bool {
    let off = recording.arguments.iter().any(|a| a.contains("suppress-vmdesc=on"));
    let old = WITHOUT_DESCRIPTION.contains(&recording.machine.as_str());
    let postcopy = recording.capabilities.iter().any(|c| c == "postcopy-ram");
    !(off || old || postcopy)
}

fn is_container(recording: &Recording) -> bool {
    recording.files.main.ends_with(".qcow2")
}

/// Damages the recording in ways that must not go unnoticed, and gives what did.
///
/// # Errors
/// The recording cannot be read or qevm not be started.
pub fn damage(recording: &Recording, folder: &Path, subject: &Subject) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    let whole = fs::read(folder.join(&recording.files.main))?;
    let mut damaged = recording.clone();
    damaged.files.main = "damaged.qevm".into();
    let path = folder.join(&damaged.files.main);
    for (what, bytes) in damages(&whole, recording.files.offset as usize) {
        fs::write(&path, bytes)?;
        let finished = subject.run(&verify_arguments(&damaged, folder))?;
        let last = finished.stdout.lines().last().unwrap_or_default();
        let verified = serde_json::from_str::<Verified>(last).ok();
        let fault = verified.as_ref().and_then(|v| v.error.as_ref());
        if finished.code != Some(1) || verified.as_ref().is_none_or(|v| v.ok) {
            problems.push(format!("{what}: verify ends with {} instead of exit status 1", finished.status));
        } else if fault.is_none_or(|f| f.offset > whole.len() as u64 || f.message.is_empty()) {
            problems.push(format!("{what}: the error has no place in the file"));
        } else if finished.stderr.lines().count() != 1 {
            problems
                .push(format!("{what}: {} lines on standard error instead of one", finished.stderr.lines().count()));
        }
    }
    fs::remove_file(&path)?;
    Ok(problems)
}

/// Truncations anywhere, and flipped bits in what is not page contents: the magic and the end of the description.
fn damages(whole: &[u8], start: usize) -> Vec<(String, Vec<u8>)> {
    let stream = whole.len() - start;
    let mut all = Vec::new();
    for mut length in [2, stream / 3, stream / 2, stream - stream / 50, stream - 1] {
        // One that ends where its description would begin is whole: a machine with suppress-vmdesc=on writes it so.
        if let [6, a, b, c, d, rest @ ..] = &whole[start + length..]
            && u32::from_be_bytes([*a, *b, *c, *d]) as usize == rest.len()
        {
            length -= 1;
        }
        all.push((format!("cut after {length} bytes"), whole[..start + length].to_vec()));
    }
    for (what, at) in [("magic", start), ("version", start + 7), ("end of the description", whole.len() - 1)] {
        let mut bytes = whole.to_vec();
        bytes[at] ^= 0x20;
        all.push((format!("bit flipped in the {what}"), bytes));
    }
    all
}
