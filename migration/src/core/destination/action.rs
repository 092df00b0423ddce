//! What a destination says to do.

use crate::core::Mark;
use qevm_returnpath::Message;
use qevm_savevm::ram::{BlockId, PageAt, RamBlock};
use qevm_wire::CountedString;
use std::ops::Range;
use std::time::Duration;

/// What to do next.
#[derive(Debug)]
pub struct Turn<'a> {
    /// How many bytes at the front of the input are done with.
    pub consumed: usize,
    /// What to do.
    pub action: Action<'a>,
}

/// What to do next, on the main channel or with the guest.
#[derive(Debug)]
#[non_exhaustive]
pub enum Action<'a> {
    /// Nothing but to ask again.
    Continue,
    /// Show more of the main channel: at least this many bytes, counted from the front of this input; or say that there
    /// are none or what time it is.
    Read {
        /// How many.
        at_least: usize,
        /// When waiting is over.
        until: Option<Duration>,
    },
    /// The RAM blocks listed so far are void: the list begins anew.
    ForgetBlocks,
    /// Say whether the guest has such a [block](super::Destination::block_fits), or [what is
    /// wrong](super::Destination::refuse).
    Block(RamBlock),
    /// The pages of a block have their places in the file, and the next bytes of the main channel are of no use: say
    /// when this many are [done with](super::Destination::placed).
    MappedBlock {
        /// The block.
        block: RamBlock,
        /// How many bytes.
        gap: u64,
    },
    /// The next bytes of the main channel are those of a page: put them [there](super::Destination::placed).
    Page {
        /// Which page. The block was listed and the page lies in it.
        page: PageAt,
        /// How many bytes of it have not been placed.
        remaining: u64,
    },
    /// Clear a page.
    Zero(PageAt),
    /// Change a page by this XBZRLE difference.
    Difference {
        /// Which page.
        page: PageAt,
        /// The difference.
        data: &'a [u8],
    },
    /// These bytes of a block are old, and must not be there when the guest runs (postcopy).
    Discard {
        /// The block.
        block: BlockId,
        /// Ranges of bytes; whole pages that lie in the block.
        ranges: Vec<Range<u64>>,
    },
    /// From here on a thread that touches a page that has not come, or was discarded, has to wait for it, and the
    /// source is asked for it on the return path (postcopy): [`PageFaults`](qevm_returnpath::requests::PageFaults)
    /// keeps the book of that.
    Listen,
    /// The guest runs here from now on, if it ran at the source, and never again there; pages of it are still to come
    /// (postcopy). Do not wait for them.
    Run {
        /// It ran at the source.
        running: bool,
    },
    /// Fill in a page that is missing, as a whole, and let those go on who wait for it (postcopy).
    Place {
        /// Which page. The block was listed and the page lies in it.
        page: PageAt,
        /// Its content; `None` for zeroes.
        content: Option<&'a [u8]>,
    },
    /// Tell the source which pages of a block are here, with [`Message::RecvBitmap`] (recovery of postcopy).
    SendBitmap(BlockId),
    /// The source goes on with a postcopy: send [`Message::ResumeAck`], and ask again for what is waited for.
    Resume,
    /// Tell the [`Synchronisation`](crate::core::Synchronisation), wait as it says, and
    /// [report](super::Destination::synchronised).
    Synchronise(Mark),
    /// Tell the [`Synchronisation`](crate::core::Synchronisation) that memory is complete, and
    /// [report](super::Destination::synchronised).
    EndOfMemory,
    /// Say whether the guest has a use for [sections](super::Destination::section) of this name.
    Section {
        /// The name.
        idstr: CountedString,
        /// The instance.
        instance_id: u32,
        /// What for. Without one it can only say what the operator may do.
        usage: Option<SectionUse>,
    },
    /// Let an iterative device take over a piece of its state.
    LoadPiece {
        /// Its section's name.
        idstr: CountedString,
        /// The piece.
        state: &'a [u8],
    },
    /// The source switches over: tell [`DeviceStates`](crate::core::DeviceStates).
    SwitchOver,
    /// The stream is over: wait as [`DeviceStates`](crate::core::DeviceStates) says until the state of devices that
    /// comes over page channels was loaded, and [report](super::Destination::device_states).
    DeviceStates,
    /// Let the guest take over the [state of its devices](super::Destination::devices), and
    /// [report](super::Destination::loaded). In postcopy this is said once: go on with the stream meanwhile, for
    /// devices may touch pages that have not come.
    LoadDevices,
    /// The stream is over, and it has not been reported that the devices are loaded: wait for that (postcopy).
    AwaitStart,
    /// Let the guest have its disks, and [report](super::Destination::activated).
    Activate,
    /// Send a message on the return path. If it cannot be sent, reading will tell.
    Send(Message),
    /// Send the last word on the return path and [report](super::Destination::told): after it, the source leaves the
    /// guest to us.
    Tell {
        /// The word.
        message: Message,
        /// The source's host must acknowledge it within this time; without, the source itself confirms it.
        patience: Option<Duration>,
    },
    /// The guest is here and nowhere else: start it if it ran.
    Complete {
        /// It ran at the source.
        running: bool,
    },
    /// The guest has not arrived: say that nothing more is sent, and read and drop what comes until the source closes.
    Linger {
        /// When waiting is over.
        until: Duration,
    },
    /// Close all connections. The guest must not run.
    Close,
}

/// What a section is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SectionUse {
    /// The whole state of a device, or the configuration of an iterative one.
    Device,
    /// The state of an iterative device, piece by piece.
    Iterative,
}
