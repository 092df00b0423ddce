//! Medians, spreads and ratios.

use serde::Serialize;
use std::fmt;

/// What one migration took.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Figures {
    /// From `migrate` to the guest's first output at the destination, ms.
    pub total_ms: f64,
    /// From the guest's last output at the source to its first at the destination, ms.
    pub downtime_ms: f64,
    /// From the event STOP at the source to RESUME at the destination, ms.
    pub stop_to_resume_ms: f64,
    /// MB (10⁶ bytes) over the link, with packet headers.
    pub megabytes: f64,
    /// Processor time of both monitors without their vCPUs, ms.
    pub cpu_ms: f64,
    /// The source's part of it, ms.
    pub cpu_source_ms: f64,
    /// Readings of the dirty log.
    pub rounds: f64,
}

/// A column of the report: its name and what it is of a migration.
pub(super) type Column = (&'static str, fn(&Figures) -> f64);

/// What is compared.
pub(super) const COLUMNS: [Column; 7] = [
    ("total ms", |f| f.total_ms),
    ("downtime ms", |f| f.downtime_ms),
    ("STOP-RESUME ms", |f| f.stop_to_resume_ms),
    ("MB", |f| f.megabytes),
    ("CPU ms", |f| f.cpu_ms),
    ("CPU src ms", |f| f.cpu_source_ms),
    ("rounds", |f| f.rounds),
];

/// Median, quartiles and range of some values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// A quarter of them is less.
    pub lower_quartile: f64,
    /// A quarter of them is greater.
    pub upper_quartile: f64,
}

impl Summary {
    /// Of `values`; `None` if there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Summary> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        // Between the two values next to that place, as far as it is between them.
        let at = |part: f64| {
            let place = part * (values.len() - 1) as f64;
            let (below, above) = (values[place.floor() as usize], values[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Some(Summary { median: at(0.5), min, max, lower_quartile: at(0.25), upper_quartile: at(0.75) })
    }

    /// Of a figure that was taken twice in each repetition: how many times as large `ours` is as `theirs`. What the
    /// machine did meanwhile met both.
    pub fn of_ratios(ours: impl IntoIterator<Item = f64>, theirs: impl IntoIterator<Item = f64>) -> Option<Summary> {
        Summary::of(ours.into_iter().zip(theirs).map(|(ours, theirs)| ours / theirs))
    }

    /// The median and the quartiles of ratios, as text.
    pub fn ratio(&self) -> String {
        format!("{:.2} ({:.2} to {:.2})", self.median, self.lower_quartile, self.upper_quartile)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} ({:.1}-{:.1})", self.median, self.min, self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(Summary::of([]), None);
        let whole = Summary { median: 2.0, min: 1.0, max: 3.0, lower_quartile: 1.5, upper_quartile: 2.5 };
        assert_eq!(Summary::of([3.0, 1.0, 2.0]), Some(whole));
        assert_eq!(Summary::of([4.0, 1.0, 2.0, 3.0]).map(|s| s.median), Some(2.5));
    }

    #[test]
    fn ratios_are_those_of_each_repetition() {
        // The machine was ten times as slow in the second one.
        let ratios = Summary::of_ratios([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]).unwrap();
        assert_eq!((ratios.median, ratios.ratio().as_str()), (3.0, "3.00 (2.50 to 3.50)"));
    }
}
