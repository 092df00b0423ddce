//! Huge pages of the host, for guests whose RAM is in such pages.

use super::Journey;
use std::fs;
use std::path::Path;

/// Where Linux keeps the number of huge pages of 2 MiB.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// MiB in one of them.
const SIZE: u32 = 2;

/// Huge pages that were reserved, and are given back.
#[derive(Debug)]
pub(super) struct Reserved(u64);

impl Reserved {
    /// Enough for all monitors of a journey, if its guest is in huge pages.
    ///
    /// # Errors
    /// Why there are none, in words for the report.
    pub(super) fn of(journey: &Journey) -> Result<Option<Reserved>, String> {
        if !journey.load.memory_backend.is_some_and(|backend| backend.contains("hugetlb=on")) {
            return Ok(None);
        }
        let needed = u64::from(journey.load.memory / SIZE) * journey.stops.len() as u64;
        let reserved = Reserved(number("nr_hugepages"));
        set(reserved.0 + needed);
        match number("free_hugepages") {
            free if free >= needed => Ok(Some(reserved)),
            free => Err(format!("{free} huge pages of {SIZE} MiB are free after reserving, {needed} needed")),
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        set(self.0);
    }
}

fn number(what: &str) -> u64 {
    let text = fs::read_to_string(Path::new(HUGE_PAGES).join(what)).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn set(number: u64) {
    // Whether it worked is seen by those that are free.
    let _ = fs::write(Path::new(HUGE_PAGES).join("nr_hugepages"), number.to_string());
}
