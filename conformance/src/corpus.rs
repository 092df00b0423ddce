//! A folder of recordings, for developers who want real streams without starting QEMU.

use crate::patience::PATIENCE;
use crate::process::run;
use crate::record::{MANIFEST, Recording};
use crate::roots::Root;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// The machine types whose `-dump-vmstate` is kept.
const DUMPED: [&str; 4] = ["microvm", "pc", "q35", "isapc"];

/// Writes `INDEX.md` into `corpus`: one line for each recording.
///
/// # Errors
/// The folder cannot be read, or holds a damaged recording.
pub fn write_index(corpus: &Path) -> Result<usize> {
    let mut lines = Vec::new();
    for folder in folders(corpus)? {
        lines.push(line(&folder, &Recording::open(&folder)?));
    }
    let mut text = String::from(
        "# Recordings\n\nEach folder holds one migration of a real QEMU. `recording.json` tells the arguments, the files and, in `ram`, what the\n\
         stopped source had in each RAM block: `sha256` and `crc32` of the whole used length (null where QEMU shows no way to all of it)\n\
         and the pieces that `pmemsave` covered. `dump-vmstate/` holds QEMU's own `-dump-vmstate`.\n\n\
         | folder | QEMU | machine | accel | capabilities | parameters | files | arguments |\n|---|---|---|---|---|---|---|---|\n",
    );
    for line in &lines {
        text.push_str(line);
    }
    fs::write(corpus.join("INDEX.md"), text)?;
    Ok(lines.len())
}

/// The folders of `corpus` that hold a recording, by name.
///
/// # Errors
/// The folder cannot be read.
pub fn folders(corpus: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(corpus).with_context(|| format!("reading {}", corpus.display()))? {
        let folder = entry?.path();
        if folder.join(MANIFEST).exists() {
            found.push(folder);
        }
    }
    found.sort();
    Ok(found)
}

fn line(folder: &Path, r: &Recording) -> String {
    let f = &r.files;
    let mut files = vec![format!("main {}", f.main)];
    if f.offset > 0 {
        files.push(format!("offset {}", f.offset));
    }
    let more = [("channels", f.channels.clone()), ("recovery-channels", f.recovery_channels.clone())];
    files.extend(
        more.iter().filter(|(_, list)| !list.is_empty()).map(|(what, list)| format!("{what} {}", list.join(" "))),
    );
    let single = [&f.return_path, &f.recovery, &f.recovery_return_path];
    files.extend(single.into_iter().flatten().cloned());
    let name = folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let shown = |text: &str| if text.is_empty() { "-".to_string() } else { text.replace('|', "\\|") };
    format!(
        "| {name} | {} | {} | {} | {} | {} | {} | {} |\n",
        r.qemu_version,
        r.machine,
        r.accel,
        shown(&r.capabilities.join(" ")),
        shown(
            &r.parameters.as_object().filter(|p| !p.is_empty()).map(|_| r.parameters.to_string()).unwrap_or_default()
        ),
        shown(&files.join(", ")),
        shown(&r.arguments[2..].join(" ")),
    )
}

/// Writes `-dump-vmstate` of the common machine types of `root` into `folder`.
///
/// # Errors
/// QEMU fails.
pub fn dump_vmstate(root: &Root, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    for machine in DUMPED {
        let file = folder.join(format!("{}-{machine}.json", root.suite().series()));
        let mut command = root.qemu();
        command.args(["-nodefaults", "-display", "none", "-M", machine, "-dump-vmstate"]).arg(&file);
        run(&mut command, PATIENCE).with_context(|| format!("-dump-vmstate of {machine}"))?;
    }
    Ok(())
}
