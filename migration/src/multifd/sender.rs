//! A thread that sends pages on one channel.

use super::queue::{Batch, Counts, Work};
use super::{Queue, Settings, Transfers};
use crate::channel::{MAX_PARTS, WriteSlice, use_up, write_all};
use crate::zero::is_zero;
use crate::{Channel, Guest, MigrationError, PAGE_SIZE, RamView};
use qevm_multifd::{ChannelEncoder, Compression, Compressor, Init, Pages, Runs, Uuid};
use qevm_wire::profile::ZeroPageDetection;
use qevm_wire::{CountedString, PageGeometry, Writer};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{Bytes, VolatileSlice};

/// Sends what `queue` has for channel `number`, until it ends. A failure ends the queue for all channels.
pub(crate) fn send_pages(
    guest: &dyn Guest,
    channel: &dyn Channel,
    number: u8,
    settings: &Settings,
    queue: &Queue,
    transfers: &Transfers<'_>,
    packets: &AtomicU64,
) {
    let sender = Sender::new(guest, channel, settings, packets);
    if let Err(error) = sender.and_then(|mut sender| sender.run(number, queue, transfers)) {
        queue.fail(error);
    }
}

struct Sender<'s> {
    blocks: Vec<(CountedString, RamView<'s>)>,
    channel: &'s dyn Channel,
    encoder: ChannelEncoder,
    compressor: Option<Compressor>,
    zero_pages: ZeroPageDetection,
    greeted: bool,
    uuid: Uuid,
    /// Numbers the packets of all channels.
    packets: &'s AtomicU64,
    header: Writer,
    payload: Vec<u8>,
    /// Pages are sent in place.
    in_place: Option<InPlace>,
}

/// Calls that sent pages in place since the last synchronisation.
#[derive(Debug, Default)]
struct InPlace {
    made: u32,
    done: u32,
    /// The kernel did not copy the pages of one of them.
    avoided: bool,
}

impl InPlace {
    /// Writes all of `parts`. What the kernel holds in place of other pages may have to go first.
    fn write_all(&mut self, channel: &dyn Channel, mut parts: &mut [WriteSlice<'_>]) -> Result<(), MigrationError> {
        let failed = |source| MigrationError::Send { doing: "pages on a page channel", source };
        while !parts.is_empty() {
            if parts[0].is_empty() {
                parts = &mut parts[1..];
                continue;
            }
            match channel.write_in_place(&parts[..parts.len().min(MAX_PARTS)]) {
                Ok(0) => return Err(failed(io::ErrorKind::WriteZero.into())),
                Ok(written) => {
                    self.made += 1;
                    parts = use_up(parts, written);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => match self.made == self.done {
                    true => return Err(MigrationError::LockedMemory { source: error }),
                    false => self.wait(channel)?,
                },
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }

    fn wait(&mut self, channel: &dyn Channel) -> Result<(), MigrationError> {
        match channel.sent_in_place() {
            Ok((count, copied)) => {
                self.done = self.done.saturating_add(count).min(self.made);
                self.avoided |= !copied;
                Ok(())
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
            Err(source) => Err(MigrationError::Send { doing: "pages that a page channel sends in place", source }),
        }
    }

    /// Waits until the kernel is done with all pages: how many synchronisations came after copies alone.
    fn finish(&mut self, channel: &dyn Channel) -> Result<u64, MigrationError> {
        while self.done < self.made {
            self.wait(channel)?;
        }
        let InPlace { made, avoided, .. } = std::mem::take(self);
        Ok(u64::from(made > 0 && !avoided))
    }
}

const PAGE: usize = PAGE_SIZE as usize;

impl<'s> Sender<'s> {
    fn new(
        guest: &'s dyn Guest,
        channel: &'s dyn Channel,
        settings: &Settings,
        packets: &'s AtomicU64,
    ) -> Result<Self, MigrationError> {
        let compressor = match settings.compression {
            Compression::None => None,
            method => Some(Compressor::new(method, settings.level)?),
        };
        let name = |view: RamView<'s>| {
            let name = CountedString::new(view.name).ok_or_else(|| MigrationError::Guest {
                doing: "name a RAM block",
                source: format!("'{}' is not 1 to 255 bytes long", view.name).into(),
            });
            name.map(|name| (name, view))
        };
        Ok(Sender {
            blocks: guest.ram().into_iter().map(name).collect::<Result<_, _>>()?,
            channel,
            encoder: ChannelEncoder::new(settings.encoder()),
            compressor,
            zero_pages: settings.zero_pages,
            greeted: settings.greeted,
            uuid: settings.uuid,
            packets,
            header: Writer::new(),
            payload: Vec::new(),
            in_place: settings.zero_copy.then(InPlace::default),
        })
    }

    fn run(&mut self, number: u8, queue: &Queue, transfers: &Transfers<'_>) -> Result<(), MigrationError> {
        self.encoder.init(&Init::new(self.uuid, number), &mut self.header)?;
        if self.greeted {
            queue.sent(Counts { bytes: self.header.as_bytes().len() as u64, ..Counts::default() });
            self.header.clear();
        } else {
            queue.sent(self.write(&[])?);
        }
        let mut synced = 0;
        loop {
            match queue.next(synced) {
                Work::Pages(batch) => queue.sent(self.batch(&batch)?),
                Work::Sync => {
                    self.encoder.sync(self.packets.fetch_add(1, Ordering::Relaxed), &mut self.header)?;
                    queue.sent(self.write(&[])?);
                    if let Some(in_place) = &mut self.in_place {
                        let copied = in_place.finish(self.channel)?;
                        queue.sent(Counts { copied, ..Counts::default() });
                    }
                    synced += 1;
                    queue.synced();
                }
                Work::Transfer(transfer) => {
                    let last = self.piece(transfer, queue, transfers)?;
                    queue.transferred(transfer, last);
                }
                Work::End => return Ok(()),
            }
        }
    }

    fn batch(&mut self, batch: &Batch) -> Result<Counts, MigrationError> {
        let Some((name, view)) = self.blocks.get(batch.block).cloned() else { return Ok(Counts::default()) };
        let (zero, normal): (Vec<u64>, Vec<u64>) = match self.zero_pages {
            ZeroPageDetection::Multifd => {
                let page = |offset| part(&view, offset, PAGE as u64);
                let is_zero = |offset: &u64| page(*offset).map(|page| (is_zero(&page), *offset));
                let sorted = batch.pages.iter().map(is_zero).collect::<Result<Vec<_>, _>>()?;
                let of = |zero| sorted.iter().filter(move |page| page.0 == zero).map(|page| page.1).collect();
                (of(true), of(false))
            }
            _ => (Vec::new(), batch.pages.clone()),
        };
        let runs = Runs::new(normal.iter().copied(), PageGeometry::X86);
        let runs = runs.map(|run| part(&view, run.offset, run.len)).collect::<Result<Vec<_>, _>>()?;
        let len = self.compress(&runs)?.unwrap_or((normal.len() * PAGE) as u64);
        let packet_num = self.packets.fetch_add(1, Ordering::Relaxed);
        let pages = Pages { block: &name, normal: &normal, zero: &zero, packet_num };
        self.encoder.pages(&pages, len, &mut self.header)?;
        let counts = self.write(&runs)?;
        Ok(Counts { normal: normal.len() as u64, zero: zero.len() as u64, ..counts })
    }

    /// Sends the next piece of a device's state, and says whether there is none after it.
    fn piece(&mut self, transfer: usize, queue: &Queue, transfers: &Transfers<'_>) -> Result<bool, MigrationError> {
        let Some(piece) = transfers.next(transfer, std::mem::take(&mut self.payload))? else { return Ok(true) };
        self.encoder.device_state(&piece.packet, &mut self.header)?;
        let mut parts = [self.header.as_bytes(), &piece.header, &piece.content].map(WriteSlice::bytes);
        let bytes = parts.iter().map(|part| part.len() as u64).sum();
        write_all(self.channel, &mut parts)
            .map_err(|source| MigrationError::Send { doing: "the state of a device on a page channel", source })?;
        self.header.clear();
        queue.sent(Counts { bytes, ..Counts::default() });
        self.payload = piece.content;
        Ok(piece.last)
    }

    /// Compresses pages into `payload`, from a copy: the guest may be writing to them. `None` without a method.
    fn compress(&mut self, runs: &[VolatileSlice<'_>]) -> Result<Option<u64>, MigrationError> {
        let Some(compressor) = &mut self.compressor else { return Ok(None) };
        self.payload.clear();
        let mut copy = [0; PAGE];
        let mut left = runs.iter().map(|run| run.len() / PAGE).sum::<usize>();
        for run in runs {
            for at in (0..run.len()).step_by(PAGE) {
                run.read_slice(&mut copy, at)
                    .map_err(|error| MigrationError::Guest { doing: "read guest memory", source: error.into() })?;
                left -= 1;
                compressor.page(&copy, left == 0, &mut self.payload)?;
            }
        }
        Ok(Some(self.payload.len() as u64))
    }

    /// Writes the header and what belongs after it.
    fn write(&mut self, runs: &[VolatileSlice<'_>]) -> Result<Counts, MigrationError> {
        let mut parts = vec![WriteSlice::bytes(self.header.as_bytes())];
        match &self.compressor {
            Some(_) if !runs.is_empty() => parts.push(WriteSlice::bytes(&self.payload)),
            _ => parts.extend(runs.iter().map(WriteSlice::guest)),
        }
        let bytes = parts.iter().map(|part| part.len() as u64).sum();
        // The header is gone before the kernel sends what it has in place: it is copied.
        let in_place = self.in_place.as_mut().filter(|_| !runs.is_empty());
        let copied = if in_place.is_some() { 1 } else { parts.len() };
        let (now, later) = parts.split_at_mut(copied);
        write_all(self.channel, now)
            .map_err(|source| MigrationError::Send { doing: "pages on a page channel", source })?;
        if let Some(in_place) = in_place {
            in_place.write_all(self.channel, later)?;
        }
        self.header.clear();
        Ok(Counts { bytes, ..Counts::default() })
    }
}

fn part<'g>(view: &RamView<'g>, offset: u64, len: u64) -> Result<VolatileSlice<'g>, MigrationError> {
    view.memory
        .subslice(offset as usize, len as usize)
        .map_err(|error| MigrationError::Guest { doing: "reach a page of guest memory", source: error.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ReadSlice;
    use parking_lot::Mutex;

    /// Takes this many calls in place before the kernel has to be waited for.
    #[derive(Debug)]
    struct Kernel {
        room: u32,
        copies: bool,
        /// Calls under way, and bytes taken.
        state: Mutex<(u32, Vec<u8>)>,
    }

    impl Channel for Kernel {
        fn write(&self, _: &[WriteSlice<'_>]) -> io::Result<usize> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn write_in_place(&self, parts: &[WriteSlice<'_>]) -> io::Result<usize> {
            let mut state = self.state.lock();
            if state.0 == self.room {
                return Err(io::Error::from_raw_os_error(libc::ENOBUFS));
            }
            state.0 += 1;
            let mut bytes = vec![0; parts[0].len().min(3)];
            parts[0].copy_to(&mut bytes);
            state.1.extend(&bytes);
            Ok(bytes.len())
        }
        fn sent_in_place(&self) -> io::Result<(u32, bool)> {
            let done = std::mem::take(&mut self.state.lock().0);
            if done == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok((done, self.copies)) }
        }
        fn read(&self, _: &mut [ReadSlice<'_>]) -> io::Result<usize> {
            Ok(0)
        }
        fn finish_writing(&self) {}
        fn stop_reading(&self) {}
        fn close(&self) {}
    }

    #[test]
    fn what_the_kernel_holds_is_waited_for() {
        let bytes: Vec<u8> = (0..200).collect();
        for copies in [false, true] {
            for room in [1, 2, 7, 1000] {
                let kernel = Kernel { room, copies, state: Mutex::default() };
                let mut in_place = InPlace::default();
                let mut parts =
                    [WriteSlice::bytes(&bytes[..70]), WriteSlice::bytes(&[]), WriteSlice::bytes(&bytes[70..])];
                in_place.write_all(&kernel, &mut parts).unwrap();
                assert_eq!(in_place.finish(&kernel).unwrap(), u64::from(copies));
                let state = kernel.state.lock();
                assert_eq!(*state, (0, bytes.clone()));
            }
        }
        // Of nothing there is no copy.
        let kernel = Kernel { room: 1, copies: true, state: Mutex::default() };
        assert_eq!(InPlace::default().finish(&kernel).unwrap(), 0);
    }

    #[test]
    fn without_any_memory_to_lock_the_migration_fails_in_qemus_words() {
        let kernel = Kernel { room: 0, copies: false, state: Mutex::default() };
        let error = InPlace::default().write_all(&kernel, &mut [WriteSlice::bytes(&[1])]).unwrap_err();
        let words = "Process can't lock enough memory for using MSG_ZEROCOPY: No buffer space available";
        assert_eq!(error.to_string(), words);
    }
}
