//! The second channel of postcopy-preempt.

use crate::failure::Failure;
use crate::source::Source;
use crate::stream::halt::Halt;
use crate::stream::memory::Memory;
use qevm_savevm::Decoder;
use qevm_savevm::ram::{PreemptDecoder, RamRecord};
use qevm_wire::{Decode, DriveError, next_event};

/// The second channel of postcopy-preempt.
pub(super) struct PreemptChannel {
    pub(super) name: String,
    pub(super) source: Source,
    pub(super) description: String,
}

impl PreemptChannel {
    /// Applies all its pages. `can_break`: the connection may have broken, because a recovery follows.
    pub(super) fn read(&mut self, memory: &mut Memory, main: &Decoder, can_break: bool) -> Result<(), Halt> {
        let PreemptChannel { name, source, description } = self;
        let mut decoder = PreemptDecoder::new(main.ram_blocks().clone(), main.page_geometry());
        let io = |offset: u64, error: std::io::Error| Failure::io(name, offset, &error);
        let (mut pages, mut zeroes) = (0u64, 0u64);
        let page_size = main.page_geometry().size();
        loop {
            let at = source.offset();
            let (event, read) = match next_event(source, &mut decoder) {
                Ok(Some(next)) => next,
                Ok(None) => break,
                Err(DriveError::Stream(error)) if can_break && error.is_truncated() => break,
                Err(error) => return Err(Failure::driven(name, at, error).into()),
            };
            let mut target = None;
            match event {
                RamRecord::Zero(page) => {
                    zeroes += 1;
                    memory.ram.put_zero(page.block.index(), page.offset).map_err(|e| io(at, e))?;
                }
                RamRecord::Page(page) => target = Some(page),
                _ => {}
            }
            let consumed = read.len();
            source.consume(consumed);
            let Some(place) = target else { continue };
            pages += 1;
            source.fill(page_size as usize).map_err(|e| io(at, e))?;
            // Of a page that is not whole the decoder says what is missing.
            if let Some(page) = source.window().get(..page_size as usize) {
                memory.ram.put(place.block.index(), place.offset, page).map_err(|e| io(at, e))?;
                source.consume(page_size as usize);
                decoder.skip_payload(page_size).map_err(|error| Failure::located(name, error))?;
            }
        }
        // Whatever follows an EOS is no record.
        source.fill(1).map_err(|e| Failure::io(name, source.offset(), &e))?;
        if !source.window().is_empty() && !can_break {
            let message = "bytes after the end of the preempt channel";
            return Err(Failure::mismatch(name, source.offset(), "preempt channel", message).into());
        }
        *description = format!("postcopy-preempt, {pages} pages, {zeroes} zero pages");
        Ok(())
    }
}
