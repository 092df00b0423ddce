//! Pages that a source sends as differences to what it has sent of them before (capability `xbzrle`).

use super::endpoint::Endpoint;
use super::rows::{PEERS, plain};
use super::{Departure, Journey, Link, Load, Stop};
use crate::patience::PATIENCE;
use crate::scenario::Accel;
use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

/// More pages than this have to go as differences, which a guest on a busy host takes long to write to.
const PAGES: u64 = 100;
/// `downtime-limit` from then on, ms.
const DOWNTIME_LIMIT: u64 = 50;

/// Each release in both directions, reference-vmm with itself, and every pair of kinds of source and destination one
/// after the other, so that what each sends can be compared: the guest does the same on every hop.
pub(super) fn journeys() -> Vec<Journey> {
    let peers = PEERS.map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let [old, _, new] = peers;
    let reference = Stop::Reference;
    // It rewrites a few bytes of each page of 4 MiB, six times a second, which takes longer than that to send in full.
    let payload = "dirty=4M rate=24M hold=4M zero=2M verify=16384 report=20".into();
    let load = Load { payload, max_bandwidth: 16 << 20, downtime_limit: 1, ..Load::default() };
    let journey = |name: String, stops: Vec<Stop>| Journey {
        name,
        stops,
        capabilities: vec!["return-path", "xbzrle"],
        load: load.clone(),
        ..plain()
    };
    let mut journeys = Vec::new();
    let ways = peers.into_iter().flat_map(|qemu| [[reference, qemu], [qemu, reference]]).chain([[reference; 2]]);
    for stops in ways {
        let name = format!("{}>{}/xbzrle", stops[0], stops[1]);
        journeys.push(Journey { quick: stops == [reference, new], ..journey(name, stops.into()) });
        // Not all of what the guest writes to is remembered.
        let name = format!("{}>{}/xbzrle/cache=2M", stops[0], stops[1]);
        let mut parameters = Map::new();
        parameters.insert("xbzrle-cache-size".into(), (2 << 20).into());
        let quick = stops == [reference; 2];
        journeys.push(Journey { link: Link::Tcp, parameters, quick, ..journey(name, stops.into()) });
        // What comes after the guest comes in full.
        let name = format!("{}>{}/xbzrle+postcopy", stops[0], stops[1]);
        let capabilities = vec!["xbzrle", "postcopy-ram"];
        let (postcopy, load) = (Some(Departure::AfterPass), Departure::AfterPass.load());
        journeys.push(Journey { capabilities, postcopy, load, ..journey(name, stops.into()) });
    }
    let stops = vec![old, old, reference, reference, new, new, reference, new];
    journeys.push(Journey { load: Load { cpus: 2, ..load.clone() }, ..journey("ring/xbzrle".into(), stops) });
    journeys
}

/// Lets the migration complete when enough was sent as differences.
pub(super) fn let_complete(source: &mut Endpoint) -> Result<()> {
    let enough = |migration: &Value| migration["xbzrle-cache"]["pages"].as_u64() > Some(PAGES);
    source.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed" || enough(migration))?;
    source.monitor().set_parameters(&json!({ "downtime-limit": DOWNTIME_LIMIT }))?;
    Ok(())
}

/// What the source of a migration that has completed says must be small differences.
pub(super) fn judge(done: &Value) -> Result<()> {
    let cache = &done["xbzrle-cache"];
    // The guest rewrites six words of most pages, and that is less than 100 bytes.
    let saved = cache["pages"].as_u64().zip(cache["bytes"].as_u64());
    let saved = saved.is_some_and(|(pages, bytes)| pages > PAGES && bytes < 400 * pages);
    ensure!(saved, "the source has not sent small differences: {done}");
    Ok(())
}
