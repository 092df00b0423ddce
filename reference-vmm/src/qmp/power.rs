//! Reset, power button, and what the network learns of the guest.

use super::arguments::{Arguments, empty, finish};
use super::protocol::Failure;
use crate::vmm::{ACTIONS, Vmm};
use qevm_migration::Announcement;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

pub(super) fn system_reset(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    vmm.system_reset();
    Ok(empty())
}

pub(super) fn system_powerdown(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    vmm.system_powerdown();
    Ok(empty())
}

/// The cards of this machine have no names, so that none of those that are named is one of them.
pub(super) fn announce_self(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let mut milliseconds = |name| -> Result<Duration, Failure> {
        Ok(Duration::from_millis(u64::try_from(arguments.integer(name)?).unwrap_or(0)))
    };
    let (initial, max) = (milliseconds("initial")?, milliseconds("max")?);
    let rounds = u64::try_from(arguments.integer("rounds")?).unwrap_or(0);
    let step = Duration::from_millis(u64::try_from(arguments.integer("step")?).unwrap_or(0));
    let named = arguments.optional_list("interfaces")?.is_some();
    let id = arguments.optional_text("id")?.unwrap_or_default();
    finish(arguments)?;
    if !named {
        vmm.announce(Announcement { initial, max, rounds, step }, &id);
    }
    Ok(empty())
}

pub(super) fn set_action(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let mut actions = vmm.actions();
    for (event, known) in ACTIONS {
        if let Some(action) = arguments.optional_choice(event, known)? {
            actions = actions.with(event, &action).map_err(|error| Failure::generic(error.to_string()))?;
        }
    }
    finish(arguments)?;
    vmm.set_actions(actions);
    Ok(empty())
}
