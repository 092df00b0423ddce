//! What the destination sent back.

use super::connection::Halt;
use super::inputs::Named;
use qevm_savevm::ram::RamBlocks;
use std::sync::Arc;

/// What the messages refer to.
pub(super) struct Context<'c> {
    pub(super) pings: &'c [u32],
    pub(super) blocks: &'c Arc<RamBlocks>,
    pub(super) can_break: bool,
}

/// What was read.
pub(super) struct Read {
    pub(super) description: String,
    pub(super) bytes: u64,
}

pub(super) fn read(named: &mut Named, context: &Context<'_>) -> Result<Read, Halt> {
    let _ = (named, context.pings, context.blocks, context.can_break);
    Ok(Read { description: String::new(), bytes: 0 })
}
