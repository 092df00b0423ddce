//! What can be seen of a guest from outside, at either end.

use serde::Serialize;
use std::fmt;

/// One end of a migration, as QMP and the guest's own output show it.
#[derive(Debug, Clone, Serialize)]
pub struct Side {
    /// What the monitor said last, if it has ended.
    pub ended: Option<String>,
    /// `query-status`.
    pub status: String,
    /// The guest prints on.
    pub runs: bool,
    /// `query-migrate`: its status.
    pub migration: String,
    /// `query-migrate`: `error-desc`, and other words for the operator.
    pub says: String,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(said) = &self.ended {
            return write!(f, "ended ({said})");
        }
        let Side { status, migration, says, runs, .. } = self;
        write!(f, "{status}{}, migration {migration}", if *runs { " (the guest prints on)" } else { "" })?;
        if !says.is_empty() {
            write!(f, " ({says})")?;
        }
        Ok(())
    }
}

/// Where the guest runs in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runs {
    /// It never left, or came back.
    Source,
    /// It has arrived.
    Destination,
    /// Nowhere: this end holds it, paused: 0 the source, 1 the destination.
    Paused(usize),
    /// At the destination, as far as it gets without the memory that is missing there, which a recovery has to bring.
    Starved,
    /// Nowhere: its own end, or the operator's signal, took it.
    Gone,
}

/// The outcome as the table has it.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    /// Where the guest runs.
    pub runs: Runs,
    /// A part of what one end says: 0 the source, 1 the destination, 2 whichever decides first.
    pub says: Option<(usize, &'static str)>,
    /// `status` of `query-migrate` at the source, where it is a matter of the outcome.
    pub source: Option<&'static str>,
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.runs {
            Runs::Source => write!(f, "runs at the source")?,
            Runs::Destination => write!(f, "runs at the destination")?,
            Runs::Paused(0) => write!(f, "runs nowhere, the source holds it paused")?,
            Runs::Paused(_) => write!(f, "runs nowhere, the destination holds it paused")?,
            Runs::Starved => write!(f, "runs at the destination, which waits for a recovery")?,
            Runs::Gone => write!(f, "has ended")?,
        }
        if let Some(status) = self.source {
            write!(f, ", the source reports '{status}'")?;
        }
        if let Some((end, text)) = self.says {
            write!(f, ", {} says '{text}'", ["the source", "the destination", "one end"][end])?;
        }
        Ok(())
    }
}

impl Expected {
    /// Why this is not what was expected; `None` when it is.
    pub(super) fn differs(&self, sides: &[Side; 2]) -> Option<String> {
        let runs = [0, 1].map(|end| sides[end].runs || sides[end].status == "running");
        if runs == [true, true] {
            return Some("the guest runs at both ends".into());
        }
        let wrong = match self.runs {
            Runs::Source => runs != [true, false] || !sides[0].runs,
            Runs::Destination => runs != [false, true] || !sides[1].runs,
            Runs::Paused(end) => runs != [false, false] || sides[end].ended.is_some(),
            Runs::Starved => runs != [false, true] || sides[1].migration != "postcopy-paused",
            Runs::Gone => runs != [false, false],
        };
        if wrong {
            return Some("it runs elsewhere".into());
        }
        if self.source.is_some_and(|status| sides[0].migration != status) {
            return Some("the source reports something else".into());
        }
        let said = |end: usize| match sides.get(end) {
            Some(side) => format!("{}{}", side.says, side.ended.as_deref().unwrap_or_default()),
            None => sides.iter().map(|side| format!("{side}")).collect(),
        };
        let unsaid = self.says.filter(|(end, text)| !said(*end).contains(text));
        unsaid.map(|(end, text)| {
            format!("{} does not say '{text}'", ["the source", "the destination", "either end"][end])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(status: &str, runs: bool) -> Side {
        let (status, migration) = (status.into(), "failed".into());
        Side { ended: None, status, runs, migration, says: "make sure that it runs nowhere else".into() }
    }

    #[test]
    fn two_running_guests_are_never_what_was_expected() {
        for runs in [Runs::Source, Runs::Destination, Runs::Paused(0), Runs::Paused(1), Runs::Starved, Runs::Gone] {
            let expected = Expected { runs, says: None, source: None };
            assert!(expected.differs(&[side("running", true), side("running", true)]).is_some(), "{expected}");
            // Whatever QMP says, a guest that prints runs.
            assert!(expected.differs(&[side("running", true), side("paused", true)]).is_some(), "{expected}");
        }
    }

    #[test]
    fn an_outcome_is_told_from_the_others() {
        let states = [(true, false), (false, true), (false, false)];
        for (index, runs) in [Runs::Source, Runs::Destination, Runs::Paused(1)].into_iter().enumerate() {
            let expected = Expected { runs, says: None, source: None };
            for (other, (a, b)) in states.into_iter().enumerate() {
                let of = |running| side(if running { "running" } else { "paused" }, running);
                assert_eq!(expected.differs(&[of(a), of(b)]).is_none(), index == other, "{expected}: {a} {b}");
            }
        }
        let paused = [side("paused", false), side("paused", false)];
        let says = |text| Expected { runs: Runs::Paused(1), says: Some((1, text)), source: Some("failed") };
        assert!(says("runs nowhere else").differs(&paused).is_none());
        assert!(says("all is well").differs(&paused).is_some());
    }
}
