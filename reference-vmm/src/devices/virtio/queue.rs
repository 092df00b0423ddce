//! A split virtqueue in guest memory (virtio 1.2, 2.7).
//!
//! Nothing the guest writes there is trusted: every index and address is checked when it is read, a chain has at most
//! [`MAX_CHAIN`] descriptors, and what is wrong is a [`RingError`].

use super::chain::{Buffer, Chain};
use crate::error::Error;
use crate::memory::GuestMemory;
use qevm_microvm::state::VirtioQueueState;
use std::cell::Cell;
use std::mem::offset_of;
use std::sync::atomic::{Ordering, fence};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// Largest queue, and most descriptors of a chain (QEMU's `VIRTQUEUE_MAX_SIZE`, seen as QueueNumMax of 7.2 and 10.0).
pub(crate) const MAX_QUEUE: u32 = 1024;
/// Most descriptors of a chain, indirect ones included.
const MAX_CHAIN: usize = MAX_QUEUE as usize;
/// Alignment of the used ring after reset.
const DEFAULT_ALIGN: u32 = 4096;

const DESCRIPTOR: u64 = size_of::<Descriptor>() as u64;
const USED: u64 = size_of::<Used>() as u64;
/// Where the index of a ring is, and its first entry.
const INDEX: u64 = offset_of!(RingHeader, index) as u64;
const ENTRIES: u64 = size_of::<RingHeader>() as u64;
/// Bytes of an entry of the available ring.
const AVAILABLE: u64 = 2;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;

/// `VIRTIO_F_NOTIFY_ON_EMPTY`
pub(crate) const NOTIFY_ON_EMPTY: u64 = 1 << 24;
/// `VIRTIO_F_ANY_LAYOUT`
pub(crate) const ANY_LAYOUT: u64 = 1 << 27;
/// `VIRTIO_RING_F_INDIRECT_DESC`
pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_RING_F_EVENT_IDX`
pub(crate) const EVENT_IDX: u64 = 1 << 29;

/// What a driver did wrong with a queue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RingError {
    #[error("the available index went from {last} to {found}: more than the queue's {num} entries")]
    AvailableIndex { last: u16, found: u16, num: u32 },
    #[error("all {num} buffers of the queue are in use, and the driver offers more")]
    Overfull { num: u32 },
    #[error("{inuse} buffers are in use of a queue of {num}: the used index {used} does not fit {last}")]
    UsedIndex { inuse: u16, num: u32, used: u16, last: u16 },
    #[error("descriptor {index} of a table of {table}")]
    Descriptor { index: u32, table: u32 },
    #[error("an indirect table of {len} bytes: wanted a multiple of 16, not 0, and no table within a table")]
    Indirect { len: u32 },
    #[error("a chain of more than {MAX_CHAIN} descriptors, or a loop")]
    Chain,
    #[error("a buffer of 0 bytes")]
    Empty,
    #[error("a buffer that the device reads after one that it writes")]
    Order,
    #[error("{what}")]
    Request { what: &'static str },
    #[error(transparent)]
    Memory(#[from] Error),
}

/// One queue.
#[derive(Debug)]
pub(crate) struct Queue {
    default_num: u32,
    pub(super) num: u32,
    pub(super) align: u32,
    /// Address of the descriptors; 0 if the queue is not set up.
    pub(super) desc: u64,
    last_avail: u16,
    /// The used index, once it was read from the guest's memory.
    used: Option<u16>,
    /// The used index when the guest was last interrupted.
    signalled: Option<u16>,
    /// Chains that may still be taken in this turn: a guest that goes on adding some does not keep the device busy for
    /// ever.
    budget: u32,
    /// A chain was left because the budget was used up.
    left: Cell<bool>,
}

impl Queue {
    pub(super) fn new(default_num: u32) -> Queue {
        let (num, align) = (default_num, DEFAULT_ALIGN);
        let (budget, left) = (0, Cell::new(false));
        Queue { default_num, num, align, desc: 0, last_avail: 0, used: None, signalled: None, budget, left }
    }

    /// A new turn: as many chains may be taken as the queue has entries.
    pub(super) fn refill(&mut self) {
        self.budget = self.num;
    }

    /// Whether a chain was left for another turn since this was last asked.
    pub(super) fn take_left(&self) -> bool {
        self.left.take()
    }

    /// Whether a chain was left for another turn.
    pub(super) fn has_left(&self) -> bool {
        self.left.get()
    }

    pub(super) fn default_num(&self) -> u32 {
        self.default_num
    }

    pub(super) fn save(&self) -> VirtioQueueState {
        VirtioQueueState { num: self.num, align: self.align, desc: self.desc, last_avail_idx: self.last_avail }
    }

    pub(super) fn load(&mut self, state: &VirtioQueueState) {
        let VirtioQueueState { num, align, desc, last_avail_idx } = *state;
        *self = Queue { num, align, desc, last_avail: last_avail_idx, ..Queue::new(self.default_num) };
    }

    /// Whether the guest has set it up.
    pub(super) fn is_ready(&self) -> bool {
        self.desc != 0 && self.num != 0
    }

    fn avail(&self) -> u64 {
        self.desc.wrapping_add(u64::from(self.num) * DESCRIPTOR)
    }

    fn used_ring(&self) -> u64 {
        let end = self.used_event().wrapping_add(2);
        let align = u64::from(self.align.max(1));
        end.checked_next_multiple_of(align).unwrap_or(u64::MAX)
    }

    fn used_event(&self) -> u64 {
        self.avail().wrapping_add(ENTRIES + AVAILABLE * u64::from(self.num))
    }

    fn avail_event(&self) -> u64 {
        self.used_ring().wrapping_add(ENTRIES + USED * u64::from(self.num))
    }

    /// The used index; from the guest's memory after a reset or a migration, in which it has no place of its own.
    fn used_index(&mut self, memory: &GuestMemory) -> Result<u16, RingError> {
        match self.used {
            Some(used) => Ok(used),
            None => {
                let used = read_u16(memory, self.used_ring().wrapping_add(INDEX))?;
                let inuse = self.last_avail.wrapping_sub(used);
                if u32::from(inuse) > self.num {
                    return Err(RingError::UsedIndex { inuse, num: self.num, used, last: self.last_avail });
                }
                Ok(*self.used.insert(used))
            }
        }
    }

    /// Whether the indices in guest memory fit those that a source has sent.
    pub(super) fn check(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        if self.is_ready() {
            self.used_index(memory)?;
            self.waiting(memory)?;
        }
        Ok(())
    }

    /// Number of chains that wait to be popped.
    pub(super) fn waiting(&self, memory: &GuestMemory) -> Result<u16, RingError> {
        let found = read_u16(memory, self.avail().wrapping_add(INDEX))?;
        let waiting = found.wrapping_sub(self.last_avail);
        if u32::from(waiting) > self.num {
            return Err(RingError::AvailableIndex { last: self.last_avail, found, num: self.num });
        }
        Ok(waiting)
    }

    /// Asks the guest to tell of every chain that it adds from now on.
    pub(super) fn listen(&self, memory: &GuestMemory, features: u64) -> Result<(), RingError> {
        if features & EVENT_IDX != 0 {
            write_u16(memory, self.avail_event(), self.last_avail)
        } else {
            write_u16(memory, self.used_ring(), 0)
        }
    }

    /// The first descriptor of the chain that is `ahead` after the next, if the budget of this turn reaches that far.
    fn head(&self, memory: &GuestMemory, ahead: u16) -> Result<Option<u16>, RingError> {
        if !self.is_ready() || self.waiting(memory)? <= ahead {
            return Ok(None);
        }
        if u32::from(ahead) >= self.budget {
            self.left.set(true);
            return Ok(None);
        }
        // The index is read before what it speaks of.
        fence(Ordering::SeqCst);
        let slot = u64::from(u32::from(self.last_avail.wrapping_add(ahead)) % self.num);
        let head = read_u16(memory, self.avail().wrapping_add(ENTRIES + AVAILABLE * slot))?;
        match u32::from(head) < self.num {
            true => Ok(Some(head)),
            false => Err(RingError::Descriptor { index: head.into(), table: self.num }),
        }
    }

    /// The chain that is `ahead` after the next; it stays where it is.
    pub(super) fn peek(&self, memory: &GuestMemory, ahead: u16) -> Result<Option<Chain>, RingError> {
        self.head(memory, ahead)?.map(|head| self.walk(memory, head)).transpose()
    }

    /// Takes the next chain.
    pub(super) fn pop(&mut self, memory: &GuestMemory, features: u64) -> Result<Option<Chain>, RingError> {
        let Some(head) = self.head(memory, 0)? else { return Ok(None) };
        if u32::from(self.last_avail.wrapping_sub(self.used_index(memory)?)) >= self.num {
            return Err(RingError::Overfull { num: self.num });
        }
        self.budget -= 1;
        self.last_avail = self.last_avail.wrapping_add(1);
        if features & EVENT_IDX != 0 {
            write_u16(memory, self.avail_event(), self.last_avail)?;
            // So that a chain that the guest adds without a notification is seen by the next look.
            fence(Ordering::SeqCst);
        }
        self.walk(memory, head).map(Some)
    }

    fn walk(&self, memory: &GuestMemory, head: u16) -> Result<Chain, RingError> {
        let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
        let (mut table, mut table_len, mut index, mut indirect) = (self.desc, self.num, u32::from(head), false);
        loop {
            if index >= table_len {
                return Err(RingError::Descriptor { index, table: table_len });
            }
            let descriptor = Descriptor::read(memory, table.wrapping_add(u64::from(index) * DESCRIPTOR))?;
            let flags = descriptor.flags.get();
            if flags & INDIRECT != 0 {
                let len = descriptor.len.get();
                if indirect || len == 0 || !len.is_multiple_of(DESCRIPTOR as u32) || flags & NEXT != 0 {
                    return Err(RingError::Indirect { len });
                }
                (table, table_len, index, indirect) = (descriptor.gpa.get(), len / DESCRIPTOR as u32, 0, true);
                continue;
            }
            chain.add(memory, &descriptor)?;
            if flags & NEXT == 0 {
                return Ok(chain);
            }
            if chain.descriptors() >= MAX_CHAIN {
                return Err(RingError::Chain);
            }
            index = descriptor.next.get().into();
        }
    }

    /// Gives a chain back, `written` bytes of which the device has written. True if the guest wants an interrupt.
    pub(super) fn push(
        &mut self,
        memory: &GuestMemory,
        features: u64,
        head: u16,
        written: u32,
    ) -> Result<bool, RingError> {
        let old = self.used_index(memory)?;
        let slot = u64::from(u32::from(old) % self.num);
        let used = Used { head: u32::from(head).into(), written: written.into() };
        memory.write(self.used_ring().wrapping_add(ENTRIES + USED * slot), used.as_bytes())?;
        // What the guest gets is there before the index says so.
        fence(Ordering::SeqCst);
        let new = old.wrapping_add(1);
        write_u16(memory, self.used_ring().wrapping_add(INDEX), new)?;
        self.used = Some(new);
        fence(Ordering::SeqCst);
        self.wants_interrupt(memory, features, old, new)
    }

    fn wants_interrupt(&mut self, memory: &GuestMemory, features: u64, old: u16, new: u16) -> Result<bool, RingError> {
        if features & NOTIFY_ON_EMPTY != 0 && self.last_avail == new && self.waiting(memory)? == 0 {
            return Ok(true);
        }
        if features & EVENT_IDX == 0 {
            return Ok(read_u16(memory, self.avail())? & AVAIL_NO_INTERRUPT == 0);
        }
        let event = read_u16(memory, self.used_event())?;
        let before = self.signalled.unwrap_or(old);
        let first = self.signalled.is_none();
        self.signalled = Some(new);
        Ok(first || new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(before))
    }
}

/// What either ring begins with.
#[repr(C)]
struct RingHeader {
    flags: U16,
    index: U16,
}

/// An entry of the used ring.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Used {
    head: U32,
    written: U32,
}

/// A descriptor.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
pub(super) struct Descriptor {
    gpa: U64,
    len: U32,
    flags: U16,
    next: U16,
}

impl Descriptor {
    fn read(memory: &GuestMemory, gpa: u64) -> Result<Descriptor, RingError> {
        let mut descriptor = Descriptor::new_zeroed();
        memory.read(gpa, descriptor.as_mut_bytes())?;
        Ok(descriptor)
    }

    pub(super) fn buffer(&self) -> Buffer {
        Buffer { gpa: self.gpa.get(), len: self.len.get() }
    }

    pub(super) fn is_written(&self) -> bool {
        self.flags.get() & WRITE != 0
    }
}

fn read_u16(memory: &GuestMemory, gpa: u64) -> Result<u16, RingError> {
    let mut bytes = [0; 2];
    memory.read(gpa, &mut bytes)?;
    Ok(u16::from_le_bytes(bytes))
}

fn write_u16(memory: &GuestMemory, gpa: u64, value: u16) -> Result<(), RingError> {
    Ok(memory.write(gpa, &value.to_le_bytes())?)
}
