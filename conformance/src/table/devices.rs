//! Device models: as firmware leaves them (`devices.txt`), and at work under Linux (`linux.txt`).

use crate::roots::Suite;
use crate::scenario::{Guest, Scenario};
use crate::suite::since;

const DEVICES: &str = include_str!("devices.txt");
const LINUX: &str = include_str!("linux.txt");
const DISK: &str = "-drive file={dir}/disk.raw,if=none,id=d0,format=raw";

pub(super) fn rows() -> Vec<Scenario> {
    lines(DEVICES).flat_map(device).chain(lines(LINUX).flat_map(linux)).collect()
}

fn lines(table: &'static str) -> impl Iterator<Item = &'static str> {
    table.lines().filter(|l| !l.is_empty() && !l.starts_with('#'))
}

/// `machine release [!release…] name arguments…`: one row for every release from its first one on. The tables are part
/// of the program, so a line that cannot be read makes no row, and the test says which it is.
fn device(line: &str) -> Vec<Scenario> {
    let mut words = line.split_whitespace();
    let machine = words.next().unwrap_or_default();
    let first = words.next().and_then(Suite::of_series);
    let (quick, rest): (Vec<&str>, Vec<&str>) = words.partition(|w| w.starts_with('!'));
    let (Some(first), Some((what, arguments))) = (first, rest.split_first()) else {
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

/// `machine release name MiB arguments…`.
fn linux(line: &str) -> Vec<Scenario> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [machine, first, what, memory, arguments @ ..] = words.as_slice() else {
        return Vec::new();
    };
    let (Some(first), Ok(memory)) = (Suite::of_series(first), memory.parse()) else {
        return Vec::new();
    };
    let arguments = arguments.join(" ").replace('@', DISK);
    let row = |suite| Scenario::new(suite, machine, &format!("linux-{what}"));
    since(first).map(|suite| row(suite).guest(Guest::Linux).memory(memory).with(&arguments)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_makes_a_row() {
        for line in lines(DEVICES) {
            assert!(!device(line).is_empty(), "devices.txt: {line}");
            assert!(line.contains(" -device "), "devices.txt: {line}");
        }
        for line in lines(LINUX) {
            assert!(!linux(line).is_empty(), "linux.txt: {line}");
        }
        let quick = DEVICES.matches(" !").count();
        assert_eq!(rows().iter().filter(|r| r.quick).count(), quick, "a quick mark names no release of its row");
    }
}
