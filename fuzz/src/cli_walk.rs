use crate::parts::parts;
use qevm_inspect::bounds::Spool;
use qevm_inspect::ram::Keep;
use qevm_inspect::ram::RamDigest;
use qevm_inspect::source::Source;
use qevm_inspect::stream::Named;
use qevm_inspect::stream::{Ignore, Inputs, Layouts, Settings, analyze};
use std::io::Cursor;
use std::sync::Arc;

/// Room for temporary files.
const SPOOL: u64 = 64 << 20;
/// Guest memory of which contents are kept.
const MAX_RAM: u64 = 1 << 30;

/// The files of one migration, as the commands of `qevm` walk over them: the first byte chooses how, the kind of each
/// part says what it is (0 main channel, 1 page channel, 2 main channel after a recovery, 3 return path).
///
/// Whatever is good must be encoded to the same bytes; the report must be JSON.
pub fn cli_walk(data: &[u8]) {
    let [choice, files @ ..] = data else { return };
    let seekable = choice & 1 != 0;
    let mut inputs = Inputs::single("main", source(&[], seekable));
    for (count, (kind, bytes)) in parts(files).take(24).enumerate() {
        let file = Named { name: format!("file {count}"), source: source(bytes, seekable) };
        match kind % 4 {
            0 => inputs.main = file,
            1 => inputs.channels.push(file),
            2 => inputs.recovery.push(file),
            _ => inputs.return_path.push(file),
        }
    }
    let keep = [Keep::Nothing, Keep::Digests, Keep::Image, Keep::Places][usize::from(choice >> 1 & 3)];
    let settings = Settings {
        keep,
        reencode: choice & 8 == 0,
        complete: choice & 16 != 0,
        strict: choice & 32 != 0,
        live: false,
        layouts: Layouts::default(),
        spool: Spool::new(SPOOL),
        max_ram: if keep == Keep::Image { MAX_RAM } else { u64::MAX },
    };
    let mut analysis = analyze(&mut inputs, &settings, &mut Ignore);
    let report = analysis.report(RamDigest::Crc32);
    assert!(report.error.is_some() || !settings.reencode || report.reencoded_identical, "{report:?}");
    let json = serde_json::to_string(&report).expect("a report can be written");
    assert!(serde_json::from_str::<serde_json::Value>(&json).is_ok());
}

fn source(bytes: &[u8], seekable: bool) -> Source {
    let (len, bytes) = (bytes.len() as u64, bytes.to_vec());
    if seekable { Source::seekable(Arc::new(bytes), len) } else { Source::stream(Box::new(Cursor::new(bytes))) }
}
