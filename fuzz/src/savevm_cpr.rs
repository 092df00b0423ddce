use qevm_savevm::cpr::{CprDecoder, CprEncoder, CprEvent, VFIO_DEVICES};
use qevm_wire::{Blame, Decode, Driver, Fault};
use std::io::Read;

/// Reads the input as the side channel of `cpr-transfer`, all at once and in pieces as long as its first byte says, and
/// writes it again.
pub fn savevm_cpr(data: &[u8]) {
    let [piece, channel @ ..] = data else { return };
    let whole = run(channel, channel.len().max(1));
    assert_eq!(whole, run(channel, usize::from(*piece) + 1));
    let (events, true) = whole else { return };
    let (mut encoder, mut again, mut devices) = (CprEncoder::default(), Vec::new(), Vec::new());
    for event in events {
        match event {
            CprEvent::Descriptor(descriptor) => again.extend(encoder.descriptor(&descriptor)),
            CprEvent::VfioDevice(device) => devices.push(device),
            other => panic!("{other:?}"),
        }
    }
    let name = VFIO_DEVICES.as_bytes();
    let subsection = channel[again.len()..].windows(name.len()).any(|part| part == name);
    again.extend(if subsection { encoder.end_with(&devices) } else { encoder.end() });
    assert_eq!(again, channel);
}

/// What it holds, and whether it was legal to its end.
fn run(channel: &[u8], piece: usize) -> (Vec<CprEvent>, bool) {
    let mut driver = Driver::new(Pieces(channel, piece), CprDecoder::default());
    let mut events = Vec::new();
    loop {
        match driver.next() {
            Ok(Some(event)) => events.push(event),
            Ok(None) => {
                assert_eq!(driver.decoder().offset(), channel.len() as u64);
                return (events, true);
            }
            Err(error) => {
                if let qevm_wire::DriveError::Stream(error) = error {
                    assert!(error.offset <= channel.len() as u64, "{error}");
                    assert_ne!(error.kind.fault(), Fault::Misuse, "a peer cannot misuse a decoder: {error}");
                }
                return (events, false);
            }
        }
    }
}

/// A reader that returns at most this many bytes per call.
struct Pieces<'b>(&'b [u8], usize);

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let count = self.1.min(into.len());
        self.0.read(&mut into[..count])
    }
}
