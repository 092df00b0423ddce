//! Whether one schema says of a command a part of what another says.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeSet;

/// Refuses a description of `command` in `schema` that is no part of the one in `whole`: each type has the same kind,
/// and there is nothing in it that is not there in `whole`. Members that `whole` has and `schema` has not have to be
/// optional there. What begins with `x-` and is ours alone is passed over.
///
/// # Errors
/// Where they part.
pub fn is_part(command: &str, schema: &Value, whole: &Value) -> Result<()> {
    let [part, of] = [schema, whole].map(|schema| entity(schema, command));
    let (part, of) = (part?, of?);
    let mut seen = BTreeSet::new();
    for side in ["arg-type", "ret-type"] {
        compare((schema, &part[side]), (whole, &of[side]), side == "arg-type", &mut seen)
            .with_context(|| side.to_owned())?;
    }
    Ok(())
}

fn entity<'s>(schema: &'s Value, name: &str) -> Result<&'s Value> {
    let entities = schema.as_array().context("the schema is no list")?;
    entities.iter().find(|entity| entity["name"] == name).with_context(|| format!("'{name}' is not described"))
}

type Named<'s> = (&'s Value, &'s Value);

fn compare(part: Named<'_>, of: Named<'_>, given: bool, seen: &mut BTreeSet<(String, String)>) -> Result<()> {
    let names = [part.1, of.1].map(|name| name.as_str().unwrap_or_default().to_owned());
    if !seen.insert(names.clone().into()) {
        return Ok(());
    }
    let (here, there) = (entity(part.0, &names[0])?, entity(of.0, &names[1])?);
    ensure!(here["meta-type"] == there["meta-type"], "{} is not {}", here["meta-type"], there["meta-type"]);
    match here["meta-type"].as_str().unwrap_or_default() {
        "builtin" => {
            ensure!(here["json-type"] == there["json-type"], "{} is not {}", here["json-type"], there["json-type"])
        }
        "array" => compare((part.0, &here["element-type"]), (of.0, &there["element-type"]), given, seen)?,
        "enum" => {
            for value in list(here, "members") {
                ensure!(find(there, "members", "name", &value["name"]).is_some(), "the value {}", value["name"]);
            }
        }
        "object" => {
            for member in list(here, "members") {
                let name = &member["name"];
                match find(there, "members", "name", name) {
                    Some(same) => {
                        // What may be left out there may be left out here.
                        ensure!(
                            !given || same.get("default").is_none() || member.get("default").is_some(),
                            "{name} is optional"
                        );
                        compare((part.0, &member["type"]), (of.0, &same["type"]), given, seen)
                            .with_context(|| format!("member {name}"))?;
                    }
                    None if name.as_str().is_some_and(|name| name.starts_with("x-")) => {}
                    None => bail!("the member {name}"),
                }
            }
            for member in list(there, "members") {
                let left_out = find(here, "members", "name", &member["name"]).is_none();
                ensure!(!left_out || member.get("default").is_some(), "the member {} is missing", member["name"]);
            }
            ensure!(here.get("tag") == there.get("tag") || here.get("tag").is_none(), "its tag");
            for variant in list(here, "variants") {
                let same = find(there, "variants", "case", &variant["case"])
                    .with_context(|| format!("{}", variant["case"]))?;
                compare((part.0, &variant["type"]), (of.0, &same["type"]), given, seen)?;
            }
        }
        "alternate" => {
            ensure!(list(here, "members").count() == list(there, "members").count(), "the number of alternatives");
        }
        other => bail!("the kind {other}"),
    }
    Ok(())
}

fn list<'v>(value: &'v Value, name: &str) -> impl Iterator<Item = &'v Value> {
    value[name].as_array().into_iter().flatten()
}

fn find<'v>(value: &'v Value, list_name: &str, key: &str, wanted: &Value) -> Option<&'v Value> {
    list(value, list_name).find(|item| item[key] == *wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn schema(members: Value) -> Value {
        json!([
            { "name": "int", "meta-type": "builtin", "json-type": "int" },
            { "name": "str", "meta-type": "builtin", "json-type": "string" },
            { "name": "none", "meta-type": "object", "members": [] },
            { "name": "1", "meta-type": "object", "members": members },
            { "name": "do", "meta-type": "command", "arg-type": "1", "ret-type": "none" },
        ])
    }

    #[test]
    fn a_part_has_nothing_that_the_whole_has_not() {
        let whole = schema(json!([{ "name": "a", "type": "int" }, { "name": "b", "type": "str", "default": null }]));
        let fits = |members: Value| is_part("do", &schema(members), &whole).map_err(|error| format!("{error:#}"));
        assert_eq!(fits(json!([{ "name": "a", "type": "int" }])), Ok(()));
        assert_eq!(fits(json!([{ "name": "a", "type": "int" }, { "name": "x-c", "type": "int" }])), Ok(()));
        let wrong = |members: Value| fits(members).unwrap_err();
        assert!(wrong(json!([])).contains("\"a\" is missing"));
        assert!(wrong(json!([{ "name": "a", "type": "str" }])).contains("\"string\" is not \"int\""));
        assert!(
            wrong(json!([{ "name": "a", "type": "int" }, { "name": "c", "type": "int" }])).contains("the member \"c\"")
        );
        assert!(wrong(json!([{ "name": "a", "type": "int" }, { "name": "b", "type": "str" }])).contains("optional"));
    }
}
