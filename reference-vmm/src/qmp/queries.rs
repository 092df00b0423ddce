//! What there is: the schema, the vCPUs, KVM, the memory.

use super::arguments::{Arguments, empty, finish};
use super::protocol::Failure;
use crate::vmm::Vmm;
use serde_json::{Value, json};
use std::sync::{Arc, LazyLock};

/// The commands, events and types that there are, as `query-qmp-schema` gives them. Members that QEMU 11.1 has and
/// nothing here takes or gives are left out, and what is ours alone begins with `x-`.
static SCHEMA: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(include_str!("schema.json")).expect("the schema is JSON, as a test shows"));

pub(super) fn schema(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    Ok(SCHEMA.clone())
}

/// What greeting and `query-version` say.
pub(super) fn version(vmm: &Vmm) -> Value {
    let release = vmm.profile().qemu;
    json!({
        "qemu": { "micro": 0, "minor": release.minor, "major": release.major },
        "package": concat!("reference-vmm ", env!("CARGO_PKG_VERSION")),
    })
}

pub(super) fn cpus(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    let cpu = |(index, thread): (usize, u32)| {
        json!({
            "thread-id": thread,
            "qom-type": "host-x86_64-cpu",
            "props": { "core-id": index, "thread-id": 0, "socket-id": 0 },
            "qom-path": format!("/machine/unattached/device[{index}]"),
            "cpu-index": index,
            "target": ARCHITECTURE,
        })
    };
    Ok(vmm.machine().vcpu_threads().into_iter().enumerate().map(cpu).collect())
}

/// The only one.
const ARCHITECTURE: &str = "x86_64";

pub(super) fn kvm(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    Ok(json!({ "enabled": true, "present": true }))
}

pub(super) fn uuid(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    Ok(json!({ "UUID": vmm.machine().uuid().unwrap_or_default().to_string() }))
}

pub(super) fn target(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    Ok(json!({ "arch": ARCHITECTURE }))
}

pub(super) fn memory_size(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    Ok(json!({ "base-memory": vmm.machine().memory().ram().used_length(), "plugged-memory": 0 }))
}

/// What can be yanked: the connections of a migration.
pub(super) fn yankable(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    Ok(if migrates(vmm) { json!([{ "type": "migration" }]) } else { json!([]) })
}

fn migrates(vmm: &Vmm) -> bool {
    [vmm.outgoing(), vmm.incoming()].iter().any(|job| job.status().is_running())
}

/// Breaks connections off that hang, all of the instances or, if one does not exist, none.
pub(super) fn yank(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let list = arguments.list("instances")?;
    let (mut unknown, mut wanted) = (false, false);
    for (i, item) in list.into_iter().enumerate() {
        let mut item = arguments.inner(item, &format!("instances[{i}]"))?;
        match item.choice("type", &["block-node", "chardev", "migration"])?.as_str() {
            // There are none whose connections could be broken off.
            "block-node" => (_, unknown) = (item.text("node-name")?, true),
            "chardev" => (_, unknown) = (item.text("id")?, true),
            _ => wanted = true,
        }
        item.complete()?;
    }
    finish(arguments)?;
    if unknown || wanted && !migrates(vmm) {
        return Err(Failure::no_device("Instance not found"));
    }
    if wanted {
        vmm.outgoing().disconnect();
        vmm.incoming().disconnect();
    }
    Ok(empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names lead somewhere, and nothing is there twice or in vain.
    #[test]
    fn the_schema_is_whole() {
        let entities = SCHEMA.as_array().unwrap();
        let mut names: Vec<&str> = entities.iter().map(|entity| entity["name"].as_str().unwrap()).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
        let mut used = std::collections::BTreeSet::new();
        for entity in entities {
            let lists = ["members", "variants"].map(|list| entity[list].as_array().cloned().unwrap_or_default());
            let members = lists.iter().flatten().map(|member| &member["type"]);
            let types = ["arg-type", "ret-type", "element-type"].map(|side| &entity[side]);
            for name in members.chain(types).filter_map(Value::as_str) {
                assert!(names.binary_search(&name).is_ok(), "{} leads to {name}", entity["name"]);
                used.insert(name.to_owned());
            }
        }
        for entity in entities.iter().filter(|e| e["meta-type"] != "command" && e["meta-type"] != "event") {
            assert!(used.contains(entity["name"].as_str().unwrap()), "{} is not used", entity["name"]);
        }
    }
}
