//! Which commands are legal in which states of the machine and of its migrations.
//!
//! A command lists the situations in which it is refused, and the first that holds is the answer; in all others it is
//! legal. The rows are QEMU 11.1's as it was seen to answer; `qevm-conformance` puts both into every state that can be
//! reached and compares.

use super::RunState;
use qevm_migration::{Refused, Status};

/// What the legality of a command depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Situation {
    /// Whether the guest runs, and why not.
    pub run_state: RunState,
    /// State of the outgoing migration.
    pub outgoing: Status,
    /// How far an incoming migration is.
    pub arrival: ArrivalState,
}

/// How far an incoming migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArrivalState {
    /// None was asked for at the start.
    NotExpected,
    /// One was asked for, and where it comes from is yet to be said.
    Deferred,
    /// It is waited for, under way, or over.
    Started,
}

/// A part of a [`Situation`] in which a command is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Whatever the situation.
    Always,
    /// In this run state.
    RunState(RunState),
    /// While an outgoing migration is under way.
    Migrating,
    /// While an incoming migration is so far.
    Arrival(ArrivalState),
}

/// A command is refused in some situations, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// When it is refused.
    pub when: When,
    /// The answer.
    pub refused: Refused,
}

const fn rule(when: When, refused: Refused) -> Rule {
    Rule { when, refused }
}

/// Legal in every situation.
pub const ANYTIME: &[Rule] = &[];
/// `cont`: not while the guest is being handed over.
pub const CONT: &[Rule] = &[rule(When::RunState(RunState::FinishMigrate), Refused::NotFinalized)];
/// `migrate`: one at a time, of a guest that is here.
pub const MIGRATE: &[Rule] = &[
    rule(When::Migrating, Refused::InProgress),
    rule(When::RunState(RunState::Inmigrate), Refused::GuestExpected),
    rule(When::RunState(RunState::Postmigrate), Refused::GuestHasLeft),
];
/// `migrate-incoming`: once, if the machine was started to wait for a guest.
pub const MIGRATE_INCOMING: &[Rule] = &[
    rule(When::Arrival(ArrivalState::NotExpected), Refused::NoGuestExpected),
    rule(When::Arrival(ArrivalState::Started), Refused::IncomingStarted),
];
/// `migrate-set-capabilities`: what a migration was begun with stays.
pub const SET_CAPABILITIES: &[Rule] = &[rule(When::Migrating, Refused::InProgress)];

/// Whether a command with these rules is legal in a situation.
///
/// ```
/// use qevm_migration::{Refused, Status};
/// use reference_vmm::vmm::{RunState, legality::{self, ArrivalState, Situation}};
///
/// let (run_state, outgoing) = (RunState::Postmigrate, Status::Completed);
/// let situation = Situation { run_state, outgoing, arrival: ArrivalState::NotExpected };
/// assert_eq!(legality::check(legality::MIGRATE, &situation), Err(Refused::GuestHasLeft));
/// assert_eq!(legality::check(legality::CONT, &situation), Ok(()));
/// ```
///
/// # Errors
/// The answer of the first rule that holds.
pub fn check(rules: &[Rule], situation: &Situation) -> Result<(), Refused> {
    let holds = |when| match when {
        When::Always => true,
        When::RunState(state) => situation.run_state == state,
        When::Migrating => situation.outgoing.is_running(),
        When::Arrival(state) => situation.arrival == state,
    };
    match rules.iter().find(|rule| holds(rule.when)) {
        Some(rule) => Err(rule.refused.clone()),
        None => Ok(()),
    }
}
