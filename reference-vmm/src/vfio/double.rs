//! A device within the process that does what the kernel's drivers do, and fails where it is told to.

use super::{DataFile, DeviceState, Driver, PrecopyInfo, Support};
use parking_lot::{Mutex, MutexGuard};
use rustix::io::Errno;
use std::sync::Arc;

/// What a [`Double`] has to send, and how it does so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Which states it has.
    pub support: Support,
    /// Bytes that can be read first in PRE_COPY.
    pub initial: u64,
    /// Bytes that can be read there after them.
    pub dirty: u64,
    /// Bytes that can be read only in STOP_COPY: at least 8, for the last 8 say how long it all is.
    pub rest: u64,
    /// A read in PRE_COPY where there is nothing gives 0, and not ENOMSG.
    pub silent_drain: bool,
    /// A read or write moves at most this many bytes; 0 is no limit.
    pub most: usize,
    /// It takes any state, for tests with the states of real devices, and tells what came ([`Double::taken`]).
    pub takes_all: bool,
    /// What is wrong with its driver.
    pub garbage: Option<Garbage>,
}

/// What a driver may do that none should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Garbage {
    /// MIG_DATA_SIZE says 2⁶⁴−1.
    EndlessSize,
    /// PRECOPY_INFO says 2⁶⁴−1 of both kinds.
    EndlessInitial,
    /// PRECOPY_INFO says more initial bytes each time.
    GrowingInitial,
    /// Reads never end.
    EndlessReads,
    /// A read says that it gave more than there was room for.
    OverfullRead,
    /// A write says that it took nothing.
    EmptyWrite,
    /// There is no descriptor.
    NoDescriptor,
    /// The state has a number that there is not.
    UnknownState,
}

/// A call that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A step from one state to the next; the device stays in the first.
    Arc(DeviceState, DeviceState),
    /// The same; the device is in ERROR then.
    ArcIntoError(DeviceState, DeviceState),
    /// A read in this state.
    Read(DeviceState),
    /// A write.
    Write,
    /// MIG_DATA_SIZE.
    DataSize,
    /// PRECOPY_INFO.
    PrecopyInfo,
    /// A reset.
    Reset,
}

/// The device. Clones are the same one.
///
/// ```
/// use reference_vmm::vfio::{DeviceState, Double, Driver, Shape};
/// let device = Double::new("one", Shape { rest: 8, ..Shape::default() });
/// let mut data = device.set_state(DeviceState::StopCopy.raw())?.expect("a descriptor");
/// let mut state = [0; 16];
/// assert_eq!(data.read(&mut state)?, 8); // its length, 8
/// assert_eq!(data.read(&mut state)?, 0);
/// # Ok::<(), rustix::io::Errno>(())
/// ```
#[derive(Clone)]
pub struct Double(Arc<Mutex<Inner>>);

struct Inner {
    /// Tells its state from that of others.
    seed: u64,
    shape: Shape,
    state: DeviceState,
    /// The way it has come.
    way: Vec<DeviceState>,
    /// Which descriptor is good.
    session: u64,
    sent: u64,
    /// Bytes that can be read in PRE_COPY, and how many of them, up to there, are initial.
    precopy: u64,
    initial_end: u64,
    reinit: bool,
    tells_reinit: bool,
    /// What has been written, and its last bytes.
    loaded: u64,
    tail: u64,
    taken: Vec<u8>,
    /// Its state came from elsewhere, whole.
    arrived: bool,
    /// Calls that fail, and how often.
    faults: Vec<(Fault, Errno, u32)>,
    questions: u64,
    resets: u64,
}

const TRAILER: u64 = 8;

impl Double {
    /// A device that works. Another one takes its state if it has the same name.
    pub fn new(name: &str, shape: Shape) -> Double {
        let seed = name.bytes().fold(0_u64, |seed, byte| seed.wrapping_mul(257).wrapping_add(byte.into()));
        let shape = Shape { rest: shape.rest.max(TRAILER), ..shape };
        Double(Arc::new(Mutex::new(Inner {
            seed,
            shape,
            state: DeviceState::Running,
            way: vec![DeviceState::Running],
            session: 0,
            sent: 0,
            precopy: 0,
            initial_end: 0,
            reinit: false,
            tells_reinit: false,
            loaded: 0,
            tail: 0,
            taken: Vec::new(),
            arrived: false,
            faults: Vec::new(),
            questions: 0,
            resets: 0,
        })))
    }

    /// Lets a call fail the next `times` times.
    pub fn fail(&self, fault: Fault, errno: Errno, times: u32) {
        self.lock().faults.push((fault, errno, times));
    }

    /// Changes what it has to send when it has stopped.
    pub fn set_rest(&self, rest: u64) {
        self.lock().shape.rest = rest.max(TRAILER);
    }

    /// In PRE_COPY, its initial data begin anew.
    pub fn begin_anew(&self) {
        let mut inner = self.lock();
        if inner.state.is_precopy() {
            inner.precopy += inner.shape.initial;
            inner.initial_end = inner.precopy;
            inner.reinit = true;
        }
    }

    /// Its state came from elsewhere, whole, and was taken over.
    pub fn has_arrived(&self) -> bool {
        self.lock().arrived
    }

    /// What it took, if it [takes all](Shape::takes_all).
    pub fn taken(&self) -> Vec<u8> {
        self.lock().taken.clone()
    }

    /// The states that it was in, since the beginning.
    pub fn way(&self) -> Vec<DeviceState> {
        self.lock().way.clone()
    }

    /// How often it was asked MIG_DATA_SIZE.
    pub fn questions(&self) -> u64 {
        self.lock().questions
    }

    /// How often it was reset.
    pub fn resets(&self) -> u64 {
        self.lock().resets
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock()
    }
}

impl Inner {
    /// The errno if a call is to fail now.
    fn fault(&mut self, call: impl Fn(&Fault) -> bool) -> Option<(Fault, Errno)> {
        let (fault, errno, times) = self.faults.iter_mut().find(|(fault, _, times)| call(fault) && *times > 0)?;
        *times -= 1;
        Some((*fault, *errno))
    }

    fn check(&mut self, call: Fault) -> Result<(), Errno> {
        self.fault(|fault| *fault == call).map_or(Ok(()), |(_, errno)| Err(errno))
    }

    fn step(&mut self, to: DeviceState) -> Result<(), Errno> {
        let from = self.state;
        let here =
            |fault: &Fault| matches!(fault, Fault::Arc(a, b) | Fault::ArcIntoError(a, b) if (*a, *b) == (from, to));
        if let Some((fault, errno)) = self.fault(here) {
            if matches!(fault, Fault::ArcIntoError(..)) {
                self.enter(DeviceState::Error);
            }
            return Err(errno);
        }
        if from == DeviceState::Resuming {
            // Seen of a kernel: a state that is not whole is refused, and the device stays in RESUMING.
            if !self.shape.takes_all && self.loaded > 0 && (self.loaded < TRAILER || self.tail != self.loaded) {
                return Err(Errno::INVAL);
            }
            self.arrived = self.loaded > 0;
        }
        self.enter(to);
        Ok(())
    }

    fn enter(&mut self, to: DeviceState) {
        let Shape { initial, dirty, .. } = self.shape;
        let from = std::mem::replace(&mut self.state, to);
        self.way.push(to);
        match to {
            DeviceState::PreCopy if !from.is_precopy() => {
                (self.sent, self.precopy, self.initial_end, self.reinit) = (0, initial + dirty, initial, false);
            }
            DeviceState::PreCopyP2p if !from.is_precopy() => {
                (self.sent, self.precopy, self.initial_end, self.reinit) = (0, initial + dirty, initial, false);
            }
            DeviceState::StopCopy if !from.is_precopy() => {
                (self.sent, self.precopy, self.initial_end) = (0, 0, 0);
            }
            DeviceState::Resuming => (self.loaded, self.tail, self.taken) = (0, 0, Vec::new()),
            _ => {}
        }
        if !to.has_data() || !from.has_data() {
            self.session += 1;
        }
    }

    /// Bytes of the state up to the end of what can be read now.
    fn end(&self) -> u64 {
        match self.state {
            DeviceState::StopCopy => self.precopy + self.shape.rest,
            _ => self.precopy,
        }
    }

    /// A byte of the state; the last 8 are its length.
    fn byte(&self, at: u64) -> u8 {
        let total = self.precopy + self.shape.rest;
        match (at + TRAILER).checked_sub(total) {
            Some(place) if self.state == DeviceState::StopCopy => total.to_le_bytes()[place as usize % 8],
            _ => content(self.seed, at),
        }
    }
}

fn content(seed: u64, at: u64) -> u8 {
    ((at ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

impl Driver for Double {
    fn migration_flags(&self) -> Result<u64, Errno> {
        Ok(self.lock().shape.support.flags())
    }

    fn set_state(&self, state: u32) -> Result<Option<Box<dyn DataFile>>, Errno> {
        let mut inner = self.lock();
        let to = DeviceState::from_raw(state).ok_or(Errno::INVAL)?;
        let before = inner.session;
        while inner.state != to {
            let next = inner.shape.support.next(inner.state, to).ok_or(Errno::INVAL)?;
            inner.step(next)?;
        }
        let new = inner.session != before && to.has_data() && inner.shape.garbage != Some(Garbage::NoDescriptor);
        let session = inner.session;
        Ok(new.then(|| Box::new(Data { device: self.0.clone(), session }) as Box<dyn DataFile>))
    }

    fn state(&self) -> Result<u32, Errno> {
        let inner = self.lock();
        let unknown = inner.shape.garbage == Some(Garbage::UnknownState);
        Ok(if unknown { 0xdead } else { inner.state.raw() })
    }

    fn data_size(&self) -> Result<u64, Errno> {
        let mut inner = self.lock();
        inner.questions += 1;
        inner.check(Fault::DataSize)?;
        if inner.shape.garbage == Some(Garbage::EndlessSize) {
            return Ok(u64::MAX);
        }
        let Shape { initial, dirty, rest, .. } = inner.shape;
        Ok(match inner.state {
            state if state.is_precopy() => (inner.precopy - inner.sent) + rest,
            DeviceState::StopCopy => inner.end() - inner.sent,
            _ => initial + dirty + rest,
        })
    }

    fn tell_reinit(&self) -> Result<(), Errno> {
        self.lock().tells_reinit = true;
        Ok(())
    }

    fn reset(&self) -> Result<(), Errno> {
        let mut inner = self.lock();
        inner.check(Fault::Reset)?;
        inner.enter(DeviceState::Running);
        inner.session += 1;
        (inner.arrived, inner.loaded) = (false, 0);
        inner.resets += 1;
        Ok(())
    }
}

struct Data {
    device: Arc<Mutex<Inner>>,
    session: u64,
}

impl Data {
    fn device(&self) -> Result<MutexGuard<'_, Inner>, Errno> {
        Some(self.device.lock()).filter(|inner| inner.session == self.session).ok_or(Errno::NODEV)
    }
}

impl DataFile for Data {
    fn read(&mut self, into: &mut [u8]) -> Result<usize, Errno> {
        let mut inner = self.device()?;
        let state = inner.state;
        if state == DeviceState::Resuming {
            return Err(Errno::BADF);
        }
        inner.check(Fault::Read(state))?;
        match inner.shape.garbage {
            Some(Garbage::EndlessReads) => return Ok(into.len()),
            Some(Garbage::OverfullRead) => return Ok(into.len() + 1),
            _ => {}
        }
        let Shape { most, silent_drain, .. } = inner.shape;
        let most = if most == 0 { u64::MAX } else { most as u64 };
        let count = (inner.end() - inner.sent).min(into.len() as u64).min(most);
        if count == 0 && state.is_precopy() && !silent_drain {
            return Err(Errno::NOMSG);
        }
        for (at, byte) in (inner.sent..inner.sent + count).zip(into) {
            *byte = inner.byte(at);
        }
        inner.sent += count;
        Ok(count as usize)
    }

    fn write(&mut self, from: &[u8]) -> Result<usize, Errno> {
        let mut inner = self.device()?;
        if inner.state != DeviceState::Resuming {
            return Err(Errno::BADF);
        }
        inner.check(Fault::Write)?;
        if inner.shape.garbage == Some(Garbage::EmptyWrite) {
            return Ok(0);
        }
        let most = if inner.shape.most == 0 { from.len() } else { inner.shape.most };
        let taken = &from[..from.len().min(most)];
        if inner.shape.takes_all {
            inner.taken.extend_from_slice(taken);
            inner.loaded += taken.len() as u64;
            return Ok(taken.len());
        }
        // A byte is right when it is followed by enough others, for only the last 8 say something else.
        for byte in taken {
            let first = inner.tail as u8;
            if let Some(at) = inner.loaded.checked_sub(TRAILER)
                && first != content(inner.seed, at)
            {
                return Err(Errno::FAULT);
            }
            inner.tail = inner.tail >> 8 | u64::from(*byte) << 56;
            inner.loaded += 1;
        }
        Ok(taken.len())
    }

    fn precopy_info(&self) -> Result<PrecopyInfo, Errno> {
        let mut inner = self.device()?;
        if !inner.state.is_precopy() {
            return Err(Errno::INVAL);
        }
        inner.check(Fault::PrecopyInfo)?;
        match inner.shape.garbage {
            Some(Garbage::EndlessInitial) => {
                return Ok(PrecopyInfo { reinit: false, initial: u64::MAX, dirty: u64::MAX });
            }
            Some(Garbage::GrowingInitial) => {
                inner.precopy += 1 << 16;
                inner.initial_end = inner.precopy;
            }
            _ => {}
        }
        let initial = inner.initial_end.saturating_sub(inner.sent);
        let reinit = inner.tells_reinit && std::mem::take(&mut inner.reinit);
        Ok(PrecopyInfo { reinit, initial, dirty: inner.precopy - inner.sent - initial })
    }
}
