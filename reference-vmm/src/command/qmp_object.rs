//! `--object` for what QMP's `object-add` makes, too: TLS credentials, and lists of who may send a guest.

use super::options::{pairs, switch};
use anyhow::{Context, ensure};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// The properties of these objects, each with its argument. They are checked when the objects are made.
///
/// # Errors
/// An argument that is no JSON object or list of properties.
pub(crate) fn listed(texts: &[String]) -> anyhow::Result<Vec<(&String, Map<String, Value>)>> {
    let texts = texts.iter().filter(|text| is_one(text));
    texts.map(|text| Ok((text, properties(text).with_context(|| format!("--object {text}"))?))).collect()
}

/// Whether an argument is for one of these.
pub(crate) fn is_one(text: &str) -> bool {
    let qom_type = text.strip_prefix("qom-type=").unwrap_or(text);
    text.starts_with('{') || qom_type.starts_with("tls-creds-") || qom_type.starts_with("authz-")
}

/// A JSON object, or `NAME=VALUE,…`; the rules of a list are `rules.N.NAME=VALUE`.
fn properties(text: &str) -> anyhow::Result<Map<String, Value>> {
    if text.starts_with('{') {
        return Ok(serde_json::from_str(text)?);
    }
    let mut properties = Map::new();
    let mut rules: BTreeMap<usize, Map<String, Value>> = BTreeMap::new();
    for (name, value) in pairs(text, Some("qom-type"))? {
        let value = match name.as_str() {
            "verify-peer" | "sanity-check" => switch(&name, &value)?.into(),
            _ => value.into(),
        };
        let rule = name.strip_prefix("rules.").and_then(|rule| rule.split_once('.'));
        let before = match rule.and_then(|(number, name)| Some((number.parse::<usize>().ok()?, name))) {
            Some((number, name)) => rules.entry(number).or_default().insert(name.into(), value),
            None => properties.insert(name.clone(), value),
        };
        ensure!(before.is_none(), "{name} is given twice");
    }
    if !rules.is_empty() {
        properties.insert("rules".into(), rules.into_values().map(Value::Object).collect());
    }
    Ok(properties)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn properties_are_written_as_for_qemu() {
        let read = |text: &str| {
            listed(&[text.to_owned()]).map(|list| list.into_iter().next().map(|(_, found)| Value::Object(found)))
        };
        assert_eq!(
            read("tls-creds-x509,id=t,dir=/a,,b,endpoint=server,verify-peer=off").unwrap(),
            Some(
                json!({ "qom-type": "tls-creds-x509", "id": "t", "dir": "/a,b", "endpoint": "server", "verify-peer": false })
            )
        );
        assert_eq!(
            read("authz-list,id=l,rules.0.match=C=DE,,CN=*,rules.0.format=glob,rules.0.policy=allow,rules.1.match=x")
                .unwrap(),
            Some(json!({
                "qom-type": "authz-list", "id": "l",
                "rules": [{ "match": "C=DE,CN=*", "format": "glob", "policy": "allow" }, { "match": "x" }],
            }))
        );
        assert_eq!(
            read(r#"{"qom-type":"authz-simple","id":"a"}"#).unwrap(),
            Some(json!({ "qom-type": "authz-simple", "id": "a" }))
        );
        assert_eq!(read("memory-backend-ram,id=m,size=1M").unwrap(), None);
        for (text, why) in [
            ("tls-creds-x509,verify-peer=2", "Parameter 'verify-peer' expects 'on' or 'off'"),
            ("tls-creds-x509,id=a,id=b", "id is given twice"),
            ("tls-creds-x509,id", "'id' at byte 15 is no NAME=VALUE"),
        ] {
            assert_eq!(format!("{:#}", read(text).unwrap_err()), format!("--object {text}: {why}"));
        }
    }
}
