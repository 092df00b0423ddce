//! What a command was given.

use super::protocol::Failure;
use crate::vmm::Vmm;
use crate::vmm::legality::{self, Rule};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// The `arguments` of a command, or an object in them; each member is taken once, and none may be left over.
pub(super) struct Arguments {
    members: Map<String, Value>,
    /// Where they are, in front of a member's name: empty, or as `capabilities[0].`.
    path: String,
    /// Who is told the command, and when it is not legal; not of an object in them.
    rules: Option<(Arc<Vmm>, &'static [Rule])>,
}

impl Arguments {
    pub(super) fn new(members: Map<String, Value>) -> Self {
        Arguments { members, path: String::new(), rules: None }
    }

    /// Those of a command that is refused in some situations.
    pub(super) fn of_command(vmm: &Arc<Vmm>, rules: &'static [Rule], members: Map<String, Value>) -> Self {
        Arguments { rules: Some((vmm.clone(), rules)), ..Arguments::new(members) }
    }

    /// Refuses any argument that was not consumed.
    pub(super) fn complete(&self) -> Result<(), Failure> {
        match self.members.keys().next() {
            Some(name) => Err(Failure::generic(format!("Parameter '{}{name}' is unexpected", self.path))),
            None => Ok(()),
        }
    }

    /// Refuses the command if it is not legal now.
    pub(super) fn legal(&self) -> Result<(), Failure> {
        match &self.rules {
            Some((vmm, rules)) => Ok(legality::check(rules, &vmm.situation())?),
            None => Ok(()),
        }
    }

    /// An argument that may be left out.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.members.remove(name)
    }

    /// Every argument that was not taken.
    pub(super) fn drain(&mut self) -> Map<String, Value> {
        std::mem::take(&mut self.members)
    }

    pub(super) fn text(&mut self, name: &str) -> Result<String, Failure> {
        self.optional_text(name)?.ok_or_else(|| self.missing(name))
    }

    pub(super) fn optional_text(&mut self, name: &str) -> Result<Option<String>, Failure> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong_type(name, "string")),
        }
    }

    /// One of a few names.
    pub(super) fn choice(&mut self, name: &str, choices: &[&str]) -> Result<String, Failure> {
        self.optional_choice(name, choices)?.ok_or_else(|| self.missing(name))
    }

    pub(super) fn optional_choice(&mut self, name: &str, choices: &[&str]) -> Result<Option<String>, Failure> {
        match self.optional_text(name)? {
            // QEMU does not say where the member is here.
            Some(text) if !choices.contains(&text.as_str()) => {
                Err(Failure::generic(format!("Parameter '{name}' does not accept value '{text}'")))
            }
            text => Ok(text),
        }
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<bool, Failure> {
        Ok(self.optional_flag(name)?.unwrap_or(false))
    }

    pub(super) fn required_flag(&mut self, name: &str) -> Result<bool, Failure> {
        self.optional_flag(name)?.ok_or_else(|| self.missing(name))
    }

    pub(super) fn optional_flag(&mut self, name: &str) -> Result<Option<bool>, Failure> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(_) => Err(self.wrong_type(name, "boolean")),
        }
    }

    pub(super) fn integer(&mut self, name: &str) -> Result<i64, Failure> {
        self.optional_integer(name)?.ok_or_else(|| self.missing(name))
    }

    pub(super) fn optional_integer(&mut self, name: &str) -> Result<Option<i64>, Failure> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => value.as_i64().map(Some).ok_or_else(|| self.wrong_type(name, "integer")),
        }
    }

    /// A number of 64 bits without a sign; a negative one wraps, as QEMU takes it.
    pub(super) fn unsigned(&mut self, name: &str) -> Result<u64, Failure> {
        self.optional_unsigned(name)?.ok_or_else(|| self.missing(name))
    }

    pub(super) fn optional_unsigned(&mut self, name: &str) -> Result<Option<u64>, Failure> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_u64().or(value.as_i64().map(i64::cast_unsigned));
        let wrong = || Failure::generic(format!("Parameter '{}{name}' expects uint64", self.path));
        number.map(Some).ok_or_else(wrong)
    }

    pub(super) fn list(&mut self, name: &str) -> Result<Vec<Value>, Failure> {
        self.optional_list(name)?.ok_or_else(|| self.missing(name))
    }

    pub(super) fn optional_list(&mut self, name: &str) -> Result<Option<Vec<Value>>, Failure> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(_) => Err(self.wrong_type(name, "array")),
        }
    }

    /// A member that is an object.
    pub(super) fn object(&mut self, name: &str) -> Result<Arguments, Failure> {
        let value = self.take(name).ok_or_else(|| self.missing(name))?;
        self.inner(value, name)
    }

    /// `value` is member `name` or, as `name[0]`, an item of it, and must be an object.
    pub(super) fn inner(&self, value: Value, name: &str) -> Result<Arguments, Failure> {
        match value {
            Value::Object(members) => Ok(Arguments { members, path: format!("{}{name}.", self.path), rules: None }),
            _ => Err(self.wrong_type(name, "object")),
        }
    }

    fn missing(&self, name: &str) -> Failure {
        Failure::generic(format!("Parameter '{}{name}' is missing", self.path))
    }

    fn wrong_type(&self, name: &str, expected: &str) -> Failure {
        Failure::generic(format!("Invalid parameter type for '{}{name}', expected: {expected}", self.path))
    }
}

/// Refuses arguments that were not taken, and the command if it is not legal now.
pub(super) fn finish(arguments: &mut Arguments) -> Result<(), Failure> {
    arguments.complete()?;
    arguments.legal()
}

pub(super) fn empty() -> Value {
    json!({})
}
