//! Replays every target's committed seeds on a stable toolchain.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Seeds that a target has at least.
const ENOUGH: usize = 20;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn names(folder: &Path, wanted: impl Fn(&Path) -> bool) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let paths = entries.map(|entry| entry.unwrap().path()).filter(|path| wanted(path));
    paths.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect()
}

#[test]
fn every_target_survives_its_seeds() {
    for (name, target) in qevm_fuzz::TARGETS {
        let folder = folder("seeds").join(name);
        let mut seeds = BTreeSet::new();
        for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.unwrap().path();
            let seed = fs::read(&path).unwrap();
            eprintln!("{}", path.display());
            target(&seed);
            seeds.insert(seed);
        }
        assert!(seeds.len() >= ENOUGH, "{name} has {} different seeds, at least {ENOUGH} expected", seeds.len());
    }
}

/// A program or a folder of seeds that no target has would never be run.
#[test]
fn nothing_is_left_out_of_the_targets() {
    let targets: BTreeSet<String> = qevm_fuzz::TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&folder("fuzz_targets"), |_| true), targets);
    assert_eq!(names(&folder("seeds"), Path::is_dir), targets);
    let manifest = fs::read_to_string(folder("Cargo.toml")).unwrap();
    let programs =
        manifest.lines().filter_map(|line| line.strip_prefix("path = \"fuzz_targets/")?.strip_suffix(".rs\""));
    assert_eq!(programs.map(str::to_owned).collect::<BTreeSet<_>>(), targets);
}

#[test]
fn seeds_of_several_files_have_several() {
    for (name, least) in [("cli_walk", 2), ("savevm_check", 2), ("multifd_device_state", 1)] {
        for entry in fs::read_dir(folder("seeds").join(name)).unwrap() {
            let seed = fs::read(entry.unwrap().path()).unwrap();
            let mut rest = if name == "cli_walk" { &seed[1..] } else { &seed[..] };
            let mut count = 0;
            while let Some((head, behind)) = rest.split_first_chunk::<5>() {
                let len = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
                (rest, count) = (&behind[len..], count + 1);
            }
            assert!(rest.is_empty() && count >= least, "{name}: {count} files");
        }
    }
}
