//! The commands.

use super::{
    arguments::Arguments,
    descriptors, dirty_rate,
    place::place,
    power,
    protocol::{Failure, Request},
};
use crate::{
    migration::{Address, Capabilities, KNOWN_CAPABILITIES, Parameters, Status},
    vmm::{RunState, Vmm},
};
use serde_json::{Map, Value, json};
use std::sync::Arc;

type Command = fn(&Arc<Vmm>, &mut Arguments) -> Result<Value, Failure>;

/// The command after which the monitor ends.
pub(super) const QUIT: &str = "quit";

/// Every command but `qmp_capabilities`.
const COMMANDS: [(&str, Command); 35] = [
    ("add-fd", descriptors::add_fd),
    ("calc-dirty-rate", dirty_rate::calc),
    ("cancel-vcpu-dirty-limit", dirty_rate::cancel_limit),
    ("closefd", descriptors::closefd),
    ("cont", cont),
    ("getfd", descriptors::getfd),
    ("migrate", migrate),
    ("migrate-continue", migrate_continue),
    ("migrate-incoming", migrate_incoming),
    ("migrate-pause", migrate_pause),
    ("migrate-recover", migrate_recover),
    ("migrate-set-capabilities", migrate_set_capabilities),
    ("migrate-set-parameters", migrate_set_parameters),
    ("migrate-start-postcopy", migrate_start_postcopy),
    ("migrate_cancel", migrate_cancel),
    ("query-commands", query_commands),
    ("query-dirty-rate", dirty_rate::query),
    ("query-fdsets", descriptors::query_fdsets),
    ("query-migrate", query_migrate),
    ("query-migrate-capabilities", query_migrate_capabilities),
    ("query-migrate-parameters", query_migrate_parameters),
    ("query-name", query_nothing),
    ("query-status", query_status),
    ("query-vcpu-dirty-limit", dirty_rate::query_limit),
    ("query-version", query_version),
    (QUIT, quit),
    ("remove-fd", descriptors::remove_fd),
    ("set-action", power::set_action),
    ("set-vcpu-dirty-limit", dirty_rate::set_limit),
    ("stop", stop),
    ("system_powerdown", power::system_powerdown),
    ("system_reset", power::system_reset),
    ("x-query-handover", query_handover),
    ("x-query-rounds", query_rounds),
    ("x-set-peer", set_peer),
];

/// Runs a command.
pub(super) fn execute(vmm: &Arc<Vmm>, name: &str, arguments: Map<String, Value>) -> Result<Value, Failure> {
    let command = command(name)?;
    let mut arguments = Arguments::new(arguments);
    // A command takes what it knows before it does anything, and whatever is left then is refused by it.
    command(vmm, &mut arguments)
}

fn command(name: &str) -> Result<Command, Failure> {
    let command = COMMANDS.iter().find(|(known, _)| *known == name);
    command
        .map(|(_, command)| *command)
        .ok_or_else(|| Failure::not_found(format!("The command {name} has not been found")))
}

/// Checks a request as far as that needs no machine: that there is the command, and what places, parameters and capabilities the
/// commands of migrations are given. Nothing is carried out.
///
/// # Errors
/// What the client would be told.
pub fn check_arguments(request: &Request) -> Result<(), Failure> {
    let (name, mut arguments) = (request.execute.as_str(), Arguments::new(request.arguments.clone()));
    let refuse = |error: &dyn std::fmt::Display| Failure::generic(error.to_string());
    match name {
        "migrate" | "migrate-incoming" => drop(place(&mut arguments)?.look_at()?),
        "migrate-set-parameters" => drop(Parameters::default().with(&arguments.drain()).map_err(|e| refuse(&e))?),
        "migrate-set-capabilities" => {
            let changes = capability_changes(&mut arguments)?;
            let changes = changes.iter().map(|(name, state)| (name.as_str(), *state));
            Capabilities::default().with(changes).map_err(|e| refuse(&e))?;
        }
        _ => return command(name).map(drop),
    }
    Ok(())
}

/// Ends the taking of arguments.
pub(super) fn only(arguments: &mut Arguments) -> Result<(), Failure> {
    Arguments::new(arguments.drain()).finish()
}

pub(super) fn empty() -> Value {
    json!({})
}

fn stop(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    vmm.stop();
    Ok(empty())
}

fn cont(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    if vmm.outgoing().status() == Status::Device || vmm.outgoing().status() == Status::PreSwitchover {
        return Err(Failure::generic("Resuming is not allowed while a migration is about to be finished"));
    }
    vmm.cont().map_err(|error| Failure::generic(error.to_string()))?;
    Ok(empty())
}

/// The server ends the monitor when the reply is out: the process may be gone a moment later.
fn quit(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    Ok(empty())
}

fn query_status(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    let state = vmm.run_state();
    Ok(json!({ "status": state.as_str(), "running": state == RunState::Running }))
}

fn query_nothing(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    Ok(empty())
}

/// What greeting and `query-version` say.
pub(super) fn version(vmm: &Vmm) -> Value {
    let release = vmm.profile().qemu;
    json!({
        "qemu": { "micro": 0, "minor": release.minor, "major": release.major },
        "package": concat!("reference-vmm ", env!("CARGO_PKG_VERSION")),
    })
}

fn query_version(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    Ok(version(vmm))
}

fn query_commands(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    let names = COMMANDS.iter().map(|(name, _)| *name).chain(["qmp_capabilities"]);
    Ok(names.map(|name| json!({ "name": name })).collect())
}

fn migrate(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let address = place(arguments)?;
    // QEMU ignored `detach` as long as it had it, which was up to 10.x.
    arguments.flag("detach")?;
    let resume = arguments.flag("resume")?;
    only(arguments)?;
    let address = address.look_at()?;
    if resume {
        return Err(Failure::generic("Cannot resume if there is no paused migration"));
    }
    if vmm.run_state() == RunState::Inmigrate {
        return Err(Failure::generic("Guest is waiting for an incoming migration"));
    }
    vmm.migrate(address).map_err(|error| Failure::generic(error.to_string()))?;
    Ok(empty())
}

fn migrate_incoming(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let address = place(arguments)?;
    let exit_on_error = arguments.optional_flag("exit-on-error")?.unwrap_or(true);
    only(arguments)?;
    if !vmm.expects_guest() {
        return Err(Failure::generic("'-incoming' was not specified on the command line"));
    }
    if !vmm.may_listen() {
        return Err(Failure::generic("The incoming migration has already been started"));
    }
    vmm.listen(&address.look_at()?, exit_on_error).map_err(|error| Failure::generic(error.to_string()))?;
    Ok(empty())
}

fn migrate_cancel(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    vmm.outgoing().cancel();
    Ok(empty())
}

/// Every status that QEMU 11.1 has a name for.
const STATUSES: [&str; 17] = [
    "none",
    "setup",
    "cancelling",
    "cancelled",
    "active",
    "postcopy-device",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover-setup",
    "postcopy-recover",
    "completed",
    "failing",
    "failed",
    "colo",
    "pre-switchover",
    "device",
    "wait-unplug",
];

fn migrate_continue(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let state = arguments.choice("state", &STATUSES)?;
    only(arguments)?;
    let status = vmm.outgoing().status();
    if status.as_str() != state {
        return Err(Failure::generic(format!("Migration not in expected state: {}", status.as_str())));
    }
    if status == Status::PreSwitchover {
        vmm.outgoing().go_on().map_err(|error| Failure::generic(error.to_string()))?;
    }
    Ok(empty())
}

/// There is no postcopy here, so it is never in a state that could be paused.
fn migrate_pause(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    Err(Failure::generic("migrate-pause is currently only supported during postcopy-active or postcopy-recover state"))
}

fn migrate_recover(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    arguments.text("uri")?;
    only(arguments)?;
    Err(Failure::generic("Migrate recover can only be run when postcopy is paused."))
}

fn migrate_start_postcopy(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    Err(Failure::generic("Enable postcopy with migrate_set_capability before the start of migration"))
}

fn migrate_set_capabilities(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let changes = capability_changes(arguments)?;
    let changes = changes.iter().map(|(name, state)| (name.as_str(), *state));
    vmm.set_capabilities(changes).map_err(|error| Failure::generic(error.to_string()))?;
    Ok(empty())
}

fn capability_changes(arguments: &mut Arguments) -> Result<Vec<(String, bool)>, Failure> {
    let list = arguments.list("capabilities")?;
    let mut changes = Vec::new();
    let known = KNOWN_CAPABILITIES.map(|(name, _)| name);
    for (i, item) in list.into_iter().enumerate() {
        let mut item = arguments.inner(item, &format!("capabilities[{i}]"))?;
        let (name, state) = (item.choice("capability", &known)?, item.required_flag("state")?);
        item.finish()?;
        changes.push((name, state));
    }
    only(arguments)?;
    Ok(changes)
}

fn query_migrate_capabilities(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    let list = vmm.outgoing().capabilities().list();
    debug_assert_eq!(list.len(), KNOWN_CAPABILITIES.len());
    Ok(list.into_iter().map(|(capability, state)| json!({ "state": state, "capability": capability })).collect())
}

fn migrate_set_parameters(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let parameters = vmm.outgoing().parameters().with(&arguments.drain());
    vmm.outgoing().set_parameters(parameters.map_err(|error| Failure::generic(error.to_string()))?);
    Ok(empty())
}

fn query_migrate_parameters(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    Ok(Value::Object(vmm.outgoing().parameters().list()))
}

fn query_migrate(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    let outgoing = vmm.outgoing().statistics();
    let mut object = match outgoing.status {
        Status::None => vmm.incoming().statistics().to_json_incoming(),
        _ => outgoing.to_json(),
    };
    if outgoing.status == Status::None
        && let Some(address) = vmm.listening().as_ref().and_then(socket_address)
    {
        object["socket-address"] = json!([address]);
    }
    dirty_rate::add_limit_times(vmm, &mut object);
    let blockers = vmm.blockers();
    if !blockers.is_empty() {
        object["blocked-reasons"] = json!(blockers);
    }
    Ok(object)
}

/// Where others find a socket; nothing else has an address.
fn socket_address(address: &Address) -> Option<Value> {
    Some(match address {
        Address::Tcp { host, port } => json!({ "port": port.to_string(), "type": "inet", "host": host }),
        Address::Unix(path) => json!({ "path": path.display().to_string(), "type": "unix" }),
        _ => return None,
    })
}

/// An extension: when the guest was stopped and started here by `CLOCK_MONOTONIC`, in ns. On one host the difference
/// between destination and source is the gap that the guest's users see.
fn query_handover(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    let nanos = |time: Option<std::time::Duration>| time.map(|time| time.as_nanos() as u64);
    Ok(json!({
        "stopped-at": nanos(vmm.outgoing().statistics().stopped_at),
        "started-at": nanos(vmm.started_at()),
    }))
}

/// An extension: the rounds of the outgoing migration.
fn query_rounds(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    let rounds = vmm.outgoing().statistics().rounds;
    let round = |round: &crate::migration::RoundStatistics| {
        json!({
            "start-us": round.start.as_micros() as u64,
            "took-us": round.took.as_micros() as u64,
            "pages": round.pages,
            "bytes": round.bytes,
            "dirty-rate": round.dirty_rate,
        })
    };
    Ok(rounds.iter().map(round).collect())
}

/// An extension: the QEMU release at the other end of the next migration, which decides its bytes, as `--machine
/// microvm,qemu=RELEASE,peer-accel=ACCEL` says it at the start.
fn set_peer(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let release = arguments.text("qemu")?;
    let accel = arguments.optional_text("accel")?;
    only(arguments)?;
    let kvm = match accel.as_deref() {
        None | Some("kvm") => true,
        Some("tcg") => false,
        Some(other) => return Err(Failure::generic(format!("accel '{other}': expected kvm or tcg"))),
    };
    vmm.set_peer(release.parse().map_err(|bad| Failure::generic(format!("qemu '{release}': {bad}")))?, kvm);
    Ok(empty())
}
