//! The commands.

use super::address::{AddressArgument, parse_channel_address, parse_channel_addresses};
use super::arguments::{Arguments, empty, finish};
use super::protocol::{Failure, Request};
use super::{descriptors, dirty_rate, human, objects, parameters, power, queries, statistics};
use crate::vmm::legality::{self, Rule};
use crate::vmm::{RunState, Vmm};
use qevm_migration::{Address, BadAddress, Capabilities, KNOWN_CAPABILITIES, Parameters, Refused, Status};
use qevm_wire::Located;
use serde_json::{Map, Value, json};
use std::net::IpAddr;
use std::sync::Arc;

type Command = fn(&Arc<Vmm>, &mut Arguments) -> Result<Value, Failure>;

/// The command after which the monitor ends.
pub(super) const QUIT: &str = "quit";

/// Every command but `qmp_capabilities`, and when it is refused whatever its arguments.
const COMMANDS: [(&str, Command, &[Rule]); 47] = [
    ("add-fd", descriptors::add_fd, legality::ANYTIME),
    ("announce-self", power::announce_self, legality::ANYTIME),
    ("calc-dirty-rate", dirty_rate::calc, legality::ANYTIME),
    ("cancel-vcpu-dirty-limit", dirty_rate::cancel_limit, legality::ANYTIME),
    ("closefd", descriptors::closefd, legality::ANYTIME),
    ("cont", cont, legality::CONT),
    ("getfd", descriptors::getfd, legality::ANYTIME),
    ("human-monitor-command", human_monitor_command, legality::ANYTIME),
    ("migrate", migrate, legality::MIGRATE),
    ("migrate-continue", migrate_continue, legality::ANYTIME),
    ("migrate-incoming", migrate_incoming, legality::MIGRATE_INCOMING),
    ("migrate-pause", migrate_pause, legality::ANYTIME),
    ("migrate-recover", migrate_recover, legality::ANYTIME),
    ("migrate-set-capabilities", migrate_set_capabilities, legality::SET_CAPABILITIES),
    ("migrate-set-parameters", migrate_set_parameters, legality::ANYTIME),
    ("migrate-start-postcopy", migrate_start_postcopy, legality::ANYTIME),
    ("migrate_cancel", migrate_cancel, legality::ANYTIME),
    ("object-add", objects::add, legality::ANYTIME),
    ("object-del", objects::delete, legality::ANYTIME),
    ("query-commands", query_commands, legality::ANYTIME),
    ("query-cpus-fast", queries::cpus, legality::ANYTIME),
    ("query-dirty-rate", dirty_rate::query, legality::ANYTIME),
    ("query-fdsets", descriptors::query_fdsets, legality::ANYTIME),
    ("query-kvm", queries::kvm, legality::ANYTIME),
    ("query-memory-size-summary", queries::memory_size, legality::ANYTIME),
    ("query-migrate", query_migrate, legality::ANYTIME),
    ("query-migrate-capabilities", query_migrate_capabilities, legality::ANYTIME),
    ("query-migrate-parameters", query_migrate_parameters, legality::ANYTIME),
    ("query-name", query_nothing, legality::ANYTIME),
    ("query-qmp-schema", queries::schema, legality::ANYTIME),
    ("query-status", query_status, legality::ANYTIME),
    ("query-target", queries::target, legality::ANYTIME),
    ("query-uuid", queries::uuid, legality::ANYTIME),
    ("query-vcpu-dirty-limit", dirty_rate::query_limit, legality::ANYTIME),
    ("query-version", query_version, legality::ANYTIME),
    ("query-yank", queries::yankable, legality::ANYTIME),
    (QUIT, quit, legality::ANYTIME),
    ("remove-fd", descriptors::remove_fd, legality::ANYTIME),
    ("set-action", power::set_action, legality::ANYTIME),
    ("set-vcpu-dirty-limit", dirty_rate::set_limit, legality::ANYTIME),
    ("stop", stop, legality::ANYTIME),
    ("system_powerdown", power::system_powerdown, legality::ANYTIME),
    ("system_reset", power::system_reset, legality::ANYTIME),
    ("x-query-handover", query_handover, legality::ANYTIME),
    ("x-query-rounds", query_rounds, legality::ANYTIME),
    ("x-set-peer", set_peer, legality::ANYTIME),
    ("yank", queries::yank, legality::ANYTIME),
];

/// Runs a command.
pub(super) fn execute(vmm: &Arc<Vmm>, name: &str, arguments: Map<String, Value>) -> Result<Value, Failure> {
    let (command, rules) = command(name)?;
    let mut arguments = Arguments::of_command(vmm, rules, arguments);
    // A command takes what it knows before it does anything, and is refused then if anything is left, or if it is not
    // legal now.
    command(vmm, &mut arguments)
}

fn command(name: &str) -> Result<(Command, &'static [Rule]), Failure> {
    let command = COMMANDS.iter().find(|(known, ..)| *known == name);
    command
        .map(|(_, command, rules)| (*command, *rules))
        .ok_or_else(|| Failure::not_found(format!("The command {name} has not been found")))
}

/// Checks a request as far as that needs no machine: that there is the command, and what places, parameters and
/// capabilities the commands of migrations are given. Nothing is carried out.
///
/// # Errors
/// What the client would be told.
pub fn check_arguments(request: &Request) -> Result<(), Failure> {
    let (name, mut arguments) = (request.execute.as_str(), Arguments::new(request.arguments.clone()));
    let refuse = |error: &dyn std::fmt::Display| Failure::generic(error.to_string());
    match name {
        "migrate" | "migrate-incoming" => drop(parse_channel_addresses(&mut arguments)?.0.resolve()?),
        "migrate-set-parameters" => {
            drop(parameters::with(&Parameters::default(), &arguments.drain()).map_err(|e| refuse(&e))?)
        }
        "migrate-set-capabilities" => {
            let changes = capability_changes(&mut arguments)?;
            let changes = changes.iter().map(|(name, state)| (name.as_str(), *state));
            Capabilities::default().with(changes).map_err(|e| refuse(&e))?;
        }
        _ => return command(name).map(drop),
    }
    Ok(())
}

/// Its commands are others of these, by other names.
fn human_monitor_command(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    human::command(vmm, arguments, execute)
}

fn stop(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    vmm.stop();
    Ok(empty())
}

fn cont(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    vmm.cont().map_err(|error| Failure::generic(error.to_string()))?;
    Ok(empty())
}

/// The server ends the monitor when the reply is out: the process may be gone a moment later.
fn quit(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    Ok(empty())
}

fn query_status(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    let state = vmm.run_state();
    Ok(json!({ "status": state.as_str(), "running": state == RunState::Running }))
}

fn query_nothing(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    Ok(empty())
}

fn query_version(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    Ok(queries::version(vmm))
}

fn query_commands(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    let names = COMMANDS.iter().map(|(name, ..)| *name).chain(["qmp_capabilities"]);
    Ok(names.map(|name| json!({ "name": name })).collect())
}

fn migrate(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let (address, cpr) = parse_channel_addresses(arguments)?;
    // QEMU ignored `detach` as long as it had it, which was up to 10.x.
    arguments.flag("detach")?;
    let resume = arguments.flag("resume")?;
    arguments.complete()?;
    let (address, cpr) = (address.resolve()?, cpr.map(AddressArgument::resolve).transpose()?);
    let begun = if resume {
        vmm.resume_migration(&address)
    } else {
        arguments.legal()?;
        vmm.migrate_by(address, cpr)
    };
    begun.map_err(|error| Failure::generic(error.to_string()))?;
    Ok(empty())
}

fn migrate_incoming(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let address = parse_channel_address(arguments)?;
    let exit_on_error = arguments.optional_flag("exit-on-error")?.unwrap_or(true);
    finish(arguments)?;
    vmm.listen(&address.resolve()?, exit_on_error).map_err(|error| Failure::generic(error.to_string()))?;
    Ok(empty())
}

fn migrate_cancel(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    vmm.outgoing().cancel()?;
    Ok(empty())
}

fn migrate_continue(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let state = arguments.choice("state", &statistics::STATUSES)?;
    finish(arguments)?;
    let status = vmm.outgoing().status();
    if status.as_str() != state {
        return Err(Refused::NotInState(status).into());
    }
    if status == Status::PreSwitchover {
        vmm.outgoing().continue_switchover()?;
    }
    Ok(empty())
}

/// A postcopy from here, or one to here.
fn migrate_pause(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    if vmm.outgoing().status().is_postcopy() {
        vmm.outgoing().pause()?;
    } else {
        vmm.pause_postcopy()?;
    }
    Ok(empty())
}

fn migrate_recover(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let uri = arguments.text("uri")?;
    finish(arguments)?;
    let address = uri.parse().map_err(|error: Located<BadAddress>| Failure::generic(error.kind.to_string()))?;
    vmm.recover_postcopy(&address).map_err(|error| Failure::generic(error.to_string()))?;
    Ok(empty())
}

fn migrate_start_postcopy(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    vmm.outgoing().start_postcopy()?;
    Ok(empty())
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
        item.complete()?;
        changes.push((name, state));
    }
    finish(arguments)?;
    Ok(changes)
}

fn query_migrate_capabilities(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    let list = vmm.outgoing().capabilities().list();
    debug_assert_eq!(list.len(), KNOWN_CAPABILITIES.len());
    Ok(list.into_iter().map(|(capability, state)| json!({ "state": state, "capability": capability })).collect())
}

fn migrate_set_parameters(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let changed = parameters::with(&vmm.outgoing().parameters(), &arguments.drain());
    let changed = changed.map_err(|error| Failure::generic(error.to_string()))?;
    vmm.set_parameters(changed).map_err(|error| Failure::generic(error.to_string()))?;
    Ok(empty())
}

fn query_migrate_parameters(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    Ok(Value::Object(parameters::list(&vmm.outgoing().parameters())))
}

fn query_migrate(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    let outgoing = vmm.outgoing().statistics();
    let mut object = match outgoing.status {
        Status::None => statistics::incoming(&vmm.incoming().statistics()),
        _ => statistics::outgoing(&outgoing),
    };
    if outgoing.status == Status::None
        && vmm.incoming().status() != Status::Completed
        && let Some(address) = vmm.listening().as_ref().and_then(socket_address)
    {
        object["socket-address"] = json!([address]);
    }
    if outgoing.status == Status::None
        && let Some(progress) = vmm.restore_progress()
    {
        object["ram"] = json!({ "remaining": progress.remaining, "postcopy-requests": progress.requests });
    }
    if outgoing.status == Status::None
        && let Some(times) = vmm.block_times()
    {
        statistics::add_block_times(&mut object, &times);
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
        Address::Tcp { host, port, .. } => {
            let mut address = json!({ "port": port.to_string(), "type": "inet", "host": host });
            match host.parse() {
                Ok(IpAddr::V4(_)) => address["ipv4"] = true.into(),
                Ok(IpAddr::V6(_)) => address["ipv6"] = true.into(),
                Err(_) => {}
            }
            address
        }
        Address::Abstract { name, tight } => json!({ "path": name, "type": "unix", "abstract": true, "tight": tight }),
        Address::Unix(path) => json!({ "path": path.display().to_string(), "type": "unix" }),
        _ => return None,
    })
}

/// An extension: when the guest was stopped and started here by `CLOCK_MONOTONIC`, in ns. On one host the difference
/// between destination and source is the gap that the guest's users see.
fn query_handover(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    let nanos = |time: Option<std::time::Duration>| time.map(|time| time.as_nanos() as u64);
    Ok(json!({
        "stopped-at": nanos(vmm.outgoing().statistics().stopped_at),
        "started-at": nanos(vmm.started_at()),
    }))
}

/// An extension: the rounds of the outgoing migration.
fn query_rounds(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    let rounds = vmm.outgoing().statistics().rounds;
    let round = |round: &qevm_migration::RoundStatistics| {
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
    finish(arguments)?;
    let kvm = match accel.as_deref() {
        None | Some("kvm") => true,
        Some("tcg") => false,
        Some(other) => return Err(Failure::generic(format!("accel '{other}': expected kvm or tcg"))),
    };
    vmm.set_peer(release.parse().map_err(|bad| Failure::generic(format!("qemu '{release}': {bad}")))?, kvm);
    Ok(empty())
}
