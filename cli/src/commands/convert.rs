//! `qevm convert`: a migration in another form.

use super::Output;
use crate::args::{self, StreamForm};
use crate::failure::Stop;
use crate::progress::Progress;
use qevm_inspect::failure::Failure;
use qevm_inspect::output_file::OutputFile;
use qevm_inspect::size::size;
use serde_json::{Map, json};

/// Runs the command.
///
/// # Errors
/// [`Stop::Bad`] if the migration is bad or cannot be rewritten, [`Stop::Usage`] if the output file exists.
pub fn run(convert: &args::Convert) -> Result<(), Stop> {
    let mut inputs = convert.input.open()?;
    let name = convert.out.display().to_string();
    let output = OutputFile::create(&convert.out, convert.force)?;
    let file = output.file();
    let mut guest = super::read_saved(&mut inputs, &convert.bounds, Some((convert.format, file, &name)))?;
    let mut bar = Progress::new("writing", Some(guest.data_len()));
    let written = match convert.format {
        StreamForm::Plain => guest.write_plain(file, &name, &mut |at| bar.at(at)),
        StreamForm::MappedRam => guest.write_mapped(file, &name, &mut |at| bar.at(at)),
    };
    drop(bar);
    let bytes = written?;
    output.publish().map_err(|error| Failure::io(&name, bytes, &error))?;
    let mut out = Output::new();
    match convert.output.json {
        true => {
            let mut object = Map::new();
            object.insert("path".into(), json!(name));
            object.insert("format".into(), json!(convert.format.as_str()));
            object.insert("bytes".into(), json!(bytes));
            out.json(&object)?;
        }
        false => out.line(format!("{name}: {} stream, {}", convert.format.as_str(), size(bytes)))?,
    }
    out.finish()
}
