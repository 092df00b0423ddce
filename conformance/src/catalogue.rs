//! Makes the catalogue of device layouts that `qevm-savevm` embeds, from recordings.

use crate::record::Recording;
use crate::{corpus, description};
use anyhow::{Context, Result, bail};
use qevm_savevm::vmdesc::{Catalogue, Description, Schema};
use qevm_wire::{Limits, QemuVersion};
use std::fs;
use std::path::Path;

/// What the file starts with.
const HEAD: &str = "\
# Layouts of device sections, for streams without a description.
# Source: the JSON descriptions that real QEMUs wrote after their streams, and, where a form is marked I, the output of
# their -dump-vmstate. The streams are recordings of `qevm-conformance record`, and further ones of the same QEMUs with each
# `pc` and `q35` machine type (`suppress-vmdesc=off`) and with devices that no scenario has. Put together with
# `qevm-conformance catalogue`.
# The lines are explained in text.rs.
";

/// The text of a catalogue of everything that the recordings in `corpus` describe, and of what `streams` describe: each
/// is a release and a file, `10.0=/path/to/stream`.
///
/// # Errors
/// A file cannot be read, or a description not be parsed.
pub fn gather(corpus: &Path, streams: &[String]) -> Result<String> {
    let mut descriptions = Vec::new();
    let mut add = |version: &str, stream: &Path| -> Result<()> {
        if let Some(text) = description::text_at_end_of(stream)? {
            let parsed = Description::parse(&text, &Limits::default());
            let parsed = parsed.with_context(|| format!("the description of {}", stream.display()))?;
            descriptions.push((release(version)?, parsed));
        }
        Ok(())
    };
    for folder in corpus::folders(corpus)? {
        let recording = Recording::open(&folder)?;
        add(&recording.qemu_version, &folder.join(&recording.files.main))?;
    }
    for stream in streams {
        let (version, path) = stream.split_once('=').with_context(|| format!("'{stream}' is not RELEASE=FILE"))?;
        add(version, Path::new(path))?;
    }
    // The sort is stable: within a release the order is that of the folders and arguments.
    descriptions.sort_by_key(|(release, _)| *release);
    let mut catalogue = Catalogue::default();
    for (release, description) in &descriptions {
        catalogue.learn(description, *release);
    }
    let mut dumps = Vec::new();
    for entry in fs::read_dir(corpus.join("dump-vmstate"))? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
        let Some((series, _)) = name.split_once('-') else { bail!("{}: no release in the name", path.display()) };
        dumps.push((release(series)?, path));
    }
    dumps.sort();
    for (release, path) in dumps {
        let schema = Schema::parse(&fs::read(&path)?, &Limits::default());
        let schema = schema.with_context(|| format!("the schema {}", path.display()))?;
        catalogue.learn_schema(&schema.descriptions(), release);
    }
    Ok(format!("{HEAD}{catalogue}"))
}

fn release(version: &str) -> Result<QemuVersion> {
    version.parse().with_context(|| format!("QEMU version '{version}'"))
}
