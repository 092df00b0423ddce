//! Reading all files of one migration: the driver around the sans-IO decoders.
//!
//! [`analyze`] pulls bytes from the files, feeds the decoders, applies every page in the order in which a destination
//! would, and calls an [`Observer`]. It works in constant memory: what grows with the guest (page digests, and page
//! contents where they are asked for) goes to unlinked temporary files.
//!
//! | module | what |
//! |---|---|
//! | `inputs` | the files, opened |
//! | `settings`, `observer` | what is to be done, and who is told of what is read |
//! | `analysis`, `summary` | what is found, and the report about it |
//! | `files` | all files in their order |
//! | `checkpoints` | what follows a stream of COLO |
//! | `connection` | one main channel: the original one or one that resumes postcopy |
//! | `walk` | what each event of it means |
//! | `memory` | RAM records and mapped-ram areas applied to [`GuestRam`](crate::ram::GuestRam) |
//! | `bodies` | where device sections end and which fields they have |
//! | `layouts` | fields of device sections that no description tells about |
//! | `channels` | multifd and preempt channels, applied in step with the main channel |
//! | `page_size` | the size of target pages, where nothing tells it |
//! | `return_path` | the destination's answers |
//! | `reencode` | whether what was read encodes to the same bytes |
//! | `signs`, [`release_guess`] | which QEMU wrote the stream |
//! | `halt` | how reading ends |
//!
//! There is no circle among them.

pub mod release_guess;

mod analysis;
mod bodies;
mod channels;
mod checkpoints;
mod connection;
mod files;
mod halt;
mod inputs;
mod layouts;
mod memory;
mod observer;
mod page_size;
mod reencode;
mod return_path;
mod settings;
mod signs;
mod summary;
mod walk;

pub use analysis::{Analysis, PageCounts, Record, Section};
pub use inputs::{Input, Inputs, Named};
pub use layouts::Layouts;
pub use observer::{Ignore, Observer};
pub use settings::Settings;
pub use signs::Signs;

use crate::failure::Failure;
use crate::ram::Keep;
use halt::Outcome;

/// Reads everything and says what was found. A bad stream is not an error of this function: it is the
/// [`failure`](Analysis::failure) of the analysis, which then tells of everything before it.
pub fn analyze(inputs: &mut Inputs, settings: &Settings, observer: &mut dyn Observer) -> Analysis {
    let mut settings = settings.clone();
    // XBZRLE needs the contents of pages. Whether there is any is seen only when it comes: files are then read again.
    if settings.keep == Keep::Digests && !settings.live && !inputs.is_seekable() {
        settings.keep = Keep::Image;
    }
    let mut checkpoints = None;
    loop {
        match files::run(inputs, &settings, observer, checkpoints.clone()) {
            Outcome::Done(analysis) => return *analysis,
            Outcome::NeedsImage if settings.keep == Keep::Image => {
                let message = "XBZRLE pages came although page contents are kept";
                return Analysis::failed(Failure::mismatch(&inputs.main.name, 0, "", message));
            }
            Outcome::NeedsImage => settings.keep = Keep::Image,
            // Once: with them, none are looked for.
            Outcome::Checkpoints(found) => checkpoints = Some(*found),
        }
        if let Err(failure) = inputs.rewind() {
            return Analysis::failed(failure);
        }
        observer.restarted();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bounds::Spool;
    use crate::source::Source;
    use std::io::{self, Read};

    /// A source that waits for its answer when it has said everything: a reader that goes on then waits for ever.
    struct Waiting(io::Cursor<Vec<u8>>);

    impl Read for Waiting {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            match self.0.read(into)? {
                0 => panic!("a source that waits is read from"),
                count => Ok(count),
            }
        }
    }

    #[test]
    fn a_live_source_is_not_read_beyond_the_last_byte() {
        // With a description, and of postcopy, which never has one.
        for name in ["7.2-return-path", "7.2-postcopy"] {
            let path = format!("{}/tests/streams/{name}.zst", env!("CARGO_MANIFEST_DIR"));
            let stream = zstd::decode_all(std::fs::File::open(path).unwrap()).unwrap();
            let len = stream.len() as u64;
            let mut inputs = Inputs::single(name, Source::stream(Box::new(Waiting(io::Cursor::new(stream)))));
            let settings = Settings {
                keep: Keep::Nothing,
                reencode: false,
                complete: false,
                strict: false,
                live: true,
                layouts: Layouts::default(),
                spool: Spool::unlimited(),
                max_ram: u64::MAX,
            };
            let analysis = analyze(&mut inputs, &settings, &mut Ignore);
            assert_eq!((analysis.failure, analysis.main_bytes), (None, len), "{name}");
        }
    }
}
