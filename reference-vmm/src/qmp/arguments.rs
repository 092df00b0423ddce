//! What a command was given.

use super::protocol::Failure;
use serde_json::{Map, Value};

/// The `arguments` of a command; each is taken once, and none may be left over.
pub(super) struct Arguments(Map<String, Value>);

impl Arguments {
    pub(super) fn new(arguments: Map<String, Value>) -> Self {
        Arguments(arguments)
    }

    /// An argument that may be left out.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    /// Every argument that was not taken.
    pub(super) fn drain(&mut self) -> Map<String, Value> {
        std::mem::take(&mut self.0)
    }

    pub(super) fn text(&mut self, name: &str) -> Result<String, Failure> {
        self.optional_text(name)?.ok_or_else(|| missing(name))
    }

    pub(super) fn optional_text(&mut self, name: &str) -> Result<Option<String>, Failure> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong_type(name, "string")),
        }
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<bool, Failure> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(_) => Err(wrong_type(name, "boolean")),
        }
    }

    pub(super) fn list(&mut self, name: &str) -> Result<Vec<Value>, Failure> {
        self.optional_list(name)?.ok_or_else(|| missing(name))
    }

    pub(super) fn optional_list(&mut self, name: &str) -> Result<Option<Vec<Value>>, Failure> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(_) => Err(wrong_type(name, "array")),
        }
    }

    pub(super) fn object(value: Value, name: &str) -> Result<Arguments, Failure> {
        match value {
            Value::Object(map) => Ok(Arguments(map)),
            _ => Err(wrong_type(name, "object")),
        }
    }

    /// Refuses what was not taken.
    pub(super) fn finish(self) -> Result<(), Failure> {
        match self.0.keys().next() {
            Some(name) => Err(Failure::generic(format!("Parameter '{name}' is unexpected"))),
            None => Ok(()),
        }
    }
}

pub(super) fn missing(name: &str) -> Failure {
    Failure::generic(format!("Parameter '{name}' is missing"))
}

pub(super) fn wrong_type(name: &str, expected: &str) -> Failure {
    Failure::generic(format!("Invalid parameter type for '{name}', expected: {expected}"))
}
