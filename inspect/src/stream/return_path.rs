//! What the destination sent back.

use super::halt::Halt;
use super::inputs::Named;
use super::reencode;
use crate::failure::Failure;
use qevm_returnpath::{Decoder, Encoder, Event, Message};
use qevm_savevm::ram::RamBlocks;
use qevm_wire::{CountedString, Decode, DriveError, PageGeometry, Writer, next_event};
use std::collections::HashMap;

/// What the messages refer to.
pub(super) struct Context<'c> {
    /// Values of the PINGs that were not answered yet.
    pub(super) pings: &'c mut HashMap<u32, u64>,
    pub(super) blocks: &'c RamBlocks,
    pub(super) pages: PageGeometry,
    /// The connection may have broken, because a recovery follows.
    pub(super) can_break: bool,
    pub(super) reencode: bool,
}

/// What was read.
pub(super) struct Read {
    pub(super) description: String,
    pub(super) bytes: u64,
}

/// Reads a return path and checks its messages against the main channel.
pub(super) fn read(named: &mut Named, context: &mut Context<'_>) -> Result<Read, Halt> {
    let Named { name, source } = named;
    let mut decoder = Decoder::default();
    let (mut encoder, mut writer) = (Encoder::default(), Writer::new());
    let mut counts: HashMap<&'static str, u64> = HashMap::new();
    let mut current: Option<CountedString> = None;
    let mut status = None;
    loop {
        let at = decoder.offset();
        let (event, read) = match next_event(source, &mut decoder) {
            Ok(Some(next)) => next,
            Ok(None) => {
                // Bytes after SHUT are for the decoder to refuse.
                source.fill(1).map_err(|error| Failure::io(name, at, &error))?;
                match source.window().is_empty() {
                    true => break,
                    false => continue,
                }
            }
            Err(DriveError::Stream(error)) if context.can_break && error.is_truncated() => break,
            Err(error) => return Err(Failure::driven(name, at, error).into()),
        };
        if context.reencode {
            writer.clear();
            encoder.event(&event, &mut writer).map_err(|error| Failure::located(name, error))?;
            reencode::compare(writer.as_bytes(), read, at, name)?;
        }
        if let Event::Message(message) = &event {
            let kind = message.message_type().name();
            *counts.entry(kind).or_default() += 1;
            if let Message::Shut { status: value } = message {
                status = Some(*value);
            }
            check(message, &mut current, context).map_err(|(offset, message)| {
                Failure::mismatch(name, at + offset, format!("return path › {kind}"), message)
            })?;
        }
        let consumed = read.len();
        source.consume(consumed);
    }
    let mut kinds: Vec<String> = counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    kinds.sort();
    let end = match status {
        Some(0) => "the destination loaded everything".to_owned(),
        Some(status) => format!("the destination FAILED (status {status})"),
        None => "no SHUT: the connection or the destination broke".to_owned(),
    };
    let kinds = if kinds.is_empty() { "nothing".to_owned() } else { kinds.join(", ") };
    Ok(Read { description: format!("{name}: return path, {kinds}; {end}"), bytes: source.offset() })
}

/// Checks a message against what the main channel said. The error has the offset in the message.
fn check(
    message: &Message,
    current: &mut Option<CountedString>,
    context: &mut Context<'_>,
) -> Result<(), (u64, String)> {
    match message {
        Message::Pong { value } => {
            // Answers to different PINGs may overtake each other.
            match context.pings.get_mut(value).filter(|unanswered| **unanswered > 0) {
                Some(unanswered) => *unanswered -= 1,
                None => return Err((PAYLOAD_AT, format!("PONG {value:#x}, but no such PING is unanswered"))),
            }
        }
        Message::ReqPages { block, start, len } => {
            if block.is_some() {
                current.clone_from(block);
            }
            let Some(name) = current else {
                return Err((0, "REQ_PAGES without a block, but no request before it had one".into()));
            };
            let length = used_length(context.blocks, name).ok_or((REQUEST_NAME_AT, unknown(name)))?;
            if start.checked_add(u64::from(*len)).is_none_or(|end| end > length) {
                let message = format!("{len} bytes at {start:#x}, outside the {length:#x} bytes of '{name}'");
                return Err((PAYLOAD_AT, message));
            }
        }
        Message::RecvBitmap { block, len } => {
            let name_end = PAYLOAD_AT + 1 + block.as_bytes().len() as u64;
            let length = used_length(context.blocks, block).ok_or((PAYLOAD_AT, unknown(block)))?;
            let expected = length.div_ceil(context.pages.size()).div_ceil(8).next_multiple_of(8);
            if *len != expected {
                return Err((name_end, format!("bitmap of {len} bytes, expected {expected} for block '{block}'")));
            }
        }
        _ => {}
    }
    Ok(())
}

/// Offset of a message's payload.
const PAYLOAD_AT: u64 = 4;
/// Offset of the block name in REQ_PAGES_ID.
const REQUEST_NAME_AT: u64 = PAYLOAD_AT + 12;

fn used_length(blocks: &RamBlocks, name: &CountedString) -> Option<u64> {
    blocks.find(name.as_bytes()).and_then(|id| blocks.get(id)).map(|block| block.used_length)
}

fn unknown(name: &CountedString) -> String {
    format!("unknown RAM block '{name}'")
}
