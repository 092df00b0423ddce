//! A double of a VFIO device with PRE_COPY: what QEMU's devices do in a migration, without hardware.

use crate::{DeviceSection, GuestError, IterativeDevice, Pending};
use parking_lot::{Mutex, MutexGuard};
use qevm_wire::CountedString;

/// What a [`VfioDevice`] has to send, and how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VfioShape {
    /// Bytes that the destination needs before it can agree to the switchover.
    pub initial: u64,
    /// Bytes that it can send besides while the guest runs.
    pub dirty: u64,
    /// Bytes that it can send only when the guest has stopped, which only an exact answer tells.
    pub stopcopy: u64,
    /// It takes part in capability `switchover-ack`.
    pub switchover_ack: bool,
    /// It sends the rest over page channels, where there are such.
    pub multifd_transfer: bool,
    /// It refuses this byte of its state at the destination.
    pub bad: Option<u64>,
}

/// A device that has the states of the kernel's VFIO devices, and insists on what may be done in each. Its state is a
/// sequence of bytes that tells whether it arrives whole and in order.
#[derive(Debug)]
pub struct VfioDevice {
    idstr: String,
    /// Tells its state from that of others.
    seed: u64,
    shape: VfioShape,
    state: Mutex<State>,
}

/// The kernel's states, as far as they matter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum DeviceState {
    #[default]
    Running,
    PreCopy,
    StopCopy,
    Resuming,
}

#[derive(Debug, Default)]
struct State {
    is: DeviceState,
    /// Bytes that are sent, and that may be sent while the guest runs.
    sent: u64,
    precopy: u64,
    /// Bytes that have arrived.
    loaded: u64,
    /// How many pieces they were.
    pieces: u64,
    configured: bool,
    stopped: bool,
}

/// The length of a PCIe device's configuration space, which is most of its configuration.
const CONFIGURATION: u64 = 4096;

impl VfioDevice {
    /// A device at this path on its bus, for example `0000:00:04.0`.
    pub fn new(path: &str, shape: VfioShape) -> Self {
        let seed = path.bytes().fold(0_u64, |seed, byte| seed.wrapping_mul(257).wrapping_add(byte.into()));
        VfioDevice { idstr: format!("{path}/vfio"), seed, shape, state: Mutex::default() }
    }

    /// The guest has stopped: what is left may be sent.
    pub fn stop(&self) {
        let mut state = self.lock();
        if state.is == DeviceState::PreCopy {
            state.is = DeviceState::StopCopy;
        }
        state.stopped = true;
    }

    /// The section with its configuration.
    ///
    /// # Errors
    /// The guest runs.
    pub fn save(&self) -> Result<DeviceSection, GuestError> {
        self.expect(DeviceState::StopCopy)?;
        let idstr = CountedString::new(&*self.idstr).ok_or("the name is too long")?;
        let body = (0..CONFIGURATION).map(|at| self.byte(!at)).collect();
        Ok(DeviceSection { idstr, instance_id: 0, version_id: 1, body })
    }

    /// Takes the configuration over. All of the state must be there before.
    ///
    /// # Errors
    /// It is not; or the configuration is not the one of this device.
    pub fn load_configuration(&self, section: &DeviceSection) -> Result<(), GuestError> {
        let expected: Vec<_> = (0..CONFIGURATION).map(|at| self.byte(!at)).collect();
        if section.body != expected {
            return Err(format!("the configuration of {} is not its own", self.idstr).into());
        }
        let VfioShape { initial, dirty, stopcopy, .. } = self.shape;
        let mut state = self.lock();
        if state.loaded != initial + dirty + stopcopy {
            return Err(format!("{} is configured after {} bytes of its state", self.idstr, state.loaded).into());
        }
        state.configured = true;
        Ok(())
    }

    /// Whether all of its state and its configuration have arrived.
    pub fn has_arrived(&self) -> bool {
        self.lock().configured
    }

    /// Whether its initial data have arrived.
    pub fn has_initial_data(&self) -> bool {
        self.lock().loaded >= self.shape.initial
    }

    /// How many pieces have arrived.
    pub fn pieces(&self) -> u64 {
        self.lock().pieces
    }

    fn expect(&self, expected: DeviceState) -> Result<(), GuestError> {
        let found = self.lock().is;
        if found == expected { Ok(()) } else { Err(format!("{} is {found:?}, not {expected:?}", self.idstr).into()) }
    }

    /// A byte of its state, which depends on its place and on the device.
    fn byte(&self, at: u64) -> u8 {
        ((at ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl IterativeDevice for VfioDevice {
    fn idstr(&self) -> &str {
        &self.idstr
    }

    fn switchover_ack(&self) -> bool {
        self.shape.switchover_ack
    }

    fn multifd_transfer(&self) -> bool {
        self.shape.multifd_transfer
    }

    fn initial(&self) -> u64 {
        self.shape.initial.saturating_sub(self.lock().sent)
    }

    fn begin(&self) -> Result<(), GuestError> {
        let precopy = self.shape.initial + self.shape.dirty;
        let mut state = self.lock();
        let is = if state.stopped { DeviceState::StopCopy } else { DeviceState::PreCopy };
        *state = State { is, precopy, stopped: state.stopped, ..State::default() };
        Ok(())
    }

    fn estimate(&self) -> Pending {
        let state = self.lock();
        Pending { precopy: state.precopy.saturating_sub(state.sent), stopcopy: 0 }
    }

    fn exact(&self) -> Result<Pending, GuestError> {
        Ok(Pending { stopcopy: self.shape.stopcopy, ..self.estimate() })
    }

    fn read(&self, into: &mut Vec<u8>, limit: usize) -> Result<(), GuestError> {
        let mut state = self.lock();
        let end = match state.is {
            DeviceState::PreCopy => state.precopy,
            DeviceState::StopCopy => state.precopy + self.shape.stopcopy,
            other => return Err(format!("{} is read while it is {other:?}", self.idstr).into()),
        };
        let until = end.min(state.sent + limit as u64);
        into.extend((state.sent..until).map(|at| self.byte(at)));
        state.sent = until;
        Ok(())
    }

    fn load(&self, piece: &[u8]) -> Result<(), GuestError> {
        let mut state = self.lock();
        if state.configured || !matches!(state.is, DeviceState::Running | DeviceState::Resuming) {
            return Err(format!("{} is loaded while it is {:?}", self.idstr, state.is).into());
        }
        state.is = DeviceState::Resuming;
        for (at, byte) in (state.loaded..).zip(piece) {
            if *byte != self.byte(at) || self.shape.bad == Some(at) {
                return Err(format!("{} does not like byte {at} of its state", self.idstr).into());
            }
        }
        state.loaded += piece.len() as u64;
        state.pieces += 1;
        Ok(())
    }

    fn end(&self) {
        self.lock().is = DeviceState::Running;
    }
}
