//! `qevm convert`: a migration in another form.

use super::Output;
use crate::args::{self, StreamForm};
use crate::failure::Stop;
use crate::progress::Progress;
use crate::rewrite::SavedGuest;
use crate::rewrite::stream::{Multifd, Target};
use crate::stream::Inputs;
use crate::table::size;
use serde_json::{Map, json};
use std::fs::File;

/// Runs the command.
///
/// # Errors
/// [`Stop::Bad`] if the migration is bad or cannot be rewritten, [`Stop::Usage`] if the output file exists.
pub fn run(convert: &args::Convert) -> Result<(), Stop> {
    let mut inputs = Inputs::open(&convert.input)?;
    let name = convert.out.display().to_string();
    let mut guest = SavedGuest::read(&mut inputs)?;
    let file = if convert.force { File::create(&convert.out) } else { File::create_new(&convert.out) };
    let mut file = file.map_err(|error| Stop::Usage(format!("{name}: cannot be created: {error}")))?;
    let mut bar = Progress::new("writing", Some(guest.data_len()));
    let written = match convert.format {
        StreamForm::Plain => {
            let target = Target { out: &mut file, name: &name, return_path: false, zero_pages: true };
            guest.write_stream(target, None::<Multifd<File>>, &mut bar)
        }
        StreamForm::MappedRam => guest.write_mapped(&file, &name, &mut bar),
    };
    drop(bar);
    let bytes = written.inspect_err(|_| {
        // Half a stream is of no use, and looks like a whole one.
        let _ = std::fs::remove_file(&convert.out);
    })?;
    let mut out = Output::new();
    match convert.output.json {
        true => {
            let mut object = Map::new();
            object.insert("path".into(), json!(name));
            object.insert("format".into(), json!(convert.format.as_str()));
            object.insert("bytes".into(), json!(bytes));
            out.json(object)?;
        }
        false => out.line(format!("{name}: {} stream, {}", convert.format.as_str(), size(bytes)))?,
    }
    out.finish()
}
