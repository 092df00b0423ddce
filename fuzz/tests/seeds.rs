//! Replays every target's committed seeds on a stable toolchain.

use std::{fs, path::Path};

#[test]
fn every_target_survives_its_seeds() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    for (name, target) in qevm_fuzz::TARGETS {
        let folder = seeds.join(name);
        let mut replayed = 0;
        for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.unwrap().path();
            target(&fs::read(&path).unwrap());
            replayed += 1;
        }
        assert!(replayed > 0, "{name} has no seeds in {}", folder.display());
    }
}
