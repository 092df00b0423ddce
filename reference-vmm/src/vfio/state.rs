//! The states of a device in a migration, as the kernel numbers them (`linux/vfio.h`, version 2 of the migration
//! protocol), and which of them follow each other.
//!
//! ```text
//!  RESUMING ◀──▶ STOP ◀──▶ RUNNING_P2P ◀──▶ RUNNING       without P2P: STOP ◀──▶ RUNNING
//!                 ▲             ▲              ▲
//!                 ▼             ▼              ▼
//!             STOP_COPY ◀── PRE_COPY_P2P ◀──▶ PRE_COPY     without P2P: STOP_COPY ◀── PRE_COPY
//! ```
//!
//! A step that fails leaves the device where it was, or in ERROR, which only a reset ends.

use std::collections::VecDeque;
use std::fmt;

/// The state of a VFIO device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// It has failed, and only a reset brings it back.
    Error,
    /// It does nothing.
    Stop,
    /// It works.
    Running,
    /// It does nothing and its state is read.
    StopCopy,
    /// It does nothing and its state is written.
    Resuming,
    /// It works, but begins nothing with other devices.
    RunningP2p,
    /// It works and its state is read.
    PreCopy,
    /// It works, but begins nothing with other devices, and its state is read.
    PreCopyP2p,
}

impl DeviceState {
    /// All of them, by number.
    pub const ALL: [DeviceState; 8] = [
        DeviceState::Error,
        DeviceState::Stop,
        DeviceState::Running,
        DeviceState::StopCopy,
        DeviceState::Resuming,
        DeviceState::RunningP2p,
        DeviceState::PreCopy,
        DeviceState::PreCopyP2p,
    ];

    /// The state of this number.
    pub fn from_raw(raw: u32) -> Option<DeviceState> {
        DeviceState::ALL.get(usize::try_from(raw).ok()?).copied()
    }

    /// Its number.
    pub fn raw(self) -> u32 {
        self as u32
    }

    /// QEMU's name in event VFIO_MIGRATION.
    pub fn as_str(self) -> &'static str {
        match self {
            DeviceState::Error => "error",
            DeviceState::Stop => "stop",
            DeviceState::Running => "running",
            DeviceState::StopCopy => "stop-copy",
            DeviceState::Resuming => "resuming",
            DeviceState::RunningP2p => "running-p2p",
            DeviceState::PreCopy => "pre-copy",
            DeviceState::PreCopyP2p => "pre-copy-p2p",
        }
    }

    /// Whether it works.
    pub fn is_running(self) -> bool {
        use DeviceState::{PreCopy, PreCopyP2p, Running, RunningP2p};
        matches!(self, Running | RunningP2p | PreCopy | PreCopyP2p)
    }

    /// Whether its state can be read while it works.
    pub fn is_precopy(self) -> bool {
        matches!(self, DeviceState::PreCopy | DeviceState::PreCopyP2p)
    }

    /// Whether there is a descriptor through which its state is read or written.
    pub fn has_data(self) -> bool {
        self.is_precopy() || matches!(self, DeviceState::StopCopy | DeviceState::Resuming)
    }

    /// Whether a device in this state has nothing to do with a migration.
    fn is_plain(self) -> bool {
        matches!(self, DeviceState::Running | DeviceState::RunningP2p | DeviceState::Stop)
    }
}

/// The kernel's name.
impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceState::Error => "ERROR",
            DeviceState::Stop => "STOP",
            DeviceState::Running => "RUNNING",
            DeviceState::StopCopy => "STOP_COPY",
            DeviceState::Resuming => "RESUMING",
            DeviceState::RunningP2p => "RUNNING_P2P",
            DeviceState::PreCopy => "PRE_COPY",
            DeviceState::PreCopyP2p => "PRE_COPY_P2P",
        })
    }
}

/// What a device offers of the migration protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Support {
    /// RUNNING_P2P, and with it PRE_COPY_P2P.
    pub p2p: bool,
    /// PRE_COPY.
    pub precopy: bool,
}

impl Support {
    const STOP_COPY: u64 = 1 << 0;
    const P2P: u64 = 1 << 1;
    const PRE_COPY: u64 = 1 << 2;

    /// By the flags of feature MIGRATION; `None` without STOP_COPY, which every device that can migrate has. Flags that
    /// are not known here say nothing.
    pub fn from_flags(flags: u64) -> Option<Support> {
        let has = |flag| flags & flag != 0;
        has(Support::STOP_COPY).then(|| Support { p2p: has(Support::P2P), precopy: has(Support::PRE_COPY) })
    }

    /// The flags.
    pub fn flags(self) -> u64 {
        let flag = |is_there, flag| if is_there { flag } else { 0 };
        Support::STOP_COPY | flag(self.p2p, Support::P2P) | flag(self.precopy, Support::PRE_COPY)
    }

    /// The state where a step from one to the other comes first: a device goes by the shortest way, as the kernel takes
    /// it. `None` if there is no way.
    ///
    /// ```
    /// use reference_vmm::vfio::{DeviceState, Support};
    /// let p2p = Support { p2p: true, precopy: false };
    /// assert_eq!(p2p.next(DeviceState::Running, DeviceState::StopCopy), Some(DeviceState::RunningP2p));
    /// assert_eq!(Support::default().next(DeviceState::Running, DeviceState::PreCopy), None);
    /// ```
    pub fn next(self, from: DeviceState, to: DeviceState) -> Option<DeviceState> {
        if matches!(from, DeviceState::StopCopy | DeviceState::Resuming) && to.is_precopy() {
            // The kernel refuses it.
            return None;
        }
        // The first step of each way that is looked at, and where it has come to.
        let mut ways: VecDeque<_> = self.steps(from).map(|step| (step, step)).collect();
        let mut seen = vec![from];
        while let Some((first, at)) = ways.pop_front() {
            if at == to {
                return Some(first);
            }
            // Data that would not be read or written are on no way.
            let leads = at.is_plain() || (from, at) == (DeviceState::PreCopy, DeviceState::PreCopyP2p);
            if leads && !seen.contains(&at) {
                ways.extend(self.steps(at).map(|step| (first, step)));
            }
            seen.push(at);
        }
        None
    }

    /// The states that follow one directly.
    fn steps(self, from: DeviceState) -> impl Iterator<Item = DeviceState> {
        use DeviceState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
        let Support { p2p, precopy } = self;
        let arcs = [
            (Running, Stop, !p2p),
            (Stop, Running, !p2p),
            (Running, RunningP2p, p2p),
            (RunningP2p, Running, p2p),
            (RunningP2p, Stop, p2p),
            (Stop, RunningP2p, p2p),
            (Stop, StopCopy, true),
            (StopCopy, Stop, true),
            (Stop, Resuming, true),
            (Resuming, Stop, true),
            (Running, PreCopy, precopy),
            (PreCopy, Running, precopy),
            (PreCopy, StopCopy, precopy && !p2p),
            (RunningP2p, PreCopyP2p, precopy && p2p),
            (PreCopyP2p, RunningP2p, precopy && p2p),
            (PreCopy, PreCopyP2p, precopy && p2p),
            (PreCopyP2p, PreCopy, precopy && p2p),
            (PreCopyP2p, StopCopy, precopy && p2p),
        ];
        arcs.into_iter().filter(move |(begin, _, is_there)| *begin == from && *is_there).map(|(_, end, _)| end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of `linux/vfio.h`. (`docs/format/vfio.md`)
    #[test]
    fn states_have_the_kernels_numbers() {
        let numbers = [
            (0, "ERROR"),
            (1, "STOP"),
            (2, "RUNNING"),
            (3, "STOP_COPY"),
            (4, "RESUMING"),
            (5, "RUNNING_P2P"),
            (6, "PRE_COPY"),
            (7, "PRE_COPY_P2P"),
        ];
        for (number, name) in numbers {
            let state = DeviceState::from_raw(number).unwrap();
            assert_eq!((state.raw(), state.to_string().as_str()), (number, name));
        }
        assert_eq!(DeviceState::from_raw(8), None);
        assert_eq!(DeviceState::from_raw(u32::MAX), None);
    }

    #[test]
    fn a_device_goes_the_way_that_the_kernel_takes() {
        use DeviceState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
        let way = |support: Support, from, to| {
            let mut way = vec![from];
            while *way.last().unwrap() != to {
                match support.next(*way.last().unwrap(), to) {
                    Some(next) => way.push(next),
                    None => return None,
                }
            }
            Some(way)
        };
        let all = Support { p2p: true, precopy: true };
        let plain = Support::default();
        assert_eq!(way(plain, Running, StopCopy), Some(vec![Running, Stop, StopCopy]));
        assert_eq!(way(all, Running, Resuming), Some(vec![Running, RunningP2p, Stop, Resuming]));
        assert_eq!(way(all, PreCopy, StopCopy), Some(vec![PreCopy, PreCopyP2p, StopCopy]));
        assert_eq!(way(Support { p2p: false, ..all }, PreCopy, StopCopy), Some(vec![PreCopy, StopCopy]));
        assert_eq!(way(all, StopCopy, Running), Some(vec![StopCopy, Stop, RunningP2p, Running]));
        assert_eq!(way(all, PreCopyP2p, Stop), Some(vec![PreCopyP2p, RunningP2p, Stop]));
        // Seen of a kernel: EINVAL.
        assert_eq!(way(all, Resuming, PreCopy), None);
        assert_eq!(way(plain, Running, PreCopy), None);
        assert_eq!(way(plain, Running, RunningP2p), None);
        for state in DeviceState::ALL {
            assert_eq!(all.next(Error, state), None, "{state}");
            assert_eq!(all.next(state, Error), None, "{state}");
        }
    }

    #[test]
    fn flags_are_those_of_the_kernel() {
        assert_eq!(Support::from_flags(7), Some(Support { p2p: true, precopy: true }));
        assert_eq!(Support::from_flags(1), Some(Support::default()));
        assert_eq!(Support::from_flags(1 << 40 | 3), Some(Support { p2p: true, precopy: false }));
        assert_eq!(Support::from_flags(6), None);
        assert_eq!(Support { p2p: false, precopy: true }.flags(), 5);
    }
}
