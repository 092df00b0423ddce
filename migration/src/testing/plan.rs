//! Everything that decides a simulated migration.

use super::{Fault, Random};
use qevm_wire::QemuVersion;
use std::time::Duration;

/// A migration in every detail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Decides what the plan leaves open.
    pub seed: u64,
    /// Pages of each of the guest's two blocks.
    pub blocks: Vec<usize>,
    /// The release whose format the stream has.
    pub qemu: QemuVersion,
    /// Page channels; none without capability `multifd`.
    pub channels: u8,
    /// The destination answers; otherwise the connections have one direction, as a pipe.
    pub return_path: bool,
    /// The source confirms the handover, as one of this crate; otherwise both sides are like a QEMU.
    pub confirmed: bool,
    /// Capability `switchover-ack`, where the release has it.
    pub switchover_ack: bool,
    /// Longest delay on a link.
    pub delay: Duration,
    /// Parameters `max-bandwidth` and `max-postcopy-bandwidth` in bytes per second; 0 for no limit.
    pub bandwidth: u64,
    /// Parameter `downtime-limit`.
    pub downtime: Duration,
    /// How often the guest writes to a page.
    pub work: Duration,
    /// Capability `pause-before-switchover`: the operator says `migrate-continue` after this time.
    pub pause: Option<Duration>,
    /// When the operator cancels.
    pub cancel: Option<Duration>,
    /// Capability `postcopy-ram`: the operator says `migrate-start-postcopy` after this time. (With a return path, and
    /// page channels only to 11.1.)
    pub postcopy: Option<Duration>,
    /// Capability `release-ram`: a postcopy that was interrupted does not go on then.
    pub release: bool,
    /// What goes wrong on which link, at most one fault on each: 0 is the main channel, then come the page channels,
    /// and last the return path.
    pub faults: Vec<(usize, Fault)>,
    /// What goes wrong on the connections over which a postcopy goes on that was interrupted, one after the other: 0 is
    /// the main channel, 1 the return path. When they are used up, the operator gives up.
    pub recoveries: Vec<Vec<(usize, Fault)>>,
    /// A mistake that the simulator is to find.
    pub plant: Plant,
}

/// A known mistake of an engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Plant {
    /// None.
    #[default]
    Nothing,
    /// The channels of the destination do not wait for each other.
    NoBarrier,
    /// The destination says that the guest has arrived before the last page has. (Without page channels.)
    EarlyShut,
    /// The source reads a page before it resets its log.
    ReadBeforeReset,
    /// The source does not read the log once more when the guest is paused.
    NoLastReading,
    /// The source lets the guest go on when it may run at the destination.
    GoesOn,
    /// The destination keeps old pages that it was told to drop.
    NoDiscard,
    /// The source does not learn which pages the guest waits for.
    Deaf,
    /// Neither side says so when the confirmation of the handover is lost.
    Silent,
    /// The source takes what it has sent for received when it goes on with a postcopy.
    Assumes,
    /// The source gives memory back to the host when it has sent it, whichever side has the guest.
    ReleasesEarly,
}

impl Plan {
    /// The plan of a seed: two of five go without any fault.
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let channels = random.below(4) as u8;
        // The log is reset in steps of 256 pages.
        let first = if random.once_in(100) { 250 + random.below(300) } else { 4 + random.below(24) };
        let blocks = vec![first as usize, 1 + random.below(5) as usize];
        let pages = blocks.iter().sum::<usize>() as u64;
        let releases = [(7, 2), (8, 2), (10, 0), (11, 1)];
        let (major, minor) = releases[random.below(4) as usize];
        // Page channels are sockets, which have two directions.
        let return_path = channels > 0 || !random.once_in(3);
        let confirmed = !random.once_in(3);
        let delay = Duration::from_micros([50, 2000, 200_000][random.below(3) as usize]);
        let bandwidth = [0, 0, 20_000_000, 1_000_000][random.below(4) as usize];
        let downtime = Duration::from_millis([300, 2000][random.below(2) as usize]);
        let work = Duration::from_micros([200, 5000, 100_000][random.below(3) as usize]);
        let pause = random.once_in(8).then(|| Duration::from_millis(random.below(3000)));
        let cancel = random.once_in(8).then(|| {
            let most = [5000, 100_000, 3_000_000][random.below(3) as usize];
            Duration::from_micros(random.below(most))
        });
        // Before 10.1 page channels do not go with postcopy.
        let possible = return_path && random.once_in(3) && (channels == 0 || major > 10);
        let postcopy = possible.then(|| {
            let most = [3000, 600_000][random.below(2) as usize];
            Duration::from_micros(random.below(most))
        });
        let mut faults: Vec<(usize, Fault)> = Vec::new();
        for _ in 0..[0, 0, 1, 1, 2][random.below(5) as usize] {
            let link = random.below(u64::from(channels) + 1 + u64::from(return_path)) as usize;
            if faults.iter().all(|(taken, _)| *taken != link) {
                let at = pages * 12_000 / (1 + u64::from(channels));
                faults.push((link, Fault::of(&mut random, link > usize::from(channels), at)));
            }
        }
        let qemu = QemuVersion::new(major, minor);
        let switchover_ack = random.once_in(4);
        let mut recoveries: Vec<_> =
            (0..postcopy.map_or(0, |_| random.below(4))).map(|_| Fault::of_recovery(&mut random, pages)).collect();
        let release = random.once_in(4);
        if release {
            recoveries.clear();
        }
        let plant = Plant::Nothing;
        Plan {
            seed,
            blocks,
            qemu,
            channels,
            return_path,
            confirmed,
            switchover_ack,
            delay,
            bandwidth,
            downtime,
            work,
            pause,
            cancel,
            postcopy,
            release,
            faults,
            recoveries,
            plant,
        }
    }

    /// What goes wrong on a link.
    pub fn fault_of(&self, link: usize) -> Option<Fault> {
        self.faults.iter().find(|(at, _)| *at == link).map(|(_, fault)| *fault)
    }

    /// Number of the link that is the return path.
    pub fn back(&self) -> usize {
        usize::from(self.channels) + 1
    }
}

impl Fault {
    fn of(random: &mut Random, is_back: bool, bytes: u64) -> Fault {
        let at = random.below(if is_back { 40 } else { bytes });
        let time = Duration::from_millis([100, 100, 5000, 5000, 15_000, 90_000][random.below(6) as usize]);
        // What the destination says is trusted: nothing on the wire would show a flip there.
        match random.below(if is_back { 2 } else { 3 }) {
            0 => Fault::Cut(at),
            1 => Fault::Stall(at, time),
            // Most of what is sent is pages: half of the flips are for what comes before them.
            _ if random.once_in(2) => Fault::Flip(random.below(bytes.min(600)), 1 << random.below(8)),
            _ => Fault::Flip(at, 1 << random.below(8)),
        }
    }

    /// What goes wrong on a connection over which a postcopy goes on.
    fn of_recovery(random: &mut Random, pages: u64) -> Vec<(usize, Fault)> {
        let link = random.below(2) as usize;
        // Half of it goes wrong while both sides find out what is missing.
        let most = if random.once_in(2) { 60 } else { pages * 4000 };
        let at = random.below(if link == 1 { 120 } else { most });
        match random.below(4) {
            0 => Vec::new(),
            1 => vec![(link, Fault::Stall(at, Duration::from_secs(5)))],
            _ => vec![(link, Fault::Cut(at))],
        }
    }

    /// The byte whose bits it inverts.
    pub(super) fn flips(self) -> Option<u64> {
        match self {
            Fault::Flip(at, _) => Some(at),
            _ => None,
        }
    }

    /// Whether no side may give up because of it.
    pub(super) fn is_short(self) -> bool {
        matches!(self, Fault::Stall(_, time) if time <= SHORT)
    }
}

/// A stall that both sides have to sit out: shorter than the shortest patience.
const SHORT: Duration = Duration::from_secs(5);
