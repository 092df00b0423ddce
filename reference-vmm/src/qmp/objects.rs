//! The commands for objects.

use super::arguments::{Arguments, empty, finish};
use super::protocol::Failure;
use crate::objects::ObjectError;
use crate::vmm::Vmm;
use serde_json::Value;
use std::sync::Arc;

impl From<ObjectError> for Failure {
    fn from(error: ObjectError) -> Failure {
        Failure::generic(error.to_string())
    }
}

pub(super) fn add(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let properties = arguments.drain();
    finish(arguments)?;
    vmm.objects().add(properties)?;
    Ok(empty())
}

pub(super) fn delete(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let id = arguments.text("id")?;
    finish(arguments)?;
    vmm.objects().delete(&id)?;
    Ok(empty())
}
