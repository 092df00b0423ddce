//! One migration, and what must hold in it.

use super::{
    Fault, Link, Random,
    destination::Receiver,
    source::{Source, State},
};
use std::time::Duration;

/// A migration in every detail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Decides what the plan leaves open.
    pub seed: u64,
    /// Pages of the guest.
    pub pages: usize,
    /// Page channels; none without capability `multifd`.
    pub channels: u8,
    /// The source confirms the handover, as one of this crate; otherwise it is like a QEMU.
    pub confirmed: bool,
    /// Longest delay on a link.
    pub delay: Duration,
    /// What goes wrong on which link: 0 is the main channel, then come the page channels, and last the return path.
    pub fault: Option<(usize, Fault)>,
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
    /// The destination says that the guest has arrived before the last page has.
    EarlyShut,
    /// The source reads a page before it resets its log.
    ReadBeforeReset,
}

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ending {
    /// The guest runs at the destination.
    Moved,
    /// The guest runs at the source.
    Stayed,
    /// The guest is at the destination and runs nowhere: an operator decides.
    Paused,
}

/// What must never happen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The guest runs twice.
    #[error("the guest runs on both sides")]
    TwoGuests,
    /// The source was told that the guest has arrived, and it has not.
    #[error("SHUT 0 was sent while page {page:?} was missing or the source's guest was running")]
    EarlyShut {
        /// A page that is not the newest.
        page: Option<usize>,
    },
    /// A page is not the newest, or the device's state is not.
    #[error("the guest arrived with page {page:?} as it was before")]
    Stale {
        /// The page; `None` for the device.
        page: Option<usize>,
    },
    /// Too much lies in buffers.
    #[error("{bytes} bytes lie in a buffer")]
    Memory {
        /// How many.
        bytes: usize,
    },
    /// It does not end.
    #[error("the migration has not ended after {} s", .0.as_secs())]
    Endless(Duration),
    /// Nothing went wrong, and the guest has not moved.
    #[error("nothing went wrong, and the guest has not moved ({ending:?}): {reason:?}")]
    NotMoved {
        /// How it ended.
        ending: Ending,
        /// What the destination says.
        reason: Option<String>,
    },
    /// The simulator's own.
    #[error("the model of the source has failed: {0}")]
    Model(String),
}

/// Longest that a migration may take.
const LONGEST: Duration = Duration::from_secs(600);
/// Most bytes that may lie in a buffer: a packet or record, a piece, and some.
const MOST: usize = 32 << 10;
/// How long a source takes to go on when it is busy.
const STEP: Duration = Duration::from_micros(50);

impl Plan {
    /// The plan of a seed: one of four goes without any fault.
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let channels = random.below(4) as u8;
        let pages = 4 + random.below(24) as usize;
        let confirmed = !random.once_in(3);
        let delay = Duration::from_micros([50, 2000, 200_000][random.below(3) as usize]);
        let fault = (!random.once_in(4)).then(|| {
            let link = random.below(u64::from(channels) + 2) as usize;
            let is_back = link == usize::from(channels) + 1;
            let at = if is_back {
                random.below(40)
            } else {
                random.below(pages as u64 * 12_000 / (1 + u64::from(channels)))
            };
            let time = Duration::from_millis([100, 5000, 15_000, 90_000][random.below(4) as usize]);
            // What the destination says is trusted: nothing on the wire would show a flip there.
            let fault = match random.below(if is_back { 2 } else { 3 }) {
                0 => Fault::Cut(at),
                1 => Fault::Stall(at, time),
                _ => Fault::Flip(at, 1 << random.below(8)),
            };
            (link, fault)
        });
        Plan { seed, pages, channels, confirmed, delay, fault, plant: Plant::Nothing }
    }
}

/// Runs one migration.
///
/// # Errors
/// What must never happen, and has.
pub fn migrate(plan: &Plan) -> Result<Ending, Violation> {
    let count = usize::from(plan.channels) + 2;
    let link = |number: usize| {
        let fault = plan.fault.filter(|(at, _)| *at == number).map(|(_, fault)| fault);
        Link::new(plan.seed.wrapping_mul(31).wrapping_add(number as u64), plan.delay, fault)
    };
    let mut links: Vec<Link> = (0..count - 1).map(link).collect();
    let mut back = link(count - 1);
    let model = |error: Box<dyn std::error::Error>| Violation::Model(error.to_string());
    let mut source = Source::new(plan).map_err(model)?;
    let mut receiver = Receiver::new(plan);
    let flipped = matches!(plan.fault, Some((_, Fault::Flip(..))));
    let mut now = Duration::ZERO;
    loop {
        let (told, seen) = (receiver.told, source.state);
        source.step(now, &mut links, &mut back).map_err(model)?;
        receiver.step(now, &mut links, &mut back);
        if source.runs() && receiver.runs {
            return Err(Violation::TwoGuests);
        }
        if receiver.most > MOST {
            return Err(Violation::Memory { bytes: receiver.most });
        }
        if receiver.told && !told {
            let page = source.memory.difference(&receiver.memory);
            let sent = source.state == State::Sent || seen == State::Sent;
            if !sent || (page.is_some() && !flipped) {
                return Err(Violation::EarlyShut { page });
            }
        }
        if source.is_over() && receiver.over {
            break;
        }
        let arrivals = links.iter().chain([&back]).filter_map(Link::next);
        let busy = source.is_busy(&links).then_some(now + STEP);
        let next = arrivals.chain(receiver.wake()).chain(busy).filter(|next| *next > now).min();
        // What has arrived already waits for whoever waits for something else.
        now = match next {
            Some(next) => next,
            None => now + Duration::from_millis(1),
        };
        if now > LONGEST {
            return Err(Violation::Endless(now));
        }
    }
    let ending = match (receiver.runs, source.runs()) {
        (true, _) => Ending::Moved,
        (false, true) => Ending::Stayed,
        (false, false) => Ending::Paused,
    };
    if receiver.runs && !flipped {
        let page = source.memory.difference(&receiver.memory);
        if page.is_some() || receiver.work != Some(source.work) {
            return Err(Violation::Stale { page });
        }
    }
    if plan.fault.is_none() && ending != Ending::Moved {
        return Err(Violation::NotMoved { ending, reason: receiver.error });
    }
    Ok(ending)
}
