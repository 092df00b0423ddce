//! One migration, and what must hold in it.

use super::destination::Receiver;
use super::source::Source;
use super::{Fault, Link, Plan};
use crate::MigrationError;
use std::time::Duration;

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ending {
    /// The guest runs at the destination.
    Moved,
    /// The guest runs at the source.
    Stayed,
    /// Postcopy broke off: the guest is at the destination, some of its memory at the source, and both know.
    Split,
    /// The guest runs nowhere: one side holds it paused and knows that an operator has to decide (or would, if the
    /// connection had two directions).
    Paused,
}

/// What must never happen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The guest runs twice.
    #[error("the guest runs on both sides")]
    TwoGuests,
    /// The guest runs nowhere, and neither side says so.
    #[error("the guest is lost: the source says {source_says:?}, and the destination {destination_says:?}")]
    Lost {
        /// The source's error; `None` if it believes that the guest has gone.
        source_says: Option<String>,
        /// The destination's.
        destination_says: Option<String>,
    },
    /// The source was told that the guest has arrived, and it has not.
    #[error("SHUT 0 was sent while pages {pages:?} were missing or the end of the stream had not been sent")]
    EarlyShut {
        /// Pages that are not the newest.
        pages: Vec<usize>,
    },
    /// Pages are not the newest, or the device's state is not.
    #[error("the guest arrived with pages {pages:?} as they were before")]
    Stale {
        /// The pages; none of them if it is the device.
        pages: Vec<usize>,
    },
    /// Memory was given back to the host that the source still needs.
    #[error("the source has given back memory that it needs")]
    Released,
    /// Too much lies in buffers.
    #[error("{bytes} bytes lie in a buffer")]
    Memory {
        /// How many.
        bytes: usize,
    },
    /// It does not end.
    #[error("the migration has not ended after {} s", .0.as_secs())]
    Endless(Duration),
    /// Nothing went wrong that has to end a migration, and the guest has not moved.
    #[error("nothing went wrong, and the guest has not moved ({ending:?}): {reasons:?}")]
    NotMoved {
        /// How it ended.
        ending: Ending,
        /// What the source and the destination say.
        reasons: (Option<String>, Option<String>),
    },
    /// The simulator's own.
    #[error("the driver of the source has failed: {0}")]
    Driver(String),
}

/// Longest that a migration may take.
const LONGEST: Duration = Duration::from_secs(600);
/// Most bytes that may lie in a buffer of the destination: a packet or record, a piece, and some.
const MOST: usize = 32 << 10;
/// Most bytes that the source's core may hold for the main channel: zero pages, and a part.
const MOST_STREAM: usize = 96 << 10;
/// How long a source takes to go on when it is busy.
const STEP: Duration = Duration::from_micros(50);

/// Runs one migration.
///
/// # Errors
/// What must never happen, and has.
pub fn migrate(plan: &Plan) -> Result<Ending, Violation> {
    let mut simulation = Simulation::new(plan).map_err(driver)?;
    simulation.run()?;
    simulation.ending()
}

fn driver(error: MigrationError) -> Violation {
    Violation::Driver(error.to_string())
}

pub(super) struct Simulation<'p> {
    plan: &'p Plan,
    pub(super) links: Vec<Link>,
    pub(super) back: Link,
    pub(super) source: Source,
    pub(super) receiver: Receiver,
    pub(super) now: Duration,
    /// The destination had said that the guest has arrived.
    told: bool,
    /// Connections that were replaced.
    replaced: usize,
    /// Bytes that the first connections have carried, if they were.
    carried: Vec<u64>,
}

impl<'p> Simulation<'p> {
    pub(super) fn new(plan: &'p Plan) -> Result<Self, MigrationError> {
        let link = |number: usize| Self::link(plan, 0, number, plan.fault_of(number));
        Ok(Simulation {
            plan,
            links: (0..plan.back()).map(link).collect(),
            back: link(plan.back()),
            source: Source::new(plan)?,
            receiver: Receiver::new(plan),
            now: Duration::ZERO,
            told: false,
            replaced: 0,
            carried: Vec::new(),
        })
    }

    fn link(plan: &Plan, connection: usize, number: usize, fault: Option<Fault>) -> Link {
        let seed = plan.seed.wrapping_mul(31).wrapping_add((1000 * connection + number) as u64);
        Link::new(seed, plan.delay, fault)
    }

    /// Goes on until both sides have ended.
    pub(super) fn run(&mut self) -> Result<(), Violation> {
        loop {
            self.step().map_err(driver)?;
            self.check()?;
            if self.source.is_over() && self.receiver.over {
                return Ok(());
            }
            self.sleep();
            if self.now > LONGEST {
                return Err(Violation::Endless(self.now));
            }
        }
    }

    fn step(&mut self) -> Result<(), MigrationError> {
        self.told = self.receiver.told;
        self.source.step(self.now, &mut self.links, &mut self.back)?;
        self.receiver.step(self.now, &mut self.links, &mut self.back);
        self.recover()
    }

    /// When both sides have noticed that the connection of a postcopy is lost, the operator has another for them, or
    /// gives up.
    fn recover(&mut self) -> Result<(), MigrationError> {
        if self.source.is_over() {
            self.receiver.give_up();
        }
        if !self.source.is_interrupted() || !(self.receiver.interrupted || self.receiver.over) {
            return Ok(());
        }
        let faults = self.plan.recoveries.get(self.replaced).filter(|_| self.receiver.interrupted);
        let Some(faults) = faults else {
            // Or the guest has all of its memory, and the operator sees that there.
            self.source.give_up();
            self.receiver.give_up();
            return Ok(());
        };
        if self.replaced == 0 {
            self.carried = self.links.iter().chain([&self.back]).map(Link::sent).collect();
        }
        self.replaced += 1;
        let fault = |number| faults.iter().find(|(link, _)| *link == number).map(|(_, fault)| *fault);
        let link = |number| Self::link(self.plan, self.replaced, number, fault(number));
        (self.links, self.back) = (vec![link(0)], link(1));
        self.receiver.reconnect(self.now);
        self.source.reconnect()
    }

    /// What holds at all times.
    fn check(&self) -> Result<(), Violation> {
        if self.source.runs && self.receiver.runs {
            return Err(Violation::TwoGuests);
        }
        if self.source.misses_memory() {
            return Err(Violation::Released);
        }
        for (bytes, most) in [(self.receiver.most, MOST), (self.source.most, MOST_STREAM)] {
            if bytes > most {
                return Err(Violation::Memory { bytes });
            }
        }
        if self.receiver.told && !self.told {
            let pages = self.stale();
            if !self.source.ended || !pages.is_empty() {
                return Err(Violation::EarlyShut { pages });
            }
        }
        Ok(())
    }

    /// Until something happens. What has arrived already waits for a side that waits for something else.
    fn sleep(&mut self) {
        let arrivals = self.links.iter().chain([&self.back]).filter_map(Link::next);
        let busy = self.source.is_busy(&self.links).then_some(self.now + STEP);
        let next = arrivals.chain(self.receiver.wake()).chain(self.source.wake()).chain(busy);
        let next = next.filter(|next| *next > self.now).min();
        self.now = next.unwrap_or(self.now + Duration::from_millis(1));
    }

    /// Pages that are not at the destination as they are at the source, and should be.
    fn stale(&self) -> Vec<usize> {
        let mut newest = self.source.memory.clone();
        self.receiver.early.follow(&mut newest);
        let mut stale = newest.differences(&self.receiver.memory);
        for (link, fault) in &self.plan.faults {
            let now = || self.links.get(*link).map_or(0, Link::sent);
            let sent = self.carried.get(*link).copied().unwrap_or_else(now);
            match (fault.flips().filter(|at| *at < sent), self.source.struck(*link)) {
                (None, _) => {}
                (Some(_), Some(struck)) => stale.retain(|page| *page != struck),
                // What is no page's content says where contents go: what has become of them is unknown.
                (Some(_), None) => return Vec::new(),
            }
        }
        stale
    }

    /// How it has ended.
    pub(super) fn ending(&self) -> Result<Ending, Violation> {
        let source_says = self.source.result.as_ref().and_then(|result| result.as_ref().err());
        let flips = self.plan.faults.iter().any(|(_, fault)| fault.flips().is_some());
        let broken = matches!(source_says, Some(MigrationError::PostcopyBroken { .. }));
        let ending = match (self.receiver.runs, self.source.runs) {
            (true, _) => Ending::Moved,
            (false, true) => Ending::Stayed,
            (false, false) if self.receiver.broken => Ending::Split,
            (false, false) => Ending::Paused,
        };
        if ending == Ending::Split && !broken {
            return Err(Violation::Lost {
                source_says: source_says.map(ToString::to_string),
                destination_says: self.receiver.error.clone(),
            });
        }
        let reasons = || (source_says.map(ToString::to_string), self.receiver.error.clone());
        // With a postcopy that broke before the guest ran there, all of it is at the source, where it stays paused.
        let unsettled = broken || matches!(source_says, Some(MigrationError::Unsettled { .. }));
        // A pipe does not tell that what was read was wrong: the guest stays paused at the source, which believes that
        // it has gone.
        let untold = !self.plan.return_path && flips;
        if ending == Ending::Paused && !unsettled && !self.receiver.undecided && !untold {
            let (source_says, destination_says) = reasons();
            return Err(Violation::Lost { source_says, destination_says });
        }
        // The side that has the guest has all of it.
        if self.receiver.runs || (ending == Ending::Paused && !unsettled && !untold) {
            let pages = self.stale();
            if !pages.is_empty() || (self.receiver.work != Some(self.source.work) && !flips) {
                return Err(Violation::Stale { pages });
            }
        }
        let may_fail = self.plan.cancel.is_some() || self.plan.faults.iter().any(|(_, fault)| !fault.is_short());
        // An operator who cancels too late changes nothing.
        let torn = ending == Ending::Split && self.plan.faults.is_empty();
        if torn || !may_fail && (ending != Ending::Moved || source_says.is_some()) {
            return Err(Violation::NotMoved { ending, reasons: reasons() });
        }
        Ok(ending)
    }
}
