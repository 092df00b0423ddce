//! Section `serial`: a 16550A.

use qevm_savevm::vmstate::{Buffer, Timer, VmState};

/// An ISA serial port, section `serial` version 3: a frame around the UART. (`docs/format/microvm-devices.md`, serial)
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "serial", version = 3, minimum_version = 2)]
pub struct IsaSerial {
    /// The UART.
    pub state: Uart,
}

/// A UART, structure `serial` inside the section of the same name. Its subsections follow its fields.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "serial", version = 3, minimum_version = 2)]
pub struct Uart {
    /// Baud rate divisor.
    #[vmstate(since = 2)]
    pub divider: u16,
    /// Receive buffer.
    pub rbr: u8,
    /// Interrupt enable.
    pub ier: u8,
    /// Interrupt identification.
    pub iir: u8,
    /// Line control.
    pub lcr: u8,
    /// Modem control.
    pub mcr: u8,
    /// Line status.
    pub lsr: u8,
    /// Modem status.
    pub msr: u8,
    /// Scratch.
    pub scr: u8,
    /// FIFO control.
    #[vmstate(name = "fcr_vmstate", since = 3)]
    pub fcr: u8,
    /// Subsection `serial/thr_ipending`; sent when it is not what `ier` and `iir` imply.
    #[vmstate(subsection, needed = |uart, _| uart.thr_ipending_is_needed())]
    pub thr_ipending: Option<ThrIpending>,
    /// Subsection `serial/tsr`.
    #[vmstate(subsection)]
    pub tsr: Option<Tsr>,
    /// Subsection `serial/recv_fifo`.
    #[vmstate(subsection)]
    pub recv_fifo: Option<RecvFifo>,
    /// Subsection `serial/xmit_fifo`.
    #[vmstate(subsection)]
    pub xmit_fifo: Option<XmitFifo>,
    /// Subsection `serial/fifo_timeout_timer`.
    #[vmstate(subsection)]
    pub fifo_timeout_timer: Option<FifoTimeoutTimer>,
    /// Subsection `serial/timeout_ipending`.
    #[vmstate(subsection)]
    pub timeout_ipending: Option<TimeoutIpending>,
    /// Subsection `serial/poll`.
    #[vmstate(subsection)]
    pub poll: Option<Poll>,
}

/// IER bit: interrupt when the transmit holding register is empty (16550 data sheet).
const IER_THRI: u8 = 0x02;
/// IIR: the identification bits, and their value for that interrupt.
const IIR_ID: u8 = 0x06;
const IIR_THRI: u8 = 0x02;

impl Uart {
    /// Whether a transmit interrupt is pending: what `serial/thr_ipending` says, or else what `iir` shows.
    pub fn transmit_interrupt_pending(&self) -> bool {
        self.thr_ipending.as_ref().map_or(self.iir & IIR_ID == IIR_THRI, |sub| sub.thr_ipending != 0)
    }

    fn thr_ipending_is_needed(&self) -> bool {
        let shown = self.iir & IIR_ID == IIR_THRI;
        self.ier & IER_THRI != 0 && self.transmit_interrupt_pending() != shown
    }
}

/// Subsection `serial/thr_ipending`.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "serial/thr_ipending", version = 1)]
pub struct ThrIpending {
    /// Not 0: a transmit interrupt is pending.
    pub thr_ipending: i32,
}

/// Subsection `serial/tsr`: a byte that the backend did not take yet.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "serial/tsr", version = 1, needed = |tsr, _| tsr.tsr_retry != 0)]
pub struct Tsr {
    /// How often it was tried.
    pub tsr_retry: u32,
    /// Transmit holding register.
    pub thr: u8,
    /// Transmit shift register.
    pub tsr: u8,
}

/// Structure `Fifo8` with the UART's capacity of 16 bytes.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "Fifo8", version = 1)]
pub struct Fifo16 {
    /// The ring.
    #[vmstate(since = 1)]
    pub data: Buffer<16>,
    /// Where the first byte is.
    pub head: u32,
    /// How many bytes are in it.
    pub num: u32,
}

impl Fifo16 {
    /// The bytes in the FIFO, first in first.
    pub fn bytes(&self) -> impl Iterator<Item = u8> {
        let num = self.num.min(16) as usize;
        (0..num).map(|i| self.data[(self.head as usize % 16 + i) % 16])
    }
}

/// Subsection `serial/recv_fifo`: sent when there are bytes in it.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "serial/recv_fifo", version = 1, needed = |sub, _| sub.recv_fifo.num != 0)]
pub struct RecvFifo {
    /// The receive FIFO.
    #[vmstate(since = 1)]
    pub recv_fifo: Fifo16,
}

/// Subsection `serial/xmit_fifo`: sent when there are bytes in it.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "serial/xmit_fifo", version = 1, needed = |sub, _| sub.xmit_fifo.num != 0)]
pub struct XmitFifo {
    /// The transmit FIFO.
    #[vmstate(since = 1)]
    pub xmit_fifo: Fifo16,
}

/// Subsection `serial/fifo_timeout_timer`: sent while the character timeout runs.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(
    name = "serial/fifo_timeout_timer",
    version = 1,
    needed = |sub, _| sub.fifo_timeout_timer.expires().is_some()
)]
pub struct FifoTimeoutTimer {
    /// When it fires.
    pub fifo_timeout_timer: Timer,
}

/// Subsection `serial/timeout_ipending`: a character timeout interrupt is pending.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "serial/timeout_ipending", version = 1, needed = |sub, _| sub.timeout_ipending != 0)]
pub struct TimeoutIpending {
    /// Not 0: pending.
    pub timeout_ipending: i32,
}

/// Subsection `serial/poll`: sent when the modem status of a real line is polled.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "serial/poll", version = 1, needed = |sub, _| sub.poll_msl >= 0)]
pub struct Poll {
    /// -1 never, 0 not now, 1 polling.
    pub poll_msl: i32,
    /// When it is polled next.
    pub modem_status_poll: Timer,
}
