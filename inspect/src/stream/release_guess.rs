//! Which QEMU wrote a stream: a guess from what the stream shows.
//!
//! A stream does not name the release that wrote it. Some of its bytes changed with a release, whatever the machine
//! type: each such sign moves a bound. The machine type gives a lower bound, because a release knows no newer ones.
//!
//! | sign | release |
//! |---|---|
//! | machine type `…-X.Y` | X.Y or newer |
//! | JSON description written as `{ "page_size" : …` | 5.2 or older |
//! | JSON description written as `{"page_size": …`, or `{"configuration": …` | 6.0 or newer |
//! | JSON description with `configuration` | 10.0 or newer; without it older |
//! | struct arrays in the description without any `index` | 11.0 or newer |
//! | `apic` sections before `timer` | 11.0 or newer; after it older |
//! | command SWITCHOVER_START | 10.0 or newer; without it older, unless the machine type is 9.2 or older |
//! | command PING 0x42 | 10.2 or newer |
//! | MULTIFD_FLUSH on the main channel | 8.1 or newer |
//! | mapped-ram | 9.0 or newer |
//! | `globalstate` has a 1 after 32 bytes of run state | newer than 7.2 |
//! | zlib pages on the main channel, `block` section | 9.0 or older |
//! | second `ioapic` | 6.0 or newer |

use super::analysis::Analysis;
use qevm_wire::QemuVersion;
use qevm_wire::profile::machine_version;

/// The releases whose streams were examined when this was written; guesses prefer them.
const EXAMINED: [QemuVersion; 4] =
    [QemuVersion::new(5, 2), QemuVersion::new(7, 2), QemuVersion::new(10, 0), QemuVersion::new(11, 1)];

/// The release that most likely wrote the stream; `None` if it shows no sign of any.
///
/// It is the version of the machine type if that release fits: aliases such as `q35` stand for the newest type of
/// a binary, so a versioned type is mostly run by its own release. Otherwise it is the newest examined release that
/// fits (5.2, 7.2, 10.0, 11.1).
pub fn guess(analysis: &Analysis) -> Option<QemuVersion> {
    let bounds = Bounds::of(analysis);
    if (bounds.oldest, bounds.newest) == (None, None) {
        return None;
    }
    let fits = |release: &QemuVersion| bounds.fits(*release);
    bounds.version.filter(fits).or_else(|| EXAMINED.into_iter().rev().find(fits)).or(bounds.oldest)
}

/// The [`guess`] as text: `RELEASE MACHINE`, and after it the range of releases that fit, if it is not one alone.
pub fn describe(analysis: &Analysis) -> String {
    if !analysis.header {
        return "unknown".into();
    }
    let Bounds { oldest, newest, .. } = Bounds::of(analysis);
    let machine = analysis.machine();
    let machine = machine.unwrap_or_else(|| "unknown machine".into());
    let range = match (oldest, newest) {
        (Some(oldest), Some(newest)) if oldest == newest => String::new(),
        (Some(oldest), Some(newest)) if oldest < newest => format!(" ({oldest} to {newest})"),
        (Some(oldest), None) => format!(" ({oldest} or newer)"),
        (None, Some(newest)) => format!(" ({newest} or older)"),
        (Some(oldest), Some(newest)) => format!(" (contradictory signs: {oldest} or newer, {newest} or older)"),
        (None, None) => return format!("unknown release {machine}"),
    };
    match guess(analysis) {
        Some(guess) => format!("{guess} {machine}{range}"),
        None => format!("{machine}{range}"),
    }
}

/// The examined releases, the likeliest writer first: as [`describe`] guesses, then those nearest to the guess.
pub(super) fn likely_releases(analysis: &Analysis) -> Vec<QemuVersion> {
    let bounds = Bounds::of(analysis);
    let mut releases = EXAMINED.to_vec();
    releases.reverse();
    // Where the machine type's own release was not examined, the next newer one is nearest.
    let own = |release: &QemuVersion| bounds.version.is_none_or(|version| *release >= version);
    if let Some(version) = bounds.version.filter(|version| bounds.fits(*version)) {
        releases.sort_by_key(|release| (*release < version, if own(release) { *release } else { version }));
    }
    releases.sort_by_key(|release| !bounds.fits(*release));
    releases
}

/// The releases between which the writer's is.
struct Bounds {
    oldest: Option<QemuVersion>,
    newest: Option<QemuVersion>,
    /// The version of the machine type.
    version: Option<QemuVersion>,
}

impl Bounds {
    fn of(analysis: &Analysis) -> Self {
        let mut signs = analysis.signs.clone();
        let version = analysis.machine().as_deref().and_then(machine_version);
        if let Some(version) = version {
            signs.at_least(version.major, version.minor);
        }
        // Machine types up to 9.2 turn the command off in every release; the others leave it to the release, and its
        // user (`send-switchover-start=off`).
        let first = QemuVersion::new(10, 0);
        let silent =
            version.is_some_and(|version| version < first) || signs.oldest.is_some_and(|oldest| oldest >= first);
        if signs.switched_over && !signs.switchover_start && !silent {
            signs.at_most(9, 2);
        }
        if analysis.main_pages.compressed > 0 {
            signs.at_most(9, 0);
        }
        Bounds { oldest: signs.oldest, newest: signs.newest, version }
    }

    fn fits(&self, release: QemuVersion) -> bool {
        self.oldest.is_none_or(|oldest| release >= oldest) && self.newest.is_none_or(|newest| release <= newest)
    }
}

#[cfg(test)]
mod tests {
    use super::super::signs::Signs;
    use super::*;
    use qevm_savevm::configuration::Configuration;
    use qevm_savevm::framing::SectionHeader;

    fn described(machine: &str, signs: impl FnOnce(&mut Signs)) -> String {
        let configuration = Some(Configuration::new(machine));
        let mut analysis = Analysis { header: true, configuration, ..Analysis::default() };
        signs(&mut analysis.signs);
        describe(&analysis)
    }

    #[test]
    fn the_guess_names_release_machine_and_range() {
        let old = |signs: &mut Signs| signs.description(b"{ \"page_size\" : 4096");
        assert_eq!(described("pc-q35-5.2", old), "5.2 pc-q35-5.2");
        assert_eq!(described("microvm", old), "5.2 microvm (5.2 or older)");
        let middle = |signs: &mut Signs| signs.description(b"{\"page_size\": 4096");
        assert_eq!(described("pc-q35-7.2", middle), "7.2 pc-q35-7.2 (7.2 to 9.2)");
        let new = |signs: &mut Signs| signs.description(b"{\"configuration\": {");
        assert_eq!(described("pc-i440fx-7.2", new), "11.1 pc-i440fx-7.2 (10.0 or newer)");
        assert_eq!(described("pc-q35-10.0", new), "10.0 pc-q35-10.0 (10.0 or newer)");
        assert_eq!(described("microvm", |_| {}), "unknown release microvm");
        let suspendable = |signs: &mut Signs| {
            let name = qevm_wire::CountedString::new("globalstate").unwrap();
            let header = SectionHeader { section_id: 9, idstr: name, instance_id: 0, version_id: 1 };
            signs.body(&header, &[&[0; 36][..], &[1], &[0; 67]].concat());
        };
        assert_eq!(described("pc-q35-5.2", suspendable), "11.1 pc-q35-5.2 (8.0 or newer)");
    }
}
