//! The ways to boot the machine.

/// Which kernel boots, and whose clock it follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Boot {
    /// Debian's kernel, by the host's clock.
    Debian,
    /// The lab's own kernel with its VFIO devices, by the host's clock: for right and wrong.
    Vfio,
    /// The same with one processor, by the number of instructions: waiting costs nothing, and figures repeat on any
    /// host.
    Counted,
}

impl Boot {
    pub(super) const ALL: [Boot; 3] = [Boot::Debian, Boot::Vfio, Boot::Counted];

    pub(super) fn processor(self) -> [&'static str; 6] {
        match self {
            Boot::Debian | Boot::Vfio => ["-smp", "2", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off"],
            // Without fast string instructions a copy is counted by words, and not by bytes.
            Boot::Counted => ["-smp", "1", "-accel", "tcg,thread=single", "-cpu", "max,la57=off,-erms,-fsrm"],
        }
    }
}
