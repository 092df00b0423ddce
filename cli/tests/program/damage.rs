//! Streams that were cut off or damaged: one line that says where, exit code 1, and never a panic.

use crate::sample::{Ran, file, qevm, qevm_reading, stream};

/// Checks what must hold for every bad stream, and returns the offset of the fault.
fn assert_bad(ran: &Ran, what: &str) -> u64 {
    assert_eq!(ran.code, Some(1), "{what}: {}", ran.stderr);
    assert_eq!(ran.stderr.lines().count(), 1, "{what}: {}", ran.stderr);
    assert!(ran.stderr.starts_with("qevm: ") && ran.stderr.contains(" at byte "), "{what}: {}", ran.stderr);
    let error = &ran.json()["error"];
    let offset = error["offset"].as_u64().unwrap();
    assert!(ran.stderr.contains(&format!("at byte {offset}")), "{what}: {}", ran.stderr);
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
    offset
}

#[test]
fn a_stream_cut_off_anywhere_is_truncated_there() {
    let dir = tempfile::tempdir().unwrap();
    let whole = stream("7.2-return-path");
    // After the end of the stream comes 6, the length of the description, and the description.
    let rest = |at: usize| (whole.len() - at - 6) as u32;
    let end =
        (0..whole.len() - 6).find(|&at| whole[at..at + 2] == [0, 6] && whole[at + 2..at + 6] == rest(at).to_be_bytes());
    let end = end.unwrap() + 1;
    // Every byte of the head, then steps that hit RAM, devices and the description.
    let cuts = (0..120).chain((120..whole.len()).step_by(1499)).chain(whole.len() - 3..whole.len());
    for cut in cuts {
        let path = file(&dir, "cut", &whole[..cut]);
        for (strict, ran) in [
            (true, qevm(["verify", "--json", path.to_str().unwrap()])),
            (false, qevm(["inspect", "--json", "--no-digest", path.to_str().unwrap()])),
        ] {
            if cut > end && !strict {
                // Only `verify` is strict about what no QEMU reads.
                assert_eq!(ran.code, Some(0), "inspect, cut at {cut}: {}", ran.stderr);
                continue;
            }
            let offset = assert_bad(&ran, &format!("cut at {cut}"));
            let kind = ran.json()["error"]["kind"].clone();
            assert!(offset <= cut as u64, "cut at {cut}: {}", ran.stderr);
            // Without the description, a device section cut off before its footer has no end that could be found.
            assert!(kind == "truncated" || kind == "malformed", "cut at {cut}: {}", ran.stderr);
        }
    }
}

#[test]
fn a_flipped_bit_is_found_or_changes_nothing_but_content() {
    let dir = tempfile::tempdir().unwrap();
    let whole = stream("5.2-plain");
    for place in (0..whole.len()).step_by(487) {
        let mut damaged = whole.clone();
        damaged[place] ^= 1 << (place % 8);
        let path = file(&dir, "flipped", &damaged);
        let ran = qevm(["verify", "--json", path.to_str().unwrap()]);
        match ran.code {
            Some(0) => assert_eq!(ran.json()["ok"], true),
            _ => drop(assert_bad(&ran, &format!("flipped at {place}"))),
        }
    }
}

/// Places whose damage QEMU itself refuses, with the place and the words of the error.
#[test]
fn damage_is_named_at_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let whole = stream("5.2-plain");
    let find = |needle: &[u8]| whole.windows(needle.len()).position(|window| window == needle).unwrap();
    let timer = find(b"\x05timer") - 5;
    let rtc = find(b"\x0bmc146818rtc");
    let cases = [
        (0, 0, "malformed", "stream magic"),
        (7, 4, "unsupported", "stream version"),
        (8, 8, "malformed", ""),
        (timer + 48 - 5, timer + 48 - 5, "malformed", "footer"),
        (timer + 48 - 1, timer + 48 - 4, "malformed", "footer"),
        (rtc + 11 + 8, rtc + 11 + 5, "mismatch", "version"),
    ];
    for (place, offset, kind, words) in cases {
        let mut damaged = whole.clone();
        damaged[place] ^= 0x40;
        let path = file(&dir, "damaged", &damaged);
        let ran = qevm(["verify", "--json", path.to_str().unwrap()]);
        let found = assert_bad(&ran, &format!("damaged at {place}"));
        let error = &ran.json()["error"];
        assert_eq!((found, &error["kind"]), (offset as u64, &kind.into()), "damaged at {place}: {}", ran.stderr);
        assert!(error["message"].as_str().unwrap().contains(words), "damaged at {place}: {}", ran.stderr);
    }
}

#[test]
fn damage_in_channels_is_that_file_s() {
    let dir = tempfile::tempdir().unwrap();
    let name = "10.0-multifd-zstd";
    let main = file(&dir, "main", &stream(name));
    let good = file(&dir, "good", &stream(&format!("{name}.channel-0")));
    let whole = stream(&format!("{name}.channel-1"));
    let verify = |channel: &[u8]| {
        let bad = file(&dir, "bad", channel);
        qevm([
            "verify".as_ref(),
            "--json".as_ref(),
            "--channel".as_ref(),
            bad.as_os_str(),
            "--channel".as_ref(),
            good.as_os_str(),
            main.as_os_str(),
        ])
    };
    assert_eq!(verify(&whole).code, Some(0));
    for cut in (1..whole.len()).step_by(5003) {
        let ran = verify(&whole[..cut]);
        let offset = assert_bad(&ran, &format!("channel cut at {cut}"));
        assert!(offset <= cut as u64 && ran.stderr.contains("bad: "), "{}", ran.stderr);
    }
    for place in (0..whole.len()).step_by(3001) {
        let mut damaged = whole.clone();
        damaged[place] ^= 1 << (place % 8);
        let ran = verify(&damaged);
        if ran.code != Some(0) {
            assert_bad(&ran, &format!("channel flipped at {place}"));
        }
    }
}

#[test]
fn bytes_after_the_end_are_no_part_of_the_stream() {
    let mut longer = stream("7.2-return-path");
    let end = longer.len() as u64;
    longer.push(0);
    let ran = qevm_reading(["verify", "-"], &longer);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.contains(&format!("follow the end of the stream at byte {end}")), "{}", ran.stdout);
}
