//! Reset and power button.

use super::{
    arguments::Arguments,
    commands::{empty, only},
    protocol::Failure,
};
use crate::vmm::{ACTIONS, Vmm};
use serde_json::Value;
use std::sync::Arc;

pub(super) fn system_reset(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    vmm.system_reset();
    Ok(empty())
}

pub(super) fn system_powerdown(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    vmm.system_powerdown();
    Ok(empty())
}

pub(super) fn set_action(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let mut actions = vmm.actions();
    for (event, known) in ACTIONS {
        if let Some(action) = arguments.optional_choice(event, known)? {
            actions = actions.with(event, &action).map_err(|error| Failure::generic(error.to_string()))?;
        }
    }
    only(arguments)?;
    vmm.set_actions(actions);
    Ok(empty())
}
