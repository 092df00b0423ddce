//! Pages of BARs that the guest reaches without the monitor.

use crate::error::Result;
use crate::memory::SharedPages;
use std::sync::Arc;

/// Some of a BAR.
#[derive(Clone, Debug)]
pub struct BarPages {
    /// The BAR.
    pub bar: usize,
    /// Where in it they begin, a multiple of the size of a page.
    pub offset: u64,
    /// The host's pages behind them.
    pub pages: Arc<SharedPages>,
}

/// Shows the guest pages of the host, as KVM's memory slots do.
pub trait Window: Send {
    /// Shows them from a guest-physical address on. Gives the number by which they are hidden again.
    ///
    /// # Errors
    /// They cannot be there. The guest's accesses go on being brought to the device one by one.
    fn show(&mut self, gpa: u64, pages: &Arc<SharedPages>) -> Result<u32>;

    /// Hides what was shown.
    fn hide(&mut self, number: u32);
}

/// What the guest sees at the moment.
#[derive(Default)]
pub(super) struct Shown {
    window: Option<Box<dyn Window>>,
    now: Vec<(u64, Arc<SharedPages>, u32)>,
}

impl Shown {
    pub(super) fn by(window: Box<dyn Window>) -> Shown {
        Shown { window: Some(window), now: Vec::new() }
    }

    /// Hides what is not wanted at its address any more, and shows what is not seen yet.
    pub(super) fn set(&mut self, mut wanted: Vec<(u64, Arc<SharedPages>)>) {
        let Some(window) = &mut self.window else { return };
        self.now.retain(|(gpa, pages, number)| {
            let stays = wanted.iter().position(|(at, other)| at == gpa && Arc::ptr_eq(pages, other));
            match stays {
                Some(place) => drop(wanted.swap_remove(place)),
                None => window.hide(*number),
            }
            stays.is_some()
        });
        for (gpa, pages) in wanted {
            match window.show(gpa, &pages) {
                Ok(number) => self.now.push((gpa, pages, number)),
                Err(error) => tracing::debug!(%error, gpa, "pages of a BAR are not shown, accesses are trapped"),
            }
        }
    }
}
