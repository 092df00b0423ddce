//! Who a connection is, by its first bytes.

use qevm_multifd::Init;
use qevm_savevm::first_bytes::FirstBytes;
use qevm_savevm::ram::{PreemptDecoder, RamBlocks};
use qevm_wire::{Decode, PageGeometry, Step};
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// Bytes of the longest start that is looked at: the first record of a preempt channel, with the longest name of a
/// block.
pub(super) const MAX_FIRST: usize = 8 + 1 + 255;
/// Bytes of magic and version. A main channel is known by them and one byte more.
const MAIN_LEN: usize = 8;
/// Bytes of a page channel's first packet.
pub(super) const INIT_LEN: usize = 64;
/// Bytes by which strangers are told apart.
const NAME_LEN: usize = 4;
/// The magic of a main channel.
const MAIN_MAGIC: &[u8] = b"QEVM";
/// The version of all streams since QEMU 0.11.
const MAIN_VERSION: [u8; 4] = [0, 0, 0, 3];
const PAGE_CHANNEL_MAGIC: [u8; 4] = qevm_multifd::layout::MAGIC.to_be_bytes();

/// What first bytes say.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing yet.
    Wait,
    /// A main channel.
    Main,
    /// A page channel.
    PageChannel(Init),
    /// The second channel of a migration in postcopy.
    Preempt,
    /// No channel of a migration.
    Stranger(What),
}

/// What came instead of a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct What {
    /// What it is, without details.
    pub(super) kind: Cow<'static, str>,
    /// Its first bytes, or why it is none.
    pub(super) detail: String,
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind)?;
        match self.detail.is_empty() {
            true => Ok(()),
            false => write!(f, " ({})", self.detail),
        }
    }
}

/// Judges the `first` bytes of a connection, which has `ended` or not. `preempt`: what a preempt channel would refer
/// to, if there can be one.
pub(super) fn judge(first: &[u8], ended: bool, preempt: Option<&(Arc<RamBlocks>, PageGeometry)>) -> Verdict {
    let could_be = |magic: &[u8]| first.iter().zip(magic).all(|(a, b)| a == b);
    if could_be(MAIN_MAGIC) && first.len() >= NAME_LEN {
        return match first.get(NAME_LEN..MAIN_LEN) {
            // Who says no more than that is no source yet: they all go on at once.
            Some(version) if version == MAIN_VERSION && first.len() == MAIN_LEN => wait(first, ended),
            Some(version) if version == MAIN_VERSION => Verdict::Main,
            Some(version) => {
                Verdict::Stranger(What { kind: "a migration stream of another version".into(), detail: hex(version) })
            }
            None => wait(first, ended),
        };
    }
    if could_be(&PAGE_CHANNEL_MAGIC) && first.len() >= NAME_LEN {
        return match first.get(..INIT_LEN).map(Init::decode) {
            Some(Ok(init)) => Verdict::PageChannel(init),
            Some(Err(error)) => {
                Verdict::Stranger(What { kind: "a multifd channel that is none".into(), detail: error.to_string() })
            }
            None => wait(first, ended),
        };
    }
    if first.len() < NAME_LEN {
        return wait(first, ended);
    }
    if let Some((blocks, pages)) = preempt {
        match PreemptDecoder::new(Arc::clone(blocks), *pages).next(first) {
            Ok(Step::Event { .. }) => return Verdict::Preempt,
            Ok(_) if !ended && first.len() < MAX_FIRST => return Verdict::Wait,
            _ => {}
        }
    }
    Verdict::Stranger(name(first))
}

fn wait(first: &[u8], ended: bool) -> Verdict {
    match ended {
        true => Verdict::Stranger(incomplete(first, "closed by its other end")),
        false => Verdict::Wait,
    }
}

/// What a connection is that has sent nothing but `first`, and then this.
pub(super) fn incomplete(first: &[u8], then: &str) -> What {
    match first.is_empty() {
        true => What { kind: "nothing".into(), detail: then.to_owned() },
        false => What { kind: "a few bytes".into(), detail: format!("{}, then {then}", hex(first)) },
    }
}

/// What a connection is that began with `first`, and has no TLS session because of `why`.
pub(super) fn unsealed(first: &[u8], why: String) -> What {
    match FirstBytes::of(first) {
        FirstBytes::Tls | FirstBytes::Nothing => What { kind: "a TLS session that was refused".into(), detail: why },
        other => What { kind: format!("{other} without TLS").into(), detail: "expected TLS (--tls-creds)".into() },
    }
}

/// What starts with these bytes, if it is no migration.
fn name(first: &[u8]) -> What {
    match FirstBytes::of(first) {
        FirstBytes::Unknown { .. } => What { kind: "bytes of no kind known here".into(), detail: hex(first) },
        known => What { kind: known.to_string().into(), detail: String::new() },
    }
}

/// The first of `bytes`, for people.
fn hex(bytes: &[u8]) -> String {
    let shown: Vec<String> = bytes.iter().take(INIT_LEN / 8).map(|byte| format!("{byte:02x}")).collect();
    shown.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use qevm_savevm::ram::RamBlock;
    use qevm_wire::{CountedString, Writer};

    fn kind(first: &[u8]) -> Cow<'static, str> {
        match judge(first, false, None) {
            Verdict::Stranger(what) => what.kind,
            other => panic!("{first:x?}: {other:?}"),
        }
    }

    #[test]
    fn what_is_no_migration_is_named() {
        for (first, expected) in [
            (&b"\x16\x03\x01\0\xc8"[..], "a TLS ClientHello"),
            (b"GET / HTTP/1.1", "an HTTP request"),
            (b"\x1f\x8b\x08\0", "a file compressed with gzip"),
            (b"\x28\xb5\x2f\xfd", "a file compressed with zstd"),
            (b"LibvirtQemudSave\x02", "a libvirt save image"),
            (b"QFI\xfb", "a qcow2 image"),
            (b"garbage", "bytes of no kind known here"),
            (b"QEVM\0\0\0\x02", "a migration stream of another version"),
        ] {
            assert_eq!(kind(first), expected);
        }
        let mut wrong = vec![0x11, 0x22, 0x33, 0x44, 0, 0, 0, 2];
        wrong.resize(INIT_LEN, 0);
        assert_eq!(kind(&wrong), "a multifd channel that is none");
    }

    #[test]
    fn a_channel_is_known_when_its_first_bytes_are_there() {
        let mut writer = Writer::new();
        let init = Init::new(qevm_multifd::Uuid::default(), 7);
        init.encode(&mut writer);
        for (bytes, whole) in
            [(b"QEVM\0\0\0\x03\x07".to_vec(), Verdict::Main), (writer.as_bytes().to_vec(), Verdict::PageChannel(init))]
        {
            for len in 0..bytes.len() {
                assert_eq!(judge(&bytes[..len], false, None), Verdict::Wait, "{len}");
                let Verdict::Stranger(what) = judge(&bytes[..len], true, None) else { panic!("{len}") };
                assert_eq!(what.kind, if len == 0 { "nothing" } else { "a few bytes" });
            }
            assert_eq!(judge(&bytes, false, None), whole);
        }
    }

    #[test]
    fn a_preempt_channel_names_a_block_of_the_migration() {
        let mut blocks = RamBlocks::default();
        blocks.push(RamBlock::new(CountedString::new(b"mem").unwrap(), 0x10000)).unwrap();
        let context = (Arc::new(blocks), PageGeometry::X86);
        let record = b"\0\0\0\0\0\0\x30\x08\x03mem";
        assert_eq!(judge(record, false, Some(&context)), Verdict::Preempt);
        assert_eq!(judge(&record[..6], false, Some(&context)), Verdict::Wait);
        assert!(matches!(judge(record, false, None), Verdict::Stranger(_)));
        let other = b"\0\0\0\0\0\0\x30\x08\x03mom";
        assert!(matches!(judge(other, false, Some(&context)), Verdict::Stranger(_)));
        assert!(matches!(judge(b"garbage!", false, Some(&context)), Verdict::Stranger(_)));
    }
}
