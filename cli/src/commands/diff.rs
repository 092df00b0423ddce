//! `qevm diff`: what differs between two guests.

use super::Output;
use crate::args;
use crate::failure::Stop;
use crate::table::Table;
use qevm_inspect::diff::{Devices, Difference, Differences, Guest, Wanted, differences};
use qevm_inspect::open::is_disk_image;
use qevm_inspect::ram::Keep;
use qevm_inspect::stream::{Input, Inputs, Settings, analyze};
use serde::Serialize;
use std::path::Path;

/// Runs the command.
///
/// # Errors
/// [`Stop::Found`] if there are differences, [`Stop::Bad`] if one of the streams is bad, [`Stop::Usage`] if a file
/// cannot be opened.
pub fn run(diff: &args::Diff) -> Result<(), Stop> {
    let keep = if diff.no_ram { Keep::Nothing } else { Keep::Digests };
    let layouts = diff.layouts.open()?;
    let (spool, max_ram) = (diff.bounds.spool(), u64::MAX);
    let settings =
        Settings { keep, reencode: false, complete: false, strict: false, live: false, layouts, spool, max_ram };
    let [of_first, of_second] = snapshots(diff)?;
    let mut first = read(&diff.first, of_first, &settings)?;
    let mut second = read(&diff.second, of_second, &settings)?;
    let wanted = Wanted { place: diff.section.clone(), pages: !diff.no_ram };
    let Differences { list: found, omitted, .. } = differences(&mut first, &mut second, wanted)?;
    let mut out = Output::new();
    if diff.output.json {
        out.json(&Object { identical: found.is_empty(), differences: &found, omitted })?;
    } else if found.is_empty() {
        out.line("no differences")?;
    } else {
        let mut table = Table::new(&["what", "where", "first", "second"]);
        for difference in &found {
            let side = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".into());
            let (first, second) = (side(&difference.first), side(&difference.second));
            table.row([difference.kind.to_owned(), difference.place.clone(), first, second]);
        }
        out.print(table.within(super::line_width()))?;
        let omitted = if omitted > 0 { format!(" and {omitted} more") } else { String::new() };
        out.line(format!("{} differences{omitted}", found.len()))?;
    }
    out.finish()?;
    if found.is_empty() { Ok(()) } else { Err(Stop::Found) }
}

/// What is printed for machines.
#[derive(Serialize)]
struct Object<'a> {
    identical: bool,
    differences: &'a [Difference],
    /// Only if there are too many to list.
    #[serde(skip_serializing_if = "is_zero")]
    omitted: u64,
}

fn is_zero(omitted: &u64) -> bool {
    *omitted == 0
}

/// Which snapshots are read, if any.
fn snapshots(diff: &args::Diff) -> Result<[Option<&str>; 2], Stop> {
    let images = [is_disk_image(&diff.first), is_disk_image(&diff.second)];
    match &diff.snapshot[..] {
        [] => Ok([None; 2]),
        // A mistake if neither is an image, which opening the first one says.
        [one] => Ok([images[0] || !images[1], images[1]].map(|image| image.then_some(one.as_str()))),
        [first, second] => Ok([Some(first), Some(second)]),
        more => Err(Stop::Usage(format!("--snapshot is given {} times, expected once for each side", more.len()))),
    }
}

fn read(path: &Path, snapshot: Option<&str>, settings: &Settings) -> Result<Guest, Stop> {
    let mut inputs = Inputs::open(&Input::snapshot_of(path, snapshot))?;
    let mut devices = Devices::default();
    let mut analysis = analyze(&mut inputs, settings, &mut devices);
    match analysis.failure.take() {
        Some(failure) => Err(failure.into()),
        None => Ok(Guest { analysis, devices }),
    }
}
