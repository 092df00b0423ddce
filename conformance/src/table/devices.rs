//! Device models, from `devices.txt`.

use super::since;
use crate::roots::Suite;
use crate::scenario::Scenario;

const TABLE: &str = include_str!("devices.txt");
const DISK: &str = "-drive file={dir}/disk.raw,if=none,id=d0,format=raw";

pub(super) fn rows() -> Vec<Scenario> {
    TABLE.lines().filter(|l| !l.is_empty() && !l.starts_with('#')).flat_map(row).collect()
}

/// One line for every release from its first one on.
fn row(line: &str) -> Vec<Scenario> {
    let mut words = line.split_whitespace();
    let machine = words.next().unwrap_or_default();
    let first = words.next().and_then(Suite::of_series);
    let (quick, rest): (Vec<&str>, Vec<&str>) = words.partition(|w| w.starts_with('!'));
    let (Some(first), Some((what, arguments))) = (first, rest.split_first()) else {
        // The table is part of the program: its test says which line is wrong.
        return Vec::new();
    };
    let arguments = arguments.join(" ").replace('@', DISK);
    since(first)
        .map(|suite| {
            let row = Scenario::new(suite, machine, what).with(&arguments);
            if quick.iter().any(|q| q[1..] == *suite.series()) { row.quick() } else { row }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_makes_a_row() {
        for line in TABLE.lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
            assert!(!row(line).is_empty(), "devices.txt: {line}");
            assert!(line.contains(" -device "), "devices.txt: {line}");
        }
        let quick = TABLE.matches(" !").count();
        assert_eq!(rows().iter().filter(|r| r.quick).count(), quick, "a quick mark names no release of its row");
    }
}
