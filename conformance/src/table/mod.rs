//! The scenarios, as data: `machines` varies the machine type, `devices` the device models, `capabilities` what
//! changes the stream itself.
//!
//! The quick subset is what the tests run; it has one row of each kind of stream and every release in it.

mod capabilities;
mod devices;
mod machines;

use crate::scenario::Scenario;

/// Every scenario, in the order of the table.
pub fn all() -> Vec<Scenario> {
    let mut rows = machines::rows();
    rows.extend(devices::rows());
    rows.extend(capabilities::rows());
    rows
}

/// The rows that the tests run.
pub fn quick() -> Vec<Scenario> {
    all().into_iter().filter(|s| s.quick).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::roots::Suite;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_make_folders() {
        let mut seen = HashSet::new();
        for row in all() {
            assert!(seen.insert(row.folder()), "{} is there twice", row.name);
            assert!(row.folder().chars().all(|c| c.is_ascii_alphanumeric() || "-._=+".contains(c)), "{}", row.name);
        }
    }

    #[test]
    fn the_table_is_as_wide_as_promised() {
        assert!(all().len() >= 120);
        for suite in Suite::ALL {
            assert!(quick().iter().any(|s| s.suite == suite), "no quick row for {suite}");
        }
    }
}
