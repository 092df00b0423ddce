//! `qevm diff`: what differs between two guests.

use super::Output;
use crate::args;
use crate::diff::{Devices, Guest, differences};
use crate::failure::Stop;
use crate::ram::Keep;
use crate::stream::{Inputs, Layouts, Settings, analyze};
use crate::table::Table;
use serde_json::{Map, json};
use std::path::Path;

/// Runs the command.
///
/// # Errors
/// [`Stop::Found`] if there are differences, [`Stop::Bad`] if one of the streams is bad, [`Stop::Usage`] if a file cannot be opened.
pub fn run(diff: &args::Diff) -> Result<(), Stop> {
    let keep = if diff.no_ram { Keep::Nothing } else { Keep::Digests };
    let layouts = Layouts::open(&diff.layouts)?;
    let (spool, max_ram) = (diff.bounds.spool(), u64::MAX);
    let settings = Settings { keep, reencode: false, complete: false, live: false, layouts, spool, max_ram };
    let mut first = read(&diff.first, &settings)?;
    let mut second = read(&diff.second, &settings)?;
    let mut found = differences(&mut first, &mut second)?;
    found.retain(|difference| {
        let section = diff.section.as_ref().is_none_or(|wanted| difference.place.contains(wanted.as_str()));
        section && !(diff.no_ram && difference.kind == "pages")
    });
    let mut out = Output::new();
    if diff.output.json {
        let mut object = Map::new();
        object.insert("identical".into(), json!(found.is_empty()));
        object.insert("differences".into(), found.iter().map(|difference| difference.to_json()).collect());
        out.json(object)?;
    } else if found.is_empty() {
        out.line("no differences")?;
    } else {
        let mut table = Table::new(&["what", "where", "first", "second"]);
        for difference in &found {
            let side = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".into());
            let (first, second) = (side(&difference.first), side(&difference.second));
            table.row([difference.kind.to_owned(), difference.place.clone(), first, second]);
        }
        out.print(table)?;
        out.line(format!("{} differences", found.len()))?;
    }
    out.finish()?;
    if found.is_empty() { Ok(()) } else { Err(Stop::Found) }
}

fn read(path: &Path, settings: &Settings) -> Result<Guest, Stop> {
    let mut inputs = Inputs::open(&args::Input::plain(path))?;
    let mut devices = Devices::default();
    let mut analysis = analyze(&mut inputs, settings, &mut devices);
    match analysis.failure.take() {
        Some(failure) => Err(failure.into()),
        None => Ok(Guest { analysis, devices }),
    }
}
