//! Whether a decoder takes what is written.

use crate::encode::WriteError;
use crate::event::{Event, Step};
use crate::ram::RamRecord;
use crate::{Decoder, DecoderOptions, Error, ErrorKind};
use qevm_wire::{Decode, Limits, Located, PageGeometry};

/// The decoder at the other end, as far as what was written takes it. Pages of the main channel pass it by: of them
/// only the place is checked, because the encoder has checked the rest.
#[derive(Debug, Clone)]
pub(super) struct Taken {
    decoder: Decoder,
    /// Some of the payload that is due went through [`payload`](Taken::payload), so all of it does.
    payload_begun: bool,
    /// The place in the file is the caller's, and so is how much follows.
    any_payload: bool,
}

impl Taken {
    pub(super) fn new(pages: PageGeometry, footers: bool) -> Self {
        let mut decoder = Decoder::new(options(pages, footers));
        // What was written is all there is to look at.
        decoder.end_of_input();
        Taken { decoder, payload_begun: false, any_payload: false }
    }

    /// What takes the content of a package that is written apart.
    pub(super) fn package(&self) -> Self {
        Taken { decoder: self.decoder.unbounded_package(), payload_begun: false, any_payload: false }
    }

    /// What takes a connection on which a broken postcopy goes on.
    pub(super) fn recovery(&self) -> Self {
        let mut decoder = self.decoder.recovery();
        decoder.end_of_input();
        Taken { decoder, payload_begun: false, any_payload: false }
    }

    /// Takes `bytes`, which are `event`; `at` is their place in the writer, for errors. Changes nothing on an error.
    #[inline]
    pub(super) fn event(&mut self, event: &Event<'_>, bytes: &[u8], at: u64) -> Result<(), Error> {
        let due = self.decoder.payload_remaining();
        if self.payload_begun && due > 0 {
            return Err(Located::new(WriteError::PayloadMissing { remaining: due }.into(), at));
        }
        if let Event::Ram(record @ (RamRecord::Page(page) | RamRecord::Zero(page))) = event {
            let payload = matches!(record, RamRecord::Page(_));
            if self.decoder.takes_page(page, bytes.len() as u64, payload) {
                (self.payload_begun, self.any_payload) = (false, false);
                return Ok(());
            }
        }
        let before = self.decoder.clone();
        if let Err(kind) = self.take(event, bytes, due) {
            self.decoder = before;
            return Err(Located::new(kind.into(), at));
        }
        self.payload_begun = false;
        self.any_payload = matches!(event, Event::Ram(RamRecord::Block(block)) if block.mapped_ram.is_some());
        Ok(())
    }

    /// Payload of the last event is written.
    pub(super) fn payload(&mut self, len: u64, at: u64) -> Result<(), Error> {
        let remaining = self.decoder.payload_remaining();
        if self.any_payload {
            return self.decoder.skip_payload(len.min(remaining)).map_err(|error| refused(error.kind, at));
        }
        if len > remaining {
            return Err(Located::new(WriteError::PayloadInExcess { found: len, remaining }.into(), at));
        }
        self.payload_begun |= len > 0;
        self.decoder.skip_payload(len).map_err(|error| refused(error.kind, at))
    }

    fn take(&mut self, event: &Event<'_>, bytes: &[u8], due: u64) -> Result<(), WriteError> {
        let refuse = |error: Error| WriteError::Refused { reason: Box::new(error.kind) };
        self.decoder.skip_payload(due).map_err(refuse)?;
        match event {
            Event::Body(_) if !self.decoder.expects_body() => return Err(WriteError::Content),
            Event::Body(body) => return self.decoder.body(body.len() as u64).map_err(refuse),
            // Content of no length.
            _ if self.decoder.expects_body() => self.decoder.body(0).map_err(refuse)?,
            Event::Ram(RamRecord::EndOfBlocks) => {}
            _ => self.decoder.pass_end_of_blocks(),
        }
        if let Event::Ram(RamRecord::Block(block)) = event
            && self.decoder.takes_block(block, bytes.len() as u64)
        {
            return Ok(());
        }
        match self.decoder.next(bytes).map_err(refuse)? {
            Step::Event { consumed, event: found } if consumed == bytes.len() && found == *event => Ok(()),
            _ => Err(WriteError::TakenForElse),
        }
    }
}

fn refused(kind: ErrorKind, at: u64) -> Error {
    Located::new(WriteError::Refused { reason: Box::new(kind) }.into(), at)
}

fn options(pages: PageGeometry, footers: bool) -> DecoderOptions {
    let footers = if footers { crate::Footers::Present } else { crate::Footers::Absent };
    // How much a reader takes is the reader's choice.
    let limits = Limits {
        ram_blocks: u64::MAX,
        ram_block_len: u64::MAX,
        sections: u64::MAX,
        device_state: u64::MAX,
        device_section: u64::MAX,
        vmdesc: u64::MAX,
        package: u64::MAX,
        packages: u64::MAX,
        depth: u32::MAX,
        machine_name: u64::MAX,
        capabilities: u64::MAX,
        compressed: u64::MAX,
        ..Limits::default()
    };
    DecoderOptions { limits, pages, footers, ..DecoderOptions::default() }
}
