//! A 16550A serial port (National Semiconductor PC16550D data sheet), with the state that QEMU's section `serial`
//! carries.

//!
//! Output that is not read never holds the guest up: it fills a buffer, and then the transmitter is busy (`THRE` and
//! `TEMT` are clear) until there is room again, as on QEMU's port. What a guest writes all the same is lost, and
//! counted in the log.

use crate::error::{Error, Result};
use crate::non_blocking::NonBlockingWriter;
use parking_lot::Mutex;
use qevm_microvm::state::SerialState;
use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

const DATA: u8 = 0;
const IER: u8 = 1;
const IIR_FCR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const MSR: u8 = 6;
const SCR: u8 = 7;

const IER_DATA: u8 = 1 << 0;
const IER_THR_EMPTY: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;
const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_THR_EMPTY: u8 = 0x02;
const IIR_DATA: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_ID: u8 = 0x0f;
const IIR_FIFO: u8 = 0xc0;
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVE: u8 = 1 << 1;
/// Bits that read back: enable, DMA mode, trigger level.
const FCR_KEPT: u8 = 0xc9;
const LCR_DIVISOR: u8 = 1 << 7;
const MCR_LOOP: u8 = 1 << 4;
const MCR_MASK: u8 = 0x1f;
const LSR_DATA: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_ERRORS: u8 = 0x1e;
const LSR_IDLE: u8 = 0x60;
const MSR_CONNECTED: u8 = 0xb0;
const MSR_DELTAS: u8 = 0x0f;
/// Depth of the FIFOs. An empty transmitter takes that much without a look at it.
const FIFO: usize = 16;
/// Bytes of output that wait for a slow reader.
const OUTPUT: usize = 64 << 10;
/// 9600 baud, as QEMU's port starts.
const RESET_DIVIDER: u16 = 0x0c;

/// The port. Bytes written leave at once, so its transmitter is empty unless its output is not read.
pub struct Serial {
    state: SerialState,
    receive: VecDeque<u8>,
    output: NonBlockingWriter,
    /// The transmitter is busy: the output has no room for a FIFO of bytes.
    busy: bool,
    /// Bytes that were written to a busy transmitter, since it became busy.
    lost: u64,
    /// The machine runs: what the guest sees of the port may change.
    running: bool,
    interrupt: Box<dyn FnMut(bool) + Send>,
    level: bool,
}

impl Serial {
    /// A port after reset. `interrupt` is told each change of the interrupt line.
    ///
    /// # Errors
    /// [`Error::Host`] when the host has no thread for the output.
    pub fn start(output: Box<dyn Write + Send>, interrupt: Box<dyn FnMut(bool) + Send>) -> Result<Arc<Mutex<Serial>>> {
        let port: Arc<OnceLock<Weak<Mutex<Serial>>>> = Arc::default();
        let told = Arc::clone(&port);
        let room = move || {
            if let Some(port) = told.get().and_then(Weak::upgrade) {
                port.lock().transmit();
            }
        };
        let failed = |error| tracing::warn!(%error, "serial output is lost");
        let output = NonBlockingWriter::start(OUTPUT, output, failed, room)
            .map_err(|cause| Error::Host { what: "start the thread of the serial port", cause })?;
        let state = SerialState {
            divider: RESET_DIVIDER,
            iir: IIR_NONE,
            mcr: 0x08,
            lsr: LSR_IDLE,
            msr: MSR_CONNECTED,
            ..SerialState::default()
        };
        let (busy, lost, running, level) = (false, 0, false, false);
        let serial = Serial { state, receive: VecDeque::new(), output, busy, lost, running, interrupt, level };
        let serial = Arc::new(Mutex::new(serial));
        port.get_or_init(|| Arc::downgrade(&serial));
        Ok(serial)
    }

    /// The machine runs, or stops.
    pub(crate) fn run(&mut self, running: bool) {
        self.running = running;
        self.transmit();
    }

    /// The transmitter becomes empty if there is room again. The state of a paused machine stays as it is.
    fn transmit(&mut self) {
        if self.busy && self.running && self.output.room(FIFO) >= FIFO {
            self.busy = false;
            if self.lost > 0 {
                tracing::warn!(bytes = self.lost, "the guest did not wait for its serial port, and output is lost");
            }
            self.state.thr_ipending = true;
            self.update();
        }
    }

    /// A read of register 0 to 7.
    pub fn read(&mut self, register: u8) -> u8 {
        let [high, low] = self.state.divider.to_be_bytes();
        let divisor = self.state.lcr & LCR_DIVISOR != 0;
        match register {
            DATA if divisor => low,
            IER if divisor => high,
            DATA => {
                if let Some(byte) = self.receive.pop_front() {
                    self.state.rbr = byte;
                }
                if self.receive.is_empty() {
                    self.state.lsr &= !LSR_DATA;
                }
                self.update();
                self.state.rbr
            }
            IER => self.state.ier,
            IIR_FCR => {
                let iir = self.state.iir;
                if iir & IIR_ID == IIR_THR_EMPTY {
                    self.state.thr_ipending = false;
                    self.update();
                }
                iir
            }
            LCR => self.state.lcr,
            MCR => self.state.mcr,
            LSR => {
                let lsr = self.state.lsr;
                self.state.lsr &= !LSR_ERRORS;
                self.update();
                if self.busy { lsr & !LSR_IDLE } else { lsr }
            }
            MSR if self.state.mcr & MCR_LOOP != 0 => {
                let mcr = self.state.mcr;
                (mcr & 0x0c) << 4 | (mcr & 0x02) << 3 | (mcr & 0x01) << 5
            }
            MSR => {
                let msr = self.state.msr;
                self.state.msr &= !MSR_DELTAS;
                self.update();
                msr
            }
            _ => self.state.scr,
        }
    }

    /// A write to register 0 to 7.
    pub fn write(&mut self, register: u8, value: u8) {
        let divisor = self.state.lcr & LCR_DIVISOR != 0;
        match register {
            DATA if divisor => self.state.divider = self.state.divider & 0xff00 | u16::from(value),
            IER if divisor => self.state.divider = self.state.divider & 0x00ff | u16::from(value) << 8,
            DATA => {
                if self.state.mcr & MCR_LOOP != 0 {
                    self.input(&[value]);
                } else {
                    self.lost = if self.busy { self.lost } else { 0 };
                    self.lost += u64::from(self.output.write(&[value]) == 0);
                    self.busy = self.output.room(FIFO) < FIFO;
                }
                self.state.thr_ipending = !self.busy;
            }
            IER => {
                let newly = value & !self.state.ier;
                self.state.ier = value & 0x0f;
                if newly & IER_THR_EMPTY != 0 {
                    self.state.thr_ipending = true;
                }
            }
            IIR_FCR => {
                if value & FCR_CLEAR_RECEIVE != 0 || (value ^ self.state.fcr) & FCR_ENABLE != 0 {
                    self.receive.clear();
                    self.state.lsr &= !LSR_DATA;
                }
                self.state.fcr = if value & FCR_ENABLE != 0 { value & FCR_KEPT } else { 0 };
            }
            LCR => self.state.lcr = value,
            MCR => self.state.mcr = value & MCR_MASK,
            SCR => self.state.scr = value,
            _ => {}
        }
        self.update();
    }

    /// Bytes arrive from outside. What the FIFO has no room for is lost, as on a real line; the count taken is
    /// returned.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let room = if self.state.fcr & FCR_ENABLE != 0 { FIFO } else { 1 };
        let taken = bytes.len().min(room.saturating_sub(self.receive.len()));
        self.receive.extend(&bytes[..taken]);
        if taken < bytes.len() {
            self.state.lsr |= LSR_OVERRUN;
        }
        if !self.receive.is_empty() {
            self.state.lsr |= LSR_DATA;
        }
        self.update();
        taken
    }

    /// Waits until the output is written, but not long: a reader that does not read is not waited for.
    pub(crate) fn flush(serial: &Mutex<Serial>) {
        const PATIENCE: Duration = Duration::from_millis(150);
        let output = serial.lock().output.clone();
        output.flush(PATIENCE);
    }

    /// Registers and FIFO. What waits for a slow reader here has been sent as far as the guest is concerned.
    pub fn save(&self) -> SerialState {
        let mut state = SerialState { recv_fifo: self.receive.iter().copied().collect(), ..self.state.clone() };
        if self.busy {
            state.thr_ipending = true;
            state.iir = identification(&state);
        }
        state
    }

    /// Takes over registers and FIFO, and sends what waits to be sent; bytes beyond the FIFO's depth are dropped.
    pub fn load(&mut self, state: &SerialState) {
        self.receive = state.recv_fifo.iter().copied().take(FIFO).collect();
        self.state = SerialState { recv_fifo: Vec::new(), unsent: Vec::new(), ..state.clone() };
        self.output.write(&state.unsent);
        if self.state.lsr & LSR_IDLE != LSR_IDLE {
            self.state.lsr |= LSR_IDLE;
            self.state.thr_ipending = true;
        }
        (self.level, self.busy) = (false, false);
        self.update();
    }

    fn update(&mut self) {
        self.state.iir = identification(&self.state);
        let level = self.state.iir & IIR_ID != IIR_NONE;
        if level != self.level {
            self.level = level;
            (self.interrupt)(level);
        }
    }
}

/// The interrupt identification register: the most urgent of what is pending and enabled.
fn identification(state: &SerialState) -> u8 {
    let pending = if state.ier & IER_LINE != 0 && state.lsr & LSR_ERRORS != 0 {
        IIR_LINE
    } else if state.ier & IER_DATA != 0 && state.lsr & LSR_DATA != 0 {
        IIR_DATA
    } else if state.ier & IER_THR_EMPTY != 0 && state.thr_ipending {
        IIR_THR_EMPTY
    } else if state.ier & IER_MODEM != 0 && state.msr & MSR_DELTAS != 0 {
        IIR_MODEM
    } else {
        IIR_NONE
    };
    let fifo = if state.fcr & FCR_ENABLE != 0 { IIR_FIFO } else { 0 };
    pending | fifo
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    struct Pipe(Sender<u8>);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            bytes.iter().for_each(|byte| self.0.send(*byte).unwrap());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// The port, what it writes, and its interrupt line.
    fn port() -> (Arc<Mutex<Serial>>, Receiver<u8>, Receiver<bool>) {
        let (bytes, out) = channel();
        let (port, line) = port_on(Box::new(Pipe(bytes)));
        (port, out, line)
    }

    fn port_on(output: Box<dyn Write + Send>) -> (Arc<Mutex<Serial>>, Receiver<bool>) {
        let (levels, line) = channel();
        let port = Serial::start(output, Box::new(move |level| levels.send(level).unwrap_or_default())).unwrap();
        port.lock().run(true);
        (port, line)
    }

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn bytes_leave_and_the_transmitter_is_empty() {
        let (port, out, line) = port();
        let mut port = port.lock();
        assert_eq!(port.read(LSR), 0x60);
        for byte in *b"ok" {
            port.write(DATA, byte);
        }
        assert!(port.output.flush(PATIENCE));
        assert_eq!(out.try_iter().collect::<Vec<_>>(), b"ok");
        assert_eq!(line.try_iter().count(), 0, "no interrupt was enabled");
    }

    #[test]
    fn the_divisor_latch_hides_data_and_ier() {
        let (port, out, _line) = port();
        let mut port = port.lock();
        port.write(LCR, 0x83);
        port.write(DATA, 1);
        port.write(IER, 2);
        assert_eq!((port.read(DATA), port.read(IER)), (1, 2));
        port.write(LCR, 0x03);
        assert_eq!(port.read(IER), 0);
        assert_eq!(port.save().divider, 0x0201);
        assert!(out.try_recv().is_err());
    }

    #[test]
    fn transmit_interrupt_is_taken_by_reading_iir() {
        let (port, _out, line) = port();
        let mut port = port.lock();
        port.write(IER, IER_THR_EMPTY);
        assert_eq!(line.try_recv(), Ok(true));
        assert_eq!(port.read(IIR_FCR), IIR_THR_EMPTY);
        assert_eq!(line.try_recv(), Ok(false));
        assert_eq!(port.read(IIR_FCR), IIR_NONE);
        port.write(DATA, b'x');
        assert_eq!(line.try_recv(), Ok(true));
    }

    #[test]
    fn received_bytes_queue_overflow_and_migrate() {
        let (port, _out, line) = port();
        let mut port = port.lock();
        port.write(IIR_FCR, FCR_ENABLE);
        port.write(IER, IER_DATA);
        assert_eq!(port.input(&[7; 20]), 16);
        assert_eq!(line.try_recv(), Ok(true));
        assert_eq!(port.read(IIR_FCR), IIR_DATA | IIR_FIFO);
        assert_eq!(port.read(LSR), 0x60 | LSR_DATA | LSR_OVERRUN);
        port.read(DATA);
        let state = port.save();
        assert_eq!(state.recv_fifo, [7; 15]);
        let (other, _out, line) = self::port();
        let mut other = other.lock();
        other.load(&state);
        assert_eq!(line.try_recv(), Ok(true), "a pending interrupt is raised again");
        (0..15).for_each(|_| assert_eq!(other.read(DATA), 7));
        assert_eq!(other.read(LSR) & LSR_DATA, 0);
        assert_eq!(line.try_recv(), Ok(false));
    }

    #[test]
    fn loopback_comes_back() {
        let (port, out, _line) = port();
        let mut port = port.lock();
        port.write(MCR, MCR_LOOP | 0x0b);
        port.write(DATA, 0x55);
        assert!(out.try_recv().is_err());
        assert_eq!(port.read(DATA), 0x55);
        assert_eq!(port.read(MSR), 0xb0);
    }

    /// As QEMU's port on a pipe: it is busy until it is read.
    #[test]
    fn a_pipe_that_is_not_read_makes_the_transmitter_busy() {
        let (mut reader, pipe) = std::io::pipe().unwrap();
        let (port, line) = port_on(Box::new(pipe));
        port.lock().write(IER, IER_THR_EMPTY);
        let mut written = 0;
        while port.lock().read(LSR) & LSR_IDLE == LSR_IDLE {
            (0..FIFO).for_each(|_| port.lock().write(DATA, b'a'));
            written += FIFO;
            assert!(written < 1 << 20, "no end of it");
        }
        // The thread may just be taking what is in the buffer; whatever it takes the pipe does not.
        while written <= (64 << 10) + 2 * OUTPUT {
            port.lock().write(DATA, b'a');
            written += 1;
        }
        assert_eq!(port.lock().read(IIR_FCR) & IIR_ID, IIR_NONE, "nothing to tell while it is busy");
        assert!(port.lock().lost > 0);
        let saved = port.lock().save();
        assert_eq!(
            (saved.lsr, saved.iir, saved.thr_ipending),
            (LSR_IDLE, IIR_THR_EMPTY, true),
            "it has left the guest"
        );
        // What a paused guest sees does not change, and what comes then is told when it goes on.
        port.lock().run(false);
        let mut bytes = [0; 64 << 10];
        while port.lock().output.room(0) < OUTPUT {
            std::io::Read::read(&mut reader, &mut bytes).unwrap();
        }
        assert_eq!(port.lock().read(LSR) & LSR_IDLE, 0);
        while line.try_recv().is_ok() {}
        port.lock().run(true);
        assert_eq!((port.lock().read(LSR) & LSR_IDLE, line.try_recv()), (LSR_IDLE, Ok(true)));
    }
}
