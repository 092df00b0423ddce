//! The rows, as data.

use super::live::Live;
use super::qemu_to_qevm::Told;
use super::setup::{Setup, Transport};
use super::source::{Flavor, Flush, Saved};
use crate::peer::secured::{Flaw, Version};
use crate::roots::Suite::{self, Bookworm, Sid, Trixie};

/// The releases that take part.
const SUITES: [Suite; 3] = [Bookworm, Trixie, Sid];
const CHANNELS: [u32; 4] = [1, 2, 4, 8];
const METHODS: [&str; 3] = ["none", "zlib", "zstd"];
const ZERO_PAGES: [&str; 3] = ["none", "legacy", "multifd"];
/// Bytes per second that let the payload dirty pages faster than they are sent.
const SLOW: u64 = 24 << 20;
const SLOW_COMPRESSED: u64 = 8 << 20;

/// One row.
#[derive(Debug, Clone)]
pub struct Row {
    /// Unique: `QEMU release/machine/direction/what is special`.
    pub name: String,
    /// Release and machine of the source, or of the only QEMU.
    pub flavor: Flavor,
    /// What happens.
    pub case: Case,
    /// Part of the quick subset.
    pub quick: bool,
}

/// What happens in a row.
#[derive(Debug, Clone)]
pub enum Case {
    /// [`super::qemu_to_qevm::play`].
    Leaves(Setup, Told),
    /// [`super::qevm_to_qemu::play`].
    Arrives(Setup, Saved),
    /// [`super::refused::at_source`].
    Refused(Setup),
    /// [`super::refused::late_at_destination`].
    Late(&'static str),
    /// [`super::refused::by_send`].
    NotSent(Setup),
    /// [`super::mismatch::at_receiver`].
    ReceiverDiffers(Setup, &'static [&'static str], &'static str),
    /// [`super::mismatch::no_switchover`].
    NoSwitchover(Setup, &'static [&'static str]),
    /// [`super::mismatch::at_target`]: sent, expected, further options of `qevm send`.
    TargetDiffers(Setup, Setup, &'static [&'static str]),
    /// [`super::live::play`], to a destination of this suite.
    Live(Box<Live>, Suite),
    /// [`super::secured::refused`].
    Distrusted(Version, Flaw),
}

/// How many rows there are of each kind.
pub const KINDS: [&str; 5] = ["leaves", "arrives", "refused", "mismatch", "live"];

impl Case {
    /// The kind, one of [`KINDS`].
    pub fn kind(&self) -> &'static str {
        match self {
            Case::Leaves(..) => KINDS[0],
            Case::Arrives(..) => KINDS[1],
            Case::Refused(_) | Case::Late(_) | Case::NotSent(_) | Case::Distrusted(..) => KINDS[2],
            Case::ReceiverDiffers(..) | Case::NoSwitchover(..) | Case::TargetDiffers(..) => KINDS[3],
            Case::Live(..) => KINDS[4],
        }
    }
}

/// Every row, those of one flavor together.
pub fn all() -> Vec<Row> {
    let mut table = Table::default();
    for flavor in flavors() {
        legal(&mut table, flavor);
    }
    for suite in [Trixie, Sid] {
        // With the machine type, 11.1 waits for an ack as older releases do; without, it has no other reader to wait
        // for.
        for machine in ["microvm", "pc-q35-8.0"] {
            for transport in [Transport::Unix, Transport::Tcp] {
                for set in ["return-path switchover-ack", "multifd return-path switchover-ack"] {
                    table.leaves(Flavor::new(suite, machine), Setup::with(set).over(transport), Told::Channels);
                }
            }
        }
    }
    for suite in SUITES {
        mapped_ram(&mut table, Flavor::new(suite, "microvm"));
        others(&mut table, Flavor::new(suite, "microvm"));
        illegal(&mut table, Flavor::new(suite, "microvm"));
        target_differs(&mut table, Flavor::new(suite, "microvm"));
        receiver_differs(&mut table, Flavor { running: true, ..Flavor::new(suite, "microvm") });
    }
    acks_differ(&mut table);
    live(&mut table);
    for (flavor, what, case) in super::secured::rows() {
        table.add(flavor, what, case);
    }
    // Stable, so that rows stay in their order within a flavor.
    table.rows.sort_by_key(|row| row.flavor);
    table.rows
}

/// The rows that the tests run: about thirty.
pub fn quick() -> Vec<Row> {
    all().into_iter().filter(|row| row.quick).collect()
}

#[derive(Default)]
struct Table {
    rows: Vec<Row>,
}

impl Table {
    fn add(&mut self, flavor: Flavor, what: String, case: Case) {
        let name = format!("{}/{what}", flavor.name());
        let quick = QUICK.contains(&name.as_str());
        self.rows.push(Row { name, flavor, case, quick });
    }

    fn leaves(&mut self, flavor: Flavor, setup: Setup, told: Told) {
        self.add(flavor, format!("leaves/{}", setup.name()), Case::Leaves(setup, told));
    }

    fn arrives(&mut self, flavor: Flavor, setup: Setup, from: Saved) {
        self.add(flavor, format!("arrives/{}-from-{}", setup.name(), from.name()), Case::Arrives(setup, from));
    }

    fn refused(&mut self, flavor: Flavor, setup: Setup) {
        self.add(flavor, format!("refused/{}", setup.name()), Case::Refused(setup));
    }
}

fn has_modes(suite: Suite) -> bool {
    suite >= Trixie
}

/// Both flush modes of each release: per round by default since 8.1, per section by machine type or by property.
fn flavors() -> Vec<Flavor> {
    let mut all = vec![Flavor::new(Bookworm, "microvm")];
    for suite in [Trixie, Sid] {
        all.push(Flavor::new(suite, "microvm"));
        all.push(Flavor::new(suite, "pc-q35-8.0"));
        all.push(Flavor { flush: Flush::EachSection, ..Flavor::new(suite, "microvm") });
    }
    all
}

/// The product of channels, compression and zero page detection, in both directions.
fn legal(table: &mut Table, flavor: Flavor) {
    let mut number = 0;
    for method in METHODS {
        for channels in CHANNELS {
            for mode in ZERO_PAGES {
                number += 1;
                let mut setup = Setup::multifd(channels, method);
                let default = mode == "multifd";
                if has_modes(flavor.suite) {
                    setup = setup.zero_page(mode);
                } else if !default {
                    continue;
                }
                let setup = setup.over(if number % 2 == 0 { Transport::Tcp } else { Transport::Unix });
                // The property is a third way to what the machine type does, so that its rows need not be all.
                let by_property = flavor.flush == Flush::EachSection && !default;
                if !by_property {
                    let told = if number % 3 == 0 { Told::Nothing } else { Told::Channels };
                    let answered = if channels == 1 { setup.clone() } else { setup.clone().and("return-path") };
                    table.leaves(flavor, answered, told);
                }
                let forms: &[Saved] = match has_modes(flavor.suite) {
                    true => &[Saved::Plain, Saved::Multifd, Saved::MappedRam],
                    false => &[Saved::Plain, Saved::Multifd],
                };
                if default || channels == 2 && !by_property {
                    table.arrives(flavor, setup, forms[number % forms.len()]);
                }
            }
        }
    }
    for from in [Saved::Plain, Saved::Multifd] {
        table.arrives(flavor, Setup::default(), from);
    }
    if has_modes(flavor.suite) {
        table.arrives(flavor, Setup::default(), Saved::MappedRam);
        table.arrives(flavor, Setup::default().zero_page("none"), Saved::Plain);
    }
}

fn mapped_ram(table: &mut Table, flavor: Flavor) {
    if !has_modes(flavor.suite) {
        return;
    }
    let plain = Setup::with("mapped-ram").over(Transport::File);
    let over_channels = |n| Setup { channels: n, ..plain.clone().and("multifd") };
    for mode in ZERO_PAGES {
        table.leaves(flavor, plain.clone().zero_page(mode), Told::Nothing);
        for channels in CHANNELS {
            table.leaves(flavor, over_channels(channels).zero_page(mode), Told::Nothing);
        }
    }
    for from in [Saved::Plain, Saved::Multifd, Saved::MappedRam] {
        table.arrives(flavor, plain.clone(), from);
        for channels in CHANNELS {
            table.arrives(flavor, over_channels(channels), from);
        }
    }
    for method in ["zlib", "zstd"] {
        // Refused even without multifd, for which alone the method has a meaning.
        table.refused(flavor, Setup { compression: method, ..plain.clone() });
    }
}

fn others(table: &mut Table, flavor: Flavor) {
    for transport in [Transport::Unix, Transport::Tcp] {
        table.leaves(flavor, Setup::default().over(transport), Told::Nothing);
        table.leaves(flavor, Setup::with("return-path").over(transport), Told::Channels);
    }
    table.leaves(flavor, Setup::default().over(Transport::Exec), Told::Nothing);
    table.arrives(flavor, Setup::default().over(Transport::Exec), Saved::Multifd);
    for (method, level, values) in [("zlib", "multifd-zlib-level", [0, 9]), ("zstd", "multifd-zstd-level", [0, 20])] {
        for value in values {
            table.leaves(flavor, Setup::multifd(2, method).level(level, value), Told::Channels);
            table.arrives(flavor, Setup::multifd(2, method).level(level, value), Saved::Plain);
        }
    }
    // As many as there can be.
    table.leaves(flavor, Setup::multifd(255, "none").and("return-path").over(Transport::Tcp), Told::Channels);
    table.leaves(flavor, Setup::multifd(255, "zlib").and("return-path"), Told::Nothing);
    table.arrives(flavor, Setup::multifd(255, "zstd").over(Transport::Tcp), Saved::Plain);
    if has_modes(flavor.suite) {
        table.leaves(flavor, Setup::default().over(Transport::File), Told::Nothing);
        for mode in ZERO_PAGES {
            table.leaves(flavor, Setup::default().zero_page(mode), Told::Channels);
        }
    } else {
        // Not checked by 7.2, and without effect beside multifd.
        table.leaves(flavor, Setup::with("multifd xbzrle"), Told::Channels);
    }
    // Allowed, refused and allowed again.
    match flavor.suite {
        Trixie => table.refused(flavor, Setup::with("multifd postcopy-ram")),
        _ => table.leaves(flavor, Setup::with("multifd postcopy-ram return-path"), Told::Channels),
    }
}

fn illegal(table: &mut Table, flavor: Flavor) {
    let mut sets = vec![
        "multifd background-snapshot",
        "background-snapshot return-path",
        "zero-copy-send",
        "postcopy-preempt",
        "postcopy-ram x-ignore-shared",
        "switchover-ack",
        "mapped-ram xbzrle",
        "mapped-ram postcopy-ram",
        "multifd compress",
        "mapped-ram return-path background-snapshot",
    ];
    if has_modes(flavor.suite) {
        sets.push("multifd xbzrle");
    }
    for set in sets {
        table.refused(flavor, Setup::with(set));
    }
    for transport in [Transport::Exec, Transport::File] {
        for channels in CHANNELS {
            table.refused(flavor, Setup::multifd(channels, "none").over(transport));
        }
        table.refused(flavor, Setup::multifd(2, "zstd").over(transport));
    }
    for method in ["zlib", "zstd"] {
        table.refused(flavor, Setup { compression: method, ..Setup::with("multifd zero-copy-send") });
        for channels in CHANNELS {
            let setup = Setup { compression: method, channels, ..Setup::with("mapped-ram multifd") };
            table.refused(flavor, setup.over(Transport::File));
        }
    }
    for transport in [Transport::Unix, Transport::Tcp, Transport::Exec] {
        table.refused(flavor, Setup::with("mapped-ram").over(transport));
        table.refused(flavor, Setup::with("mapped-ram multifd").over(transport));
    }
    for channels in [0, 256] {
        table.refused(flavor, Setup::multifd(channels, "none"));
    }
    if has_modes(flavor.suite) {
        table.refused(flavor, Setup::multifd(2, "zlib").level("multifd-zlib-level", 10));
        table.refused(flavor, Setup::multifd(2, "zstd").level("multifd-zstd-level", 21));
    } else {
        for mode in ZERO_PAGES {
            table.refused(flavor, Setup::multifd(2, "none").zero_page(mode));
            let setup = Setup::multifd(2, "zstd").zero_page(mode);
            table.add(flavor, format!("not-sent/{}", setup.name()), Case::NotSent(setup));
        }
        for method in ["qpl", "uadk", "qatzip"] {
            table.refused(flavor, Setup::multifd(2, method));
            let setup = Setup::multifd(2, method);
            table.add(flavor, format!("not-sent/{}", setup.name()), Case::NotSent(setup));
        }
    }
    let setup = Setup::multifd(2, "zlib").level("multifd-zlib-level", 10);
    table.add(flavor, format!("not-sent/{}", setup.name()), Case::NotSent(setup));
    let setup = Setup::multifd(2, "zstd").level("multifd-zstd-level", 21);
    table.add(flavor, format!("not-sent/{}", setup.name()), Case::NotSent(setup));
    let setup = Setup::multifd(0, "none");
    table.add(flavor, format!("not-sent/{}", setup.name()), Case::NotSent(setup));
    table.add(flavor, "late/multifd".into(), Case::Late("multifd"));
    table.add(flavor, "late/postcopy-preempt".into(), Case::Late("postcopy-ram postcopy-preempt"));
}

fn target_differs(table: &mut Table, flavor: Flavor) {
    let pairs = [
        ("4-channels-for-2", Setup::multifd(4, "none"), Setup::multifd(2, "none")),
        ("2-channels-for-4", Setup::multifd(2, "none"), Setup::multifd(4, "none")),
        ("zlib-for-none", Setup::multifd(2, "zlib"), Setup::multifd(2, "none")),
        ("none-for-zlib", Setup::multifd(2, "none"), Setup::multifd(2, "zlib")),
        ("zstd-for-zlib", Setup::multifd(2, "zstd"), Setup::multifd(2, "zlib")),
        ("multifd-for-plain", Setup::multifd(2, "none"), Setup::default()),
        ("plain-for-multifd", Setup::default(), Setup::multifd(2, "none")),
    ];
    for (what, sent, expected) in pairs {
        table.add(flavor, format!("sent-differs/{what}"), Case::TargetDiffers(sent, expected, &[]));
    }
    if has_modes(flavor.suite) {
        let setup = || Setup::multifd(2, "none");
        let case = Case::TargetDiffers(setup(), setup(), &["--multifd-flush-after-each-section", "on"]);
        table.add(flavor, "sent-differs/flush-each-section-for-each-round".into(), case);
    }
}

fn receiver_differs(table: &mut Table, flavor: Flavor) {
    let answered = |setup: Setup| setup.and("return-path");
    let pairs: [(&str, Setup, &[&str], &str); 8] = [
        ("4-channels-for-2", Setup::multifd(4, "none"), &["--multifd-channels", "2"], "multifd-channels is 2 here"),
        ("8-channels-for-1", Setup::multifd(8, "zstd"), &["--multifd-channels", "1"], "multifd-channels is 1 here"),
        ("2-channels-for-4", Setup::multifd(2, "none"), &["--multifd-channels", "4"], "of 4 multifd channels came"),
        ("zlib-for-zstd", Setup::multifd(2, "zlib"), &["--multifd-compression", "zstd"], "zstd"),
        ("none-for-zlib", Setup::multifd(2, "none"), &["--multifd-compression", "zlib"], "zlib"),
        ("zstd-for-none", Setup::multifd(2, "zstd"), &["--multifd-compression", "none"], "zstd"),
        ("multifd-for-plain", Setup::multifd(2, "none"), &["--multifd-channels", "0"], "none is expected"),
        ("plain-for-multifd", Setup::default(), &["--multifd-channels", "2"], "0 of 2 multifd channels"),
    ];
    for (what, setup, options, word) in pairs {
        let case = Case::ReceiverDiffers(answered(setup), options, word);
        table.add(flavor, format!("received-differs/{what}"), case);
    }
}

/// Acks that a source waits for and does not get, and one that no device asked for: both keep the guest at the source.
fn acks_differ(table: &mut Table) {
    let rows: [(Suite, &str, &str, &[&str]); 3] = [
        (Trixie, "microvm", "no-ack", &[]),
        (Sid, "pc-q35-8.0", "no-ack", &[]),
        (Sid, "microvm", "ack-nobody-asked-for", &["--switchover-ack"]),
    ];
    for (suite, machine, what, options) in rows {
        let flavor = Flavor { running: true, ..Flavor::new(suite, machine) };
        let case = Case::NoSwitchover(Setup::with("return-path switchover-ack"), options);
        table.add(flavor, format!("received-differs/{what}"), case);
    }
}

fn live(table: &mut Table) {
    let mut add = |from: Suite, to: Suite, leaves: Setup, arrives: Setup, each_section: bool| {
        let bandwidth = if leaves.compression == "none" { SLOW } else { SLOW_COMPRESSED };
        let leaves = leaves.and("return-path").over(Transport::Tcp);
        let flush = if each_section { Flush::EachSection } else { Flush::Default };
        let flavor = Flavor { flush, ..Flavor::new(from, "microvm,accel=kvm") };
        let what = format!("live/{}-to-{}-{}", leaves.name(), to.series(), arrives.name());
        table.add(flavor, what, Case::Live(Box::new(Live { leaves, arrives, each_section, tls: None, bandwidth }), to));
    };
    let multifd = Setup::multifd;
    for suite in SUITES {
        add(suite, suite, Setup::default(), multifd(2, "zstd"), false);
        add(suite, suite, multifd(2, "none"), Setup::default(), false);
        add(suite, suite, multifd(4, "zlib"), multifd(8, "none"), false);
        add(suite, suite, multifd(8, "zstd"), multifd(4, "zlib"), false);
    }
    for suite in [Trixie, Sid] {
        add(suite, suite, multifd(4, "none"), multifd(2, "none"), true);
        add(suite, suite, multifd(2, "none").zero_page("legacy"), multifd(4, "zstd").zero_page("legacy"), false);
    }
    add(Bookworm, Sid, multifd(2, "zstd"), multifd(2, "zlib"), false);
    add(Sid, Trixie, multifd(4, "zlib"), multifd(4, "none"), false);
}

/// The names of the quick rows: each release, direction, method, flush mode, form and kind of refusal.
const QUICK: &[&str] = &[
    "7.2/microvm/leaves/tcp-return-path-nonex2",
    "7.2/microvm/leaves/tcp-return-path-zlibx8",
    "7.2/microvm/leaves/unix-return-path-zstdx4",
    "7.2/microvm/arrives/unix-nonex4-from-multifd",
    "7.2/microvm/arrives/tcp-zstdx8-from-plain",
    "7.2/microvm/refused/unix-compress-nonex2",
    "7.2/microvm/refused/exec-nonex2",
    "7.2/microvm/not-sent/unix-zstdx2-zero-multifd",
    "7.2/microvm+running/received-differs/2-channels-for-4",
    "7.2/microvm,accel=kvm/live/tcp-return-path-zstdx8-to-7.2-unix-zlibx4",
    "10.0/microvm/leaves/unix-nonex1-zero-none",
    "10.0/microvm/leaves/tcp-return-path-zlibx2-zero-multifd",
    "10.0/microvm/leaves/file-mapped-ram-zero-multifd",
    "10.0/microvm/leaves/file-mapped-ram-nonex4-zero-multifd",
    "10.0/microvm/leaves/tcp-return-path-switchover-ack-nonex2",
    "10.0/microvm/arrives/unix-zlibx2-zero-legacy-from-mapped-ram",
    "10.0/microvm/arrives/unix-zstdx4-zero-multifd-from-plain",
    "10.0/microvm/arrives/file-mapped-ram-nonex4-from-multifd",
    "10.0/microvm/refused/file-mapped-ram-zlibx2",
    "10.0/microvm/refused/unix-postcopy-ram-nonex2",
    "10.0/microvm/sent-differs/4-channels-for-2",
    "10.0/pc-q35-8.0/leaves/unix-return-path-zlibx4-zero-none",
    "10.0/pc-q35-8.0/arrives/tcp-nonex2-zero-multifd-from-plain",
    "11.1/microvm/leaves/unix-return-path-zstdx2-zero-legacy",
    "11.1/microvm/leaves/unix-postcopy-ram-return-path-nonex2",
    "11.1/microvm/arrives/tcp-nonex8-zero-multifd-from-plain",
    "11.1/microvm/refused/unix-mapped-ram",
    "11.1/microvm/late/multifd",
    "11.1/microvm+flush-each-section/leaves/tcp-return-path-zstdx2-zero-multifd",
    "11.1/microvm+running/received-differs/4-channels-for-2",
    "11.1/microvm+running/received-differs/zlib-for-zstd",
    "11.1/microvm,accel=kvm/live/tcp-return-path-zlibx4-to-11.1-unix-nonex8",
    "11.1/microvm,accel=kvm/live/tls1.3-multifd-4",
    "11.1/microvm,accel=kvm/tls1.3/authz-refused",
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique() {
        let mut seen = HashSet::new();
        for row in all() {
            assert!(seen.insert(row.name.clone()), "{} is there twice", row.name);
        }
    }

    #[test]
    fn the_matrix_is_as_wide_as_promised() {
        let rows = all();
        assert!(rows.len() >= 150, "{}", rows.len());
        for kind in KINDS {
            assert!(rows.iter().any(|r| r.case.kind() == kind), "{kind}");
        }
        assert!(rows.iter().filter(|r| r.case.kind() == "live").count() >= 10);
        for name in QUICK {
            assert!(rows.iter().any(|r| r.name == *name), "no row is called {name}");
        }
        assert!((28..=40).contains(&quick().len()), "{}", quick().len());
    }

    /// What qevm says of the legal rows, and of the illegal ones, is what the table says: QEMU is asked by the rows.
    #[test]
    fn legal_rows_are_legal_to_qevm() {
        for row in all() {
            let release = row.flavor.release();
            match &row.case {
                Case::Leaves(setup, _) | Case::Arrives(setup, _) => {
                    assert_eq!(setup.verdict(release), Ok(()), "{}", row.name);
                }
                Case::Refused(setup) | Case::NotSent(setup) => {
                    assert!(setup.verdict(release).is_err(), "{}", row.name);
                }
                _ => {}
            }
        }
    }
}
