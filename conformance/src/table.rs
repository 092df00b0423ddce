//! The scenarios.

use crate::roots::Suite;
use crate::scenario::Scenario;

/// Every scenario.
pub fn all() -> Vec<Scenario> {
    let mut rows = Vec::new();
    for suite in Suite::ALL {
        for machine in ["microvm", "q35", "pc"] {
            rows.push(Scenario::new(suite, machine, "plain"));
        }
    }
    rows
}
