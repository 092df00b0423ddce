//! What becomes of a guest when something goes wrong with its migration, or when the operator intervenes.
//!
//! A [`Row`] of the [`table`] is a moment, the monitors at both ends, and the outcome as it was written down
//! beforehand: where the guest runs in the end, and what QMP says at the other end. A `scene` has a running guest at
//! the source, a destination that waits for it, and a link between two network namespaces that the kernel cuts;
//! `moments` is what happens there; `sides` looks at what came of it. The guest must never run at both ends; where it
//! runs at neither, one end must hold it paused and say who decides.

mod delay;
mod frozen;
mod hosts;
mod mishaps;
mod moments;
mod scene;
mod sides;
mod strangers;
pub mod table;

use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Instant;

pub use frozen::{Phase, Victim};
pub use mishaps::At;
pub use moments::Moment;
pub use sides::{Expected, Runs, Side};

use crate::matrix::{REQUIRE_KVM, REQUIRE_QEMU, kvm};
use crate::network::Network;
use crate::outcome::{self, Outcome, Report};
use crate::peer::{Monitor, Stop};
use crate::roots::{Root, Suite};
use scene::{Cast, Ground, Scene};

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Row {
    /// Unique.
    pub name: String,
    /// What happens.
    pub moment: Moment,
    /// Source and destination.
    pub stops: [Stop; 2],
    /// Capabilities that are on at both ends, beside those that the moment needs.
    pub capabilities: &'static [&'static str],
    /// What must be seen in the end.
    pub expected: Expected,
    /// In the representative subset.
    pub quick: bool,
}

/// What was seen: the source, then the destination.
#[derive(Debug, Clone, Serialize)]
pub struct Seen {
    /// The outcome, in the words of the table.
    pub outcome: String,
    /// How long both ends took to decide, where something was frozen.
    pub decided: Option<String>,
    /// Both ends.
    pub sides: [Side; 2],
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [source, destination] = &self.sides;
        let decided = self.decided.as_ref().map_or_else(String::new, |decided| format!("; decided: {decided}"));
        write!(f, "{}{decided}; source: {source}; destination: {destination}", self.outcome)
    }
}

impl Row {
    fn play(&self, ground: &Ground, scratch: &Path) -> Result<Seen> {
        let cast = Cast {
            stops: self.stops,
            capabilities: [self.moment.capabilities(), self.capabilities].concat(),
            payload: self.moment.payload(),
            virtio: self.moment.virtio(),
        };
        let mut scene = Scene::set(ground, cast, scratch)?;
        self.moment.happen(&mut scene).with_context(|| scene.describe())?;
        let sides = scene.settle(&self.expected).with_context(|| format!("expected: {}", self.expected))?;
        Ok(Seen { outcome: self.expected.to_string(), decided: scene.decided.take(), sides })
    }
}

/// Plays rows one after the other, telling `each` about every one as it ends.
///
/// # Errors
/// No scratch folder can be made. Everything else is a row of the report.
pub fn run(rows: &[Row], program: &Monitor, mut each: impl FnMut(&outcome::Row<Seen>)) -> Result<Report<Seen>> {
    let scratch = tempfile::Builder::new().prefix("qevm-lifecycle-").tempdir()?;
    let missing = kvm().err().map(|why| (REQUIRE_KVM, why));
    let ground = match &missing {
        Some(_) => None,
        None => Some(Network::new(None).and_then(|network| {
            let root = Root::install(Suite::Sid)?;
            let roots = [network.source(), network.destination()]
                .map(|namespace| BTreeMap::from([(Suite::Sid, root.inside(namespace))]));
            let programs = [network.source(), network.destination()].map(|namespace| program.inside(namespace));
            Ok(Ground { network, roots, programs })
        })),
    };
    let mut played = Vec::new();
    for row in rows {
        let started = Instant::now();
        // Paths of sockets must be short.
        let folder = scratch.path().join(format!("r{}", played.len()));
        let outcome = match (&ground, &missing) {
            (Some(Ok(ground)), _) => {
                std::fs::create_dir_all(&folder)?;
                let seen = row.play(ground, &folder);
                ground.network.mend()?;
                seen.into()
            }
            (Some(Err(error)), _) => Outcome::unavailable(REQUIRE_QEMU, &format!("{error:#}")),
            (None, missing) => {
                let (variable, why) = missing.as_ref().context("there is a reason")?;
                Outcome::unavailable(variable, why)
            }
        };
        let row = outcome::Row { name: row.name.clone(), outcome, seconds: started.elapsed().as_secs_f64() };
        each(&row);
        played.push(row);
    }
    Ok(Report { rows: played })
}
