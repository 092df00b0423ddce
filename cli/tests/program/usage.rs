//! Wrong usage: exit code 2, and words that help.

use crate::sample::{path, qevm};

#[test]
fn wrong_usage_exits_with_2() {
    let stream = path("5.2-plain.zst").display().to_string();
    for arguments in [
        &["frobnicate"][..],
        &["verify"],
        &["verify", "--frobnicate", &stream],
        &["verify", "--ram-digest", "md5", &stream],
        &["verify", "--offset", "-1", &stream],
        &["verify", "/nonexistent/stream"],
        &["inspect", "/nonexistent/stream"],
        &["verify", "/"],
        &["verify", "--channel", "-", "-"],
        &["verify", "--channel", "/nonexistent/channel", &stream],
        &["receive", "carrier-pigeon:4444", "--out", "/nonexistent/out"],
        &["receive", "tcp:localhost", "--out", "/nonexistent/out"],
        &["receive", "tcp:127.0.0.1:0", "--out", "/nonexistent/out"],
    ] {
        let ran = qevm(arguments);
        assert_eq!(ran.code, Some(2), "{arguments:?}: {}", ran.stderr);
        assert!(!ran.stderr.is_empty() && ran.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn help_teaches() {
    let help = qevm(["--help"]);
    assert_eq!(help.code, Some(0));
    for words in ["Examples:", "qevm verify", "qevm receive", "Exit codes"] {
        assert!(help.stdout.contains(words), "{words}: {}", help.stdout);
    }
    assert_eq!(qevm(["verify", "--help"]).code, Some(0));
    assert_eq!(qevm(["--version"]).code, Some(0));
}

#[test]
fn inspect_prints_aligned_tables() {
    let stream = path("7.2-postcopy.zst").display().to_string();
    let ran = qevm(["inspect", &stream]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    for words in ["machine       microvm", "RAM blocks", "mem ", "62d828c8", "mc146818rtc", "PACKAGED", "PING 4"] {
        assert!(ran.stdout.contains(words), "{words}: {}", ran.stdout);
    }
    assert!(ran.stdout.lines().all(|line| line == line.trim_end()), "trailing blanks");
}

#[test]
fn inspect_shows_fields_by_name() {
    let stream = path("7.2-return-path.zst").display().to_string();
    let ran = qevm(["inspect", "--section", "mc146818rtc", "--field", "cmos_index", &stream]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    assert!(ran.stdout.contains("mc146818rtc instance 0, version 3"), "{}", ran.stdout);
    assert_eq!(ran.stdout.matches(" = ").count(), 1, "{}", ran.stdout);
    let fields = qevm(["inspect", "--json", "--fields", &stream]).json()["fields"].clone();
    let fields = fields.as_array().unwrap();
    // QEMU 7.2's reset value of the RTC's period timer, and a field of every section.
    assert!(fields.iter().any(|f| f["path"] == "periodic_timer" && f["value"] == -1));
    for idstr in ["timer", "cpu", "i8259", "globalstate"] {
        assert!(fields.iter().any(|f| f["idstr"] == idstr), "{idstr}");
    }
}

#[test]
fn manual_pages_and_completions_are_made() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(qevm(["man", dir.path().to_str().unwrap()]).code, Some(0));
    for page in ["qevm.1", "qevm-verify.1", "qevm-receive.1"] {
        assert!(dir.path().join(page).metadata().unwrap().len() > 300, "{page}");
    }
    // Directories are made, but not in a file.
    let inside = dir.path().join("a/b/man1");
    assert_eq!(qevm(["man", inside.to_str().unwrap()]).code, Some(0));
    assert!(inside.join("qevm-check.1").is_file());
    assert_eq!(qevm(["man", "/dev/null/man1"]).code, Some(2));
    for shell in ["bash", "zsh", "fish"] {
        let ran = qevm(["completions", shell]);
        assert!(ran.code == Some(0) && ran.stdout.contains("verify"), "{shell}");
    }
}

#[test]
fn one_command_installs_manual_pages_and_completions() {
    let dir = tempfile::tempdir().unwrap();
    let ran = qevm(["install-docs", "--prefix", dir.path().to_str().unwrap()]);
    assert_eq!((ran.code, ran.stderr.as_str(), ran.stdout.lines().count()), (Some(0), "", 4));
    for (file, words) in [
        ("man/man1/qevm-extract.1", ".TH"),
        ("bash-completion/completions/qevm", "complete -F _qevm"),
        ("zsh/site-functions/_qevm", "#compdef qevm"),
        ("fish/vendor_completions.d/qevm.fish", "complete -c qevm"),
    ] {
        let text = std::fs::read_to_string(dir.path().join("share").join(file)).unwrap();
        assert!(text.contains(words), "{file}");
    }
    // A second time replaces them.
    assert_eq!(qevm(["install-docs", "--prefix", dir.path().to_str().unwrap()]).code, Some(0));
    assert_eq!(qevm(["install-docs", "--prefix", "/dev/null"]).code, Some(2));
}

#[test]
fn scripts_get_an_object_from_every_command_that_fails() {
    let dir = tempfile::tempdir().unwrap();
    let stream = crate::sample::stream("5.2-plain");
    let cut = crate::sample::file(&dir, "cut", &stream[..stream.len() / 2]).display().to_string();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let [none, out] = ["none", "out"].map(|name| dir.path().join(name).display().to_string());
    for (what, (code, kind)) in [(&cut, (1, "truncated")), (&none, (2, "usage"))] {
        for arguments in [
            &["inspect", what][..],
            &["verify", what],
            &["diff", what, what],
            &["check", what, "--machine", "microvm"],
            &["convert", what, "--out", &out],
            &["extract", what, "--ram", &out],
            &["send", what, &address],
        ] {
            let ran = qevm(arguments.iter().copied().chain(["--json"]));
            let json = ran.json();
            assert_eq!((ran.code, json["error"]["kind"].as_str()), (Some(code), Some(kind)), "{arguments:?}: {json}");
            assert_eq!((ran.stdout.lines().count(), ran.stderr.lines().count()), (1, 1), "{arguments:?}");
        }
    }
}
