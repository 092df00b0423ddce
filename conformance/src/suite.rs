//! Debian's suites, by whose packages there are several releases of QEMU.

/// A Debian suite whose QEMU takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub enum Suite {
    /// Debian 11, QEMU 5.2.
    Bullseye,
    /// Debian 12, QEMU 7.2.
    Bookworm,
    /// Debian 13, QEMU 10.0.
    Trixie,
    /// Debian unstable, QEMU 11.1 at the time of writing.
    Sid,
}

impl Suite {
    /// All suites, oldest first.
    pub const ALL: [Suite; 4] = [Suite::Bullseye, Suite::Bookworm, Suite::Trixie, Suite::Sid];

    /// The suite's name in Debian's archive.
    pub fn name(self) -> &'static str {
        match self {
            Suite::Bullseye => "bullseye",
            Suite::Bookworm => "bookworm",
            Suite::Trixie => "trixie",
            Suite::Sid => "sid",
        }
    }

    /// The QEMU release series that the suite is here for. Unstable moves on:
    /// [`Root::version`](crate::roots::Root::version) tells the truth.
    pub fn series(self) -> &'static str {
        match self {
            Suite::Bullseye => "5.2",
            Suite::Bookworm => "7.2",
            Suite::Trixie => "10.0",
            Suite::Sid => "11.1",
        }
    }

    /// The suite with this QEMU release series.
    pub fn of_series(series: &str) -> Option<Suite> {
        Suite::ALL.into_iter().find(|s| s.series() == series)
    }

    /// The packages of other targets than x86.
    pub(crate) fn target_packages(self) -> &'static [&'static str] {
        match self {
            Suite::Bullseye | Suite::Bookworm => {
                &["qemu-system-arm", "qemu-system-ppc", "qemu-system-misc", "qemu-system-mips", "qemu-system-sparc"]
            }
            Suite::Trixie | Suite::Sid => &[
                "qemu-system-arm",
                "qemu-system-ppc",
                "qemu-system-misc",
                "qemu-system-riscv",
                "qemu-system-s390x",
                "qemu-system-mips",
                "qemu-system-sparc",
            ],
        }
    }

    /// Packages beyond `qemu-system-x86`'s dependencies: option ROMs, display devices that are modules, `qemu-img`.
    pub(crate) fn packages(self) -> &'static [&'static str] {
        match self {
            Suite::Bullseye | Suite::Bookworm => &["qemu-system-x86", "ipxe-qemu", "qemu-utils"],
            Suite::Trixie | Suite::Sid => &[
                "qemu-system-x86",
                "ipxe-qemu",
                "qemu-utils",
                "qemu-system-modules-spice",
                "qemu-system-modules-opengl",
            ],
        }
    }
}

impl std::fmt::Display for Suite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// This suite and those after it.
pub(crate) fn since(first: Suite) -> impl Iterator<Item = Suite> {
    Suite::ALL.into_iter().filter(move |s| *s >= first)
}
