//! What QMP's `object-add` and `--object` make: TLS credentials, and lists of who may send a guest. Names, properties
//! and texts are those of QEMU 11.1.

#[cfg(test)]
mod tests;

use parking_lot::{Mutex, MutexGuard};
use qevm_migration::{Credentials, CredentialsError, Endpoint, Parameters, Tls, TlsError, Versions};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use wildmatch::WildMatch;

/// The objects of a monitor, by their ids.
#[derive(Debug, Default)]
pub struct Objects(Mutex<BTreeMap<String, Object>>);

#[derive(Debug, Clone)]
enum Object {
    Credentials(Arc<Credentials>),
    Authorization(Arc<AccessList>),
}

/// Why there is no such object, or it cannot be used so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObjectError {
    /// A property that has to be there.
    #[error("Parameter '{0}' is missing")]
    Missing(&'static str),
    /// The directory of the credentials, which QEMU's schema lets out.
    #[error("Missing 'dir' property value")]
    MissingDirectory,
    /// A property that objects of this type do not have.
    #[error("Parameter '{0}' is unexpected")]
    Unexpected(String),
    /// A property of another type.
    #[error("Invalid parameter type for '{name}', expected: {expected}")]
    Type {
        /// The property.
        name: String,
        /// Its type.
        expected: &'static str,
    },
    /// A property has no such value.
    #[error("Parameter '{name}' does not accept value '{value}'")]
    Choice {
        /// The property.
        name: String,
        /// As given.
        value: String,
    },
    /// A property of QEMU's that is not supported here.
    #[error("property '{name}': '{value}' is not supported here{advice}")]
    Unsupported {
        /// The property.
        name: &'static str,
        /// As given.
        value: String,
        /// What to do instead.
        advice: &'static str,
    },
    /// There is one of this id.
    #[error("attempt to add duplicate property '{0}' to object (type 'container')")]
    Duplicate(String),
    /// There is none of this id.
    #[error("object '{0}' not found")]
    NotFound(String),
    /// The files of the credentials.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// `tls-creds` names nothing.
    #[error("No TLS credentials with id '{0}'")]
    NoCredentials(String),
    /// `tls-creds` names an object of another type.
    #[error("Object with id '{0}' is not TLS credentials")]
    NotCredentials(String),
    /// `tls-authz` names nothing, or an object of another type.
    #[error("No authorization object with id '{0}'")]
    NoAuthorization(String),
    /// The credentials are for the other side, or no certificate can have the name.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl Objects {
    /// Makes an object: `qom-type`, `id` and the properties of its type.
    ///
    /// # Errors
    /// [`ObjectError`]; then there is none.
    pub fn add(&self, properties: Map<String, Value>) -> Result<(), ObjectError> {
        let mut properties = Properties(properties);
        let qom_type = properties.text("qom-type")?.ok_or(ObjectError::Missing("qom-type"))?;
        let make = match qom_type.as_str() {
            "tls-creds-x509" => credentials,
            "authz-simple" => simple,
            "authz-list" => list,
            _ => return Err(ObjectError::Choice { name: "qom-type".into(), value: qom_type }),
        };
        let id = properties.text("id")?.ok_or(ObjectError::Missing("id"))?;
        let object = make(&mut properties)?;
        properties.complete()?;
        let mut objects = self.lock();
        if objects.contains_key(&id) {
            return Err(ObjectError::Duplicate(id));
        }
        objects.insert(id, object);
        Ok(())
    }

    /// Takes an object away. A migration that uses it keeps it until it has ended.
    ///
    /// # Errors
    /// [`ObjectError::NotFound`].
    pub fn delete(&self, id: &str) -> Result<(), ObjectError> {
        self.lock().remove(id).map(drop).ok_or_else(|| ObjectError::NotFound(id.into()))
    }

    /// How the connections of this side are secured by `tls-creds`, `tls-hostname` and `tls-authz`; `None` if they are
    /// not.
    ///
    /// # Errors
    /// [`ObjectError`]: what they name is not there, or is for the other side.
    pub fn tls(&self, parameters: &Parameters, side: Endpoint) -> Result<Option<Tls>, ObjectError> {
        if parameters.tls_creds.is_empty() {
            return Ok(None);
        }
        let find = |id: &str| self.lock().get(id).cloned();
        let credentials = match find(&parameters.tls_creds) {
            Some(Object::Credentials(credentials)) => credentials,
            Some(_) => return Err(ObjectError::NotCredentials(parameters.tls_creds.clone())),
            None => return Err(ObjectError::NoCredentials(parameters.tls_creds.clone())),
        };
        if credentials.endpoint() != side {
            return Err(TlsError::Endpoint { expected: side }.into());
        }
        let mut tls = Tls::new(credentials);
        match side {
            Endpoint::Client if !parameters.tls_hostname.is_empty() => {
                tls = tls.with_hostname(&parameters.tls_hostname)?;
            }
            Endpoint::Server if !parameters.tls_authz.is_empty() => match find(&parameters.tls_authz) {
                Some(Object::Authorization(list)) => tls = tls.with_authorization(move |peer| list.allows(peer)),
                _ => return Err(ObjectError::NoAuthorization(parameters.tls_authz.clone())),
            },
            _ => {}
        }
        Ok(Some(tls))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Object>> {
        self.0.lock()
    }
}

/// Who may send a guest, by the distinguished name of their certificate. The first rule that matches decides.
#[derive(Debug)]
struct AccessList {
    rules: Vec<(Match, bool)>,
    otherwise: bool,
}

#[derive(Debug)]
enum Match {
    Exact(String),
    Glob(WildMatch),
}

impl AccessList {
    fn allows(&self, peer: &str) -> bool {
        let matching = self.rules.iter().find(|(pattern, _)| match pattern {
            Match::Exact(name) => name == peer,
            Match::Glob(pattern) => pattern.matches(peer),
        });
        matching.map_or(self.otherwise, |(_, allow)| *allow)
    }
}

fn credentials(properties: &mut Properties) -> Result<Object, ObjectError> {
    let endpoint = match properties.choice("endpoint", &["client", "server"])?.as_deref() {
        // QEMU's default.
        Some("client") | None => Endpoint::Client,
        Some(_) => Endpoint::Server,
    };
    let directory = properties.text("dir")?.ok_or(ObjectError::MissingDirectory)?;
    let verify_peer = properties.switch("verify-peer")?.unwrap_or(true);
    // Whether the certificates make sense is looked at in any case.
    properties.switch("sanity-check")?;
    let versions = properties.text("priority")?.map_or(Ok(Versions::default()), |priority| versions(&priority))?;
    if let Some(value) = properties.text("passwordid")? {
        return Err(ObjectError::Unsupported { name: "passwordid", value, advice: ": decrypt the key" });
    }
    Ok(Object::Credentials(Arc::new(Credentials::x509(Path::new(&directory), endpoint, verify_peer, versions)?)))
}

/// What a GnuTLS priority string means here. Ciphers are those of TLS 1.2 and 1.3 that are held to be sound; of strings
/// that choose others, none is supported.
fn versions(priority: &str) -> Result<Versions, ObjectError> {
    let unsupported = || ObjectError::Unsupported {
        name: "priority",
        value: priority.into(),
        advice: ": NORMAL, NORMAL:-VERS-TLS1.2, NORMAL:-VERS-TLS1.3, or none",
    };
    let mut words = priority.split(':');
    let mut versions = Versions::default();
    if !matches!(words.next(), Some("NORMAL" | "@SYSTEM" | "SECURE128" | "SECURE256")) {
        return Err(unsupported());
    }
    for word in words {
        match word {
            "-VERS-TLS1.3" => versions.tls13 = false,
            "-VERS-TLS1.2" => versions.tls12 = false,
            "-VERS-ALL" | "-VERS-TLS-ALL" => versions = Versions { tls12: false, tls13: false },
            "+VERS-TLS1.3" => versions.tls13 = true,
            "+VERS-TLS1.2" => versions.tls12 = true,
            // There are none here anyway.
            "-VERS-TLS1.0" | "-VERS-TLS1.1" | "-VERS-SSL3.0" => {}
            _ => return Err(unsupported()),
        }
    }
    if !versions.tls12 && !versions.tls13 {
        return Err(unsupported());
    }
    Ok(versions)
}

fn simple(properties: &mut Properties) -> Result<Object, ObjectError> {
    let identity = properties.text("identity")?.ok_or(ObjectError::Missing("identity"))?;
    Ok(Object::Authorization(Arc::new(AccessList { rules: vec![(Match::Exact(identity), true)], otherwise: false })))
}

fn list(properties: &mut Properties) -> Result<Object, ObjectError> {
    let allow = |policy: Option<String>| policy.as_deref() == Some("allow");
    let otherwise = allow(properties.choice("policy", POLICIES)?);
    let wrong = |name: &str, expected| ObjectError::Type { name: name.into(), expected };
    let rules = match properties.0.remove("rules") {
        None => Vec::new(),
        Some(Value::Array(rules)) => rules,
        Some(_) => return Err(wrong("rules", "array")),
    };
    let rules = rules.into_iter().map(|rule| {
        let Value::Object(rule) = rule else { return Err(wrong("rules[0]", "object")) };
        let mut rule = Properties(rule);
        let pattern = rule.text("match")?.ok_or(ObjectError::Missing("match"))?;
        let policy = rule.choice("policy", POLICIES)?.ok_or(ObjectError::Missing("policy"))?;
        let pattern = match rule.choice("format", &["exact", "glob"])?.as_deref() {
            Some("glob") => Match::Glob(WildMatch::new(&pattern)),
            _ => Match::Exact(pattern),
        };
        rule.complete()?;
        Ok((pattern, allow(Some(policy))))
    });
    Ok(Object::Authorization(Arc::new(AccessList { rules: rules.collect::<Result<_, _>>()?, otherwise })))
}

const POLICIES: &[&str] = &["allow", "deny"];

/// Properties that were not taken yet.
struct Properties(Map<String, Value>);

impl Properties {
    fn text(&mut self, name: &'static str) -> Result<Option<String>, ObjectError> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(ObjectError::Type { name: name.into(), expected: "string" }),
        }
    }

    fn choice(&mut self, name: &'static str, choices: &[&str]) -> Result<Option<String>, ObjectError> {
        match self.text(name)? {
            Some(value) if !choices.contains(&value.as_str()) => Err(ObjectError::Choice { name: name.into(), value }),
            value => Ok(value),
        }
    }

    fn switch(&mut self, name: &'static str) -> Result<Option<bool>, ObjectError> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(on)),
            Some(_) => Err(ObjectError::Type { name: name.into(), expected: "boolean" }),
        }
    }

    fn complete(&self) -> Result<(), ObjectError> {
        self.0.keys().next().map_or(Ok(()), |name| Err(ObjectError::Unexpected(name.clone())))
    }
}
