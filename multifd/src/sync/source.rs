//! When a source synchronises its channels.

use super::{FlushMode, SyncError};
use qevm_wire::Profile;

/// One thing that a source has to send, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SyncStep {
    /// Send all pages that are still queued, then a SYNC packet on every page channel.
    SyncChannels,
    /// Put the flush record (`0x200`) on the main channel.
    Flush,
    /// Put the EOS of the `ram` section on the main channel.
    Eos,
}

const SYNC_EOS: &[SyncStep] = &[SyncStep::SyncChannels, SyncStep::Eos];
const SYNC_FLUSH: &[SyncStep] = &[SyncStep::SyncChannels, SyncStep::Flush];
const SYNC_FLUSH_EOS: &[SyncStep] = &[SyncStep::SyncChannels, SyncStep::Flush, SyncStep::Eos];
const EOS: &[SyncStep] = &[SyncStep::Eos];

/// Says what a source has to send at each moment of a migration so that its channels synchronise as those of QEMU do.
///
/// The source's own duty: within one round it sends no page twice, and it takes pages that the guest dirtied again into
/// a later round.
///
/// ```
/// use qevm_multifd::{SourceSync, SyncStep};
/// use qevm_wire::{Profile, QemuVersion};
///
/// let mut sync = SourceSync::new(&Profile::new(QemuVersion::new(10, 0), "microvm"));
/// assert_eq!(sync.setup()?, [SyncStep::SyncChannels, SyncStep::Flush, SyncStep::Eos]);
/// sync.pages()?; // some packets on some channels
/// assert_eq!(sync.section_end()?, [SyncStep::Eos]); // the round goes on in the next section
/// sync.pages()?;
/// assert_eq!(sync.round_end()?, [SyncStep::SyncChannels, SyncStep::Flush]);
/// assert_eq!(sync.completion()?, [SyncStep::Eos]); // everything is synchronised already
/// # Ok::<(), qevm_multifd::SyncError>(())
/// ```
#[derive(Debug, Clone)]
pub struct SourceSync {
    mode: FlushMode,
    sync_at_end: bool,
    phase: Phase,
    /// Pages were sent since the last synchronisation.
    unsynchronised: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Setup,
    Precopy,
    Postcopy,
    Ended,
}

impl SourceSync {
    /// What a source of this profile does.
    pub fn new(profile: &Profile) -> Self {
        SourceSync {
            mode: FlushMode::of(profile),
            sync_at_end: profile.multifd_flush_at_end,
            phase: Phase::Setup,
            unsynchronised: false,
        }
    }

    /// The mode.
    pub fn mode(&self) -> FlushMode {
        self.mode
    }

    /// At the end of the setup section, once, before any pages.
    ///
    /// # Errors
    /// [`SyncError::Order`] if it is not the first step.
    pub fn setup(&mut self) -> Result<&'static [SyncStep], SyncError> {
        if self.phase != Phase::Setup {
            return Err(SyncError::Order { what: "setup", place: "was over" });
        }
        self.phase = Phase::Precopy;
        Ok(match self.mode {
            FlushMode::PerRound => SYNC_FLUSH_EOS,
            FlushMode::PerSection => SYNC_EOS,
        })
    }

    /// When pages are given to page channels.
    ///
    /// # Errors
    /// [`SyncError::Order`] before setup, after the end, and after the switchover to postcopy, when pages travel on
    /// the main or the preempt channel only.
    pub fn pages(&mut self) -> Result<(), SyncError> {
        match self.phase {
            Phase::Precopy => {
                self.unsynchronised = true;
                Ok(())
            }
            Phase::Setup => Err(SyncError::Order { what: "pages on a page channel", place: "come before setup" }),
            Phase::Postcopy => Err(SyncError::Order { what: "pages on a page channel", place: "come in postcopy" }),
            Phase::Ended => Err(SyncError::Order { what: "pages on a page channel", place: "come after the end" }),
        }
    }

    /// When the pass over all pages is complete, in the middle of a section; before any page is sent for the second
    /// time.
    ///
    /// # Errors
    /// [`SyncError::Order`] before setup or after the end.
    pub fn round_end(&mut self) -> Result<&'static [SyncStep], SyncError> {
        self.running("end of a round")?;
        Ok(match (self.phase, self.mode) {
            (Phase::Precopy, FlushMode::PerRound) => self.synchronise(SYNC_FLUSH),
            _ => &[],
        })
    }

    /// At the end of each PART section.
    ///
    /// # Errors
    /// [`SyncError::Order`] before setup or after the end.
    pub fn section_end(&mut self) -> Result<&'static [SyncStep], SyncError> {
        self.running("end of a section")?;
        Ok(match (self.phase, self.mode) {
            (Phase::Precopy, FlushMode::PerSection) => self.synchronise(SYNC_EOS),
            _ => EOS,
        })
    }

    /// At the end of the last PART section before the switchover to postcopy. The page channels are idle afterwards.
    ///
    /// # Errors
    /// [`SyncError::Order`] if precopy is not running.
    pub fn before_postcopy(&mut self) -> Result<&'static [SyncStep], SyncError> {
        if self.phase != Phase::Precopy {
            return Err(SyncError::Order { what: "switchover to postcopy", place: "comes outside of precopy" });
        }
        self.phase = Phase::Postcopy;
        Ok(match self.mode {
            FlushMode::PerRound => self.synchronise(SYNC_FLUSH_EOS),
            FlushMode::PerSection => self.synchronise(SYNC_EOS),
        })
    }

    /// At the end of the END section, past the last pages.
    ///
    /// # Errors
    /// [`SyncError::Order`] before setup or after the end.
    pub fn completion(&mut self) -> Result<&'static [SyncStep], SyncError> {
        self.running("completion")?;
        let postcopy = self.phase == Phase::Postcopy;
        self.phase = Phase::Ended;
        Ok(match self.mode {
            _ if postcopy => EOS,
            FlushMode::PerSection => self.synchronise(SYNC_EOS),
            FlushMode::PerRound if self.unsynchronised || self.sync_at_end => self.synchronise(SYNC_FLUSH_EOS),
            FlushMode::PerRound => EOS,
        })
    }

    fn running(&self, what: &'static str) -> Result<(), SyncError> {
        match self.phase {
            Phase::Precopy | Phase::Postcopy => Ok(()),
            Phase::Setup => Err(SyncError::Order { what, place: "comes before setup" }),
            Phase::Ended => Err(SyncError::Order { what, place: "comes after the end" }),
        }
    }

    fn synchronise(&mut self, steps: &'static [SyncStep]) -> &'static [SyncStep] {
        self.unsynchronised = false;
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qevm_wire::QemuVersion;

    fn source(qemu: (u16, u16), machine: &str) -> SourceSync {
        SourceSync::new(&Profile::new(QemuVersion::new(qemu.0, qemu.1), machine))
    }

    /// The rows of the format's table of moments, for each kind of source.
    #[test]
    fn every_moment_has_its_steps() {
        let rows: [(SourceSync, [&[SyncStep]; 4]); 5] = [
            // setup, end of a round, end of a PART, end of END (after its final round)
            (source((5, 2), "microvm"), [SYNC_EOS, &[], SYNC_EOS, SYNC_EOS]),
            (source((10, 0), "pc-q35-8.0"), [SYNC_EOS, &[], SYNC_EOS, SYNC_EOS]),
            (source((10, 0), "microvm"), [SYNC_FLUSH_EOS, SYNC_FLUSH, EOS, EOS]),
            (source((11, 1), "pc-q35-8.1"), [SYNC_FLUSH_EOS, SYNC_FLUSH, EOS, EOS]),
            (source((8, 2), "microvm"), [SYNC_FLUSH_EOS, SYNC_FLUSH, EOS, SYNC_FLUSH_EOS]),
        ];
        for (mut sync, [setup, round, section, end]) in rows {
            assert_eq!(sync.setup(), Ok(setup));
            sync.pages().unwrap();
            assert_eq!(sync.section_end(), Ok(section));
            sync.pages().unwrap();
            assert_eq!(sync.round_end(), Ok(round));
            assert_eq!(sync.completion(), Ok(end));
        }
    }

    #[test]
    fn pages_of_an_unfinished_round_are_synchronised_at_the_end() {
        let mut sync = source((10, 0), "microvm");
        sync.setup().unwrap();
        sync.pages().unwrap();
        assert_eq!(sync.completion(), Ok(SYNC_FLUSH_EOS));
    }

    #[test]
    fn page_channels_are_idle_in_postcopy() {
        for (mut sync, last) in [(source((11, 1), "microvm"), SYNC_FLUSH_EOS), (source((5, 2), "microvm"), SYNC_EOS)] {
            sync.setup().unwrap();
            sync.pages().unwrap();
            assert_eq!(sync.before_postcopy(), Ok(last));
            assert!(matches!(sync.pages(), Err(SyncError::Order { .. })));
            assert_eq!(sync.round_end(), Ok(&[][..]));
            assert_eq!(sync.section_end(), Ok(EOS));
            assert_eq!(sync.completion(), Ok(EOS));
        }
    }

    #[test]
    fn steps_out_of_order_are_refused() {
        let mut sync = source((10, 0), "microvm");
        for step in [SourceSync::round_end, SourceSync::section_end, SourceSync::completion] {
            assert!(matches!(step(&mut sync), Err(SyncError::Order { place: "comes before setup", .. })));
        }
        assert!(matches!(sync.before_postcopy(), Err(SyncError::Order { .. })));
        assert!(matches!(sync.pages(), Err(SyncError::Order { .. })));
        sync.setup().unwrap();
        assert!(matches!(sync.setup(), Err(SyncError::Order { .. })));
        sync.completion().unwrap();
        for step in [SourceSync::round_end, SourceSync::section_end, SourceSync::completion] {
            assert!(matches!(step(&mut sync), Err(SyncError::Order { place: "comes after the end", .. })));
        }
        assert!(matches!(sync.pages(), Err(SyncError::Order { .. })));
    }
}
