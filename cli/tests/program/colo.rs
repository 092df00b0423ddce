//! A stream that checkpoints of COLO follow, as QEMU 11.1.3 sent it: the guest counts in EAX and stores what it has
//! counted at 0x7000, and nothing else. See `streams/README.md`.

use crate::reported::{good, run};
use crate::sample::{file, qevm_reading, stream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use tempfile::TempDir;

/// Where the stream ends, and each of its checkpoints.
const ENDS: [usize; 9] = [142_282, 149_999, 157_716, 165_433, 173_150, 180_867, 188_584, 196_301, 204_018];

/// What the guest has counted in EAX, and at 0x7000. Where it was between the two, the one is ahead.
fn counted(dir: &TempDir, image: &Path) -> (u64, u64) {
    let fields = good(dir, "inspect --fields FILE", image);
    let word = |name: &str| {
        let line = fields.lines().find_map(|line| line.trim().strip_prefix(name)).expect(name);
        let digits: String = line.trim_start_matches("0x").chars().take_while(char::is_ascii_hexdigit).collect();
        u64::from_str_radix(&digits, 16).unwrap()
    };
    let (eax, eip) = (word("env.regs = ["), word("env.eip = "));
    good(dir, "extract --force --memory DIR/memory FILE", image);
    let mut stored = [0; 4];
    std::fs::File::open(dir.path().join("memory")).unwrap().read_exact_at(&mut stored, 0x7000).unwrap();
    // `inc eax` is at 7, the store at 9 and the jump back at 13.
    assert!([7, 9, 13].contains(&eip), "{eip:#x}");
    let stored = u64::from(u32::from_le_bytes(stored));
    (if eip == 9 { eax - 1 } else { eax }, stored)
}

#[test]
fn memory_and_devices_are_those_of_the_last_whole_checkpoint() {
    let dir = TempDir::new().unwrap();
    let whole = stream("11.1-colo");
    assert_eq!(whole.len(), ENDS[8]);
    let mut last = 0;
    for (number, end) in ENDS.into_iter().enumerate() {
        // Not a byte of a checkpoint that is not whole counts.
        let next = ENDS.get(number + 1).map_or(end + 80, |next| *next);
        for cut in [end, end + 40, next - 1] {
            let image = file(&dir, "colo.q", &[&whole[..], &[0x53; 80]].concat()[..cut]);
            let (eax, stored) = counted(&dir, &image);
            assert_eq!(eax, stored, "checkpoint {number}, {cut} bytes");
            assert!(if cut == end { eax > last } else { eax == last }, "{cut} bytes: {eax}, {last} before");
            last = eax;
            let said = good(&dir, "verify FILE", &image);
            assert!(said.contains("nothing opaque"), "{said}");
            assert_eq!(
                said.contains(&format!("those of number {number}, which is the last and ends at byte {end}")),
                { number > 0 }
            );
        }
    }
}

#[test]
fn what_is_written_of_checkpoints_is_what_is_read_of_them() {
    let dir = TempDir::new().unwrap();
    let image = file(&dir, "colo.q", &stream("11.1-colo"));
    let expected = counted(&dir, &image);
    for form in ["plain", "mapped-ram"] {
        good(&dir, &format!("convert --force --format {form} --out DIR/out FILE"), &image);
        let written = dir.path().join("out");
        assert_eq!(counted(&dir, &written), expected, "{form}");
        assert_eq!(good(&dir, &format!("diff {} FILE", image.display()), &written), "no differences\n", "{form}");
    }
    // The content of the file is what counts, and not that it was read before: a core has the registers as well.
    good(&dir, "extract --force --elf DIR/core --devices DIR/devices FILE", &image);
    let devices = std::fs::read_to_string(dir.path().join("devices")).unwrap();
    assert_eq!(devices.matches("\"env.eip\"").count(), 1, "one CPU, once");
}

#[test]
fn from_a_pipe_only_the_stream_is_read() {
    let dir = TempDir::new().unwrap();
    let whole = stream("11.1-colo");
    let piped = qevm_reading(["verify", "-"], &whole);
    assert_eq!(piped.code, Some(0), "{}", piped.stderr);
    let noted = format!("COLO checkpoints follow the end of the stream at byte {}", ENDS[0]);
    assert!(piped.stdout.contains(&noted) && piped.stdout.contains("can be read only once"), "{}", piped.stdout);
    // Bytes that no checkpoint starts with are none.
    let other = file(&dir, "other.q", &[&whole[..ENDS[0]], &whole[ENDS[0]..ENDS[0] + 8]].concat());
    assert!(run(&dir, "verify FILE", &other).stdout.contains("they are not part of it"));
}
